//! What differs between IPv4 and IPv6 in messages about addresses and routes.

use std::fmt::{Debug, Display};
use std::net::{Ipv4Addr, Ipv6Addr};

/// A kind of addresses.
pub trait Family: Copy + Debug + Display + PartialEq {
    /// The kernel's number for it (AF_*).
    const NUMBER: u8;
    /// Length of an address in bits.
    const BITS: u8;
    /// The address of which all bits are 0.
    const UNSPECIFIED: Self;

    /// Reads an address.
    fn read(bytes: &[u8]) -> Option<Self>;
    /// The address's bytes.
    fn bytes(self) -> Vec<u8>;
    /// The last address of the network that this one is in, which reaches all in it where the family has that.
    fn broadcast(self, prefix: u8) -> Option<Self>;
}

impl Family for Ipv4Addr {
    const NUMBER: u8 = 2;
    const BITS: u8 = 32;
    const UNSPECIFIED: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

    fn read(bytes: &[u8]) -> Option<Ipv4Addr> {
        <[u8; 4]>::try_from(bytes).ok().map(Into::into)
    }

    fn bytes(self) -> Vec<u8> {
        self.octets().into()
    }

    fn broadcast(self, prefix: u8) -> Option<Ipv4Addr> {
        Some((u32::from(self) | u32::MAX.checked_shr(prefix.into()).unwrap_or(0)).into())
    }
}

impl Family for Ipv6Addr {
    const NUMBER: u8 = 10;
    const BITS: u8 = 128;
    const UNSPECIFIED: Ipv6Addr = Ipv6Addr::UNSPECIFIED;

    fn read(bytes: &[u8]) -> Option<Ipv6Addr> {
        <[u8; 16]>::try_from(bytes).ok().map(Into::into)
    }

    fn bytes(self) -> Vec<u8> {
        self.octets().into()
    }

    fn broadcast(self, _: u8) -> Option<Ipv6Addr> {
        None
    }
}
