//! puter's nftables tables (linux/netfilter/nf_tables.h): one for the bridge and one with a chain for each TAP. Each
//! table or chain is replaced whole in one batch.
//!
//! Each rule is a list of expressions which load a value into a register and compare it, as `nft --debug=netlink`
//! shows them.

use std::net::Ipv4Addr;

use rustix::io::Errno;

use super::message::{Attributes, Message, flags};
use super::{Error, Socket};
use crate::protocol::address::{Mac, Subnet};

const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
/// NFNL_SUBSYS_NFTABLES.
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const DELETE_TABLE: u16 = (SUBSYSTEM << 8) | 2;
const NEW_CHAIN: u16 = (SUBSYSTEM << 8) | 3;
const DELETE_CHAIN: u16 = (SUBSYSTEM << 8) | 5;
const NEW_RULE: u16 = (SUBSYSTEM << 8) | 6;
/// IPv4 and IPv6 at once (NFPROTO_INET).
const INET: u8 = 1;
/// What arrives on one interface, before all else (NFPROTO_NETDEV).
const NETDEV: u8 = 5;
const NFPROTO_IPV4: u8 = 2;

const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_HOOK_DEV: u16 = 3;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;

const INGRESS: u32 = 0;
const LOCAL_IN: u32 = 1;
const FORWARD: u32 = 2;
const POSTROUTING: u32 = 4;
const PRIORITY_FILTER: i32 = 0;
const PRIORITY_SOURCE_NAT: i32 = 100;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
/// The first of the 16-byte registers (NFT_REG_1).
const REGISTER: u32 = 1;
const IPPROTO_ICMP: u8 = 1;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;

/// One or more expressions of a rule, in order.
#[derive(Clone, Default)]
struct Rule(Attributes);

/// What a packet is asked for (NFT_META_*).
#[derive(Clone, Copy)]
enum Meta {
    /// The frame's EtherType, in network byte order.
    EtherType = 1,
    InputName = 6,
    OutputName = 7,
    /// What kind of hardware the frame came from (ARPHRD_*), in the machine's byte order.
    InputType = 8,
    Family = 15,
    Protocol = 16,
}

impl Rule {
    fn new() -> Rule {
        Rule::default()
    }

    fn expression(self, name: &str, data: Attributes) -> Rule {
        let element = Attributes::new().string(NFTA_EXPR_NAME, name).nest(NFTA_EXPR_DATA, data);
        Rule(self.0.nest(NFTA_LIST_ELEM, element))
    }

    /// Goes on if the register equals, or with `not` differs from, the value.
    fn compare(self, not: bool, value: &[u8]) -> Rule {
        let value = Attributes::new().bytes(NFTA_DATA_VALUE, value);
        self.expression("cmp", Attributes::new().be32(1, REGISTER).be32(2, u32::from(not)).nest(3, value))
    }

    fn meta(self, key: Meta, not: bool, value: &[u8]) -> Rule {
        self.expression("meta", Attributes::new().be32(1, REGISTER).be32(2, key as u32)).compare(not, value)
    }

    /// An interface's name fills its register with NULs.
    fn interface(self, key: Meta, not: bool, name: &str) -> Rule {
        let mut padded = [0; 16];
        for (to, from) in padded.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        self.meta(key, not, &padded)
    }

    fn input(self, name: &str) -> Rule {
        self.interface(Meta::InputName, false, name)
    }

    fn output(self, name: &str) -> Rule {
        self.interface(Meta::OutputName, false, name)
    }

    fn mask(self, mask: &[u8]) -> Rule {
        let value = |bytes: &[u8]| Attributes::new().bytes(NFTA_DATA_VALUE, bytes);
        let zero = vec![0; mask.len()];
        let data = Attributes::new().be32(1, REGISTER).be32(2, REGISTER).be32(3, mask.len() as u32);
        self.expression("bitwise", data.nest(4, value(mask)).nest(5, value(&zero)))
    }

