//! Debian packages, by dpkg-deb from the files in `packaging/debian/`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{Source, directory, gzip, pages, put, put_page, read, sbom, set_mode, set_modes};
use crate::shell::{output, run, top};

/// Where dpkg-deb finds what dpkg(1) shall know of a package.
const CONTROL: &str = "DEBIAN";
const SCRIPTS: [&str; 4] = ["preinst", "postinst", "prerm", "postrm"];
/// The page that goes where the agent goes.
const AGENT_PAGE: &str = "puter-agent.8";

/// A package's name, and its executable.
pub(super) struct Kind {
    pub name: &'static str,
    pub executable: &'static str,
    mode: u32,
}

/// For hosts. The file is closed until its group is there.
pub(super) const HOST: Kind = Kind { name: "puter", executable: "usr/lib/puter/puter-multi", mode: 0o750 };
/// For guests.
pub(super) const AGENT: Kind = Kind { name: "puter-agent", executable: "usr/bin/puter-agent", mode: 0o755 };

/// Both packages.
pub struct Made {
    pub host: PathBuf,
    pub agent: PathBuf,
}

/// Makes both in `target/packages`.
///
/// # Errors
/// When a tool fails, or the changelog does not begin with this version.
pub fn make(source: &Source) -> Result<Made> {
    let changelog = read(&top().join("packaging/debian/changelog"))?;
    let head = format!("puter ({}) ", source.version);
    ensure!(changelog.starts_with(&head), "packaging/debian/changelog does not begin with '{head}'");
    make_as(source, &source.version, &directory()?, "-Zxz")
}

/// Makes both under another version, as an upgrade's check needs, and compressed otherwise.
pub(super) fn make_as(source: &Source, version: &str, out: &Path, compression: &str) -> Result<Made> {
    let make = |kind| build(kind, source, version, out, compression);
    Ok(Made { host: make(&HOST)?, agent: make(&AGENT)? })
}

pub(super) fn build(kind: &Kind, source: &Source, version: &str, out: &Path, compression: &str) -> Result<PathBuf> {
    let work = tempfile::Builder::new().prefix("puter-deb-").tempdir_in("/var/tmp")?;
    let tree = work.path();
    let recipe = top().join("packaging/debian");
    let own = recipe.join(kind.name);
    files(kind, source, tree, "vendor-completions")?;
    let share = tree.join("usr/share");
    let doc = share.join("doc").join(kind.name);
    put(&doc.join("copyright"), copyright(&read(&recipe.join("copyright"))?, &read(&top().join("LICENSE-MIT"))?))?;
    put(&doc.join("changelog.gz"), gzip(read(&recipe.join("changelog"))?.as_bytes())?)?;
    put(&share.join("lintian/overrides").join(kind.name), read(&own.join("lintian-overrides"))?)?;
    set_modes(tree)?;
    set_mode(&tree.join(kind.executable), kind.mode)?;
    control(&own, tree, version)?;
    let architecture = architecture()?;
    let deb = out.join(format!("{}_{version}_{architecture}.deb", kind.name));
    let mut command = Command::new("dpkg-deb");
    command.args([compression, "--root-owner-group", "--build"]).arg(tree).arg(&deb);
    output(command.env("SOURCE_DATE_EPOCH", &source.epoch))?;
    Ok(deb)
}

/// What a package has on every system; `zsh` is where its shell looks for completions.
pub(super) fn files(kind: &Kind, source: &Source, tree: &Path, zsh: &str) -> Result<()> {
    run(Command::new("cp").arg("-r").arg(top().join("packaging/debian").join(kind.name).join("tree/usr")).arg(tree))?;
    let share = tree.join("usr/share");
    put(&tree.join(kind.executable), fs::read(&source.executable).context("cannot read the executable")?)?;
    match kind.name {
        "puter" => host_files(source, tree, zsh)?,
        _ => {
            let unit = "usr/lib/systemd/system/puter-agent.service";
            put(&tree.join(unit), read(&top().join("packaging/guest/agent").join(unit))?)?;
        }
    }
    for (name, page) in pages()?.iter().filter(|(name, _)| (name == AGENT_PAGE) == (kind.name == AGENT.name)) {
        put_page(name, page, &share)?;
    }
    let doc = share.join("doc").join(kind.name);
    put(&doc.join("third-party-licences.gz"), &source.licences)?;
    put(&doc.join(sbom::NAME), &source.bill)
}

