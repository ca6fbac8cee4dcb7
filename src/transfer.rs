//! A tree of files as a stream, from one machine to another: `puter cp` uses it on the host, the agent in the guest.
//!
//! The stream is a tar archive whose entries lie below the name `root`; an entry `end` closes it, so that one that was
//! cut off is never taken for whole. The receiver trusts nothing in it: each name is opened below the one before,
//! without following links.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps, futimens, linkat, mkdirat, openat, renameat, unlinkat};
use tar::{Archive, Builder, EntryType, Header};

const ROOT: &str = "root";
const END: &str = "end";
const BUFFER: usize = 128 << 10;
/// Directories within directories; deeper trees are refused.
const DEEPEST: usize = 256;

/// What was carried over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub files: u64,
    pub bytes: u64,
}

/// Writes the file or tree at `source` to `out`; with `follow`, what links lead to in place of the links. `note` is told
/// of what cannot be carried: sockets, devices and the like.
///
/// # Errors
/// When something cannot be read, or nobody takes the stream.
pub fn pack(source: &Path, follow: bool, out: impl Write, note: &mut dyn FnMut(String)) -> Result<Count> {
    let mut packer = Packer { archive: Builder::new(out), follow, note, count: Count::default() };
    // `SRC/.` and a link that is named with a slash are what they lead to.
    let metadata = match follow || source.as_os_str().as_bytes().ends_with(b"/") {
        true => fs::metadata(source),
        false => fs::symlink_metadata(source),
    };
    let metadata = metadata.with_context(|| format!("cannot read {}", source.display()))?;
    packer.add(source, Path::new(ROOT), &metadata, 0)?;
    let mut header = Header::new_gnu();
    header.set_size(0);
    packer.archive.append_data(&mut header, END, io::empty())?;
    let count = packer.count;
    packer.archive.into_inner().and_then(|mut out| out.flush()).context("cannot send the files")?;
    Ok(count)
}

struct Packer<'a, W: Write> {
    archive: Builder<W>,
    follow: bool,
    note: &'a mut dyn FnMut(String),
    count: Count,
}

impl<W: Write> Packer<'_, W> {
    fn add(&mut self, path: &Path, name: &Path, metadata: &Metadata, depth: usize) -> Result<()> {
        ensure!(depth < DEEPEST, "{} is deeper than {DEEPEST} directories", path.display());
        let reading = || format!("cannot read {}", path.display());
        let mut header = Header::new_gnu();
        header.set_mode(metadata.mode() & 0o7777);
        header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
        header.set_size(0);
        let kind = metadata.file_type();
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            self.archive.append_data(&mut header, name, io::empty())?;
            let mut names: Vec<_> = fs::read_dir(path)
                .and_then(|all| all.map(|entry| entry.map(|entry| entry.file_name())).collect())
                .with_context(reading)?;
            names.sort();
            for child in names {
                let path = path.join(&child);
                let metadata = if self.follow { fs::metadata(&path) } else { fs::symlink_metadata(&path) };
                match metadata {
                    Ok(metadata) => self.add(&path, &name.join(&child), &metadata, depth + 1)?,
                    Err(error) => (self.note)(format!("{} is left out: {error}", path.display())),
                }
            }
        } else if kind.is_file() {
            let file = File::open(path).with_context(reading)?;
            // As long as it is now: one that grows or shrinks meanwhile is cut or filled up.
            let size = file.metadata().with_context(reading)?.len();
            header.set_size(size);
            header.set_entry_type(EntryType::Regular);
            self.archive.append_data(&mut header, name, file.chain(io::repeat(0)).take(size))?;
            self.count.files += 1;
            self.count.bytes += size;
        } else if kind.is_symlink() {
            let target = fs::read_link(path).with_context(reading)?;
            header.set_entry_type(EntryType::Symlink);
            self.archive.append_link(&mut header, name, target)?;
            self.count.files += 1;
        } else {
            let what = if kind.is_socket() { "a socket" } else { "a device or pipe" };
            (self.note)(format!("{} is left out: it is {what}", path.display()));
        }
        Ok(())
    }
}

/// Where a stream goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// A directory that is there gets the tree inside it, under `name`; otherwise the tree becomes this path.
    pub path: PathBuf,
    /// The source's own name.
    pub name: Vec<u8>,
    /// What is in the source goes into `path`, in place of the source itself.
    pub contents: bool,
    /// `path` must be a directory.
    pub directory: bool,
}

