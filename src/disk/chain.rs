//! A disk as the guest sees it: its overlay, what that stands on, and so on down to the image. Reading it, and making
//! one overlay of all of them.
//!
//! Source: QEMU's docs/interop/qcow2.txt, cluster mapping. Nobody writes to the layers meanwhile.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::qcow2::{BYTES_PER_L1_ENTRY, CLUSTER, CLUSTER_BITS, Format, overlay_bytes, read_header};
use crate::failpoint;

/// More layers than this are a circle or a joke.
const MAX_LAYERS: usize = 64;
/// Entries in an L2 table.
const ENTRIES: u64 = CLUSTER / 8;
/// An offset in an L1 or L2 entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster is used once: it is written in place.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros.
const ZERO: u64 = 1;
/// Incompatible features that reading does not mind: "not cleanly closed" speaks of refcounts alone.
const DIRTY: u64 = 1;
/// L2 tables that are kept of each layer.
const MOST_TABLES: usize = 256;

/// An overlay and all that it stands on, the overlay first.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Layer>,
    /// What the lowest overlay stands on.
    base: Option<Base>,
    size: u64,
}

#[derive(Debug)]
struct Base {
    path: PathBuf,
    file: File,
}

#[derive(Debug)]
struct Layer {
    path: PathBuf,
    file: File,
    size: u64,
    l1: Vec<u64>,
    tables: HashMap<u64, Vec<u64>>,
}

/// Where a cluster's bytes are.
enum Place {
    /// The layers below tell.
    Below,
    Zero,
    /// At this offset of the layer's file.
    Here(u64),
}

impl Chain {
    /// Opens an overlay and what it stands on.
    ///
    /// # Errors
    /// When a file cannot be read, is no qcow2 that puter or its hypervisors write, or the chain has no end.
    pub fn open(path: &Path) -> Result<Chain> {
        let mut layers = Vec::new();
        let mut next = (path.to_path_buf(), Some(Format::Qcow2));
        let mut base = None;
        loop {
            let (path, format) = next;
            ensure!(layers.len() < MAX_LAYERS, "the disk {} stands on more than {MAX_LAYERS} others", path.display());
            // cloud-hypervisor drops the format when it writes a header anew. The names are puter's own; what the guest
            // wrote is never asked.
            let named = || path.extension().is_some_and(|extension| extension == "raw").then_some(Format::Raw);
            if format.or_else(named) == Some(Format::Raw) {
                let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
                base = Some(Base { path, file });
                break;
            }
            let header = read_header(&path)?;
            layers.push(Layer::open(&path, header.size)?);
            match header.backing {
                Some(backing) => next = (backing, header.format),
                None => break,
            }
        }
        let size = layers.first().map_or(0, |layer| layer.size);
        Ok(Chain { layers, base, size })
    }

