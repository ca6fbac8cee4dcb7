//! Which IPv6 network guests have: a decision from what is there.

use std::net::Ipv6Addr;

use super::branch;
use super::bridge::Settings;
use crate::net::address::Address;
use crate::net::link::Link;
use crate::net::route::Route;
use crate::protocol::ipv6::{Ipv6, Network6, PREFIX};

/// How many networks are tried where the host has routes in those before.
const ATTEMPTS: u32 = 8;

/// What there is.
pub struct Found<'a> {
    /// Whether the host has IPv6.
    pub has_ipv6: bool,
    /// What tells this machine from all others.
    pub machine: &'a str,
    pub links: &'a [Link],
    pub addresses: &'a [Address<Ipv6Addr>],
    pub routes: &'a [Route<Ipv6Addr>],
}

/// The guests' network, and what the bridge must lose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan6 {
    pub network: Option<Network6>,
    pub outdated: Vec<Address<Ipv6Addr>>,
}

/// Decides what to do, changing nothing.
///
/// # Errors
/// Why puterd must not go on, and the way out.
pub fn plan(settings: &Settings, found: &Found<'_>) -> Result<Plan6, String> {
    let bridge = found.links.iter().find(|link| link.name == settings.bridge).map(|link| link.index);
    let has: Vec<(Address<Ipv6Addr>, Network6)> = found
        .addresses
        .iter()
        .filter(|address| Some(address.index) == bridge && address.prefix == PREFIX)
        .filter_map(|address| Some((*address, Network6::of_gateway(address.address)?)))
        .collect();
    let network = match settings.ipv6 {
        Ipv6::Off => None,
        Ipv6::Auto if !found.has_ipv6 => None,
        _ if !found.has_ipv6 => {
            return Err(
                "this host has no IPv6, or it is turned off (net.ipv6.conf.all.disable_ipv6): start puterd with \
                        --ipv6 auto"
                    .to_owned(),
            );
        }
        Ipv6::In(wanted) => {
            let ports = || !branch::ports(settings, found.links).is_empty();
            if let Some((_, other)) = has.iter().find(|(_, network)| *network != wanted).filter(|_| ports()) {
                return Err(format!(
                    "the bridge {} has the network {other} and VMs on it, so it cannot become {wanted}: stop those VMs \
                     first, or start puterd with --ipv6 {other}",
                    settings.bridge
                ));
            }
            if let (Some(what), false) = (overlap(wanted, bridge, found), has.iter().any(|(_, own)| *own == wanted)) {
                return Err(format!("{what}: start puterd with --ipv6 auto, or another network"));
            }
            Some(wanted)
        }
        Ipv6::Auto | Ipv6::On => Some(match has.iter().find(|(_, network)| network.is_local()) {
            Some((_, network)) => *network,
            None => free(settings, bridge, found)?,
        }),
    };
    let outdated = has.into_iter().filter(|(_, own)| Some(*own) != network).map(|(address, _)| address).collect();
    Ok(Plan6 { network, outdated })
}

/// A network of this bridge's own, in which the host has nothing.
fn free(settings: &Settings, bridge: Option<u32>, found: &Found<'_>) -> Result<Network6, String> {
    let mut why = String::new();
    for attempt in 0..ATTEMPTS {
        let network = Network6::unique(found.machine, settings.uid, &settings.bridge, attempt);
        match overlap(network, bridge, found) {
            None => return Ok(network),
            Some(what) => why = what,
        }
    }
    Err(format!("{why}, and so do others: start puterd with --ipv6 and a free network, or with --ipv6 off"))
}

