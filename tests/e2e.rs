//! The whole path as a user goes it: the built executable under its names, an unprivileged user, a real registry, a
//! real guest. `cargo xtask test` builds what is needed and names it in the environment.

#[path = "e2e/host.rs"]
mod host;

use std::time::Duration;

use host::{Host, text};

/// Boots twice and walks through every command that a first user meets.
#[test]
#[ignore = "needs root"]
fn a_machine_is_made_used_stopped_started_again_and_deleted() {
    let host = Host::new();
    let image = host.push_guest();

    host.fails(&["start", "web"], "puterd does not run", "puter daemon start");
    let started = host.ok(&["daemon", "start"]);
    assert!(started.contains("bridge puter0 at 10.0.0.1/24"), "{started}");
    assert_eq!(host.ok(&["daemon", "start"]), "puterd runs already");
    host.fails(&["start", "web"], "no image is named", "puter init");
    host.ok(&["init", "--image", &image]);
    assert!(host.ok(&["doctor"]).contains("This host can run VMs"));
    assert_eq!(host.leftovers(), Vec::<String>::new());

    let vm = &host.json(&["start", "web", "--disk", "5G", "--memory", "512M", "--json"])[0];
    for (key, value) in
        [("name", "web"), ("status", "running"), ("ip", "10.0.0.11"), ("mac", "52:54:00:00:00:0b"), ("tap", "pt-web")]
    {
        assert_eq!(vm[key], value, "{vm}");
    }
    assert_eq!((&vm["id"], &vm["cid"]), (&1.into(), &4.into()));
    host.fails(&["start", "web"], "'web' is already running at 10.0.0.11", "puter ssh web");
    host.fails(&["delete", "web"], "'web' is running", "puter stop web");

    // What the guest says of itself.
    assert_eq!(host.ssh("web", "hostname"), "web");
    assert_eq!(host.ssh("web", "cat /etc/hostname"), "web");
    let link = host.ssh("web", "ip -brief link show | grep -v ^lo");
    assert!(link.contains("52:54:00:00:00:0b"), "{link}");
    let address = host.ssh("web", "ip -4 -brief address show | grep -v ^lo");
    assert!(address.contains("10.0.0.11/24"), "{address}");
    assert!(host.ssh("web", "ip -4 address").contains("dynamic"), "the address came by DHCP");
    // The address that its MAC makes, and no other.
    let six = vm["ip6"].as_str().unwrap();
    assert!(six.ends_with(":5054:ff:fe00:b"), "{vm}");
    let global = || host.ssh("web", "ip -6 -o address show scope global | grep -v tentative || true");
    host.until(std::time::Duration::from_secs(60), || global().contains(&format!(" {six}/64 ")));
    assert_eq!(global().lines().count(), 1, "{}", global());
    let gateway = format!("{}::1", six.split(":5054:").next().unwrap().trim_end_matches(":0"));
    assert!(host.ssh("web", "getent ahostsv6 host.puter").starts_with(&gateway));
    let netplan = host.ssh("web", "cat /etc/netplan/*.yaml");
    assert!(netplan.contains("dhcp4: true") && netplan.contains("driver: virtio_net"), "{netplan}");
    // Its own name and the host's, through the guest's resolver.
    for (name, address) in [("web.puter", "10.0.0.11"), ("host", "10.0.0.1")] {
        let found = host.ssh("web", &format!("getent ahostsv4 {name}"));
        assert!(found.starts_with(&format!("{address} ")), "{name}: {found}");
    }
    assert!(host.ssh("web", "getent hosts 10.0.0.1").ends_with("host.puter"));
    let route = host.ssh("web", "ip route get 203.0.113.1");
    assert!(route.contains("via 10.0.0.1"), "{route}");
    let page = host.ssh("web", "curl --silent --show-error --max-time 10 http://203.0.113.1/");
    assert_eq!(page, xtask::world::PAGE);
    let size: u64 = host.ssh("web", "df --block-size=1 --output=size / | tail -1").trim().parse().unwrap();
    assert!(size > 4_700_000_000 && size < 5_368_709_121, "the file system has {size} bytes of a disk of 5 GiB");
    let drift: i64 = host.ssh("web", "date +%s").parse::<i64>().unwrap() - host.unix_time();
    assert!(drift.abs() <= 5, "the guest's clock is {drift} s away");
    let machine_id = host.ssh("web", "cat /etc/machine-id");
    assert_eq!(machine_id.len(), 32, "{machine_id}");
    let leases = host.json_of(host.world.command("curl").args([
        "--silent",
        "--unix-socket",
        &host.world.home().join("run/daemon.sock").display().to_string(),
        "http://puterd/v1/leases",
    ]));
    assert_eq!(leases[0]["ip"], "10.0.0.11", "{leases}");

    // The same without the network, with input, both outputs and the exit code.
    assert_eq!(host.ok(&["exec", "web", "--", "hostname"]), "web");
    let script = "printf '%s' 'to be counted' | puter exec web --user nobody -- sh -c 'wc -c; id -un >&2; exit 7'";
    let output = host.world.command("sh").args(["-c", script]).output().unwrap();
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!((text(&output.stdout).trim(), text(&output.stderr).trim()), ("13", "nobody"));
    assert!(host.ok(&["logs", "web"]).contains("login:"), "the console's log is shown");

    let script = "puter ssh-config >$HOME/config && ssh -F $HOME/config web hostname";
    assert_eq!(xtask::shell::output(host.world.command("sh").args(["-c", script])).unwrap(), "web");

    let list = host.ok(&["list"]);
    assert!(list.lines().nth(1).is_some_and(|line| line.starts_with("web   running  10.0.0.11")), "{list}");
    assert!(host.ok(&["info", "web"]).contains("52:54:00:00:00:0b"));

    // puterd may come and go under a running machine.
    host.ok(&["daemon", "stop"]);
    assert_eq!(host.ssh("web", "hostname"), "web");
    host.ok(&["daemon", "start"]);
    assert_eq!(host.ssh("web", "hostname"), "web");

    host.ssh("web", "echo kept >/root/file && sync");
    host.ok(&["stop", "web", "--timeout", "90"]);
    assert_eq!(host.json(&["list", "--json"])[0]["status"], "stopped");
    assert_eq!(host.taps(), Vec::<String>::new());
    host.fails(&["ssh", "web", "true"], "'web' is stopped", "puter start web");
    assert!(host.ok(&["stop", "web"]).contains("was stopped already"));

    // This time the command returns at once, and a process in the background meets the agent.
    assert!(host.ok(&["start", "web", "--no-wait"]).contains("web boots at 10.0.0.11"));
    assert_eq!(host.json(&["list", "--json"])[0]["status"], "starting");
    host.fails(&["ssh", "web", "true"], "'web' is still starting", "puter info web");
    host.until(Duration::from_secs(300), || host.json(&["list", "--json"])[0]["status"] == "running");
    assert_eq!(host.ssh("web", "cat /root/file"), "kept");
    assert_eq!(host.ssh("web", "cat /etc/machine-id"), machine_id);
    assert_eq!(host.taps(), ["pt-web"]);

    let boot = host.ssh("web", "cat /proc/sys/kernel/random/boot_id");
    assert!(host.ok(&["restart", "web", "--timeout", "90"]).contains("web runs at 10.0.0.11"));
    assert_ne!(host.ssh("web", "cat /proc/sys/kernel/random/boot_id"), boot);

    // The hypervisor is shot: the machine is stopped, and nothing of it stays behind once it is deleted.
    let pid = host.json(&["info", "web", "--json"])[0]["pid"].to_string();
    assert!(host.world.root("kill").args(["-KILL", &pid]).status().unwrap().success());
    host.until(Duration::from_secs(10), || host.json(&["list", "--json"])[0]["status"] == "stopped");
    host.until(Duration::from_secs(10), || host.processes("qemu-system").is_empty());
    assert!(host.processes("vhost-device").is_empty());
    host.ok(&["delete", "web"]);
    assert_eq!(host.leftovers(), Vec::<String>::new());
    assert_eq!(host.ok(&["list"]), "no VMs yet; `puter start NAME` makes one");
    host.ok(&["daemon", "stop"]);
    host.fails(&["daemon", "status"], "puterd does not run", "puter daemon start");
}

