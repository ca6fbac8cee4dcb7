//! The image file as blocks: allocation from front to back, and writes gathered into large ones.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use rustix::fs::FallocateFlags;

use super::{BLOCK, BLOCKS_PER_GROUP, GDT_BLOCKS, MAX_GROUPS};

/// Bytes gathered before a write.
const GATHER: usize = 1 << 20;

/// A run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub start: u64,
    pub length: u64,
}

/// Bytes after which what has been written is on its way to the disk. The kernel would let gigabytes gather, and the end
/// would wait for all of them.
const ON_ITS_WAY: u64 = 32 << 20;

/// Brings a file to the disk while more is written to it.
struct Writeback {
    /// Full while there is something to do.
    wake: Option<SyncSender<()>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Writeback {
    /// Without a second thread or a second descriptor it is done at the end.
    fn start(file: &File) -> Writeback {
        let (wake, woken) = sync_channel(1);
        let spawned = file.try_clone().and_then(|file| {
            let work = move || woken.iter().try_for_each(|()| file.sync_data());
            std::thread::Builder::new().name("writeback".into()).spawn(work)
        });
        Writeback { wake: Some(wake), thread: spawned.ok() }
    }

    fn wake(&self) {
        if let Some(wake) = &self.wake {
            let _ = wake.try_send(());
        }
    }

    /// Waits for it. An error of the disk is told once, so it must not be lost here.
    fn finish(&mut self) -> io::Result<()> {
        self.wake = None;
        self.thread
            .take()
            .map_or(Ok(()), |thread| thread.join().unwrap_or_else(|_| Err(io::Error::other("it panicked"))))
    }
}

impl Drop for Writeback {
    fn drop(&mut self) {
        let _ = self.finish();
    }
}

/// The image file while it is being made.
pub struct Disk {
    file: File,
    writeback: Writeback,
    /// Bytes written since it was last woken.
    waiting: u64,
    /// Everything from here on is free.
    cursor: u64,
    /// A bit for each block before the cursor, and perhaps some after it.
    used: Vec<u8>,
    gathered_at: u64,
    gathered: Vec<u8>,
}

/// Whether the group holds a copy of the superblock and the group descriptors (sparse_super).
pub fn has_superblock(group: u64) -> bool {
    let power_of = |base: u64| {
        let mut power = base;
        while power < group {
            power *= base;
        }
        power == group
    };
    group <= 1 || power_of(3) || power_of(5) || power_of(7)
}

/// Blocks at a group's start which belong to the superblock, the descriptors and those reserved for growth.
pub fn reserved_in(group: u64) -> u64 {
    if has_superblock(group) { 1 + GDT_BLOCKS } else { 0 }
}

/// The first block from `block` on that is not reserved.
pub fn skip_reserved(block: u64) -> u64 {
    let group = block / BLOCKS_PER_GROUP;
    block.max(group * BLOCKS_PER_GROUP + reserved_in(group))
}

impl Disk {
    pub fn new(file: File) -> Self {
        let writeback = Writeback::start(&file);
        Self {
            file,
            writeback,
            waiting: 0,
            cursor: 0,
            used: Vec::new(),
            gathered_at: 0,
            gathered: Vec::with_capacity(GATHER),
        }
    }

    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// Takes up to `want` (at least one) blocks in a row, within one group.
    pub fn allocate(&mut self, want: u64) -> Result<Run> {
        let start = skip_reserved(self.cursor);
        let group = start / BLOCKS_PER_GROUP;
        ensure!(
            group < MAX_GROUPS,
            "the file system would be larger than {} bytes",
            MAX_GROUPS * BLOCKS_PER_GROUP * BLOCK
        );
        let length = want.clamp(1, (group + 1) * BLOCKS_PER_GROUP - start);
        self.cursor = start + length;
        self.mark(Run { start, length });
        Ok(Run { start, length })
    }

    /// Marks blocks as used, whoever chose them.
    pub fn mark(&mut self, run: Run) {
        let end = run.start + run.length;
        let bytes = end.next_multiple_of(BLOCKS_PER_GROUP) / 8;
        if (self.used.len() as u64) < bytes {
            self.used.resize(bytes as usize, 0);
        }
        for block in run.start..end {
            self.used[(block / 8) as usize] |= 1 << (block % 8);
        }
    }