    /// Overlays that stand on one another.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// Bytes that the guest sees.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills the buffer from this offset of the disk; beyond its end there are zeros.
    ///
    /// # Errors
    /// When a layer cannot be read or is damaged.
    pub fn read_at(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let within = (at % CLUSTER) as usize;
            let length = (CLUSTER as usize - within).min(buffer.len() - done);
            let piece = &mut buffer[done..done + length];
            self.read_within(at / CLUSTER, within, piece)?;
            done += length;
        }
        Ok(())
    }

    fn read_within(&mut self, cluster: u64, within: usize, piece: &mut [u8]) -> io::Result<()> {
        for layer in &mut self.layers {
            match layer.place(cluster)? {
                Place::Below => {}
                Place::Zero => {
                    piece.fill(0);
                    return Ok(());
                }
                Place::Here(offset) => return read_padded(&layer.file, piece, offset + within as u64),
            }
        }
        match &self.base {
            Some(base) => read_padded(&base.file, piece, cluster * CLUSTER + within as u64),
            None => {
                piece.fill(0);
                Ok(())
            }
        }
    }

    /// Makes `path` one overlay over the chain's base which holds all that the chain does; whole and synced, or absent.
    ///
    /// # Errors
    /// When `path` exists, or reading or writing fails.
    pub fn flatten(&mut self, path: &Path) -> Result<()> {
        let base = self.base.as_ref().context("the disk stands on no image")?.path.clone();
        let head = overlay_bytes(&base, Format::Raw, self.size)?;
        let parent = path.parent().context("the disk's path has no directory")?.to_path_buf();
        failpoint::write()
            .and(File::create_new(path))
            .map_err(anyhow::Error::new)
            .and_then(|file| {
                let written = self.write_flat(&file, &head).and_then(|()| {
                    file.sync_all()?;
                    File::open(&parent)?.sync_all()
                });
                written.map_err(|error| {
                    let _ = std::fs::remove_file(path);
                    anyhow::Error::new(error)
                })
            })
            .with_context(|| format!("cannot write the disk {}", path.display()))
    }

    fn write_flat(&mut self, file: &File, head: &[u8]) -> io::Result<()> {
        file.write_all_at(head, 0)?;
        let mut end = head.len() as u64;
        let mut take = || {
            let at = end;
            end += CLUSTER;
            at
        };
        let mut l1 = vec![0_u64; self.size.div_ceil(BYTES_PER_L1_ENTRY) as usize];
        let mut bytes = vec![0; CLUSTER as usize];
        for (index, entry) in l1.iter_mut().enumerate() {
            if self.layers.iter().all(|layer| layer.l1.get(index).is_none_or(|entry| entry & OFFSET == 0)) {
                continue;
            }
            let mut table = vec![0_u64; ENTRIES as usize];
            for (slot, mapped) in table.iter_mut().enumerate() {
                let cluster = index as u64 * ENTRIES + slot as u64;
                let mut place = Place::Below;
                for layer in &mut self.layers {
                    place = layer.place(cluster)?;
                    if let Place::Here(offset) = place {
                        read_padded(&layer.file, &mut bytes, offset)?;
                    }
                    if !matches!(place, Place::Below) {
                        break;
                    }
                }
                *mapped = match place {
                    Place::Below => 0,
                    Place::Zero => ZERO,
                    Place::Here(_) if bytes.iter().all(|&byte| byte == 0) => ZERO,
                    Place::Here(_) => {
                        let at = take();
                        file.write_all_at(&bytes, at)?;
                        at | COPIED
                    }
                };
            }
            if table.iter().any(|&mapped| mapped != 0) {
                let at = take();
                let raw: Vec<u8> = table.iter().flat_map(|mapped| mapped.to_be_bytes()).collect();
                file.write_all_at(&raw, at)?;
                *entry = at | COPIED;
            }
        }
        let raw: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        file.write_all_at(&raw, 3 * CLUSTER)?;
        count_references(file, end)
    }
}

/// Writes the refcounts of a file whose clusters up to `end` are all used once. The first block is in its place, as
/// [`overlay_bytes`] has it; more of them go to the end.
fn count_references(file: &File, end: u64) -> io::Result<()> {
    const COUNTS: u64 = CLUSTER / 2;
    let used = end / CLUSTER;
    // Each further block counts itself too.
    let mut blocks = used.div_ceil(COUNTS);
    while (used + blocks - 1).div_ceil(COUNTS) > blocks {
        blocks += 1;
    }
    let all = used + blocks - 1;
    if blocks > CLUSTER / 8 {
        return Err(io::Error::new(ErrorKind::FileTooLarge, "the disk holds too much for one refcount table"));
    }
    for block in 0..blocks {
        let at = if block == 0 { 2 * CLUSTER } else { end + (block - 1) * CLUSTER };
        let mut raw = vec![0; CLUSTER as usize];
        for cluster in block * COUNTS..all.min((block + 1) * COUNTS) {
            raw[((cluster % COUNTS) * 2 + 1) as usize] = 1;
        }
        file.write_all_at(&raw, at)?;
        file.write_all_at(&at.to_be_bytes(), CLUSTER + block * 8)?;
    }
    Ok(())
}

