//! The last pass: directories, journal, inode tables, bitmaps and superblocks, once all files are there.

use anyhow::{Context, Result, bail, ensure};

use super::crc32c::crc32c;
use super::directory::Packer;
use super::disk::{Disk, Run, has_superblock, reserved_in};
use super::extents::Layout;
use super::inode::{DIRECTORY, FILE, INODE, Meta, Node, inode_seed};
use super::superblock::{Descriptor, Geometry};
use super::tree::{Statistics, Tree};
use super::writer::Writer;
use super::{BLOCK, BLOCKS_PER_GROUP, FIRST_INODE, GDT_BLOCKS, JOURNAL_INODE, MAX_GROUPS, RESIZE_INODE, ROOT};

/// Blocks of the journal: 64 MiB, what mke2fs takes for a file system of some GiB. All but the first are a hole.
const JOURNAL_BLOCKS: u64 = 16_384;
/// The least inodes of a group: one for each 16 KiB, as mke2fs has it.
const LEAST_INODES: u64 = 8192;
/// Inodes in a block of a table, and the most that one bitmap describes.
const INODES_PER_BLOCK: u64 = BLOCK / INODE as u64;
const MOST_INODES: u64 = 8 * BLOCK;
/// Entries in a block of block numbers.
const NUMBERS: u64 = BLOCK / 4;

/// Writes everything that is missing and gives the file its size.
pub fn finish(mut writer: Writer, label: &str, spare: u64) -> Result<Tree> {
    writer.ensure_lost_and_found()?;
    let mut padded = [0; 16];
    ensure!(label.len() <= padded.len(), "the label '{label}' has more than 16 bytes");
    padded[..label.len()].copy_from_slice(label.as_bytes());

    let directories = write_directories(&mut writer)?;
    let journal = write_journal(&mut writer)?;
    let used_inodes = writer.names.nodes.len() as u64 - 1;
    let (groups, inodes_per_group) = size(writer.disk.cursor(), used_inodes, spare.div_ceil(BLOCK))?;
    let tables = place_tables(&mut writer.disk, groups, inodes_per_group)?;
    for group in (0..groups).filter(|&group| has_superblock(group)) {
        writer.disk.mark(Run { start: group * BLOCKS_PER_GROUP, length: reserved_in(group) });
    }
    let mut geometry = Geometry {
        uuid: writer.uuid,
        label: padded,
        groups,
        inodes_per_group: inodes_per_group as u32,
        free_blocks: 0,
        free_inodes: 0,
        journal,
    };
    let resize = write_resize_inode(&mut writer.disk, &geometry)?;
    let end = writer.disk.cursor();
    ensure!(end <= groups * BLOCKS_PER_GROUP, "the file system outgrew its plan by {} blocks", end);

    let descriptors = write_groups(&mut writer, &geometry, &tables, &resize)?;
    geometry.free_blocks = descriptors.iter().map(|d| u64::from(d.free_blocks)).sum();
    geometry.free_inodes = descriptors.iter().map(|d| u64::from(d.free_inodes)).sum();
    write_superblocks(&mut writer, &geometry, &descriptors)?;
    let blocks = groups * BLOCKS_PER_GROUP;
    writer.disk.finish(blocks)?;

    let files = writer.names.nodes.iter().flatten().filter(|node| node.kind() != DIRECTORY && node.links > 0);
    let statistics = Statistics {
        size: blocks * BLOCK,
        used: (blocks - geometry.free_blocks) * BLOCK,
        files: files.count() as u64,
        directories,
    };
    Ok(Tree::new(writer.disk, writer.names, statistics))
}

/// Packs the names of each directory into blocks, and counts links: each subdirectory's ".." is one.
fn write_directories(writer: &mut Writer) -> Result<u64> {
    let seed = writer.seed;
    let mut todo = vec![(ROOT, ROOT)];
    let mut count = 0;
    while let Some((number, parent)) = todo.pop() {
        count += 1;
        let node = writer.names.node(number)?;
        let children = node.children.as_ref().context("a directory without names")?;
        let mut entries = Vec::with_capacity(children.len());
        let mut links = 2;
        for (name, link) in children.iter() {
            let child = writer.names.node(link.inode)?;
            if child.kind() == DIRECTORY {
                links += 1;
                todo.push((link.inode, number));
            }
            entries.push((link.inode, child.entry_type(), name.clone()));
        }
        let own = inode_seed(seed, number);
        let mut layout = Layout::default();
        let mut length = 0;
        let disk = &mut writer.disk;
        let mut packer = Packer::new(own, |block: &[u8; BLOCK as usize]| {
            let run = disk.allocate(1)?;
            layout.push(length, run)?;
            length += 1;
            disk.write(run.start, block)
        });
        packer.push(number, 2, b".")?;
        packer.push(parent, 2, b"..")?;
        for (inode, kind, name) in entries {
            packer.push(inode, kind, &name)?;
        }
        packer.flush()?;
        let (root, blocks) = layout.finish(&mut writer.disk, own)?;
        let node = writer.names.node_mut(number)?;
        (node.root, node.blocks, node.size, node.links) = (root, blocks, length * BLOCK, links);
    }
    Ok(count)
}

