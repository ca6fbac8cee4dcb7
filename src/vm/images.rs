//! Images as commands see them: who needs which, what can go, and what a pull brought.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};

use super::Hint;
use super::home::Home;
use super::lifecycle::Context;
use super::settings::Settings;
use super::snapshots::{self, User};
use super::state::{Origin, load_all};
use crate::disk::qcow2;
use crate::image::{Digest, Image, Kept, Reference, Removed, Store};

/// More disks on one another than this are a circle or a joke.
const MAX_DEPTH: usize = 64;

/// Who needs which image.
#[derive(Debug, Default)]
pub struct Users {
    known: BTreeMap<Digest, BTreeSet<User>>,
    /// Those of whom nobody can tell what they need: state and disk are damaged.
    unknown: BTreeSet<User>,
}

impl Users {
    /// VMs and snapshots that need the image.
    pub fn of(&self, digest: &Digest) -> Vec<&User> {
        self.known.get(digest).into_iter().flatten().collect()
    }

    /// Why the image cannot go, in words; empty where it can.
    pub fn reasons(&self, digest: &Digest) -> Vec<String> {
        let unknown = self.unknown.iter().map(|user| format!("perhaps {user}, which is damaged"));
        self.of(digest).into_iter().map(User::to_string).chain(unknown).collect()
    }
}

/// Finds who needs which image: by the state files and snapshots, and by the disks themselves, each down to its base.
///
/// # Errors
/// When a directory cannot be read.
pub fn users(home: &Home) -> Result<Users> {
    let mut users = Users::default();
    let mut doubtful = BTreeSet::new();
    let states = load_all(home)?;
    for vm in states.vms {
        users.add(&vm.image.digest, User::Vm(vm.name));
    }
    doubtful.extend(states.damaged.into_iter().map(|(name, _)| User::Vm(name)));
    let all = snapshots::all(home, None)?;
    for snapshot in all.snapshots {
        users.add(&snapshot.machine.image.digest, User::Snapshot(snapshot.origin));
    }
    doubtful.extend(all.damaged.into_iter().map(|(origin, _)| User::Snapshot(origin)));
    for (disk, user) in disks(home)? {
        match base(home, &disk) {
            Some(digest) => {
                doubtful.remove(&user);
                users.known.entry(digest).or_default().insert(user);
            }
            // Its state tells what it needs.
            None if users.known.values().any(|known| known.contains(&user)) => {}
            None => drop(doubtful.insert(user)),
        }
    }
    // A damaged state without a disk loses nothing.
    users.unknown = doubtful.into_iter().filter(|user| disk(home, user).exists()).collect();
    Ok(users)
}

impl Users {
    fn add(&mut self, digest: &str, user: User) {
        if let Ok(digest) = digest.parse() {
            self.known.entry(digest).or_default().insert(user);
        }
    }
}

fn disk(home: &Home, user: &User) -> PathBuf {
    match user {
        User::Vm(name) => home.overlay(name),
        User::Snapshot(origin) => snapshots::directory(home, origin).join(snapshots::DISK),
    }
}

/// Every disk, with its owner.
fn disks(home: &Home) -> Result<Vec<(PathBuf, User)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(home.overlays()).into_iter().flatten().flatten() {
        if let Some(vm) = entry.file_name().to_string_lossy().strip_suffix(".qcow2") {
            found.push((entry.path(), User::Vm(vm.into())));
        }
    }
    for vm in snapshots::names(&home.snapshots())? {
        for id in snapshots::names(&home.snapshots_of(&vm))? {
            let user = User::Snapshot(Origin { vm: vm.clone(), id });
            let disk = disk(home, &user);
            if disk.exists() {
                found.push((disk, user));
            }
        }
    }
    Ok(found)
}

/// The image at the end of a disk's chain of backing files.
fn base(home: &Home, disk: &Path) -> Option<Digest> {
    let mut next = disk.to_path_buf();
    for _ in 0..MAX_DEPTH {
        let backing = qcow2::read_header(&next).ok()?.backing?;
        match image_of(home, &backing) {
            Some(digest) => return Some(digest),
            None => next = backing,
        }
    }
    None
}

/// The image whose disk this path is.
fn image_of(home: &Home, disk: &Path) -> Option<Digest> {
    let root = home.images().join("disks");
    // Overlays name their base by a path without links.
    let relative = disk.strip_prefix(&root).ok().map(Path::to_path_buf);
    let relative = relative.or_else(|| Some(disk.strip_prefix(root.canonicalize().ok()?).ok()?.to_path_buf()))?;
    let hex = relative.components().next()?.as_os_str().to_str()?;
    format!("sha256:{hex}").parse().ok()
}

/// The images that new VMs get where none is named: the one that `init` chose, and the one that the settings name.
fn defaults(home: &Home, settings: &Settings, store: &Store) -> Vec<Digest> {
    let chosen = super::init::default_digest(home).and_then(|digest| digest.parse().ok());
    let named = settings.image.as_ref().and_then(|text| Some(*store.find(text).ok()?.digest()));
    chosen.into_iter().chain(named).collect()
}

