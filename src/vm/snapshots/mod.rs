//! Snapshots: a directory `snapshot/<vm>/<id>/` each, with the disk, the files of the hypervisor where the machine ran,
//! and puter's own `snapshot.json`. It is there whole or not at all: it is made under a name with a leading dot.

mod check;
mod tree;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};

pub use check::{Mark, seal, verify};
pub use tree::{Leaf, lines};

use super::files::{self, Lock};
use super::home::Home;
use super::records;
use super::state::{Origin, ProcessId, Vm};
use super::{Hint, files::write_atomic};
use crate::disk::qcow2;
use crate::hypervisor::snapshot::MEMORY;
use crate::protocol::address::check_vm_name;

/// Version of `snapshot.json`'s layout.
pub const SCHEMA: u32 = 1;
/// The disk of a snapshot.
pub const DISK: &str = "disk.qcow2";
/// What puter knows of a snapshot.
const ABOUT: &str = "snapshot.json";
/// How long a command waits for another that works on the VM's snapshots.
const LOCK_LIMIT: Duration = Duration::from_secs(20);

/// What is known of a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    pub schema: u32,
    #[serde(flatten)]
    pub origin: Origin,
    pub name: Option<String>,
    /// Seconds since 1970-01-01 UTC.
    pub created: u64,
    /// Made by a `clone` that named no snapshot: it goes when nobody needs it any more.
    #[serde(default)]
    pub automatic: bool,
    /// The command that made an automatic one: as long as it lives, its clones may not be there yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maker: Option<ProcessId>,
    /// The VM as it was.
    pub machine: Vm,
    /// What can bring the memory back; absent where there is a disk alone.
    pub memory: Option<Maker>,
    /// How long the VM stood still, in seconds.
    pub paused: Option<f64>,
    /// The snapshot that the VM had come from, or that was taken of it before.
    pub parent: Option<Origin>,
    /// Bytes of its memory that it shares with its parent's, on a file system that can: what did not change is there once.
    #[serde(default)]
    pub shared: u64,
    /// What each file must be.
    pub files: BTreeMap<String, Mark>,
}

/// Who wrote a machine's memory and processors: another may not be able to read them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Maker {
    /// As [`crate::hypervisor::Kind`] shows itself.
    pub hypervisor: String,
    /// The host's processor; absent where it is emulated.
    pub cpu: Option<Cpu>,
}

/// A processor, as far as a guest that has begun on it depends on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    pub vendor: String,
    pub model: String,
    /// The features that Linux names, sorted.
    pub flags: Vec<String>,
}

/// A snapshot as people name it: `VM` or `VM@SNAPSHOT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    pub vm: String,
    /// Its name or id; the latest one where it is absent.
    pub which: Option<String>,
}

impl std::str::FromStr for Reference {
    type Err = String;

    fn from_str(text: &str) -> Result<Reference, String> {
        let (vm, which) = match text.split_once('@') {
            Some((vm, which)) => (vm, Some(which)),
            None => (text, None),
        };
        check_vm_name(vm)?;
        if let Some(which) = which {
            check_name(which)?;
        }
        Ok(Reference { vm: vm.into(), which: which.map(String::from) })
    }
}

/// Checks a snapshot's name: 1 to 63 letters, digits, '.', '_' and '-', the first no '.' or '-'.
///
/// # Errors
/// When it is none.
pub fn check_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let fine = (1..=63).contains(&name.len()) && name.chars().all(plain) && !name.starts_with(['.', '-']);
    match fine {
        true => Ok(()),
        false => Err(format!(
            "'{}' is no name of a snapshot: 1 to 63 letters, digits, '.', '_' and '-', the first a letter or digit",
            name.escape_default()
        )),
    }
}

impl Snapshot {
    pub fn directory(&self, home: &Home) -> PathBuf {
        directory(home, &self.origin)
    }

    pub fn disk(&self, home: &Home) -> PathBuf {
        self.directory(home).join(DISK)
    }

    /// The name where it has one, else the id.
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.origin.id)
    }

    /// Bytes of the memory and of the whole that the disk really holds.
    pub fn used(&self, home: &Home) -> (u64, u64) {
        let directory = self.directory(home);
        let size = |path: &Path| fs::symlink_metadata(path).map_or(0, |metadata| metadata.blocks() * 512);
        let all = fs::read_dir(&directory).into_iter().flatten().flatten();
        (size(&directory.join(MEMORY)), all.map(|entry| size(&entry.path())).sum())
    }

    /// Writes `snapshot.json`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, directory: &Path) -> Result<()> {
        write_atomic(&directory.join(ABOUT), &serde_json::to_vec_pretty(self)?)
    }
}

