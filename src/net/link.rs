//! Interfaces (rtnetlink(7), linux/if_link.h).

use rustix::io::Errno;

use super::message::{self, Attributes, Message, flags};
use super::{Error, Socket};
use crate::protocol::address::Mac;

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
/// Size of `struct ifinfomsg`.
const HEADER: usize = 16;
const AF_UNSPEC: u8 = 0;
const AF_BRIDGE: u8 = 7;
/// The interface is up (IFF_UP, linux/if.h).
const UP: u32 = 1;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_PROTINFO: u16 = 12;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_GROUP: u16 = 27;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_CARRIER: u16 = 33;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
/// Of a veth: the header and attributes of its other end (VETH_INFO_PEER, linux/veth.h).
const PEER: u16 = 1;
const IFLA_BR_FORWARD_DELAY: u16 = 1;
const IFLA_BR_STP_STATE: u16 = 5;
const IFLA_BRPORT_ISOLATED: u16 = 33;
const IFLA_TUN_OWNER: u16 = 1;
/// Leave the counters out of a list (RTEXT_FILTER_SKIP_STATS, linux/rtnetlink.h).
const SKIP_COUNTERS: u32 = 1 << 3;

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number for it.
    pub index: u32,
    pub name: String,
    /// Whether it is set up.
    pub up: bool,
    /// `bridge`, `tun`, `veth` and so on; `None` for hardware.
    pub kind: Option<String>,
    /// Free text that the interface carries for as long as it exists (ifalias).
    pub alias: Option<String>,
    /// The bridge that it belongs to.
    pub master: Option<u32>,
    pub mac: Option<Mac>,
    /// Whether it has a carrier; a TAP has one while a process holds it open.
    pub carrier: bool,
    /// Whether its bridge keeps it from reaching other isolated ports.
    pub isolated: bool,
    /// The user who may open it, for a TAP.
    pub owner: Option<u32>,
    /// A number that many may share, to be changed at once.
    pub group: u32,
}

/// The fixed header of a message about a link (`struct ifinfomsg`).
fn header(family: u8, index: u32, flags: u32, change: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[0] = family;
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..16].copy_from_slice(&change.to_ne_bytes());
    bytes
}

