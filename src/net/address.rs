//! IPv4 addresses of interfaces (rtnetlink(7), linux/if_addr.h).

use std::net::Ipv4Addr;

use super::message::{self, Attributes, Message, flags};
use super::{Error, Socket};

const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const AF_INET: u8 = 2;
/// Size of `struct ifaddrmsg`.
const HEADER: usize = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;

/// An interface's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface's number.
    pub index: u32,
    pub address: Ipv4Addr,
    /// Length of the prefix in bits.
    pub prefix: u8,
}

fn encode(kind: u16, flags: u16, address: Address) -> Message {
    let mut header = [0; HEADER];
    header[0] = AF_INET;
    header[1] = address.prefix;
    header[4..8].copy_from_slice(&address.index.to_ne_bytes());
    let broadcast = u32::from(address.address) | u32::MAX.checked_shr(u32::from(address.prefix)).unwrap_or(0);
    let octets = address.address.octets();
    let attributes = Attributes::new()
        .bytes(IFA_LOCAL, &octets)
        .bytes(IFA_ADDRESS, &octets)
        .bytes(IFA_BROADCAST, &broadcast.to_be_bytes());
    Message::new(kind, flags, &header, attributes)
}

/// Reads the body of an RTM_NEWADDR message.
pub fn decode(body: &[u8]) -> Option<Address> {
    let (family, prefix) = (*body.first()?, *body.get(1)?);
    let index = message::u32_at(body, 4)?;
    let octets = |wanted| {
        let (_, payload) = message::attributes(body, HEADER).find(|(kind, _)| *kind == wanted)?;
        <[u8; 4]>::try_from(payload).ok()
    };
    // On a point-to-point link IFA_ADDRESS is the peer's.
    let address = octets(IFA_LOCAL).or_else(|| octets(IFA_ADDRESS))?;
    (family == AF_INET && prefix <= 32).then_some(Address { index, address: address.into(), prefix })
}

/// All IPv4 addresses of this network namespace.
///
/// # Errors
/// The kernel's.
pub fn list(socket: &mut Socket) -> Result<Vec<Address>, Error> {
    let mut header = [0; HEADER];
    header[0] = AF_INET;
    let entries = socket.dump(&Message::new(RTM_GETADDR, 0, &header, Attributes::new()))?;
    Ok(entries.iter().filter(|(kind, _)| *kind == RTM_NEWADDR).filter_map(|(_, body)| decode(body)).collect())
}

/// Gives an interface an address.
///
/// # Errors
/// The kernel's; `EXIST` where the interface has it.
pub fn add(socket: &mut Socket, address: Address) -> Result<(), Error> {
    socket.request(&encode(RTM_NEWADDR, flags::CREATE | flags::EXCLUSIVE, address))
}

/// Takes an address from an interface.
///
/// # Errors
/// The kernel's; `ADDRNOTAVAIL` where the interface does not have it.
pub fn remove(socket: &mut Socket, address: Address) -> Result<(), Error> {
    socket.request(&encode(RTM_DELADDR, 0, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_was_written() {
        let address = Address { index: 3, address: Ipv4Addr::new(10, 0, 0, 1), prefix: 24 };
        let mut bytes = Vec::new();
        encode(RTM_NEWADDR, 0, address).encode(0, 1, &mut bytes);
        let body = &bytes[message::HEADER..];
        assert_eq!(decode(body), Some(address));
        assert!(body.windows(4).any(|w| w == [10, 0, 0, 255]), "the broadcast address is missing");
        for cut in 0..=HEADER {
            assert_eq!(decode(&body[..cut]), None, "{cut}");
        }
    }
}
