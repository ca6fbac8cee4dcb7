//! Layers, bottom first, laid over one another as the OCI image specification ("Image Layer Filesystem Changeset")
//! says, and stored as one ext4 file system.

use std::fs::File;
use std::io::Read;

use anyhow::{Context, Result, bail, ensure};

use super::ext4::{BLOCK_DEVICE, CHAR, FIFO, Meta, Place, ROOT, Tree, Walk, Writer};
use super::tar::{Archive, Entry, Kind, Segment, show};

/// What a name begins with that removes another.
const WHITEOUT: &[u8] = b".wh.";
/// The name that removes all that lower layers put into its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names of this kind are notes of the AUFS file system and mean nothing here.
const RESERVED: &[u8] = b".wh..wh.";
/// Longest path, in bytes (PATH_MAX, linux/limits.h).
const MAX_PATH: usize = 4096;
/// Bytes moved at once.
const BUFFER: usize = 256 << 10;

/// What an image may ask for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Entries of all layers together, and directories that only their paths name.
    pub entries: u64,
    /// Bytes of all files together, holes included.
    pub bytes: u64,
    /// The same without holes.
    pub stored: u64,
}

impl Default for Limits {
    /// Four million entries and one TiB.
    fn default() -> Limits {
        Limits { entries: 4 << 20, bytes: 1 << 40, stored: 1 << 40 }
    }
}

/// How the file system is made.
#[derive(Clone, Debug)]
pub struct Options {
    pub uuid: [u8; 16],
    /// At most 16 bytes.
    pub label: String,
    /// Bytes that stay free at least, besides the contents.
    pub spare: u64,
    pub limits: Limits,
}

/// Takes layers and makes a file system.
pub struct Converter {
    writer: Writer,
    options: Options,
    layer: u16,
    entries: u64,
    bytes: u64,
    stored: u64,
    buffer: Vec<u8>,
}

impl Converter {
    /// Begins in `file`, which is empty and open for reading and writing.
    ///
    /// # Errors
    /// When the file is not as it must be.
    pub fn new(file: File, options: Options) -> Result<Converter> {
        let writer = Writer::new(file, options.uuid)?;
        Ok(Converter { writer, options, layer: 0, entries: 0, bytes: 0, stored: 0, buffer: vec![0; BUFFER] })
    }

    /// Lays a decompressed layer over those before it, and reads the stream to its end.
    ///
    /// # Errors
    /// When the stream fails, is no layer, or asks for more than the limits; the error names the entry. The converter
    /// is of no use after that.
    pub fn apply(&mut self, tar: impl Read) -> Result<()> {
        self.layer = self.layer.checked_add(1).context("an image of more than 65535 layers")?;
        let mut archive = Archive::new(tar);
        while let Some(entry) = archive.next_entry()? {
            let taken = self.count(1).and_then(|()| self.take(&mut archive, &entry));
            taken.with_context(|| format!("the layer's entry {}", show(&entry.path)))?;
        }
        archive.drain()
    }

    /// Completes the file system.
    ///
    /// # Errors
    /// When it would be too large, or writing fails.
    pub fn finish(self) -> Result<Tree> {
        self.writer.finish(&self.options.label, self.options.spare)
    }

    fn count(&mut self, entries: u64) -> Result<()> {
        self.entries += entries;
        let most = self.options.limits.entries;
        ensure!(self.entries <= most, "the image has more than {most} entries");
        Ok(())
    }