/// The guest is a Debian with systemd: puter in it, as one of its users has it.
#[test]
#[ignore = "needs root"]
fn puterd_is_a_service_where_the_user_has_a_systemd() {
    let host = Host::new();
    let image = host.push_guest();
    host.ok(&["daemon", "start"]);
    host.ok(&["init", "--image", &image]);
    host.ok(&["start", "web", "--memory", "1G"]);
    let root = |script: &str| host.ok(&["exec", "web", "--", "sh", "-ec", script]);
    // What a package does: names, and the capabilities of the file (linux/capability.h, vfs_cap_data).
    root(
        "install -d /opt/puter && cp /usr/bin/puter-multi /opt/puter/ && cd /opt/puter && \
         for name in puter puterd; do ln -sf puter-multi $name; done && \
         perl -e '$f = \"/opt/puter/puter-multi\"; $n = \"security.capability\"; \
         $v = pack(\"V5\", 0x02000001, 0x3400, 0, 0, 0); syscall(188, $f, $n, $v, 20, 0) == 0 or die $!'",
    );
    // And what libpam-systemd does, which this small guest lacks.
    root(
        "useradd --create-home --shell /bin/sh me && install -d /etc/systemd/system/user@.service.d && \
         printf '[Service]\\nEnvironment=XDG_RUNTIME_DIR=/run/user/%%i\\n' >/etc/systemd/system/user@.service.d/run.conf && \
         systemctl daemon-reload && loginctl enable-linger me && \
         until [ -S /run/user/$(id -u me)/systemd/private ]; do sleep 0.2; done",
    );
    let me = |script: &str| {
        let command = format!("export PATH=/opt/puter:$PATH PUTER_SUBNET=10.99.0.1/24; {script}");
        host.ok(&["exec", "web", "--user", "me", "--", "sh", "-c", &command])
    };
    assert!(me("puter daemon start").contains("bridge puter0 at 10.99.0.1/24"));
    assert_eq!(me("puter daemon start"), "puterd runs already");
    // However wide its columns are.
    let status = || me("puter daemon status").split_whitespace().collect::<Vec<_>>().join(" ");
    let shown = status();
    assert!(shown.contains("run by: systemd (puterd.service)") && shown.contains("at boot: no"), "{shown}");
    assert!(me("puter daemon logs").contains("puterd: ready"));
    let pid = || me("puter daemon status --json | tr -dc '0-9\\n,:a-z\"' | grep '\"pid\"'");
    // systemd starts again what was shot; what was stopped stays so.
    let former = pid();
    me("kill -9 $(puter daemon status --json | sed -n 's/.*\"pid\": \\([0-9]*\\).*/\\1/p')");
    host.until(Duration::from_secs(60), || {
        let now = host.world.puter(&["exec", "web", "--user", "me", "--", "/opt/puter/puter", "daemon", "status"]);
        now.is_ok_and(|output| output.status.success())
    });
    assert_ne!(pid(), former);
    assert_eq!(me("puter daemon stop"), "puterd stopped");
    assert!(me("puter daemon status || true").is_empty());
    // A unit that cannot start says why in puterd's own words.
    let failed = me("PUTER_SUBNET=10.0.0.1/24 puter daemon start 2>&1 || true");
    assert!(failed.contains("puterd did not start: ") && failed.contains("10.0.0.0/24"), "{failed}");
    assert!(me("puter daemon enable 2>&1").contains("puterd starts with your services"));
    me("puter daemon start");
    assert!(status().contains("at boot: yes"));
    me("puter daemon stop");
    // A new session of the user's systemd is what a reboot brings.
    root("systemctl restart user@$(id -u me)");
    host.until(Duration::from_secs(60), || me("puter daemon status || true").contains("systemd (puterd.service)"));
    assert!(me("XDG_RUNTIME_DIR=/run/user/$(id -u) systemctl --user is-active puter-boot").contains("active"));
    me("puter daemon disable && puter daemon stop");
}

