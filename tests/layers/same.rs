//! The same layers, unpacked by umoci as root and converted by puter, must be the same files.

use std::collections::BTreeMap;
use std::path::Path;

use puter::image::{PullOptions, Store};

use super::tools::{check, convert, records, shell, text};

/// A tree with every kind of file and attribute that a layer can hold.
const BASE: &str = r#"
mkdir -p tree/{lost+found,bin,dev,etc/deep/er,home/user,var/lib,opaque/below,gone/below,kept,usr/bin}
cd tree
printf 'hello\n' > etc/hello
head -c 3000000 /dev/urandom > var/lib/large
: > etc/empty
cp etc/hello bin/suid; chown 33:44 bin/suid; chmod 6755 bin/suid
chown 4000000000:3999999999 home/user; chmod 1770 home/user
cp etc/hello bin/capable
setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 bin/capable
setfattr -n user.note -v 'a note' etc/hello
setfattr -n trusted.note -v 0x00fb21 etc/deep
setfattr -n user.long -v "$(head -c 3500 /dev/zero | tr '\0' a)" var/lib
setfattr -n user.one -v "$(head -c 40 /dev/zero | tr '\0' b)" kept
setfattr -n user.two -v "$(head -c 40 /dev/zero | tr '\0' c)" kept
setfattr -n system.posix_acl_access -v 0x0200000001000700ffffffff020005003930000004000500ffffffff10000500ffffffff20000400ffffffff home
setfattr -n system.posix_acl_default -v 0x0200000001000700ffffffff04000500ffffffff080005001027000010000500ffffffff20000000ffffffff home
ln etc/hello etc/hello.again; ln etc/hello usr/bin/hello
ln -s ../etc/hello bin/link; ln -s /etc usr/etc; ln -s /../etc alias; ln -s nowhere bin/dangling
ln -s "$(head -c 59 /dev/zero | tr '\0' x)" etc/fast; ln -s "$(head -c 60 /dev/zero | tr '\0' y)" etc/slow
ln -s "$(head -c 4000 /dev/zero | tr '\0' z)" etc/longest; ln etc/longest etc/longest.again
mknod dev/null c 1 3; chmod 666 dev/null; mknod dev/sda b 8 0; mknod dev/far b 259 70000; mknod dev/wide c 4095 1048575
mkfifo -m 640 var/pipe
n=$(head -c 250 /dev/zero | tr '\0' n); : > "etc/$n"; mkdir "var/$n"; : > "var/$n/$n"
: > 'etc/ünïcode ☃'; : > $'etc/latin\xe9'; : > $'etc/new\nline'; : > 'etc/ spaces '; : > etc/.hidden
truncate -s 5000000 var/holes; printf middle | dd of=var/holes bs=1 seek=2500000 conv=notrunc status=none
for i in $(seq 1 2000); do : > "var/lib/many-names-in-one-directory-$i"; done
for i in $(seq 1 50); do echo "$i" > "opaque/$i"; echo "$i" > "gone/$i"; done
echo lower > opaque/below/file; echo lower > gone/below/file; echo lower > kept/file; echo lower > kept/removed
echo lower > etc/becomes-directory; mkdir -p etc/becomes-file/below; echo x > etc/becomes-file/below/x
ln -s hello etc/becomes-real
touch -d '1969-12-31T23:59:58.25Z' etc/empty; touch -d '1901-12-14T00:00:00Z' dev/null
touch -d '2100-01-01T00:00:00.123456789Z' etc/hello; touch -h -d '2001-02-03T04:05:06.000000007Z' bin/link
touch -d '1999-09-09T09:09:09Z' etc/deep kept home var/lib
cd ..; tar --format=posix --xattrs --xattrs-include='*' --sparse -C tree -cf base.tar .
"#;

