//! Copies of large files that cost what they hold: shared by the file system where it can, without their holes
//! elsewhere.

mod share;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{Mode, OFlags, SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;

use crate::failpoint;

pub use share::share_equal;

/// Bytes that are read at once.
const PIECE: usize = 1 << 20;
/// What is all zero in this size becomes a hole: a page of memory, a block of most file systems.
const BLOCK: usize = 4096;

/// How a copy came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The file system shares the blocks of both files (ioctl_ficlone(2)): nothing was read or written.
    Shared,
    /// So many bytes were written.
    Written(u64),
}

/// Makes `to` a copy of `from`, mode 0600; it must not exist. Nothing is synced.
///
/// # Errors
/// When a file cannot be read or written; `to` is then not there.
pub fn copy_file(from: &Path, to: &Path) -> io::Result<How> {
    failpoint::write()?;
    let source = File::open(from)?;
    let target = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(to)?;
    let copied = match ioctl_ficlone(&target, &source) {
        Ok(()) => Ok(How::Shared),
        // The file system cannot, the two are on different ones, or one is no ordinary file.
        Err(_) => copy(&source, &target).map(How::Written),
    };
    copied.inspect_err(|_| drop(std::fs::remove_file(to)))
}

/// Whether two files in this directory can share blocks (ioctl_ficlone(2)).
///
/// # Errors
/// When no file can be made there.
pub fn shares(directory: &Path) -> io::Result<bool> {
    failpoint::write()?;
    // Neither has a name, so nothing is left of them.
    let open =
        || rustix::fs::open(directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
    let (one, other) = match (open(), open()) {
        (Ok(one), Ok(other)) => (File::from(one), File::from(other)),
        // A file system that has no such files shares no blocks either.
        (Err(Errno::OPNOTSUPP), _) => return Ok(false),
        (one, other) => return Err(one.and(other).err().unwrap_or(Errno::IO).into()),
    };
    one.write_all_at(&[1; BLOCK], 0)?;
    Ok(ioctl_ficlone(&other, &one).is_ok())
}

/// Copies what `from` holds to the same places of `to`, which reads as zeros there, and gives `to` the same length.
/// Returns how many bytes were written.
///
/// # Errors
/// When reading or writing fails.
pub fn copy(from: &File, to: &File) -> io::Result<u64> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut buffer = vec![0; PIECE];
    let (mut at, mut written) = (0, 0);
    while let Some((start, end)) = next_data(from, at, length)? {
        at = start;
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
            let got = from.read_at(&mut buffer[..want], at)?;
            if got == 0 {
                return Ok(written);
            }
            written += write_data(to, &buffer[..got], at)?;
            at += got as u64;
        }
    }
    Ok(written)
}

/// Writes the blocks that are not all zero, neighbours at once.
fn write_data(to: &File, bytes: &[u8], at: u64) -> io::Result<u64> {
    let zero = |block: &[u8]| block.iter().all(|&byte| byte == 0);
    let (mut written, mut begin) = (0, None);
    let mut put = |from: usize, until: usize| -> io::Result<()> {
        to.write_all_at(&bytes[from..until], at + from as u64)?;
        written += (until - from) as u64;
        Ok(())
    };
    for (number, block) in bytes.chunks(BLOCK).enumerate() {
        match (zero(block), begin) {
            (false, None) => begin = Some(number * BLOCK),
            (true, Some(from)) => {
                put(from, number * BLOCK)?;
                begin = None;
            }
            _ => {}
        }
    }
    if let Some(from) = begin {
        put(from, bytes.len())?;
    }
    Ok(written)
}

/// The next part of the file that holds data (lseek(2), SEEK_DATA); `None` where only a hole is left.
///
/// # Errors
/// When the kernel refuses.
pub fn next_data(file: &File, at: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= length {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // Where holes are not known, all is data.
        Err(Errno::INVAL) => return Ok(Some((at, length))),
        Err(error) => return Err(error.into()),
    };
    let end = seek(file, SeekFrom::Hole(start))?;
    Ok(Some((start, end.min(length))).filter(|(start, end)| start < end))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_reads_the_same_and_keeps_holes_and_zeros_out_of_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 5000], 12_345).unwrap();
        file.write_all_at(&vec![0; 8 << 20], 16 << 20).unwrap();
        file.write_all_at(b"end", (64 << 20) - 3).unwrap();
        let how = copy_file(&from, &to).unwrap();
        assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        if let How::Written(bytes) = how {
            assert!(bytes < 64 << 10, "{bytes}");
            assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
        }
        assert!(copy_file(&from, &to).is_err(), "an existing file is never overwritten");
        assert_eq!(std::fs::metadata(&to).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn an_empty_file_and_one_of_holes_alone_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        for length in [0, 1, 4096, 10 << 20] {
            let from = dir.path().join(format!("from{length}"));
            File::create(&from).unwrap().set_len(length).unwrap();
            let to = dir.path().join(format!("to{length}"));
            copy_file(&from, &to).unwrap();
            assert_eq!(std::fs::metadata(&to).unwrap().len(), length);
        }
    }
}