/// Where the snapshot is, or was.
pub(super) fn directory(home: &Home, origin: &Origin) -> PathBuf {
    home.snapshots_of(&origin.vm).join(&origin.id)
}

/// Reads a snapshot.
///
/// # Errors
/// When it cannot be read, is damaged, or was written by a newer puter.
pub fn load(home: &Home, origin: &Origin) -> Result<Snapshot> {
    let path = directory(home, origin).join(ABOUT);
    let parse = || -> Result<Snapshot> {
        let snapshot: Snapshot = records::parse(&fs::read(&path)?, SCHEMA)?;
        ensure!(snapshot.origin == *origin, "it describes {}", snapshot.origin);
        Ok(snapshot)
    };
    parse()
        .with_context(|| format!("the snapshot {origin} cannot be used: {}", path.display()))
        .hint(format!("remove it: puter snapshot delete {origin}"))
}

/// The snapshots, oldest first, and those that cannot be read with the reason.
#[derive(Debug, Default)]
pub struct All {
    pub snapshots: Vec<Snapshot>,
    pub damaged: Vec<(Origin, anyhow::Error)>,
}

/// Reads the snapshots of one VM, or of all.
///
/// # Errors
/// When a directory cannot be read.
pub fn all(home: &Home, vm: Option<&str>) -> Result<All> {
    let vms = match vm {
        Some(vm) => vec![vm.to_string()],
        None => names(&home.snapshots())?,
    };
    let mut all = All::default();
    for vm in vms {
        for id in names(&home.snapshots_of(&vm))? {
            let origin = Origin { vm: vm.clone(), id };
            match load(home, &origin) {
                Ok(snapshot) => all.snapshots.push(snapshot),
                Err(error) => all.damaged.push((origin, error)),
            }
        }
    }
    all.snapshots.sort_by(|a, b| (a.created, &a.origin).cmp(&(b.created, &b.origin)));
    Ok(all)
}

/// The directories in a directory whose names begin with no dot; none where it is not there.
pub(super) fn names(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("cannot read {}", directory.display()))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read {}", directory.display()))?;
        if let Some(name) = entry.file_name().to_str().filter(|name| !name.starts_with('.'))
            && entry.path().is_dir()
        {
            names.push(name.to_string());
        }
    }
    names.sort();
    Ok(names)
}

/// The snapshot that people mean.
///
/// # Errors
/// When there is none, or it cannot be read.
pub fn find(home: &Home, reference: &Reference) -> Result<Snapshot> {
    let mut all = all(home, Some(&reference.vm))?;
    let wanted = |origin: &Origin, name: Option<&str>| match &reference.which {
        None => true,
        Some(which) => origin.id == *which || name == Some(which),
    };
    // The latest of those that nobody else made.
    let found = all.snapshots.iter().filter(|s| wanted(&s.origin, s.name.as_deref()));
    let found = found.max_by_key(|s| (reference.which.is_some() || !s.automatic, s.created, s.origin.id.clone()));
    if let Some(snapshot) = found {
        return Ok(snapshot.clone());
    }
    if let Some(at) = all.damaged.iter().position(|(origin, _)| wanted(origin, None)) {
        return Err(all.damaged.swap_remove(at).1);
    }
    let vm = &reference.vm;
    match &reference.which {
        // Its name is in what cannot be read.
        Some(which) if !all.damaged.is_empty() => {
            let (origin, error) = all.damaged.swap_remove(0);
            Err(error.context(format!("'{vm}' has no snapshot '{which}' that can be read")))
                .hint(format!("restore the file from a copy, or remove it: puter snapshot delete {origin}"))
        }
        Some(which) => Err(anyhow!("'{vm}' has no snapshot '{which}'"))
            .hint(format!("`puter snapshots {vm}` shows those that it has")),
        None => Err(anyhow!("'{vm}' has no snapshot")).hint(format!("`puter snapshot {vm}` takes one")),
    }
}

