//! Makes a disk of layers: decompression and hashing on one thread, the file system on the caller's.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use super::decompress::decompress;
use super::digest::{Digest, HashingReader};
use super::files::{self, Directory};
use super::filesystem::{Builder, Files};
use super::kernel;
use super::progress::{Cancelled, Progress, PullOptions, Stage};
use super::source::{Layer, Plan};
use super::store::{Record, VERSION};

const CHUNK: usize = 256 << 10;
/// Chunks between the threads: this bounds the memory, whatever the layer.
const CHUNKS: usize = 8;

const INITS: [&str; 4] = ["/sbin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/init"];
const AGENTS: [&str; 4] =
    ["/usr/bin/puter-agent", "/usr/local/bin/puter-agent", "/usr/sbin/puter-agent", "/usr/lib/puter/puter-agent"];

/// Removes the directory unless it was given its final name.
struct Unfinished<'a>(&'a Path);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0);
    }
}

/// Makes the disk of `plan`; it appears in the store whole or not at all. The caller holds the disk's lock.
pub(crate) fn convert(
    directory: &Directory,
    plan: &Plan,
    options: &PullOptions,
    progress: &dyn Progress,
) -> Result<()> {
    progress.stage(Stage::Converting);
    let work = directory.temporary(&format!("disk-{}", plan.digest.hex()));
    files::remove(&work);
    let made = DirBuilder::new().mode(0o700).create(&work);
    made.with_context(|| format!("cannot create {}", work.display()))?;
    let _unfinished = Unfinished(&work);

    let path = work.join("disk.raw");
    let cannot = || format!("cannot write {}", path.display());
    let disk = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
    let disk = disk.with_context(cannot)?;
    let mut builder = Builder::new(disk.try_clone().with_context(cannot)?, uuid(&plan.digest), options.max_unpacked)?;
    apply_all(directory, plan, options, progress, &mut builder)?;
    progress.stage(Stage::Finishing);
    let tree = builder.finish().inspect_err(|error| {
        if !is_of_the_host(error) {
            plan.layers.iter().for_each(|layer| forget(directory, layer));
        }
    });
    let tree = tree.context("cannot finish the file system")?;

    let (kernel, initrd) = take_kernel(&tree, &work)?;
    let size = disk.metadata().with_context(cannot)?.len();
    let first = |paths: &[&str]| paths.iter().find(|path| tree.file(path).is_some()).map(|path| path.to_string());
    let record = Record {
        version: VERSION,
        digest: plan.digest,
        architecture: plan.architecture.clone(),
        disk_size: size,
        kernel,
        initrd,
        init: first(&INITS),
        agent: first(&AGENTS),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
    };
    disk.set_permissions(Permissions::from_mode(0o444)).with_context(cannot)?;
    disk.sync_all().with_context(cannot)?;
    files::write_synced(&work.join("config.json"), &plan.config)?;
    files::write_synced(&work.join("image.json"), &serde_json::to_vec_pretty(&record)?)?;
    files::sync_directory(&work)?;
    let target = directory.disk(&plan.digest);
    if fs::symlink_metadata(&target).is_ok() {
        // Damaged, or of another version: machines that run on it keep their open files.
        let grave = directory.temporary(&format!("replaced-{}", plan.digest.hex()));
        files::remove(&grave);
        files::rename(&target, &grave)?;
        files::remove(&grave);
    }
    files::rename(&work, &target)
}

/// A file system's UUID: of the image's digest, so that a conversion gives the same bytes again (RFC 9562, version 8).
fn uuid(digest: &Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.iter_mut().zip(digest.bytes()).for_each(|(to, from)| *to = *from);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

fn apply_all(
    directory: &Directory,
    plan: &Plan,
    options: &PullOptions,
    progress: &dyn Progress,
    builder: &mut Builder,
) -> Result<()> {
    let total = plan.layers.iter().map(|layer| layer.length).fold(0, u64::saturating_add);
    let consumed = AtomicU64::new(0);
    let mut room = options.max_unpacked;
    for (number, layer) in plan.layers.iter().enumerate() {
        let outcome = std::thread::scope(|scope| {
            let (sender, receiver) = sync_channel(CHUNKS);
            let consumed = &consumed;
            scope.spawn(move || unpack(layer, consumed, room, sender));
            let mut stream = Stream { receiver, chunk: vec![], at: 0, sum: None, progress, consumed, total };
            let applied = builder.apply(&mut stream);
            // The rest of the stream belongs to the digest: padding, and what follows the archive's end.
            let drained = applied.and_then(|()| Ok(io::copy(&mut stream, &mut io::sink())?));
            drained.map(|_| stream.sum)
        });
        let sum = match outcome {
            Err(_) if progress.cancelled() => return Err(Cancelled.into()),
            Ok(sum) => sum,
            Err(error) => {
                // A layer that cannot be used today cannot be used tomorrow, unless it was this host's doing.
                if !is_of_the_host(&error) {
                    forget(directory, layer);
                }
                return Err(error.context(format!("layer {} of {}", number + 1, plan.layers.len())));
            }
        };
        let Some(sum) = sum else { bail!("the decompression ended without a word") };
        let wrong = layer.digest.is_some_and(|digest| digest != sum.packed) || sum.unpacked != layer.diff_id;
        if wrong {
            // Should the cache be damaged, the next pull fetches the layer anew.
            forget(directory, layer);
            bail!(
                "layer {} is not what the image says: its decompressed content has the digest {} instead of {}; \
                 pull again, and if it stays so, the image is damaged where it comes from",
                number + 1,
                sum.unpacked,
                layer.diff_id
            );
        }
        room = room.saturating_sub(sum.length);
    }
    Ok(())
}

/// Whether a full disk or the like is the reason.
fn is_of_the_host(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|one| one.raw_os_error().is_some()))
}

