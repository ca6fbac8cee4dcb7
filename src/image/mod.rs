//! Images: references, registries, the local store, and the file system made of an image's layers.

mod auth;
mod blob;
mod convert;
mod credentials;
mod decompress;
pub mod digest;
mod docker_archive;
mod files;
mod filesystem;
mod http;
mod kernel;
mod manifest;
mod oci_layout;
pub mod progress;
mod pull;
pub mod reference;
mod registry;
mod source;
pub mod store;
mod url;

pub use digest::Digest;
pub use progress::{Progress, PullOptions, Stage, is_cancelled};
pub use reference::Reference;
pub use store::{Hold, Image, Removed, Store};
