//! `puter cp` with a real guest.

#[path = "e2e/host.rs"]
mod host;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use host::{Host, text};
use xtask::shell::output;

/// Runs a shell command as the world's user.
fn shell(host: &Host, script: &str) -> String {
    output(host.world.command("sh").args(["-c", &format!("cd \"$HOME\" && {script}")])).unwrap()
}

fn guest(host: &Host, script: &str) -> String {
    host.ok(&["exec", "web", "--", "/bin/busybox", "sh", "-c", script])
}

#[test]
#[ignore = "needs root"]
fn files_go_both_ways_as_they_are() {
    let host = Host::new();
    host.ready();
    host.ok(&["start", "web", "db", "--memory", "256M"]);
    let home = host.world.dir().join("home");
    let at = |name: &str| home.join(name).display().to_string();
    shell(&host, "mkdir -p tree/sub && echo one >tree/file && chmod 754 tree/file && ln -s file tree/link");
    shell(&host, "printf two >\"tree/sub/with space\nand line\"; touch -d @1000000000 tree/file");

    // Into the guest: a directory that is there gets the source inside; one that is not becomes it.
    let told = host.ok(&["cp", &at("tree"), "web:/root"]);
    assert!(told.contains("copied to web:/root (7B"), "{told}");
    host.ok(&["cp", &at("tree"), "web:/root/new"]);
    host.ok(&["cp", &format!("{}/.", at("tree")), "web:/tmp"]);
    for directory in ["/root/tree", "/root/new", "/tmp"] {
        assert_eq!(guest(&host, &format!("cat {directory}/link {directory}/sub/with*")), "one\ntwo", "{directory}");
        assert_eq!(guest(&host, &format!("stat -c '%a %u %Y' {directory}/file")), "754 0 1000000000");
        assert_eq!(guest(&host, &format!("readlink {directory}/link")), "file");
    }
    // As another user of the guest, whose rights apply.
    host.ok(&["cp", &at("tree/file"), "web:/tmp/for-nobody", "--user", "nobody"]);
    assert_eq!(guest(&host, "stat -c %u /tmp/for-nobody"), "65534");
    host.fails(&["cp", &at("tree/file"), "web:/root/forbidden", "--user", "nobody"], "Permission denied", "");

    // And back, from one guest into another too.
    host.ok(&["cp", "web:/root/tree", &at("back")]);
    assert_eq!(shell(&host, "diff -r tree back && stat -c %a back/file"), "754");
    host.ok(&["cp", "web:/root/tree/file", "web:/root/tree/sub", &at("back")]);
    host.ok(&["cp", "--follow-links", "web:/root/tree/link", &at("followed")]);
    assert_eq!(fs::read_to_string(home.join("followed")).unwrap(), "one\n");
    assert!(!home.join("followed").is_symlink());
    host.ok(&["cp", "web:/root/tree", "db:/root/"]);
    assert_eq!(host.ok(&["exec", "db", "--", "/bin/busybox", "cat", "/root/tree/link"]), "one");

    // Large, and as exact. Neither end's memory grows with it.
    shell(&host, "head -c 100000000 /dev/urandom >large");
    host.ok(&["cp", &at("large"), "web:/root/large"]);
    let sum = |line: String| line.split_whitespace().next().unwrap().to_string();
    assert_eq!(sum(guest(&host, "sha256sum /root/large")), sum(shell(&host, "sha256sum large")));
    host.ok(&["cp", "web:/root/large", &at("large-back")]);
    assert_eq!(shell(&host, "cmp large large-back && echo same"), "same");

    // Mistakes name the side.
    host.fails(&["cp", "web:/etc/none", &at("x")], "cannot copy web:/etc/none to", "");
    host.fails(&["cp", "web:/etc/none", &at("x")], "in the guest: cannot read /etc/none: No such file", "");
    host.fails(&["cp", &at("none"), "web:/tmp"], "No such file or directory", "");
    host.fails(&["cp", &at("large"), "web:/none/there"], "there is no directory /none", "");
    host.fails(&["cp", "nobody:/etc/hosts", &at("x")], "there is no VM named 'nobody'", "puter list");
    for wrong in [&["cp", "a", "b"][..], &["cp", "web:/etc/hosts"]] {
        assert_eq!(host.world.puter(wrong).unwrap().status.code(), Some(2));
    }
    // No room for it: nothing of it stays.
    guest(
        &host,
        "mount -t tmpfs -o size=1m none /mnt 2>/dev/null || { mkdir /mnt; mount -t tmpfs -o size=1m none /mnt; }",
    );
    host.fails(&["cp", &at("large"), "web:/mnt/large"], "No space left on device", "");
    assert_eq!(guest(&host, "ls -A /mnt"), "");

    // Ctrl-C in mid-copy ends at once and leaves no half a file.
    let mut copy = host.world.command("puter").args(["cp", "web:/root/large", &at("cut")]).spawn().unwrap();
    host.until(Duration::from_secs(20), || !host.processes("puter cp web").is_empty());
    for puter in host.processes("puter cp web") {
        host.world.root("kill").args(["-INT", &puter]).status().unwrap();
    }
    let code = copy.wait().unwrap().code();
    assert!(matches!(code, Some(0 | 130)), "{code:?}");
    assert!(code == Some(0) || !home.join("cut").exists());
    assert_eq!(shell(&host, "ls -A | grep -c '[.]tmp$' || true"), "0");

    // A guest that lies about its files writes nothing outside the destination: here its agent is a liar's shell.
    guest(&host, "mv /root/tree/file /root/tree/was && ln -s /etc /root/tree/file");
    host.ok(&["cp", "web:/root/tree", &at("lied")]);
    assert!(fs::symlink_metadata(Path::new(&at("lied")).join("file")).unwrap().is_symlink());
    assert_eq!(fs::metadata(home.join("lied/was")).unwrap().permissions().mode() & 0o777, 0o754);
    let stopped = host.ok(&["stop", "web", "db"]);
    assert!(stopped.contains("stopped"), "{stopped}");
    let said = text(&host.world.puter(&["cp", "web:/x", &at("x")]).unwrap().stderr);
    assert!(said.contains("'web' is stopped"), "{said}");
}