/// An empty journal (Linux include/linux/jbd2.h, journal_superblock_t): only its first block is written.
fn write_journal(writer: &mut Writer) -> Result<(super::extents::Root, u64)> {
    let mut layout = Layout::default();
    layout.allocate(&mut writer.disk, 0, JOURNAL_BLOCKS)?;
    let first = layout.extents().first().context("a journal without blocks")?.start;
    let mut block = [0; BLOCK as usize];
    let words = [0xc03b_3998, 4, 0, BLOCK as u32, JOURNAL_BLOCKS as u32, 1, 1, 0];
    block.chunks_exact_mut(4).zip(words).for_each(|(to, word): (_, u32)| to.copy_from_slice(&word.to_be_bytes()));
    block[0x30..0x40].copy_from_slice(&writer.uuid);
    block[0x40..0x44].copy_from_slice(&1_u32.to_be_bytes()); // one user
    writer.disk.write(first, &block)?;
    let (root, blocks) = layout.finish(&mut writer.disk, inode_seed(writer.seed, JOURNAL_INODE))?;
    let size = JOURNAL_BLOCKS * BLOCK;
    writer.names.nodes[JOURNAL_INODE as usize] = Some(reserved(root, blocks, size));
    Ok((root, size))
}

/// A file that only the file system itself uses.
fn reserved(root: super::extents::Root, blocks: u64, size: u64) -> Node {
    let meta = Meta { mode: 0o600, ..Meta::default() };
    Node { mode: FILE | meta.mode, meta, links: 1, size, blocks, root, children: None }
}

/// The number of groups, and of inodes in each, that hold `used` blocks and inodes and the rest of the metadata.
fn size(used: u64, inodes: u64, spare: u64) -> Result<(u64, u64)> {
    let mut groups = used.div_ceil(BLOCKS_PER_GROUP).max(1);
    loop {
        ensure!(
            groups <= MAX_GROUPS,
            "the file system would be larger than {} bytes",
            MAX_GROUPS * BLOCKS_PER_GROUP * BLOCK
        );
        // A fifth more than there are: room for the guest before it grows.
        let wanted =
            (inodes + inodes / 5 + 1024).div_ceil(groups).max(LEAST_INODES).next_multiple_of(8 * INODES_PER_BLOCK);
        let table = wanted / INODES_PER_BLOCK;
        let reserved: u64 = (0..groups).map(reserved_in).sum();
        // A table that does not fit before a group's end leaves a gap there: at most one for each group.
        let metadata = groups * (2 + 2 * table) + reserved + 1;
        let needed = (used + metadata + spare).div_ceil(BLOCKS_PER_GROUP);
        if needed <= groups && wanted <= MOST_INODES {
            return Ok((groups, wanted));
        }
        groups = needed.max(groups + 1);
    }
}

/// Where each group's bitmaps and inode table are.
fn place_tables(disk: &mut Disk, groups: u64, inodes_per_group: u64) -> Result<Vec<Descriptor>> {
    let table = inodes_per_group / INODES_PER_BLOCK;
    let mut tables = Vec::with_capacity(groups as usize);
    for _ in 0..groups {
        let block_bitmap = disk.allocate(1)?.start;
        let inode_bitmap = disk.allocate(1)?.start;
        let inode_table = loop {
            let run = disk.allocate(table)?;
            if run.length == table {
                break run.start;
            }
            disk.free(run)?;
        };
        tables.push(Descriptor { block_bitmap, inode_bitmap, inode_table, ..Descriptor::default() });
    }
    Ok(tables)
}

