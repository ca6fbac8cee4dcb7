//! Which hypervisor this host can use.

use std::fmt;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow};

use super::emulator;
use crate::hint::Hint;

/// The oldest cloud-hypervisor that can be used: it lets qcow2 files have backing files when told.
pub const MINIMUM_VERSION: u32 = 51;

/// The names of the program, as distributions and the project's releases have it.
const NAMES: [&str; 2] = ["cloud-hypervisor", "cloud-hypervisor-static"];

/// What the user wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Setting {
    /// cloud-hypervisor where KVM can be used, the emulator elsewhere.
    Auto,
    /// This cloud-hypervisor.
    Path(PathBuf),
    /// The emulator.
    Emulated,
}

/// What will run the machines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    CloudHypervisor {
        path: PathBuf,
        /// As the program tells it, such as `v54.0`.
        version: String,
    },
    Emulated {
        /// Why, for the user to know.
        reason: String,
    },
}

impl Kind {
    /// The program's name.
    pub fn name(&self) -> &'static str {
        match self {
            Kind::CloudHypervisor { .. } => "cloud-hypervisor",
            Kind::Emulated { .. } => "emulator",
        }
    }

    /// The program to run, and the name to call it by where that is another.
    pub(super) fn program(&self) -> Result<(PathBuf, Option<String>)> {
        match self {
            Kind::CloudHypervisor { path, .. } => Ok((path.clone(), None)),
            Kind::Emulated { .. } => {
                let me = std::env::current_exe().context("cannot find puter's own executable")?;
                Ok((me, Some("puter-emulator".into())))
            }
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::CloudHypervisor { version, .. } => write!(f, "cloud-hypervisor {version}"),
            Kind::Emulated { .. } => f.write_str("puter's emulator on QEMU"),
        }
    }
}

/// Finds the hypervisor.
///
/// # Errors
/// When what the setting or the host calls for is missing or too old; the hint tells how to get it.
pub fn detect(setting: &Setting) -> Result<Kind> {
    match setting {
        Setting::Emulated => emulated("the setting 'hypervisor' says so".into()),
        Setting::Path(path) => cloud_hypervisor(path.clone()),
        Setting::Auto => match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            Err(error) => emulated(format!("/dev/kvm cannot be used ({error})")),
            Ok(_) => match NAMES.iter().find_map(|name| on_path(name)) {
                Some(path) => cloud_hypervisor(path),
                None => Err(anyhow!("cloud-hypervisor is not on the PATH")).hint(format!(
                    "install cloud-hypervisor {MINIMUM_VERSION} or newer, or set hypervisor = \"emulated\" \
                     (PUTER_HYPERVISOR=emulated)"
                )),
            },
        },
    }
}

fn emulated(reason: String) -> Result<Kind> {
    emulator::Tools::find().context("cannot emulate")?;
    Ok(Kind::Emulated { reason })
}

fn cloud_hypervisor(path: PathBuf) -> Result<Kind> {
    let output = Command::new(&path)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", path.display()))
        .hint("correct the setting 'hypervisor', or install cloud-hypervisor")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (version, major) =
        parse_version(&text).with_context(|| format!("{} --version does not name a version", path.display()))?;
    if major < MINIMUM_VERSION {
        return Err(anyhow!("{} is version {version}; puter needs v{MINIMUM_VERSION} or newer", path.display()))
            .hint("install a newer cloud-hypervisor, or set hypervisor = \"emulated\"");
    }
    Ok(Kind::CloudHypervisor { path, version })
}

/// Reads `cloud-hypervisor v54.0` or `cloud-hypervisor v53.0-246-g01234567`.
pub fn parse_version(text: &str) -> Option<(String, u32)> {
    let version = text.lines().next()?.strip_prefix("cloud-hypervisor ")?.trim();
    let major = version.strip_prefix('v')?.split('.').next()?.parse().ok()?;
    let sane = version.len() < 64 && version.chars().all(|c| c.is_ascii_graphic());
    sane.then(|| (version.to_string(), major))
}

/// The first executable of this name on the PATH.
pub(super) fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| is_executable(file))
}

pub(super) fn is_executable(file: &Path) -> bool {
    file.is_file() && rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn versions_of_releases_and_of_builds_are_read() {
        assert_eq!(parse_version("cloud-hypervisor v54.0\n"), Some(("v54.0".into(), 54)));
        let built = "cloud-hypervisor v53.0-246-g0123abc";
        assert_eq!(parse_version(built), Some(("v53.0-246-g0123abc".into(), 53)));
        for bad in ["", "qemu 7.2", "cloud-hypervisor", "cloud-hypervisor 54", "cloud-hypervisor vx.1"] {
            assert_eq!(parse_version(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_old_one_is_refused_with_both_versions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ch");
        std::fs::write(&path, "#!/bin/sh\necho cloud-hypervisor v50.2\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let error = detect(&Setting::Path(path)).unwrap_err().to_string();
        assert!(error.contains("v50.2") && error.contains("v51"), "{error}");
        let error = detect(&Setting::Path("/nowhere/ch".into())).unwrap_err();
        assert!(error.to_string().contains("/nowhere/ch"), "{error}");
    }
}
