//! The kernel's network by netlink: links, addresses, routes, TAPs and nftables.
//!
//! Messages are encoded and decoded by pure functions; [`socket::Socket`] alone touches the kernel. Nothing here knows
//! what puter wants of the network: that is decided in `daemon`.

pub mod address;
pub mod events;
pub mod family;
pub mod link;
pub mod message;
pub mod nft;
pub mod route;
pub mod socket;
pub mod sysctl;
pub mod tap;

pub use socket::{Error, Socket};