/// Looks for a route or an address of another interface in the network, and says which.
pub fn overlap(network: Network6, own: Option<u32>, found: &Found<'_>) -> Option<String> {
    let name = |index: u32| found.links.iter().find(|l| l.index == index).map_or("an interface", |l| l.name.as_str());
    let mine = |index: Option<u32>| index.is_some() && index == own;
    if let Some(route) = found.routes.iter().find(|route| !mine(route.index) && route.clashes(network)) {
        let by = route.index.map_or("no single interface", name);
        return Some(format!("the IPv6 network {network} overlaps the host's route {route} (dev {by})"));
    }
    let clashes = |address: &&Address<Ipv6Addr>| {
        !mine(Some(address.index)) && address.prefix > 0 && network.overlaps(address.address, address.prefix)
    };
    let address = found.addresses.iter().find(clashes)?;
    let by = name(address.index);
    Some(format!(
        "the IPv6 network {network} overlaps the host's address {}/{} (dev {by})",
        address.address, address.prefix
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::address::Subnet;

    fn settings(ipv6: &str) -> Settings {
        Settings {
            bridge: "puter0".to_owned(),
            subnet: Subnet::default(),
            uid: 1000,
            host_ports: Vec::new(),
            ipv6: ipv6.parse().unwrap(),
            bridge_ports: branch::MAX_PORTS,
        }
    }

    fn link(index: u32, name: &str, master: Option<u32>) -> Link {
        Link { index, name: name.to_owned(), master, ..Link::default() }
    }

    fn route(network: Network6) -> Route<Ipv6Addr> {
        Route { destination: network.network(), prefix: 48, index: Some(2), gateway: None, passes: true }
    }

    fn found<'a>(links: &'a [Link], addresses: &'a [Address<Ipv6Addr>], routes: &'a [Route<Ipv6Addr>]) -> Found<'a> {
        Found { has_ipv6: true, machine: "4711", links, addresses, routes }
    }

    #[test]
    fn a_host_without_ipv6_is_as_before_unless_it_is_asked_for() {
        let none = Found { has_ipv6: false, ..found(&[], &[], &[]) };
        assert_eq!(plan(&settings("auto"), &none), Ok(Plan6::default()));
        assert!(plan(&settings("on"), &none).unwrap_err().contains("has no IPv6"));
        assert!(plan(&settings("fd00::/64"), &none).is_err());
        assert_eq!(plan(&settings("off"), &found(&[], &[], &[])), Ok(Plan6::default()));
    }

    #[test]
    fn a_clash_leads_to_another_network_or_is_named() {
        let of = |attempt| Network6::unique("4711", 1000, "puter0", attempt);
        assert_eq!(plan(&settings("auto"), &found(&[], &[], &[])).unwrap().network, Some(of(0)));
        let (links, routes) = ([link(2, "vpn0", None)], [route(of(0))]);
        let clash = found(&links, &[], &routes);
        assert_eq!(plan(&settings("on"), &clash).unwrap().network, Some(of(1)));
        let error = plan(&settings(&of(0).to_string()), &clash).unwrap_err();
        assert!(error.contains("overlaps the host's route") && error.contains("(dev vpn0)"), "{error}");
        let all: Vec<Route<Ipv6Addr>> = (0..ATTEMPTS).map(|attempt| route(of(attempt))).collect();
        assert!(plan(&settings("auto"), &found(&links, &[], &all)).unwrap_err().contains("--ipv6 off"));
    }

    #[test]
    fn the_bridges_network_stays_and_changes_only_without_vms() {
        let own: Network6 = "fd00:7::/64".parse().unwrap();
        let address = Address { index: 5, address: own.gateway(), prefix: 64 };
        let local = Address { index: 5, address: "fe80::1".parse().unwrap(), prefix: 64 };
        let (bridge, port) = (link(5, "puter0", None), link(6, "pt-web", Some(5)));
        let (empty, used, addresses) = ([bridge.clone()], [bridge, port], [address, local]);
        let kept = Plan6 { network: Some(own), outdated: Vec::new() };
        assert_eq!(plan(&settings("auto"), &found(&used, &addresses, &[])), Ok(kept.clone()));
        assert_eq!(plan(&settings("fd00:7::/64"), &found(&used, &addresses, &[])), Ok(kept));
        let other = settings("fd00:8::/64");
        assert!(plan(&other, &found(&used, &addresses, &[])).unwrap_err().contains("stop those VMs first"));
        let changed = Plan6 { network: Some("fd00:8::/64".parse().unwrap()), outdated: vec![address] };
        assert_eq!(plan(&other, &found(&empty, &addresses, &[])), Ok(changed));
        let off = Plan6 { network: None, outdated: vec![address] };
        assert_eq!(plan(&settings("off"), &found(&used, &addresses, &[])), Ok(off));
    }
}
