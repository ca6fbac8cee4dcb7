//! Files with holes, in each of the formats that GNU tar writes.

use super::tools::{check, convert, shell};

#[test]
fn files_with_holes_keep_their_contents_in_every_format() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = temporary.path();
    // 60 pieces: more than the header's map and one extension of it hold.
    let script = r#"
mkdir tree; truncate -s 40000001 tree/holes
for i in $(seq 0 59); do printf 'piece %d' "$i" | dd of=tree/holes bs=1 seek=$((i * 650000)) conv=notrunc status=none; done
truncate -s 30000000 tree/nothing; printf start > tree/tail; truncate -s 9000000 tree/tail
tar --sparse --format=gnu -C tree -cf gnu.tar .
for version in 0.0 0.1 1.0; do tar --sparse --format=posix --sparse-version=$version -C tree -cf "$version.tar" .; done
"#;
    shell(directory, script, &[]);
    for format in ["gnu", "0.0", "0.1", "1.0"] {
        let image = directory.join(format);
        let tar = directory.join(format!("{format}.tar"));
        assert!(tar.metadata().unwrap().len() < 2_000_000, "{format}: tar stored the holes");
        let tree = convert(&image, &[&tar]);
        for name in ["holes", "nothing", "tail"] {
            let mut got = Vec::new();
            tree.copy_to(name.as_bytes(), &mut got).unwrap();
            let expected = std::fs::read(directory.join("tree").join(name)).unwrap();
            assert!(got == expected, "{format}: {name} differs");
        }
        assert!(tree.statistics().used < 200 << 20, "{format}: the holes take space");
        check(&image);
    }
}
