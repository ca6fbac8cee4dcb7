//! The wire format: a request read with suspicion, a reply written within a size.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use crate::protocol::address::Mac;

/// Smallest BOOTP message (RFC 1542, section 2.1); some clients drop shorter ones.
pub const MIN_LENGTH: usize = 300;
/// Where options begin, after the fixed header and the magic cookie (RFC 2131, section 2).
const OPTIONS_AT: usize = 240;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
const BROADCAST_FLAG: u16 = 0x8000;

/// Option codes (RFC 2132, section numbers in the names' order there).
pub mod code {
    pub const PAD: u8 = 0;
    pub const SUBNET_MASK: u8 = 1;
    pub const ROUTER: u8 = 3;
    pub const DNS: u8 = 6;
    pub const HOSTNAME: u8 = 12;
    pub const DOMAIN: u8 = 15;
    pub const MTU: u8 = 26;
    pub const BROADCAST: u8 = 28;
    pub const REQUESTED_IP: u8 = 50;
    pub const LEASE_TIME: u8 = 51;
    pub const OVERLOAD: u8 = 52;
    pub const MESSAGE_TYPE: u8 = 53;
    pub const SERVER_ID: u8 = 54;
    pub const PARAMETERS: u8 = 55;
    pub const MESSAGE: u8 = 56;
    pub const MAX_SIZE: u8 = 57;
    pub const T1: u8 = 58;
    pub const T2: u8 = 59;
    pub const CLIENT_ID: u8 = 61;
    /// RFC 3397.
    pub const SEARCH: u8 = 119;
    pub const END: u8 = 255;
}

/// Values of option 53 (RFC 2132, section 9.6).
pub mod kind {
    pub const DISCOVER: u8 = 1;
    pub const OFFER: u8 = 2;
    pub const REQUEST: u8 = 3;
    pub const DECLINE: u8 = 4;
    pub const ACK: u8 = 5;
    pub const NAK: u8 = 6;
    pub const RELEASE: u8 = 7;
    pub const INFORM: u8 = 8;
}

/// A client's message.
#[derive(Debug)]
pub struct Request {
    pub xid: [u8; 4],
    pub flags: u16,
    pub ciaddr: Ipv4Addr,
    pub giaddr: Ipv4Addr,
    pub mac: Mac,
    options: BTreeMap<u8, Vec<u8>>,
}

impl Request {
    /// Reads a message; `None` for whatever is not a whole request of an Ethernet client.
    pub fn parse(bytes: &[u8]) -> Option<Request> {
        let fixed: &[u8; OPTIONS_AT] = bytes.first_chunk()?;
        // BOOTREQUEST, Ethernet, six bytes of address.
        if fixed[..3] != [1, 1, 6] || fixed[236..] != MAGIC {
            return None;
        }
        let address = |at: usize| Ipv4Addr::new(fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]);
        let mut options = BTreeMap::new();
        read_options(bytes.get(OPTIONS_AT..)?, &mut options)?;
        // Options may continue in 'file', then in 'sname' (RFC 2131, section 4.1).
        if let Some(overload) = options.get(&code::OVERLOAD) {
            let [overload @ 1..=3] = overload[..] else { return None };
            if overload & 1 != 0 {
                read_options(&fixed[108..236], &mut options)?;
            }
            if overload & 2 != 0 {
                read_options(&fixed[44..108], &mut options)?;
            }
        }
        Some(Request {
            xid: [fixed[4], fixed[5], fixed[6], fixed[7]],
            flags: u16::from_be_bytes([fixed[10], fixed[11]]),
            ciaddr: address(12),
            giaddr: address(24),
            mac: Mac([fixed[28], fixed[29], fixed[30], fixed[31], fixed[32], fixed[33]]),
            options,
        })
    }

    /// Whether the client asks for broadcast answers.
    pub fn broadcast(&self) -> bool {
        self.flags & BROADCAST_FLAG != 0
    }

    /// An option's bytes; parts of one option are already joined (RFC 3396).
    pub fn option(&self, code: u8) -> Option<&[u8]> {
        self.options.get(&code).map(Vec::as_slice)
    }

    /// An option that holds exactly one address. `Err` when it is there with another length.
    pub(super) fn address(&self, code: u8) -> Result<Option<Ipv4Addr>, ()> {
        self.option(code).map(|v| <[u8; 4]>::try_from(v).map(Ipv4Addr::from).map_err(|_| ())).transpose()
    }

    /// The message's type, option 53.
    pub fn kind(&self) -> Option<u8> {
        match self.option(code::MESSAGE_TYPE)? {
            [kind] => Some(*kind),
            _ => None,
        }
    }
}

/// Reads one field of options up to its end mark or its end; `None` if an option leaves the field.
fn read_options(mut field: &[u8], into: &mut BTreeMap<u8, Vec<u8>>) -> Option<()> {
    while let Some((&code, rest)) = field.split_first() {
        match code {
            code::PAD => field = rest,
            code::END => break,
            _ => {
                let (&length, rest) = rest.split_first()?;
                let (value, rest) = rest.split_at_checked(length.into())?;
                into.entry(code).or_default().extend_from_slice(value);
                field = rest;
            }
        }
    }
    Some(())
}

/// A reply under construction.
pub struct Writer {
    bytes: Vec<u8>,
    limit: usize,
}

impl Writer {
    /// The fixed part of an answer; `limit` is the largest payload in bytes.
    pub fn new(to: &Request, ciaddr: Ipv4Addr, yiaddr: Ipv4Addr, flags: u16, limit: usize) -> Writer {
        let mut bytes = Vec::with_capacity(MIN_LENGTH);
        bytes.extend([2, 1, 6, 0]);
        bytes.extend(to.xid);
        bytes.extend([0, 0]);
        bytes.extend(flags.to_be_bytes());
        bytes.extend(ciaddr.octets());
        bytes.extend(yiaddr.octets());
        bytes.extend([0; 4]); // siaddr: nothing boots from here
        bytes.extend(to.giaddr.octets());
        bytes.extend(to.mac.0);
        bytes.resize(OPTIONS_AT - MAGIC.len(), 0);
        bytes.extend(MAGIC);
        Writer { bytes, limit }
    }

    /// Appends an option, unless it is empty, longer than 255 bytes, or leaves no room for the end mark.
    pub fn option(&mut self, code: u8, value: &[u8]) {
        let Ok(length) = u8::try_from(value.len()) else { return };
        if length == 0 || self.bytes.len() + 2 + value.len() + 1 > self.limit {
            return;
        }
        self.bytes.extend([code, length]);
        self.bytes.extend(value);
    }

    /// Closes the options and pads the message to BOOTP's smallest size.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.push(code::END);
        if self.bytes.len() < MIN_LENGTH {
            self.bytes.resize(MIN_LENGTH, 0);
        }
        self.bytes
    }
}