    fn take<R: Read>(&mut self, archive: &mut Archive<R>, entry: &Entry) -> Result<()> {
        let path = components(&entry.path)?;
        let Some((name, parents)) = path.split_last() else {
            ensure!(entry.kind == Kind::Directory, "the root is not a directory");
            let meta = self.meta(entry)?;
            return self.writer.update_directory(ROOT, meta);
        };
        if name.starts_with(WHITEOUT) {
            return self.white_out(parents, name);
        }
        let mut walk = Walk::new(parents.iter().copied());
        let parent = match self.writer.walk(&mut walk, Some(self.layer))? {
            Place::Directory(inode) => inode,
            Place::Leaf(_) | Place::Missing(..) => bail!("its parent is not a directory"),
        };
        // A path of 4 KiB may need two thousand directories.
        self.count(walk.made().into())?;
        let layer = self.layer;
        match entry.kind {
            Kind::Directory => {
                let meta = self.meta(entry)?;
                self.writer.make_directory(parent, name, layer, meta).map(drop)
            }
            Kind::File => {
                let meta = self.meta(entry)?;
                self.file(archive, entry, parent, name, meta)
            }
            Kind::HardLink => {
                let target = self.link_target(&entry.link)?;
                self.writer.make_hard_link(parent, name, layer, target)
            }
            Kind::Symlink => {
                // Linux gives every symbolic link this mode and has no call to change it.
                let meta = self.meta(&Entry { mode: 0o777, ..entry.clone() })?;
                self.writer.make_symlink(parent, name, layer, meta, &entry.link)
            }
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                let meta = self.meta(entry)?;
                let kind = match entry.kind {
                    Kind::CharDevice => CHAR,
                    Kind::BlockDevice => BLOCK_DEVICE,
                    _ => FIFO,
                };
                self.writer.make_special(parent, name, layer, meta, kind, entry.device)
            }
        }
    }

    fn meta(&mut self, entry: &Entry) -> Result<Meta> {
        self.writer.meta(entry.mode, (entry.uid, entry.gid), entry.mtime, &entry.xattrs)
    }

    fn file<R: Read>(
        &mut self,
        archive: &mut Archive<R>,
        entry: &Entry,
        parent: u32,
        name: &[u8],
        meta: Meta,
    ) -> Result<()> {
        self.bytes = self.bytes.saturating_add(entry.size);
        let most = self.options.limits.bytes;
        ensure!(self.bytes <= most, "the image's files have more than {most} bytes");
        let whole = [Segment { offset: 0, length: entry.size }];
        let segments = entry.segments.as_deref().unwrap_or(&whole);
        // Refused by its header, before a byte of it is read.
        let stored = segments.iter().fold(0, |sum: u64, segment| sum.saturating_add(segment.length));
        self.stored = self.stored.saturating_add(stored);
        let most = self.options.limits.stored;
        ensure!(self.stored <= most, "the image's layers hold more than {most} bytes");
        let buffer = &mut self.buffer;
        self.writer.make_file(parent, name, self.layer, meta, entry.size, |file| {
            for segment in segments {
                let mut left = segment.length;
                if left > 0 {
                    file.seek(segment.offset)?;
                }
                while left > 0 {
                    let want = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
                    let chunk = buffer.get_mut(..want).unwrap_or_default();
                    let got = archive.read(chunk)?;
                    ensure!(got > 0, "its contents are shorter than it says");
                    file.write(&chunk[..got])?;
                    left -= got as u64;
                }
            }
            Ok(())
        })
    }

    /// The file that a hard link names: its own name is not followed, should it be a symbolic link.
    fn link_target(&mut self, link: &[u8]) -> Result<u32> {
        let missing = || format!("it is a hard link to {}, which is not there", show(link));
        let path = components(link)?;
        let (name, parents) = path.split_last().with_context(missing)?;
        match self.writer.walk(&mut Walk::new(parents.iter().copied()), None)? {
            Place::Directory(parent) => self.writer.child(parent, name)?.with_context(missing),
            Place::Leaf(_) | Place::Missing(..) => bail!(missing()),
        }
    }

    fn white_out(&mut self, parents: &[&[u8]], name: &[u8]) -> Result<()> {
        let opaque = name == OPAQUE;
        if name.starts_with(RESERVED) && !opaque {
            return Ok(());
        }
        let removed = name.get(WHITEOUT.len()..).unwrap_or_default();
        ensure!(!matches!(removed, b"" | b"." | b".."), "a whiteout of nothing");
        // What is not there needs no removing.
        let Place::Directory(parent) = self.writer.walk(&mut Walk::new(parents.iter().copied()), None)? else {
            return Ok(());
        };
        match opaque {
            true => self.writer.empty_lower(parent, self.layer),
            false => self.writer.remove_lower(parent, removed, self.layer),
        }
    }
}

/// A path's names, cleaned as every container runtime does; one that leads out of the root is refused.
fn components(path: &[u8]) -> Result<Vec<&[u8]>> {
    ensure!(path.len() < MAX_PATH, "a path longer than {MAX_PATH} bytes");
    let mut names = Vec::new();
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => ensure!(names.pop().is_some(), "the path {} leads out of the root", show(path)),
            name => {
                ensure!(!name.contains(&0), "a path with a NUL in it");
                names.push(name);
            }
        }
    }
    Ok(names)
}

#[cfg(test)]
mod hostile;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_and_those_that_lead_out_refused() {
        let clean = |path: &str| components(path.as_bytes()).map(|names| names.join(&b'/'));
        assert_eq!(clean("./usr//bin/./sh").unwrap(), b"usr/bin/sh");
        assert_eq!(clean("/a/../b/").unwrap(), b"b");
        assert_eq!(clean("./").unwrap(), b"");
        for bad in ["..", "a/../../b", "/../etc"] {
            assert!(clean(bad).unwrap_err().to_string().contains("leads out"), "{bad}");
        }
        assert!(clean("a\0b").is_err());
        assert!(clean(&"x/".repeat(2048)).is_err());
    }
}