    /// Loads bytes of the packet; base 0 is the link header, 1 the network header, 2 the transport header
    /// (NFT_PAYLOAD_*).
    fn payload(self, base: u32, offset: u32, length: u32) -> Rule {
        let data = Attributes::new().be32(1, REGISTER).be32(2, base).be32(3, offset).be32(4, length);
        self.expression("payload", data)
    }

    /// An IPv4 packet whose source, 12 bytes into the header, lies in the subnet.
    fn source(self, subnet: Subnet) -> Rule {
        let octets = |address: Ipv4Addr| address.octets();
        self.meta(Meta::Family, false, &[NFPROTO_IPV4])
            .payload(1, 12, 4)
            .mask(&octets(subnet.mask()))
            .compare(false, &octets(subnet.network()))
    }

    fn ether_type(self, kind: u16) -> Rule {
        self.meta(Meta::EtherType, false, &kind.to_be_bytes())
    }

    fn port(self, protocol: u8, port: u16) -> Rule {
        self.meta(Meta::Protocol, false, &[protocol]).payload(2, 2, 2).compare(false, &port.to_be_bytes())
    }

    /// A packet of a connection that exists, or of one that belongs to it (NF_CT_STATE_BIT()).
    fn established(self) -> Rule {
        let states: u32 = (1 << 1) | (1 << 2);
        let state = Attributes::new().be32(1, REGISTER).be32(2, 0);
        self.expression("ct", state).mask(&states.to_ne_bytes()).compare(true, &[0; 4])
    }

    fn verdict(self, code: u32) -> Rule {
        let verdict = Attributes::new().be32(NFTA_VERDICT_CODE, code);
        let data = Attributes::new().nest(NFTA_DATA_VERDICT, verdict);
        self.expression("immediate", Attributes::new().be32(1, 0).nest(2, data))
    }

    fn accept(self) -> Rule {
        self.verdict(ACCEPT)
    }

    fn drop(self) -> Rule {
        self.verdict(DROP)
    }
}

/// The header of each message of a batch (`struct nfgenmsg`).
fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn table(family: u8, kind: u16, flags: u16, name: &str) -> Message {
    Message::new(kind, flags, &header(family, 0), Attributes::new().string(NFTA_TABLE_NAME, name))
}

fn rule(family: u8, table: &str, chain: &str, rule: Rule) -> Message {
    let attributes = Attributes::new()
        .string(NFTA_RULE_TABLE, table)
        .string(NFTA_RULE_CHAIN, chain)
        .nest(NFTA_RULE_EXPRESSIONS, rule.0);
    Message::new(NEW_RULE, flags::CREATE | flags::APPEND, &header(family, 0), attributes)
}

fn chain(table: &str, name: &str, kind: &str, hook: u32, priority: i32) -> Message {
    let hook = Attributes::new().be32(NFTA_HOOK_HOOKNUM, hook).bytes(NFTA_HOOK_PRIORITY, &priority.to_be_bytes());
    let attributes = Attributes::new()
        .string(NFTA_CHAIN_TABLE, table)
        .string(NFTA_CHAIN_NAME, name)
        .nest(NFTA_CHAIN_HOOK, hook)
        .be32(NFTA_CHAIN_POLICY, ACCEPT)
        .string(NFTA_CHAIN_TYPE, kind);
    Message::new(NEW_CHAIN, flags::CREATE, &header(INET, 0), attributes)
}

fn framed(messages: Vec<Message>) -> Vec<Message> {
    let mark = |kind| Message::new(kind, 0, &header(0, SUBSYSTEM), Attributes::new());
    let mut batch = vec![mark(NFNL_MSG_BATCH_BEGIN)];
    batch.extend(messages);
    batch.push(mark(NFNL_MSG_BATCH_END));
    batch
}

