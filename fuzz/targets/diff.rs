//! A guest's file system as `puter diff` reads it: pieces of `offset (four bytes), bytes` over a small one that puter has
//! made, which is then compared with the whole one.

use std::error::Error;
use std::fs::File;
use std::io::{Read, Seek};
use std::sync::LazyLock;

use ext4_view::Ext4Read;
use puter::image::layers::{Converter, Limits, Options};
use puter::vm::diff::{Change, Kind, compare, load};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::{pieces, readable};

/// What it is made of.
const LAYER: &[u8] = include_bytes!("../seeds/layers/long-names");

/// What the file system holds, up to its last byte that is not zero, and its size.
static WHOLE: LazyLock<(Vec<u8>, u64)> = LazyLock::new(|| {
    let mut image = File::from(memfd_create("image", MemfdFlags::CLOEXEC).expect("a memfd"));
    let limits = Limits { entries: 2000, bytes: 1 << 34, stored: 16 << 20 };
    let options = Options { uuid: [7; 16], label: "fuzz".into(), spare: 0, limits };
    let mut converter = Converter::new(image.try_clone().expect("a file"), options).expect("a converter");
    let mut layer = LAYER[2..].to_vec();
    crate::archive::seal(&mut layer);
    converter.apply(&layer[..]).expect("a layer");
    converter.finish().expect("a file system");
    let mut bytes = Vec::new();
    image.rewind().expect("a file");
    image.read_to_end(&mut bytes).expect("a file system");
    let size = bytes.len() as u64;
    bytes.truncate(bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1));
    bytes.shrink_to_fit();
    // Without sums of its parts, which a fuzzer does not find (metadata_csum of s_feature_ro_compat).
    bytes[1024 + 0x65] &= !4;
    (bytes, size)
});

/// The file system with other bytes in some places.
struct Damaged(Vec<(u64, Vec<u8>)>);

impl Ext4Read for Damaged {
    fn read(&mut self, start: u64, buffer: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        let (bytes, size) = &*WHOLE;
        let end = start.checked_add(buffer.len() as u64).filter(|end| end <= size).ok_or("beyond the end")?;
        buffer.fill(0);
        let damage = self.0.iter().map(|(at, piece)| (*at, &piece[..]));
        for (at, piece) in std::iter::once((0, &bytes[..])).chain(damage) {
            let (from, to) = (start.max(at), end.min(at + piece.len() as u64));
            if from < to {
                let length = (to - from) as usize;
                buffer[(from - start) as usize..][..length].copy_from_slice(&piece[(from - at) as usize..][..length]);
            }
        }
        Ok(())
    }
}

pub fn run(input: &[u8]) {
    let mut damage = Vec::new();
    for piece in pieces(input) {
        let Some((offset, bytes)) = piece.split_first_chunk::<4>() else { continue };
        damage.push((u64::from(u32::from_be_bytes(*offset)) % WHOLE.0.len() as u64, bytes.to_vec()));
    }
    let whole = load(Damaged(Vec::new()), WHOLE.1).expect("a file system that is whole");
    let Ok(other) = load(Damaged(damage), WHOLE.1) else { return };
    match (compare(&whole, &other), compare(&other, &whole)) {
        (Ok(there), Ok(back)) => {
            // The other way round, all is told the other way round.
            assert_eq!(there.len(), back.len());
            let turned = |one: &Change, other: &Change| match (one.kind, other.kind) {
                (Kind::Added, Kind::Deleted) | (Kind::Deleted, Kind::Added) | (Kind::Modified, Kind::Modified) => {
                    one.size == [other.size[1], other.size[0]]
                }
                _ => false,
            };
            assert!(there.iter().zip(&back).all(|(one, other)| turned(one, other)));
        }
        (Err(error), Err(_)) => readable(&error),
        (one, other) => panic!("{:?} one way, {:?} the other", one.is_ok(), other.is_ok()),
    }
    assert!(compare(&other, &other).is_ok_and(|changes| changes.is_empty()) || compare(&other, &whole).is_err());
}
