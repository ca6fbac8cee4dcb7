//! What puterd must do to the host's network to have its bridge: a decision from what is there.

use super::branch;
use crate::net::address::Address;
use crate::net::link::Link;
use crate::net::route::{self, Route};
use crate::protocol::address::{BRIDGE_MAC, MAX_INTERFACE_NAME, Subnet};
use crate::protocol::ipv6::Ipv6;
use crate::protocol::ports::HostPort;

/// How many VMs an error names.
const NAMED: usize = 5;

/// What the network must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The bridge's interface name.
    pub bridge: String,
    pub subnet: Subnet,
    /// The user whom puterd serves.
    pub uid: u32,
    /// Ports of the host that guests may reach.
    pub host_ports: Vec<HostPort>,
    /// Whether guests have IPv6.
    pub ipv6: Ipv6,
    /// How many ports a bridge may have.
    pub bridge_ports: usize,
}

/// How to get there from what is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// There is no bridge.
    Create,
    /// A former run left this one, with these addresses of another subnet to remove.
    Adopt { index: u32, outdated: Vec<Address> },
}

/// The alias that marks a bridge as this user's.
pub fn alias(uid: u32) -> String {
    format!("puter-bridge:{uid}")
}

/// Checks an interface's name as the kernel does (dev_valid_name()) and more narrowly.
///
/// # Errors
/// A sentence with the rule.
pub fn check_name(name: &str) -> Result<(), String> {
    let fits = (1..=MAX_INTERFACE_NAME).contains(&name.len());
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if fits && plain && name.bytes().any(|b| b.is_ascii_alphanumeric()) {
        return Ok(());
    }
    Err(format!(
        "the bridge's name '{}' is not usable: it must be 1 to {MAX_INTERFACE_NAME} letters, digits, '.', '_' or '-'",
        name.escape_debug()
    ))
}

/// Decides what to do, changing nothing.
///
/// # Errors
/// Why puterd must not go on, and the way out.
pub fn plan(settings: &Settings, links: &[Link], addresses: &[Address], routes: &[Route]) -> Result<Plan, String> {
    let Some(link) = links.iter().find(|l| l.name == settings.bridge) else {
        clash(settings, 0, links, addresses, routes)?;
        return Ok(Plan::Create);
    };
    let has: Vec<Address> = addresses.iter().filter(|a| a.index == link.index).copied().collect();
    let ports: Vec<&str> = branch::ports(settings, links).into_iter().map(|l| l.name.as_str()).collect();
    own(settings, link, has.is_empty() && ports.is_empty())?;
    let wanted = |a: &Address| a.address == settings.subnet.gateway() && a.prefix == settings.subnet.prefix();
    let outdated: Vec<Address> = has.iter().filter(|a| !wanted(a)).copied().collect();
    if let (Some(old), false) = (outdated.first(), ports.is_empty()) {
        return Err(format!(
            "the bridge {} has the address {}/{} and VMs on it ({}), so its subnet cannot become {}: stop those VMs \
             first, or start puterd with --subnet {}/{}",
            settings.bridge,
            old.address,
            old.prefix,
            some_of(&ports),
            settings.subnet,
            old.address,
            old.prefix
        ));
    }
    // A bridge that has its address serves VMs already, whatever the host's routes became since.
    if !has.iter().any(wanted) {
        clash(settings, link.index, links, addresses, routes)?;
    }
    Ok(Plan::Adopt { index: link.index, outdated })
}

/// A few of many names.
fn some_of(names: &[&str]) -> String {
    match names.get(..NAMED) {
        Some(few) if names.len() > NAMED => format!("{} and {} more", few.join(", "), names.len() - NAMED),
        _ => names.join(", "),
    }
}

/// Checks that a link is this user's bridge, or one that puterd had no time to mark.
///
/// # Errors
/// Whose it is, and the way out.
pub fn own(settings: &Settings, link: &Link, unused: bool) -> Result<(), String> {
    let name = &settings.bridge;
    let remedy = format!(
        "remove it with `sudo ip link delete {name}` if nothing needs it, or start puterd with --bridge and another name"
    );
    if link.kind.as_deref() != Some("bridge") {
        let kind = link.kind.as_deref().unwrap_or("device");
        return Err(format!("the interface {name} exists and is not a bridge but a {kind}: {remedy}"));
    }
    let text = link.alias.as_deref();
    if text == Some(&alias(settings.uid)) || (text.is_none() && unused && link.mac == Some(BRIDGE_MAC)) {
        return Ok(());
    }
    Err(match text.and_then(|t| t.strip_prefix("puter-bridge:")) {
        Some(other) => format!(
            "the bridge {name} belongs to the puterd of uid {other}: start this one with --bridge and --subnet of its \
             own, or {remedy}"
        ),
        None if text.is_some_and(|t| t.starts_with("puter-branch:")) => {
            format!(
                "the bridge {name} is a further one of another puterd: start this one with --bridge and another name"
            )
        }
        None => format!("the bridge {name} exists and puterd did not make it: {remedy}"),
    })
}

/// Refuses a subnet in which another interface has a route or an address.
fn clash(settings: &Settings, own: u32, links: &[Link], addresses: &[Address], routes: &[Route]) -> Result<(), String> {
    match overlap(settings.subnet, own, links, addresses, routes) {
        Some(what) => Err(format!("{what}: {FREE_RANGE}")),
        None => Ok(()),
    }
}

