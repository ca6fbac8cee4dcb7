//! The host's network as puterd keeps it: brings the bridge up, makes and removes TAPs.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use rustix::io::Errno;

use super::api::{ApiError, Backend};
use super::bridge::{self, Plan, Settings};
use super::network6::{self, Way};
use super::resolvers;
use super::taps::{Action, Alias, Place};
use crate::dhcp::server::Server;
use crate::dhcp::{Config, Directory, Engine, Host};
use crate::dns::{self, Names};
use crate::net::address::{self, Address};
use crate::net::link::{self, Link};
use crate::net::nft::{self, Guest, Policy};
use crate::net::{Socket, route, sysctl, tap};
use crate::protocol::address::{Mac, Subnet, tap_name};
use crate::protocol::daemon::{Lease, Membership, Status, Tap, TapRequest};
use crate::protocol::ipv6::Network6;

/// The host's name servers.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The VMs that have a TAP.
#[derive(Debug, Default)]
struct Known {
    vms: BTreeMap<u32, Alias>,
    ids: HashMap<String, u32>,
    /// The VM of each place in a cluster.
    members: BTreeMap<Membership, String>,
}

impl Known {
    fn new(all: impl Iterator<Item = Alias>) -> Known {
        let mut known = Known::default();
        all.for_each(|alias| known.add(alias));
        known
    }

    fn add(&mut self, alias: Alias) {
        self.remove(&alias.vm);
        if let Some(former) = self.vms.get(&alias.id).map(|former| former.vm.clone()) {
            self.remove(&former);
        }
        if let Some(member) = alias.member.clone() {
            self.members.insert(member, alias.vm.clone());
        }
        self.ids.insert(alias.vm.clone(), alias.id);
        self.vms.insert(alias.id, alias);
    }

    fn remove(&mut self, vm: &str) {
        let alias = self.ids.remove(vm).and_then(|id| self.vms.remove(&id));
        if let Some(member) =
            alias.and_then(|alias| alias.member).filter(|it| self.members.get(it).is_some_and(|of| of == vm))
        {
            self.members.remove(&member);
        }
    }
}

/// The bridge and its TAPs. One request at a time changes them.
pub struct Network {
    pub(super) settings: Settings,
    pub(super) place: Place,
    socket: Mutex<Socket>,
    /// The VM of each id, as of the last time that its interface was looked at: what DHCP answers from.
    known: RwLock<Known>,
    /// What DHCP has lent.
    dhcp: Arc<Mutex<Engine>>,
    /// TAPs that are gone, and whose filters may be left.
    gone: Mutex<Vec<String>>,
    /// To the outside, by IPv6.
    pub(super) way: Way,
    /// What the watch found that it could not mend.
    pub(super) troubles: Mutex<Vec<String>>,
    /// Set, with the socket locked, when all is about to be removed.
    pub(super) closing: AtomicBool,
    started: Instant,
}

impl Network {
    /// Makes the network what it must be, adopting what a former run left. Nothing is interrupted that is right.
    ///
    /// # Errors
    /// A clash with the host's network, or the kernel's refusal, with what was tried and the way out.
    pub fn start(settings: Settings) -> Result<Network> {
        let mut socket = Socket::route().context("cannot open a netlink socket")?;
        let links = link::list(&mut socket).context("cannot list the interfaces")?;
        let addresses = address::list(&mut socket).context("cannot list the addresses")?;
        let routes = route::list(&mut socket).context("cannot list the routes")?;
        let plan = bridge::plan(&settings, &links, &addresses, &routes).map_err(|e| anyhow!(e))?;
        let plan6 = network6::plan(&mut socket, &settings, &links)?;
        let index = bring_up(&mut socket, &settings, plan, &addresses)?;
        network6::bring_up(&mut socket, &settings.bridge, index, &plan6)?;
        let place = Place { bridge: index, uid: settings.uid, subnet: settings.subnet, network6: plan6.network };
        install(&policy(&settings, &place), &guests(&place, &links))?;
        // Last: with forwarding on before its filter, the host would forward for anyone.
        if sysctl::enable_forwarding()? {
            log!("turned IPv4 forwarding on");
        }
        // VMs that run lose nothing by it: their own route is more exact, or came first.
        if let Some(what) = bridge::overlap(settings.subnet, index, &links, &addresses, &routes) {
            log!("{what}: VMs go on, but what is there is not reached from them; for new VMs {}", bridge::FREE_RANGE);
        }
        let config = Config { dns: resolvers::of_host(), ..Config::new(settings.subnet) };
        let network = Network {
            settings,
            place,
            socket: Mutex::new(socket),
            known: RwLock::default(),
            dhcp: Arc::new(Mutex::new(Engine::new(config))),
            gone: Mutex::default(),
            way: Way::default(),
            troubles: Mutex::default(),
            closing: AtomicBool::new(false),
            started: Instant::now(),
        };
        network.adopt()?;
        let forward = network.must_forward6(&mut network.lock())?;
        if forward {
            network.forward6()?;
            log!("turned IPv6 forwarding on");
        }
        if let Some(network) = plan6.network {
            log!("guests have IPv6: {network}");
        }
        Ok(network)
    }

