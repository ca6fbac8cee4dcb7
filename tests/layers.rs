//! Layers turned into a file system, checked with e2fsprogs, the kernel's own ext4 and umoci.

mod layers {
    pub mod grow;
    pub mod same;
    pub mod sparse;
    pub mod styles;
    pub mod tools;
}