/// Holds the VM's snapshots: nobody else adds or removes one. What a killed command left half made is removed.
///
/// # Errors
/// When another command has them, or the directory cannot be made.
pub fn hold(home: &Home, vm: &str) -> Result<Lock> {
    check_vm_name(vm).map_err(anyhow::Error::msg)?;
    let directory = home.snapshots_of(vm);
    let make = || {
        crate::failpoint::write().and_then(|()| fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory))
    };
    if !directory.is_dir() {
        make().with_context(|| format!("cannot make {}", directory.display()))?;
    }
    let busy = format!("another command has been working on the snapshots of '{vm}' for 20 seconds");
    let lock = files::lock(&directory.join(".lock"), LOCK_LIMIT, &busy)?;
    for entry in fs::read_dir(&directory)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') && name.ends_with(".tmp") {
            files::remove(&entry.path())?;
        }
    }
    Ok(lock)
}

/// Keeps others from removing one of the VM's snapshots, beside those who do the same.
///
/// # Errors
/// When another command adds or removes one, for a long time.
pub fn share(home: &Home, vm: &str) -> Result<Lock> {
    let busy = format!("another command has been working on the snapshots of '{vm}' for 20 seconds");
    files::lock_shared(&home.snapshots_of(vm).join(".lock"), LOCK_LIMIT, &busy)
}

/// Who needs a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum User {
    Vm(String),
    Snapshot(Origin),
}

impl User {
    /// The VM's name, or the snapshot's full one.
    pub fn name(&self) -> String {
        match self {
            User::Vm(name) => name.clone(),
            User::Snapshot(origin) => origin.to_string(),
        }
    }
}

impl std::fmt::Display for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            User::Vm(name) => write!(f, "the VM {name}"),
            User::Snapshot(origin) => write!(f, "the snapshot {origin}"),
        }
    }
}

/// Whose disks stand on which snapshot, as the disks themselves tell.
///
/// # Errors
/// When a directory cannot be read.
pub fn users(home: &Home) -> Result<BTreeMap<Origin, Vec<User>>> {
    let mut users: BTreeMap<Origin, Vec<User>> = BTreeMap::new();
    let mut note = |disk: &Path, user: User| {
        let backing = qcow2::read_header(disk).ok().and_then(|header| header.backing);
        if let Some(origin) = backing.and_then(|backing| origin_of(home, &backing)) {
            users.entry(origin).or_default().push(user);
        }
    };
    // Not by the state files: of a damaged one the disk is there all the same.
    for entry in fs::read_dir(home.overlays()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(vm) = name.strip_suffix(".qcow2") {
            note(&entry.path(), User::Vm(vm.into()));
        }
    }
    for vm in names(&home.snapshots())? {
        for id in names(&home.snapshots_of(&vm))? {
            let origin = Origin { vm: vm.clone(), id };
            note(&directory(home, &origin).join(DISK), User::Snapshot(origin));
        }
    }
    users.values_mut().for_each(|users| users.sort());
    Ok(users)
}

/// The snapshot whose disk this path is.
pub fn origin_of(home: &Home, disk: &Path) -> Option<Origin> {
    let root = home.snapshots();
    // Overlays name their base by a path without links.
    let relative = disk.strip_prefix(&root).ok().map(Path::to_path_buf);
    let relative = relative.or_else(|| Some(disk.strip_prefix(root.canonicalize().ok()?).ok()?.to_path_buf()))?;
    let mut parts = relative.components().map(|part| part.as_os_str().to_str());
    let (vm, id) = (parts.next()??, parts.next()??);
    Some(Origin { vm: vm.into(), id: id.into() })
}

/// The way out where a snapshot is needed.
const NEEDED: &str = "delete those first, or make a VM stand alone: puter clone --flatten";

/// Deletes a snapshot that nobody needs.
///
/// # Errors
/// When there is none, somebody needs it (the error names who), or it cannot be removed.
pub fn delete(home: &Home, reference: &Reference) -> Result<Origin> {
    let which = reference.which.as_ref().context("no snapshot is named");
    let which = which.hint(format!("name one as {0}@SNAPSHOT; `puter snapshots {0}` shows them", reference.vm))?;
    let _lock = hold(home, &reference.vm)?;
    let origin = match find(home, reference) {
        Ok(snapshot) => snapshot.origin,
        // One that cannot be read can be removed by its id.
        Err(error) => {
            let origin = Origin { vm: reference.vm.clone(), id: which.clone() };
            match directory(home, &origin).is_dir() {
                true => origin,
                false => return Err(error),
            }
        }
    };
    remove(home, &origin)?;
    Ok(origin)
}

