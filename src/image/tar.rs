//! Reads a tar stream entry by entry, in one pass and without a seek.
//!
//! Understood: v7, ustar (POSIX.1-1988), pax (POSIX.1-2001) with star's and libarchive's extended attributes, GNU long
//! names, base-256 numbers and all four of GNU's sparse formats (tar(5), GNU tar manual "Sparse Formats"). Where these
//! leave room, the choice is the one that Go's archive/tar makes, since that reads the layers everywhere else. The
//! input is hostile: every length is bounded before memory is taken for it.

mod header;
mod pax;
mod sparse;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};

use anyhow::{Context, Result, bail, ensure};

use header::{Header, cut, signed};
use pax::Pax;
pub use sparse::Segment;

/// Length of a header and the unit to which contents are padded, in bytes.
pub const RECORD: usize = 512;
/// Longest extended header or GNU long name, in bytes (Go's archive/tar has the same limit).
const MAX_EXTENSION: u64 = 1 << 20;
/// Longest run of anything after the archive's end, in bytes: padding to the drive's block size is normal.
const MAX_TRAILER: u64 = 1 << 30;

/// What an entry makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// A time in seconds since 1970 and nanoseconds after that second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// One entry: all but its contents, which [`Archive::read`] hands out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As the archive has it: not cleaned of "..", "." or leading slashes.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Permissions with set-id and sticky bits: 12 bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Time,
    /// Size of the file that is to be made, in bytes; holes included.
    pub size: u64,
    /// Target of a symbolic or hard link.
    pub link: Vec<u8>,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes by their full name ("security.capability").
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Where the contents lie in a file with holes; `None`: from its start to its end.
    pub segments: Option<Vec<Segment>>,
}

/// A tar stream.
pub struct Archive<R> {
    reader: R,
    /// Bytes read so far.
    offset: u64,
    /// Contents of the current entry still to be read, in bytes.
    remaining: u64,
    /// Bytes after the contents, up to the next record.
    padding: u64,
    ended: bool,
}

impl<R: Read> Archive<R> {
    /// Reads an archive from the beginning of `reader`.
    pub fn new(reader: R) -> Self {
        Self { reader, offset: 0, remaining: 0, padding: 0, ended: false }
    }

