//! What crosses a socket: the addressing rule, puterd's HTTP API and the agent's messages.
//!
//! Data and pure functions, but for [`unix_http`], the client's way to a Unix socket: both sides of each socket depend
//! on this module, and it depends on nothing.

pub mod address;
pub mod agent;
pub mod daemon;
pub mod ipv6;
pub mod neighbours;
pub mod ports;
pub mod unix_http;