/// Deletes several snapshots of several VMs, or none; one that is gone already is no hindrance.
///
/// # Errors
/// When one of them is needed (the error names by whom): none is removed then. When one cannot be removed.
pub fn delete_together(home: &Home, origins: &[Origin]) -> Result<()> {
    let mut there: Vec<&Origin> = origins.iter().filter(|origin| directory(home, origin).is_dir()).collect();
    // In one order, so that no two commands wait for each other.
    there.sort();
    let mut vms: Vec<&str> = there.iter().map(|origin| origin.vm.as_str()).collect();
    vms.dedup();
    let _locks: Vec<Lock> = vms.into_iter().map(|vm| hold(home, vm)).collect::<Result<_>>()?;
    let users = users(home)?;
    let needed = there.iter().filter_map(|origin| Some(format!("{origin} by {}", named(users.get(origin)?))));
    let needed: Vec<String> = needed.collect();
    if !needed.is_empty() {
        return Err(anyhow!("parts of it are needed: {}", needed.join("; "))).hint(NEEDED);
    }
    there.into_iter().filter(|origin| directory(home, origin).is_dir()).try_for_each(|origin| take_away(home, origin))
}

/// Removes it where nobody needs it. The caller holds the snapshots of the VM.
fn remove(home: &Home, origin: &Origin) -> Result<()> {
    if let Some(users) = users(home)?.remove(origin) {
        return Err(anyhow!("the snapshot {origin} is needed by {}", named(&users))).hint(NEEDED);
    }
    take_away(home, origin)
}