/// What is on hosts alone.
fn host_files(source: &Source, tree: &Path, zsh: &str) -> Result<()> {
    let bin = tree.join("usr/bin");
    fs::create_dir_all(&bin)?;
    // Side by side: puter looks for puterd beside itself, and puterd's unit holds the path.
    for name in ["puter", "puterd"] {
        symlink("../lib/puter/puter-multi", bin.join(name))?;
    }
    let share = tree.join("usr/share");
    for (shell, place) in [
        ("bash", "bash-completion/completions/puter"),
        ("zsh", &format!("zsh/{zsh}/_puter")),
        ("fish", "fish/vendor_completions.d/puter.fish"),
    ] {
        put(&share.join(place), source.completions(shell)?)?;
    }
    let doc = share.join("doc/puter");
    put(&doc.join("README.md"), read(&top().join("README.md"))?)?;
    run(Command::new("cp").arg("-r").arg(top().join("packaging/examples")).arg(&doc))
}

/// The copyright file with the text of puter's own licence, indented as its format wants it.
fn copyright(template: &str, licence: &str) -> String {
    let body =
        licence.split_once("Permission is").map_or(licence.to_string(), |(_, rest)| format!("Permission is{rest}"));
    let line = |line: &str| if line.trim().is_empty() { " .".to_string() } else { format!(" {line}") };
    template.replace("@MIT@", &body.trim_end().lines().map(line).collect::<Vec<_>>().join("\n"))
}

/// Writes what dpkg shall know: the control file, the maintainer's scripts and the sums of all files.
fn control(own: &Path, tree: &Path, version: &str) -> Result<()> {
    let mut sums = Command::new("find");
    sums.args(["usr", "-type", "f", "-exec", "md5sum", "{}", "+"]).current_dir(tree);
    let mut sums: Vec<String> = output(&mut sums)?.lines().map(str::to_string).collect();
    sums.sort_by(|a, b| a.split("  ").nth(1).cmp(&b.split("  ").nth(1)));
    let size = size(tree)?.to_string();
    let to = tree.join(CONTROL);
    let text = read(&own.join("control"))?;
    let text = text.replace("@VERSION@", version).replace("@SIZE@", &size);
    put(&to.join("control"), text.replace("@ARCHITECTURE@", &architecture()?))?;
    put(&to.join("md5sums"), sums.join("\n") + "\n")?;
    set_modes(&to)?;
    for script in SCRIPTS.iter().filter(|script| own.join(script).is_file()) {
        put(&to.join(script), read(&own.join(script))?)?;
        set_mode(&to.join(script), 0o755)?;
    }
    Ok(())
}

/// KiB as deb-substvars(5) counts them: file systems differ in what a directory takes.
fn size(path: &Path) -> Result<u64> {
    if path.is_symlink() || !path.is_dir() {
        return Ok(fs::symlink_metadata(path)?.len().div_ceil(1024));
    }
    fs::read_dir(path)?.try_fold(1, |sum, entry| Ok(sum + size(&entry?.path())?))
}

fn architecture() -> Result<String> {
    output(Command::new("dpkg").arg("--print-architecture"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_licence_is_indented_as_debian_wants_it() {
        let text = copyright(
            "License: Expat\n@MIT@\n\nmore\n",
            "MIT License\n\nCopyright\n\nPermission is hereby\n\nTHE END\n",
        );
        assert_eq!(text, "License: Expat\n Permission is hereby\n .\n THE END\n\nmore\n");
    }

    #[test]
    fn each_control_file_leaves_nothing_to_fill_in() {
        for kind in [&HOST, &AGENT] {
            let dir = tempfile::tempdir().unwrap();
            put(&dir.path().join("usr/file"), "x").unwrap();
            control(&top().join("packaging/debian").join(kind.name), dir.path(), "7.8").unwrap();
            let text = read(&dir.path().join("DEBIAN/control")).unwrap();
            assert!(text.contains("\nVersion: 7.8\n"), "{text}");
            assert!(!["@VERSION@", "@SIZE@", "@ARCHITECTURE@"].iter().any(|left| text.contains(left)), "{text}");
            let sums = read(&dir.path().join("DEBIAN/md5sums")).unwrap();
            assert_eq!(sums, "9dd4e461268c8034f5c8564e155c67a6  usr/file\n");
        }
    }
}