impl Layer {
    fn open(path: &Path, size: u64) -> Result<Layer> {
        let what = || format!("cannot read the disk {}", path.display());
        let file = File::open(path).with_context(what)?;
        let mut head = [0; 104];
        let got = file.read_at(&mut head, 0).with_context(what)?;
        let number = |at: usize, length: usize| head[at..at + length].iter().fold(0, |sum, &b| sum << 8 | u64::from(b));
        let version = number(4, 4);
        ensure!(got == head.len() || version == 2, "{} is truncated", path.display());
        ensure!(
            number(20, 4) == u64::from(CLUSTER_BITS),
            "{} has clusters of another size than puter's",
            path.display()
        );
        ensure!(number(32, 4) == 0, "{} is encrypted", path.display());
        let features = if version == 2 { 0 } else { number(72, 8) & !DIRTY };
        if features != 0 {
            bail!("{} has features that puter does not know ({features:#x})", path.display());
        }
        let (entries, table) = (number(36, 4), number(40, 8));
        ensure!(
            entries == size.div_ceil(BYTES_PER_L1_ENTRY) || entries * BYTES_PER_L1_ENTRY >= size,
            "{} has too short a table",
            path.display()
        );
        ensure!(entries * 8 <= 64 << 20, "{} has too long a table", path.display());
        let mut raw = vec![0; (entries * 8) as usize];
        file.read_exact_at(&mut raw, table).with_context(what)?;
        Ok(Layer { path: path.to_path_buf(), file, size, l1: numbers(&raw), tables: HashMap::new() })
    }

    fn place(&mut self, cluster: u64) -> io::Result<Place> {
        let index = cluster / ENTRIES;
        let Some(&entry) = usize::try_from(index).ok().and_then(|index| self.l1.get(index)) else {
            return Ok(Place::Below);
        };
        let table = entry & OFFSET;
        // A disk that has grown: what lies beyond the old end reads as zeros, but nothing below could tell otherwise.
        if table == 0 {
            return Ok(Place::Below);
        }
        if !self.tables.contains_key(&index) {
            if self.tables.len() >= MOST_TABLES {
                self.tables.clear();
            }
            let mut raw = vec![0; CLUSTER as usize];
            self.file.read_exact_at(&mut raw, table).map_err(|error| self.damaged(&error))?;
            self.tables.insert(index, numbers(&raw));
        }
        let mapped = self.tables.get(&index).and_then(|table| table.get((cluster % ENTRIES) as usize)).copied();
        let mapped = mapped.unwrap_or(0);
        if mapped & COMPRESSED != 0 {
            return Err(self.damaged(&"it has compressed clusters, which puter never writes"));
        }
        Ok(match (mapped & ZERO != 0, mapped & OFFSET) {
            (true, _) => Place::Zero,
            (false, 0) => Place::Below,
            (false, offset) => Place::Here(offset),
        })
    }

    fn damaged(&self, why: &dyn std::fmt::Display) -> io::Error {
        io::Error::new(ErrorKind::InvalidData, format!("the disk {} cannot be read: {why}", self.path.display()))
    }
}

fn numbers(raw: &[u8]) -> Vec<u64> {
    raw.chunks_exact(8).map(|bytes| bytes.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte))).collect()
}