/// The rules of each chain for this bridge, in order.
fn rules(bridge: &str, subnet: Subnet) -> Vec<(&'static str, Rule)> {
    let from = || Rule::new().input(bridge);
    let mut rules = vec![
        // To the host: DHCP, DNS and ICMP echo, and answers to what the host began; nothing by IPv6.
        ("input", Rule::new().interface(Meta::InputName, true, bridge).accept()),
        ("input", Rule::new().established().accept()),
        ("input", Rule::new().meta(Meta::Family, true, &[NFPROTO_IPV4]).drop()),
    ];
    for (protocol, port) in [(IPPROTO_UDP, 67), (IPPROTO_UDP, 53), (IPPROTO_TCP, 53)] {
        rules.push(("input", Rule::new().port(protocol, port).accept()));
    }
    let echo = Rule::new().meta(Meta::Protocol, false, &[IPPROTO_ICMP]).payload(2, 0, 1).compare(false, &[8]);
    rules.extend([
        ("input", echo.accept()),
        ("input", Rule::new().drop()),
        // Between guests, which these rules see only where br_netfilter is loaded.
        ("forward", from().output(bridge).accept()),
        // Out with a guest's own source alone, and back in only to what a guest began.
        ("forward", from().source(subnet).accept()),
        ("forward", from().drop()),
        ("forward", Rule::new().output(bridge).established().accept()),
        ("forward", Rule::new().output(bridge).drop()),
        (
            "postrouting",
            Rule::new().source(subnet).interface(Meta::OutputName, true, bridge).expression("masq", Attributes::new()),
        ),
    ]);
    rules
}

/// The name of a bridge's table: `puter`, or for a second installation's bridge `puter-<bridge>`.
pub fn table_name(bridge: &str) -> String {
    if bridge == "puter0" { "puter".to_owned() } else { format!("puter-{bridge}") }
}

/// The batch that replaces the table for this bridge.
fn install_batch(bridge: &str, subnet: Subnet) -> Vec<Message> {
    let name = table_name(bridge);
    // Deleting one that does not exist fails, so it is made first.
    let mut messages = vec![
        table(INET, NEW_TABLE, flags::CREATE, &name),
        table(INET, DELETE_TABLE, 0, &name),
        table(INET, NEW_TABLE, flags::CREATE, &name),
        chain(&name, "input", "filter", LOCAL_IN, PRIORITY_FILTER),
        chain(&name, "forward", "filter", FORWARD, PRIORITY_FILTER),
        chain(&name, "postrouting", "nat", POSTROUTING, PRIORITY_SOURCE_NAT),
    ];
    messages.extend(rules(bridge, subnet).into_iter().map(|(chain, body)| rule(INET, &name, chain, body)));
    framed(messages)
}

/// Puts the table for this bridge in the place of any former one, with no moment in between.
///
/// # Errors
/// The kernel's; `OPNOTSUPP` or `NOENT` where it lacks a part of nf_tables.
pub fn install(bridge: &str, subnet: Subnet) -> Result<(), Error> {
    Socket::netfilter()?.batch(&install_batch(bridge, subnet), true)
}

/// Removes the tables for this bridge and its TAPs, if there are any.
///
/// # Errors
/// The kernel's.
pub fn remove(bridge: &str) -> Result<(), Error> {
    let name = table_name(bridge);
    let both = [INET, NETDEV].into_iter();
    let messages = both.flat_map(|f| [table(f, NEW_TABLE, flags::CREATE, &name), table(f, DELETE_TABLE, 0, &name)]);
    Socket::netfilter()?.batch(&framed(messages.collect()), true)
}