/// The store, where there is one: to look is not to make.
pub fn look(home: &Home) -> Option<Store> {
    Store::look(&home.images())
}

/// An image with those who need it.
#[derive(Debug)]
pub struct Entry {
    pub kept: Kept,
    /// Whether new VMs get it where none is named.
    pub is_default: bool,
    pub users: Vec<User>,
}

/// All images.
///
/// # Errors
/// When a directory cannot be read.
pub fn list(home: &Home, settings: &Settings) -> Result<Vec<Entry>> {
    let Some(store) = look(home) else { return Ok(Vec::new()) };
    let (users, defaults) = (users(home)?, defaults(home, settings, &store));
    let entry = |kept: Kept| Entry {
        is_default: defaults.contains(&kept.digest),
        users: users.of(&kept.digest).into_iter().cloned().collect(),
        kept,
    };
    Ok(store.kept()?.into_iter().map(entry).collect())
}

/// The image that people mean.
///
/// # Errors
/// When there is none.
pub fn find(home: &Home, settings: &Settings, text: &str) -> Result<(Store, Entry)> {
    let absent = || anyhow!("there is no image '{}' here", super::files::plain(text));
    let hint = "`puter image pull IMAGE` gets one";
    let store = look(home).ok_or_else(absent).hint(hint)?;
    let digest = *store.find(text)?.digest();
    let entry = list(home, settings)?.into_iter().find(|entry| entry.kept.digest == digest);
    Ok((store, entry.ok_or_else(absent).hint(hint)?))
}

/// What a pull brought.
#[derive(Debug)]
pub struct Pulled {
    pub image: Image,
    /// What the name meant before; the same digest where nothing has changed.
    pub former: Option<Digest>,
}

/// Asks where the image comes from what its name means now, and has that.
///
/// # Errors
/// When it cannot be had; what the name meant before is there as it was.
pub fn pull(context: &Context, text: &str, architecture: Option<&str>) -> Result<Pulled> {
    if text.starts_with("sha256:") {
        return Err(anyhow!("a digest alone does not tell where the image comes from"))
            .hint("write it after the name: NAME@sha256:…");
    }
    let reference: Reference = text.parse().map_err(|why| anyhow!("{why}"))?;
    let store = Store::open(&context.home.images())?;
    let former = store.get(&reference)?.map(|image| image.digest);
    let image = context.fetch(&store, &reference, true, architecture)?;
    Ok(Pulled { image, former })
}

/// Forgets a name, and deletes the image if that was its last. Tells also whether that was the image of new VMs.
///
/// # Errors
/// When there is none, or a VM or snapshot needs it (the error names them).
pub fn delete(home: &Home, settings: &Settings, text: &str) -> Result<(Removed, bool)> {
    let absent = || anyhow!("there is no image '{}' here", super::files::plain(text));
    look(home).ok_or_else(absent).hint("`puter image list` shows those that are")?;
    let store = Store::open(&home.images())?;
    let defaults = defaults(home, settings, &store);
    let removed = store.delete(text, &|digest| Ok(users(home)?.reasons(digest)))?;
    let was_default = removed.images.iter().any(|image| image.left.is_empty() && defaults.contains(&image.digest));
    Ok((removed, was_default))
}

