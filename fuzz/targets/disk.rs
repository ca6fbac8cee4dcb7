//! Overlays and what they stand on, damaged: three files, written in pieces of `file (one byte), offset (four bytes), bytes`.
//! The lowest is raw, and names of backing files are relative.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use puter::disk::chain::Chain;
use puter::disk::qcow2::{self, Format};

use crate::{pieces, readable, scratch};

const NAMES: [&str; 3] = ["top.qcow2", "mid.qcow2", "base.raw"];
/// Files are no longer than this.
const LONGEST: u32 = 512 << 10;
/// Larger disks are not copied.
const COPIED: u64 = 1 << 30;
const BASE: u64 = 1 << 20;

pub fn run(input: &[u8]) {
    let directory = scratch::empty();
    let files = NAMES.map(|name| File::create_new(directory.join(name)).expect("a file"));
    files[2].set_len(BASE).expect("room");
    for piece in pieces(input) {
        let Some((head, bytes)) = piece.split_first_chunk::<5>() else { continue };
        let offset = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) % LONGEST;
        files[usize::from(head[0]) % files.len()].write_all_at(bytes, offset.into()).expect("room");
    }
    // A header that counts on a hole of the file's end is as long as the file.
    let top = directory.join(NAMES[0]);
    let length = files[0].metadata().expect("a file").len().next_multiple_of(1 << 16);
    files[0].set_len(length).expect("room");
    let before = scratch::listing(&directory);
    read(&directory, &top);
    assert!(scratch::listing(&directory) == before, "reading has changed something");
    grow(&directory, &top);
}

fn read(directory: &Path, top: &Path) {
    let header = match qcow2::read_header(top) {
        Ok(header) => header,
        Err(error) => return readable(&error),
    };
    if let Some(backing) = &header.backing {
        assert!(backing.is_absolute(), "{}", backing.display());
    }
    let mut chain = match Chain::open(top) {
        Ok(chain) => chain,
        Err(error) => return readable(&error),
    };
    assert_eq!(chain.size(), header.size);
    assert!((1..=64).contains(&chain.depth()));
    // What is read in pieces is what is read at once.
    let mut whole = vec![1; 150_000];
    if chain.read_at(&mut whole, 40_000).is_ok() {
        let mut piece = vec![2; 70_000];
        chain.read_at(&mut piece, 100_000).expect("what could be read");
        assert!(piece == whole[60_000..130_000]);
    }
    if header.size <= COPIED {
        let flat = directory.join("flat.qcow2");
        match chain.flatten(&flat) {
            Ok(()) => {
                same(&mut chain, &mut Chain::open(&flat).expect("what was written"));
                // A new overlay over it shows the same.
                let over = directory.join("over.qcow2");
                if qcow2::create_overlay(&over, &flat, Format::Qcow2, header.size).is_ok() {
                    same(&mut chain, &mut Chain::open(&over).expect("what was written"));
                    fs::remove_file(&over).expect("a file");
                }
                fs::remove_file(&flat).expect("a file");
            }
            Err(error) => {
                readable(&error);
                assert!(!flat.exists() || error.to_string().contains("exists"), "{error:#}");
            }
        }
    }
}

/// Compares the beginning, the end, and places between.
fn same(one: &mut Chain, other: &mut Chain) {
    let size = one.size();
    assert_eq!(size, other.size());
    for part in 0..16 {
        let at = (size / 16 * part) & !511;
        // The first tables and clusters are where the pieces of an input lie.
        let most = if part == 0 { 300_000 } else { 5000 };
        let length = usize::try_from((size - at).min(most)).expect("a length");
        let (mut ours, mut theirs) = (vec![1; length], vec![2; length]);
        one.read_at(&mut ours, at).expect("what was copied");
        other.read_at(&mut theirs, at).expect("what was written");
        assert!(ours == theirs, "at {at}");
    }
}

/// A disk that has grown shows what it did; one that has not is as it was.
fn grow(directory: &Path, top: &Path) {
    let former = fs::read(top).expect("a file");
    let Ok(header) = qcow2::read_header(top) else { return };
    let mut was = vec![0; 200_000];
    let readable_before = Chain::open(top).and_then(|mut chain| Ok(chain.read_at(&mut was, 0)?));
    let wanted = header.size.saturating_add(600 << 20) & !511;
    match qcow2::grow(top, wanted) {
        Err(error) => {
            readable(&error);
            assert!(fs::read(top).expect("a file") == former, "what was refused has changed the disk");
        }
        Ok(()) => {
            assert_eq!(qcow2::read_header(top).expect("a header").size, wanted);
            let now = fs::read(top).expect("a file");
            // What is written is the header's fields, and zeros behind the table: where those were zeros before, the
            // guest sees no change in what it had.
            let changed =
                (0..former.len()).filter(|&at| now.get(at) != former.get(at) && !(24..40).contains(&at)).count();
            if let (0, Ok(())) = (changed, readable_before) {
                let mut is = vec![1; was.len()];
                Chain::open(top).and_then(|mut chain| Ok(chain.read_at(&mut is, 0)?)).expect("what could be read");
                let had = usize::try_from(header.size).unwrap_or(usize::MAX).min(was.len());
                assert!(was[..had] == is[..had]);
            }
        }
    }
    assert!(fs::read_dir(directory).expect("a directory").count() == NAMES.len());
}
