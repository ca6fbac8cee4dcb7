//! qcow2 version 3: making an overlay and reading a header.
//!
//! Source: QEMU's docs/interop/qcow2.txt. An overlay begins as one file of four clusters (header, refcount table, one
//! refcount block, L1 table); the hypervisor allocates everything else.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::failpoint;

const MAGIC: u32 = 0x5146_49fb;
const VERSION: u32 = 3;
pub(super) const CLUSTER_BITS: u32 = 16;
pub(super) const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Length of a version 3 header without the optional compression field's padding.
const HEADER_LENGTH: u32 = 104;
/// Refcounts are 16 bits wide: 2 to the power of this order.
const REFCOUNT_ORDER: u32 = 4;
/// Header extension: the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// An L1 entry covers one L2 table's clusters.
pub(super) const BYTES_PER_L1_ENTRY: u64 = CLUSTER * (CLUSTER / 8);
/// The longest backing file name that the format allows, in bytes.
const MAX_BACKING: usize = 1023;
/// What a host's file system allocates at once.
const BLOCK: usize = 4096;
/// The largest disk puter makes, in bytes: its L1 table still fits in a few clusters.
pub const MAX_SIZE: u64 = 64 << 40;

/// Format of a backing file, written into the overlay so that nobody has to guess it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// What a qcow2 header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Size of the disk that the guest sees, in bytes.
    pub size: u64,
    /// The file that holds what the overlay does not.
    pub backing: Option<PathBuf>,
    /// What the overlay says of that file's format.
    pub format: Option<Format>,
}

/// Makes `path` an empty overlay of `size` bytes over `backing`; whole and synced, or not there at all.
///
/// The backing file's name is stored absolute: cloud-hypervisor before v54 resolves a relative one against its own
/// working directory.
///
/// # Errors
/// When `path` exists, the size is not a multiple of 512 or beyond [`MAX_SIZE`], the backing file is missing or larger
/// than `size`, its path is too long, or a write fails.
pub fn create_overlay(path: &Path, backing: &Path, format: Format, size: u64) -> Result<()> {
    let backing =
        std::fs::canonicalize(backing).with_context(|| format!("cannot find the base {}", backing.display()))?;
    let base_size = match format {
        Format::Raw => std::fs::metadata(&backing)?.len(),
        Format::Qcow2 => read_header(&backing)?.size,
    };
    ensure!(
        size >= base_size,
        "a disk of {size} bytes is smaller than its base {}, which has {base_size}",
        backing.display()
    );
    let image = overlay_bytes(&backing, format, size)?;
    let parent = path.parent().context("the overlay's path has no directory")?;
    let write = || -> std::io::Result<()> {
        failpoint::write()?;
        let file = File::create_new(path)?;
        // Most of it is zeros, which need no blocks.
        file.set_len(image.len() as u64)?;
        for (block, at) in image.chunks(BLOCK).zip((0..).step_by(BLOCK)) {
            if block.iter().any(|byte| *byte != 0) {
                file.write_all_at(block, at)?;
            }
        }
        file.sync_all()?;
        File::open(parent)?.sync_all()
    };
    write().map_err(|error| {
        if error.kind() != ErrorKind::AlreadyExists {
            let _ = std::fs::remove_file(path);
        }
        anyhow::Error::new(error).context(format!("cannot write the disk {}", path.display()))
    })
}