    /// Frees blocks and gives their space back to the host. They are not used again: the guest will.
    pub fn free(&mut self, run: Run) -> Result<()> {
        self.flush()?;
        for block in run.start..run.start + run.length {
            if let Some(byte) = self.used.get_mut((block / 8) as usize) {
                *byte &= !(1 << (block % 8));
            }
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, flags, run.start * BLOCK, run.length * BLOCK) {
            // Not every host file system has holes; the image is then larger, and no worse.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            Err(error) => Err(error).context("cannot free space in the image"),
        }
    }

    /// The block bitmap of a group, without what lies beyond the file system's end.
    pub fn bitmap(&self, group: u64) -> [u8; BLOCK as usize] {
        let mut bitmap = [0; BLOCK as usize];
        let start = (group * BLOCK) as usize;
        let known = self.used.get(start..).unwrap_or_default();
        let known = &known[..known.len().min(bitmap.len())];
        bitmap[..known.len()].copy_from_slice(known);
        bitmap
    }

    /// Writes whole blocks (a shorter end is filled with zeros) from `block` on.
    pub fn write(&mut self, block: u64, data: &[u8]) -> Result<()> {
        let next = self.gathered_at + self.gathered.len() as u64 / BLOCK;
        if block != next || self.gathered.len() >= GATHER {
            self.flush()?;
            self.gathered_at = block;
        }
        self.gathered.extend_from_slice(data);
        self.gathered.resize(self.gathered.len().next_multiple_of(BLOCK as usize), 0);
        Ok(())
    }

    /// Writes what has been gathered.
    pub fn flush(&mut self) -> Result<()> {
        if !self.gathered.is_empty() {
            self.file.write_all_at(&self.gathered, self.gathered_at * BLOCK).context("cannot write the image")?;
            self.waiting += self.gathered.len() as u64;
            self.gathered.clear();
            if self.waiting >= ON_ITS_WAY {
                self.waiting = 0;
                self.writeback.wake();
            }
        }
        Ok(())
    }

    /// Reads one block; what was never written is zeros.
    pub fn read(&self, block: u64) -> Result<[u8; BLOCK as usize]> {
        let mut data = [0; BLOCK as usize];
        let gathered = block.checked_sub(self.gathered_at).map(|at| (at * BLOCK) as usize);
        if let Some(bytes) = gathered.and_then(|at| self.gathered.get(at..at + BLOCK as usize)) {
            data.copy_from_slice(bytes);
            return Ok(data);
        }
        let mut filled = 0;
        while filled < data.len() {
            let got = self.file.read_at(&mut data[filled..], block * BLOCK + filled as u64);
            match got.context("cannot read the image")? {
                0 => break,
                got => filled += got,
            }
        }
        Ok(data)
    }

    /// Gives the file its final size and brings it to the disk.
    pub fn finish(&mut self, blocks: u64) -> Result<()> {
        self.flush()?;
        self.file.set_len(blocks * BLOCK).context("cannot size the image")?;
        self.writeback.finish().context("cannot write the image")?;
        self.file.sync_all().context("cannot write the image")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backups_are_in_the_groups_that_sparse_super_names() {
        let groups: Vec<u64> = (0..130).filter(|&group| has_superblock(group)).collect();
        assert_eq!(groups, [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }

    #[test]
    fn allocation_skips_the_reserved_blocks_and_stays_within_a_group() {
        let mut disk = Disk::new(tempfile::tempfile().unwrap());
        let first = disk.allocate(u64::MAX).unwrap();
        assert_eq!(first, Run { start: 1 + GDT_BLOCKS, length: BLOCKS_PER_GROUP - 1 - GDT_BLOCKS });
        assert_eq!(disk.allocate(1).unwrap().start, BLOCKS_PER_GROUP + 1 + GDT_BLOCKS);
        disk.allocate(u64::MAX).unwrap();
        assert_eq!(disk.allocate(7).unwrap(), Run { start: 2 * BLOCKS_PER_GROUP, length: 7 });
    }

    #[test]
    fn gathered_blocks_read_back_before_and_after_they_are_written() {
        let mut disk = Disk::new(tempfile::tempfile().unwrap());
        disk.write(5, b"five").unwrap();
        disk.write(6, b"six").unwrap();
        assert!(disk.read(6).unwrap().starts_with(b"six\0"));
        disk.flush().unwrap();
        assert!(disk.read(5).unwrap().starts_with(b"five\0"));
        assert_eq!(disk.read(99).unwrap(), [0; BLOCK as usize]);
    }
}