/// A layer above it: replaces, merges, whiteouts, opaque directories, and links into the layer below.
const UPPER: &str = r#"
mkdir upper; cd upper
mkdir -p etc opaque kept var/lib usr/etc/new
: > .wh.gone; : > opaque/.wh..wh..opq; : > kept/.wh.removed; : > etc/.wh.not-there; : > .wh.not-there-either
echo upper > opaque/fresh; mkdir opaque/below; echo upper > opaque/below/other
echo upper > kept/added; chown 7:8 kept; chmod 2750 kept; touch -d '2020-02-02T02:02:02Z' kept opaque opaque/below
mkdir etc/becomes-directory; echo in > etc/becomes-directory/in; echo file > etc/becomes-file; echo real > etc/becomes-real
echo shorter > var/lib/large
: > var/lib/.wh.many-names-in-one-directory-7
chmod 711 etc; touch -d '2021-01-01T00:00:00.5Z' etc var var/lib usr usr/etc usr/etc/new .
cd ..; tar --format=posix --xattrs --xattrs-include='*' -C upper -cf upper.tar .
"#;

/// A third: entries whose parents are symbolic links, and files without their directories.
const TOP: &str = r#"
mkdir -p top/usr/bin top/new/parent top/etc top/alias; cd top
echo through > usr/bin/second; echo orphan > new/parent/orphan; echo again > etc/hello.again; echo in etc > alias/via
touch -d '2022-01-01T00:00:00Z' usr/bin/second new/parent/orphan etc/hello.again alias/via
tar --format=gnu -cf ../top.tar usr/bin/second new/parent/orphan etc/hello.again alias/via
"#;

/// Prints all there is to know of a tree, in records.
const DESCRIBE: &str = r#"
cd "$1"
case "$2" in
files) find . -path ./lost+found -prune -o ! -type d -printf '%p|%y|%m|%U|%G|%s|%T@|%n|%l\0' ;;
directories) find . -path ./lost+found -prune -o -type d -printf '%p|%m|%U|%G|%n\0' ;;
times) find . -path ./lost+found -prune -o -type d -printf '%p|%T@\0' ;;
devices) find . \( -type b -o -type c \) -printf '%p|' -exec stat --printf '%t:%T\0' {} \; ;;
contents) find . -type f -exec sha256sum -z {} + ;;
inodes) find . -path ./lost+found -prune -o ! -type d -links +1 -printf '%i|%p\0' ;;
xattrs) getfattr -R -h -d -m - -e hex . ;;
esac
"#;

fn describe(image: Option<&Path>, tree: &Path, what: &str) -> Vec<String> {
    let script = match image {
        // A mount in a name space of its own ends with it.
        Some(image) => format!(
            "unshare -m bash -euo pipefail -c 'mount -o ro,loop \"{}\" \"$1\"\n{}' script \"$1\" \"$2\"",
            text(image),
            DESCRIBE.replace('\'', "'\\''")
        ),
        None => DESCRIBE.to_string(),
    };
    let output = shell(Path::new("/"), &script, &[tree, Path::new(what)]);
    if what != "xattrs" {
        return records(&output, 0);
    }
    // A paragraph for each file, whose attributes are in no order.
    let output = String::from_utf8(output).unwrap();
    let mut files: Vec<String> = output.split("\n\n").map(|file| records(file.as_bytes(), b'\n').join(" ")).collect();
    files.sort();
    files
}

/// The sets of names that share an inode.
fn groups(records: Vec<String>) -> Vec<Vec<String>> {
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for record in records {
        let (inode, name) = record.split_once('|').unwrap();
        groups.entry(inode.to_string()).or_default().push(name.to_string());
    }
    let mut groups: Vec<Vec<String>> = groups.into_values().collect();
    groups.sort();
    groups
}

#[test]
#[ignore = "needs root"]
fn layers_become_the_same_files_that_umoci_unpacks() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = temporary.path();
    shell(directory, BASE, &[]);
    shell(directory, UPPER, &[]);
    shell(directory, TOP, &[]);
    let unpack = r#"
