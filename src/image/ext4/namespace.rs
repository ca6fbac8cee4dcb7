//! Names: inodes, and the way from a path to one, which never leaves the tree.

use anyhow::{Context, Result, bail, ensure};

use super::disk::Disk;
use super::inode::{Link, Node, SYMLINK};
use super::{BLOCK, ROOT, extents};
use crate::image::tar::show;

/// Symbolic links followed on one way, as in Linux.
const MAX_LINKS: u32 = 40;
/// Components followed on one way, those of symbolic links included.
const MAX_STEPS: u32 = 8192;
/// Deepest directory: as many components as a path of 4096 bytes holds.
const MAX_DEPTH: usize = 2048;

/// All inodes, at their number.
pub struct Namespace {
    pub nodes: Vec<Option<Node>>,
}

/// A way through the tree.
pub struct Walk {
    /// Directories from the root to where the way has come.
    stack: Vec<u32>,
    /// Components to go, the next one last.
    todo: Vec<Vec<u8>>,
    links: u32,
    steps: u32,
    entered: u32,
}

/// Where a way has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Directory(u32),
    /// Something else, at the way's end.
    Leaf(u32),
    /// The directory has no such name.
    Missing(u32, Vec<u8>),
}

impl Walk {
    /// Begins at the root. Empty components and "." are skipped; ".." in the root stays there.
    pub fn new<'a>(components: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut todo: Vec<Vec<u8>> = components.into_iter().map(<[u8]>::to_vec).collect();
        todo.reverse();
        Self { stack: vec![ROOT], todo, links: 0, steps: 0, entered: 0 }
    }

    /// Begins at the root with the components of `path`.
    pub fn path(path: &[u8]) -> Self {
        Self::new(path.split(|&byte| byte == b'/'))
    }

    /// Enters a directory, which the caller has just made at the missing name.
    pub fn enter(&mut self, directory: u32) {
        self.stack.push(directory);
        self.entered += 1;
    }

    /// Directories that had to be made for the way.
    pub fn made(&self) -> u32 {
        self.entered
    }
}

impl Namespace {
    /// The inode `number`, which came from a directory or the caller's own use of this module.
    pub fn node(&self, number: u32) -> Result<&Node> {
        self.nodes.get(number as usize).and_then(Option::as_ref).with_context(|| format!("there is no inode {number}"))
    }

    pub fn node_mut(&mut self, number: u32) -> Result<&mut Node> {
        let node = self.nodes.get_mut(number as usize).and_then(Option::as_mut);
        node.with_context(|| format!("there is no inode {number}"))
    }

    /// What `name` is in `directory`.
    pub fn child(&self, directory: u32, name: &[u8]) -> Result<Option<Link>> {
        Ok(self.node(directory)?.children.as_ref().and_then(|children| children.get(name)).copied())
    }

    /// Follows the way, symbolic links included, until its end or a missing name.
    ///
    /// # Errors
    /// When it leads through something that is no directory, in a circle, or too deep.
    pub fn walk(&self, disk: &Disk, walk: &mut Walk) -> Result<Place> {
        loop {
            let directory = walk.stack.last().copied().unwrap_or(ROOT);
            let Some(name) = walk.todo.pop() else { return Ok(Place::Directory(directory)) };
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    if walk.stack.len() > 1 {
                        walk.stack.pop();
                    }
                    continue;
                }
                _ => {}
            }
            walk.steps += 1;
            ensure!(walk.steps <= MAX_STEPS, "its path has more than {MAX_STEPS} components");
            ensure!(walk.stack.len() < MAX_DEPTH, "it is nested deeper than {MAX_DEPTH} directories");
            let Some(link) = self.child(directory, &name)? else { return Ok(Place::Missing(directory, name)) };
            let node = self.node(link.inode)?;
            if node.children.is_some() {
                walk.stack.push(link.inode);
            } else if node.kind() == SYMLINK {
                walk.links += 1;
                ensure!(walk.links <= MAX_LINKS, "too many symbolic links at {}", show(&name));
                let target = self.read_link(disk, node)?;
                if target.starts_with(b"/") {
                    walk.stack.truncate(1);
                }
                walk.todo.extend(target.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec));
            } else if walk.todo.iter().all(|rest| rest.is_empty()) {
                return Ok(Place::Leaf(link.inode));
            } else {
                bail!("{} is not a directory", show(&name));
            }
        }
    }

    /// The target of a symbolic link.
    pub fn read_link(&self, disk: &Disk, node: &Node) -> Result<Vec<u8>> {
        let length = node.size.min(BLOCK) as usize;
        if !node.has_extents() {
            return Ok(node.root.get(..length).unwrap_or_default().to_vec());
        }
        let mut target = Vec::new();
        let mut first = |extent: extents::Extent| {
            target = disk.read(extent.start)?.get(..length).unwrap_or_default().to_vec();
            Ok(())
        };
        extents::walk(disk, &node.root, &mut first, &mut |_| ())?;
        Ok(target)
    }
}
