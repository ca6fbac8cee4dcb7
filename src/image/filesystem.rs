//! What the conversion needs of the code that makes a file system of layers.

use std::fs::File;
use std::io::{Read, Write};

use anyhow::{Context, Result};

use super::ext4::Tree;
use super::layers::{Converter, Limits, Options};

/// The file system's label: the disk's name in the guest.
const LABEL: &str = "puter";
/// Free space in an image, for what a guest writes before it has grown its file system, in bytes.
const SPARE: u64 = 256 << 20;

/// A file system under construction.
pub(crate) struct Builder(Converter);

/// A finished file system, to be looked into.
pub(crate) struct Files(Tree);

impl Builder {
    /// In an empty `file`, of layers that hold `stored` bytes at most.
    pub fn new(file: File, uuid: [u8; 16], stored: u64) -> Result<Builder> {
        let limits = Limits { stored, ..Limits::default() };
        let options = Options { uuid, label: LABEL.into(), spare: SPARE, limits };
        Converter::new(file, options).map(Builder)
    }

    /// Lays a decompressed layer over those before it.
    pub fn apply(&mut self, tar: &mut dyn Read) -> Result<()> {
        self.0.apply(tar)
    }

    pub fn finish(self) -> Result<Files> {
        self.0.finish().map(Files)
    }
}

impl Files {
    /// Whether `path` is a regular file, symbolic links followed; also its size in bytes.
    pub fn file(&self, path: &str) -> Option<u64> {
        self.0.lookup(path.as_bytes()).filter(|entry| entry.is_file()).map(|entry| entry.size)
    }

    /// The names in a directory; none if there is no such directory.
    pub fn list(&self, path: &str) -> Vec<String> {
        let names = self.0.list(path.as_bytes()).unwrap_or_default();
        names.into_iter().filter_map(|name| String::from_utf8(name).ok()).collect()
    }

    /// Copies a file's content.
    pub fn copy(&self, path: &str, to: &mut dyn Write) -> Result<()> {
        self.0.copy_to(path.as_bytes(), to).map(drop).with_context(|| format!("cannot read {path} in the image"))
    }
}
