//! A guest's file system as `puter diff` reads it: pieces of `offset (four bytes), bytes` over a small one that puter has
//! made, which is then compared with the whole one.

use std::fs::File;
use std::io::{Read, Seek};
use std::sync::LazyLock;

use ext4_view::Ext4;
use puter::image::layers::{Converter, Limits, Options};
use puter::vm::diff::{Change, Kind, compare};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::{pieces, readable};

/// What it is made of.
const LAYER: &[u8] = include_bytes!("../seeds/layers/long-names");

static WHOLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let image = File::from(memfd_create("image", MemfdFlags::CLOEXEC).expect("a memfd"));
    let limits = Limits { entries: 2000, bytes: 1 << 34, stored: 16 << 20 };
    let options = Options { uuid: [7; 16], label: "fuzz".into(), spare: 0, limits };
    let mut converter = Converter::new(image.try_clone().expect("a file"), options).expect("a converter");
    let mut layer = LAYER[2..].to_vec();
    crate::archive::seal(&mut layer);
    converter.apply(&layer[..]).expect("a layer");
    converter.finish().expect("a file system");
    let mut bytes = Vec::new();
    (&image).rewind().expect("a file");
    (&image).read_to_end(&mut bytes).expect("a file system");
    // Without sums of its parts, which a fuzzer does not find (metadata_csum of s_feature_ro_compat).
    bytes[1024 + 0x65] &= !4;
    bytes
});

pub fn run(input: &[u8]) {
    let mut damaged = WHOLE.clone();
    for piece in pieces(input) {
        let Some((offset, bytes)) = piece.split_first_chunk::<4>() else { continue };
        let at = u32::from_be_bytes(*offset) as usize % damaged.len();
        let length = bytes.len().min(damaged.len() - at);
        damaged[at..at + length].copy_from_slice(&bytes[..length]);
    }
    let load = |bytes: &[u8]| Ext4::load(Box::new(bytes.to_vec()));
    let whole = load(&WHOLE).expect("a file system that is whole");
    let Ok(other) = load(&damaged) else { return };
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