pub(super) fn overlay_bytes(backing: &Path, format: Format, size: u64) -> Result<Vec<u8>> {
    ensure!(size > 0 && size.is_multiple_of(512), "a disk's size must be a multiple of 512 bytes, not {size}");
    ensure!(size <= MAX_SIZE, "a disk of {size} bytes is too large: the limit is {MAX_SIZE} bytes");
    let name = backing.as_os_str().as_bytes();
    ensure!(
        name.len() <= MAX_BACKING,
        "the path {} has {} bytes, qcow2 allows {MAX_BACKING}; choose a shorter PUTER_HOME",
        backing.display(),
        name.len()
    );
    let l1_entries = size.div_ceil(BYTES_PER_L1_ENTRY);
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
    let (refcount_table, refcount_block, l1_table) = (CLUSTER, 2 * CLUSTER, 3 * CLUSTER);
    let clusters = 3 + l1_clusters;
    let name_offset = u64::from(HEADER_LENGTH) + 16 + 8;

    let mut header = Vec::with_capacity(name_offset as usize + name.len());
    let u32s = |header: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| header.extend(v.to_be_bytes()));
    u32s(&mut header, &[MAGIC, VERSION]);
    header.extend(name_offset.to_be_bytes());
    u32s(&mut header, &[name.len() as u32, CLUSTER_BITS]);
    header.extend(size.to_be_bytes());
    u32s(&mut header, &[0, l1_entries as u32]);
    header.extend(l1_table.to_be_bytes());
    header.extend(refcount_table.to_be_bytes());
    u32s(&mut header, &[1, 0]);
    header.extend([0; 8]); // snapshot table
    header.extend([0; 24]); // incompatible, compatible and autoclear features
    u32s(&mut header, &[REFCOUNT_ORDER, HEADER_LENGTH]);
    let format_name = format.name().as_bytes();
    u32s(&mut header, &[BACKING_FORMAT, format_name.len() as u32]);
    let mut padded = [0; 8];
    padded[..format_name.len()].copy_from_slice(format_name);
    header.extend(padded);
    u32s(&mut header, &[0, 0]); // end of the extensions
    debug_assert_eq!(header.len() as u64, name_offset);
    header.extend(name);

    let mut image = vec![0; (clusters * CLUSTER) as usize];
    image[..header.len()].copy_from_slice(&header);
    image[refcount_table as usize..][..8].copy_from_slice(&refcount_block.to_be_bytes());
    for cluster in 0..clusters as usize {
        image[refcount_block as usize + 2 * cluster..][..2].copy_from_slice(&1_u16.to_be_bytes());
    }
    Ok(image)
}

/// Makes the disk larger: `size` bytes, which the guest sees from its next boot on. Nobody may have it open.
///
/// # Errors
/// When the file is no overlay that puter made, `size` is less than it has or more than its L1 table can grow to, or
/// the write fails; the disk stays as it was.
pub fn grow(path: &Path, size: u64) -> Result<()> {
    let what = || format!("cannot grow the disk {}", path.display());
    let former = read_header(path)?.size;
    ensure!(size >= former, "the disk {} has {former} bytes and cannot shrink to {size}", path.display());
    ensure!(size.is_multiple_of(512), "a disk's size must be a multiple of 512 bytes, not {size}");
    let file = File::options().read(true).write(true).open(path).with_context(what)?;
    let mut head = [0; HEADER_LENGTH as usize];
    file.read_exact_at(&mut head, 0).with_context(what)?;
    let number = |at: usize, length: usize| head[at..at + length].iter().fold(0, |sum, &b| sum << 8 | u64::from(b));
    ensure!(number(20, 4) == u64::from(CLUSTER_BITS), "{} has clusters of another size than puter's", path.display());
    let (entries, table) = (number(36, 4), number(40, 8));
    let length = file.metadata().with_context(what)?.len();
    ensure!(
        table.is_multiple_of(CLUSTER) && table > 0 && table.checked_add(entries * 8).is_some_and(|end| end <= length),
        "{} has its table outside of the file",
        path.display()
    );
    let room = (entries * 8).next_multiple_of(CLUSTER) / 8;
    let needed = size.div_ceil(BYTES_PER_L1_ENTRY).max(entries);
    ensure!(
        needed <= room && size <= MAX_SIZE,
        "the disk {} can grow to {} bytes, not to {size}",
        path.display(),
        room * BYTES_PER_L1_ENTRY
    );
    // The table has its clusters whole; what was beyond its end becomes part of it and must name nothing.
    failpoint::write().with_context(what)?;
    file.write_all_at(&vec![0; ((needed - entries) * 8) as usize], table + entries * 8).with_context(what)?;
    file.sync_data().with_context(what)?;
    // Size, encryption (none) and the table's length in one write, within a sector.
    let mut fields = [0; 16];
    fields[..8].copy_from_slice(&size.to_be_bytes());
    fields[12..].copy_from_slice(&(needed as u32).to_be_bytes());
    file.write_all_at(&fields, 24).with_context(what)?;
    file.sync_all().with_context(what)
}

