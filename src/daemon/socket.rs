//! The home's run directory: the lock that keeps puterd single, its Unix socket, and systemd's part in both.

use std::env;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, Mode};

use crate::ending::{self, is_ending};
use crate::protocol::unix_http::MAX_SOCKET_PATH;

/// systemd's first file descriptor (sd_listen_fds(3)).
const FIRST_FD: i32 = 3;

/// Makes `run` in the home, for its owner alone.
///
/// # Errors
/// The kernel's, with the path; a directory of another user is refused.
pub fn make_run(home: &Path, uid: u32) -> Result<PathBuf> {
    let run = home.join("run");
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&run)
        .with_context(|| format!("cannot create {}: choose another home with PUTER_HOME or --home", run.display()))?;
    for path in [home, &run] {
        let metadata = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
        if metadata.uid() != uid {
            let owner = metadata.uid();
            bail!("{} belongs to uid {owner} and puterd runs as uid {uid}: start it as that user", path.display());
        }
    }
    fs::set_permissions(&run, fs::Permissions::from_mode(0o700))
        .with_context(|| format!("cannot make {} private", run.display()))?;
    Ok(run)
}

/// Takes the lock of a run directory; it ends with the file, however the process ends.
///
/// # Errors
/// Another puterd holds it: the message names its process.
pub fn lock(run: &Path) -> Result<File> {
    let path = run.join("daemon.lock");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let mut text = String::new();
    let _ = (&mut file).take(20).read_to_string(&mut text);
    let former = text.trim().parse::<u32>().ok();
    let end = Instant::now() + ending::LIMIT;
    loop {
        // Asked first: who is gone by then has let the lock go.
        let ending = former.is_some_and(is_ending) && Instant::now() < end;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) if !ending => break,
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) if !ending => {
                let who = former.map_or_else(String::new, |pid| format!(" (process {pid})"));
                let path = path.display();
                bail!("another puterd{who} holds {path}: stop that one first, or give this one its own --home");
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
    written.with_context(|| format!("cannot write {}", path.display()))?;
    Ok(file)
}

/// A listening socket, and the file to remove at the end where puterd made it.
pub struct Listener {
    pub socket: UnixListener,
    file: Option<(PathBuf, u64)>,
}

impl Listener {
    /// Takes systemd's socket, or listens on `path` in the place of a stale socket.
    ///
    /// # Errors
    /// The path is too long, is not a socket, or someone listens on it; or the kernel's.
    pub fn open(path: &Path) -> Result<Listener> {
        if let Some(socket) = inherited()? {
            return Ok(Listener { socket, file: None });
        }
        let length = path.as_os_str().as_bytes().len();
        if length > MAX_SOCKET_PATH {
            bail!(
                "the socket's path {} has {length} bytes and Linux allows {MAX_SOCKET_PATH}: choose a shorter one with \
                 --socket, or a shorter home with PUTER_HOME",
                path.display()
            );
        }
        remove_stale(path)?;
        // No other user may connect, not even between bind and chmod.
        let before = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(path);
        rustix::process::umask(before);
        let socket = bound.with_context(|| format!("cannot listen on {}", path.display()))?;
        let inode = fs::symlink_metadata(path).with_context(|| format!("cannot read {}", path.display()))?.ino();
        Ok(Listener { socket, file: Some((path.to_owned(), inode)) })
    }

    /// Removes the socket's file, unless another has taken its place.
    pub fn remove(self) {
        if let Some((path, inode)) = self.file
            && fs::symlink_metadata(&path).is_ok_and(|m| m.ino() == inode)
            && let Err(error) = fs::remove_file(&path)
        {
            log!("cannot remove {}: {error}", path.display());
        }
    }
}

fn remove_stale(path: &Path) -> Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.with_context(|| format!("cannot read {}", path.display()))?,
    };
    // puterd@.socket has a link here, which may lead nowhere since that is gone.
    let is_link = metadata.is_symlink() && fs::metadata(path).map_or(true, |end| end.file_type().is_socket());
    if !metadata.file_type().is_socket() && !is_link {
        bail!("{} exists and is not a socket: move it away, or choose another path with --socket", path.display());
    }
    match UnixStream::connect(path) {
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
            fs::remove_file(path).with_context(|| format!("cannot remove the stale socket {}", path.display()))
        }
        Ok(_) => bail!("another process listens on {}: stop it, or choose another path with --socket", path.display()),
        Err(error) => Err(error).with_context(|| format!("cannot tell whether {} is in use", path.display())),
    }
}

