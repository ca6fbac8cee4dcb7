//! Running other programs with errors that say which one and why.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};

/// A command run as root: through sudo where this process is not.
pub fn as_root(program: impl AsRef<std::ffi::OsStr>) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

/// The cargo that runs this.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo_on_path(&mut command);
    command
}

/// Where cargo keeps what it fetches.
///
/// # Errors
/// When neither CARGO_HOME nor HOME is set.
pub fn cargo_home() -> Result<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    home.context("cannot tell where cargo keeps sources: HOME is not set")
}

/// Lets a command find the cargo that runs this, and its compiler: sudo's PATH may have neither.
pub fn cargo_on_path(command: &mut Command) {
    let Some(cargo) = std::env::var_os("CARGO").map(PathBuf::from) else { return };
    let former = std::env::var_os("PATH").unwrap_or_default();
    let dirs = cargo.parent().map(Path::to_path_buf).into_iter().chain(std::env::split_paths(&former));
    if let Ok(path) = std::env::join_paths(dirs) {
        command.env("PATH", path);
    }
}

/// Runs to the end with this process's own output.
///
/// # Errors
/// When it cannot be started or fails.
pub fn run(command: &mut Command) -> Result<()> {
    let line = show(command);
    let status = command.status().with_context(|| format!("cannot run {line}"))?;
    match status.success() {
        true => Ok(()),
        false => bail!("{line}: {status}"),
    }
}

/// Runs to the end and gives what it printed on stdout.
///
/// # Errors
/// When it cannot be started or fails; the error holds what it printed on stderr.
pub fn output(command: &mut Command) -> Result<String> {
    let line = show(command);
    let Output { status, stdout, stderr } = command.output().with_context(|| format!("cannot run {line}"))?;
    match status.success() {
        true => Ok(String::from_utf8_lossy(&stdout).trim_end().to_string()),
        false => bail!("{line}: {status}\n{}", String::from_utf8_lossy(&stderr).trim_end()),
    }
}

/// The command as one would type it.
pub fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// The repository's top directory.
pub fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_path_buf()
}

/// The first file of this name on the PATH; the directories of system tools are looked at as well.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|file| file.is_file())
}