/// Takes a stream that [`pack`] wrote. Each file appears whole under its name or not at all.
///
/// # Errors
/// When the stream is cut off or is none, or something cannot be written: what was whole by then stays.
pub fn unpack(stream: impl Read, target: &Target, note: &mut dyn FnMut(String)) -> Result<Count> {
    let (base, top) = place(target)?;
    let mut archive = Archive::new(stream);
    let mut count = Count::default();
    // A directory's own mode and time come when it is filled: it may forbid writing.
    let mut directories: Vec<(Vec<Vec<u8>>, u32, u64)> = Vec::new();
    let mut whole = false;
    for entry in archive.entries().context("the stream of files cannot be read")? {
        let mut entry = entry.context("the stream of files broke off")?;
        let path = entry.path_bytes().into_owned();
        if path == END.as_bytes() {
            whole = true;
            break;
        }
        let below = names(&path)?;
        let shown = || {
            format!(
                "{}",
                target.path.join(below.iter().map(|name| OsStr::from_bytes(name)).collect::<PathBuf>()).display()
            )
        };
        let header = entry.header();
        let (mode, mtime) = (header.mode().unwrap_or(0o644) & 0o777, header.mtime().unwrap_or(0));
        let kind = header.entry_type();
        let full: Vec<&[u8]> = top.iter().map(Vec::as_slice).chain(below.iter().copied()).collect();
        let Some((name, parents)) = full.split_last() else {
            ensure!(kind == EntryType::Directory, "{} is a directory and the source is none", target.path.display());
            continue;
        };
        let parent = walk(&base, parents).with_context(|| format!("cannot write {}", shown()))?;
        match kind {
            EntryType::Directory => {
                make_directory(&parent, name).with_context(|| format!("cannot make the directory {}", shown()))?;
                directories.push((full.iter().map(|name| name.to_vec()).collect(), mode, mtime));
            }
            EntryType::Regular => {
                let size = entry.size();
                write_file(&parent, name, &mut entry, size, (mode, mtime))
                    .with_context(|| format!("cannot write {}", shown()))?;
                count.files += 1;
                count.bytes += size;
            }
            EntryType::Symlink => {
                let link = entry.link_name_bytes().context("a link leads nowhere")?.into_owned();
                ensure!(!link.is_empty() && !link.contains(&0), "a link leads nowhere");
                replace(&parent, name, |temporary| rustix::fs::symlinkat(OsStr::from_bytes(&link), &parent, temporary))
                    .with_context(|| format!("cannot make the link {}", shown()))?;
                count.files += 1;
            }
            _ => note(format!("{} is left out: it is neither file, directory nor link", shown())),
        }
    }
    ensure!(whole, "the stream of files broke off");
    for (path, mode, mtime) in directories.iter().rev() {
        let parts: Vec<&[u8]> = path.iter().map(Vec::as_slice).collect();
        // One that something else has taken the place of by now keeps what it has.
        if let Ok(directory) = walk(&base, &parts) {
            let _ = rustix::fs::fchmod(&directory, Mode::from_raw_mode(*mode));
            let _ = futimens(&directory, &times(*mtime));
        }
    }
    Ok(count)
}

/// The directory that the stream's tree goes to, and the name that it gets there; no name where its contents go there.
fn place(target: &Target) -> Result<(OwnedFd, Option<Vec<u8>>)> {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let path = &target.path;
    let open = |path: &Path| rustix::fs::open(path, flags, Mode::empty());
    match open(path) {
        Ok(directory) if target.contents => Ok((directory, None)),
        Ok(directory) => {
            let plain = !matches!(target.name.as_slice(), b"" | b"." | b"..") && !target.name.contains(&b'/');
            ensure!(plain, "the source has no name of its own: name the file at the destination");
            Ok((directory, Some(target.name.clone())))
        }
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) if !target.directory => {
            let Some(Component::Normal(name)) = path.components().next_back() else {
                bail!("there is no directory {}", path.display());
            };
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let parent = open(parent).with_context(|| format!("there is no directory {}", parent.display()))?;
            Ok((parent, Some(name.as_bytes().to_vec())))
        }
        Err(rustix::io::Errno::NOENT) => bail!("there is no directory {}", path.display()),
        Err(rustix::io::Errno::NOTDIR) => bail!("{} is no directory", path.display()),
        Err(error) => Err(error).with_context(|| format!("cannot open {}", path.display())),
    }
}

