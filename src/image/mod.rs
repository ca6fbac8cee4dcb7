//! Images: references, registries, the local store, and the file system made of an image's layers.

pub mod digest;
pub mod progress;
pub mod reference;
pub mod store;

pub use digest::Digest;
pub use progress::{Progress, PullOptions, Stage, is_cancelled};
pub use reference::Reference;
pub use store::{Image, Store};
