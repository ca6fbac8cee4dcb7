//! Writes an ext4 file system into a file: in one pass, without root, and with only the inodes in memory.
//!
//! Sources: Linux Documentation/filesystems/ext4, fs/ext4/ext4.h and e2fsprogs. Contents are stored from the front
//! while they arrive; directories, bitmaps, inode tables and the journal follow them when the number of inodes is known
//! (flex_bg allows them anywhere). Only the blocks after each copy of the superblock are kept free from the start: they
//! hold the group descriptors and room for more, so that the guest can grow the file system while it is mounted.
//!
//! [`Writer`] makes the file system, [`Tree`] reads it back.

mod crc32c;
mod directory;
mod disk;
mod extents;
mod inode;
mod layout;
mod namespace;
mod superblock;
mod tree;
mod writer;
mod xattr;

pub use inode::{BLOCK_DEVICE, CHAR, DIRECTORY, FIFO, FILE, Meta, SYMLINK};
pub use namespace::{Place, Walk};
pub use tree::{Entry, Statistics, Tree};
pub use writer::{FileWriter, Writer};

/// Size of a block, in bytes.
pub const BLOCK: u64 = 4096;
/// What one bitmap of a block describes.
const BLOCKS_PER_GROUP: u64 = 8 * BLOCK;
/// Length of a group descriptor (64bit), in bytes.
const DESCRIPTOR: u64 = 64;
/// Blocks for group descriptors after each superblock, in use or reserved: enough for 2 TiB. Beyond that, Linux goes on
/// by itself (meta_bg).
const GDT_BLOCKS: u64 = 256;
/// Groups that these blocks can describe.
const MAX_GROUPS: u64 = GDT_BLOCKS * (BLOCK / DESCRIPTOR);
/// Inode of the root directory.
pub const ROOT: u32 = 2;
const RESIZE_INODE: u32 = 7;
const JOURNAL_INODE: u32 = 8;
/// The first inode that is not reserved.
const FIRST_INODE: u32 = 11;
/// Longest name in a directory, in bytes.
pub const MAX_NAME: usize = 255;