    /// Puts a former run's TAPs back on the bridge and removes those which it had no time to mark.
    fn adopt(&self) -> Result<()> {
        let mut socket = self.lock();
        let mut adopted = 0;
        let links = link::list(&mut socket).context("cannot list the interfaces")?;
        let guests = guests(&self.place, &links);
        nft::guard(&self.settings.bridge, &guests).context("cannot filter the TAPs in nftables")?;
        for link in links {
            if let Some(alias) = self.place.marked(&link) {
                self.finish(&mut socket, &link, &alias)
                    .with_context(|| format!("cannot adopt the TAP {}", link.name))?;
                adopted += 1;
            } else if self.place.half_made(&link) {
                link::delete(&mut socket, link.index)
                    .with_context(|| format!("cannot remove the half-made TAP {}", link.name))?;
                log!("removed the half-made TAP {}", link.name);
            } else if link.master == Some(self.place.bridge) {
                log!("{} is on {} and not puterd's: left alone", link.name, self.settings.bridge);
            }
        }
        if adopted > 0 {
            log!("adopted {adopted} TAP{}", if adopted == 1 { "" } else { "s" });
        }
        self.refresh(&mut socket).map(drop)
    }

    /// Makes a guarded TAP all that its alias says, touching only what differs.
    pub(super) fn finish(&self, socket: &mut Socket, link: &Link, alias: &Alias) -> Result<(), crate::net::Error> {
        let text = alias.to_string();
        if link.alias.as_deref() != Some(&text) {
            link::set_alias(socket, link.index, &text)?;
        }
        if link.master != Some(self.place.bridge) {
            link::set_master(socket, link.index, self.place.bridge)?;
        }
        if link.isolated != alias.isolated || link.master != Some(self.place.bridge) {
            link::set_isolated(socket, link.index, alias.isolated)?;
        }
        if !link.up {
            link::set_up(socket, link.index)?;
        }
        Ok(())
    }

    /// Removes the TAPs, the bridge, the nftables tables and the rules in those of others.
    ///
    /// # Errors
    /// The kernel's first refusal.
    pub fn tear_down(&self) -> Result<()> {
        let mut socket = self.lock();
        self.closing.store(true, Ordering::SeqCst);
        for link in link::list(&mut socket).context("cannot list the interfaces")? {
            if self.place.marked(&link).is_some() {
                link::delete(&mut socket, link.index)
                    .with_context(|| format!("cannot remove the TAP {}", link.name))?;
            }
        }
        link::delete(&mut socket, self.place.bridge)
            .with_context(|| format!("cannot remove the bridge {}", self.settings.bridge))?;
        nft::dismiss(&self.settings.bridge).context("cannot remove puter's rules from iptables' table")?;
        nft::remove(&self.settings.bridge).context("cannot remove the nftables tables")
    }

    /// What the network was made to be.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Begins to answer DHCP on the bridge, on a thread of its own: a guest that floods the server delays no request.
    ///
    /// # Errors
    /// When the sockets cannot be opened.
    pub fn serve_dhcp(self: &Arc<Self>) -> Result<()> {
        let server =
            Server::bind(&self.settings.bridge, self.dhcp.clone(), self.clone()).context("cannot serve DHCP")?;
        let thread = thread::Builder::new().name("dhcp".into());
        thread.spawn(move || smol::block_on(server.run())).context("cannot start the DHCP server's thread")?;
        Ok(())
    }