/// What a guest may send: frames with its own MAC that are ARP or IPv4 with its own address, or a request to a DHCP
/// server. It answers no DHCP, and IPv6, of which puter gives it none, goes nowhere.
fn guest_rules(mac: Mac, address: Ipv4Addr) -> Vec<Rule> {
    const ARP: u16 = 0x0806;
    const IPV4: u16 = 0x0800;
    let octets = address.octets();
    let arp = || Rule::new().ether_type(ARP);
    let ip = || Rule::new().ether_type(IPV4);
    // Offsets: Ethernet's source (IEEE 802.3); ARP's sender (RFC 826); IPv4's source (RFC 791); UDP's source (RFC 768).
    vec![
        // A TAP is always Ethernet; to say so is how nft(8) knows the address for one.
        Rule::new().meta(Meta::InputType, false, &1u16.to_ne_bytes()).payload(0, 6, 6).compare(true, &mac.0).drop(),
        arp().payload(1, 8, 6).compare(true, &mac.0).drop(),
        arp().payload(1, 14, 4).compare(false, &octets).accept(),
        // A probe for a duplicate of an address names no sender (RFC 5227).
        arp().payload(1, 14, 4).compare(false, &[0; 4]).accept(),
        ip().meta(Meta::Protocol, false, &[IPPROTO_UDP]).payload(2, 0, 2).compare(false, &67u16.to_be_bytes()).drop(),
        // A client speaks for its own MAC: 28 bytes into the message (RFC 2131, section 2), after UDP's header.
        ip().port(IPPROTO_UDP, 67).payload(2, 8 + 28, 6).compare(true, &mac.0).drop(),
        ip().payload(1, 12, 4).compare(false, &octets).accept(),
        ip().payload(1, 12, 4).compare(false, &[0; 4]).port(IPPROTO_UDP, 67).accept(),
        Rule::new().drop(),
    ]
}

/// Makes and deletes a TAP's chain, so that none is left.
fn no_chain(table_name: &str, tap: &str) -> Vec<Message> {
    let attributes = || Attributes::new().string(NFTA_CHAIN_TABLE, table_name).string(NFTA_CHAIN_NAME, tap);
    vec![
        table(NETDEV, NEW_TABLE, flags::CREATE, table_name),
        Message::new(NEW_CHAIN, flags::CREATE, &header(NETDEV, 0), attributes()),
        Message::new(DELETE_CHAIN, 0, &header(NETDEV, 0), attributes()),
    ]
}

/// A TAP and what its guest may call itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// The TAP's name.
    pub tap: String,
    pub mac: Mac,
    pub address: Ipv4Addr,
}

/// How many TAPs share a batch: each commit waits for the kernel some 15 ms, and a batch must fit a socket's buffer.
const GUESTS_AT_ONCE: usize = 32;

/// Lets nothing into the host from these TAPs but what their guests may send, with no moment in between where a former
/// chain is replaced.
///
/// # Errors
/// The kernel's; `OPNOTSUPP` where it lacks nf_tables for interfaces.
pub fn guard(bridge: &str, guests: &[Guest]) -> Result<(), Error> {
    let name = table_name(bridge);
    for some in guests.chunks(GUESTS_AT_ONCE) {
        let replaced = |guest: &Guest| [no_chain(&name, &guest.tap), guard_messages(&name, guest, 0)].concat();
        let messages = some.iter().flat_map(replaced).collect();
        Socket::netfilter()?.batch(&framed(messages), true)?;
    }
    Ok(())
}

/// As [`guard`], for a TAP that was made just now: what takes its time is to delete a chain, and it has none.
///
/// # Errors
/// See [`guard`].
pub fn guard_new(bridge: &str, guest: Guest) -> Result<(), Error> {
    let messages = guard_messages(&table_name(bridge), &guest, flags::EXCLUSIVE);
    match Socket::netfilter()?.batch(&framed(messages), true) {
        // Of a TAP of this name that is gone.
        Err(error) if error.errno == Errno::EXIST => guard(bridge, &[guest]),
        done => done,
    }
}