/// Reads what there is, and zeros beyond the end.
fn read_padded(file: &File, buffer: &mut [u8], at: u64) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64) {
            Ok(0) => {
                buffer[filled..].fill(0);
                break;
            }
            Ok(got) => filled += got,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::qcow2::{create_overlay, grow};
    use super::*;

    /// What tells QEMU from us; without it there is nothing to compare with.
    fn tool(program: &str, words: &[&str]) -> Option<String> {
        let output = Command::new(program).args(words).output().ok()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {words:?}: {said}");
        Some(said)
    }

    #[test]
    fn a_chain_reads_and_flattens_to_what_qemu_sees() {
        if tool("qemu-img", &["--version"]).is_none() || tool("qemu-io", &["--version"]).is_none() {
            eprintln!("skipped: QEMU's tools are not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("base.raw"), vec![0xaa; 3 << 20]).unwrap();
        create_overlay(&path("one"), &path("base.raw"), Format::Raw, 1 << 30).unwrap();
        create_overlay(&path("two"), &path("one"), Format::Qcow2, 1 << 30).unwrap();
        grow(&path("two"), 2 << 30).unwrap();
        let io =
            |name: &str, command: &str| tool("qemu-io", &["-f", "qcow2", "-c", command, path(name).to_str().unwrap()]);
        io("one", "write -P 1 64k 192k");
        io("one", "write -P 2 800M 1M");
        io("two", "write -P 3 100k 8k");
        io("two", "write -z 128k 64k");
        io("two", "write -P 4 1500M 100k");
        io("two", "discard 1M 64k");
        let mut chain = Chain::open(&path("two")).unwrap();
        assert_eq!((chain.depth(), chain.size()), (2, 2 << 30));
        chain.flatten(&path("flat")).unwrap();
        let text = |name: &str| path(name).to_str().unwrap().to_string();
        tool("qemu-img", &["compare", "-f", "qcow2", "-F", "qcow2", &text("two"), &text("flat")]).unwrap();
        tool("qemu-img", &["check", "-f", "qcow2", &text("flat")]).unwrap();
        tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &text("two"), &text("all.raw")]).unwrap();
        let all = File::open(path("all.raw")).unwrap();
        for (offset, length) in [(0, 70_000), (60_000, 300_000), (800 << 20, 70_000), ((1500 << 20) - 5, 200_000)] {
            let (mut ours, mut theirs) = (vec![9; length], vec![8; length]);
            chain.read_at(&mut ours, offset).unwrap();
            all.read_exact_at(&mut theirs, offset).unwrap();
            assert!(ours == theirs, "at {offset}");
        }
        assert_eq!(Chain::open(&path("flat")).unwrap().depth(), 1);
        assert!(chain.flatten(&path("flat")).is_err(), "an existing disk is never overwritten");
        // Beyond it there is nothing.
        let mut end = [1; 10];
        chain.read_at(&mut end, 2 << 30).unwrap();
        assert_eq!(end, [0; 10]);
        // An overlay whose header has lost what it said of the format below.
        let one = File::options().write(true).open(path("one")).unwrap();
        one.write_all_at(&[0; 8], 104).unwrap();
        assert_eq!(super::super::qcow2::read_header(&path("one")).unwrap().format, None);
        assert_eq!(Chain::open(&path("two")).unwrap().depth(), 2);
    }

    #[test]
    fn refcounts_of_many_blocks_count_their_own_blocks() {
        if tool("qemu-img", &["--version"]).is_none() {
            eprintln!("skipped: QEMU's tools are not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(dir.path().join("base.raw"), [0; 512]).unwrap();
        // Clusters that nothing uses are leaks and no errors: all are counted, and none is beyond the count.
        for used in [32_766, 32_767, 32_768, 32_769, 65_537] {
            let head = overlay_bytes(&dir.path().join("base.raw"), Format::Raw, 8 << 30).unwrap();
            let file = File::create(&path).unwrap();
            file.write_all_at(&head, 0).unwrap();
            file.set_len(used * CLUSTER).unwrap();
            count_references(&file, used * CLUSTER).unwrap();
            let output =
                Command::new("qemu-img").args(["check", "--output=json", "-f", "qcow2"]).arg(&path).output().unwrap();
            let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            assert!(report["corruptions"].is_null() && report["check-errors"] == 0, "{used}: {report}");
        }
    }

    #[test]
    fn what_is_no_chain_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(dir.path().join("base.raw"), [0; 512]).unwrap();
        create_overlay(&path, &dir.path().join("base.raw"), Format::Raw, 1 << 30).unwrap();
        let change =
            |offset: u64, bytes: &[u8]| File::options().write(true).open(&path).unwrap().write_all_at(bytes, offset);
        change(72, &[0, 0, 0, 0, 0, 0, 0, 4]).unwrap();
        assert!(Chain::open(&path).unwrap_err().to_string().contains("features"));
        change(72, &[0; 8]).unwrap();
        change(40, &(1_u64 << 40).to_be_bytes()).unwrap();
        assert!(Chain::open(&path).unwrap_err().to_string().contains("cannot read the disk"));
        std::fs::remove_file(dir.path().join("base.raw")).unwrap();
        change(40, &(3 * CLUSTER).to_be_bytes()).unwrap();
        assert!(Chain::open(&path).unwrap_err().to_string().contains("base.raw"));
    }
}
