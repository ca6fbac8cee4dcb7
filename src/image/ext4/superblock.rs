//! The superblock and the group descriptors (Linux fs/ext4/ext4.h, struct ext4_super_block and ext4_group_desc).

use super::crc32c::crc32c;
use super::extents::Root;
use super::inode::{EXTRA, INODE};
use super::{BLOCK, BLOCKS_PER_GROUP, DESCRIPTOR, FIRST_INODE, GDT_BLOCKS, JOURNAL_INODE};

/// Length of the superblock, and its place in the first block, in bytes.
const SUPERBLOCK: usize = 1024;
/// Groups whose metadata lie together when the guest grows the file system, as a power of two.
const LOG_GROUPS_PER_FLEX: u8 = 4;

/// COMPAT: has_journal, ext_attr, resize_inode, dir_index.
const COMPATIBLE: u32 = 0x4 | 0x8 | 0x10 | 0x20;
/// INCOMPAT: filetype, extents, 64bit, flex_bg.
const INCOMPATIBLE: u32 = 0x2 | 0x40 | 0x80 | 0x200;
/// RO_COMPAT: sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum.
const READ_ONLY: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400;
/// Default mount options: user_xattr, acl.
const MOUNT_OPTIONS: u32 = 0x4 | 0x8;
/// bg_flags: the inode table is zeroed.
const INODE_ZEROED: u16 = 0x4;

/// What the superblock says of the whole.
#[derive(Clone, Debug)]
pub struct Geometry {
    pub uuid: [u8; 16],
    pub label: [u8; 16],
    pub groups: u64,
    pub inodes_per_group: u32,
    pub free_blocks: u64,
    pub free_inodes: u64,
    /// The journal's extent tree and size in bytes, kept here as well for a damaged inode.
    pub journal: (Root, u64),
}

/// A group's metadata and counts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    pub block_bitmap: u64,
    pub inode_bitmap: u64,
    pub inode_table: u64,
    pub free_blocks: u32,
    pub free_inodes: u32,
    pub directories: u32,
    /// Inodes at the table's end that were never used.
    pub unused_inodes: u32,
    pub block_bitmap_sum: u32,
    pub inode_bitmap_sum: u32,
}

impl Geometry {
    /// Blocks with descriptors in use.
    pub fn descriptor_blocks(&self) -> u64 {
        (self.groups * DESCRIPTOR).div_ceil(BLOCK)
    }

    /// The superblock as it stands in `group`.
    pub fn superblock(&self, group: u64) -> [u8; SUPERBLOCK] {
        let mut raw = [0; SUPERBLOCK];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        let blocks = self.groups * BLOCKS_PER_GROUP;
        let inodes = self.groups * u64::from(self.inodes_per_group);
        let kept_for_root = blocks / 100;
        let pairs = [(0x04, 0x150, blocks), (0x08, 0x154, kept_for_root), (0x0c, 0x158, self.free_blocks)];
        for (low, high, value) in pairs {
            put(low, &(value as u32).to_le_bytes());
            put(high, &((value >> 32) as u32).to_le_bytes());
        }
        let log_block = BLOCK.trailing_zeros() - 10;
        for (at, value) in [
            (0x00, inodes as u32),
            (0x10, self.free_inodes as u32),
            (0x18, log_block),
            (0x1c, log_block),
            (0x20, BLOCKS_PER_GROUP as u32),
            (0x24, BLOCKS_PER_GROUP as u32),
            (0x28, self.inodes_per_group),
            (0x4c, 1), // dynamic inode sizes
            (0x54, FIRST_INODE),
            (0x5c, COMPATIBLE),
            (0x60, INCOMPATIBLE),
            (0x64, READ_ONLY),
            (0xe0, JOURNAL_INODE),
            (0x100, MOUNT_OPTIONS),
            (0x160, 1), // directory hashes take characters as signed
        ] {
            put(at, &value.to_le_bytes());
        }
        for (at, value) in [
            (0x36, 0xffff), // no check after a number of mounts
            (0x38, 0xef53),
            (0x3a, 1), // cleanly unmounted
            (0x3c, 1), // on errors: continue, as e2fsprogs sets it
            (0x58, INODE as u16),
            (0x5a, group as u16),
            (0xce, (GDT_BLOCKS - self.descriptor_blocks()) as u16),
            (0xfe, DESCRIPTOR as u16),
            (0x15c, EXTRA),
            (0x15e, EXTRA),
        ] {
            put(at, &value.to_le_bytes());
        }
        put(0x68, &self.uuid);
        put(0x78, &self.label);
        put(0xec, &self.uuid); // the seed of directory hashes: any value that differs between file systems
        put(0xfc, &[1, 1]); // half MD4; the journal's place is kept below
        put(0x10c, &self.journal.0);
        put(0x10c + 60, &((self.journal.1 >> 32) as u32).to_le_bytes());
        put(0x10c + 64, &(self.journal.1 as u32).to_le_bytes());
        put(0x174, &[LOG_GROUPS_PER_FLEX, 1]); // checksums are CRC-32C
        let sum = crc32c(!0, &raw[..SUPERBLOCK - 4]);
        raw[SUPERBLOCK - 4..].copy_from_slice(&sum.to_le_bytes());
        raw
    }
}

impl Descriptor {
    /// The descriptor's bytes; `seed` is the file system's checksum seed.
    pub fn encode(&self, group: u64, seed: u32) -> [u8; DESCRIPTOR as usize] {
        let mut raw = [0; DESCRIPTOR as usize];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        for (low, high, value) in [(0, 32, self.block_bitmap), (4, 36, self.inode_bitmap), (8, 40, self.inode_table)] {
            put(low, &(value as u32).to_le_bytes());
            put(high, &((value >> 32) as u32).to_le_bytes());
        }
        for (low, high, value) in [
            (12, 44, self.free_blocks),
            (14, 46, self.free_inodes),
            (16, 48, self.directories),
            (24, 56, self.block_bitmap_sum),
            (26, 58, self.inode_bitmap_sum),
            (28, 50, self.unused_inodes),
        ] {
            put(low, &(value as u16).to_le_bytes());
            put(high, &((value >> 16) as u16).to_le_bytes());
        }
        put(18, &INODE_ZEROED.to_le_bytes());
        let sum = crc32c(crc32c(seed, &(group as u32).to_le_bytes()), &raw);
        raw[30..32].copy_from_slice(&(sum as u16).to_le_bytes());
        raw
    }
}
