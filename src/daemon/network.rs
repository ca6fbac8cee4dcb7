//! The host's network as puterd keeps it: brings the bridge up, makes and removes TAPs.

use std::process;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use rustix::io::Errno;

use super::api::{ApiError, Backend};
use super::branch::{self, Bridges};
use super::bridge::{self, Plan, Settings};
use super::end::End;
use super::filter::{guest_of, guests};
use super::known::Known;
use super::network6::{self, Way};
use super::removal::{self, Leaving};
use super::resolvers;
use super::taps::{Action, Alias, Place};
use crate::dhcp::server::Server;
use crate::dhcp::{Config, Engine};
use crate::dns;
use crate::net::address::{self, Address};
use crate::net::link::{self, Link};
use crate::net::nft::{self, Chain, Guest};
use crate::net::{Socket, route, sysctl, tap};
use crate::protocol::address::{BRIDGE_MAC, Mac, tap_name};
use crate::protocol::daemon::{Lease, Status, Tap, TapRequest};
use crate::protocol::ipv6::Network6;

/// The host's name servers.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The bridge and its TAPs. One request at a time changes them.
pub struct Network {
    pub(super) settings: Settings,
    /// The guests' IPv6 network, where they have one.
    pub(super) network6: Option<Network6>,
    place: RwLock<Place>,
    socket: Mutex<Socket>,
    /// The VM of each id, as of the last time that its interface was looked at: what DHCP answers from.
    pub(super) known: RwLock<Known>,
    /// What DHCP has lent.
    dhcp: Arc<Mutex<Engine>>,
    /// TAPs that are about to go.
    pub(super) leaving: Leaving,
    /// TAPs that are gone, and whose filters may be left.
    gone: Mutex<Vec<Chain>>,
    /// The generation of nftables in which all of puterd's rules were found right.
    pub(super) sound: Mutex<Option<u32>>,
    /// Up to how many VMs the kernel's limits of neighbours need not be looked at.
    pub(super) neighbours: AtomicUsize,
    /// To the outside, by IPv6.
    pub(super) way: Way,
    /// What the watch found that it could not mend.
    pub(super) troubles: Mutex<Vec<String>>,
    /// Ends what serves on the bridge when that was made anew.
    pub(super) end: End,
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
        let bridges = Bridges::of(&settings, index, &links);
        let place = Place { bridges, uid: settings.uid, subnet: settings.subnet, network6: plan6.network };
        let config = Config { dns: resolvers::of_host(), ..Config::new(settings.subnet) };
        let network = Network {
            settings,
            network6: place.network6,
            place: RwLock::new(place),
            socket: Mutex::new(socket),
            known: RwLock::default(),
            dhcp: Arc::new(Mutex::new(Engine::new(config))),
            leaving: Leaving::default(),
            gone: Mutex::default(),
            sound: Mutex::default(),
            neighbours: AtomicUsize::new(0),
            way: Way::default(),
            troubles: Mutex::default(),
            end: End::default(),
            closing: AtomicBool::new(false),
            started: Instant::now(),
        };
        network.adopt_filters()?;
        // Last: with forwarding on before its filter, the host would forward for anyone.
        if sysctl::enable_forwarding()? {
            log!("turned IPv4 forwarding on");
        }
        // VMs that run lose nothing by it: their own route is more exact, or came first.
        if let Some(what) = bridge::overlap(network.settings.subnet, index, &links, &addresses, &routes) {
            log!("{what}: VMs go on, but what is there is not reached from them; for new VMs {}", bridge::FREE_RANGE);
        }
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

    /// Puts the filters in place for what a former run left, and removes further bridges that nothing is on.
    fn adopt_filters(&self) -> Result<()> {
        let mut socket = self.lock();
        self.clear_former(&mut socket)?;
        let links = self.drop_empty(&mut socket)?;
        self.install(&self.policy(&links), &guests(&self.place(), &links))
    }

    /// Puts a former run's TAPs back on the bridges and removes those which it had no time to mark.
    fn adopt(&self) -> Result<()> {
        let mut socket = self.lock();
        let mut adopted = 0;
        self.complete_all(&mut socket)?;
        let links = self.refresh(&mut socket)?;
        let place = self.place();
        self.guard(&self.policy(&links), &guests(&place, &links))?;
        for link in links {
            if let Some(alias) = place.marked(&link) {
                self.finish(&mut socket, &link, &alias)
                    .with_context(|| format!("cannot adopt the TAP {}", link.name))?;
                adopted += 1;
            } else if place.half_made(&link) {
                link::delete(&mut socket, link.index)
                    .with_context(|| format!("cannot remove the half-made TAP {}", link.name))?;
                log!("removed the half-made TAP {}", link.name);
            } else if place.bridges.holds(link.master) && branch::piece(&self.settings, &link).is_none() {
                log!("{} is on {} and not puterd's: left alone", link.name, self.settings.bridge);
            }
        }
        if adopted > 0 {
            let further = place.bridges.further().count();
            let on = if further > 0 { format!(" on {} bridges", further + 1) } else { String::new() };
            log!("adopted {adopted} TAP{}{on}", if adopted == 1 { "" } else { "s" });
        }
        self.make_room_for_neighbours(adopted);
        Ok(())
    }