/// The messages that make the chain of one TAP.
fn guard_messages(name: &str, guest: &Guest, exclusive: u16) -> Vec<Message> {
    let Guest { tap, mac, address } = guest;
    let mut messages = vec![table(NETDEV, NEW_TABLE, flags::CREATE, name)];
    let hook = Attributes::new()
        .be32(NFTA_HOOK_HOOKNUM, INGRESS)
        .bytes(NFTA_HOOK_PRIORITY, &PRIORITY_FILTER.to_be_bytes())
        .string(NFTA_HOOK_DEV, tap);
    let attributes = Attributes::new()
        .string(NFTA_CHAIN_TABLE, name)
        .string(NFTA_CHAIN_NAME, tap)
        .nest(NFTA_CHAIN_HOOK, hook)
        .be32(NFTA_CHAIN_POLICY, ACCEPT)
        .string(NFTA_CHAIN_TYPE, "filter");
    messages.push(Message::new(NEW_CHAIN, flags::CREATE | exclusive, &header(NETDEV, 0), attributes));
    messages.extend(guest_rules(*mac, *address).into_iter().map(|body| rule(NETDEV, name, tap, body)));
    messages
}

/// Removes the chain of a TAP that is gone; newer kernels keep it without its interface.
///
/// # Errors
/// The kernel's.
pub fn unguard(bridge: &str, tap: &str) -> Result<(), Error> {
    Socket::netfilter()?.batch(&framed(no_chain(&table_name(bridge), tap)), true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_batch_is_framed_and_deletes_before_it_makes() {
        let batch = install_batch("puter0", Subnet::default());
        let kinds: Vec<u16> = batch.iter().map(|m| m.kind).collect();
        assert_eq!(kinds[..4], [NFNL_MSG_BATCH_BEGIN, NEW_TABLE, DELETE_TABLE, NEW_TABLE]);
        assert_eq!(kinds.last(), Some(&NFNL_MSG_BATCH_END));
        assert_eq!(kinds.iter().filter(|k| **k == NEW_CHAIN).count(), 3);
        assert_eq!(kinds.iter().filter(|k| **k == NEW_RULE).count(), rules("puter0", Subnet::default()).len());
    }

    #[test]
    fn an_accept_is_encoded_as_the_kernel_reads_it() {
        let expected = [
            (44u16.to_ne_bytes(), (NFTA_LIST_ELEM | 0x8000).to_ne_bytes()),
            (14u16.to_ne_bytes(), NFTA_EXPR_NAME.to_ne_bytes()),
        ];
        let mut bytes = Vec::new();
        Message::new(0, 0, &[], Rule::new().accept().0).encode(0, 0, &mut bytes);
        let body = &bytes[crate::net::message::HEADER..];
        assert_eq!(body[..2], (body.len() as u16).to_ne_bytes());
        assert_eq!(body[2..4], expected[0].1);
        assert_eq!((&body[4..6], &body[6..8]), (&expected[1].0[..], &expected[1].1[..]));
        assert_eq!(&body[8..18], b"immediate\0");
        assert_eq!(body[body.len() - 4..], 1u32.to_be_bytes());
    }

    #[test]
    fn a_batch_of_guards_fits_a_sockets_buffer() {
        let guest =
            Guest { tap: "pt-123456789abc".to_owned(), mac: Mac([0xff; 6]), address: Ipv4Addr::new(10, 255, 255, 254) };
        let mut bytes = Vec::new();
        let name = "puter-exactly-15-chars";
        for message in [no_chain(name, &guest.tap), guard_messages(name, &guest, 0)].concat() {
            message.encode(flags::ACK, 1, &mut bytes);
        }
        // The default of net.core.wmem_default is 212,992 bytes, about half of them for data.
        assert!(bytes.len() * GUESTS_AT_ONCE < 106_496, "{} bytes each", bytes.len());
    }

    #[test]
    fn a_second_bridge_has_a_table_of_its_own() {
        assert_eq!(table_name("puter0"), "puter");
        assert_eq!(table_name("lab0"), "puter-lab0");
    }
}
