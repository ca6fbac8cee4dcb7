//! `diff`: what lies between two snapshots, as the files of their root file systems tell.
//!
//! Files are compared by type, mode, owner, size and time of change, and links by where they lead, not by their bytes.
//! What a guest had only in its memory when the snapshot was taken is not on the disk, and not seen.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow, ensure};
use ext4_view::{Ext4, Ext4Read, Metadata};
use serde::Serialize;

use super::Hint;
use super::home::Home;
use super::snapshots::{self, Reference, Snapshot};
use super::state::{Vm, existing};
use crate::disk::chain::Chain;
use crate::vm::cancel;

/// Directories in one another, at most: a damaged file system may hold a circle.
const DEEPEST: usize = 256;
/// Files that are looked at, at most.
const MOST: usize = 20_000_000;

/// What lies between two states of a disk.
#[derive(Debug, Serialize)]
pub struct Diff {
    pub changes: Vec<Change>,
    /// Bytes of memory that each holds; absent where it holds none.
    pub memory: [Option<u64>; 2],
}

/// A file that is not the same in both.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    pub kind: Kind,
    /// With what is no UTF-8 replaced.
    pub path: String,
    /// Bytes before and after, of files.
    pub size: [Option<u64>; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Added,
    Deleted,
    Modified,
}

/// One of the two that are compared.
enum Side {
    Snapshot(Box<Snapshot>),
    /// Its disk as it is.
    Stopped(Box<Vm>),
}

impl Side {
    fn find(home: &Home, reference: &Reference) -> Result<Side> {
        if reference.which.is_some() {
            return Ok(Side::Snapshot(Box::new(snapshots::find(home, reference)?)));
        }
        let vm = existing(home, &reference.vm)?;
        let state = vm.state();
        if state.is_active() {
            return Err(anyhow!("'{}' is {state}: its disk changes while it is read", vm.name))
                .hint(format!("take a snapshot and name it, as {}@SNAPSHOT, or stop it first", vm.name));
        }
        Ok(Side::Stopped(Box::new(vm)))
    }

    fn open(&self, home: &Home) -> Result<Ext4> {
        let (disk, what) = match self {
            Side::Snapshot(snapshot) => (snapshot.disk(home), snapshot.origin.to_string()),
            Side::Stopped(vm) => (vm.overlay.clone(), vm.name.clone()),
        };
        let chain = Chain::open(&disk)?;
        let size = chain.size();
        load(Disk(chain), size).with_context(|| format!("the root file system of {what} cannot be read"))
    }

    fn memory(&self, home: &Home) -> Option<u64> {
        match self {
            Side::Snapshot(snapshot) => snapshot.memory.as_ref().map(|_| snapshot.used(home).0),
            Side::Stopped(_) => None,
        }
    }
}

struct Disk(Chain);

impl Ext4Read for Disk {
    fn read(&mut self, start: u64, buffer: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let end = start.checked_add(buffer.len() as u64).filter(|end| *end <= self.0.size());
        end.ok_or("it lies beyond the disk's end")?;
        Ok(self.0.read_at(buffer, start)?)
    }
}

/// Opens a file system on a disk of `size` bytes, which a guest has written. The reader makes room for as many groups as the
/// superblock names (ext4(5); kernel docs, "The Super Block"): more than the disk holds are refused before.
///
/// # Errors
/// When it is none, or is damaged.
pub fn load(mut disk: impl Ext4Read + 'static, size: u64) -> Result<Ext4> {
    /// mke2fs makes none with fewer.
    const LEAST_IN_GROUP: u32 = 256;
    let mut superblock = [0; 1024];
    disk.read(1024, &mut superblock).map_err(|error| anyhow!("{error}"))?;
    let number = |at: usize| superblock[at..at + 4].iter().rev().fold(0_u32, |sum, &byte| sum << 8 | u32::from(byte));
    let blocks = u64::from(number(0x150)) << 32 | u64::from(number(4));
    let block = 1024_u64.checked_shl(number(0x18)).filter(|block| (1024..=65_536).contains(block));
    let whole = block.and_then(|block| blocks.checked_mul(block)).is_some_and(|bytes| bytes <= size);
    ensure!(whole && number(0x20) >= LEAST_IN_GROUP, "its superblock names more than the disk holds");
    Ext4::load(Box::new(disk)).map_err(|error| anyhow!("{error}"))
}

/// Compares two snapshots, or a snapshot and the disk of a stopped VM.
///
/// # Errors
/// When one cannot be found or read, or runs.
pub fn diff(home: &Home, before: &Reference, after: &Reference) -> Result<Diff> {
    let (before, after) = (Side::find(home, before)?, Side::find(home, after)?);
    let changes = compare(&before.open(home)?, &after.open(home)?)?;
    Ok(Diff { changes, memory: [before.memory(home), after.memory(home)] })
}

