//! Makes a disk of layers: decompression on one thread, hashing and the file system on the caller's.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};

use super::decompress::decompress;
use super::digest::{Digest, Hasher};
use super::files::{self, Directory};
use super::filesystem::{Builder, Files};
use super::kernel;
use super::progress::{Cancelled, Progress, PullOptions, Stage, TICK};
use super::source::{Layer, Plan};
use super::store::{Record, VERSION};
use crate::failpoint::reach;

const CHUNK: usize = 256 << 10;
/// Chunks between the threads: this bounds the memory, whatever the layer.
const CHUNKS: usize = 8;

const INITS: [&str; 4] = ["/sbin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/init"];
const AGENTS: [&str; 4] =
    ["/usr/bin/puter-agent", "/usr/local/bin/puter-agent", "/usr/sbin/puter-agent", "/usr/lib/puter/puter-agent"];

/// What goes on beside the conversion: the download of what it reads.
pub(crate) trait Beside {
    /// Passes on what it tells; whether it still goes on.
    fn look(&self) -> bool;

    /// Waits for its end.
    ///
    /// # Errors
    /// When it failed.
    fn wait(&self) -> Result<()>;

    /// Tells it to end, and all who wait for what it brings.
    fn stop(&self);
}

/// Why there is no disk.
pub(crate) struct Failed {
    pub error: anyhow::Error,
    /// The numbers of the layers that may be the reason.
    pub layers: Vec<usize>,
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Failed {
        Failed { error, layers: vec![] }
    }
}

