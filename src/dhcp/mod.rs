//! DHCP (RFC 2131, RFC 2132) for the machines on one bridge.
//!
//! [`Engine`] is a pure state machine: bytes and the time go in, at most one answer comes out. [`server`] holds the
//! sockets. The codec is our own, in [`message`]: the messages are few, overload and the order of options need raw
//! access, and the crates that offer more bring a tree of dependencies into a program with capabilities.
//!
//! A machine's address follows from its MAC alone, so nothing is allocated: the table of leases only reports who holds
//! an address now, and losing it at a restart changes no answer.

mod engine;
pub mod message;
pub mod server;
#[cfg(test)]
mod tests;

pub use engine::{Config, Destination, Directory, Engine, Host, Reply};
pub use server::Server;