#[test]
#[ignore = "needs root"]
fn an_interrupted_start_leaves_nothing() {
    let host = Host::new();
    let image = host.push_guest();
    host.ok(&["daemon", "start"]);
    host.ok(&["init", "--image", &image]);
    // The agent of a guest without a chance to boot never answers: interrupt while the command waits for it.
    let mut start = host.world.command("puter").args(["start", "web", "--memory", "512M"]).spawn().unwrap();
    host.until(Duration::from_secs(60), || host.taps() == ["pt-web"] && !host.processes("qemu-system").is_empty());
    let puter = host.processes("puter start");
    assert_eq!(puter.len(), 1, "{puter:?}");
    assert!(host.world.root("kill").args(["-INT", &puter[0]]).status().unwrap().success());
    assert_eq!(start.wait().unwrap().code(), Some(130));
    assert_eq!(host.leftovers(), Vec::<String>::new());
    assert!(host.processes("qemu-system").is_empty());
}

/// Killed at any moment, a start leaves nothing that the next commands do not find and clear away.
#[test]
#[ignore = "needs root"]
fn a_killed_start_is_cleared_away() {
    let host = Host::new();
    let image = host.push_guest();
    host.ok(&["daemon", "start"]);
    host.ok(&["init", "--image", &image]);
    let clean = host.files();
    for moment in [2, 10, 20, 30, 45, 60, 80, 110, 150, 200, 300, 600, 1200] {
        let mut start = host.world.command("puter").args(["start", "web", "--memory", "256M"]).spawn().unwrap();
        host.until(Duration::from_secs(10), || !host.processes("puter start web").is_empty());
        std::thread::sleep(Duration::from_millis(moment));
        for puter in host.processes("puter start web") {
            assert!(host.world.root("kill").args(["-KILL", &puter]).status().unwrap().success());
        }
        start.wait().unwrap();
        // Where it had not begun to be there is nothing to delete, but what there is of it is cleared away.
        let there = host.json(&["list", "--json"])[0]["name"] == "web";
        assert_eq!(host.world.puter(&["delete", "--force", "web"]).unwrap().status.success(), there);
        // Its monitor looks once more, under the VM's lock, whether there is anything to put in order.
        host.until(Duration::from_secs(10), || host.processes("puter-monitor").is_empty());
        assert_eq!(host.leftovers(), Vec::<String>::new(), "after {moment} ms");
        assert_eq!(host.processes("qemu-system"), Vec::<String>::new(), "after {moment} ms");
        assert_eq!(host.files(), clean, "after {moment} ms");
    }
}