/// How many sockets systemd gave, by its variables LISTEN_PID and LISTEN_FDS.
fn inherited_count(pid: Option<&str>, count: Option<&str>, own: u32) -> u32 {
    let number = |text: Option<&str>| text.and_then(|t| t.parse::<u32>().ok());
    if number(pid) == Some(own) { number(count).unwrap_or(0) } else { 0 }
}

fn inherited() -> Result<Option<UnixListener>> {
    let variable = |name| env::var(name).ok();
    let (pid, count) = (variable("LISTEN_PID"), variable("LISTEN_FDS"));
    match inherited_count(pid.as_deref(), count.as_deref(), std::process::id()) {
        0 => return Ok(None),
        1 => {}
        more => bail!("systemd gave {more} sockets and puterd takes one: its unit must have one ListenStream="),
    }
    // SAFETY: systemd names this process in LISTEN_PID and hands it the descriptor, which nothing else here uses.
    let fd = unsafe { OwnedFd::from_raw_fd(FIRST_FD) };
    let wrong = "the socket from systemd is not usable: its unit must have ListenStream= with a path";
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).context(wrong)?;
    let listening = rustix::net::sockopt::socket_acceptconn(&fd).context(wrong)?;
    if rustix::net::sockopt::socket_domain(&fd).context(wrong)? != rustix::net::AddressFamily::UNIX || !listening {
        bail!(wrong);
    }
    Ok(Some(UnixListener::from(fd)))
}

/// Tells systemd a state such as `READY=1`; a failure is a line in the log.
pub fn notify(state: &str) {
    if let Err(error) = crate::notify::notify(state) {
        log!("cannot notify systemd: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_puterd_is_told_of_the_first() {
        let home = tempfile::tempdir().unwrap();
        let uid = rustix::process::geteuid().as_raw();
        let run = make_run(home.path(), uid).unwrap();
        assert_eq!(fs::metadata(&run).unwrap().mode() & 0o777, 0o700);
        let held = lock(&run).unwrap();
        let error = lock(&run).unwrap_err().to_string();
        assert!(error.contains(&format!("another puterd (process {}) holds", std::process::id())), "{error}");
        drop(held);
        lock(&run).unwrap();
        assert!(make_run(home.path(), uid + 1).is_err());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let listener = Listener::open(&path).unwrap();
        let error = Listener::open(&path).map(drop).unwrap_err().to_string();
        assert!(error.contains("another process listens on"), "{error}");
        listener.remove();
        assert!(!path.exists());
        fs::write(&path, "notes").unwrap();
        let error = Listener::open(&path).map(drop).unwrap_err().to_string();
        assert!(error.contains("is not a socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "notes");
    }

    #[test]
    fn a_link_to_a_socket_is_replaced_when_nobody_listens_there() {
        let dir = tempfile::tempdir().unwrap();
        let (link, end) = (dir.path().join("link"), dir.path().join("end"));
        std::os::unix::fs::symlink(&end, &link).unwrap();
        Listener::open(&link).unwrap().remove();
        assert!(fs::symlink_metadata(&link).is_err());
        std::os::unix::fs::symlink(&end, &link).unwrap();
        let lives = UnixListener::bind(&end).unwrap();
        let error = Listener::open(&link).map(drop).unwrap_err().to_string();
        assert!(error.contains("another process listens on"), "{error}");
        drop(lives);
        Listener::open(&link).unwrap().remove();
        // The end is another's.
        assert!(end.exists());
        fs::remove_file(&end).unwrap();
        fs::write(&end, "notes").unwrap();
        std::os::unix::fs::symlink(&end, &link).unwrap();
        let error = Listener::open(&link).map(drop).unwrap_err().to_string();
        assert!(error.contains("is not a socket"), "{error}");
    }

    #[test]
    fn a_replaced_socket_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::open(&path).unwrap();
        fs::rename(&path, dir.path().join("old")).unwrap();
        fs::write(&path, "another's").unwrap();
        listener.remove();
        assert!(path.exists());
    }

    #[test]
    fn a_path_too_long_for_the_kernel_is_refused_with_the_limit() {
        let error = Listener::open(Path::new(&"/d".repeat(54))).map(drop).unwrap_err().to_string();
        assert!(error.contains("has 108 bytes and Linux allows 107"), "{error}");
    }

    #[test]
    fn sockets_given_to_another_process_are_not_taken() {
        assert_eq!(inherited_count(Some("7"), Some("1"), 7), 1);
        assert_eq!(inherited_count(Some("8"), Some("1"), 7), 0);
        assert_eq!(inherited_count(None, Some("1"), 7), 0);
        assert_eq!(inherited_count(Some("7"), Some("x"), 7), 0);
    }
}