/// Takes a layer out of the cache, if it is there.
fn forget(directory: &Directory, layer: &Layer) {
    if layer.path.starts_with(&directory.root) {
        files::remove(&layer.path);
    }
}

/// The digests of a layer that was read to its end.
struct Sum {
    packed: Digest,
    unpacked: Digest,
    length: u64,
}

enum Piece {
    Data(Vec<u8>),
    End(Sum),
    Failed(io::Error),
}

/// Counts compressed bytes for the progress.
struct Counted<'a, R>(R, &'a AtomicU64);

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.0.read(buffer)?;
        self.1.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    }
}

/// Decompresses a layer into the channel. An error to send means that the receiver has gone: it knows why.
fn unpack(layer: &Layer, consumed: &AtomicU64, room: u64, sender: SyncSender<Piece>) {
    let work = || -> io::Result<Option<Sum>> {
        let mut packed = HashingReader::new(Counted(layer.open().map_err(io::Error::other)?, consumed));
        let mut unpacked = HashingReader::new(decompress(&mut packed)?);
        let mut length = 0_u64;
        loop {
            let mut chunk = vec![0; CHUNK];
            let count = unpacked.read(&mut chunk)?;
            if count == 0 {
                break;
            }
            length += count as u64;
            if length > room {
                return Err(io::Error::other("the layers hold more data than an image may have"));
            }
            chunk.truncate(count);
            if sender.send(Piece::Data(chunk)).is_err() {
                return Ok(None);
            }
        }
        let (unpacked, length) = unpacked.finish();
        io::copy(&mut packed, &mut io::sink())?;
        let (packed, _) = packed.finish();
        Ok(Some(Sum { packed, unpacked, length }))
    };
    let _ = match work() {
        Ok(Some(sum)) => sender.send(Piece::End(sum)),
        Ok(None) => Ok(()),
        Err(error) => sender.send(Piece::Failed(error)),
    };
}

/// The other end of the channel, as a stream.
struct Stream<'a> {
    receiver: Receiver<Piece>,
    chunk: Vec<u8>,
    at: usize,
    sum: Option<Sum>,
    progress: &'a dyn Progress,
    consumed: &'a AtomicU64,
    total: u64,
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at >= self.chunk.len() {
            if self.sum.is_some() {
                return Ok(0);
            }
            if self.progress.cancelled() {
                return Err(io::Error::other(Cancelled));
            }
            match self.receiver.recv() {
                Ok(Piece::Data(chunk)) => (self.chunk, self.at) = (chunk, 0),
                Ok(Piece::End(sum)) => self.sum = Some(sum),
                Ok(Piece::Failed(error)) => return Err(error),
                Err(_) => return Err(io::Error::other("the decompression ended without a word")),
            }
            self.progress.converted(self.consumed.load(Ordering::Relaxed), self.total);
        }
        let rest = self.chunk.get(self.at..).unwrap_or_default();
        let length = rest.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..length), rest.get(..length)) {
            to.copy_from_slice(from);
        }
        self.at += length;
        Ok(length)
    }
}

/// Copies the kernel and its initrd out of the file system; returns where they were.
fn take_kernel(tree: &Files, work: &Path) -> Result<(Option<String>, Option<String>)> {
    for directory in ["/boot", "/"] {
        let names: Vec<String> = tree.list(directory);
        let path = |name: &str| format!("{}/{name}", directory.trim_end_matches('/'));
        // A link that leads nowhere must not hide a kernel that is there.
        let names: Vec<String> =
            names.into_iter().filter(|name| is_boot_file(name) && tree.file(&path(name)).is_some()).collect();
        let Some((kernel, initrd)) = kernel::choose(&names) else { continue };
        let (kernel, initrd) = (path(&kernel), initrd.map(|name| path(&name)));
        copy(tree, &kernel, &work.join("vmlinuz"), kernel::MAX_KERNEL)?;
        if let Some(initrd) = &initrd {
            copy(tree, initrd, &work.join("initrd"), kernel::MAX_INITRD)?;
        }
        return Ok((Some(kernel), initrd));
    }
    Ok((None, None))
}

fn is_boot_file(name: &str) -> bool {
    ["vmlinu", "Image", "bzImage", "initr"].iter().any(|start| name.starts_with(start))
}

fn copy(tree: &Files, from: &str, to: &Path, limit: u64) -> Result<()> {
    if tree.file(from).is_none_or(|size| size > limit) {
        bail!("'{from}' in the image is larger than {} MiB: refused", limit >> 20);
    }
    let write = || -> Result<()> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o444).open(to)?;
        let mut writer = BufWriter::with_capacity(CHUNK, file);
        tree.copy(from, &mut writer)?;
        writer.flush()?;
        let file: File = writer.into_inner()?;
        Ok(file.sync_all()?)
    };
    write().with_context(|| format!("cannot copy '{from}' out of the image"))
}
