//! An archive as `docker save` writes it.

use std::io::Cursor;

use puter::image::docker_archive::{Member, resolve, scan};

use crate::readable;

pub fn run(input: &[u8]) {
    let mut input = input.to_vec();
    seal(&mut input);
    let size = input.len() as u64;
    let within = |offset: u64, length: u64| offset.checked_add(length).is_some_and(|end| end <= size);
    match scan(&mut Cursor::new(&input), size) {
        Ok(members) => {
            for (name, member) in &members {
                if let Member::File { offset, length } = member {
                    assert!(within(*offset, *length));
                    assert_eq!(resolve(&members, name), Some((*offset, *length)));
                }
                if let Some((offset, length)) = resolve(&members, name) {
                    assert!(within(offset, length));
                    assert!(members.values().any(|other| *other == Member::File { offset, length }));
                }
            }
            assert_eq!(resolve(&members, "no/such/file"), None);
        }
        Err(error) => readable(&error),
    }
}

/// Makes headers' sums right: a fuzzer does not find them.
pub fn seal(archive: &mut [u8]) {
    for block in archive.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}
