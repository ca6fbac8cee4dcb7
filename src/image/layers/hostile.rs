//! Layers made by somebody who means harm, and the cases that the specification names.

use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::os::unix::fs::FileExt;
use std::process::Command;

use super::*;

mod many;

/// An entry's header, and contents padded to records.
fn entry(path: &[u8], kind: u8, link: &[u8], contents: &[u8]) -> Vec<u8> {
    let mut extra = Vec::new();
    for (key, value) in [("path", path), ("linkpath", link)] {
        if value.len() > 100 {
            extra.extend(record(key, value));
        }
    }
    let mut bytes = Vec::new();
    if !extra.is_empty() {
        bytes = header(b"pax", b'x', b"", extra.len() as u64);
        bytes.extend(&extra);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes.extend(header(&path[..path.len().min(100)], kind, &link[..link.len().min(100)], contents.len() as u64));
    bytes.extend(contents);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn header(path: &[u8], kind: u8, link: &[u8], size: u64) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..path.len()].copy_from_slice(path);
    block[100..107].copy_from_slice(b"0000755");
    block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    block[156] = kind;
    block[157..157 + link.len()].copy_from_slice(link);
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[329..336].copy_from_slice(b"0000001");
    seal(&mut block);
    block
}

fn seal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block[..512].iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// A record of an extended header: its length counts its own digits.
fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let length = (1..).map(|digits| rest + digits).find(|n| n.to_string().len() == n - rest).unwrap();
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

fn pax(records: &[(&str, &[u8])], then: Vec<u8>) -> Vec<u8> {
    let data: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
    [entry(b"pax", b'x', b"", &data), then].concat()
}

fn file(path: &str, contents: &str) -> Vec<u8> {
    entry(path.as_bytes(), b'0', b"", contents.as_bytes())
}

fn link(path: &str, kind: u8, target: &str) -> Vec<u8> {
    entry(path.as_bytes(), kind, target.as_bytes(), b"")
}

fn directory(path: &str) -> Vec<u8> {
    entry(path.as_bytes(), b'5', b"", b"")
}

fn converter(limits: Limits) -> (Converter, File) {
    let image = tempfile::tempfile().unwrap();
    let options = Options { uuid: [7; 16], label: "hostile".into(), spare: 0, limits };
    (Converter::new(image.try_clone().unwrap(), options).unwrap(), image)
}

fn convert(layers: &[Vec<Vec<u8>>]) -> Result<(Tree, File)> {
    let (mut converter, image) = converter(Limits::default());
    for layer in layers {
        converter.apply(Cursor::new([layer.concat(), vec![0; 1024]].concat()))?;
    }
    Ok((converter.finish()?, image))
}

/// Every path of the tree, with the contents of files.
fn paths(tree: &Tree) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut todo = vec![String::new()];
    while let Some(directory) = todo.pop() {
        for name in tree.list(directory.as_bytes()).unwrap() {
            let path = format!("{directory}/{}", String::from_utf8(name).unwrap());
            match tree.lookup(path.as_bytes()) {
                Some(entry) if entry.is_directory() => {
                    found.insert(format!("{path}/"), String::new());
                    todo.push(path);
                }
                _ => {
                    let mut contents = Vec::new();
                    let _ = tree.copy_to(path.as_bytes(), &mut contents);
                    found.insert(path, String::from_utf8(contents).unwrap());
                }
            }
        }
    }
    found.remove("/lost+found/");
    found
}

fn expect(layers: &[Vec<Vec<u8>>], expected: &[(&str, &str)]) {
    let (tree, image) = convert(layers).unwrap();
    let expected = expected.iter().map(|&(path, contents)| (path.to_string(), contents.to_string())).collect();
    assert_eq!(paths(&tree), expected);
    sound(&image);
}

