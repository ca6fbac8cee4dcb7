//! Images: references, registries, the local store, and the file system made of an image's layers.

mod arrival;
pub mod auth;
mod blob;
mod convert;
pub mod credentials;
pub mod decompress;
pub mod digest;
pub mod docker_archive;
pub mod ext4;
mod files;
mod filesystem;
mod http;
mod kernel;
pub mod layers;
pub mod manifest;
mod mirror;
mod oci_layout;
mod patience;
pub mod progress;
mod proxy;
mod pull;
pub mod reference;
mod registry;
mod source;
pub mod store;
pub mod tar;
mod tls;
pub mod url;

pub use digest::Digest;
pub use mirror::{Mirrors, parse_mirrors};
pub use progress::{Progress, PullOptions, Stage, host_architecture, is_cancelled};
pub use reference::Reference;
pub use store::{Gone, Hold, Image, Kept, LayerId, Removed, Store, Target};
