//! Which TAPs there are and what a request for one means, decided from the list of interfaces. The interfaces are the
//! only record: a TAP carries its VM's whole name, id, isolation and cluster in its alias, for as long as it exists.

use std::fmt;
use std::str::FromStr;

use super::api::ApiError;
use super::branch::Bridges;
use crate::net::link::Link;
use crate::protocol::address::{Mac, Subnet, TAP_PREFIX, check_vm_name, tap_name};
use crate::protocol::daemon::{Membership, Tap, TapRequest};
use crate::protocol::ipv6::Network6;

/// What a TAP's alias says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alias {
    pub vm: String,
    pub id: u32,
    pub isolated: bool,
    pub member: Option<Membership>,
}

impl Alias {
    /// Whether its VM is kept from all others: a member of a cluster is not kept from that.
    pub fn is_alone(&self) -> bool {
        self.isolated && self.member.is_none()
    }
}

impl fmt::Display for Alias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "puter:{}:{}:{}", self.vm, self.id, u8::from(self.isolated))?;
        match &self.member {
            Some(Membership { cluster, member }) => write!(f, ":{cluster}:{member}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Alias {
    type Err = ();

    fn from_str(text: &str) -> Result<Alias, ()> {
        let mut parts = text.strip_prefix("puter:").ok_or(())?.split(':');
        let mut next = || parts.next().ok_or(());
        let vm = next()?.to_owned();
        check_vm_name(&vm).map_err(drop)?;
        let id = next()?.parse().ok().filter(|id| *id > 0).ok_or(())?;
        let isolated = match next()? {
            "0" => false,
            "1" => true,
            _ => return Err(()),
        };
        let member = match (parts.next(), parts.next()) {
            (None, _) => None,
            (Some(cluster), Some(member)) => Some(Membership { cluster: cluster.into(), member: member.into() }),
            (Some(_), None) => return Err(()),
        };
        member.as_ref().map_or(Ok(()), Membership::check).map_err(drop)?;
        parts.next().is_none().then_some(Alias { vm, id, isolated, member }).ok_or(())
    }
}

impl From<&TapRequest> for Alias {
    fn from(request: &TapRequest) -> Alias {
        Alias { vm: request.vm.clone(), id: request.id, isolated: request.isolated, member: request.member.clone() }
    }
}

/// Before the alias of a TAP that is about to go.
const REMOVED: &str = "removed:";

/// The alias of a TAP that is about to go.
pub fn removed(alias: &Alias) -> String {
    // Whom it was kept from is forgotten at once.
    format!("{REMOVED}{}", Alias { isolated: false, member: None, ..alias.clone() })
}

/// Where puterd's TAPs are.
#[derive(Clone, Debug)]
pub struct Place {
    pub bridges: Bridges,
    /// The user whom puterd serves.
    pub uid: u32,
    pub subnet: Subnet,
    /// The guests' IPv6 network, where they have one.
    pub network6: Option<Network6>,
}

/// What a request for a TAP comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// There is none yet.
    Create,
    /// A former run made this one and was stopped before it was ready, or it is about to go.
    Finish(Link),
    /// It is there, with this alias of before.
    Keep(Link, Alias),
}

impl Place {
    /// The VM that a TAP on these bridges belongs to.
    pub fn owns(&self, link: &Link) -> Option<Alias> {
        self.bridges.holds(link.master).then(|| self.marked(link)).flatten()
    }

    /// The VM that a TAP of this user names, on these bridges or on none.
    pub fn marked(&self, link: &Link) -> Option<Alias> {
        self.named(link, link.alias.as_deref()?)
    }

    /// The VM that had a TAP which is about to go.
    pub fn removed(&self, link: &Link) -> Option<Alias> {
        self.named(link, link.alias.as_deref()?.strip_prefix(REMOVED)?)
    }

    /// The VM that has or had this TAP, for as long as the interface is there.
    pub fn of(&self, link: &Link) -> Option<Alias> {
        self.marked(link).or_else(|| self.removed(link))
    }

