//! What is read from puter's home, damaged: pieces of `which file (one byte), bytes`.

use std::fs;
use std::path::{Component, Path};

use puter::image::Store;
use puter::vm::home::Home;
use puter::vm::snapshots::{self, Snapshot};
use puter::vm::state::{self, Origin, Vm};
use puter::vm::{cluster, images};

use crate::{pieces, readable, scratch};

const DIGEST: &str = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";

pub fn run(input: &[u8]) {
    let top = scratch::empty();
    let home = Home::at(top.join("home"));
    home.prepare().expect("a home");
    let disk = home.images().join("disks").join(DIGEST);
    let places = [
        home.state("web"),
        home.state("db"),
        home.cluster("shop"),
        home.snapshots_of("web").join("1/snapshot.json"),
        home.snapshots_of("web").join("2/snapshot.json"),
        home.images().join("refs/one.json"),
        disk.join("image.json"),
        home.defaults(),
    ];
    for piece in pieces(input) {
        let Some((which, bytes)) = piece.split_first() else { continue };
        let place = &places[usize::from(*which) % places.len()];
        fs::create_dir_all(place.parent().expect("a directory")).expect("a directory");
        fs::write(place, bytes).expect("room");
    }
    if disk.exists() {
        fs::write(disk.join("disk.raw"), [0; 512]).expect("room");
    }
    let beside = fs::read_dir(&top).expect("a directory").count();
    read(&home);
    assert_eq!(fs::read_dir(&top).expect("a directory").count(), beside);
}

fn read(home: &Home) {
    let states = state::load_all(home).expect("a directory that can be read");
    for vm in &states.vms {
        vm.save(home).expect("room");
        assert_eq!(Vm::load(home, &vm.name).expect("what was written").as_ref(), Some(vm));
        let _ = (vm.state().to_string(), vm.ports.iter().map(ToString::to_string).collect::<Vec<_>>());
        for mount in &vm.mounts {
            let _ = mount.to_string();
        }
        vm.head.iter().for_each(|origin| inside(home, origin));
    }
    states.damaged.iter().for_each(|(_, error)| readable(error));

    let clusters = cluster::load_all(home).expect("a directory that can be read");
    for one in &clusters.clusters {
        one.save(home).expect("room");
        let again = cluster::load_all(home).expect("a directory that can be read").clusters;
        assert!(again.contains(one));
        let members = one.members();
        assert!(members.len() <= cluster::MOST_MEMBERS as usize);
        for member in &members {
            assert!(cluster::machine(home, member).is_ok_and(|vm| vm.is_none_or(|vm| vm.name == member.vm)));
        }
        let started: usize = one.waves().expect("an order").iter().map(Vec::len).sum();
        assert_eq!(started, one.roles.len());
        for cut in &one.snapshots {
            for (member, id) in &cut.members {
                inside(home, &Origin { vm: format!("{}-{member}", one.name), id: id.clone() });
            }
        }
    }
    clusters.damaged.iter().for_each(|(_, error)| readable(error));

    let all = snapshots::all(home, None).expect("a directory that can be read");
    for snapshot in &all.snapshots {
        inside(home, &snapshot.origin);
        snapshot.parent.iter().for_each(|origin| inside(home, origin));
        // A fraction may lose its last bit on the way.
        let plain = |snapshot: &Snapshot| Snapshot { paused: None, ..snapshot.clone() };
        plain(snapshot).save(&snapshot.directory(home)).expect("room");
        let again = snapshots::load(home, &snapshot.origin).expect("what was written");
        assert!(again == plain(snapshot));
        assert!(!snapshot.label().is_empty());
        if let Err(error) = snapshots::verify(home, snapshot, false) {
            readable(&error);
        }
    }
    all.damaged.iter().for_each(|(_, error)| readable(error));
    // Each that there is has its line, whatever it says of where it came from; a circle has none.
    assert!(snapshots::lines(&all.snapshots, &states.vms).len() <= all.snapshots.len() + states.vms.len());

    if let Some(store) = Store::look(&home.images()) {
        for image in store.list().expect("a directory that can be read") {
            let _ = image.check_bootable();
            assert!(image.disk.starts_with(home.images()) && image.disk.exists());
        }
        images::users(home).expect("a directory that can be read");
    }
}

/// What an origin names is a directory of the snapshots.
fn inside(home: &Home, origin: &Origin) {
    let path = home.snapshots_of(&origin.vm).join(&origin.id);
    let below = path.strip_prefix(home.snapshots()).expect("a path below the snapshots");
    assert!(is_plain(below) && below.components().count() == 2, "{}", path.display());
}

fn is_plain(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_)))
}
