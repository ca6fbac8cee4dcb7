//! Whether a snapshot's files are what was written. A checksum tells for sure and reads everything; a file that has not
//! been touched since it was last checked need not be read, so a clone starts at once.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{DISK, Snapshot};
use crate::hypervisor::snapshot::{FILES, MEMORY};
use crate::sparse::{self, next_data};
use crate::vm::home::Home;
use crate::vm::{Hint, cancel};

/// Blocks that are hashed or left out as a whole, in bytes.
const BLOCK: usize = 4096;
/// Bytes that are read at once.
const PIECE: usize = 1 << 20;

/// What a file must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    pub size: u64,
    /// SHA-256 over the numbers and bytes of the blocks that are not all zero; absent where nobody took it.
    pub sha256: Option<String>,
    /// The file as it was when it was last known to be right.
    seen: Seen,
}

/// What the file system tells of a file, and changes with every write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    inode: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Seen {
    fn of(metadata: &fs::Metadata) -> Seen {
        Seen {
            inode: metadata.ino(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// Notes what the files in the new snapshot's directory are; with `sums` their checksums too, and all of it on the disk.
/// Memory that is as in `older` is shared with that where it can be.
///
/// # Errors
/// When a file cannot be read.
pub fn seal(snapshot: &mut Snapshot, directory: &Path, older: Option<&Path>, sums: bool) -> Result<()> {
    for name in FILES.into_iter().chain([DISK]) {
        let path = directory.join(name);
        if !path.exists() {
            continue;
        }
        let what = || format!("cannot read {}", path.display());
        let file = File::open(&path).with_context(what)?;
        if sums && name == MEMORY {
            // A hypervisor that maps its memory privately writes all of it.
            dig(&path).with_context(|| format!("cannot write {}", path.display()))?;
            if let Some(older) = older.and_then(|older| File::open(older).ok()) {
                let own = File::options().read(true).write(true).open(&path).with_context(what)?;
                snapshot.shared = sparse::share_equal(&older, &own).with_context(what)?;
            }
        }
        if sums || name == DISK {
            crate::failpoint::write()
                .and_then(|()| file.sync_all())
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        let sha256 = if sums { Some(sum(&file).with_context(what)?) } else { None };
        let metadata = file.metadata().with_context(what)?;
        snapshot.files.insert(name.into(), Mark { size: metadata.len(), sha256, seen: Seen::of(&metadata) });
    }
    Ok(())
}

/// Makes holes of what is all zero, in pieces that are worth it.
fn dig(path: &Path) -> std::io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    /// Bytes: less would only scatter the file.
    const WORTH: usize = 64 << 10;
    let file = File::options().read(true).write(true).open(path)?;
    let length = file.metadata()?.len();
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while let Some((start, end)) = next_data(&file, at, length)? {
        at = start - start % WORTH as u64;
        while at < end {
            let got = read_full(&file, &mut buffer, at)?;
            if got == 0 {
                return Ok(());
            }
            for (number, piece) in buffer[..got].chunks(WORTH).enumerate() {
                if piece.iter().all(|&byte| byte == 0) {
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    let from = at + (number * WORTH) as u64;
                    match fallocate(&file, flags, from, piece.len() as u64) {
                        // The file system knows no holes.
                        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(()),
                        other => other?,
                    }
                }
            }
            at += got as u64;
        }
    }
    Ok(())
}

/// Checks the files that a restore reads: all of them, or the disk alone.
///
/// # Errors
/// When one is missing, or is not what was written; the error names it.
pub fn verify(home: &Home, snapshot: &Snapshot, disk_only: bool) -> Result<()> {
    let directory = snapshot.directory(home);
    let mut again = snapshot.clone();
    for (name, mark) in &snapshot.files {
        if disk_only && name != DISK {
            continue;
        }
        let path = directory.join(name);
        let damaged = |why: String| {
            Err::<(), _>(anyhow!("the snapshot {} is damaged: {} {why}", snapshot.origin, path.display()))
                .hint(format!("restore the file from a copy, or remove it: puter snapshot delete {}", snapshot.origin))
        };
        let metadata = match fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) => return damaged(format!("cannot be read: {error}")),
        };
        if metadata.len() != mark.size {
            return damaged(format!("has {} bytes instead of {}", metadata.len(), mark.size));
        }
        let seen = Seen::of(&metadata);
        if seen == mark.seen {
            continue;
        }
        let Some(expected) = &mark.sha256 else {
            return damaged("was changed since it was taken".into());
        };
        let found =
            File::open(&path).and_then(|file| sum(&file)).with_context(|| format!("cannot read {}", path.display()))?;
        if found != *expected {
            return damaged("is not what was written: its checksum differs".into());
        }
        again.files.insert(name.clone(), Mark { seen, ..mark.clone() });
    }
    for name in [DISK].into_iter().chain(snapshot.memory.iter().map(|_| crate::hypervisor::snapshot::CONFIG)) {
        ensure!(snapshot.files.contains_key(name), "the snapshot {} tells nothing of its {name}", snapshot.origin);
    }
    if again != *snapshot {
        // Only so that the next time is quick.
        let _ = again.save(&directory);
    }
    Ok(())
}

fn sum(file: &File) -> std::io::Result<String> {
    let length = file.metadata()?.len();
    let mut hash = Sha256::new();
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while let Some((start, end)) = next_data(file, at, length)? {
        // From the block's begin: where data starts within one depends on the file system.
        at = start - start % BLOCK as u64;
        while at < end {
            if cancel::check().is_err() {
                return Err(std::io::ErrorKind::Interrupted.into());
            }
            let got = read_full(file, &mut buffer, at)?;
            if got == 0 {
                break;
            }
            for (number, block) in buffer[..got].chunks(BLOCK).enumerate() {
                if block.iter().any(|&byte| byte != 0) {
                    hash.update((at / BLOCK as u64 + number as u64).to_le_bytes());
                    hash.update(block);
                }
            }
            at += got as u64;
        }
        at = at.max(end);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Fills the buffer but at the end of the file.
fn read_full(file: &File, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(got) => filled += got,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn zeros_give_their_place_back_and_all_reads_as_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let mut bytes = vec![0; 8 << 20];
        bytes[3_000_000..3_000_100].fill(7);
        fs::write(&path, &bytes).unwrap();
        dig(&path).unwrap();
        assert!(fs::read(&path).unwrap() == bytes);
        assert!(fs::metadata(&path).unwrap().blocks() * 512 <= 128 << 10);
    }

    #[test]
    fn a_sum_is_of_what_is_read_and_not_of_how_it_is_stored() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, fill: bool| {
            let file =
                File::options().create(true).read(true).write(true).truncate(true).open(dir.path().join(name)).unwrap();
            file.set_len(3 << 20).unwrap();
            if fill {
                file.write_all_at(&vec![0; 2 << 20], 4096).unwrap();
            }
            file.write_all_at(&[7; 10], 1_500_001).unwrap();
            file.write_all_at(b"end", (3 << 20) - 3).unwrap();
            file
        };
        let (holes, filled) = (file("holes", false), file("filled", true));
        let first = sum(&holes).unwrap();
        assert_eq!(first, sum(&filled).unwrap());
        filled.write_all_at(&[1], 2_000_000).unwrap();
        assert_ne!(first, sum(&filled).unwrap());
        // The same bytes in another place.
        holes.write_all_at(&[0; 10], 1_500_001).unwrap();
        holes.write_all_at(&[7; 10], 500_001).unwrap();
        assert_ne!(first, sum(&holes).unwrap());
    }
}