#[test]
#[ignore = "needs root"]
fn bad_names_and_images_are_refused_and_leave_nothing() {
    let host = Host::new();
    let image = host.push_small("small", &[("sbin/init", "x"), ("usr/bin/puter-agent", "x"), ("boot/vmlinuz-1", "x")]);
    let no_kernel = host.push_small("no-kernel", &[("sbin/init", "x"), ("usr/bin/puter-agent", "x")]);
    let no_agent = host.push_small("no-agent", &[("sbin/init", "x"), ("boot/vmlinuz-1", "x")]);
    host.ok(&["daemon", "start"]);

    host.fails(&["init", "--image", &no_kernel], "has no kernel", "--kernel");
    host.fails(&["init", "--image", &no_agent], "puter-agent", "");
    host.fails(&["start", "web", "--image", &no_kernel], "there is no kernel for 'web'", "puter init");
    // An image with a kernel of its own needs no other; this one is none.
    host.fails(&["start", "web", "--image", &image], "the hypervisor's last lines", "");
    host.ok(&["init", "--image", &image]);
    let clean = host.files();
    host.fails(&["start", &"x".repeat(64)], "has 64 characters", "");
    host.fails(&["start", "../up"], "contains '.'", "");
    host.fails(&["start", "web", "--image", "localhost:5000/puter/absent"], "there is no image", "");
    host.fails(&["start", "web", "--image", "localhost:5000/UPPER"], "localhost:5000/UPPER", "");
    host.fails(&["start", "web", "--disk", "1M"], "a disk of 1M is too small", "or leave it out");
    host.fails(&["start", "web", "web"], "named twice", "");
    assert_eq!(host.files(), clean);
    assert_eq!(host.leftovers(), Vec::<String>::new());

    // A kernel that is none: the hypervisor's own words are in the error, and what was made is gone again. What a
    // command that was killed left in its way is removed first.
    let state = host.world.home().join("state/web.json");
    for status in ["creating", "deleting"] {
        let left = host.half_made("web", status);
        std::fs::write(&state, left).unwrap();
        std::fs::write(host.world.home().join("overlays/web.qcow2"), "half").unwrap();
        host.fails(&["start", "web"], "that was broken off left", "");
        assert_eq!(host.leftovers(), Vec::<String>::new());
    }
    host.fails(&["start", "web"], "the hypervisor's last lines", "");
    assert_eq!(host.files(), clean);
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
#[ignore = "needs root"]
fn a_registry_that_lies_is_found_out_and_leaves_nothing() {
    let host = Host::new();
    // The layer must be the largest of the registry's blobs.
    let kernel: String = (0..100_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_string()).collect();
    let boot: &[(&str, &str)] = &[("sbin/init", "x"), ("usr/bin/puter-agent", "x"), ("boot/vmlinuz-1", &kernel)];
    let image = host.push_small("small", boot);
    host.ok(&["daemon", "start"]);
    let clean = host.files();
    let layer = host.registry_blobs().into_iter().max_by_key(|blob| blob.metadata().unwrap().len()).unwrap();
    let honest = std::fs::read(&layer).unwrap();

    let mut wrong = honest.clone();
    let middle = wrong.len() / 2;
    wrong[middle] ^= 1;
    std::fs::write(&layer, &wrong).unwrap();
    host.fails(&["init", "--image", &image], "sha256:", "");
    assert_eq!(host.files(), clean);

    std::fs::write(&layer, &honest[..middle]).unwrap();
    host.fails(&["init", "--image", &image], "bytes", "");
    assert_eq!(host.files(), clean);

    std::fs::write(&layer, &honest).unwrap();
    host.ok(&["init", "--image", &image]);
}

#[test]
#[ignore = "needs root"]
fn a_registry_that_hangs_is_given_up() {
    let host = Host::new();
    // Accepts connections and never says a word.
    let mut silent =
        host.world.command("busybox").args(["nc", "-ll", "-p", "5001", "-e", "sleep", "600"]).spawn().unwrap();
    host.ok(&["daemon", "start"]);
    let clean = host.files();
    let began = std::time::Instant::now();
    let output = host
        .world
        .command_with(&[("PUTER_REGISTRY_TIMEOUT", "2")], "puter")
        .args(["init", "--image", "localhost:5001/some/image"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("localhost:5001"), "{}", text(&output.stderr));
    assert!(began.elapsed() < Duration::from_secs(60), "it took {:?}", began.elapsed());
    assert_eq!(host.files(), clean);
    drop(host);
    silent.wait().unwrap();
}

#[test]
#[ignore = "needs root"]
fn a_full_disk_is_a_clear_error_and_loses_nothing() {
    // Too small for the layers, then for the file system made of them.
    for (mebibytes, why) in [(64, "room for"), (200, "No space left on device")] {
        let host = Host::new();
        let image = host.push_guest();
        host.small_home(mebibytes << 20);
        host.ok(&["daemon", "start"]);
        let clean = host.files();
        host.fails(&["init", "--image", &image], why, "");
        let left: Vec<String> = host.files().into_iter().filter(|file| !file.starts_with("./images/blobs/")).collect();
        assert_eq!(left, clean, "whole, verified layers may stay; nothing else");
    }
}

#[test]
#[ignore = "needs root"]
fn the_executable_is_one_small_static_file_under_three_names() {
    let dir = host::variable("PUTER_TEST_BIN");
    let file = dir.join("puter-multi");
    let said = xtask::shell::output(std::process::Command::new("file").arg(&file)).unwrap();
    assert!(said.contains("static") && said.contains("stripped"), "{said}");
    assert!(!said.contains("interpreter"), "{said}");
    let size = file.metadata().unwrap().len();
    assert!(size < 8 << 20, "{size} bytes");
    for name in ["puter", "puterd", "puter-agent"] {
        assert_eq!(std::fs::read_link(dir.join(name)).unwrap().to_str(), Some("puter-multi"));
    }
}

/// A static glibc may want its shared parts for looking up names: in a root without any it must do without.
#[test]
#[ignore = "needs root"]
fn names_are_looked_up_in_a_root_that_holds_nothing_but_the_executable() {
    let host = Host::new();
    let root = host.world.dir().join("empty");
    std::fs::create_dir_all(root.join("etc")).unwrap();
    std::fs::copy(host::variable("PUTER_TEST_BIN").join("puter-multi"), root.join("puter")).unwrap();
    std::fs::write(root.join("etc/hosts"), "203.0.113.1 registry.example\n").unwrap();
    let init = || {
        let mut command = host.world.root("env");
        command.args(["-i", "PUTER_HOME=/h", "PUTER_INSECURE_REGISTRIES=registry.example:80", "/usr/sbin/chroot"]);
        let output = command.arg(&root).args(["/puter", "init", "--image", "registry.example:80/some/image"]).output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        text(&output.stderr)
    };
    // The key comes first and there is no ssh-keygen; with one in place the registry is asked by its name.
    let said = init();
    assert!(said.contains("ssh-keygen"), "{said}");
    std::fs::create_dir_all(root.join("h/ssh")).unwrap();
    for file in ["id_ed25519", "id_ed25519.pub"] {
        std::fs::write(root.join("h/ssh").join(file), "made elsewhere").unwrap();
    }
    let said = init();
    assert!(said.contains("404"), "the web server of the world's internet was asked: {said}");
}