umoci init --layout oci; umoci new --image oci:all
for layer in base upper top; do umoci raw add-layer --image oci:all "$layer.tar"; done
umoci unpack --image oci:all bundle; mkdir mount
"#;
    shell(directory, unpack, &[]);
    let image = directory.join("image");
    let layers = ["base.tar", "upper.tar", "top.tar"].map(|name| directory.join(name));
    let tree = convert(&image, &layers.each_ref().map(|path| path.as_path()));
    check(&image);

    let (ours, theirs) = (directory.join("mount"), directory.join("bundle/rootfs"));
    let least = compare_trees(&image, &ours, &theirs, false);
    assert!(least >= 4, "some kind of record is missing from the comparison");
    check_times(&describe(Some(&image), &ours, "times"));

    let statistics = tree.statistics();
    assert_eq!(statistics.size, image.metadata().unwrap().len());
    assert_eq!(statistics.directories as usize, describe(Some(&image), &ours, "directories").len() + 1);
    let mut contents = Vec::new();
    tree.copy_to(b"/alias/becomes-real", &mut contents).unwrap();
    assert_eq!(contents, b"real\n");
}

/// The real guest, all the way through the store: from an OCI layout to the disk that machines stand on.
#[test]
#[ignore = "needs root"]
fn the_debian_guest_becomes_the_same_files_that_umoci_unpacks() {
    let layout = std::env::var("PUTER_TEST_GUEST").expect("PUTER_TEST_GUEST is not set: run `cargo xtask test`");
    let temporary = tempfile::tempdir_in("/var/tmp").unwrap();
    let directory = temporary.path();
    let store = Store::open(&directory.join("images")).unwrap();
    let image = store.pull(&format!("oci:{layout}").parse().unwrap(), &PullOptions::default(), &()).unwrap();
    image.check_bootable().unwrap();
    check(&image.disk);
    // What ext4 adds is not the image's.
    let unpack = "umoci unpack --image \"$1:latest\" bundle; mkdir -m 700 bundle/rootfs/lost+found; mkdir mount";
    shell(directory, unpack, &[Path::new(&layout)]);
    compare_trees(&image.disk, &directory.join("mount"), &directory.join("bundle/rootfs"), false);
}

/// Compares everything, and gives the smallest number of records of a kind. SELinux's labels are not compared if `theirs`
/// is umoci's, which leaves them out.
pub fn compare_trees(image: &Path, ours: &Path, theirs: &Path, labels: bool) -> usize {
    let mut least = usize::MAX;
    for what in ["files", "directories", "devices", "contents", "xattrs"] {
        let (mut got, expected) = (describe(Some(image), ours, what), describe(None, theirs, what));
        if what == "xattrs" && !labels {
            got = got.iter().filter_map(|record| without_label(record)).collect();
        }
        least = least.min(expected.len());
        compare(what, &got, &expected);
    }
    let linked = |image, path| groups(describe(image, path, "inodes"));
    assert_eq!(linked(Some(image), ours), linked(None, theirs));
    least
}

/// The record of a file's attributes without SELinux's; none if that was the only one.
fn without_label(record: &str) -> Option<String> {
    let words: Vec<&str> = record.split(' ').filter(|word| !word.starts_with("security.selinux=")).collect();
    (record.is_empty() || words.last()?.contains('=')).then(|| words.join(" "))
}

/// umoci sets a directory's time again after it has put files there, so times are compared with the layers themselves.
fn check_times(times: &[String]) {
    for expected in [
        "./kept|1580608922.0000000000",
        "./opaque|1580608922.0000000000",
        "./etc|1609459200.5000000000",
        "./etc/deep|936868149.0000000000",
    ] {
        assert!(times.iter().any(|time| time == expected), "{expected} is not among {times:#?}");
    }
}

fn compare(what: &str, got: &[String], expected: &[String]) {
    let missing: Vec<_> = expected.iter().filter(|record| got.binary_search(record).is_err()).collect();
    let extra: Vec<_> = got.iter().filter(|record| expected.binary_search(record).is_err()).collect();
    assert!(missing.is_empty() && extra.is_empty(), "{what}: missing {missing:#?}, instead {extra:#?}");
    assert_eq!(got.len(), expected.len(), "{what}");
}
