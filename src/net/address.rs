//! Addresses of interfaces (rtnetlink(7), linux/if_addr.h).

use std::net::Ipv4Addr;

use super::family::Family;
use super::message::{self, Attributes, Message, flags};
use super::{Error, Socket};

const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
/// Size of `struct ifaddrmsg`.
const HEADER: usize = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
/// Nobody else has it, so it may be used at once (IFA_F_NODAD); IPv4 knows no such question.
const UNASKED: u8 = 2;

/// An interface's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address<A = Ipv4Addr> {
    /// The interface's number.
    pub index: u32,
    pub address: A,
    /// Length of the prefix in bits.
    pub prefix: u8,
}

fn encode<A: Family>(kind: u16, flags: u16, address: Address<A>) -> Message {
    let broadcast = address.address.broadcast(address.prefix);
    let mut header = [0; HEADER];
    header[0] = A::NUMBER;
    header[1] = address.prefix;
    header[2] = if broadcast.is_none() { UNASKED } else { 0 };
    header[4..8].copy_from_slice(&address.index.to_ne_bytes());
    let bytes = address.address.bytes();
    let mut attributes = Attributes::new().bytes(IFA_LOCAL, &bytes).bytes(IFA_ADDRESS, &bytes);
    if let Some(broadcast) = broadcast {
        attributes = attributes.bytes(IFA_BROADCAST, &broadcast.bytes());
    }
    Message::new(kind, flags, &header, attributes)
}

/// Reads the body of an RTM_NEWADDR message; `None` for one of another family.
pub fn decode<A: Family>(body: &[u8]) -> Option<Address<A>> {
    let (family, prefix) = (*body.first()?, *body.get(1)?);
    let index = message::u32_at(body, 4)?;
    if family != A::NUMBER || prefix > A::BITS {
        return None;
    }
    let read = |wanted| {
        let (_, payload) = message::attributes(body, HEADER).find(|(kind, _)| *kind == wanted)?;
        A::read(payload)
    };
    // On a point-to-point link IFA_ADDRESS is the peer's.
    let address = read(IFA_LOCAL).or_else(|| read(IFA_ADDRESS))?;
    Some(Address { index, address, prefix })
}

/// All addresses of this family in this network namespace.
///
/// # Errors
/// The kernel's.
pub fn list<A: Family>(socket: &mut Socket) -> Result<Vec<Address<A>>, Error> {
    let mut header = [0; HEADER];
    header[0] = A::NUMBER;
    let entries = socket.dump(&Message::new(RTM_GETADDR, 0, &header, Attributes::new()))?;
    Ok(entries.iter().filter(|(kind, _)| *kind == RTM_NEWADDR).filter_map(|(_, body)| decode(body)).collect())
}

/// Gives an interface an address.
///
/// # Errors
/// The kernel's; `EXIST` where the interface has it.
pub fn add<A: Family>(socket: &mut Socket, address: Address<A>) -> Result<(), Error> {
    socket.request(&encode(RTM_NEWADDR, flags::CREATE | flags::EXCLUSIVE, address))
}

/// Takes an address from an interface.
///
/// # Errors
/// The kernel's; `ADDRNOTAVAIL` where the interface does not have it.
pub fn remove<A: Family>(socket: &mut Socket, address: Address<A>) -> Result<(), Error> {
    socket.request(&encode(RTM_DELADDR, 0, address))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    fn body<A: Family>(address: Address<A>) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(RTM_NEWADDR, 0, address).encode(0, 1, &mut bytes);
        bytes[message::HEADER..].to_vec()
    }

    #[test]
    fn an_address_is_read_as_it_was_written() {
        let address = Address { index: 3, address: Ipv4Addr::new(10, 0, 0, 1), prefix: 24 };
        let four = body(address);
        assert_eq!(decode(&four), Some(address));
        assert!(four.windows(4).any(|w| w == [10, 0, 0, 255]), "the broadcast address is missing");
        let address = Address { index: 3, address: "fd00::1".parse::<Ipv6Addr>().unwrap(), prefix: 64 };
        let six = body(address);
        assert_eq!(decode(&six), Some(address));
        assert_eq!((decode::<Ipv4Addr>(&six), decode::<Ipv6Addr>(&four)), (None, None), "of the other family");
        for cut in 0..=HEADER {
            assert_eq!(decode::<Ipv4Addr>(&four[..cut]), None, "{cut}");
            assert_eq!(decode::<Ipv6Addr>(&six[..cut]), None, "{cut}");
        }
    }
}
