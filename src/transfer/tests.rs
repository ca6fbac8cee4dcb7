use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

fn target(path: &Path, name: &str) -> Target {
    Target { path: path.into(), name: name.into(), contents: false, directory: false }
}

fn stream(source: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    pack(source, false, &mut bytes, &mut |_| {}).unwrap();
    bytes
}

/// A tree with files, a directory that forbids writing, links and a name that is not UTF-8.
fn tree(at: &Path) {
    fs::create_dir_all(at.join("sub/locked")).unwrap();
    fs::write(at.join("file"), "contents").unwrap();
    fs::set_permissions(at.join("file"), fs::Permissions::from_mode(0o751)).unwrap();
    fs::write(at.join("sub/locked/in"), "inside").unwrap();
    fs::write(at.join(OsStr::from_bytes(b"odd \n\xff name")), "odd").unwrap();
    fs::write(at.join("sub").join("x".repeat(200)), "long").unwrap();
    symlink("/etc/nowhere", at.join("link")).unwrap();
    fs::set_permissions(at.join("sub/locked"), fs::Permissions::from_mode(0o555)).unwrap();
}

fn unlock(at: &Path) {
    fs::set_permissions(at.join("sub/locked"), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_tree_arrives_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    tree(&from);
    let count = unpack(&stream(&from)[..], &target(&to, "from"), &mut |note| panic!("{note}")).unwrap();
    assert_eq!(count, Count { files: 5, bytes: 8 + 6 + 3 + 4 });
    let mode = |path: &str| fs::metadata(to.join(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("file"), mode("sub/locked")), (0o751, 0o555));
    assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/etc/nowhere"));
    assert_eq!(fs::read(to.join(OsStr::from_bytes(b"odd \n\xff name"))).unwrap(), b"odd");
    assert_eq!(fs::read(to.join("sub").join("x".repeat(200))).unwrap(), b"long");
    let mtime = |at: &Path| fs::metadata(at.join("file")).unwrap().mtime();
    assert_eq!(mtime(&from), mtime(&to));
    unlock(&from);
    unlock(&to);
}

#[test]
fn where_it_goes_is_as_for_cp() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("source/sub")).unwrap();
    fs::write(at("source/file"), "1").unwrap();
    fs::write(at("one"), "2").unwrap();
    fs::create_dir(at("there")).unwrap();
    let go = |source: &str, target: &Target| unpack(&stream(&at(source))[..], target, &mut |_| {});
    // A directory that is there gets the source inside, one that is not becomes the source.
    go("source", &target(&at("there"), "source")).unwrap();
    assert!(at("there/source/sub").is_dir());
    go("source", &target(&at("new"), "source")).unwrap();
    assert!(at("new/file").is_file());
    go("one", &target(&at("there"), "one")).unwrap();
    go("one", &target(&at("renamed"), "one")).unwrap();
    go("one", &target(&at("renamed"), "one")).unwrap();
    assert_eq!((fs::read(at("there/one")).unwrap(), fs::read(at("renamed")).unwrap()), (b"2".into(), b"2".into()));
    go("source/.", &Target { contents: true, ..target(&at("there"), ".") }).unwrap();
    assert!(at("there/file").is_file());
    for (source, target, why) in [
        ("one", Target { directory: true, ..target(&at("none"), "one") }, "no directory"),
        ("one", Target { directory: true, ..target(&at("one"), "one") }, "is no directory"),
        ("one", target(&at("none/deeper"), "one"), "no directory"),
        ("one", target(&at("there"), ".."), "no name of its own"),
    ] {
        let error = format!("{:#}", go(source, &target).unwrap_err());
        assert!(error.contains(why), "{error}");
    }
    // A file does not take a directory's place.
    fs::create_dir_all(at("there/one2/x")).unwrap();
    let error = format!("{:#}", go("one", &target(&at("there"), "one2")).unwrap_err());
    assert!(error.contains("one2") || error.contains("directory"), "{error}");
    assert!(at("there/one2/x").is_dir());
}