/// The names below `root`, each of which is one.
fn names(path: &[u8]) -> Result<Vec<&[u8]>> {
    let mut parts = path.split(|&byte| byte == b'/').filter(|part| !part.is_empty());
    ensure!(parts.next() == Some(ROOT.as_bytes()), "the stream names a file outside of its tree");
    let names: Vec<&[u8]> = parts.collect();
    ensure!(names.len() < DEEPEST, "the stream's tree is deeper than {DEEPEST} directories");
    let plain = |name: &&[u8]| !matches!(**name, [b'.'] | [b'.', b'.']) && !name.contains(&0);
    ensure!(names.iter().all(plain), "the stream names a file outside of its tree");
    Ok(names)
}

/// Goes down from `base`, by directories alone.
fn walk(base: &OwnedFd, names: &[&[u8]]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut here = openat(base, ".", flags, Mode::empty())?;
    for name in names {
        here = openat(&here, OsStr::from_bytes(name), flags, Mode::empty())?;
    }
    Ok(here)
}

fn make_directory(parent: &OwnedFd, name: &[u8]) -> rustix::io::Result<()> {
    match mkdirat(parent, OsStr::from_bytes(name), Mode::RWXU) {
        Err(rustix::io::Errno::EXIST) => walk(parent, &[name]).map(drop),
        other => other,
    }
}

fn write_file(
    parent: &OwnedFd,
    name: &[u8],
    contents: &mut impl Read,
    size: u64,
    (mode, mtime): (u32, u64),
) -> Result<()> {
    // Without a name until it is whole: whatever ends this process leaves nothing.
    let file = match openat(parent, ".", OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR) {
        Ok(file) => file,
        Err(rustix::io::Errno::OPNOTSUPP) => return write_named(parent, name, contents, size, (mode, mtime)),
        Err(error) => return Err(error.into()),
    };
    let file = fill(file, contents, size, (mode, mtime))?;
    let by_descriptor = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    replace(parent, name, |temporary| {
        linkat(rustix::fs::CWD, by_descriptor.as_str(), parent, temporary, AtFlags::SYMLINK_FOLLOW)
    })?;
    Ok(())
}

/// The same where the file system knows no files without a name.
fn write_named(
    parent: &OwnedFd,
    name: &[u8],
    contents: &mut impl Read,
    size: u64,
    attributes: (u32, u64),
) -> Result<()> {
    let temporary = temporary_name();
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(parent, &temporary, flags, Mode::RUSR | Mode::WUSR)?;
    let done = fill(file, contents, size, attributes)
        .and_then(|_| Ok(renameat(parent, &temporary, parent, OsStr::from_bytes(name))?));
    if done.is_err() {
        let _ = unlinkat(parent, &temporary, AtFlags::empty());
    }
    done
}

fn fill(file: OwnedFd, contents: &mut impl Read, size: u64, (mode, mtime): (u32, u64)) -> Result<File> {
    let mut file = File::from(file);
    let mut buffer = vec![0; BUFFER];
    let mut left = size;
    while left > 0 {
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let length = contents.read(&mut buffer[..most])?;
        ensure!(length > 0, "the stream of files broke off");
        file.write_all(&buffer[..length])?;
        left -= length as u64;
    }
    rustix::fs::fchmod(file.as_fd(), Mode::from_raw_mode(mode))?;
    futimens(file.as_fd(), &times(mtime))?;
    Ok(file)
}

/// Makes something under a name of its own and gives it the wanted one: what had that is replaced in one step, a
/// directory is not.
fn replace(parent: &OwnedFd, name: &[u8], make: impl FnOnce(&str) -> rustix::io::Result<()>) -> rustix::io::Result<()> {
    let temporary = temporary_name();
    make(&temporary)?;
    renameat(parent, temporary.as_str(), parent, OsStr::from_bytes(name)).inspect_err(|_| {
        let _ = unlinkat(parent, temporary.as_str(), AtFlags::empty());
    })
}

fn temporary_name() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    format!(".puter-{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

fn times(mtime: u64) -> Timestamps {
    let time = Timespec { tv_sec: i64::try_from(mtime).unwrap_or(0), tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

#[cfg(test)]
#[path = "transfer/tests.rs"]
mod tests;