    /// Begins to answer DNS on the bridge, and tells guests so by DHCP; where it cannot, they are told of the host's own
    /// servers. Tells whether it does.
    pub fn serve_dns(self: &Arc<Self>) -> bool {
        let served =
            dns::server::Server::bind(&self.settings.bridge, self.clone(), RESOLV_CONF.into()).and_then(|server| {
                let thread = thread::Builder::new().name("dns".into());
                let work = move || {
                    if let Err(error) = smol::block_on(server.run()) {
                        log!("DNS has ended: {error:#}");
                    }
                };
                thread.spawn(work).context("cannot start the DNS server's thread").map(drop)
            });
        match served {
            Ok(()) => {
                self.engine().name_server(self.settings.subnet.gateway(), dns::DOMAIN);
                true
            }
            Err(error) => {
                log!("no DNS for the guests' names: {error:#}; guests are told of the host's own servers");
                false
            }
        }
    }

    fn unguarded(&self) -> MutexGuard<'_, Vec<String>> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the filters of TAPs that are gone; one of a name that there is again was replaced.
    pub(super) fn sweep(&self, socket: &mut Socket) -> Result<()> {
        let gone = std::mem::take(&mut *self.unguarded());
        if gone.is_empty() {
            return Ok(());
        }
        let links = link::list(socket).context("cannot list the interfaces")?;
        let names: Vec<String> = gone.into_iter().filter(|name| links.iter().all(|link| link.name != *name)).collect();
        nft::unguard(&self.settings.bridge, &names).context("cannot remove the filters of TAPs that are gone")
    }

    fn engine(&self) -> MutexGuard<'_, Engine> {
        self.dhcp.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Socket> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists the interfaces and keeps which VM has which id.
    fn refresh(&self, socket: &mut Socket) -> Result<Vec<Link>> {
        let links = link::list(socket).context("cannot list the interfaces")?;
        *self.known_mut() = Known::new(links.iter().filter_map(|l| self.place.marked(l)));
        Ok(links)
    }

    fn known_mut(&self) -> RwLockWriteGuard<'_, Known> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The links that a request for this VM is about: its own, and that of the VM which has the id. All of them would
    /// be more with each machine.
    fn concerned(&self, socket: &mut Socket, vm: &str, id: u32) -> Result<Vec<Link>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let holder = known.vms.get(&id).map(|alias| alias.vm.clone()).filter(|holder| holder != vm);
        drop(known);
        let mut links = Vec::new();
        for vm in [Some(vm), holder.as_deref()].into_iter().flatten() {
            let name = tap_name(vm);
            let found = link::find(socket, &name).with_context(|| format!("cannot look for the interface {name}"))?;
            links.extend(found);
        }
        Ok(links)
    }

    /// What to say where the kernel has no port left on the bridge.
    fn full(&self, error: &anyhow::Error) -> Option<ApiError> {
        let refusal = error.chain().find_map(|cause| cause.downcast_ref::<crate::net::Error>())?;
        let bridge = &self.settings.bridge;
        (refusal.errno == Errno::XFULL).then(|| {
            let message = format!(
                "the bridge {bridge} is full: Linux gives a bridge {MAX_PORTS} ports; stop VMs that need not run, or start a \
                 puterd for others with --home, --bridge and --subnet of its own"
            );
            ApiError::new(507, "bridge_full", message)
        })
    }

    fn make(&self, socket: &mut Socket, request: &TapRequest) -> Result<Tap> {
        let name = tap_name(&request.vm);
        tap::create(&name, self.settings.uid)?;
        network6::silence(&name);
        let Some(link) = link::find(socket, &name).with_context(|| format!("cannot look for the TAP {name}"))? else {
            bail!("the TAP {name} vanished while it was made");
        };
        let made = self.settle(socket, &link, request);
        if made.is_err() {
            // Half a TAP is worse than none; should this fail too, the next start removes it.
            let _ = link::delete(socket, link.index);
        }
        made
    }

    /// Gives a TAP what the request asks for and reads it back.
    fn settle(&self, socket: &mut Socket, link: &Link, request: &TapRequest) -> Result<Tap> {
        let alias = Alias::from(request);
        // Before the first frame can pass: what is not this VM's own stops at the TAP.
        let guest = guest_of(&self.place, &link.name, &alias).context("the id has no address")?;
        // One without an alias is new, or was left half made.
        let guarded = match link.alias {
            None => nft::guard_new(&self.settings.bridge, &guest),
            Some(_) => nft::guard(&self.settings.bridge, std::slice::from_ref(&guest)),
        };
        guarded.with_context(|| format!("cannot filter the TAP {} in nftables", link.name))?;
        if alias.isolated || link.isolated || self.place.marked(link).is_some_and(|former| former.isolated) {
            self.isolate(socket, &guest).with_context(|| format!("cannot isolate the TAP {}", link.name))?;
        }
        self.finish(socket, link, &alias).with_context(|| format!("cannot set up the TAP {}", link.name))?;
        let now = link::get(socket, link.index).with_context(|| format!("cannot look at the TAP {}", link.name))?;
        let tap = now.and_then(|now| self.place.tap(&now));
        let tap = tap.with_context(|| format!("the TAP {} vanished while it was set up", link.name))?;
        self.known_mut().add(alias);
        Ok(tap)
    }
}

