//! Inodes in memory and on disk (Linux fs/ext4/ext4.h, struct ext4_inode).

use std::collections::BTreeMap;

use super::crc32c::crc32c;
use super::extents::Root;
use crate::image::tar::Time;

/// Length on disk, in bytes.
pub const INODE: usize = 256;
/// Bytes of the larger inode in use beyond the first 128.
pub const EXTRA: u16 = 32;
/// Where extended attributes begin within the inode.
pub const XATTRS_AT: usize = 128 + EXTRA as usize;

pub const FIFO: u16 = 0o010_000;
pub const CHAR: u16 = 0o020_000;
pub const DIRECTORY: u16 = 0o040_000;
pub const BLOCK_DEVICE: u16 = 0o060_000;
pub const FILE: u16 = 0o100_000;
pub const SYMLINK: u16 = 0o120_000;
const TYPE: u16 = 0o170_000;

/// i_flags: the contents are an extent tree.
const EXTENTS: u32 = 0x8_0000;
/// What an extent tree begins with.
const EXTENT_MAGIC: [u8; 2] = 0xf30a_u16.to_le_bytes();
/// Longest target of a symbolic link kept in the inode itself, in bytes.
pub const FAST_SYMLINK: usize = 59;

/// A name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    pub inode: u32,
    /// The layer that named it; 0 for what puter adds.
    pub layer: u16,
}

/// A directory's names.
pub type Children = BTreeMap<Box<[u8]>, Link>;

/// Who owns a file and what else every type has.
#[derive(Clone, Debug, Default)]
pub struct Meta {
    /// Permissions, 12 bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Time,
    /// Extended attributes which fit the inode, encoded.
    pub xattrs: Option<Box<[u8]>>,
    /// The block which holds the others; 0: none.
    pub xattr_block: u64,
}

/// An inode.
#[derive(Clone, Debug)]
pub struct Node {
    pub meta: Meta,
    /// Type and permissions.
    pub mode: u16,
    pub links: u32,
    pub size: u64,
    /// Blocks of contents and tree; the attributes' block is not among them.
    pub blocks: u64,
    /// Extent tree, device number or short symbolic link.
    pub root: Root,
    /// Set for directories.
    pub children: Option<Box<Children>>,
}

impl Node {
    pub fn kind(&self) -> u16 {
        self.mode & TYPE
    }

    /// Whether `root` is an extent tree.
    pub fn has_extents(&self) -> bool {
        match self.kind() {
            // The resize inode's list of blocks is older than extents and has no such magic number.
            FILE => self.root[..2] == EXTENT_MAGIC,
            DIRECTORY => true,
            SYMLINK => self.size > FAST_SYMLINK as u64,
            _ => false,
        }
    }

    /// The type as directory entries have it.
    pub fn entry_type(&self) -> u8 {
        match self.kind() {
            FILE => 1,
            DIRECTORY => 2,
            CHAR => 3,
            BLOCK_DEVICE => 4,
            FIFO => 5,
            SYMLINK => 7,
            _ => 0,
        }
    }

    /// The inode's bytes on disk. `seed` is the file system's checksum seed.
    pub fn encode(&self, number: u32, seed: u32) -> [u8; INODE] {
        let mut raw = [0; INODE];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        let meta = &self.meta;
        let (seconds, extra) = encode_time(meta.mtime);
        let flags = if self.has_extents() { EXTENTS } else { 0 };
        let sectors = (self.blocks + u64::from(meta.xattr_block != 0)) * 8;
        put(0x00, &self.mode.to_le_bytes());
        put(0x02, &(meta.uid as u16).to_le_bytes());
        put(0x04, &(self.size as u32).to_le_bytes());
        for at in [0x08, 0x0c, 0x10, 0x90] {
            put(at, &seconds.to_le_bytes());
        }
        put(0x18, &(meta.gid as u16).to_le_bytes());
        // dir_nlink: a directory with more links than the field holds says 1.
        let links = if self.links > 65_000 { 1 } else { self.links as u16 };
        put(0x1a, &links.to_le_bytes());
        put(0x1c, &(sectors as u32).to_le_bytes());
        put(0x20, &flags.to_le_bytes());
        put(0x28, &self.root);
        put(0x68, &(meta.xattr_block as u32).to_le_bytes());
        put(0x6c, &((self.size >> 32) as u32).to_le_bytes());
        put(0x74, &((sectors >> 32) as u16).to_le_bytes());
        put(0x76, &((meta.xattr_block >> 32) as u16).to_le_bytes());
        put(0x78, &((meta.uid >> 16) as u16).to_le_bytes());
        put(0x7a, &((meta.gid >> 16) as u16).to_le_bytes());
        put(0x80, &EXTRA.to_le_bytes());
        for at in [0x84, 0x88, 0x8c, 0x94] {
            put(at, &extra.to_le_bytes());
        }
        if let Some(xattrs) = &meta.xattrs {
            put(XATTRS_AT, xattrs);
        }
        let sum = crc32c(inode_seed(seed, number), &raw);
        raw[0x7c..0x7e].copy_from_slice(&(sum as u16).to_le_bytes());
        raw[0x82..0x84].copy_from_slice(&((sum >> 16) as u16).to_le_bytes());
        raw
    }
}

/// The checksum over an inode's number and generation (always 0), from which its own and its blocks' continue.
pub fn inode_seed(seed: u32, number: u32) -> u32 {
    crc32c(crc32c(seed, &number.to_le_bytes()), &[0; 4])
}

/// A time as ext4 stores it: 32 bits, then two more bits of seconds beside the nanoseconds. Times out of its range
/// (1901 to 2446) become the nearest one in it.
fn encode_time(time: Time) -> (u32, u32) {
    let seconds = time.seconds.clamp(i64::from(i32::MIN), (3 << 32) + i64::from(i32::MAX));
    let low = seconds as i32;
    let epoch = ((seconds - i64::from(low)) >> 32) as u32 & 3;
    (low as u32, epoch | time.nanoseconds << 2)
}

/// A device number in the inode: 8 and 8 bits where they suffice, else 12 and 20.
pub fn encode_device(major: u32, minor: u32) -> Option<Root> {
    let mut root = [0; 60];
    if major < 256 && minor < 256 {
        root[..4].copy_from_slice(&(major << 8 | minor).to_le_bytes());
    } else if major < 1 << 12 && minor < 1 << 20 {
        root[4..8].copy_from_slice(&(minor & 0xff | major << 8 | (minor & !0xff) << 12).to_le_bytes());
    } else {
        return None;
    }
    Some(root)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_and_after_2038_keep_their_place() {
        let at = |seconds, nanoseconds| encode_time(Time { seconds, nanoseconds });
        assert_eq!(at(0, 5), (0, 20));
        assert_eq!(at(-1, 0), (u32::MAX, 0));
        assert_eq!(at(1 << 31, 1), (1 << 31, 1 | 4));
        assert_eq!(at(i64::MAX, 0), (i32::MAX as u32, 3));
        assert_eq!(at(i64::MIN, 0), (1 << 31, 0));
    }

    #[test]
    fn device_numbers_beyond_the_format_are_refused() {
        assert_eq!(encode_device(8, 1).unwrap()[..4], [1, 8, 0, 0]);
        assert_eq!(encode_device(259, 300).unwrap()[4..8], (300 & 0xff | 259 << 8 | 0x100_u32 << 12).to_le_bytes());
        assert!(encode_device(4096, 0).is_none());
        assert!(encode_device(0, 1 << 20).is_none());
    }
}
