//! Running programs, and converting what they made.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

use puter::image::ext4::Tree;
use puter::image::layers::{Converter, Limits, Options};

/// Runs a program to its end and returns its output.
pub fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}\n{err}", output.status);
    output.stdout
}

/// Runs a shell script in `directory`; whatever fails in it fails the test.
pub fn shell(directory: &Path, script: &str, arguments: &[&Path]) -> Vec<u8> {
    let mut command = Command::new("bash");
    command.args(["-euo", "pipefail", "-c", script, "script"]).args(arguments).current_dir(directory);
    command.env("LC_ALL", "C").env("TZ", "UTC");
    run(&mut command)
}

/// Converts the tar files `layers` into the new file `image`.
pub fn convert(image: &Path, layers: &[&Path]) -> Tree {
    let file = File::options().read(true).write(true).create_new(true).open(image).unwrap();
    let options =
        Options { uuid: *b"sixteen byte id.", label: "test".into(), spare: 64 << 20, limits: Limits::default() };
    let mut converter = Converter::new(file, options).unwrap();
    for layer in layers {
        converter.apply(File::open(layer).unwrap()).unwrap_or_else(|error| panic!("{}: {error:#}", layer.display()));
    }
    converter.finish().unwrap()
}

/// That e2fsck finds nothing to mend.
pub fn check(image: &Path) {
    let output = run(Command::new("e2fsck").arg("-fn").arg(image));
    let text = String::from_utf8_lossy(&output);
    assert!(!text.contains("<y>") && !text.contains("? no"), "{text}");
}

/// The lines or records of `bytes`, in order.
pub fn records(bytes: &[u8], end: u8) -> Vec<String> {
    let mut records: Vec<String> = bytes
        .split(|&byte| byte == end)
        .filter(|record| !record.is_empty())
        .map(|record| record.escape_ascii().to_string())
        .collect();
    records.sort();
    records
}

/// A path as a string for a program's argument that is built from parts.
pub fn text(path: &Path) -> &str {
    std::str::from_utf8(path.as_os_str().as_bytes()).unwrap()
}