fn named(users: &[User]) -> String {
    users.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Removes one that nobody needs. The caller holds the snapshots of the VM.
fn take_away(home: &Home, origin: &Origin) -> Result<()> {
    let path = directory(home, origin);
    // Out of sight at once: who is killed midway leaves no half snapshot.
    let doomed = home.snapshots_of(&origin.vm).join(format!(".{}.tmp", origin.id));
    crate::failpoint::remove()
        .and_then(|()| fs::rename(&path, &doomed))
        .with_context(|| format!("cannot remove {}", path.display()))?;
    crate::failpoint::reach("snapshot delete: out of sight");
    files::remove(&doomed)
}

/// Removes automatic snapshots whose command was killed before anything stood on them. The caller holds the VM's
/// snapshots. What cannot be removed stays for the next time.
///
/// # Errors
/// When the snapshots cannot be read.
pub fn sweep(home: &Home, vm: &str) -> Result<()> {
    let lives = |id: ProcessId| crate::hypervisor::process::is_alive(id.pid, id.start_time);
    for snapshot in all(home, Some(vm))?.snapshots {
        if snapshot.automatic && !snapshot.maker.is_some_and(lives) {
            let _ = remove(home, &snapshot.origin);
        }
    }
    Ok(())
}

/// This process, as the maker of an automatic snapshot.
pub fn me() -> Option<ProcessId> {
    let pid = std::process::id();
    Some(ProcessId { pid, start_time: crate::hypervisor::process::start_time(pid)? })
}

/// Removes automatic snapshots that nobody needs any more, from this one on down the chain of disks. What cannot be
/// removed stays for the next time.
pub fn tidy(home: &Home, origin: &Origin) {
    let mut next = Some(origin.clone());
    while let Some(origin) = next.take() {
        let below = qcow2::read_header(&directory(home, &origin).join(DISK)).ok().and_then(|header| header.backing);
        let Ok(_lock) = hold(home, &origin.vm) else { return };
        let automatic = load(home, &origin).is_ok_and(|snapshot| snapshot.automatic);
        if automatic && remove(home, &origin).is_ok() {
            next = below.and_then(|disk| origin_of(home, &disk));
        }
        if names(&home.snapshots_of(&origin.vm)).is_ok_and(|left| left.is_empty()) {
            let _ = fs::remove_file(home.snapshots_of(&origin.vm).join(".lock"));
            let _ = fs::remove_dir(home.snapshots_of(&origin.vm));
        }
    }
}

/// Takes the memory from an automatic snapshot: who maps it keeps it, and nobody else will want it.
///
/// # Errors
/// When a file cannot be removed.
pub fn drop_memory(home: &Home, origin: &Origin) -> Result<()> {
    let _lock = hold(home, &origin.vm)?;
    let mut snapshot = load(home, origin)?;
    ensure!(snapshot.automatic, "{origin} is not automatic");
    snapshot.memory = None;
    snapshot.files.retain(|name, _| name == DISK);
    snapshot.save(&snapshot.directory(home))?;
    for name in crate::hypervisor::snapshot::FILES {
        files::remove(&snapshot.directory(home).join(name))?;
    }
    Ok(())
}

/// A new id: the time of day in UTC, with a number where that is taken.
///
/// # Errors
/// When the calendar ends.
pub fn new_id(home: &Home, vm: &str, now: u64) -> Result<String> {
    let base = timestamp(now);
    for number in 1..10_000 {
        let id = if number == 1 { base.clone() } else { format!("{base}-{number}") };
        if !directory(home, &Origin { vm: vm.into(), id: id.clone() }).exists() {
            return Ok(id);
        }
    }
    bail!("'{vm}' has too many snapshots of this second")
}

/// `20261123-234838`, from the seconds since 1970-01-01 UTC (days to a date after Howard Hinnant's `civil_from_days`).
fn timestamp(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}{month:02}{day:02}-{:02}{:02}{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

/// The host's processor (proc_cpuinfo(5)).
pub fn cpu() -> Option<Cpu> {
    parse_cpu(&fs::read_to_string("/proc/cpuinfo").ok()?)
}

fn parse_cpu(text: &str) -> Option<Cpu> {
    let first = text.split("\n\n").next()?;
    let field = |name: &str| {
        let mut lines = first.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_string())
    };
    let mut flags: Vec<String> =
        field("flags").or_else(|| field("Features"))?.split_ascii_whitespace().map(String::from).collect();
    flags.sort();
    let vendor = field("vendor_id").or_else(|| field("CPU implementer"))?;
    Some(Cpu { vendor, model: field("model name").or_else(|| field("CPU part")).unwrap_or_default(), flags })
}

impl Maker {
    /// Checks that this hypervisor and this host can go on with what the maker wrote.
    ///
    /// # Errors
    /// When they cannot; the hint tells what remains.
    pub fn check(&self, hypervisor: &str, cpu: Option<&Cpu>) -> Result<()> {
        let hint = "with --disk-only the disk alone is taken, and the machine boots from it";
        if self.hypervisor != hypervisor {
            return Err(anyhow!("its memory was written by {}, this is {hypervisor}", self.hypervisor)).hint(hint);
        }
        let (Some(was), Some(is)) = (&self.cpu, cpu) else { return Ok(()) };
        if was.vendor != is.vendor {
            return Err(anyhow!("it ran on a processor of {}, this is one of {}", was.vendor, is.vendor)).hint(hint);
        }
        let missing: Vec<&str> =
            was.flags.iter().filter(|flag| is.flags.binary_search(flag).is_err()).map(String::as_str).collect();
        if !missing.is_empty() {
            let (model, missing) = (&was.model, missing.join(" "));
            return Err(anyhow!("it ran on '{model}', and '{}' lacks {missing}", is.model)).hint(hint);
        }
        Ok(())
    }
}

/// What a VM without force keeps from being deleted: the snapshots that somebody asked for.
///
/// # Errors
/// When they cannot be read.
pub fn asked_for(home: &Home, vm: &str) -> Result<Vec<Origin>> {
    let all = all(home, Some(vm))?;
    let wanted = all.snapshots.into_iter().filter(|snapshot| !snapshot.automatic).map(|snapshot| snapshot.origin);
    Ok(wanted.chain(all.damaged.into_iter().map(|(origin, _)| origin)).collect())
}

/// Deletes all snapshots of a VM but those that others need, which must be automatic.
///
/// # Errors
/// When one that was asked for is needed; nothing is removed then.
pub fn delete_all(home: &Home, vm: &str) -> Result<()> {
    if !home.snapshots_of(vm).is_dir() {
        return Ok(());
    }
    let lock = hold(home, vm)?;
    let found = all(home, Some(vm))?;
    let users = users(home)?;
    // A chain within the VM's own goes as a whole; its own disk goes with it.
    let foreign = |user: &&User| match user {
        User::Vm(name) => name != vm,
        User::Snapshot(origin) => origin.vm != vm,
    };
    for snapshot in found.snapshots.iter().filter(|snapshot| !snapshot.automatic) {
        if let Some(user) = users.get(&snapshot.origin).and_then(|users| users.iter().find(foreign)) {
            return Err(anyhow!("the snapshot {} is needed by {user}", snapshot.origin))
                .hint("delete that first, or make it stand alone: puter clone --flatten");
        }
    }
    let damaged = found.damaged.into_iter().map(|(origin, _)| origin);
    // The latest first: they stand on the older ones. Automatic ones that clones need stay.
    let mut origins: Vec<Origin> = found.snapshots.into_iter().map(|snapshot| snapshot.origin).chain(damaged).collect();
    origins.reverse();
    for origin in &origins {
        let needed = self::users(home)?.get(origin).is_some_and(|users| users.iter().any(|user| foreign(&user)));
        if !needed {
            let doomed = home.snapshots_of(vm).join(format!(".{}.tmp", origin.id));
            fs::rename(directory(home, origin), &doomed)?;
            files::remove(&doomed)?;
        }
    }
    if names(&home.snapshots_of(vm))?.is_empty() {
        files::remove(&home.snapshots_of(vm))?;
    }
    drop(lock);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::state::tests::sample;

    #[test]
    fn ids_are_times_that_people_read() {
        for (seconds, text) in [
            (0, "19700101-000000"),
            (951_782_400, "20000229-000000"),
            (1_795_477_718, "20261123-234838"),
            (4_102_444_799, "20991231-235959"),
        ] {
            assert_eq!(timestamp(seconds), text);
        }
    }

    #[test]
    fn references_are_read_and_wrong_ones_say_why() {
        let parse = |text: &str| text.parse::<Reference>();
        assert_eq!(parse("web").unwrap(), Reference { vm: "web".into(), which: None });
        assert_eq!(parse("web@v1.2").unwrap(), Reference { vm: "web".into(), which: Some("v1.2".into()) });
        for bad in ["", "Web", "web@", "web@.x", "web@a/b", "web@../x", "@x", "web@a@b"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    fn snapshot(home: &Home, vm: &str, id: &str, automatic: bool, base: &Path) -> Snapshot {
        let origin = Origin { vm: vm.into(), id: id.into() };
        let path = directory(home, &origin);
        fs::create_dir_all(&path).unwrap();
        let format =
            if base.extension().is_some_and(|e| e == "raw") { qcow2::Format::Raw } else { qcow2::Format::Qcow2 };
        qcow2::create_overlay(&path.join(DISK), base, format, 1 << 30).unwrap();
        let snapshot = Snapshot {
            schema: SCHEMA,
            origin,
            name: (!automatic).then(|| format!("n{id}")),
            created: id.parse().unwrap(),
            automatic,
            maker: None,
            machine: sample(vm, 1),
            memory: None,
            paused: None,
            shared: 0,
            parent: None,
            files: BTreeMap::new(),
        };
        snapshot.save(&path).unwrap();
        snapshot
    }

    fn home() -> (tempfile::TempDir, Home, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path().join("h"));
        home.prepare().unwrap();
        let base = dir.path().join("base.raw");
        fs::File::create(&base).unwrap().set_len(1 << 20).unwrap();
        (dir, home, base)
    }

    #[test]
    fn a_snapshot_is_found_by_name_by_id_and_as_the_latest() {
        let (_dir, home, base) = home();
        let one = snapshot(&home, "web", "1", false, &base);
        let two = snapshot(&home, "web", "2", false, &base);
        snapshot(&home, "web", "3", true, &base);
        let find = |text: &str| find(&home, &text.parse().unwrap());
        assert_eq!(find("web@n1").unwrap(), one);
        assert_eq!(find("web@2").unwrap(), two);
        assert_eq!(find("web").unwrap(), two, "an automatic one is not meant");
        assert!(find("web@4").unwrap_err().to_string().contains("no snapshot '4'"));
        assert!(find("db").unwrap_err().to_string().contains("'db' has no snapshot"));
        fs::write(two.directory(&home).join(ABOUT), "{").unwrap();
        assert!(find("web@2").unwrap_err().to_string().contains("cannot be used"));
        assert_eq!(all(&home, None).unwrap().damaged.len(), 1);
    }

    #[test]
    fn what_others_need_stays_and_who_needs_it_is_named() {
        let (_dir, home, base) = home();
        let one = snapshot(&home, "web", "1", false, &base);
        let clone = home.overlay("new");
        qcow2::create_overlay(&clone, &one.disk(&home), qcow2::Format::Qcow2, 1 << 30).unwrap();
        let auto = snapshot(&home, "new", "2", true, &clone.clone());
        // As a snapshot's disk is: a copy of the overlay, on the same base.
        fs::copy(&clone, auto.disk(&home)).unwrap();
        let reference = "web@n1".parse().unwrap();
        let error = delete(&home, &reference).unwrap_err().to_string();
        assert!(error.contains("needed by the VM new, the snapshot new@2"), "{error}");
        assert!(delete_all(&home, "web").unwrap_err().to_string().contains("needed by the VM new"));
        tidy(&home, &auto.origin);
        assert!(!auto.directory(&home).exists() && one.directory(&home).exists());
        fs::remove_file(&clone).unwrap();
        delete(&home, &reference).unwrap();
        assert!(find(&home, &reference).is_err());
        assert!(delete(&home, &"web".parse().unwrap()).unwrap_err().to_string().contains("no snapshot is named"));
    }

    #[test]
    fn several_go_together_or_none_does() {
        let (_dir, home, base) = home();
        let [one, two] = ["web", "db"].map(|vm| snapshot(&home, vm, "1", false, &base));
        let clone = home.overlay("new");
        qcow2::create_overlay(&clone, &one.disk(&home), qcow2::Format::Qcow2, 1 << 30).unwrap();
        let gone = Origin { vm: "absent".into(), id: "1".into() };
        let all = [one.origin.clone(), gone.clone(), two.origin.clone()];
        let error = delete_together(&home, &all).unwrap_err();
        assert_eq!(error.to_string(), "parts of it are needed: web@1 by the VM new");
        assert!(one.directory(&home).exists() && two.directory(&home).exists());
        fs::remove_file(&clone).unwrap();
        delete_together(&home, &all).unwrap();
        assert!(!one.directory(&home).exists() && !two.directory(&home).exists());
        assert!(!home.snapshots_of("absent").exists(), "nothing is made of what is gone");
        delete_together(&home, &all).unwrap();
    }

    #[test]
    fn half_made_ones_are_swept_and_never_shown() {
        let (_dir, home, base) = home();
        snapshot(&home, "web", "1", false, &base);
        let half = home.snapshots_of("web").join(".2.tmp");
        fs::create_dir(&half).unwrap();
        assert_eq!(all(&home, Some("web")).unwrap().snapshots.len(), 1);
        let auto = |id: &str, maker: Option<ProcessId>| {
            let kept = Snapshot { maker, ..snapshot(&home, "web", id, true, &base) };
            kept.save(&kept.directory(&home)).unwrap();
            kept.directory(&home)
        };
        let (orphan, wanted) = (auto("3", None), auto("4", me()));
        let _held = hold(&home, "web").unwrap();
        assert!(!half.exists());
        sweep(&home, "web").unwrap();
        assert!(!orphan.exists() && wanted.exists());
    }

    #[test]
    fn memory_goes_back_only_where_it_can_run() {
        let cpu = |vendor: &str, flags: &[&str]| Cpu {
            vendor: vendor.into(),
            model: "m".into(),
            flags: flags.iter().map(ToString::to_string).collect(),
        };
        let maker = Maker { hypervisor: "ch v54".into(), cpu: Some(cpu("A", &["avx", "sse"])) };
        maker.check("ch v54", Some(&cpu("A", &["avx", "fma", "sse"]))).unwrap();
        for (hypervisor, cpu, why) in [
            ("ch v55", cpu("A", &["avx", "sse"]), "this is ch v55"),
            ("ch v54", cpu("B", &["avx", "sse"]), "processor of A"),
            ("ch v54", cpu("A", &["sse"]), "lacks avx"),
        ] {
            let error = maker.check(hypervisor, Some(&cpu)).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let text = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: X\nflags\t\t: sse avx\n\nprocessor\t: 1\n";
        let parsed = parse_cpu(text).unwrap();
        assert_eq!((parsed.vendor.as_str(), parsed.flags), ("GenuineIntel", vec!["avx".to_string(), "sse".into()]));
    }
}
