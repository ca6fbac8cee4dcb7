//! Adds to and takes from the tree while the file system is being made.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;

use anyhow::{Context, Result, bail, ensure};

use super::crc32c::crc32c;
use super::disk::{Disk, Run};
use super::extents::{self, Contents};
use super::inode::{
    BLOCK_DEVICE, CHAR, DIRECTORY, FAST_SYMLINK, FIFO, FILE, Link, Meta, Node, SYMLINK, encode_device, inode_seed,
};
use super::namespace::{Namespace, Place, Walk};
use super::{BLOCK, FIRST_INODE, MAX_NAME, ROOT, Tree, xattr};
use crate::image::tar::{Time, show};

/// Most names of one file.
const MAX_LINKS: u32 = 65_000;
/// Longest target of a symbolic link, in bytes.
const MAX_TARGET: usize = 4095;
/// puter's own directory for what e2fsck finds.
const LOST_AND_FOUND: &[u8] = b"lost+found";

/// A file system that is being made.
pub struct Writer {
    pub(super) disk: Disk,
    pub(super) names: Namespace,
    /// Numbers of inodes that were given up.
    free: Vec<u32>,
    /// The checksum over the UUID, from which all others continue.
    pub(super) seed: u32,
    pub(super) uuid: [u8; 16],
    /// Directories which hold nothing from below the current layer any more.
    cleaned: HashSet<u32>,
    current: u16,
}

/// Takes a file's contents.
pub struct FileWriter<'a> {
    disk: &'a mut Disk,
    contents: Contents,
}

impl FileWriter<'_> {
    /// Goes on at `offset` bytes from the file's start, at or after all that was written: a hole is between.
    pub fn seek(&mut self, offset: u64) -> Result<()> {
        self.contents.seek(self.disk, offset)
    }

    /// Adds `data`.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        self.contents.write(self.disk, data)
    }
}

impl Writer {
    /// Begins in `file`, which is empty and open for reading and writing.
    pub fn new(file: File, uuid: [u8; 16]) -> Result<Self> {
        ensure!(file.metadata().context("cannot examine the image")?.len() == 0, "the image's file is not empty");
        let mut nodes = vec![None; FIRST_INODE as usize];
        nodes[ROOT as usize] = Some(directory(Meta { mode: 0o755, ..Meta::default() }));
        let mut writer = Self {
            disk: Disk::new(file),
            names: Namespace { nodes },
            free: Vec::new(),
            seed: crc32c(!0, &uuid),
            uuid,
            cleaned: HashSet::new(),
            current: 0,
        };
        writer.ensure_lost_and_found()?;
        Ok(writer)
    }

    pub(super) fn ensure_lost_and_found(&mut self) -> Result<()> {
        match self.names.child(ROOT, LOST_AND_FOUND)? {
            None => {
                let meta = Meta { mode: 0o700, ..Meta::default() };
                self.make_directory(ROOT, LOST_AND_FOUND, 0, meta).map(drop)
            }
            Some(link) => {
                let is_directory = self.names.node(link.inode)?.kind() == DIRECTORY;
                ensure!(is_directory, "/lost+found must be a directory in ext4");
                Ok(())
            }
        }
    }

    /// Encodes what every type has; a block for large attributes is written at once.
    pub fn meta(
        &mut self,
        mode: u16,
        owner: (u32, u32),
        mtime: Time,
        xattrs: &BTreeMap<Vec<u8>, Vec<u8>>,
    ) -> Result<Meta> {
        let encoded = xattr::encode(xattrs)?;
        let mut xattr_block = 0;
        if let Some(mut block) = encoded.block {
            xattr_block = self.disk.allocate(1)?.start;
            xattr::seal(&mut block, xattr_block, self.seed);
            self.disk.write(xattr_block, &block[..])?;
        }
        Ok(Meta { mode: mode & 0o7777, uid: owner.0, gid: owner.1, mtime, xattrs: encoded.inode, xattr_block })
    }

    /// Follows `walk`; missing directories are made (0755, root) if `create` names a layer.
    pub fn walk(&mut self, walk: &mut Walk, create: Option<u16>) -> Result<Place> {
        loop {
            match (self.names.walk(&self.disk, walk)?, create) {
                (Place::Missing(parent, name), Some(layer)) => {
                    let meta = Meta { mode: 0o755, ..Meta::default() };
                    let made = self.make_directory(parent, &name, layer, meta)?;
                    walk.enter(made);
                }
                (place, _) => return Ok(place),
            }
        }
    }

    /// Makes a directory, or gives the one that exists new metadata.
    pub fn make_directory(&mut self, parent: u32, name: &[u8], layer: u16, meta: Meta) -> Result<u32> {
        if let Some(link) = self.names.child(parent, name)?
            && self.names.node(link.inode)?.kind() == DIRECTORY
        {
            self.update_directory(link.inode, meta)?;
            self.set_link(parent, name, Link { layer, ..link })?;
            return Ok(link.inode);
        }
        let inode = self.new_inode(directory(meta))?;
        self.link(parent, name, layer, inode)?;
        Ok(inode)
    }

