//! virtiofsd, which serves one of the host's directories to a guest: https://gitlab.com/virtio-fs/virtiofsd

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::detect::{is_executable, on_path};
use super::process;
use crate::hint::Hint;

/// Where Debian and others put it, beside the PATH.
const PLACES: [&str; 3] = ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd"];
/// The oldest version that can make a share read-only.
const MINIMUM: (u32, u32) = (1, 11);

/// A command line for virtiofsd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    program: PathBuf,
    arguments: Vec<String>,
    pub socket: PathBuf,
}

impl Server {
    /// Serves `directory` on `socket` as the calling user: the guest's root can do there what the user can.
    ///
    /// # Errors
    /// When virtiofsd is missing or too old, or a path cannot be told.
    pub fn new(directory: &Path, socket: &Path, read_only: bool) -> Result<Server> {
        let program = find()?;
        let directory = directory.to_str().with_context(|| format!("{} is not UTF-8", directory.display()))?;
        // Without root it makes a user namespace, in which the caller is root and nobody else exists.
        let mut arguments = vec![socket_argument(socket), "--sandbox=namespace".into()];
        arguments.push(format!("--shared-dir={directory}"));
        if read_only {
            arguments.push("--readonly".into());
        }
        Ok(Server { program, arguments, socket: socket.to_path_buf() })
    }

    /// Starts it. It ends by itself when its hypervisor has gone.
    ///
    /// # Errors
    /// When it cannot be run, or its former socket cannot be removed.
    pub fn spawn(&self, log: std::fs::File) -> Result<Child> {
        match std::fs::remove_file(&self.socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", self.socket.display()));
            }
            _ => {}
        }
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command.process_group(0).current_dir("/");
        command.spawn().with_context(|| format!("cannot run {}", self.program.display()))
    }
}

/// The processes that serve this socket.
pub fn serving(socket: &Path) -> Vec<(u32, u64)> {
    process::with_argument(&socket_argument(socket))
}

fn socket_argument(socket: &Path) -> String {
    format!("--socket-path={}", socket.display())
}

fn find() -> Result<PathBuf> {
    let places = PLACES.iter().map(PathBuf::from).filter(|path| is_executable(path));
    let hint = "install virtiofsd 1.11 or newer (Debian: apt install virtiofsd; or cargo install virtiofsd)";
    let mut old = None;
    for program in on_path("virtiofsd").into_iter().chain(places) {
        match version(&program) {
            Some(found) if found >= MINIMUM => return Ok(program),
            found => old = Some((program, found)),
        }
    }
    let refuse = || -> Result<PathBuf> {
        match old {
            Some((program, Some((major, minor)))) => {
                bail!("{} is version {major}.{minor}; puter needs 1.11 or newer", program.display())
            }
            // QEMU's own of the same name knows other options.
            Some((program, None)) => bail!("{} is not the virtiofsd that puter needs", program.display()),
            None => bail!("virtiofsd is not here, and directories cannot be shared without it"),
        }
    };
    refuse().hint(hint)
}

/// The version of the program written in Rust; `None` for any other.
fn version(program: &Path) -> Option<(u32, u32)> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    parse_version(&String::from_utf8_lossy(&output.stdout))
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim().strip_prefix("virtiofsd ")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_programs_of_this_name_are_told_apart() {
        assert_eq!(parse_version("virtiofsd 1.14.0\n"), Some((1, 14)));
        assert_eq!(parse_version("virtiofsd version 7.2.22 (Debian 1:7.2)\nusing FUSE kernel"), None);
        assert_eq!(parse_version(""), None);
    }
}