    /// Makes a guarded TAP all that its alias says, touching only what differs.
    pub(super) fn finish(&self, socket: &mut Socket, link: &Link, alias: &Alias) -> Result<()> {
        let text = alias.to_string();
        if link.alias.as_deref() != Some(&text) {
            link::set_alias(socket, link.index, &text)?;
        }
        let astray = !self.read_place().bridges.holds(link.master);
        if astray {
            self.attach(socket, link)?;
        }
        if link.isolated != alias.is_alone() || astray {
            link::set_isolated(socket, link.index, alias.is_alone())?;
        }
        if !link.up {
            link::set_up(socket, link.index)?;
        }
        Ok(())
    }

    /// Removes the TAPs, the bridges, the nftables tables and the rules in those of others.
    ///
    /// # Errors
    /// The kernel's first refusal.
    pub fn tear_down(&self) -> Result<()> {
        let mut socket = self.lock();
        self.closing.store(true, Ordering::SeqCst);
        let place = self.place();
        let links = link::list(&mut socket).context("cannot list the interfaces")?;
        let taps: Vec<Link> = links.iter().filter(|link| place.of(link).is_some()).cloned().collect();
        removal::delete_all(&mut socket, &taps)?;
        for (number, branch) in branch::find(&self.settings, &links) {
            self.discard(&mut socket, number, &branch)?;
        }
        link::delete(&mut socket, place.bridges.first())
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
    fn serve_dns(self: &Arc<Self>) -> bool {
        let served =
            dns::server::Server::bind(&self.settings.bridge, self.clone(), RESOLV_CONF.into()).and_then(|server| {
                let thread = thread::Builder::new().name("dns".into());
                let end = self.end.add();
                let work = move || {
                    if let Err(error) = smol::block_on(smol::future::or(server.run(), end.map_ok())) {
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

    /// Begins to answer DNS and to advertise the guests' network, and does so anew whenever the bridge was.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn serve_names(self: &Arc<Self>) -> Result<()> {
        let serve = |network: &Arc<Network>| {
            let dns = network.serve_dns();
            network.serve_ra(dns);
        };
        serve(self);
        let network = self.clone();
        let again = move || {
            while let Ok(()) = network.end.remade() {
                serve(&network);
            }
        };
        thread::Builder::new().name("services".into()).spawn(again).context("cannot start a thread").map(drop)
    }

    pub(super) fn unguarded(&self) -> MutexGuard<'_, Vec<Chain>> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn engine(&self) -> MutexGuard<'_, Engine> {
        self.dhcp.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Socket> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn read_place(&self) -> RwLockReadGuard<'_, Place> {
        self.place.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn place_mut(&self) -> RwLockWriteGuard<'_, Place> {
        self.place.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first bridge's number.
    pub(super) fn bridge(&self) -> u32 {
        self.read_place().bridges.first()
    }

    /// Where TAPs are now.
    pub(super) fn place(&self) -> Place {
        self.read_place().clone()
    }

    /// Lists the interfaces and keeps which VM has which id, and where there is room for more.
    pub(super) fn refresh(&self, socket: &mut Socket) -> Result<Vec<Link>> {
        let links = link::list(socket).context("cannot list the interfaces")?;
        let mut place = self.place_mut();
        place.bridges = Bridges::of(&self.settings, place.bridges.first(), &links);
        *self.known_mut() = Known::new(links.iter().filter_map(|l| place.marked(l)));
        Ok(links)
    }

    pub(super) fn known_mut(&self) -> RwLockWriteGuard<'_, Known> {
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
            match found {
                // One that is about to go, and that somebody has opened meanwhile.
                Some(link) if link.carrier && self.read_place().removed(&link).is_some() => {
                    self.remove_all(socket, &[link])?;
                }
                found => links.extend(found),
            }
        }
        Ok(links)
    }

    /// What to say where the kernel has no port left on the bridge.
    fn full(&self, error: &anyhow::Error) -> Option<ApiError> {
        let refusal = error.chain().find_map(|cause| cause.downcast_ref::<crate::net::Error>())?;
        let bridge = &self.settings.bridge;
        (refusal.errno == Errno::XFULL).then(|| {
            let message = format!(
                "the bridge {bridge} is full: Linux gives a bridge {} ports, and there is none left for a VM or for a \
                 further bridge; remove ports that are not puter's, stop VMs that need not run, or start a puterd for \
                 others with --home, --bridge and --subnet of its own",
                branch::MAX_PORTS
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
        let place = self.place();
        let guest = guest_of(&place, &link.name, &alias).context("the id has no address")?;
        let former = place.marked(link);
        // One that was about to go has a filter, of this or another id.
        let left = place.removed(link).and_then(|left| guest_of(&place, &link.name, &left));
        self.unguarded().extend(left.map(|left| nft::chain_of(&self.settings.bridge, &left)));
        // One without a mark is new, or was left half made.
        let guarded = match former {
            None => self.guard_new(&request.vm, &guest),
            Some(_) => nft::guard(&self.settings.bridge, std::slice::from_ref(&guest)),
        };
        guarded.with_context(|| format!("cannot filter the TAP {} in nftables", link.name))?;
        let before = former.and_then(|former| guest_of(&place, &link.name, &former));
        let before = before.filter(|before| before.isolated.is_some());
        if before.is_some() || guest.isolated.is_some() {
            self.isolate(socket, before.as_ref(), &guest)
                .with_context(|| format!("cannot isolate the TAP {}", link.name))?;
        }
        self.finish(socket, link, &alias).with_context(|| format!("cannot set up the TAP {}", link.name))?;
        let now = link::get(socket, link.index).with_context(|| format!("cannot look at the TAP {}", link.name))?;
        let tap = now.and_then(|now| self.read_place().tap(&now));
        let tap = tap.with_context(|| format!("the TAP {} vanished while it was set up", link.name))?;
        self.known_mut().add(alias);
        Ok(tap)
    }
}

/// Makes or adopts the bridge and returns its number.
pub(super) fn bring_up(socket: &mut Socket, settings: &Settings, plan: Plan, addresses: &[Address]) -> Result<u32> {
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
            link::create_bridge(socket, name, BRIDGE_MAC)
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

impl Backend for Network {
    fn ensure(&self, request: &TapRequest) -> Result<Tap, ApiError> {
        let mut socket = self.lock();
        let links = self.concerned(&mut socket, &request.vm, request.id).map_err(internal)?;
        let action = self.read_place().decide(request, &links)?;
        let (tap, new) = match action {
            Action::Create => (self.make(&mut socket, request), true),
            Action::Finish(link) => (self.settle(&mut socket, &link, request), true),
            Action::Keep(link, _) => (self.settle(&mut socket, &link, request), false),
        };
        let tap = tap.map_err(|error| self.full(&error).unwrap_or_else(|| internal(error)))?;
        if new {
            log!("made the TAP {} for {} ({}, {})", tap.name, tap.vm, tap.ip, tap.mac);
            let vms = self.known.read().unwrap_or_else(PoisonError::into_inner).vms.len();
            self.make_room_for_neighbours(vms);
        }
        Ok(tap)
    }

    fn list(&self) -> Result<Vec<Tap>, ApiError> {
        let links = self.refresh(&mut self.lock()).map_err(internal)?;
        Ok(self.read_place().list(&links))
    }

    fn remove(&self, vm: &str) -> Result<(), ApiError> {
        let mut socket = self.lock();
        let name = tap_name(vm);
        let found = link::find(&mut socket, &name).with_context(|| format!("cannot look for the interface {name}"));
        let place = self.place();
        let named = |link: Link| place.marked(&link).filter(|alias| alias.vm == vm).map(|alias| (link, alias));
        let Some((link, alias)) = found.map_err(internal)?.and_then(named) else {
            self.known_mut().remove(vm);
            return Err(ApiError::new(404, "no_such_tap", format!("the VM {vm} has no TAP")));
        };
        // What holds it is cut off before the answer.
        let removed = match link.carrier {
            true => self.remove_all(&mut socket, std::slice::from_ref(&link)),
            false => self.leave(&mut socket, &link, &alias),
        };
        removed.with_context(|| format!("cannot remove the TAP {}", link.name)).map_err(internal)?;
        if let Some(guest) = guest_of(&place, &link.name, &alias) {
            let free = Guest { isolated: None, ..guest.clone() };
            if let Some(Err(error)) = alias.isolated.then(|| self.isolate(&mut socket, Some(&guest), &free)) {
                log!("cannot forget the isolation of {}: {error:#}", link.name);
            }
        }
        self.engine().forget(Mac::of_id(alias.id));
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
            ipv6: self.network6,
            ipv6_outside: self.way.is_open(),
            taps: self.list()?.len(),
            further: self.further(),
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