/// Reads the body of an RTM_NEWLINK message.
pub fn decode(body: &[u8]) -> Option<Link> {
    let mut link =
        Link { index: message::u32_at(body, 4)?, up: message::u32_at(body, 8)? & UP != 0, ..Link::default() };
    for (kind, payload) in message::attributes(body, HEADER) {
        match kind {
            IFLA_ADDRESS => link.mac = payload.try_into().ok().map(Mac),
            IFLA_IFNAME => link.name = message::text(payload),
            IFLA_MASTER => link.master = message::u32_at(payload, 0),
            IFLA_IFALIAS => link.alias = Some(message::text(payload)),
            IFLA_GROUP => link.group = message::u32_at(payload, 0).unwrap_or(0),
            IFLA_CARRIER => link.carrier = payload.first() == Some(&1),
            IFLA_LINKINFO => read_info(&mut link, payload),
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn read_info(link: &mut Link, info: &[u8]) {
    for (kind, payload) in message::attributes(info, 0) {
        match kind {
            IFLA_INFO_KIND => link.kind = Some(message::text(payload)),
            // The kind comes first (rtnl_link_fill()).
            IFLA_INFO_DATA if link.kind.as_deref() == Some("tun") => {
                link.owner = message::attributes(payload, 0)
                    .find(|(kind, _)| *kind == IFLA_TUN_OWNER)
                    .and_then(|(_, payload)| message::u32_at(payload, 0));
            }
            IFLA_INFO_SLAVE_DATA => {
                link.isolated = message::attributes(payload, 0)
                    .any(|(kind, payload)| kind == IFLA_BRPORT_ISOLATED && payload.first() == Some(&1));
            }
            _ => {}
        }
    }
}

/// The request for a bridge which forwards at once: no spanning tree, no delay.
fn bridge_message(name: &str, mac: Mac) -> Message {
    let data = Attributes::new().u32(IFLA_BR_FORWARD_DELAY, 0).u32(IFLA_BR_STP_STATE, 0);
    let info = Attributes::new().string(IFLA_INFO_KIND, "bridge").nest(IFLA_INFO_DATA, data);
    let attributes = Attributes::new().string(IFLA_IFNAME, name).bytes(IFLA_ADDRESS, &mac.0).nest(IFLA_LINKINFO, info);
    Message::new(RTM_NEWLINK, flags::CREATE | flags::EXCLUSIVE, &header(AF_UNSPEC, 0, 0, 0), attributes)
}

fn pair_message(one: (&str, Mac), other: (&str, Mac)) -> Message {
    let named = |(name, mac): (&str, Mac)| Attributes::new().string(IFLA_IFNAME, name).bytes(IFLA_ADDRESS, &mac.0);
    let peer = [&header(AF_UNSPEC, 0, 0, 0)[..], named(other).as_bytes()].concat();
    let data = Attributes::new().bytes(PEER, &peer);
    let info = Attributes::new().string(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, data);
    let attributes = named(one).nest(IFLA_LINKINFO, info);
    Message::new(RTM_NEWLINK, flags::CREATE | flags::EXCLUSIVE, &header(AF_UNSPEC, 0, 0, 0), attributes)
}

fn set(socket: &mut Socket, index: u32, attributes: Attributes) -> Result<(), Error> {
    socket.request(&Message::new(RTM_SETLINK, 0, &header(AF_UNSPEC, index, 0, 0), attributes))
}

/// All links of this network namespace.
///
/// # Errors
/// The kernel's.
pub fn list(socket: &mut Socket) -> Result<Vec<Link>, Error> {
    let attributes = Attributes::new().u32(IFLA_EXT_MASK, SKIP_COUNTERS);
    let request = Message::new(RTM_GETLINK, 0, &header(AF_UNSPEC, 0, 0, 0), attributes);
    socket.fold(&request, Vec::new, |links, kind, body| {
        links.extend((kind == RTM_NEWLINK).then(|| decode(body)).flatten());
    })
}

/// The link of this name, if there is one: the kernel's work does not grow with the number of links.
///
/// # Errors
/// The kernel's.
pub fn find(socket: &mut Socket, name: &str) -> Result<Option<Link>, Error> {
    one(socket, 0, Attributes::new().string(IFLA_IFNAME, name))
}

/// The link with this number, if there is one.
///
/// # Errors
/// The kernel's.
pub fn get(socket: &mut Socket, index: u32) -> Result<Option<Link>, Error> {
    one(socket, index, Attributes::new())
}

fn one(socket: &mut Socket, index: u32, which: Attributes) -> Result<Option<Link>, Error> {
    let attributes = which.u32(IFLA_EXT_MASK, SKIP_COUNTERS);
    match socket.get(&Message::new(RTM_GETLINK, 0, &header(AF_UNSPEC, index, 0, 0), attributes)) {
        Ok((RTM_NEWLINK, body)) => Ok(decode(&body)),
        Ok(_) => Ok(None),
        Err(error) if error.errno == Errno::NODEV => Ok(None),
        Err(error) => Err(error),
    }
}

/// Creates a bridge, still down.
///
/// # Errors
/// The kernel's; `EXIST` where the name is taken.
pub fn create_bridge(socket: &mut Socket, name: &str, mac: Mac) -> Result<(), Error> {
    socket.request(&bridge_message(name, mac))
}

/// Creates two links, still down, of which each sends what the other receives.
///
/// # Errors
/// The kernel's; `EXIST` where a name is taken.
pub fn create_pair(socket: &mut Socket, [one, other]: [(&str, Mac); 2]) -> Result<(), Error> {
    socket.request(&pair_message(one, other))
}

/// Sets a link up.
///
/// # Errors
/// The kernel's.
pub fn set_up(socket: &mut Socket, index: u32) -> Result<(), Error> {
    socket.request(&Message::new(RTM_SETLINK, 0, &header(AF_UNSPEC, index, UP, UP), Attributes::new()))
}

/// Makes a link a port of a bridge.
///
/// # Errors
/// The kernel's.
pub fn set_master(socket: &mut Socket, index: u32, master: u32) -> Result<(), Error> {
    set(socket, index, Attributes::new().u32(IFLA_MASTER, master))
}

/// Sets a link's alias.
///
/// # Errors
/// The kernel's; an alias holds at most 255 bytes.
pub fn set_alias(socket: &mut Socket, index: u32, alias: &str) -> Result<(), Error> {
    set(socket, index, Attributes::new().bytes(IFLA_IFALIAS, alias.as_bytes()))
}

/// Decides whether a bridge's port reaches other isolated ports.
///
/// # Errors
/// The kernel's; the link must be a port.
pub fn set_isolated(socket: &mut Socket, index: u32, isolated: bool) -> Result<(), Error> {
    let port = Attributes::new().bytes(IFLA_BRPORT_ISOLATED, &[u8::from(isolated)]);
    let attributes = Attributes::new().nest(IFLA_PROTINFO, port);
    socket.request(&Message::new(RTM_SETLINK, 0, &header(AF_BRIDGE, index, 0, 0), attributes))
}

/// Removes a link.
///
/// # Errors
/// The kernel's; `NODEV` where there is none.
pub fn delete(socket: &mut Socket, index: u32) -> Result<(), Error> {
    socket.request(&Message::new(RTM_DELLINK, 0, &header(AF_UNSPEC, index, 0, 0), Attributes::new()))
}

/// Gives a link the number of a group.
///
/// # Errors
/// The kernel's.
pub fn set_group(socket: &mut Socket, index: u32, group: u32) -> Result<(), Error> {
    set(socket, index, Attributes::new().u32(IFLA_GROUP, group))
}

/// Removes all links of a group in the time that one takes: what takes its time is to wait until nobody uses them.
///
/// # Errors
/// The kernel's; `NODEV` where there is none.
pub fn delete_group(socket: &mut Socket, group: u32) -> Result<(), Error> {
    let group = Attributes::new().u32(IFLA_GROUP, group);
    socket.request(&Message::new(RTM_DELLINK, 0, &header(AF_UNSPEC, 0, 0, 0), group))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel says of an isolated TAP that is a port of bridge 7.
    fn tap() -> Vec<u8> {
        let tun = Attributes::new().u32(IFLA_TUN_OWNER, 1000);
        let port = Attributes::new().bytes(IFLA_BRPORT_ISOLATED, &[1]);
        let info = Attributes::new()
            .string(IFLA_INFO_KIND, "tun")
            .nest(IFLA_INFO_DATA, tun)
            .string(4, "bridge")
            .nest(IFLA_INFO_SLAVE_DATA, port);
        let attributes = Attributes::new()
            .string(IFLA_IFNAME, "pt-web")
            .string(IFLA_IFALIAS, "puter:web:1:1")
            .u32(IFLA_MASTER, 7)
            .u32(IFLA_GROUP, 7)
            .bytes(IFLA_ADDRESS, &[2, 0, 0, 0, 0, 9])
            .bytes(IFLA_CARRIER, &[1])
            .nest(IFLA_LINKINFO, info);
        let mut bytes = Vec::new();
        Message::new(RTM_NEWLINK, 0, &header(AF_UNSPEC, 12, UP, 0), attributes).encode(0, 1, &mut bytes);
        bytes[message::HEADER..].to_vec()
    }

    #[test]
    fn a_tap_is_read_whole() {
        let expected = Link {
            index: 12,
            name: "pt-web".to_owned(),
            up: true,
            kind: Some("tun".to_owned()),
            alias: Some("puter:web:1:1".to_owned()),
            master: Some(7),
            mac: Some(Mac([2, 0, 0, 0, 0, 9])),
            carrier: true,
            isolated: true,
            owner: Some(1000),
            group: 7,
        };
        assert_eq!(decode(&tap()), Some(expected));
    }

    #[test]
    fn one_link_is_found_as_the_list_shows_it() {
        let mut socket = Socket::route().unwrap();
        let listed = list(&mut socket).unwrap().into_iter().find(|link| link.name == "lo");
        let found = find(&mut socket, "lo").unwrap();
        assert!(found.is_some());
        assert_eq!(found, listed);
        assert_eq!(get(&mut socket, listed.unwrap().index).unwrap(), found);
        assert_eq!(find(&mut socket, "pt-nobody").unwrap(), None);
        assert_eq!(get(&mut socket, 0x7fff_ffff).unwrap(), None);
        // Too long for an interface: the kernel refuses the question.
        find(&mut socket, &"x".repeat(40)).unwrap_err();
    }

    #[test]
    fn a_short_message_is_no_link() {
        for cut in 0..HEADER {
            assert_eq!(decode(&tap()[..cut]), None, "{cut}");
        }
    }

    #[test]
    fn a_bridge_is_asked_for_without_spanning_tree() {
        let mut bytes = Vec::new();
        bridge_message("puter0", Mac([0x52, 0x54, 0, 0, 0, 1])).encode(0, 1, &mut bytes);
        let link = decode(&bytes[message::HEADER..]).unwrap();
        assert_eq!((link.name.as_str(), link.kind.as_deref()), ("puter0", Some("bridge")));
        let zero = |kind: u16| {
            let mut attribute = 8u16.to_ne_bytes().to_vec();
            attribute.extend(kind.to_ne_bytes());
            attribute.extend([0; 4]);
            attribute
        };
        for kind in [IFLA_BR_STP_STATE, IFLA_BR_FORWARD_DELAY] {
            assert!(bytes.windows(8).any(|w| w == zero(kind)), "{kind}");
        }
    }
}
