//! Blocks of directories: linear lists of entries, with a checksum at each block's end.

use super::BLOCK;
use super::crc32c::crc32c;

/// Length of an entry without its name.
const ENTRY: usize = 8;
/// The entry-shaped checksum at a block's end.
const TAIL: usize = 12;
const SPACE: usize = BLOCK as usize - TAIL;
const TAIL_TYPE: u8 = 0xde;

/// Packs entries (inode, type, name) into blocks.
pub struct Packer<F> {
    block: [u8; BLOCK as usize],
    /// End of the last entry, and where it begins.
    end: usize,
    last: usize,
    seed: u32,
    emit: F,
}

impl<E, F: FnMut(&[u8; BLOCK as usize]) -> Result<(), E>> Packer<F> {
    /// `seed` is the directory's checksum seed; `emit` takes each block when it is full.
    pub fn new(seed: u32, emit: F) -> Self {
        Self { block: [0; BLOCK as usize], end: 0, last: 0, seed, emit }
    }

    /// Adds an entry; names have at most 255 bytes.
    pub fn push(&mut self, inode: u32, kind: u8, name: &[u8]) -> Result<(), E> {
        let length = (ENTRY + name.len()).next_multiple_of(4);
        if self.end + length > SPACE {
            self.flush()?;
        }
        let entry = &mut self.block[self.end..self.end + length];
        entry[..4].copy_from_slice(&inode.to_le_bytes());
        entry[4..6].copy_from_slice(&(length as u16).to_le_bytes());
        entry[6] = name.len() as u8;
        entry[7] = kind;
        entry[ENTRY..ENTRY + name.len()].copy_from_slice(name);
        self.last = self.end;
        self.end += length;
        Ok(())
    }

    /// Hands out the block that is being filled.
    pub fn flush(&mut self) -> Result<(), E> {
        let length = (SPACE - self.last) as u16;
        self.block[self.last + 4..self.last + 6].copy_from_slice(&length.to_le_bytes());
        let sum = crc32c(self.seed, &self.block[..SPACE]);
        let tail = &mut self.block[SPACE..];
        tail[4..6].copy_from_slice(&(TAIL as u16).to_le_bytes());
        tail[7] = TAIL_TYPE;
        tail[8..].copy_from_slice(&sum.to_le_bytes());
        (self.emit)(&self.block)?;
        self.block = [0; BLOCK as usize];
        self.end = 0;
        self.last = 0;
        Ok(())
    }
}