/// Reads and checks the header of the qcow2 file at `path`.
///
/// # Errors
/// When the file cannot be read, is no qcow2 of version 2 or 3, or its backing name lies outside the first cluster.
pub fn read_header(path: &Path) -> Result<Header> {
    let file = File::open(path).with_context(|| format!("cannot open the disk {}", path.display()))?;
    let mut head = Vec::new();
    file.take(CLUSTER).read_to_end(&mut head).with_context(|| format!("cannot read the disk {}", path.display()))?;
    let mut header = parse_header(&head).with_context(|| format!("{} is not a usable qcow2 disk", path.display()))?;
    // A relative name is one beside the disk (qcow2.txt, "Backing file name"), wherever this process is.
    header.backing = header.backing.map(|backing| path.parent().unwrap_or(Path::new("")).join(backing));
    Ok(header)
}

fn parse_header(head: &[u8]) -> Result<Header> {
    let u32_at = |at: usize| head.get(at..at + 4).map(|b| u32::from_be_bytes(b.try_into().expect("four bytes")));
    let u64_at = |at: usize| head.get(at..at + 8).map(|b| u64::from_be_bytes(b.try_into().expect("eight bytes")));
    let (Some(MAGIC), Some(version)) = (u32_at(0), u32_at(4)) else { bail!("it does not begin with qcow2's magic") };
    ensure!(matches!(version, 2 | 3), "its version is {version}, not 2 or 3");
    let (Some(offset), Some(length), Some(size)) = (u64_at(8), u32_at(16), u64_at(24)) else {
        bail!("its header is truncated")
    };
    let backing = if offset == 0 {
        None
    } else {
        let start = usize::try_from(offset).ok().filter(|_| length as usize <= MAX_BACKING);
        let name = start.and_then(|s| head.get(s..)?.get(..length as usize));
        let name = name.context("its backing file's name lies outside the header")?;
        ensure!(!name.contains(&0), "its backing file's name contains a NUL byte");
        Some(PathBuf::from(std::ffi::OsStr::from_bytes(name)))
    };
    // Extensions (type, length, bytes up to a multiple of eight) follow the header; zero ends them.
    let mut at = if version == 2 { 72 } else { u32_at(100).unwrap_or(HEADER_LENGTH) as usize };
    let mut format = None;
    while let (Some(kind @ 1..), Some(length)) = (u32_at(at), u32_at(at + 4)) {
        let value = head.get(at + 8..).and_then(|rest| rest.get(..length as usize));
        format = match (kind, value) {
            (BACKING_FORMAT, Some(b"raw")) => Some(Format::Raw),
            (BACKING_FORMAT, Some(b"qcow2")) => Some(Format::Qcow2),
            (_, Some(_)) => format,
            (_, None) => bail!("a header extension lies outside the header"),
        };
        at += 8 + (length as usize).next_multiple_of(8);
    }
    Ok(Header { size, backing, format })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(dir: &Path, size: u64) -> PathBuf {
        let path = dir.join("base.raw");
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    #[test]
    fn an_overlay_reads_back_as_it_was_made() {
        let dir = tempfile::tempdir().unwrap();
        let base = base(dir.path(), 1 << 20);
        let overlay = dir.path().join("vm.qcow2");
        create_overlay(&overlay, &base, Format::Raw, 10 << 30).unwrap();
        let header = read_header(&overlay).unwrap();
        let backing = Some(base.canonicalize().unwrap());
        assert_eq!(header, Header { size: 10 << 30, backing, format: Some(Format::Raw) });
        let nested = dir.path().join("clone.qcow2");
        create_overlay(&nested, &overlay, Format::Qcow2, 10 << 30).unwrap();
        assert_eq!(read_header(&nested).unwrap().backing, Some(overlay.canonicalize().unwrap()));
    }

    #[test]
    fn qemu_img_finds_no_fault_in_an_overlay_of_any_size() {
        if std::process::Command::new("qemu-img").arg("--version").output().is_err() {
            eprintln!("skipped: qemu-img is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let base = base(dir.path(), 1 << 20);
        for size in [1 << 20, 513 << 20, 10 << 30, 5 << 40, MAX_SIZE] {
            let overlay = dir.path().join(format!("{size}.qcow2"));
            create_overlay(&overlay, &base, Format::Raw, size).unwrap();
            let output = std::process::Command::new("qemu-img").arg("check").arg(&overlay).output().unwrap();
            assert!(output.status.success(), "{size}: {}", String::from_utf8_lossy(&output.stderr));
            let info =
                std::process::Command::new("qemu-img").args(["info", "--output=json"]).arg(&overlay).output().unwrap();
            let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
            assert_eq!(info["virtual-size"], size);
            assert_eq!(info["backing-filename-format"], "raw");
        }
    }

    #[test]
    fn a_disk_grows_keeps_what_it_has_and_never_shrinks() {
        let dir = tempfile::tempdir().unwrap();
        let base = base(dir.path(), 1 << 20);
        let overlay = dir.path().join("vm.qcow2");
        create_overlay(&overlay, &base, Format::Raw, 1 << 30).unwrap();
        let tool = |words: &[&str]| {
            let output = std::process::Command::new(words[0]).args(&words[1..]).arg(&overlay).output();
            output.inspect(|done| assert!(done.status.success(), "{words:?}: {done:?}")).is_ok()
        };
        let has_tools = tool(&["qemu-io", "-f", "qcow2", "-c", "write -P 7 1000M 64k"]);
        for size in [1 << 30, 20 << 30, 3 << 40] {
            grow(&overlay, size).unwrap();
            assert_eq!(read_header(&overlay).unwrap().size, size);
            if has_tools {
                let last = format!("write -P 9 {} 64k", size - (1 << 20));
                tool(&["qemu-io", "-f", "qcow2", "-c", "read -P 7 1000M 64k", "-c", &last]);
                tool(&["qemu-img", "check"]);
            }
        }
        assert!(grow(&overlay, 1 << 30).unwrap_err().to_string().contains("cannot shrink"));
        assert!(grow(&overlay, 5 << 40).unwrap_err().to_string().contains("can grow to 4398046511104 bytes"));
        assert_eq!(read_header(&overlay).unwrap().size, 3 << 40);
    }

    #[test]
    fn a_table_outside_of_the_file_is_refused_and_nothing_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let base = base(dir.path(), 1 << 20);
        let overlay = dir.path().join("vm.qcow2");
        for table in [0, 512, 1 << 40, u64::MAX - 0xffff] {
            let _ = std::fs::remove_file(&overlay);
            create_overlay(&overlay, &base, Format::Raw, 1 << 30).unwrap();
            let file = File::options().write(true).open(&overlay).unwrap();
            file.write_all_at(&table.to_be_bytes(), 40).unwrap();
            let former = std::fs::read(&overlay).unwrap();
            assert!(grow(&overlay, 20 << 30).unwrap_err().to_string().contains("outside of the file"), "{table}");
            assert!(std::fs::read(&overlay).unwrap() == former);
        }
    }

    #[test]
    fn a_relative_base_is_beside_the_overlay() {
        let dir = tempfile::tempdir().unwrap();
        let overlay = dir.path().join("vm.qcow2");
        std::fs::write(&overlay, overlay_bytes(Path::new("base.raw"), Format::Raw, 1 << 30).unwrap()).unwrap();
        assert_eq!(read_header(&overlay).unwrap().backing, Some(dir.path().join("base.raw")));
    }

    #[test]
    fn an_overlay_smaller_than_its_base_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let base = base(dir.path(), 2 << 20);
        let overlay = dir.path().join("vm.qcow2");
        let error = create_overlay(&overlay, &base, Format::Raw, 1 << 20).unwrap_err();
        assert!(error.to_string().contains("smaller than its base"), "{error}");
        assert!(!overlay.exists());
    }

    #[test]
    fn an_existing_disk_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let base = base(dir.path(), 1 << 20);
        let overlay = dir.path().join("vm.qcow2");
        std::fs::write(&overlay, "precious").unwrap();
        assert!(create_overlay(&overlay, &base, Format::Raw, 1 << 20).is_err());
        assert_eq!(std::fs::read(&overlay).unwrap(), b"precious");
    }

    #[test]
    fn damaged_headers_are_errors_and_never_panics() {
        let whole = overlay_bytes(Path::new("/base"), Format::Raw, 1 << 30).unwrap();
        for length in 0..HEADER_LENGTH as usize {
            let _ = parse_header(&whole[..length]);
        }
        let mut far = whole.clone();
        far[8..16].copy_from_slice(&u64::MAX.to_be_bytes());
        assert!(parse_header(&far).unwrap_err().to_string().contains("outside the header"));
        let mut long = whole.clone();
        long[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(parse_header(&long).is_err());
        assert!(parse_header(b"not a disk").unwrap_err().to_string().contains("magic"));
    }
}