/// The way out of an overlap.
pub const FREE_RANGE: &str =
    "choose a free range: the setting subnet = \"10.87.0.1/24\", or --subnet 10.87.0.1/24 for a puterd started by hand";

/// Looks for a route or an address of another interface than `own` in the subnet, and says which.
pub fn overlap(subnet: Subnet, own: u32, links: &[Link], addresses: &[Address], routes: &[Route]) -> Option<String> {
    let name = |index: u32| links.iter().find(|l| l.index == index).map_or("an interface", |l| l.name.as_str());
    if let Some(route) = routes.iter().find(|r| r.index != Some(own) && r.clashes(subnet)) {
        let by = route.index.map_or("no single interface", name);
        return Some(format!("the subnet {subnet} overlaps the host's route {route} (dev {by})"));
    }
    let address = addresses.iter().find(|a| a.index != own && route::overlaps(subnet, a.address, a.prefix))?;
    let by = name(address.index);
    Some(format!("the subnet {subnet} overlaps the host's address {}/{} (dev {by})", address.address, address.prefix))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::protocol::address::Mac;

    fn settings() -> Settings {
        Settings {
            bridge: "puter0".to_owned(),
            subnet: Subnet::default(),
            uid: 1000,
            host_ports: Vec::new(),
            ipv6: Ipv6::Off,
            bridge_ports: branch::MAX_PORTS,
        }
    }

    fn bridge(alias: Option<&str>) -> Link {
        Link {
            index: 5,
            name: "puter0".to_owned(),
            kind: Some("bridge".to_owned()),
            alias: alias.map(str::to_owned),
            mac: Some(BRIDGE_MAC),
            ..Link::default()
        }
    }

    fn port() -> Link {
        Link { index: 6, name: "pt-web".to_owned(), master: Some(5), ..Link::default() }
    }

    fn address(index: u32, text: &str, prefix: u8) -> Address {
        Address { index, address: text.parse().unwrap(), prefix }
    }

    fn route(index: u32, text: &str, prefix: u8) -> Route {
        Route { destination: text.parse().unwrap(), prefix, index: Some(index), gateway: None, passes: true }
    }

    #[test]
    fn a_former_runs_bridge_is_adopted_with_its_vms() {
        let links = [bridge(Some("puter-bridge:1000")), port()];
        let adopted = plan(&settings(), &links, &[address(5, "10.0.0.1", 24)], &[route(5, "10.0.0.0", 24)]);
        assert_eq!(adopted, Ok(Plan::Adopt { index: 5, outdated: vec![] }));
        let vpn = route(9, "10.0.0.0", 8);
        let adopted = plan(&settings(), &links, &[address(5, "10.0.0.1", 24)], &[vpn]);
        assert!(adopted.is_ok(), "running VMs lose nothing to a VPN that came later: {adopted:?}");
    }

    #[test]
    fn a_changed_subnet_is_reconciled_on_an_unused_bridge_and_refused_on_a_used_one() {
        let old = address(5, "10.9.0.1", 24);
        let unused = plan(&settings(), &[bridge(Some("puter-bridge:1000"))], &[old], &[route(5, "10.9.0.0", 24)]);
        assert_eq!(unused, Ok(Plan::Adopt { index: 5, outdated: vec![old] }));
        let used = plan(&settings(), &[bridge(Some("puter-bridge:1000")), port()], &[old], &[]).unwrap_err();
        assert!(used.contains("pt-web") && used.contains("--subnet 10.9.0.1/24"), "{used}");
    }

    #[test]
    fn what_is_not_ours_is_refused_with_the_way_out() {
        let text = |link: Link| plan(&settings(), &[link], &[], &[]).unwrap_err();
        let veth = Link { kind: Some("veth".to_owned()), ..bridge(None) };
        assert!(text(veth).contains("not a bridge but a veth"));
        assert!(text(bridge(Some("puter-bridge:7"))).contains("belongs to the puterd of uid 7"));
        for link in [bridge(Some("lan")), Link { mac: Some(Mac([2; 6])), ..bridge(None) }] {
            let why = text(link);
            assert!(why.contains("did not make it") && why.contains("sudo ip link delete puter0"), "{why}");
        }
        assert!(plan(&settings(), &[bridge(None)], &[], &[]).is_ok(), "a run that died before it marked its bridge");
        assert!(plan(&settings(), &[bridge(None)], &[address(5, "10.0.0.1", 24)], &[]).is_err());
    }

    #[test]
    fn a_clash_names_the_route_and_its_interface() {
        let eth = Link { index: 2, name: "eth0".to_owned(), ..Link::default() };
        let why = plan(&settings(), std::slice::from_ref(&eth), &[], &[route(2, "10.0.0.0", 16)]).unwrap_err();
        assert!(why.contains("route 10.0.0.0/16 (dev eth0)"), "{why}");
        let why = plan(&settings(), &[eth], &[address(2, "10.0.0.77", 32)], &[]).unwrap_err();
        assert!(why.contains("address 10.0.0.77/32 (dev eth0)"), "{why}");
        let default = Route { destination: Ipv4Addr::UNSPECIFIED, ..route(2, "0.0.0.0", 0) };
        assert_eq!(plan(&settings(), &[], &[], &[default]), Ok(Plan::Create));
    }

    #[test]
    fn bridge_names_are_checked() {
        for good in ["puter0", "lab.1", "a"] {
            check_name(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "a b", "sixteen-letters-", "a:b", "br%d", "é"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