    fn named(&self, link: &Link, alias: &str) -> Option<Alias> {
        let mine = link.kind.as_deref() == Some("tun") && link.owner == Some(self.uid);
        let free = link.master.is_none() || self.bridges.holds(link.master);
        let alias: Alias = alias.parse().ok()?;
        (mine && free && link.name == tap_name(&alias.vm) && self.subnet.address(alias.id).is_some()).then_some(alias)
    }

    /// Whether puterd made this TAP and was stopped before it was marked. It was then never given to anyone.
    pub fn half_made(&self, link: &Link) -> bool {
        link.kind.as_deref() == Some("tun")
            && link.owner == Some(self.uid)
            && link.name.starts_with(TAP_PREFIX)
            && link.alias.is_none()
            && link.master.is_none()
            && !link.carrier
    }

    /// A TAP as the API shows it.
    pub fn tap(&self, link: &Link) -> Option<Tap> {
        let alias = self.owns(link)?;
        Some(Tap {
            mac: Mac::of_id(alias.id),
            ip: self.subnet.address(alias.id)?,
            ip6: self.network6.map(|network| network.address(Mac::of_id(alias.id))),
            name: link.name.clone(),
            isolated: alias.isolated,
            attached: link.carrier,
            vm: alias.vm,
            id: alias.id,
        })
    }

    /// All TAPs on the bridges, by id.
    pub fn list(&self, links: &[Link]) -> Vec<Tap> {
        let mut taps: Vec<Tap> = links.iter().filter_map(|l| self.tap(l)).collect();
        taps.sort_by_key(|t| t.id);
        taps
    }