    /// Goes to the next entry, past whatever is left of the current one; `None` at the end.
    ///
    /// # Errors
    /// When the stream ends inside an entry, a header is damaged, or it uses something unknown.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        let mut pax: Option<Pax> = None;
        let mut long_name: Option<Vec<u8>> = None;
        let mut long_link: Option<Vec<u8>> = None;
        loop {
            self.skip_rest()?;
            let at = self.offset;
            let Some(block) = self.header_block()? else {
                ensure!(
                    pax.is_none() && long_name.is_none() && long_link.is_none(),
                    "the archive ends after an extended header"
                );
                return Ok(None);
            };
            let header = Header(&block);
            let name = header.path();
            let context = || format!("the tar header at byte {at} ({})", show(&name));
            header.verify().with_context(context)?;
            let size = header.size().with_context(context)?;
            match header.flag() {
                flag @ (b'x' | b'g' | b'L' | b'K') => {
                    let data = self.extension(size).with_context(context)?;
                    match flag {
                        b'x' => pax = Some(Pax::parse(&data).with_context(context)?),
                        b'L' => long_name = Some(cut(&data).to_vec()),
                        b'K' => long_link = Some(cut(&data).to_vec()),
                        // No container runtime applies global headers, so no image relies on them.
                        _ => {}
                    }
                }
                b'V' => self.set_contents(size)?,
                _ => {
                    let path = pax.as_ref().and_then(|p| p.path.clone()).or(long_name).unwrap_or(name);
                    let shown = show(&path);
                    let entry = self.entry(&header, size, path, pax.unwrap_or_default(), long_link);
                    return entry.with_context(|| format!("the tar entry {shown} at byte {at}")).map(Some);
                }
            }
        }
    }

    fn entry(
        &mut self,
        header: &Header<'_>,
        size: u64,
        mut path: Vec<u8>,
        pax: Pax,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry> {
        let is_sparse = pax.sparse.is_sparse();
        if is_sparse && let Some(name) = &pax.sparse.name {
            path.clone_from(name);
        }
        let kind = match header.flag() {
            0 | b'0' | b'7' | b'S' if path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => bail!("entries of type {:?} are not supported", char::from(other)),
        };
        // Only files have contents: other types leave the field undefined, as every reader takes it.
        let stored = if kind == Kind::File { pax.size.unwrap_or(size) } else { 0 };
        let mut real = stored;
        let mut segments = None;
        self.set_contents(stored)?;
        if kind == Kind::File && header.flag() == b'S' {
            let (map, size) = self.old_sparse_map(header)?;
            real = size;
            segments = Some(sparse::check(map, real, self.remaining)?);
        } else if kind == Kind::File && is_sparse {
            let map = match pax.sparse.map()? {
                Some(map) => map,
                None => self.sparse_map_1_0()?,
            };
            real = pax.sparse.real_size.context("a sparse file without its real size")?;
            segments = Some(sparse::check(map, real, self.remaining)?);
        }
        let device = match kind {
            Kind::CharDevice | Kind::BlockDevice => (header.number_u32(329, 8)?, header.number_u32(337, 8)?),
            _ => (0, 0),
        };
        let mode = header.number(100, 8).context("its mode")?;
        Ok(Entry {
            path,
            kind,
            mode: (mode & 0o7777) as u16,
            uid: pax.uid.map_or_else(|| header.number_u32(108, 8), Ok).context("its user id")?,
            gid: pax.gid.map_or_else(|| header.number_u32(116, 8), Ok).context("its group id")?,
            mtime: match pax.mtime {
                Some(time) => time,
                None => Time { seconds: signed(header.field(136, 12)).context("its time")?, nanoseconds: 0 },
            },
            size: real,
            link: pax.link.or(long_link).unwrap_or_else(|| cut(header.field(157, 100)).to_vec()),
            device,
            xattrs: pax.xattrs,
            segments,
        })
    }

    /// Reads the current entry's stored contents (a sparse file's holes are not among them); 0 at their end.
    ///
    /// # Errors
    /// When the stream fails or ends before the contents do.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let want = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(buffer.len());
        let buffer = buffer.get_mut(..want).unwrap_or_default();
        if buffer.is_empty() {
            return Ok(0);
        }
        let got = self.read_some(buffer)?;
        ensure!(got > 0, "the archive is truncated: {} bytes of this entry are missing", self.remaining);
        self.remaining -= got as u64;
        Ok(got)
    }

    /// Reads whatever follows the archive, so that a digest over the stream becomes whole.
    ///
    /// # Errors
    /// When the stream fails, or what follows is longer than any padding.
    pub fn drain(&mut self) -> Result<()> {
        let mut buffer = vec![0; 64 << 10];
        let start = self.offset;
        while self.read_some(&mut buffer)? > 0 {
            ensure!(self.offset - start <= MAX_TRAILER, "more than {MAX_TRAILER} bytes follow the archive's end");
        }
        Ok(())
    }

    fn read_some(&mut self, buffer: &mut [u8]) -> Result<usize> {
        loop {
            match self.reader.read(buffer) {
                Ok(got) => {
                    self.offset += got as u64;
                    return Ok(got);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot read the archive"),
            }
        }
    }

    /// One record; `None` when the stream ends before its first byte.
    fn record(&mut self) -> Result<Option<[u8; RECORD]>> {
        let mut block = [0; RECORD];
        let mut filled = 0;
        while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.read_some(rest)? {
                0 if filled == 0 => return Ok(None),
                0 => bail!("the archive is truncated: it ends inside a record at byte {}", self.offset),
                got => filled += got,
            }
        }
        Ok(Some(block))
    }

    /// The next header; `None` at the end mark or where the stream ends between two entries.
    fn header_block(&mut self) -> Result<Option<[u8; RECORD]>> {
        const ZERO: [u8; RECORD] = [0; RECORD];
        if self.ended {
            return Ok(None);
        }
        let block = self.record()?;
        if block.is_none_or(|block| block == ZERO) {
            self.ended = true;
            if block.is_some() {
                let next = self.record()?;
                ensure!(
                    next.is_none_or(|next| next == ZERO),
                    "a lone record of zeros stands before byte {}",
                    self.offset
                );
            }
            return Ok(None);
        }
        Ok(block)
    }

    fn set_contents(&mut self, size: u64) -> Result<()> {
        ensure!(size <= i64::MAX as u64, "its size, {size}, is out of range");
        self.remaining = size;
        self.padding = size.next_multiple_of(RECORD as u64) - size;
        Ok(())
    }

    fn skip_rest(&mut self) -> Result<()> {
        let mut buffer = [0; 16 << 10];
        while self.read(&mut buffer)? > 0 {}
        while self.padding > 0 {
            let want = usize::try_from(self.padding).unwrap_or(usize::MAX).min(RECORD);
            match self.read_some(buffer.get_mut(..want).unwrap_or_default())? {
                // Some tools end the archive with the last byte of the last file; nothing is missing then.
                0 => (self.padding, self.ended) = (0, true),
                got => self.padding -= got as u64,
            }
        }
        Ok(())
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>> {
        ensure!(size <= MAX_EXTENSION, "an extended header of {size} bytes is too long: the limit is {MAX_EXTENSION}");
        self.set_contents(size)?;
        let mut data = vec![0; size as usize];
        let mut filled = 0;
        while filled < data.len() {
            filled += self.read(&mut data[filled..])?;
        }
        Ok(data)
    }

    /// The map of GNU's first format: four segments in the header, then records of 21 as long as a flag says so.
    fn old_sparse_map(&mut self, header: &Header<'_>) -> Result<(Vec<Segment>, u64)> {
        let mut map = Vec::new();
        let mut more = sparse::old_segments(header.field(386, 4 * 24), &mut map)? && header.field(482, 1) != [0];
        while more {
            let Some(block) = self.record()? else { bail!("the archive is truncated in a sparse file's map") };
            more = sparse::old_segments(&block[..21 * 24], &mut map)? && block[21 * 24] != 0;
        }
        Ok((map, header.number(483, 12).context("its real size")?))
    }

    /// The map of GNU's format 1.0: decimal lines before the contents, padded to a record.
    fn sparse_map_1_0(&mut self) -> Result<Vec<Segment>> {
        let mut parser = sparse::MapParser::default();
        loop {
            let mut block = [0; RECORD];
            let mut filled = 0;
            while filled < RECORD {
                let got = self.read(&mut block[filled..])?;
                ensure!(got > 0, "a sparse file's map is longer than the file's contents");
                filled += got;
            }
            if let Some(map) = parser.feed(&block)? {
                return Ok(map);
            }
        }
    }
}

