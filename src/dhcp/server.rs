//! The sockets around the state machine.