impl Network {
    /// Begins or ends a guest's isolation in nftables.
    fn isolate(&self, socket: &mut Socket, guest: &Guest) -> Result<()> {
        let bridge = &self.settings.bridge;
        match nft::isolate(bridge, guest) {
            // The table was of no use as long as nobody was isolated.
            Err(error) if error.errno == rustix::io::Errno::NOENT => {
                let links = link::list(socket).context("cannot list the interfaces")?;
                let mut all = guests(&self.place, &links);
                all.retain(|other| other.tap != guest.tap);
                all.push(guest.clone());
                install(&policy(&self.settings, &self.place), &all)
            }
            other => Ok(other?),
        }
    }
}

/// The rules that hold for all guests of this bridge.
pub(super) fn policy(settings: &Settings, place: &Place) -> Policy {
    let Settings { bridge, subnet, host_ports, .. } = settings;
    Policy { bridge: bridge.clone(), subnet: *subnet, network6: place.network6, host_ports: host_ports.clone() }
}

/// Puts the bridge's nftables tables in place, and who is isolated.
pub(super) fn install(policy: &Policy, guests: &[Guest]) -> Result<()> {
    let failed = || format!("cannot install the nftables table {}", nft::table_name(&policy.bridge));
    nft::install(policy, guests).with_context(failed)?;
    nft::separate(&policy.bridge, guests).with_context(failed)
}

/// What the guest of a TAP may call itself.
fn guest_of(place: &Place, tap: &str, alias: &Alias) -> Option<Guest> {
    let (address, mac) = (place.subnet.address(alias.id)?, Mac::of_id(alias.id));
    let address6 = place.network6.map(|network| network.address(mac));
    Some(Guest { tap: tap.to_owned(), mac, address, address6, isolated: alias.isolated })
}

/// The guests of all TAPs that carry puterd's mark.
pub(super) fn guests(place: &Place, links: &[Link]) -> Vec<Guest> {
    links.iter().filter_map(|link| guest_of(place, &link.name, &place.marked(link)?)).collect()
}

/// The most ports of a bridge (BR_MAX_PORTS, net/bridge/br_private.h; number 0 is none).
const MAX_PORTS: usize = 1023;

/// Makes or adopts the bridge and returns its number.
fn bring_up(socket: &mut Socket, settings: &Settings, plan: Plan, addresses: &[Address]) -> Result<u32> {
    let name = &settings.bridge;
    let index = match plan {
        Plan::Adopt { index, outdated } => {
            for old in outdated {
                address::remove(socket, old)
                    .with_context(|| format!("cannot take {}/{} from {name}", old.address, old.prefix))?;
                log!("took {}/{} from {name}", old.address, old.prefix);
            }
            index
        }
        Plan::Create => {
            link::create_bridge(socket, name, bridge::MAC)
                .with_context(|| format!("cannot create the bridge {name}"))?;
            let links = link::list(socket).context("cannot list the interfaces")?;
            links.iter().find(|l| l.name == *name).map(|l| l.index).context("the bridge vanished while it was made")?
        }
    };
    let kernel = || format!("cannot set up the bridge {name}");
    link::set_alias(socket, index, &bridge::alias(settings.uid)).with_context(kernel)?;
    let address = Address { index, address: settings.subnet.gateway(), prefix: settings.subnet.prefix() };
    if !addresses.contains(&address) {
        address::add(socket, address).with_context(|| format!("cannot give {name} the address {}", settings.subnet))?;
    }
    link::set_up(socket, index).with_context(kernel)?;
    Ok(index)
}

fn internal(error: anyhow::Error) -> ApiError {
    ApiError::new(500, "internal", format!("{error:#}"))
}

impl Directory for Network {
    /// The VM and the address that a guest's MAC stands for, from what was last seen of the interfaces; `None` for a
    /// MAC whose VM has no TAP.
    fn host(&self, mac: Mac) -> Option<Host> {
        let id = mac.id()?;
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        Some(Host { vm: known.vms.get(&id)?.vm.clone(), ip: self.settings.subnet.address(id)? })
    }
}

