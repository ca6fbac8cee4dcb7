//! IPv6 on the bridge: its addresses, the way to the outside, and what guests are told of both.

use std::fs;
use std::net::Ipv6Addr;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, anyhow};
use smol::channel::{Receiver, Sender, unbounded};

use super::bridge::Settings;
use super::bridge6::{self, Found, Plan6};
use super::network::Network;
use crate::net::address::{self, Address};
use crate::net::link::Link;
use crate::net::{Socket, route, sysctl};
use crate::protocol::address::BRIDGE_MAC;
use crate::protocol::ipv6::{Network6, PREFIX, link_local};
use crate::ra::Advertisement;
use crate::ra::server::Server;

/// Where the machine's id is (machine-id(5)).
const MACHINE_ID: [&str; 2] = ["/etc/machine-id", "/var/lib/dbus/machine-id"];

/// Whether the host has a way to the outside by IPv6, and who is told when that changes.
pub(super) struct Way {
    out: Mutex<bool>,
    sender: Sender<bool>,
    receiver: Receiver<bool>,
}

impl Default for Way {
    fn default() -> Way {
        let (sender, receiver) = unbounded();
        Way { out: Mutex::default(), sender, receiver }
    }
}

impl Way {
    fn set(&self, out: bool) {
        let mut now = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        if *now != out {
            *now = out;
            let _ = self.sender.try_send(out);
        }
    }

    pub(super) fn is_open(&self) -> bool {
        *self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What tells this machine from others: its id, else its name.
fn machine() -> String {
    let read = |path: &&str| Some(fs::read_to_string(path).ok()?.trim().to_owned()).filter(|id| !id.is_empty());
    MACHINE_ID
        .iter()
        .find_map(read)
        .unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned())
}

/// Decides on the guests' network.
pub(super) fn plan(socket: &mut Socket, settings: &Settings, links: &[Link]) -> Result<Plan6> {
    let addresses = address::list(socket).context("cannot list the IPv6 addresses")?;
    let routes = route::list(socket).context("cannot list the IPv6 routes")?;
    let found =
        Found { has_ipv6: sysctl::has_ipv6(), machine: &machine(), links, addresses: &addresses, routes: &routes };
    bridge6::plan(settings, &found).map_err(|e| anyhow!(e))
}

/// Gives the bridge, which is up, its IPv6 addresses, and takes those that it must lose.
pub(super) fn bring_up(socket: &mut Socket, name: &str, index: u32, plan: &Plan6) -> Result<()> {
    for old in &plan.outdated {
        address::remove(socket, *old).with_context(|| format!("cannot take {}/{PREFIX} from {name}", old.address))?;
        log!("took {}/{PREFIX} from {name}", old.address);
    }
    let Some(network) = plan.network else { return Ok(()) };
    sysctl::prepare_ipv6(name)?;
    for address in addresses(index, network) {
        match address::add(socket, address) {
            Err(error) if error.errno == rustix::io::Errno::EXIST => {}
            other => other.with_context(|| format!("cannot give {name} the address {}/{PREFIX}", address.address))?,
        }
    }
    Ok(())
}

/// The bridge's own two addresses; the one of its link alone stays the same whatever the kernel makes of its MAC.
fn addresses(index: u32, network: Network6) -> [Address<Ipv6Addr>; 2] {
    [network.gateway(), link_local(BRIDGE_MAC)].map(|address| Address { index, address, prefix: PREFIX })
}

impl Network {
    /// Begins to tell guests of their network, where they have one. They get by with IPv4 where that fails.
    pub(super) fn serve_ra(&self, dns: bool) {
        let Some(network) = self.network6 else { return };
        let content = Advertisement { network, mac: BRIDGE_MAC, router: self.way.is_open(), dns };
        let ways = self.way.receiver.clone();
        let served = Server::bind(&self.settings.bridge, self.bridge(), content, ways).and_then(|server| {
            let thread = thread::Builder::new().name("ra".into());
            let end = self.end.add();
            let work = move || smol::block_on(smol::future::or(server.run(), end.wait()));
            thread.spawn(work).context("cannot start a thread").map(drop)
        });
        if let Err(error) = served {
            log!("no IPv6 for guests: {error:#}");
        }
    }

    /// Looks whether there is a way to the outside, and lets guests know.
    pub(super) fn look_out(&self, socket: &mut Socket) -> Result<bool> {
        if self.network6.is_none() || self.closing.load(Ordering::SeqCst) {
            return Ok(false);
        }
        let routes = route::list::<Ipv6Addr>(socket).context("cannot list the IPv6 routes")?;
        let out = routes.iter().any(|route| route.leads_out(self.bridge()));
        self.way.set(out);
        Ok(out)
    }

    /// Whether the host does not forward what it has a way for. Without one guests are told to keep to their link, and
    /// the host needs not forward for them.
    pub(super) fn must_forward6(&self, socket: &mut Socket) -> Result<bool> {
        Ok(self.look_out(socket)? && !sysctl::forwarding6()?)
    }

    /// Turns IPv6 forwarding on.
    pub(super) fn forward6(&self) -> Result<()> {
        let kept = sysctl::enable_forwarding6()?;
        if !kept.is_empty() {
            log!("set accept_ra to 2 on {}: a host that forwards IPv6 would ignore its own routers", kept.join(", "));
        }
        Ok(())
    }

    /// Whether the bridge, which is up, lacks an IPv6 address.
    pub(super) fn lacks_ipv6(&self, socket: &mut Socket) -> Result<bool> {
        let Some(network) = self.network6 else { return Ok(false) };
        let has = address::list(socket).context("cannot list the IPv6 addresses")?;
        let all = addresses(self.bridge(), network).iter().all(|address| has.contains(address));
        Ok(!all || !sysctl::is_ipv6_ready(&self.settings.bridge))
    }

    /// Gives the bridge its IPv6 addresses again.
    pub(super) fn bring_up6(&self, socket: &mut Socket) -> Result<()> {
        let plan = Plan6 { network: self.network6, outdated: Vec::new() };
        bring_up(socket, &self.settings.bridge, self.bridge(), &plan)
    }

    /// What of the host is in the way of the guests' network.
    pub(super) fn overlap6(&self, socket: &mut Socket, links: &[Link]) -> Result<Option<String>> {
        let Some(network) = self.network6 else { return Ok(None) };
        let addresses = address::list(socket).context("cannot list the IPv6 addresses")?;
        let routes = route::list(socket).context("cannot list the IPv6 routes")?;
        let found = Found { has_ipv6: true, machine: "", links, addresses: &addresses, routes: &routes };
        Ok(bridge6::overlap(network, Some(self.bridge()), &found))
    }
}

/// Keeps the host's own IPv6 away from a TAP, so that its guest hears of one machine on the link and not of two.
pub(super) fn silence(tap: &str) {
    if sysctl::has_ipv6()
        && let Err(error) = sysctl::silence_ipv6(tap)
    {
        log!("{error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_once() {
        let way = Way::default();
        for out in [false, true, true, false] {
            way.set(out);
        }
        assert_eq!([way.receiver.try_recv(), way.receiver.try_recv()], [Ok(true), Ok(false)]);
        assert!(way.receiver.is_empty() && !way.is_open());
    }
}
