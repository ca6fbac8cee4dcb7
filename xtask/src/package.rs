//! `cargo xtask package`: packages of what `packaging/` says, an archive for other systems, and their check.

pub mod check;
pub mod deb;
mod licences;
mod linked;
pub mod rpm;
pub mod sbom;
pub mod tar;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::build;
use crate::shell::{output, top};

/// What goes into a package.
pub struct Source {
    /// The static executable.
    executable: PathBuf,
    version: String,
    /// The time of all files, in seconds since 1970, so that the same source makes the same package.
    epoch: String,
    /// What is linked into the executable: all licences, compressed, and the bill of materials.
    licences: Vec<u8>,
    bill: String,
}

impl Source {
    /// The executable that is given, or else built, and its version.
    ///
    /// # Errors
    /// When it cannot be built, or does not report the version of this source.
    pub fn of(executable: Option<PathBuf>) -> Result<Source> {
        let executable = match executable {
            Some(given) => fs::canonicalize(&given).with_context(|| format!("cannot find {}", given.display()))?,
            None => build::release()?.executable,
        };
        let version = version()?;
        let reported = output(Command::new(&executable).args(["puterd", "--version"]))?;
        ensure!(
            reported == format!("puterd {version}"),
            "{} is '{reported}', and this is the source of version {version}: build it anew",
            executable.display()
        );
        let epoch = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(set) => set,
            Err(_) => output(Command::new("git").args(["log", "-1", "--format=%ct"]).current_dir(top()))?,
        };
        let licences = gzip(licences::text()?.as_bytes())?;
        let bill = sbom::text(&executable, &epoch)?;
        Ok(Source { executable, version, epoch, licences, bill })
    }

    /// The completion script of a shell, as the executable itself prints it.
    fn completions(&self, shell: &str) -> Result<String> {
        Ok(output(Command::new(&self.executable).args(["puter", "completions", shell]).env_clear())? + "\n")
    }
}

/// The version that Cargo.toml gives to puter.
fn version() -> Result<String> {
    let text = read(&top().join("Cargo.toml"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("version = "));
    Ok(line.context("Cargo.toml has no version")?.trim_matches('"').to_string())
}

/// Where packages are made.
///
/// # Errors
/// When it cannot be made.
pub fn directory() -> Result<PathBuf> {
    let dir = top().join("target/packages");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// The manual's pages with the names of their files.
fn pages() -> Result<Vec<(String, PathBuf)>> {
    let dir = top().join("man");
    let mut pages = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.extension().is_some_and(|section| section.to_string_lossy().parse::<u8>().is_ok()) {
            pages.push((name, path));
        }
    }
    ensure!(!pages.is_empty(), "{} holds no page", dir.display());
    pages.sort();
    Ok(pages)
}

/// Puts a page, compressed, where man(1) looks below `share`.
fn put_page(name: &str, page: &Path, share: &Path) -> Result<()> {
    let section = name.rsplit('.').next().unwrap_or_default();
    put(&share.join(format!("man/man{section}/{name}.gz")), &gzip(read(page)?.as_bytes())?)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Writes a file and the directories above it.
fn put(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// As `gzip -9n`: without a name and a time, which would differ each time.
fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut command = Command::new("gzip");
    let mut child =
        command.args(["-9", "-n"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot run gzip")?;
    let mut input = child.stdin.take().context("gzip has no input")?;
    let output = std::thread::scope(|scope| {
        scope.spawn(move || input.write_all(bytes));
        child.wait_with_output()
    })?;
    ensure!(output.status.success(), "gzip: {}", output.status);
    Ok(output.stdout)
}

/// Gives a tree the modes of an installed one, whatever the umask was.
fn set_modes(path: &Path) -> Result<()> {
    if path.is_symlink() {
        return Ok(());
    }
    let mode = if path.is_dir() { 0o755 } else { 0o644 };
    set_mode(path, mode)?;
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            set_modes(&entry?.path())?;
        }
    }
    Ok(())
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot set the mode of {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gzip_makes_the_same_bytes_of_the_same_and_gives_them_back() {
        let text = "one line and another\n".repeat(20_000);
        let packed = gzip(text.as_bytes()).unwrap();
        assert_eq!(packed, gzip(text.as_bytes()).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("deep/text.gz");
        put(&file, &packed).unwrap();
        assert_eq!(output(Command::new("gzip").arg("-dc").arg(&file)).unwrap(), text.trim_end());
    }

    #[test]
    fn modes_do_not_depend_on_the_umask() {
        let dir = tempfile::tempdir().unwrap();
        let (inner, file) = (dir.path().join("d"), dir.path().join("d/f"));
        put(&file, "x").unwrap();
        set_mode(&file, 0o777).unwrap();
        set_mode(&inner, 0o700).unwrap();
        set_modes(dir.path()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(&inner), mode(&file)), (0o755, 0o644));
    }
}
