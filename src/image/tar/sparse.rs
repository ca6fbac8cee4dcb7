//! The maps of sparse files: GNU's first format in the header, and its pax formats 0.0, 0.1 and 1.0.

use anyhow::{Context, Result, ensure};

use super::header::signed;
use super::pax::{decimal, text};

/// Most segments of one file: bounds the map's memory.
const MAX_SEGMENTS: usize = 1 << 20;

/// A piece of a sparse file that has contents, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub offset: u64,
    pub length: u64,
}

/// What "GNU.sparse." records say.
#[derive(Debug, Default)]
pub struct PaxSparse {
    pub name: Option<Vec<u8>>,
    pub real_size: Option<u64>,
    major: Option<u64>,
    minor: Option<u64>,
    map: Option<Vec<Segment>>,
    /// Offset whose length, in format 0.0, comes in the next record.
    offset: Option<u64>,
}

impl PaxSparse {
    pub fn set(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        match key {
            b"name" => self.name = Some(text(value)?),
            b"size" | b"realsize" => self.real_size = Some(decimal(value)?),
            b"major" => self.major = Some(decimal(value)?),
            b"minor" => self.minor = Some(decimal(value)?),
            b"offset" => {
                ensure!(self.offset.replace(decimal(value)?).is_none(), "an offset without its length");
            }
            b"numbytes" => {
                let offset = self.offset.take().context("a length without its offset")?;
                push(self.map.get_or_insert_default(), offset, decimal(value)?)?;
            }
            b"map" => {
                let map = self.map.insert(Vec::new());
                let mut numbers = value.split(|&byte| byte == b',').filter(|_| !value.is_empty());
                while let Some(offset) = numbers.next() {
                    let length = numbers.next().context("an offset without its length")?;
                    push(map, decimal(offset)?, decimal(length)?)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether the entry is a sparse file at all.
    pub fn is_sparse(&self) -> bool {
        self.map.is_some() || self.major.is_some()
    }

    /// The map; `None` when it precedes the contents, as format 1.0 has it.
    pub fn map(&self) -> Result<Option<Vec<Segment>>> {
        match (self.major, self.minor) {
            (Some(1), Some(0)) => Ok(None),
            (None | Some(0), _) => Ok(Some(self.map.clone().context("a sparse file without its map")?)),
            (major, minor) => {
                anyhow::bail!("sparse format {}.{} is not supported", major.unwrap_or(0), minor.unwrap_or(0))
            }
        }
    }
}

fn push(map: &mut Vec<Segment>, offset: u64, length: u64) -> Result<()> {
    ensure!(map.len() < MAX_SEGMENTS, "a sparse file has more than {MAX_SEGMENTS} segments");
    map.push(Segment { offset, length });
    Ok(())
}

/// Adds the segments of 24 bytes each in `field`; false at the first empty one, which ends the map.
pub fn old_segments(field: &[u8], map: &mut Vec<Segment>) -> Result<bool> {
    for pair in field.chunks_exact(24) {
        let (offset, length) = pair.split_at(12);
        if offset.first() == Some(&0) || length.first() == Some(&0) {
            return Ok(false);
        }
        let number = |field| u64::try_from(signed(field)?).context("a sparse file's map has a negative number");
        push(map, number(offset)?, number(length)?)?;
    }
    Ok(true)
}

/// Checks that the map is in order, within the file, and describes exactly the stored contents.
pub fn check(map: Vec<Segment>, real_size: u64, stored: u64) -> Result<Vec<Segment>> {
    let mut end = 0;
    let mut sum: u64 = 0;
    for segment in &map {
        ensure!(segment.offset >= end, "a sparse file's map is not in order");
        end = segment.offset.checked_add(segment.length).context("a sparse file's map is out of range")?;
        ensure!(end <= real_size, "a sparse file's map reaches beyond its {real_size} bytes");
        sum += segment.length;
    }
    ensure!(sum == stored, "a sparse file's map describes {sum} bytes, but {stored} are stored");
    Ok(map)
}

/// Reads the lines of format 1.0: the number of segments, then an offset and a length for each.
#[derive(Default)]
pub struct MapParser {
    line: Vec<u8>,
    left: Option<u64>,
    offset: Option<u64>,
    map: Vec<Segment>,
}

impl MapParser {
    /// Takes one record; the map when it is whole.
    pub fn feed(&mut self, record: &[u8]) -> Result<Option<Vec<Segment>>> {
        for &byte in record {
            if byte != b'\n' {
                ensure!(self.line.len() < 20, "a sparse file's map is damaged");
                self.line.push(byte);
                continue;
            }
            let number = decimal(&self.line)?;
            self.line.clear();
            match (self.left, self.offset.take()) {
                (None, _) => self.left = Some(number),
                (Some(_), None) => self.offset = Some(number),
                (Some(left), Some(offset)) => {
                    push(&mut self.map, offset, number)?;
                    self.left = Some(left.saturating_sub(1));
                }
            }
            if self.left == Some(0) {
                return Ok(Some(std::mem::take(&mut self.map)));
            }
        }
        Ok(None)
    }
}
