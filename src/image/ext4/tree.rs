//! Reads back a file system that was just made.

use std::io::Write;

use anyhow::{Context, Result, bail, ensure};

use super::disk::Disk;
use super::inode::{DIRECTORY, FILE, Node};
use super::namespace::{Namespace, Place, Walk};
use super::{BLOCK, extents};

/// What a finished file system holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Bytes of the whole.
    pub size: u64,
    /// Bytes in use, the file system's own included.
    pub used: u64,
    /// Files of every type but directories.
    pub files: u64,
    pub directories: u64,
}

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Type and permissions, as in st_mode.
    pub mode: u16,
    /// Bytes.
    pub size: u64,
}

impl Entry {
    pub fn is_file(&self) -> bool {
        self.mode & 0o170_000 == FILE
    }

    pub fn is_directory(&self) -> bool {
        self.mode & 0o170_000 == DIRECTORY
    }
}

/// A finished file system.
pub struct Tree {
    disk: Disk,
    names: Namespace,
    statistics: Statistics,
}

impl Tree {
    pub(super) fn new(disk: Disk, names: Namespace, statistics: Statistics) -> Tree {
        Tree { disk, names, statistics }
    }

    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// What `path` leads to, symbolic links followed; `None` where there is nothing.
    pub fn lookup(&self, path: &[u8]) -> Option<Entry> {
        let node = self.find(path).ok()??;
        Some(Entry { mode: node.mode, size: node.size })
    }

    /// The names in a directory; `None` where there is none.
    pub fn list(&self, path: &[u8]) -> Option<Vec<Vec<u8>>> {
        let node = self.find(path).ok()??;
        Some(node.children.as_ref()?.keys().map(|name| name.to_vec()).collect())
    }

    /// Copies a regular file's contents and gives their length.
    ///
    /// # Errors
    /// When there is no such file, or reading or writing fails.
    pub fn copy_to(&self, path: &[u8], to: &mut dyn Write) -> Result<u64> {
        let node = self.find(path)?.context("there is no such file")?;
        ensure!(node.kind() == FILE, "it is not a regular file");
        let zeros = [0; BLOCK as usize];
        let mut next = 0_u64;
        let fill = |to: &mut dyn Write, until: u64, next: &mut u64| -> Result<()> {
            while *next < until {
                let length = (node.size - *next * BLOCK).min(BLOCK) as usize;
                to.write_all(&zeros[..length])?;
                *next += 1;
            }
            Ok(())
        };
        let end = node.size.div_ceil(BLOCK);
        let mut each = |extent: extents::Extent| -> Result<()> {
            fill(to, u64::from(extent.logical).min(end), &mut next)?;
            for index in 0..u64::from(extent.length) {
                if next >= end {
                    bail!("a file with blocks beyond its end");
                }
                let length = (node.size - next * BLOCK).min(BLOCK) as usize;
                to.write_all(&self.disk.read(extent.start + index)?[..length])?;
                next += 1;
            }
            Ok(())
        };
        extents::walk(&self.disk, &node.root, &mut each, &mut |_| ())?;
        fill(to, end, &mut next)?;
        Ok(node.size)
    }

    fn find(&self, path: &[u8]) -> Result<Option<&Node>> {
        match self.names.walk(&self.disk, &mut Walk::path(path))? {
            Place::Directory(inode) | Place::Leaf(inode) => self.names.node(inode).map(Some),
            Place::Missing(..) => Ok(None),
        }
    }
}
