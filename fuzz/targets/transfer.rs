//! A tree of files from a guest's end of `puter cp`, onto the host.

use std::fs;
use std::os::unix::fs::symlink;

use puter::transfer::{Target, pack, unpack};

use crate::{archive, readable, scratch};

pub fn run(input: &[u8]) {
    let mut stream = input.to_vec();
    archive::seal(&mut stream);
    let top = scratch::empty();
    let (outside, inside) = (top.join("outside"), top.join("inside"));
    for directory in [&outside, &inside] {
        fs::create_dir(directory).expect("a directory");
    }
    fs::write(outside.join("kept"), "as it was").expect("room");
    // Ways out that are there before: a stream must follow none.
    symlink("../outside", inside.join("way")).expect("a link");
    symlink("../outside/kept", inside.join("file")).expect("a link");
    let before = scratch::listing(&outside);
    let target =
        Target { path: inside.clone(), name: b"tree".to_vec(), contents: input.len() % 2 == 0, directory: true };
    let done = unpack(&stream[..], &target, &mut |_| {});
    scratch::open_up(&inside);
    assert_eq!(scratch::listing(&outside), before);
    assert_eq!(fs::read_dir(&top).expect("a directory").count(), 2);
    let left = scratch::listing(&inside);
    let is_temporary = |name: &str| name.starts_with(".puter-") && name.ends_with(".tmp");
    assert!(!left.keys().any(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(is_temporary)));
    let count = match done {
        Ok(count) => count,
        Err(error) => return readable(&error),
    };
    let bytes: u64 = left.values().filter(|file| file.0 & 0o170_000 == 0o100_000).map(|file| file.1).sum();
    assert!(bytes <= count.bytes, "{bytes} bytes are there, {} came", count.bytes);
    // What has arrived goes back as it is.
    let (mut back, again) = (Vec::new(), top.join("again"));
    let sent = pack(&inside, false, &mut back, &mut |note| panic!("{note}")).expect("a tree that can be read");
    let target = Target { path: again.clone(), name: Vec::new(), contents: false, directory: false };
    let received = unpack(&back[..], &target, &mut |note| panic!("{note}")).expect("what was packed");
    assert_eq!(sent, received);
    scratch::open_up(&again);
    let relative = |at: &std::path::Path| -> Vec<_> {
        let all = scratch::listing(at).into_iter();
        all.map(|(path, file)| (path.strip_prefix(at).expect("a path below").to_path_buf(), file)).skip(1).collect()
    };
    assert!(relative(&inside) == relative(&again));
}