/// The resize inode owns the blocks that are kept for group descriptors (e2fsprogs lib/ext2fs/res_gdt.c): one block
/// lists those of the first group, and each of these lists its copies in the other groups. Its raw bytes.
fn write_resize_inode(disk: &mut Disk, geometry: &Geometry) -> Result<Node> {
    let used = geometry.descriptor_blocks();
    ensure!(used <= GDT_BLOCKS, "{} groups are more than the descriptors' blocks hold", geometry.groups);
    let list = disk.allocate(1)?.start;
    let mut numbers = [0; BLOCK as usize];
    let put = |block: &mut [u8; BLOCK as usize], at: u64, number: u64| -> Result<()> {
        let number = u32::try_from(number).context("a block beyond what the resize inode can name")?;
        let at = (at % NUMBERS) as usize * 4;
        block[at..at + 4].copy_from_slice(&number.to_le_bytes());
        Ok(())
    };
    let copies: Vec<u64> = (1..geometry.groups).filter(|&group| has_superblock(group)).collect();
    for descriptor in used..GDT_BLOCKS {
        let block = 1 + descriptor;
        put(&mut numbers, descriptor, block)?;
        let mut names = [0; BLOCK as usize];
        for (at, group) in copies.iter().enumerate() {
            put(&mut names, at as u64, block + group * BLOCKS_PER_GROUP)?;
        }
        disk.write(block, &names)?;
    }
    disk.write(list, &numbers)?;
    let mut root = [0; 60];
    const DOUBLY_INDIRECT: usize = 13;
    root[DOUBLY_INDIRECT * 4..DOUBLY_INDIRECT * 4 + 4].copy_from_slice(&(list as u32).to_le_bytes());
    let blocks = 1 + (GDT_BLOCKS - used) * (1 + copies.len() as u64);
    Ok(reserved(root, blocks, (NUMBERS * NUMBERS + NUMBERS + 12) * BLOCK))
}

/// Writes inode tables and bitmaps, and completes the descriptors.
fn write_groups(
    writer: &mut Writer,
    geometry: &Geometry,
    tables: &[Descriptor],
    resize: &Node,
) -> Result<Vec<Descriptor>> {
    let per_group = u64::from(geometry.inodes_per_group);
    let mut descriptors = Vec::with_capacity(tables.len());
    for (group, place) in (0_u64..).zip(tables) {
        let mut descriptor = *place;
        let mut bitmap = [0xff_u8; BLOCK as usize];
        bitmap[..(per_group / 8) as usize].fill(0);
        let mut last_used = 0;
        let first = group * per_group + 1;
        for block in 0..per_group / INODES_PER_BLOCK {
            let mut raw = [0; BLOCK as usize];
            let mut any = false;
            for slot in 0..INODES_PER_BLOCK {
                let index = block * INODES_PER_BLOCK + slot;
                let number = first + index;
                let node = match number {
                    n if n == u64::from(RESIZE_INODE) => Some(resize),
                    n => writer.names.nodes.get(n as usize).and_then(Option::as_ref),
                };
                if node.is_none() && number >= u64::from(FIRST_INODE) {
                    continue;
                }
                bitmap[(index / 8) as usize] |= 1 << (index % 8);
                last_used = index + 1;
                // Reserved inodes that nobody uses are zeros.
                let Some(node) = node else { continue };
                any = true;
                descriptor.directories += u32::from(node.kind() == DIRECTORY);
                let encoded = node.encode(number as u32, writer.seed);
                let at = slot as usize * INODE;
                raw[at..at + INODE].copy_from_slice(&encoded);
            }
            if any {
                writer.disk.write(descriptor.inode_table + block, &raw)?;
            }
        }
        let used: u32 = bitmap[..(per_group / 8) as usize].iter().map(|byte| byte.count_ones()).sum();
        descriptor.free_inodes = per_group as u32 - used;
        descriptor.unused_inodes = (per_group - last_used) as u32;
        descriptor.inode_bitmap_sum = crc32c(writer.seed, &bitmap[..(per_group / 8) as usize]);
        writer.disk.write(descriptor.inode_bitmap, &bitmap)?;
        descriptors.push(descriptor);
    }
    // Last, since nothing is allocated any more.
    for (group, descriptor) in (0_u64..).zip(&mut descriptors) {
        let bitmap = writer.disk.bitmap(group);
        let used: u32 = bitmap.iter().map(|byte| byte.count_ones()).sum();
        descriptor.free_blocks = BLOCKS_PER_GROUP as u32 - used;
        descriptor.block_bitmap_sum = crc32c(writer.seed, &bitmap);
        writer.disk.write(descriptor.block_bitmap, &bitmap)?;
    }
    Ok(descriptors)
}

/// Writes the superblock and the descriptors, and their copies.
fn write_superblocks(writer: &mut Writer, geometry: &Geometry, descriptors: &[Descriptor]) -> Result<()> {
    let seed = writer.seed;
    let table: Vec<u8> = (0_u64..).zip(descriptors).flat_map(|(group, d)| d.encode(group, seed)).collect();
    for group in (0..geometry.groups).filter(|&group| has_superblock(group)) {
        let start = group * BLOCKS_PER_GROUP;
        let superblock = geometry.superblock(group);
        let mut block = [0; BLOCK as usize];
        // In the first group a boot sector comes before it.
        let at = if group == 0 { superblock.len() } else { 0 };
        block[at..at + superblock.len()].copy_from_slice(&superblock);
        writer.disk.write(start, &block)?;
        writer.disk.write(start + 1, &table)?;
    }
    if descriptors.is_empty() {
        bail!("a file system without groups");
    }
    Ok(())
}
