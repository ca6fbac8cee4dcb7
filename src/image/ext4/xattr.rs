//! Extended attributes: in the inode as long as they fit, else in a block of their own (Linux fs/ext4/xattr.h).

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::BLOCK;
use super::crc32c::crc32c;
use super::inode::{INODE, XATTRS_AT};

const MAGIC: u32 = 0xea02_0000;
/// Length of an entry without its name, and of a block's header.
const ENTRY: usize = 16;
const BLOCK_HEADER: usize = 32;
/// The magic number before the attributes in an inode.
const INODE_HEADER: usize = 4;
const ACCESS: u8 = 2;
const DEFAULT: u8 = 3;

/// An attribute as ext4 names it; the order is that of the entries in a block.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key<'a> {
    index: u8,
    length: usize,
    name: &'a [u8],
}

/// Splits a full name; `None` for name spaces which ext4 does not have.
fn key(name: &[u8]) -> Option<Key<'_>> {
    let (index, name): (u8, &[u8]) = match name {
        b"system.posix_acl_access" => (ACCESS, b""),
        b"system.posix_acl_default" => (DEFAULT, b""),
        _ => [(1, &b"user."[..]), (4, b"trusted."), (6, b"security.")]
            .into_iter()
            .find_map(|(index, prefix)| Some((index, name.strip_prefix(prefix)?)))
            .filter(|(_, name)| !name.is_empty())?,
    };
    Some(Key { index, length: name.len(), name })
}

/// The parts of an encoded set.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// What goes into the inode, from [`XATTRS_AT`] on.
    pub inode: Option<Box<[u8]>>,
    /// What goes into a block, whose checksum [`seal`] adds.
    pub block: Option<Box<[u8; BLOCK as usize]>>,
}

