//! The parts of `cargo xtask`, shared with the end-to-end tests: Debian packages, the build, and a [`world`] of network
//! namespaces in which an unprivileged user runs puter.

pub mod bench;
pub mod build;
pub mod demo;
pub mod deny;
pub mod fuzz;
pub mod guest_image;
pub mod large_image;
pub mod msrv;
pub mod package;
pub mod packages;
pub mod registry;
pub mod report;
pub mod shell;
pub mod small_guest;
pub mod suite;
pub mod world;