/// A path from an archive for a message: control and non-UTF-8 bytes do not reach the terminal.
pub fn show(path: &[u8]) -> String {
    let (head, rest) = path.split_at(path.len().min(256));
    format!("\"{}\"{}", String::from_utf8_lossy(head).escape_debug(), if rest.is_empty() { "" } else { "…" })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ustar entry with its contents, padded.
    fn entry(path: &str, contents: &[u8]) -> Vec<u8> {
        let mut block = vec![0; RECORD];
        block[..path.len()].copy_from_slice(path.as_bytes());
        block[100..107].copy_from_slice(b"0000644");
        block[108..115].copy_from_slice(b"0000000");
        block[116..123].copy_from_slice(b"0000000");
        block[124..135].copy_from_slice(format!("{:011o}", contents.len()).as_bytes());
        block[136..147].copy_from_slice(b"00000000000");
        block[156] = b'0';
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block.extend_from_slice(contents);
        block.resize(block.len().next_multiple_of(RECORD), 0);
        block
    }

    fn read(bytes: &[u8]) -> Result<Vec<(String, u64)>> {
        let mut archive = Archive::new(bytes);
        let mut found = Vec::new();
        while let Some(entry) = archive.next_entry()? {
            let mut length = 0;
            let mut buffer = [0; 100];
            loop {
                match archive.read(&mut buffer)? {
                    0 => break,
                    got => length += got as u64,
                }
            }
            found.push((String::from_utf8_lossy(&entry.path).into_owned(), length));
        }
        archive.drain()?;
        Ok(found)
    }

    #[test]
    fn an_archive_without_its_last_padding_is_whole_and_one_without_contents_is_not() {
        let whole = [entry("a", b"one"), entry("b", &[7; 1000]), vec![0; 1024]].concat();
        let expected = vec![("a".to_string(), 3), ("b".to_string(), 1000)];
        assert_eq!(read(&whole).unwrap(), expected);
        // From the end of b's contents on, every cut leaves both files whole; a cut in the end mark is a damaged one.
        let contents_end = 512 + 512 + 512 + 1000;
        for cut in [contents_end, contents_end + 10, contents_end + 24, contents_end + 24 + 512] {
            assert_eq!(read(&whole[..cut]).unwrap(), expected, "{cut}");
        }
        for cut in [1, 511, 513, 1024 + 1, contents_end - 1, contents_end + 24 + 100] {
            assert!(read(&whole[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn a_damaged_archive_never_panics() {
        let whole = [entry("dir/file", &[1; 700]), entry("other", b""), vec![0; 1024]].concat();
        let mut state = 1_u64;
        for _ in 0..20_000 {
            let mut bytes = whole.clone();
            for _ in 0..3 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (state >> 33) as usize % bytes.len();
                bytes[at] = (state >> 20) as u8;
            }
            let _ = read(&bytes);
        }
    }
}