impl Failed {
    /// Whether a full disk or the like is the reason.
    pub fn is_of_the_host(&self) -> bool {
        let of_the_kernel = |one: &io::Error| one.raw_os_error().is_some();
        self.error.chain().any(|cause| cause.downcast_ref().is_some_and(of_the_kernel))
    }
}

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
    beside: &dyn Beside,
) -> Result<(), Failed> {
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
    apply_all(plan, options, progress, beside, &mut builder)?;
    beside.wait()?;
    progress.stage(Stage::Finishing);
    let tree = builder.finish().map_err(|error| Failed {
        error: error.context("cannot finish the file system"),
        layers: (0..plan.layers.len()).collect(),
    })?;

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
        layers: plan.layers.iter().map(Layer::id).collect(),
    };
    disk.set_permissions(Permissions::from_mode(0o444)).with_context(cannot)?;
    disk.sync_all().with_context(cannot)?;
    files::write_synced(&work.join("config.json"), &plan.config)?;
    let record = serde_json::to_vec_pretty(&record).context("cannot write the image's record")?;
    files::write_synced(&work.join("image.json"), &record)?;
    files::sync_directory(&work)?;
    let target = directory.disk(&plan.digest);
    if fs::symlink_metadata(&target).is_ok() {
        // Damaged, or of another version: machines that run on it keep their open files.
        let grave = directory.temporary(&format!("replaced-{}", plan.digest.hex()));
        files::remove(&grave);
        files::rename(&target, &grave)?;
        files::remove(&grave);
    }
    reach("image pull: disk made");
    files::rename(&work, &target)?;
    reach("image pull: disk here");
    Ok(())
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
    plan: &Plan,
    options: &PullOptions,
    progress: &dyn Progress,
    beside: &dyn Beside,
    builder: &mut Builder,
) -> Result<(), Failed> {
    let total = plan.layers.iter().map(|layer| layer.length).fold(0, u64::saturating_add);
    let consumed = AtomicU64::new(0);
    let mut room = options.max_unpacked;
    for (number, layer) in plan.layers.iter().enumerate() {
        let outcome = std::thread::scope(|scope| {
            let (sender, receiver) = sync_channel(CHUNKS);
            let (emptied, empty) = sync_channel(CHUNKS + 2);
            let consumed = &consumed;
            let unpacking = scope.spawn(move || unpack(layer, consumed, sender, empty));
            let tell = || {
                if !beside.look() {
                    progress.converted(consumed.load(Ordering::Relaxed), total);
                }
                progress.cancelled()
            };
            let mut stream =
                Stream { receiver, emptied, chunk: vec![], at: 0, whole: false, sum: Sum::default(), room, tell };
            let applied = builder.apply(&mut stream);
            // The rest of the stream belongs to the digest: padding, and what follows the archive's end.
            let drained = applied.and_then(|()| Ok(io::copy(&mut stream, &mut io::sink())?));
            let Stream { sum, receiver, .. } = stream;
            drop(receiver);
            // The other thread may wait for bytes that nobody needs any more.
            while !unpacking.is_finished() {
                beside.look();
                if progress.cancelled() {
                    beside.stop();
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            drained.map(|_| sum)
        });
        if progress.cancelled() {
            return Err(anyhow::Error::from(Cancelled).into());
        }
        let failed = |error| Failed { error, layers: vec![number] };
        let place = || format!("layer {} of {}", number + 1, plan.layers.len());
        let sum = outcome.with_context(place).map_err(failed)?;
        let found = sum.hasher.finish();
        if found != layer.diff_id {
            return Err(failed(anyhow!(
                "layer {} is not what the image says: its decompressed content has the digest {found} instead of {}; \
                 pull again, and if it stays so, the image is damaged where it comes from",
                number + 1,
                layer.diff_id
            )));
        }
        room = room.saturating_sub(sum.length);
    }
    Ok(())
}

/// What has come of a layer.
#[derive(Default)]
struct Sum {
    hasher: Hasher,
    length: u64,
}

enum Piece {
    Data(Vec<u8>),
    End,
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

/// Decompresses a layer into the channel, in buffers that come back by the other. An error to send means that the
/// receiver has gone: it knows why.
fn unpack(layer: &Layer, consumed: &AtomicU64, sender: SyncSender<Piece>, empty: Receiver<Vec<u8>>) {
    let work = || -> io::Result<()> {
        let mut unpacked = decompress(Counted(layer.open().map_err(io::Error::other)?, consumed))?;
        loop {
            let mut chunk = empty.try_recv().unwrap_or_default();
            chunk.resize(CHUNK, 0);
            let mut length = 0;
            while let Some(rest) = chunk.get_mut(length..).filter(|rest| !rest.is_empty()) {
                match unpacked.read(rest)? {
                    0 => break,
                    count => length += count,
                }
            }
            let ends = length < CHUNK;
            chunk.truncate(length);
            if sender.send(Piece::Data(chunk)).is_err() || ends {
                return Ok(());
            }
        }
    };
    let _ = match work() {
        Ok(()) => sender.send(Piece::End),
        Err(error) => sender.send(Piece::Failed(error)),
    };
}

/// The other end of the channel, as a stream.
struct Stream<F> {
    receiver: Receiver<Piece>,
    emptied: SyncSender<Vec<u8>>,
    chunk: Vec<u8>,
    at: usize,
    whole: bool,
    sum: Sum,
    /// Bytes that the layer may have.
    room: u64,
    /// Tells how far it is; true if whoever waits for it does so no longer.
    tell: F,
}

impl<F: Fn() -> bool> Stream<F> {
    /// Waits for the next piece.
    fn next(&mut self) -> io::Result<()> {
        let _ = self.emptied.try_send(std::mem::take(&mut self.chunk));
        self.at = 0;
        loop {
            if (self.tell)() {
                return Err(io::Error::other(Cancelled));
            }
            match self.receiver.recv_timeout(TICK) {
                Ok(Piece::Data(chunk)) => self.chunk = chunk,
                Ok(Piece::End) => self.whole = true,
                Ok(Piece::Failed(error)) => return Err(error),
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other("the decompression ended without a word"));
                }
            }
            break;
        }
        self.sum.hasher.update(&self.chunk);
        self.sum.length += self.chunk.len() as u64;
        if self.sum.length > self.room {
            return Err(io::Error::other("the layers hold more data than an image may have"));
        }
        Ok(())
    }
}

impl<F: Fn() -> bool> Read for Stream<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at >= self.chunk.len() {
            if self.whole {
                return Ok(0);
            }
            self.next()?;
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