/// That e2fsck finds nothing, where it is installed.
fn sound(image: &File) {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/{}/fd/{}", std::process::id(), image.as_raw_fd());
    let Ok(output) = Command::new("e2fsck").args(["-fn", &path]).output() else {
        eprintln!("not checked: e2fsck is not installed");
        return;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// That the layer is refused with an error which has all of `words` in it.
fn refuse(layer: Vec<Vec<u8>>, words: &[&str]) {
    let Err(error) = convert(&[layer]) else { panic!("accepted, but should be refused for {words:?}") };
    let text = format!("{error:#}");
    assert!(words.iter().all(|word| text.contains(word)), "{text:?} lacks one of {words:?}");
}

#[test]
fn whiteouts_remove_what_is_below_and_nothing_of_their_own_layer() {
    let below = vec![file("a/one", "1"), file("a/two", "2"), file("b/three", "3"), file("c", "4"), file("d", "5")];
    let above = vec![
        file("a/fresh", "new"),
        file(".wh.a", ""),
        file("b/early", "new"),
        file("b/.wh..wh..opq", ""),
        file("b/late", "new"),
        file("c", "replaced"),
        file(".wh.c", ""),
        file(".wh.d", ""),
        file("missing/.wh.nothing", ""),
    ];
    let expected =
        [("/a/", ""), ("/a/fresh", "new"), ("/b/", ""), ("/b/early", "new"), ("/b/late", "new"), ("/c", "replaced")];
    expect(&[below, above], &expected);
}

#[test]
fn the_last_of_several_entries_wins_and_a_file_takes_a_directorys_place() {
    let layer = vec![file("a", "first"), file("a", "second"), file("d/in", "x"), file("d", "file"), directory("d")];
    expect(&[layer, vec![file("a", "third")]], &[("/a", "third"), ("/d/", "")]);
}

#[test]
fn paths_never_leave_the_tree() {
    let layer = vec![
        link("up", b'2', "../../../../outside"),
        link("abs", b'2', "/etc"),
        file("/etc/passwd", "p"),
        file("abs/shadow", "s"),
        file("up/made", "m"),
        file("x/../y", "y"),
        link("abs/hard", b'1', "/abs/passwd"),
    ];
    let expected = [
        ("/abs/", ""),
        ("/abs/hard", "p"),
        ("/abs/passwd", "p"),
        ("/abs/shadow", "s"),
        ("/etc/", ""),
        ("/etc/hard", "p"),
        ("/etc/passwd", "p"),
        ("/etc/shadow", "s"),
        ("/outside/", ""),
        ("/outside/made", "m"),
        ("/up/", ""),
        ("/up/made", "m"),
        ("/y", "y"),
    ];
    expect(&[layer], &expected);
    refuse(vec![file("../escaped", "")], &["../escaped", "leads out"]);
    refuse(vec![file("a", ""), file("a/b", "")], &["a/b", "not a directory"]);
}

#[test]
fn circles_of_symbolic_links_are_errors() {
    refuse(vec![link("a", b'2', "b"), link("b", b'2', "a"), file("a/x", "")], &["a/x", "too many symbolic links"]);
    refuse(vec![link("a", b'2', "a/a/a/a"), file("a/x", "")], &["too many symbolic links"]);
}

#[test]
fn hard_links_need_a_file_and_outlive_their_first_name() {
    refuse(vec![link("a", b'1', "missing")], &["hard link", "missing"]);
    refuse(vec![directory("d"), link("a", b'1', "d")], &["directory"]);
    refuse(vec![link("a", b'1', "../../out")], &["leads out"]);
    refuse(vec![link("a", b'1', "/")], &["hard link"]);
    let below = vec![file("d/first", "kept"), file("same", "s"), link("same", b'1', "same")];
    let above = vec![link("second", b'1', "d/first"), file(".wh.d", "")];
    expect(
        &[below, above, vec![file("second", "new"), link("d", b'1', "same")]],
        &[("/d", "s"), ("/same", "s"), ("/second", "new")],
    );
}

#[test]
fn names_that_ext4_cannot_hold_are_refused() {
    refuse(vec![file(&"n".repeat(256), "")], &["255"]);
    refuse(vec![file(&"long/".repeat(1000), "")], &["4096"]);
    refuse(vec![pax(&[("path", b"a\0b")], file("x", ""))], &["NUL"]);
    refuse(vec![file("", "")], &["root"]);
    refuse(vec![file("lost+found", "")], &["lost+found"]);
    for name in [".wh.", ".wh..", ".wh...", "a/.wh.."] {
        refuse(vec![directory("a"), file(name, "")], &["whiteout"]);
    }
    refuse(vec![link("a", b'2', "")], &["symbolic link"]);
    refuse(vec![link("a", b'2', &"t".repeat(4096))], &["target"]);
    expect(&[vec![file(&"n".repeat(255), "ok")]], &[(&format!("/{}", "n".repeat(255)), "ok")]);
}

#[test]
fn damaged_and_lying_archives_are_refused() {
    let mut wrong_sum = file("a", "");
    wrong_sum[0] = b'b';
    refuse(vec![wrong_sum], &["checksum"]);
    let (mut converter, _) = converter(Limits::default());
    let error = format!("{:#}", converter.apply(&file("a", &"contents".repeat(200))[..600]).unwrap_err());
    assert!(error.contains("truncated") && error.contains("\"a\""), "{error}");
    let mut huge = file("a", "");
    huge[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    seal(&mut huge);
    refuse(vec![huge.clone()], &["\"a\""]);
    huge[124..136].fill(0xff);
    seal(&mut huge);
    refuse(vec![huge], &["negative"]);
    let numbers: &[(&str, &[u8])] =
        &[("size", b"99999999999999999999"), ("uid", b"4294967296"), ("gid", b"-1"), ("mtime", b"1e9")];
    for &one in numbers {
        refuse(vec![pax(&[one], file("x", ""))], &[one.0]);
    }
    refuse(vec![entry(b"pax", b'x', b"", b"999 path=x\n"), file("x", "")], &["extended header"]);
    refuse(vec![pax(&[("comment", b"")], Vec::new())], &["extended header"]);
    refuse(vec![entry(b"x", b'Z', b"", b"")], &["type 'Z'"]);
    refuse(vec![vec![0; 512], file("x", "")], &["zeros"]);
    let sparse: &[(&str, &[u8])] = &[("GNU.sparse.size", b"100"), ("GNU.sparse.map", b"0,1,0,1")];
    refuse(vec![pax(sparse, file("x", "ab"))], &["order"]);
    let sparse: &[(&str, &[u8])] = &[("GNU.sparse.size", b"100"), ("GNU.sparse.map", b"0,18446744073709551615")];
    refuse(vec![pax(sparse, file("x", "ab"))], &["map"]);
}

#[test]
fn limits_on_entries_and_bytes_hold() {
    let apply = |limits, tar: &mut dyn Read| {
        let (mut converter, image) = converter(limits);
        let error = format!("{:#}", converter.apply(tar).unwrap_err());
        assert!(image.metadata().unwrap().len() < 10 << 20);
        error
    };
    let many: Vec<u8> = (0..11).flat_map(|number| file(&format!("f{number}"), "")).collect();
    let error = apply(Limits { entries: 10, ..Limits::default() }, &mut Cursor::new(many));
    assert!(error.contains("more than 10 entries"), "{error}");
    // Directories that only a path names are entries as well.
    let deep = file(&"d/".repeat(11), "");
    let error = apply(Limits { entries: 10, ..Limits::default() }, &mut Cursor::new(deep));
    assert!(error.contains("more than 10 entries"), "{error}");
    let zeros = pax(&[("size", b"2199023255552")], header(b"zeros", b'0', b"", 0));
    let error = apply(Limits::default(), &mut Cursor::new(zeros.clone()).chain(std::io::repeat(0)));
    assert!(error.contains("zeros") && error.contains("bytes"), "{error}");
}

#[test]
fn a_gigabyte_of_zeros_is_a_hole() {
    let (mut converter, image) = converter(Limits::default());
    let head = header(b"zeros", b'0', b"", 1 << 30);
    converter.apply(Cursor::new(head).chain(std::io::repeat(0).take(1 << 30))).unwrap();
    let tree = converter.finish().unwrap();
    assert_eq!(tree.lookup(b"zeros").unwrap().size, 1 << 30);
    use std::os::unix::fs::MetadataExt;
    assert!(image.metadata().unwrap().blocks() * 512 < 16 << 20);
    sound(&image);
}

#[test]
fn a_file_in_thousands_of_pieces_and_one_that_replaces_it_leave_no_trace() {
    // A block of data in every 20 makes each an extent of its own: more than one level of the tree holds.
    let mut contents = vec![0; 4096 * 20 * 1500];
    contents.iter_mut().step_by(4096 * 20).for_each(|byte| *byte = 1);
    let pieces = entry(b"pieces", b'0', b"", &contents);
    let (tree, image) = convert(&[vec![pieces.clone()]]).unwrap();
    let mut back = Vec::new();
    tree.copy_to(b"pieces", &mut back).unwrap();
    assert!(back == contents);
    sound(&image);
    let (with, image) = convert(&[vec![pieces], vec![file("pieces", "small")]]).unwrap();
    let (without, _) = convert(&[vec![file("pieces", "small")]]).unwrap();
    assert_eq!(with.statistics().used, without.statistics().used);
    sound(&image);
}

#[test]
fn directories_nest_as_deep_as_a_path_reaches_and_are_removed_again() {
    let deep = "d/".repeat(2040);
    let (tree, image) = convert(&[vec![file(&format!("{deep}f"), "deep")]]).unwrap();
    assert!(tree.lookup(format!("{deep}f").as_bytes()).unwrap().is_file());
    sound(&image);
    expect(&[vec![file(&format!("{deep}f"), "deep")], vec![file(".wh.d", "")]], &[]);
    // Symbolic links must not reach deeper than paths do.
    let chain = vec![directory(&deep), link("s", b'2', &deep), directory(&format!("s/{}", "e/".repeat(2000)))];
    refuse(chain, &["deep"]);
}

#[test]
fn images_of_the_same_layers_are_the_same_bytes() {
    let layers = [vec![file("a", "1"), directory("b"), link("c", b'2', "a")], vec![file(".wh.a", ""), file("d", "2")]];
    let read = || {
        let (_, image) = convert(&layers).unwrap();
        let mut head = vec![0; 8 << 20];
        image.read_exact_at(&mut head, 0).unwrap();
        (head, image.metadata().unwrap().len())
    };
    assert!(read() == read());
}

#[test]
fn damaged_layers_never_panic_and_what_is_accepted_is_sound() {
    let whole = [
        directory("d"),
        file("d/f", "contents"),
        link("l", b'2', "d"),
        link("l/h", b'1', "d/f"),
        pax(&[("mtime", b"-1.5"), ("SCHILY.xattr.user.x", b"y"), ("path", b"p")], file("x", "data")),
        entry(b"dev", b'3', b"", b""),
        pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9000")], {
            let mut data = b"1\n8000\n4\n".to_vec();
            data.resize(512, 0);
            data.extend(b"tail");
            entry(b"sparse", b'0', b"", &data)
        }),
        file("d/.wh.f", ""),
        vec![0; 1024],
    ]
    .concat();
    let starts: Vec<usize> = (0..whole.len()).step_by(512).collect();
    let mut state = 42_u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut accepted = 0;
    for round in 0..1500 {
        let mut bytes = whole.clone();
        for _ in 0..1 + random(4) {
            let at = random(bytes.len());
            bytes[at] = random(256) as u8;
        }
        // Most changes are to be seen by more than the checksum.
        for &start in &starts {
            if &whole[start + 257..start + 262] == b"ustar" {
                seal(&mut bytes[start..start + 512]);
            }
        }
        bytes.truncate(if round % 5 == 0 { random(bytes.len()) } else { bytes.len() });
        let (mut converter, image) = converter(Limits { bytes: 1 << 30, ..Limits::default() });
        let applied = converter.apply(Cursor::new(&whole)).and_then(|()| converter.apply(Cursor::new(bytes)));
        if applied.is_ok() && converter.finish().is_ok() {
            accepted += 1;
            if accepted % 40 == 0 {
                sound(&image);
            }
        }
    }
    assert!(accepted > 100, "{accepted}");
}
