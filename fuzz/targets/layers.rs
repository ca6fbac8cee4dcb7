//! An image's layers, made into a file system: `length (two bytes), layer`, one after the other, each plain tar, gzip or
//! zstd. What is accepted is read back by another implementation of ext4, and both must see the same.

use std::fs::File;
use std::io::Read;

use ext4_view::{Ext4, Ext4Error};
use puter::image::decompress::decompress;
use puter::image::ext4::Tree;
use puter::image::layers::{Converter, Limits, Options};
use rustix::fs::{MemfdFlags, memfd_create};

/// Larger files are not read back.
const COMPARED: u64 = 1 << 20;
const LIMITS: Limits = Limits { entries: 2000, bytes: 1 << 34, stored: 16 << 20 };

pub fn run(input: &[u8]) {
    let image = File::from(memfd_create("image", MemfdFlags::CLOEXEC).expect("a memfd"));
    let options = Options { uuid: [7; 16], label: "fuzz".into(), spare: 0, limits: LIMITS };
    let mut converter = Converter::new(image.try_clone().expect("a file"), options).expect("a converter");
    let mut rest = input;
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let (layer, after) = after.split_at(usize::from(u16::from_be_bytes(*length)).min(after.len()));
        rest = after;
        let mut layer = layer.to_vec();
        seal(&mut layer);
        // The same bound that a pull has.
        let Ok(stream) = decompress(&layer[..]) else { return };
        if converter.apply(stream.take(64 << 20)).is_err() {
            return;
        }
    }
    let Ok(tree) = converter.finish() else { return };
    assert_eq!(image.metadata().expect("a file").len(), tree.statistics().size);
    compare(&tree, &Ext4::load(Box::new(image)).expect("another implementation cannot read it"));
}

/// Makes headers' sums right: a fuzzer does not find them.
fn seal(layer: &mut [u8]) {
    for block in layer.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

fn compare(tree: &Tree, other: &Ext4) {
    let mut directories = vec![Vec::new()];
    let mut entries = 0;
    while let Some(directory) = directories.pop() {
        let mut names = tree.list(&directory).expect("a directory that is none");
        names.sort();
        let at = [b"/", &directory[..]].concat();
        let Some(read) = readable(other.read_dir(ext4_view::Path::new(&at))) else { continue };
        let read = read.map(|entry| entry.expect("an entry that cannot be read").file_name().as_ref().to_vec());
        let mut found: Vec<Vec<u8>> = read.filter(|name| name != b"." && name != b"..").collect();
        found.sort();
        assert_eq!(names, found);
        for name in names {
            entries += 1;
            let mut path = directory.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(name);
            let absolute = [b"/", &path[..]].concat();
            let there = ext4_view::Path::new(&absolute);
            let Some(metadata) = readable(other.symlink_metadata(there)) else { continue };
            if metadata.is_symlink() {
                let Some(target) = readable(other.read_link(there)) else { continue };
                assert_eq!(target.as_ref().len() as u64, metadata.len());
                continue;
            }
            let entry = tree.lookup(&path).expect("a name that leads nowhere");
            assert_eq!(entry.is_directory(), metadata.is_dir());
            assert_eq!(entry.mode & 0o7777, metadata.mode() & 0o7777);
            if entry.is_directory() {
                directories.push(path);
            } else if entry.is_file() {
                assert_eq!(entry.size, metadata.len());
                if entry.size <= COMPARED {
                    let mut contents = Vec::new();
                    tree.copy_to(&path, &mut contents).expect("a file that cannot be read");
                    assert!(contents == other.read(there).expect("a file that cannot be read"));
                }
            }
        }
    }
    // Those of the archives and of their paths, and lost+found.
    assert!(entries <= LIMITS.entries + 1);
}

/// What was read; none where a time is before 1970 or after 2038, or a link leads to a name that is too long for any
/// file, which the other implementation does not know.
fn readable<T>(result: Result<T, Ext4Error>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            let text = format!("{error:?}");
            assert!(text.contains("InodeTimestamp") || text.contains("SymlinkTarget"), "it cannot be read: {text}");
            None
        }
    }
}