    /// Gives a directory new metadata.
    pub fn update_directory(&mut self, inode: u32, meta: Meta) -> Result<()> {
        let node = self.names.node_mut(inode)?;
        let old = node.meta.xattr_block;
        node.mode = DIRECTORY | meta.mode;
        node.meta = meta;
        if old != 0 { self.disk.free(Run { start: old, length: 1 }) } else { Ok(()) }
    }

    /// Makes a file of `size` bytes, with the contents that `fill` writes.
    pub fn make_file(
        &mut self,
        parent: u32,
        name: &[u8],
        layer: u16,
        meta: Meta,
        size: u64,
        fill: impl FnOnce(&mut FileWriter<'_>) -> Result<()>,
    ) -> Result<()> {
        ensure!(size.div_ceil(BLOCK) <= extents::MAX_BLOCKS, "a file of {size} bytes is too large for ext4");
        let inode = self.new_inode(node(FILE, meta))?;
        let mut file = FileWriter { disk: &mut self.disk, contents: Contents::default() };
        fill(&mut file)?;
        let (root, blocks) = file.contents.finish(&mut self.disk, inode_seed(self.seed, inode))?;
        let node = self.names.node_mut(inode)?;
        (node.root, node.blocks, node.size) = (root, blocks, size);
        self.link(parent, name, layer, inode)
    }

    /// Makes a symbolic link.
    pub fn make_symlink(&mut self, parent: u32, name: &[u8], layer: u16, meta: Meta, target: &[u8]) -> Result<()> {
        ensure!(!target.is_empty(), "a symbolic link to nothing");
        ensure!(target.len() <= MAX_TARGET, "a symbolic link's target is longer than {MAX_TARGET} bytes");
        let mut node = node(SYMLINK, meta);
        node.size = target.len() as u64;
        if target.len() <= FAST_SYMLINK {
            node.root[..target.len()].copy_from_slice(target);
        }
        let inode = self.new_inode(node)?;
        if target.len() > FAST_SYMLINK {
            let mut contents = Contents::default();
            contents.write(&mut self.disk, target)?;
            let (root, blocks) = contents.finish(&mut self.disk, inode_seed(self.seed, inode))?;
            let node = self.names.node_mut(inode)?;
            (node.root, node.blocks) = (root, blocks);
        }
        self.link(parent, name, layer, inode)
    }

    /// Makes a device or a FIFO; `kind` is [`CHAR`], [`BLOCK_DEVICE`] or [`FIFO`].
    pub fn make_special(
        &mut self,
        parent: u32,
        name: &[u8],
        layer: u16,
        meta: Meta,
        kind: u16,
        (major, minor): (u32, u32),
    ) -> Result<()> {
        let mut node = node(kind, meta);
        match kind {
            CHAR | BLOCK_DEVICE => {
                node.root = encode_device(major, minor)
                    .with_context(|| format!("Linux has no device numbers as large as {major}:{minor}"))?;
            }
            FIFO => {}
            _ => bail!("not a special file's type"),
        }
        let inode = self.new_inode(node)?;
        self.link(parent, name, layer, inode)
    }

    /// Gives the existing file `inode` one more name.
    pub fn make_hard_link(&mut self, parent: u32, name: &[u8], layer: u16, inode: u32) -> Result<()> {
        let node = self.names.node(inode)?;
        ensure!(node.kind() != DIRECTORY, "a hard link to a directory");
        self.link(parent, name, layer, inode)
    }

    /// The inode at `name`.
    pub fn child(&self, parent: u32, name: &[u8]) -> Result<Option<u32>> {
        Ok(self.names.child(parent, name)?.map(|link| link.inode))
    }

    /// Removes what layers below `layer` left at `name`; what `layer` itself put there stays.
    pub fn remove_lower(&mut self, parent: u32, name: &[u8], layer: u16) -> Result<()> {
        let Some(link) = self.names.child(parent, name)? else { return Ok(()) };
        if self.names.node(link.inode)?.kind() != DIRECTORY {
            return if link.layer == layer { Ok(()) } else { self.unlink(parent, name) };
        }
        let visited = self.clean(link.inode, layer)?;
        for (parent, name) in visited.into_iter().rev() {
            self.remove_if_empty(parent, &name, layer)?;
        }
        self.remove_if_empty(parent, name, layer)
    }

    /// Removes what layers below `layer` left in a directory.
    pub fn empty_lower(&mut self, directory: u32, layer: u16) -> Result<()> {
        for (parent, name) in self.clean(directory, layer)?.into_iter().rev() {
            self.remove_if_empty(parent, &name, layer)?;
        }
        Ok(())
    }

    /// Removes lower layers' files under a directory; returns the directories under it, parents first. What has been
    /// cleaned once in a layer stays clean, so it is not looked at again.
    fn clean(&mut self, directory: u32, layer: u16) -> Result<Vec<(u32, Box<[u8]>)>> {
        if self.current != layer {
            self.current = layer;
            self.cleaned.clear();
        }
        let mut visited = Vec::new();
        let mut todo = vec![directory];
        while let Some(parent) = todo.pop() {
            if !self.cleaned.insert(parent) {
                continue;
            }
            let mut remove = Vec::new();
            for (name, link) in self.names.node(parent)?.children.iter().flat_map(|children| children.iter()) {
                if self.names.node(link.inode)?.kind() == DIRECTORY {
                    visited.push((parent, name.clone()));
                    todo.push(link.inode);
                } else if link.layer != layer {
                    remove.push(name.clone());
                }
            }
            for name in remove {
                self.unlink(parent, &name)?;
            }
        }
        Ok(visited)
    }

    fn remove_if_empty(&mut self, parent: u32, name: &[u8], layer: u16) -> Result<()> {
        let Some(link) = self.names.child(parent, name)? else { return Ok(()) };
        let empty = self.names.node(link.inode)?.children.as_ref().is_some_and(|children| children.is_empty());
        if empty && link.layer != layer { self.unlink(parent, name) } else { Ok(()) }
    }

    /// Lays everything out and writes it. `spare` bytes or more stay free.
    pub fn finish(self, label: &str, spare: u64) -> Result<Tree> {
        super::layout::finish(self, label, spare)
    }

    pub(super) fn new_inode(&mut self, node: Node) -> Result<u32> {
        if let Some(number) = self.free.pop() {
            self.names.nodes[number as usize] = Some(node);
            return Ok(number);
        }
        let number = u32::try_from(self.names.nodes.len()).ok().filter(|&number| number < u32::MAX);
        self.names.nodes.push(Some(node));
        number.context("there are more inodes than ext4 can number")
    }

    /// Puts `inode` at `name`, in place of what is there.
    fn link(&mut self, parent: u32, name: &[u8], layer: u16, inode: u32) -> Result<()> {
        ensure!(!name.is_empty() && name.len() <= MAX_NAME, "the name {} is longer than {MAX_NAME} bytes", show(name));
        let node = self.names.node_mut(inode)?;
        ensure!(node.links < MAX_LINKS, "a file with more than {MAX_LINKS} hard links");
        // First count the new name: it may be the last of the one that goes.
        node.links += 1;
        self.unlink(parent, name)?;
        self.set_link(parent, name, Link { inode, layer })
    }

    fn set_link(&mut self, parent: u32, name: &[u8], link: Link) -> Result<()> {
        let children = self.names.node_mut(parent)?.children.as_mut().context("the parent is not a directory")?;
        children.insert(name.into(), link);
        Ok(())
    }

    /// Removes a name and all that is under it.
    fn unlink(&mut self, parent: u32, name: &[u8]) -> Result<()> {
        let children = self.names.node_mut(parent)?.children.as_mut();
        let mut todo: Vec<u32> = children.and_then(|c| c.remove(name)).map(|link| link.inode).into_iter().collect();
        while let Some(number) = todo.pop() {
            let node = self.names.node_mut(number)?;
            node.links = node.links.saturating_sub(1);
            if let Some(children) = &node.children {
                todo.extend(children.values().map(|link| link.inode));
            } else if node.links > 0 {
                continue;
            }
            let node = self.names.nodes[number as usize].take();
            self.free.push(number);
            if let Some(node) = node {
                self.release(&node)?;
            }
        }
        Ok(())
    }

    fn release(&mut self, node: &Node) -> Result<()> {
        let mut runs = Vec::new();
        let mut tree = Vec::new();
        if node.has_extents() && node.children.is_none() {
            let mut each = |extent: extents::Extent| {
                runs.push(Run { start: extent.start, length: u64::from(extent.length) });
                Ok(())
            };
            extents::walk(&self.disk, &node.root, &mut each, &mut |block| tree.push(block))?;
        }
        tree.extend(Some(node.meta.xattr_block).filter(|&block| block != 0));
        runs.extend(tree.into_iter().map(|start| Run { start, length: 1 }));
        runs.into_iter().try_for_each(|run| self.disk.free(run))
    }
}

fn node(kind: u16, meta: Meta) -> Node {
    Node { mode: kind | meta.mode, meta, links: 0, size: 0, blocks: 0, root: [0; 60], children: None }
}

fn directory(meta: Meta) -> Node {
    Node { children: Some(Box::default()), ..node(DIRECTORY, meta) }
}
