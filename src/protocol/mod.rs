//! What crosses a socket: the addressing rule, puterd's HTTP API and the agent's messages.
//!
//! Only data and pure functions live here: both sides of each socket depend on it, and it depends on nothing.

pub mod address;
pub mod agent;
pub mod daemon;