/// Encodes `xattrs`. Those in name spaces that Linux does not have are left out, as every container runtime does.
///
/// # Errors
/// When they do not fit one block, or an access control list is damaged.
pub fn encode(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<Encoded> {
    let mut attributes = BTreeMap::new();
    for (name, value) in xattrs {
        let Some(key) = key(name) else { continue };
        ensure!(key.length <= 255, "the extended attribute's name {} is too long", crate::image::tar::show(name));
        let value = match key.index {
            ACCESS | DEFAULT => acl(value).context("a damaged access control list")?,
            _ => value.clone(),
        };
        attributes.insert(key, value);
    }
    if attributes.is_empty() {
        return Ok(Encoded::default());
    }
    let mut inode = vec![0; INODE - XATTRS_AT];
    inode[..INODE_HEADER].copy_from_slice(&MAGIC.to_le_bytes());
    if place(&attributes, &mut inode, INODE_HEADER, INODE_HEADER).is_some() {
        return Ok(Encoded { inode: Some(inode.into()), block: None });
    }
    let mut block = Box::new([0; BLOCK as usize]);
    let hashes = place(&attributes, block.as_mut_slice(), BLOCK_HEADER, 0).with_context(|| {
        let sum: usize = attributes.iter().map(|(key, value)| ENTRY + key.length + value.len()).sum();
        format!("its extended attributes take {sum} bytes, more than ext4's block of {BLOCK}")
    })?;
    let hash = hashes.iter().fold(0_u32, |hash, one| hash.rotate_left(16) ^ one);
    for (at, value) in [(0, MAGIC), (4, 1), (8, 1), (12, hash)] {
        block[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    Ok(Encoded { inode: None, block: Some(block) })
}

/// Puts the checksum into an attributes' block that will be written at `at`.
pub fn seal(block: &mut [u8; BLOCK as usize], at: u64, seed: u32) {
    let sum = crc32c(crc32c(seed, &at.to_le_bytes()), &block[..]);
    block[16..20].copy_from_slice(&sum.to_le_bytes());
}

/// Entries from `first` on, values at the end; offsets count from `base`. The entries' hashes, or `None` if they
/// do not fit.
fn place(attributes: &BTreeMap<Key<'_>, Vec<u8>>, area: &mut [u8], first: usize, base: usize) -> Option<Vec<u32>> {
    let mut at = first;
    let mut end = area.len();
    let mut hashes = Vec::new();
    for (key, value) in attributes {
        let length = ENTRY + key.length.next_multiple_of(4);
        end = end.checked_sub(value.len().next_multiple_of(4))?;
        // Four bytes of zeros end the list.
        if at + length + 4 > end {
            return None;
        }
        let hash = hash(key.name, value);
        let entry = &mut area[at..at + length];
        entry[0] = key.length as u8;
        entry[1] = key.index;
        let offset = if value.is_empty() { 0 } else { (end - base) as u16 };
        entry[2..4].copy_from_slice(&offset.to_le_bytes());
        entry[8..12].copy_from_slice(&(value.len() as u32).to_le_bytes());
        entry[12..16].copy_from_slice(&hash.to_le_bytes());
        entry[ENTRY..ENTRY + key.length].copy_from_slice(key.name);
        area[end..end + value.len()].copy_from_slice(value);
        at += length;
        hashes.push(hash);
    }
    Some(hashes)
}

fn hash(name: &[u8], value: &[u8]) -> u32 {
    let hash = name.iter().fold(0_u32, |hash, &byte| hash.rotate_left(5) ^ u32::from(byte));
    value.chunks(4).fold(hash, |hash, chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        hash.rotate_left(16) ^ u32::from_le_bytes(word)
    })
}

/// An access control list from the form that getxattr returns (version 2, eight bytes an entry) to ext4's own (version
/// 1, where only entries for a named user or group have an id).
fn acl(value: &[u8]) -> Option<Vec<u8>> {
    const NAMED: [u16; 2] = [0x02, 0x08];
    const PLAIN: [u16; 4] = [0x01, 0x04, 0x10, 0x20];
    let (version, entries) = value.split_first_chunk::<4>()?;
    if *version != 2_u32.to_le_bytes() || entries.len() % 8 != 0 {
        return None;
    }
    let mut out = 1_u32.to_le_bytes().to_vec();
    for entry in entries.chunks_exact(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        if NAMED.contains(&tag) {
            out.extend(entry);
        } else if PLAIN.contains(&tag) {
            out.extend(&entry[..4]);
        } else {
            return None;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pairs: &[(&str, &[u8])]) -> BTreeMap<Vec<u8>, Vec<u8>> {
        pairs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec())).collect()
    }

    #[test]
    fn small_sets_fit_the_inode_and_large_ones_a_block() {
        assert_eq!(encode(&set(&[])).unwrap(), Encoded::default());
        let small = encode(&set(&[("security.capability", &[1; 20])])).unwrap();
        assert!(small.inode.is_some() && small.block.is_none());
        let large = encode(&set(&[("user.a", &[1; 3000]), ("user.b", b"")])).unwrap();
        assert!(large.inode.is_none() && large.block.is_some());
        let error = encode(&set(&[("user.a", &[1; 4090])])).unwrap_err();
        assert!(error.to_string().contains("more than ext4's block"), "{error}");
    }

    #[test]
    fn name_spaces_of_other_systems_are_left_out() {
        let foreign = set(&[("com.apple.provenance", b"x"), ("user.", b"x"), ("system.nfs4_acl", b"x")]);
        assert_eq!(encode(&foreign).unwrap(), Encoded::default());
    }

    #[test]
    fn an_access_control_list_is_converted_and_a_damaged_one_refused() {
        let entry = |tag: u16, id: u32| [&tag.to_le_bytes()[..], &7_u16.to_le_bytes(), &id.to_le_bytes()].concat();
        let list = [2_u32.to_le_bytes().to_vec(), entry(1, u32::MAX), entry(2, 1000), entry(0x20, u32::MAX)].concat();
        assert_eq!(acl(&list).unwrap(), [1, 0, 0, 0, 1, 0, 7, 0, 2, 0, 7, 0, 0xe8, 3, 0, 0, 0x20, 0, 7, 0]);
        assert!(acl(&list[..7]).is_none());
        assert!(acl(&entry(1, 0)).is_none());
    }
}
