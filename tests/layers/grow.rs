//! What guests do first: grow the file system.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use super::tools::{check, convert, run, shell, text};

const FILES: &str = r#"
mkdir -p tree/etc; head -c 150000000 /dev/urandom > tree/large; echo kept > tree/etc/file
tar -C tree -cf layer.tar .
"#;

fn contents(image: &Path) -> Vec<u8> {
    run(Command::new("debugfs").args(["-R", "cat /etc/file"]).arg(image))
}

#[test]
fn a_grown_disk_takes_the_file_system_along() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = temporary.path();
    shell(directory, FILES, &[]);
    let image = directory.join("image");
    convert(&image, &[&directory.join("layer.tar")]);
    // Past what the first block of descriptors holds, and to the largest that is asked for.
    for gigabytes in [10, 1024] {
        File::options().write(true).open(&image).unwrap().set_len(gigabytes << 30).unwrap();
        run(Command::new("resize2fs").arg(&image));
        check(&image);
        assert_eq!(contents(&image), b"kept\n");
        let header = run(Command::new("dumpe2fs").arg("-h").arg(&image));
        let count = format!("Block count:              {}", (gigabytes << 30) / 4096);
        assert!(String::from_utf8_lossy(&header).contains(&count), "{gigabytes} GiB");
    }
}

#[test]
#[ignore = "needs root"]
fn the_kernel_writes_to_the_file_system_and_leaves_it_sound() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = temporary.path();
    shell(directory, FILES, &[]);
    let image = directory.join("image");
    convert(&image, &[&directory.join("layer.tar")]);
    let script = r#"
unshare -m bash -euo pipefail -c '
mkdir mount; mount -o loop "$1" mount
rm mount/large; mkdir mount/new
for i in $(seq 1 3000); do echo "$i" > mount/new/a-rather-long-name-for-a-file-$i; done
head -c 100000000 /dev/urandom > mount/etc/file.new; setfattr -n user.x -v y mount/etc/file
mv mount/etc/file.new mount/etc/moved; sync; umount mount' script "$1"
"#;
    shell(directory, script, &[Path::new(text(&image))]);
    check(&image);
    assert_eq!(contents(&image), b"kept\n");
}