impl Names for Network {
    fn address(&self, vm: &str) -> Option<Ipv4Addr> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        self.settings.subnet.address(*known.ids.get(vm)?)
    }

    fn address6(&self, vm: &str) -> Option<Ipv6Addr> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        Some(self.place.network6?.address(Mac::of_id(*known.ids.get(vm)?)))
    }

    fn name(&self, address: IpAddr) -> Option<String> {
        let id = match address {
            IpAddr::V4(address) => self.settings.subnet.id(address)?,
            IpAddr::V6(address) => self.place.network6?.id(address)?,
        };
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.vms.get(&id).map(|alias| alias.vm.clone())
    }

    fn cluster(&self, address: IpAddr) -> Option<String> {
        let IpAddr::V4(address) = address else { return None };
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let alias = known.vms.get(&self.settings.subnet.id(address)?)?;
        Some(alias.member.as_ref()?.cluster.clone())
    }

    fn member(&self, cluster: &str, member: &str) -> Option<String> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.members.get(&Membership { cluster: cluster.to_owned(), member: member.to_owned() }).cloned()
    }

    fn has_cluster(&self, cluster: &str) -> bool {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let first = Membership { cluster: cluster.to_owned(), member: String::new() };
        known.members.range(first..).next().is_some_and(|(place, _)| place.cluster == cluster)
    }

    fn subnet(&self) -> Subnet {
        self.settings.subnet
    }

    fn network6(&self) -> Option<Network6> {
        self.place.network6
    }
}

impl Backend for Network {
    fn ensure(&self, request: &TapRequest) -> Result<Tap, ApiError> {
        let mut socket = self.lock();
        let links = self.concerned(&mut socket, &request.vm, request.id).map_err(internal)?;
        let (tap, new) = match self.place.decide(request, &links)? {
            Action::Create => (self.make(&mut socket, request), true),
            Action::Finish(link) => (self.settle(&mut socket, &link, request), true),
            Action::Keep(link, _) => (self.settle(&mut socket, &link, request), false),
        };
        let tap = tap.map_err(|error| self.full(&error).unwrap_or_else(|| internal(error)))?;
        if new {
            log!("made the TAP {} for {} ({}, {})", tap.name, tap.vm, tap.ip, tap.mac);
        }
        Ok(tap)
    }

    fn list(&self) -> Result<Vec<Tap>, ApiError> {
        let links = self.refresh(&mut self.lock()).map_err(internal)?;
        Ok(self.place.list(&links))
    }

    fn remove(&self, vm: &str) -> Result<(), ApiError> {
        let mut socket = self.lock();
        let name = tap_name(vm);
        let found = link::find(&mut socket, &name).with_context(|| format!("cannot look for the interface {name}"));
        let link = found.map_err(internal)?.filter(|l| self.place.marked(l).is_some_and(|alias| alias.vm == vm));
        let Some(link) = link else {
            self.known_mut().remove(vm);
            return Err(ApiError::new(404, "no_such_tap", format!("the VM {vm} has no TAP")));
        };
        let removed = link::delete(&mut socket, link.index);
        removed.with_context(|| format!("cannot remove the TAP {}", link.name)).map_err(internal)?;
        // Its filter goes with the next look after the network: the kernel takes its time over that.
        self.unguarded().push(link.name.clone());
        if let Some(alias) = self.place.marked(&link) {
            if let Some(guest) = guest_of(&self.place, &link.name, &alias).filter(|guest| guest.isolated) {
                let free = Guest { isolated: false, ..guest };
                if let Err(error) = self.isolate(&mut socket, &free) {
                    log!("cannot forget the isolation of {}: {error:#}", link.name);
                }
            }
            self.engine().forget(Mac::of_id(alias.id));
        }
        self.known_mut().remove(vm);
        log!("removed the TAP {} of {vm}", link.name);
        Ok(())
    }

    fn status(&self) -> Result<Status, ApiError> {
        Ok(Status {
            version: crate::VERSION.to_owned(),
            pid: process::id(),
            uid: self.settings.uid,
            bridge: self.settings.bridge.clone(),
            subnet: self.settings.subnet,
            ipv6: self.place.network6,
            ipv6_outside: self.way.is_open(),
            taps: self.list()?.len(),
            uptime: self.started.elapsed().as_secs(),
            host_ports: self.settings.host_ports.clone(),
            firewalls: self.firewalls().map_err(internal)?,
            problems: self.problems().map_err(internal)?,
        })
    }

    fn leases(&self) -> Result<Vec<Lease>, ApiError> {
        Ok(self.engine().leases(Instant::now()))
    }
}
