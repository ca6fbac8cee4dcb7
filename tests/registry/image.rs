//! A small image made in memory, a store to pull it into, and a look at what a pull left there.

use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use puter::image::{Digest, Image, Progress, PullOptions, Store};

pub const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };

/// One entry of a tar archive (ustar); `kind` as in its header.
pub fn entry(name: &str, kind: u8, mode: u32, link: &str, content: &[u8]) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    for (at, text) in [(100, format!("{mode:07o}")), (108, "0000000".into()), (116, "0000000".into())] {
        block[at..at + 7].copy_from_slice(text.as_bytes());
    }
    block[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    block[136..147].copy_from_slice(b"14000000000");
    block[156] = kind;
    block[157..157 + link.len()].copy_from_slice(link.as_bytes());
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block.extend(content);
    block.resize(block.len().div_ceil(512) * 512, 0);
    block
}

pub fn tar(entries: &[Vec<u8>]) -> Vec<u8> {
    [entries.concat(), vec![0; 1024]].concat()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(vec![], Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that do not compress, always the same.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// An image as a registry holds it.
pub struct Sample {
    pub layer: Vec<u8>,
    pub config: Vec<u8>,
    pub manifest: String,
}

impl Sample {
    /// With an init that is a link, an agent, two kernels and a file that makes the layer long.
    pub fn new() -> Sample {
        let layer = tar(&[
            entry("boot/", b'5', 0o755, "", b""),
            entry("boot/vmlinuz-6.1.0-9", b'0', 0o644, "", b"old kernel"),
            entry("boot/vmlinuz-6.1.0-31", b'0', 0o644, "", b"new kernel"),
            entry("boot/initrd.img-6.1.0-31", b'0', 0o644, "", b"new initrd"),
            entry("sbin", b'2', 0o777, "usr/sbin", b""),
            entry("usr/", b'5', 0o755, "", b""),
            entry("usr/sbin/", b'5', 0o755, "", b""),
            entry("usr/sbin/init", b'2', 0o777, "../bin/systemd", b""),
            entry("usr/bin/", b'5', 0o755, "", b""),
            entry("usr/bin/systemd", b'0', 0o755, "", b"init"),
            entry("usr/bin/puter-agent", b'0', 0o755, "", b"agent"),
            entry("noise", b'0', 0o644, "", &noise(3 << 20)),
        ]);
        Sample::of(&layer, gzip(&layer))
    }

    pub fn of(tar: &[u8], layer: Vec<u8>) -> Sample {
        let config = config(&[Digest::of(tar)]);
        let mut sample = Sample { layer, config, manifest: String::new() };
        sample.manifest = sample.manifest_with(sample.layer.len() as i64);
        sample
    }

    /// The manifest, with `size` for the layer's size.
    pub fn manifest_with(&self, size: i64) -> String {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
            "config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":{}}},
            "layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{}","size":{size}}}]}}"#,
            Digest::of(&self.config),
            self.config.len(),
            self.digest(),
        )
    }

    /// The layer's digest.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.layer)
    }
}

/// The configuration of an image of such layers.
pub fn config(diff_ids: &[Digest]) -> Vec<u8> {
    let list: Vec<_> = diff_ids.iter().map(|digest| format!("\"{digest}\"")).collect();
    let list = list.join(",");
    format!(r#"{{"architecture":"{ARCHITECTURE}","os":"linux","rootfs":{{"type":"layers","diff_ids":[{list}]}}}}"#)
        .into_bytes()
}

/// Notes what a pull tells, and ends it when asked to.
#[derive(Default)]
pub struct Watch {
    pub notes: Mutex<Vec<String>>,
    pub cancel: std::sync::atomic::AtomicBool,
}

impl Progress for Watch {
    fn note(&self, text: &str) {
        self.notes.lock().unwrap().push(text.to_string());
    }

    fn cancelled(&self) -> bool {
        self.cancel.load(std::sync::atomic::Ordering::Relaxed)
    }
}

/// Limits short enough for tests.
pub fn options() -> PullOptions {
    PullOptions {
        connect_timeout: Duration::from_secs(10),
        idle_timeout: Duration::from_secs(10),
        architecture: Some(ARCHITECTURE.into()),
        ..PullOptions::default()
    }
}

/// Pulls into a new store.
pub fn pull(directory: &Path, reference: &str, options: &PullOptions) -> Result<Image, String> {
    let store = Store::open(directory).unwrap();
    store.pull(&reference.parse().unwrap(), options, &()).map_err(|error| format!("{error:#}"))
}

/// Every file in the store but its lock.
pub fn files(directory: &Path) -> Vec<String> {
    fn walk(path: &Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(path).unwrap().flatten() {
            match entry.file_type().unwrap().is_dir() {
                true => walk(&entry.path(), found),
                false => found.push(entry.path().display().to_string()),
            }
        }
    }
    let mut found = vec![];
    walk(directory, &mut found);
    let lock = directory.join("lock").display().to_string();
    found.retain(|path| *path != lock);
    found.sort();
    found
}