    /// Decides what a request comes to.
    ///
    /// # Errors
    /// 507 beyond the subnet's last address, 409 where another VM has the id or the interface's name.
    pub fn decide(&self, request: &TapRequest, links: &[Link]) -> Result<Action, ApiError> {
        let TapRequest { vm, id, .. } = request;
        if self.subnet.address(*id).is_none() {
            let (subnet, last) = (self.subnet, self.subnet.last_id());
            let message = format!(
                "the subnet {subnet} is full: it has room for the ids 1 to {last} and {vm} has the id {id}; delete VMs, \
                 or give puterd a wider --subnet"
            );
            return Err(ApiError::new(507, "subnet_full", message));
        }
        let conflict = |code, message: String| Err(ApiError::new(409, code, message));
        let mut taken = None;
        for link in links {
            let Some(alias) = self.marked(link) else { continue };
            if alias.vm == *vm && alias.id == *id {
                return Ok(Action::Keep(link.clone(), alias));
            }
            if alias.vm == *vm {
                let message = format!(
                    "the VM {vm} has the TAP {} with the id {}, not {id}: delete that TAP first",
                    link.name, alias.id
                );
                return conflict("vm_has_another_id", message);
            }
            if alias.id == *id {
                taken = Some(format!("the id {id} belongs to the VM {}: its TAP is {}", alias.vm, link.name));
            }
        }
        if let Some(message) = taken {
            return conflict("id_taken", message);
        }
        let name = tap_name(vm);
        match links.iter().find(|l| l.name == name) {
            None => Ok(Action::Create),
            Some(link) if self.half_made(link) || self.removed(link).is_some() => Ok(Action::Finish(link.clone())),
            Some(link) => {
                let whose = match link.alias.as_deref().map(str::parse::<Alias>) {
                    Some(Ok(alias)) => format!("serves the VM {} (id {})", alias.vm, alias.id),
                    _ => "is not puterd's".to_owned(),
                };
                let message = format!("the interface {name} exists and {whose}: rename the VM, or delete the other");
                conflict("tap_name_taken", message)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::bridge::Settings;
    use crate::protocol::ipv6::Ipv6;

    fn place() -> Place {
        let settings = Settings {
            bridge: "puter0".to_owned(),
            subnet: Subnet::default(),
            uid: 1000,
            host_ports: Vec::new(),
            ipv6: Ipv6::Off,
            bridge_ports: 1023,
        };
        let mut bridges = Bridges::of(&settings, 5, &[]);
        bridges.add(1, 6);
        Place { bridges, uid: 1000, subnet: Subnet::default(), network6: Some("fd00::/64".parse().unwrap()) }
    }

    fn link(vm: &str, id: u32) -> Link {
        Link {
            index: 100 + id,
            name: tap_name(vm),
            kind: Some("tun".to_owned()),
            alias: Some(format!("puter:{vm}:{id}:0")),
            master: Some(5),
            owner: Some(1000),
            ..Link::default()
        }
    }

    fn decide(vm: &str, id: u32, links: &[Link]) -> Result<Action, (u16, &'static str)> {
        let request = TapRequest { vm: vm.to_owned(), id, isolated: false, member: None };
        place().decide(&request, links).map_err(|e| (e.status, e.code))
    }

    #[test]
    fn an_alias_is_read_as_it_was_written() {
        let long = || "a".repeat(63);
        let alone = Alias { vm: long(), id: u32::MAX, isolated: true, member: None };
        let member = Some(Membership { cluster: long(), member: long() });
        for alias in [Alias { member, ..alone.clone() }, alone] {
            assert_eq!(alias.to_string().parse(), Ok(alias.clone()));
            assert!(alias.to_string().len() < 256, "the kernel's limit");
        }
        for bad in [
            "",
            "puter:",
            "puter:web",
            "puter:web:1",
            "puter:web:0:0",
            "puter:web:1:2",
            "puter:web:1:0:",
            "puter:A:1:0",
            "puter:web:1:0:c",
            "puter:web:1:0:c:",
            "puter:web:1:0:C:m",
            "puter:web:1:0:c:m:x",
        ] {
            assert_eq!(bad.parse::<Alias>(), Err(()), "{bad}");
        }
    }

    #[test]
    fn the_same_request_twice_keeps_the_tap() {
        assert_eq!(decide("web", 1, &[]), Ok(Action::Create));
        let there = link("web", 1);
        let alias = Alias { vm: "web".to_owned(), id: 1, isolated: false, member: None };
        assert_eq!(decide("web", 1, std::slice::from_ref(&there)), Ok(Action::Keep(there, alias)));
    }

    #[test]
    fn conflicts_are_told_apart() {
        assert_eq!(decide("web", 2, &[link("web", 1)]), Err((409, "vm_has_another_id")));
        assert_eq!(decide("db", 1, &[link("web", 1)]), Err((409, "id_taken")));
        let stranger = Link { alias: Some("mine".to_owned()), ..link("web", 1) };
        assert_eq!(decide("web", 1, &[stranger]), Err((409, "tap_name_taken")));
        let other_bridge = Link { master: Some(9), ..link("web", 1) };
        assert_eq!(decide("web", 1, &[other_bridge]), Err((409, "tap_name_taken")));
        let other_user = Link { owner: Some(0), ..link("web", 1) };
        assert_eq!(decide("web", 1, &[other_user]), Err((409, "tap_name_taken")));
        let colliding = Link { name: tap_name("b-rather-long-name"), ..link("web", 1) };
        assert_eq!(decide("b-rather-long-name", 2, &[colliding]), Err((409, "tap_name_taken")));
        for id in [245, u32::MAX] {
            assert_eq!(decide("web", id, &[]), Err((507, "subnet_full")), "{id}");
        }
    }

    #[test]
    fn a_half_made_tap_is_finished_unless_someone_holds_it() {
        let half = Link { alias: None, master: None, ..link("web", 1) };
        assert_eq!(decide("web", 1, std::slice::from_ref(&half)), Ok(Action::Finish(half.clone())));
        let held = Link { carrier: true, ..half };
        assert_eq!(decide("web", 1, &[held]), Err((409, "tap_name_taken")));
    }

    #[test]
    fn the_list_holds_the_bridges_taps_by_id() {
        let stranger = Link { master: Some(9), ..link("x", 3) };
        let further = Link { master: Some(6), ..link("web", 2) };
        let taps = place().list(&[further, stranger, link("db", 1)]);
        let seen: Vec<_> = taps.iter().map(|t| (t.vm.as_str(), t.id, t.ip.to_string())).collect();
        assert_eq!(seen, [("db", 1, "10.0.0.11".to_owned()), ("web", 2, "10.0.0.12".to_owned())]);
        assert_eq!(taps[0].ip6, Some("fd00::5054:ff:fe00:b".parse().unwrap()));
    }
}
