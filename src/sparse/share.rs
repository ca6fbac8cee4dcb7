//! Blocks that two files hold alike are kept once, where the file system can share them.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::ioctl::{Updater, ioctl, opcode};

use super::{BLOCK, next_data};

/// Bytes that are compared at once: each request has a price, and file systems take no more than this in one
/// (BTRFS_MAX_DEDUPE_LEN).
const PIECE: usize = 16 << 20;
/// Shorter runs are left: each would be an extent of its own.
const SHORTEST: usize = 8 * BLOCK;

/// `struct file_dedupe_range` (linux/fs.h) with one target.
#[repr(C)]
struct Request {
    source_offset: u64,
    length: u64,
    targets: u16,
    reserved: [u16; 3],
    target: i64,
    target_offset: u64,
    shared: u64,
    status: i32,
    reserved_too: u32,
}

/// FIDEDUPERANGE (linux/fs.h); its number counts the structure without the target.
const DEDUPE: u32 = opcode::read_write::<[u64; 3]>(0x94, 54);
const _: () = assert!(size_of::<Request>() == 56);

/// Lets `newer` share what it holds at the same places as `older`; returns how many bytes it does. The kernel compares
/// once more, so that neither file ever reads differently (ioctl_fideduperange(2)).
///
/// # Errors
/// When a file cannot be read. A file system that cannot share is no error.
pub fn share_equal(older: &File, newer: &File) -> io::Result<u64> {
    // Once for all of it: what is not on the disk yet would be written at each request for its own part.
    newer.sync_data()?;
    let length = older.metadata()?.len().min(newer.metadata()?.len());
    let (mut one, mut other) = (vec![0; PIECE], vec![0; PIECE]);
    let (mut at, mut shared) = (0, 0);
    while let Some((start, end)) = next_data(newer, at, length)? {
        at = start - start % BLOCK as u64;
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
            let got = newer.read_at(&mut one[..want], at)?.min(older.read_at(&mut other[..want], at)?);
            if got == 0 {
                return Ok(shared);
            }
            for (from, until) in equal_runs(&one[..got], &other[..got]) {
                match share(older, newer, at + from as u64, (until - from) as u64) {
                    Ok(bytes) => shared += bytes,
                    // It cannot, or no longer: what is shared so far stays so.
                    Err(_) => return Ok(shared),
                }
            }
            at += got as u64;
        }
    }
    Ok(shared)
}

/// Where whole blocks are equal, as far as that is worth it.
fn equal_runs(one: &[u8], other: &[u8]) -> Vec<(usize, usize)> {
    let mut runs = Vec::new();
    let mut begin = None;
    let blocks = one.len() / BLOCK;
    for number in 0..=blocks {
        let range = number * BLOCK..(number + 1) * BLOCK;
        let equal = number < blocks && one[range.clone()] == other[range];
        match (equal, begin) {
            (true, None) => begin = Some(number * BLOCK),
            (false, Some(from)) => {
                if number * BLOCK - from >= SHORTEST {
                    runs.push((from, number * BLOCK));
                }
                begin = None;
            }
            _ => {}
        }
    }
    runs
}

fn share(older: &File, newer: &File, offset: u64, length: u64) -> io::Result<u64> {
    let mut request = Request {
        source_offset: offset,
        length,
        targets: 1,
        reserved: [0; 3],
        target: newer.as_raw_fd().into(),
        target_offset: offset,
        shared: 0,
        status: 0,
        reserved_too: 0,
    };
    // SAFETY: the kernel reads and writes a file_dedupe_range with as many targets as it says: one.
    unsafe { ioctl(older, Updater::<DEDUPE, Request>::new(&mut request)) }?;
    if request.status < 0 {
        return Err(io::Error::from_raw_os_error(-request.status));
    }
    Ok(request.shared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_runs_of_equal_blocks_are_found() {
        let one = vec![1; 40 * BLOCK + 5];
        let mut other = one.clone();
        assert_eq!(equal_runs(&one, &other), [(0, 40 * BLOCK)]);
        other[10 * BLOCK + 3] = 2;
        assert_eq!(equal_runs(&one, &other), [(0, 10 * BLOCK), (11 * BLOCK, 40 * BLOCK)]);
        for number in 0..40 {
            other[number * BLOCK] = if number % 8 == 7 { 2 } else { 1 };
        }
        other[10 * BLOCK + 3] = 1;
        assert_eq!(equal_runs(&one, &other), []);
        assert_eq!(equal_runs(&[], &[]), []);
    }

    #[test]
    fn both_files_read_as_before() {
        let (older, newer) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let bytes = vec![3; 1 << 20];
        older.write_all_at(&bytes, 0).unwrap();
        newer.write_all_at(&bytes, 0).unwrap();
        newer.write_all_at(b"other", 500_000).unwrap();
        let shared = share_equal(&older, &newer).unwrap();
        assert!(shared <= (1 << 20) - BLOCK as u64);
        let mut read = vec![0; 1 << 20];
        older.read_exact_at(&mut read, 0).unwrap();
        assert_eq!(read, bytes);
        newer.read_exact_at(&mut read, 0).unwrap();
        assert_eq!((&read[500_000..500_005], &read[..500_000]), (&b"other"[..], &bytes[..500_000]));
    }
}
