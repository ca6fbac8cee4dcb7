//! Trees as the builders of distributions make them, in the formats that they write: what becomes of them is what umoci
//! unpacks, and the lowest layer what tar extracts. The contents come from this machine's packages.

use puter::image::{PullOptions, Store};

use super::same::compare_trees;
use super::tools::{check, shell, text};

/// A tree of one distribution's kind.
struct Style {
    name: &'static str,
    /// Makes `base.tar` and `upper.tar` and leaves the tree of the lower one in `tree`.
    script: &'static str,
}

const STYLES: [Style; 5] = [
    // dpkg's database, diversions, usr-merge by links, groups of its own; GNU tar in its own format, as debootstrap does.
    Style {
        name: "debian",
        script: r#"
mkdir -p tree/{usr/{bin,sbin,lib},etc/alternatives,var/lib/dpkg/info,var/log,run/lock,tmp,root}; cd tree
ln -s usr/bin bin; ln -s usr/sbin sbin; ln -s usr/lib lib; ln -s /run var/run; ln -s /run/lock var/lock
cp /bin/ls /bin/cat usr/bin/; cp usr/bin/cat usr/bin/cat.distrib
ln -s /etc/alternatives/pager usr/bin/pager; ln -s /bin/less etc/alternatives/pager
cp -a /var/lib/dpkg/info/libc6* var/lib/dpkg/info/; head -c 300000 /var/lib/dpkg/status > var/lib/dpkg/status
printf 'root:*:19000:0:99999:7:::\n' > etc/shadow; chown 0:42 etc/shadow; chmod 640 etc/shadow
install -m 2755 -o 0 -g 42 /bin/true usr/sbin/unix_chkpwd; chmod 1777 tmp run/lock; chown 0:4 var/log; chmod 2755 var/log
cd ..; tar --format=gnu --numeric-owner -C tree -cf base.tar .
mkdir -p upper/var/lib/dpkg upper/usr/bin upper/var/log; cd upper
cat ../tree/var/lib/dpkg/status > var/lib/dpkg/status; echo more >> var/lib/dpkg/status; : > usr/bin/.wh.cat.distrib
tar --format=gnu --numeric-owner -cf ../upper.tar var/lib/dpkg/status usr/bin/.wh.cat.distrib
"#,
    },
    // Files of snaps and a machine that was built in steps: a directory for a link, a link for a directory.
    Style {
        name: "ubuntu",
        script: r#"
mkdir -p tree/{usr/bin,usr/share/doc,etc/ssl/certs,var/lib/snapd/void,var/snap,boot}; cd tree
chmod 111 var/lib/snapd/void; ln -s usr/bin bin; cp -a /usr/share/zoneinfo/Europe usr/share/Europe
cp -a /usr/share/doc/bash usr/share/doc/; cp /etc/ssl/certs/*.0 etc/ssl/certs/ 2>/dev/null || : > etc/ssl/certs/a.0
ln -s vmlinuz-6.8 boot/vmlinuz; : > boot/vmlinuz-6.8; chmod 600 boot/vmlinuz-6.8
mkdir -p usr/lib/a; echo in > usr/lib/a/in; ln -s a usr/lib/b
cd ..; tar --format=posix --pax-option=delete=atime,delete=ctime -C tree -cf base.tar .
mkdir -p upper/usr/lib/b upper/usr/share; cd upper; echo out > usr/lib/b/out; ln -s b usr/lib/a
tar --format=posix -cf ../upper.tar usr/lib/a usr/lib/b
"#,
    },
    // File capabilities, SELinux labels, hard links across directories, build ids, sparse files; a new package database.
    Style {
        name: "fedora",
        script: r#"
mkdir -p tree/{usr/{bin,lib64,libexec/git-core,share/zoneinfo/posix,lib/.build-id/4c},var/lib/rpm,etc/pki,afs}; cd tree
for name in bin lib64; do ln -s usr/$name $name; done; ln -s bin usr/sbin; chmod 555 usr/bin afs .
cp /bin/true usr/bin/newuidmap; cp /bin/true usr/bin/ping; cp /bin/true usr/bin/git
setfattr -n security.capability -v 0x0100000280000000000000000000000000000000 usr/bin/newuidmap
setfattr -n security.capability -v 0x0100000200200000000000000000000000000000 usr/bin/ping
for name in add commit log status; do ln usr/bin/git usr/libexec/git-core/git-$name; done
cp -a /usr/share/zoneinfo/Africa usr/share/zoneinfo/; cp -al usr/share/zoneinfo/Africa usr/share/zoneinfo/posix/
ln -s ../../../../usr/bin/git usr/lib/.build-id/4c/1b2c
truncate -s 100M var/lib/rpm/rpmdb.sqlite; printf SQLite | dd of=var/lib/rpm/rpmdb.sqlite bs=1 seek=70000000 conv=notrunc status=none
find . -exec setfattr -h -n security.selinux -v '"system_u:object_r:usr_t:s0"' {} +
cd ..; tar --format=posix --sparse --xattrs --xattrs-include='*' -C tree -cf base.tar .
mkdir -p upper/var/lib/rpm; cd upper; head -c 200000 /dev/urandom > var/lib/rpm/rpmdb.sqlite
mkdir -p usr/share/zoneinfo; : > usr/share/zoneinfo/.wh.posix
tar --format=posix -cf ../upper.tar var/lib/rpm/rpmdb.sqlite usr/share/zoneinfo/.wh.posix
"#,
    },
    // Everything is a link to BusyBox, some of it a hard link; set-id bits without read; the old format of 1988.
    Style {
        name: "alpine",
        script: r#"
mkdir -p tree/{bin,sbin,usr/bin,lib/apk/db,var/empty,etc,proc,sys,dev}; cd tree
cp /bin/busybox bin/busybox; cp /bin/busybox bin/bbsuid; chmod 4111 bin/bbsuid; chmod 555 var/empty proc sys
for name in $(bin/busybox --list | head -150); do [ $name = busybox ] || ln -s /bin/busybox bin/$name; done
for name in su passwd login; do rm -f bin/$name; ln bin/bbsuid bin/$name; done
printf 'P:musl\nV:1.2.5-r0\n\n' > lib/apk/db/installed; printf 'root:::0:::::\n' > etc/shadow
chown 0:42 etc/shadow; chmod 640 etc/shadow; ln -s ../bin/busybox sbin/init; mknod dev/console c 5 1
cd ..; tar --format=ustar --numeric-owner -C tree -cf base.tar .
mkdir -p upper/bin upper/lib/apk/db; cd upper; : > lib/apk/db/.wh..wh..opq; printf 'P:none\n' > lib/apk/db/world
: > bin/.wh.su; : > bin/.wh.bbsuid
tar --format=ustar --numeric-owner -cf ../upper.tar lib/apk/db bin/.wh.su bin/.wh.bbsuid
"#,
    },
    // libarchive's pax headers, one directory for all programs, a database of small directories; layers out of order.
    Style {
        name: "arch",
        script: r#"
mkdir -p tree/{usr/bin,usr/lib,var/lib/pacman/local,etc/pacman.d/gnupg,srv/ftp,root}; cd tree
for name in bin sbin; do ln -s usr/bin $name; done; for name in lib lib64; do ln -s usr/lib $name; done
ln -s bin usr/sbin; ln -s lib usr/lib64; cp /bin/ls usr/bin/ls; chmod 700 etc/pacman.d/gnupg; chown 0:11 srv/ftp; chmod 555 srv/ftp
for n in $(seq 1 300); do mkdir var/lib/pacman/local/p-$n; printf '%%NAME%%\np%s\n' $n > var/lib/pacman/local/p-$n/desc; done
setfattr -n user.origin -v 'ünïcode' usr/bin/ls; touch -d '2024-02-29T23:59:59.987654321Z' usr/bin/ls
truncate -s 3000000 root/holes; printf end | dd of=root/holes bs=1 seek=2999000 conv=notrunc status=none
cd ..; bsdtar --format=pax --xattrs --numeric-owner -C tree -cf base.tar .
mkdir -p upper/var/lib/pacman/local/p-301; cd upper; echo new > var/lib/pacman/local/p-301/desc
for n in $(seq 1 100); do : > var/lib/pacman/local/.wh.p-$n; done
bsdtar --format=pax -cf ../upper.tar var/lib/pacman/local/p-301/desc var/lib/pacman/local/.wh.*
"#,
    },
];

#[test]
#[ignore = "needs root"]
fn trees_of_every_distributions_style_become_the_same_files() {
    for style in &STYLES {
        let temporary = tempfile::tempdir_in("/var/tmp").unwrap();
        let directory = temporary.path();
        shell(directory, style.script, &[]);
        let unpack = r#"
umoci init --layout oci; umoci new --image oci:both; umoci raw add-layer --image oci:both base.tar
umoci tag --image oci:both base; umoci raw add-layer --image oci:both upper.tar
for tag in both base; do
    umoci config --image oci:$tag --os linux --architecture "$(dpkg --print-architecture)"
done
umoci unpack --image oci:both bundle; mkdir mount extracted
tar --extract --xattrs --xattrs-include='*' --numeric-owner --same-owner --preserve-permissions -C extracted -f base.tar
mkdir -m 700 bundle/rootfs/lost+found extracted/lost+found
"#;
        shell(directory, unpack, &[]);
        let store = Store::open(&directory.join("images")).unwrap();
        for (tag, theirs) in [("both", "bundle/rootfs"), ("base", "extracted")] {
            let reference = format!("oci:{}:{tag}", text(&directory.join("oci"))).parse().unwrap();
            let image = store.pull(&reference, &PullOptions::default(), &()).unwrap();
            check(&image.disk);
            eprintln!("{}: {tag}", style.name);
            compare_trees(&image.disk, &directory.join("mount"), &directory.join(theirs), tag == "base");
        }
    }
}