/// Deletes all images that no VM and no snapshot needs, and the cached layers. The image for new VMs stays unless `all`.
/// With `dry` it only tells what would go.
///
/// # Errors
/// When another command uses the images, or something cannot be removed.
pub fn prune(home: &Home, settings: &Settings, all: bool, dry: bool) -> Result<Removed> {
    let Some(mut store) = look(home) else { return Ok(Removed::default()) };
    if !dry {
        store = Store::open(&home.images())?;
    }
    // Asked once, and that under the lock: nobody makes a VM meanwhile.
    let known = std::cell::OnceCell::new();
    let needed = |digest: &Digest| -> Result<Vec<String>> {
        if known.get().is_none() {
            let _ = known.set((users(home)?, defaults(home, settings, &store)));
        }
        let Some((users, defaults)) = known.get() else { return Ok(Vec::new()) };
        let mut reasons = users.reasons(digest);
        if defaults.contains(digest) && !all {
            reasons.push("new VMs".into());
        }
        Ok(reasons)
    };
    if dry { store.prunable(&needed) } else { store.prune(&needed) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::qcow2::Format;
    use crate::vm::state::tests::sample;

    const HEX: [&str; 3] = ["a", "b", "c"];

    fn digest(which: usize) -> Digest {
        format!("sha256:{}", HEX[which].repeat(64)).parse().unwrap()
    }

    /// A home with two image disks.
    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.prepare().unwrap();
        for which in 0..2 {
            fs::create_dir_all(image(&home, which).parent().unwrap()).unwrap();
            fs::File::create(image(&home, which)).unwrap().set_len(1 << 20).unwrap();
        }
        (dir, home)
    }

    fn image(home: &Home, which: usize) -> PathBuf {
        home.images().join("disks").join(digest(which).hex()).join("disk.raw")
    }

    fn overlay(path: &Path, base: &Path, format: Format) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        qcow2::create_overlay(path, base, format, 1 << 20).unwrap();
    }

    fn names(users: &Users, which: usize) -> Vec<String> {
        users.reasons(&digest(which))
    }

    #[test]
    fn a_disk_needs_the_image_at_the_end_of_its_chain() {
        let (_dir, home) = home();
        // No state names any of these: what is left of VMs and snapshots whose files are damaged.
        let snapshot = home.snapshots_of("web").join("1").join(snapshots::DISK);
        overlay(&home.overlay("web"), &image(&home, 0), Format::Raw);
        overlay(&snapshot, &image(&home, 0), Format::Raw);
        overlay(&home.overlay("clone"), &snapshot, Format::Qcow2);
        fs::write(home.state("clone"), "{").unwrap();
        let users = users(&home).unwrap();
        assert_eq!(names(&users, 0), ["the VM clone", "the VM web", "the snapshot web@1"]);
        assert_eq!(names(&users, 1), [""; 0]);
    }

    #[test]
    fn a_state_needs_its_image_even_where_its_disk_is_not_made_yet() {
        let (_dir, home) = home();
        let mut vm = sample("new", 1);
        vm.image.digest = digest(1).to_string();
        vm.save(&home).unwrap();
        assert_eq!(names(&users(&home).unwrap(), 1), ["the VM new"]);
        // Nor does a damaged disk matter while the state can be read.
        fs::write(home.overlay("new"), "no disk").unwrap();
        assert_eq!(names(&users(&home).unwrap(), 1), ["the VM new"]);
        assert_eq!(names(&users(&home).unwrap(), 0), [""; 0]);
    }

    #[test]
    fn what_cannot_be_read_may_need_any_image() {
        let (_dir, home) = home();
        fs::write(home.overlay("web"), "no disk").unwrap();
        fs::write(home.state("web"), "{").unwrap();
        for which in 0..3 {
            assert_eq!(names(&users(&home).unwrap(), which), ["perhaps the VM web, which is damaged"]);
        }
        assert!(users(&home).unwrap().of(&digest(0)).is_empty(), "the list shows what is known");
        fs::remove_file(home.overlay("web")).unwrap();
        assert_eq!(names(&users(&home).unwrap(), 0), [""; 0]);
    }

    #[test]
    fn the_images_of_new_machines_go_only_with_all_the_others() {
        let (dir, home) = home();
        let store = Store::open(&home.images()).unwrap();
        store.name(&"localhost/named:1".parse().unwrap(), &digest(1)).unwrap();
        let chosen = serde_json::json!({ "image": "x", "digest": digest(0).to_string() });
        let settings = |image: Option<&str>| {
            let mut settings = Settings::load().unwrap();
            settings.image = image.map(String::from);
            settings
        };
        let gone = |settings: &Settings, all: bool| -> Vec<Digest> {
            let removed = prune(&home, settings, all, true).unwrap();
            removed.images.into_iter().map(|image| image.digest).collect()
        };
        assert_eq!(gone(&settings(None), false), [digest(0), digest(1)]);
        fs::write(home.defaults(), chosen.to_string()).unwrap();
        assert_eq!(gone(&settings(None), false), [digest(1)]);
        assert_eq!(gone(&settings(Some("localhost/named:1")), false), []);
        assert_eq!(gone(&settings(Some("localhost/other")), false), [digest(1)]);
        assert_eq!(gone(&settings(Some("localhost/named:1")), true), [digest(0), digest(1)]);
        assert!(image(&home, 0).exists() && image(&home, 1).exists(), "so far that was talk");
        let (_, was_default) = delete(&home, &settings(None), &digest(0).to_string()).unwrap();
        assert!(was_default && !image(&home, 0).exists());
        assert_eq!(prune(&home, &settings(None), false, false).unwrap().images.len(), 1);
        assert!(!image(&home, 1).exists() && dir.path().join("images/refs").read_dir().unwrap().next().is_none());
    }

    #[test]
    fn disks_that_stand_on_one_another_in_a_circle_end_the_search() {
        let (_dir, home) = home();
        let (one, two) = (home.overlay("one"), home.overlay("two"));
        overlay(&two, &image(&home, 0), Format::Raw);
        overlay(&one, &two, Format::Qcow2);
        fs::remove_file(&two).unwrap();
        overlay(&two, &one, Format::Qcow2);
        assert_eq!(base(&home, &one), None);
        assert_eq!(names(&users(&home).unwrap(), 0).len(), 2);
    }
}