#[test]
fn a_stream_that_is_cut_off_anywhere_leaves_no_half_a_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("from")).unwrap();
    fs::write(dir.path().join("from/file"), vec![7; 3000]).unwrap();
    let whole = stream(&dir.path().join("from"));
    let last = whole.len() - 1024;
    for length in (0..last).step_by(256) {
        let to = dir.path().join(format!("to-{length}"));
        assert!(unpack(&whole[..length], &target(&to, "from"), &mut |_| {}).is_err(), "{length} of {}", whole.len());
        if let Ok(got) = fs::read(to.join("file")) {
            assert_eq!(got, vec![7; 3000], "{length}");
        }
        let left = fs::read_dir(&to).map_or(0, |all| all.filter(|e| e.as_ref().unwrap().file_name() != "file").count());
        assert_eq!(left, 0, "{length}");
    }
}

/// An archive of these entries, each with a kind, a name and where it leads or what it holds.
fn archive(entries: &[(EntryType, &[u8], &str)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (kind, name, what) in entries.iter().chain([&(EntryType::Regular, &b"end"[..], "")]) {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o4755);
        let data = if *kind == EntryType::Regular { what.as_bytes() } else { b"" };
        header.set_size(data.len() as u64);
        // By hand: the library refuses to write such names.
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        if *kind != EntryType::Regular {
            header.as_old_mut().linkname[..what.len()].copy_from_slice(what.as_bytes());
        }
        header.set_cksum();
        builder.append(&header, data).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn a_hostile_stream_writes_nothing_outside() {
    use EntryType::{Directory, Link, Regular, Symlink};
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("victim"), "precious").unwrap();
    let out = outside.to_str().unwrap();
    let victim = format!("{out}/victim");
    let streams = [
        archive(&[(Regular, b"root/../outside/victim", "x")]),
        archive(&[(Regular, b"../outside/victim", "x")]),
        archive(&[(Regular, victim.as_bytes(), "x")]),
        archive(&[(Directory, b"root", ""), (Symlink, b"root/a", out), (Regular, b"root/a/victim", "x")]),
        archive(&[(Symlink, b"root", out), (Regular, b"root/victim", "x")]),
        archive(&[(Directory, b"root", ""), (Symlink, b"root/a", &victim), (Regular, b"root/a", "x")]),
        archive(&[(Directory, b"root", ""), (Link, b"root/a", &victim), (Regular, b"root/a", "x")]),
        archive(&[
            (Directory, b"root", ""),
            (Directory, b"root/a", ""),
            (Symlink, b"root/a", out),
            (Regular, b"root/a/victim", "x"),
        ]),
        archive(&[(Regular, b"root/..", "x")]),
        archive(&[(Regular, b"", "x")]),
    ];
    for (number, stream) in streams.iter().enumerate() {
        let to = dir.path().join(format!("to-{number}"));
        let _ = unpack(&stream[..], &target(&to, "x"), &mut |_| {});
        assert_eq!(fs::read(outside.join("victim")).unwrap(), b"precious", "stream {number}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "stream {number}");
    }
    // Set-user-ID does not come along, and what is no file is told and left out.
    let mut notes = Vec::new();
    let odd = archive(&[(Directory, b"root", ""), (Regular, b"root/f", "x"), (EntryType::Char, b"root/null", "")]);
    let to = dir.path().join("odd");
    unpack(&odd[..], &target(&to, "x"), &mut |note| notes.push(note)).unwrap();
    assert_eq!(fs::metadata(to.join("f")).unwrap().permissions().mode() & 0o7777, 0o755);
    assert!(notes.len() == 1 && notes[0].contains("null"), "{notes:?}");
    for length in [0, 100, 512, 700] {
        let mut noise: Vec<u8> = (0..length).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        noise.resize(4096, 0x41);
        assert!(unpack(&noise[..], &target(&dir.path().join("noise"), "x"), &mut |_| {}).is_err());
    }
}
