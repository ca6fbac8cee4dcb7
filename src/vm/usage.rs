//! Who owns which bytes of the disk.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::home::Home;
use super::images;
use super::settings::Settings;
use super::state::{Vm, load_all};

/// Everything that puter keeps, in bytes that the disk really holds.
#[derive(Clone, Debug, Serialize)]
pub struct Usage {
    pub images: Vec<ImageUse>,
    /// Layers as the registry gave them, which make the next pull of an image shorter.
    pub layers: u64,
    pub vms: Vec<VmUse>,
    pub snapshots: Vec<SnapshotUse>,
    /// The rest: the installed kernel, keys, state, puterd's log.
    pub other: u64,
    pub total: u64,
    /// What `puter image prune` would give back: images that nobody needs, and the layers.
    pub unused: u64,
    /// What the file system has left for its user.
    pub free: u64,
}

/// An image's share.
#[derive(Clone, Debug, Serialize)]
pub struct ImageUse {
    /// The first of its names; none where its tag has moved on.
    pub reference: Option<String>,
    pub digest: String,
    pub used: u64,
    /// The VMs and snapshots that stand on it.
    pub used_by: Vec<String>,
}

/// A snapshot's share. Blocks that the file system shares with others count as if they were its own.
#[derive(Clone, Debug, Serialize)]
pub struct SnapshotUse {
    pub name: String,
    /// All that it takes.
    pub used: u64,
    /// The memory in it.
    pub memory: u64,
    /// Who stands on its disk.
    pub used_by: Vec<String>,
}

/// A VM's share.
#[derive(Clone, Debug, Serialize)]
pub struct VmUse {
    pub name: String,
    /// What its disk holds beyond the image.
    pub overlay: u64,
    /// What the guest sees of it.
    pub disk: u64,
    pub logs: u64,
}

/// Looks at everything; what goes away meanwhile is not counted.
///
/// # Errors
/// When the directories cannot be read.
pub fn usage(home: &Home, settings: &Settings) -> Result<Usage> {
    let all = load_all(home)?;
    let image = |entry: images::Entry| ImageUse {
        reference: entry.kept.names.first().map(ToString::to_string),
        digest: entry.kept.digest.to_string(),
        used: entry.kept.used,
        used_by: entry.users.iter().map(|user| user.name()).collect(),
    };
    let mut images: Vec<ImageUse> = images::list(home, settings)?.into_iter().map(image).collect();
    images.sort_by_key(|image| std::cmp::Reverse(image.used));
    let mut seen = HashSet::new();
    let vms: Vec<VmUse> = all.vms.iter().map(|vm| share(home, vm, &mut seen)).collect();
    let snapshots = snapshots(home)?;
    let layers = images::look(home).map_or(0, |store| store.cached());
    let total = tree(home.root(), &mut HashSet::new());
    let known = layers
        + snapshots.iter().map(|snapshot| snapshot.used).sum::<u64>()
        + images.iter().map(|image| image.used).sum::<u64>()
        + vms.iter().map(|vm| vm.overlay + vm.logs).sum::<u64>();
    Ok(Usage {
        unused: images::prune(home, settings, false, true)?.bytes(),
        other: total.saturating_sub(known),
        free: super::home::free_space(home.root())?,
        images,
        layers,
        vms,
        snapshots,
        total,
    })
}

fn snapshots(home: &Home) -> Result<Vec<SnapshotUse>> {
    let users = super::snapshots::users(home)?;
    let all = super::snapshots::all(home, None)?.snapshots.into_iter();
    let share = |snapshot: super::snapshots::Snapshot| {
        let (memory, used) = snapshot.used(home);
        let used_by = users.get(&snapshot.origin).into_iter().flatten().map(|user| user.name()).collect();
        SnapshotUse { name: format!("{}@{}", snapshot.origin.vm, snapshot.label()), used, memory, used_by }
    };
    Ok(all.map(share).collect())
}

fn share(home: &Home, vm: &Vm, seen: &mut HashSet<(u64, u64)>) -> VmUse {
    let logs = home.volatile(&vm.name).into_iter().chain(home.leftovers(&vm.name));
    VmUse {
        name: vm.name.clone(),
        overlay: tree(&vm.overlay, seen),
        disk: vm.disk,
        logs: logs.map(|path| tree(&path, seen)).sum(),
    }
}

/// Bytes that a file, or everything below a directory, takes on the disk; what has several names counts once.
fn tree(path: &Path, seen: &mut HashSet<(u64, u64)>) -> u64 {
    let Ok(metadata) = fs::symlink_metadata(path) else { return 0 };
    if !seen.insert((metadata.dev(), metadata.ino())) {
        return 0;
    }
    let own = metadata.blocks() * 512;
    if !metadata.is_dir() {
        return own;
    }
    let below = fs::read_dir(path).into_iter().flatten().flatten();
    own + below.map(|entry| tree(&entry.path(), seen)).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_take_nothing_and_a_second_name_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let empty = tree(dir.path(), &mut HashSet::new());
        fs::File::create(dir.path().join("sparse")).unwrap().set_len(1 << 40).unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("sub/one"), vec![7; 1 << 20]).unwrap();
        fs::hard_link(dir.path().join("sub/one"), dir.path().join("two")).unwrap();
        let used = tree(dir.path(), &mut HashSet::new()) - empty;
        assert!(((1 << 20)..(1 << 20) + (64 << 10)).contains(&used), "{used}");
        assert_eq!(tree(Path::new("/no/such"), &mut HashSet::new()), 0);
    }

    #[test]
    fn a_vms_disk_and_logs_are_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.prepare().unwrap();
        let mut vm = crate::vm::state::tests::sample("web", 1);
        vm.overlay = home.overlay("web");
        fs::write(&vm.overlay, vec![1; 200_000]).unwrap();
        fs::write(home.console_log("web"), vec![1; 50_000]).unwrap();
        vm.save(&home).unwrap();
        let usage = usage(&home, &Settings::load().unwrap()).unwrap();
        let web = &usage.vms[0];
        assert!(web.overlay >= 200_000 && web.logs >= 50_000 && web.disk == 1 << 30, "{web:?}");
        assert!(usage.total >= web.overlay + web.logs && usage.free > 0);
        assert_eq!(usage.total, usage.layers + usage.other + web.overlay + web.logs);
    }
}
