//! Extent trees and the contents of files (Linux fs/ext4/ext4_extents.h).

use anyhow::{Context, Result, ensure};

use super::crc32c::crc32c;
use super::disk::{Disk, Run};
use super::{BLOCK, BLOCKS_PER_GROUP};

const MAGIC: u16 = 0xf30a;
/// Length of the header and of an entry, in bytes.
const ENTRY: usize = 12;
/// Entries in the inode, and in a block of its own, whose last four bytes are a checksum.
const IN_INODE: usize = 4;
const IN_BLOCK: usize = (BLOCK as usize - ENTRY) / ENTRY;
/// Longest initialised extent, in blocks.
const MAX_LENGTH: u64 = 32768;
/// Deepest tree that the format has.
const MAX_DEPTH: u16 = 5;
/// Shorter runs of zeros stay part of the extent around them (a hole in the image file, none in the guest's file): it
/// keeps the file in one piece.
const SHORT_GAP: u64 = 16;
/// Number of blocks in the largest file.
pub const MAX_BLOCKS: u64 = u32::MAX as u64;

/// Blocks of a file which lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub logical: u32,
    pub length: u32,
    pub start: u64,
}

/// The 60 bytes of an inode that say where its contents are.
pub type Root = [u8; 60];

fn header(out: &mut [u8], entries: usize, max: usize, depth: u16) {
    let words = [MAGIC, entries as u16, max as u16, depth];
    out.chunks_exact_mut(2).zip(words).for_each(|(bytes, word)| bytes.copy_from_slice(&word.to_le_bytes()));
}

/// Writes the tree of `extents`; returns its root and the number of blocks the tree itself takes.
///
/// `seed` is the checksum over the inode's number and generation.
pub fn write_tree(disk: &mut Disk, extents: &[Extent], seed: u32) -> Result<(Root, u64)> {
    let mut level: Vec<[u8; ENTRY]> = Vec::with_capacity(extents.len());
    for extent in extents {
        let mut entry = [0; ENTRY];
        entry[..4].copy_from_slice(&extent.logical.to_le_bytes());
        entry[4..6].copy_from_slice(&(extent.length as u16).to_le_bytes());
        entry[6..8].copy_from_slice(&((extent.start >> 32) as u16).to_le_bytes());
        entry[8..].copy_from_slice(&(extent.start as u32).to_le_bytes());
        level.push(entry);
    }
    let mut depth = 0;
    let mut blocks = 0;
    while level.len() > IN_INODE {
        ensure!(depth < MAX_DEPTH, "the file is in too many pieces");
        let mut above = Vec::with_capacity(level.len().div_ceil(IN_BLOCK));
        for entries in level.chunks(IN_BLOCK) {
            let mut block = [0; BLOCK as usize];
            header(&mut block, entries.len(), IN_BLOCK, depth);
            block[ENTRY..].chunks_exact_mut(ENTRY).zip(entries).for_each(|(to, entry)| to.copy_from_slice(entry));
            let tail = BLOCK as usize - 4;
            let sum = crc32c(seed, &block[..tail]);
            block[tail..].copy_from_slice(&sum.to_le_bytes());
            let at = disk.allocate(1)?.start;
            disk.write(at, &block)?;
            blocks += 1;
            let mut index = [0; ENTRY];
            index[..4].copy_from_slice(&entries[0][..4]);
            index[4..8].copy_from_slice(&(at as u32).to_le_bytes());
            index[8..10].copy_from_slice(&((at >> 32) as u16).to_le_bytes());
            above.push(index);
        }
        level = above;
        depth += 1;
    }
    let mut root = [0; 60];
    header(&mut root, level.len(), IN_INODE, depth);
    root[ENTRY..].chunks_exact_mut(ENTRY).zip(&level).for_each(|(to, entry)| to.copy_from_slice(entry));
    Ok((root, blocks))
}

/// Calls `each` for every extent of the file in order, and `tree` for every block of the tree itself.
pub fn walk(
    disk: &Disk,
    root: &Root,
    each: &mut dyn FnMut(Extent) -> Result<()>,
    tree: &mut dyn FnMut(u64),
) -> Result<()> {
    walk_node(disk, root, MAX_DEPTH, each, tree)
}

fn walk_node(
    disk: &Disk,
    node: &[u8],
    limit: u16,
    each: &mut dyn FnMut(Extent) -> Result<()>,
    tree: &mut dyn FnMut(u64),
) -> Result<()> {
    let word = |at: usize| node.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]));
    let (magic, entries, depth) = (word(0), word(2), word(6));
    ensure!(magic == MAGIC && depth <= limit, "a damaged extent tree in the image");
    for entry in node[ENTRY..].chunks_exact(ENTRY).take(usize::from(entries)) {
        let u16_at = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        if depth == 0 {
            let start = u64::from(u16_at(6)) << 32 | u64::from(u32_at(8));
            each(Extent { logical: u32_at(0), length: u32::from(u16_at(4)), start })?;
        } else {
            let block = u64::from(u16_at(8)) << 32 | u64::from(u32_at(4));
            tree(block);
            let below = limit.checked_sub(1).context("a damaged extent tree in the image")?;
            walk_node(disk, &disk.read(block)?, below, each, tree)?;
        }
    }
    Ok(())
}

/// Gathers the extents of a file while blocks are added to it in order.
#[derive(Default)]
pub struct Layout {
    extents: Vec<Extent>,
    blocks: u64,
}

