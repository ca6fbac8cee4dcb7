//! The model: what a VM is, where its state lives and what may be done with it.
//!
//! Nothing here prints: progress and results go to the caller through [`lifecycle::Observer`] and return values.

pub mod agent;
pub mod cancel;
pub mod cluster;
pub mod copy;
pub mod daemon;
pub mod diff;
pub mod doctor;
pub mod exec;
pub mod files;
pub mod home;
pub mod images;
pub mod init;
pub mod key;
pub mod lifecycle;
pub mod machine;
pub mod monitor;
pub mod parallel;
pub mod port;
pub mod records;
pub mod service;
pub mod settings;
pub mod snapshots;
pub mod state;
pub mod usage;

pub use crate::hint::{Hint, Hinted};