/// What is compared of a file.
#[derive(Clone, PartialEq, Eq)]
struct Seen {
    mode: u16,
    owner: (u32, u32),
    size: u64,
    /// Whole seconds and nanoseconds; of a directory nothing, since its files tell.
    modified: Option<(i64, u32)>,
    link: Option<Vec<u8>>,
    directory: bool,
}

/// Compares two file systems, which guests have written.
///
/// # Errors
/// When one cannot be read, or holds more than one that is whole.
pub fn compare(before: &Ext4, after: &Ext4) -> Result<Vec<Change>> {
    let mut walk = Walk { before, after, changes: Vec::new(), seen: 0 };
    walk.directory(&mut b"/".to_vec(), true, true, 0)?;
    Ok(walk.changes)
}

struct Walk<'a> {
    before: &'a Ext4,
    after: &'a Ext4,
    changes: Vec<Change>,
    seen: usize,
}

impl Walk<'_> {
    fn directory(&mut self, path: &mut Vec<u8>, in_before: bool, in_after: bool, depth: usize) -> Result<()> {
        cancel::check()?;
        ensure!(depth < DEEPEST, "a root file system holds more than {DEEPEST} directories in one another");
        let mut names: BTreeMap<Vec<u8>, [Option<Seen>; 2]> = BTreeMap::new();
        for (side, (fs, there)) in [(self.before, in_before), (self.after, in_after)].into_iter().enumerate() {
            if !there {
                continue;
            }
            for (name, seen) in entries(fs, path)? {
                if let Some(slot) = names.entry(name).or_default().get_mut(side) {
                    *slot = Some(seen);
                }
            }
        }
        self.seen += names.len();
        ensure!(self.seen <= MOST, "a root file system holds more than {MOST} files");
        for (name, [was, is]) in names {
            let length = path.len();
            path.extend(&name);
            let kind = match (&was, &is) {
                (None, _) => Some(Kind::Added),
                (_, None) => Some(Kind::Deleted),
                (was, is) if was != is => Some(Kind::Modified),
                _ => None,
            };
            if let Some(kind) = kind {
                let size = [&was, &is].map(|seen| seen.as_ref().filter(|seen| !seen.directory).map(|seen| seen.size));
                let slash = if is.as_ref().or(was.as_ref()).is_some_and(|seen| seen.directory) { "/" } else { "" };
                self.changes.push(Change { kind, path: String::from_utf8_lossy(path).into_owned() + slash, size });
            }
            let directory = |seen: &Option<Seen>| seen.as_ref().is_some_and(|seen| seen.directory);
            if directory(&was) || directory(&is) {
                path.push(b'/');
                self.directory(path, directory(&was), directory(&is), depth + 1)?;
            }
            path.truncate(length);
        }
        Ok(())
    }
}

fn entries(fs: &Ext4, directory: &[u8]) -> Result<Vec<(Vec<u8>, Seen)>> {
    let what = || format!("cannot read {} of the root file system", String::from_utf8_lossy(directory));
    let mut all = Vec::new();
    for entry in fs.read_dir(directory).with_context(what)? {
        let entry = entry.with_context(what)?;
        let name = entry.file_name().as_ref().to_vec();
        if name == b"." || name == b".." {
            continue;
        }
        let metadata = entry.metadata().with_context(what)?;
        let path = [directory, &name].concat();
        let link = metadata.is_symlink().then(|| fs.read_link(path.as_slice())).transpose().with_context(what)?;
        all.push((name, seen(&metadata, link.map(|link| link.as_ref().to_vec()))));
    }
    Ok(all)
}

fn seen(metadata: &Metadata, link: Option<Vec<u8>>) -> Seen {
    let directory = metadata.is_dir();
    let modified = metadata.modified();
    Seen {
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        size: if directory { 0 } else { metadata.len() },
        modified: (!directory).then(|| (modified.seconds(), modified.nanoseconds())),
        link,
        directory,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_superblock_that_names_more_than_the_disk_holds_is_refused() {
        let disk = |blocks: u32, in_group: u32| {
            let mut bytes = vec![0_u8; 64 << 10];
            bytes[1024 + 4..][..4].copy_from_slice(&blocks.to_le_bytes());
            bytes[1024 + 0x20..][..4].copy_from_slice(&in_group.to_le_bytes());
            bytes[1024 + 0x38..][..2].copy_from_slice(&0xef53_u16.to_le_bytes());
            let size = bytes.len() as u64;
            load(bytes, size).map(drop).unwrap_err().to_string()
        };
        for (blocks, in_group) in [(u32::MAX, 8192), (65, 8192), (64, 1)] {
            assert!(disk(blocks, in_group).contains("more than the disk holds"), "{blocks} {in_group}");
        }
        assert!(!disk(64, 8192).contains("more than the disk holds"));
        assert!(load(vec![0; 10], 10).is_err());
    }
}