impl Layout {
    /// Adds blocks after the last ones; `logical` is the first one's place in the file.
    pub fn push(&mut self, logical: u64, run: Run) -> Result<()> {
        ensure!(logical + run.length <= MAX_BLOCKS, "the file is too large for ext4");
        self.blocks += run.length;
        if let Some(last) = self.extents.last_mut() {
            let end = last.start + u64::from(last.length);
            let follows = end == run.start && u64::from(last.logical) + u64::from(last.length) == logical;
            // No extent crosses a group's border.
            let joins = end % BLOCKS_PER_GROUP != 0 && u64::from(last.length) + run.length <= MAX_LENGTH;
            if follows && joins {
                last.length += run.length as u32;
                return Ok(());
            }
        }
        self.extents.push(Extent { logical: logical as u32, length: run.length as u32, start: run.start });
        Ok(())
    }

    /// Allocates `count` blocks at the file's place `logical`.
    pub fn allocate(&mut self, disk: &mut Disk, mut logical: u64, mut count: u64) -> Result<()> {
        while count > 0 {
            let run = disk.allocate(count)?;
            self.push(logical, run)?;
            logical += run.length;
            count -= run.length;
        }
        Ok(())
    }

    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Writes the tree; returns its root and the number of blocks of file and tree.
    pub fn finish(self, disk: &mut Disk, seed: u32) -> Result<(Root, u64)> {
        let (root, tree) = write_tree(disk, &self.extents, seed)?;
        Ok((root, self.blocks + tree))
    }
}

/// Takes a file's contents in order and stores them, blocks of zeros excepted.
#[derive(Default)]
pub struct Contents {
    layout: Layout,
    /// The block that is being filled, and its place in the file.
    partial: Vec<u8>,
    logical: u64,
}

impl Contents {
    /// Goes on at `offset` bytes, which lies at or after all that was written.
    pub fn seek(&mut self, disk: &mut Disk, offset: u64) -> Result<()> {
        let (block, within) = (offset / BLOCK, (offset % BLOCK) as usize);
        if block != self.logical {
            self.complete(disk)?;
            self.logical = block;
        }
        ensure!(within >= self.partial.len(), "the contents are not in order");
        self.partial.resize(within, 0);
        Ok(())
    }

    /// Adds `data`.
    pub fn write(&mut self, disk: &mut Disk, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            if self.partial.is_empty()
                && let Some((block, rest)) = data.split_at_checked(BLOCK as usize)
            {
                self.store(disk, block)?;
                self.logical += 1;
                data = rest;
                continue;
            }
            let (head, rest) = data.split_at(data.len().min(BLOCK as usize - self.partial.len()));
            self.partial.extend_from_slice(head);
            data = rest;
            if self.partial.len() == BLOCK as usize {
                self.complete(disk)?;
                self.logical += 1;
            }
        }
        Ok(())
    }

    fn complete(&mut self, disk: &mut Disk) -> Result<()> {
        let partial = std::mem::take(&mut self.partial);
        self.store(disk, &partial)?;
        self.partial = partial;
        self.partial.clear();
        Ok(())
    }

    fn store(&mut self, disk: &mut Disk, block: &[u8]) -> Result<()> {
        static ZERO: [u8; BLOCK as usize] = [0; BLOCK as usize];
        if block == &ZERO[..block.len()] {
            return Ok(());
        }
        if let Some(last) = self.layout.extents.last() {
            let end = u64::from(last.logical) + u64::from(last.length);
            let gap = self.logical.saturating_sub(end);
            if gap < SHORT_GAP {
                self.layout.allocate(disk, end, gap)?;
            }
        }
        let run = disk.allocate(1)?;
        self.layout.push(self.logical, run)?;
        disk.write(run.start, block)
    }

    /// Stores the last block and the tree; returns its root and the number of blocks of file and tree.
    pub fn finish(mut self, disk: &mut Disk, seed: u32) -> Result<(Root, u64)> {
        self.complete(disk)?;
        self.layout.finish(disk, seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_of_thousands_of_extents_reads_back() {
        let mut disk = Disk::new(tempfile::tempfile().unwrap());
        for count in [0, 1, 4, 5, 340, 341, 2000, 340 * 4 + 1, 340 * 340 + 7] {
            let extents: Vec<Extent> = (0..count)
                .map(|at| Extent { logical: at * 3, length: 2, start: (5 << 32) + u64::from(at) * 7 })
                .collect();
            let (root, blocks) = write_tree(&mut disk, &extents, 7).unwrap();
            let (mut back, mut tree) = (Vec::new(), 0);
            walk(
                &disk,
                &root,
                &mut |extent| {
                    back.push(extent);
                    Ok(())
                },
                &mut |_| tree += 1,
            )
            .unwrap();
            assert_eq!(back, extents);
            assert_eq!(tree, blocks);
        }
    }

    #[test]
    fn long_runs_of_zeros_become_holes_and_short_ones_do_not() {
        let mut disk = Disk::new(tempfile::tempfile().unwrap());
        let mut contents = Contents::default();
        contents.write(&mut disk, &[1; 4096]).unwrap();
        contents.write(&mut disk, &[0; 4096 * 3]).unwrap();
        contents.write(&mut disk, &[2; 5000]).unwrap();
        contents.seek(&mut disk, 4096 * 100 + 10).unwrap();
        contents.write(&mut disk, b"end").unwrap();
        let (root, blocks) = contents.finish(&mut disk, 0).unwrap();
        let mut places = Vec::new();
        walk(
            &disk,
            &root,
            &mut |extent| {
                places.push((extent.logical, extent.length));
                Ok(())
            },
            &mut |_| (),
        )
        .unwrap();
        assert_eq!(places, [(0, 6), (100, 1)]);
        assert_eq!(blocks, 7);
    }
}
