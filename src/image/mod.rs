//! Images: references, registries, the local store, and the file system made of an image's layers.

mod arrival;
mod auth;
mod blob;
mod convert;
mod credentials;
mod decompress;
pub mod digest;
mod docker_archive;
pub mod ext4;
mod files;
mod filesystem;
mod http;
mod kernel;
pub mod layers;
mod manifest;
mod oci_layout;
pub mod progress;
mod pull;
pub mod reference;
mod registry;
mod source;
pub mod store;
pub mod tar;
mod url;

pub use digest::Digest;
pub use progress::{Progress, PullOptions, Stage, host_architecture, is_cancelled};
pub use reference::Reference;
pub use store::{Gone, Hold, Image, Kept, LayerId, Removed, Store, Target};
