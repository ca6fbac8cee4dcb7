//! A host in a world of its own, with the product under test and a registry.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use xtask::build;
use xtask::registry;
use xtask::shell::output;
use xtask::world::World;

pub struct Host {
    pub world: World,
}

impl Host {
    pub fn new() -> Host {
        Host::with(&variable("PUTER_TEST_BIN").join("puter-multi"))
    }

    /// A host with another executable than the released one.
    pub fn with(executable: &Path) -> Host {
        let world = World::new(executable, &variable("PUTER_VHOST_DEVICE_VSOCK")).unwrap();
        world.grant().unwrap();
        registry::start(&world).unwrap();
        Host { world }
    }

    /// Pushes the real guest image.
    pub fn push_guest(&self) -> String {
        self.push(&variable("PUTER_TEST_GUEST"), build::GUEST_TAG, "puter/debian")
    }

    /// Pushes the guest that boots fast.
    pub fn push_small_guest(&self) -> String {
        self.push(&variable("PUTER_TEST_SMALL_GUEST"), build::GUEST_TAG, "puter/small")
    }

    /// Pushes the guest that boots fast under another name.
    pub fn push_small_guest_as(&self, name: &str) -> String {
        self.push(&variable("PUTER_TEST_SMALL_GUEST"), build::GUEST_TAG, name)
    }

    /// Pushes the real guest image with etcd in it, which does not run yet.
    pub fn push_etcd_guest(&self) -> String {
        self.push(&variable("PUTER_TEST_ETCD_GUEST"), build::GUEST_TAG, "puter/etcd")
    }

    /// Starts puterd, with the guest that boots fast as the default image. One processor is all that it needs, and the
    /// emulator's are threads of a host that may have two.
    pub fn ready(&self) {
        let settings = self.world.dir().join("home/.config/puter");
        output(self.world.command("mkdir").arg("-p").arg(&settings)).unwrap();
        fs::write(settings.join("config.toml"), "cpus = 1\n").unwrap();
        let image = self.push_small_guest();
        self.ok(&["daemon", "start"]);
        self.ok(&["init", "--image", &image]);
    }

    /// Pushes an image that holds just these files.
    pub fn push_small(&self, name: &str, files: &[(&str, &str)]) -> String {
        let tree = self.world.dir().join(format!("{name}.tree"));
        for (path, contents) in files {
            let path = tree.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
        let layout = self.world.dir().join(format!("{name}.oci"));
        let image = format!("{}:latest", layout.display());
        output(Command::new("umoci").args(["init", "--layout"]).arg(&layout)).unwrap();
        output(Command::new("umoci").args(["new", "--image", &image])).unwrap();
        output(Command::new("umoci").args(["insert", "--image", &image]).arg(&tree).arg("/")).unwrap();
        self.push(&layout, "latest", &format!("test/{name}"))
    }

    fn push(&self, layout: &Path, tag: &str, name: &str) -> String {
        registry::push(&self.world, layout, tag, name).unwrap()
    }

    /// The registry's files that hold blobs.
    pub fn registry_blobs(&self) -> Vec<PathBuf> {
        let all = output(Command::new("find").arg(self.world.dir().join("home/registry")).args(["-name", "data"]));
        all.unwrap().lines().map(PathBuf::from).collect()
    }

    /// Puts the user's data directory on a file system of this size.
    pub fn small_home(&self, bytes: u64) {
        let home = self.world.home();
        output(self.world.command("mkdir").args(["-p", "-m", "0700"]).arg(&home)).unwrap();
        let options = format!("size={bytes},uid={},mode=0700", self.world.uid());
        output(self.world.root("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(&home)).unwrap();
    }

    /// Puts the user's data directory on an XFS of this size, whose files can share their blocks. It is a file that is
    /// looped; the loop goes with the world's mounts.
    pub fn xfs_home(&self, bytes: u64) {
        let home = self.world.home();
        output(self.world.command("mkdir").args(["-p", "-m", "0700"]).arg(&home)).unwrap();
        let disk = self.world.dir().join("xfs");
        fs::File::create(&disk).unwrap().set_len(bytes).unwrap();
        output(self.world.root("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&disk)).unwrap();
        output(self.world.root("mount").args(["-o", "loop"]).arg(&disk).arg(&home)).unwrap();
        let owner = self.world.uid().to_string();
        output(self.world.root("chown").arg(owner).arg(&home)).unwrap();
        output(self.world.root("chmod").arg("0700").arg(&home)).unwrap();
    }

    /// Runs `puter` and gives what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.world.puter(args).unwrap();
        assert!(output.status.success(), "puter {}: {}\n{}", args.join(" "), output.status, text(&output.stderr));
        text(&output.stdout).trim_end().to_string()
    }

    /// Runs `puter`, which must fail with exit code 1 and say these words, the hint on a line of its own.
    pub fn fails(&self, args: &[&str], why: &str, hint: &str) {
        let output = self.world.puter(args).unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "puter {}: {said}", args.join(" "));
        assert!(said.contains("puter: ") && said.contains(why), "puter {}: {said}", args.join(" "));
        if !hint.is_empty() {
            let told = said.lines().any(|line| line.starts_with("hint: ") && line.contains(hint));
            assert!(told, "puter {} gives no hint '{hint}': {said}", args.join(" "));
        }
        assert_eq!(text(&output.stdout), "", "a failure prints nothing on stdout");
    }

    /// What the threads of the world's processes are at: for whoever wonders why nothing goes on.
    pub fn look(&self) -> String {
        let script = r#"for t in /proc/[0-9]*/task/*; do
            echo "${t#/proc/} $(cat $t/comm): $(cut -d ')' -f 2 $t/stat | cut -d ' ' -f 2,12,13) $(cat $t/wchan)"
        done"#;
        output(self.world.root("sh").args(["-c", script])).unwrap_or_default()
    }

    pub fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    pub fn json_of(&self, command: &mut Command) -> Value {
        serde_json::from_str(&output(command).unwrap()).unwrap()
    }

    /// Runs a shell command in the guest.
    pub fn ssh(&self, vm: &str, command: &str) -> String {
        self.ok(&["ssh", vm, command])
    }

    pub fn unix_time(&self) -> i64 {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs().try_into().unwrap()
    }

    /// The state file of a VM that a killed command left.
    pub fn half_made(&self, vm: &str, status: &str) -> String {
        let state = serde_json::json!({
            "schema": 1, "name": vm, "id": 1, "status": status, "process": null, "mac": "52:54:00:00:00:0b",
            "ip": "10.0.0.11", "tap": format!("pt-{vm}"), "cid": 4,
            "image": { "reference": "r", "digest": "sha256:0" },
            "overlay": self.world.home().join(format!("overlays/{vm}.qcow2")),
            "cpus": 1, "memory": 1 << 29, "disk": 1 << 30, "instance": "i", "machine_id": "m", "created": 0,
            "started": null, "hypervisor": null,
        });
        state.to_string()
    }

    /// The TAPs in the world.
    pub fn taps(&self) -> Vec<String> {
        // One that is about to go says so.
        let script =
            "cd /sys/class/net; for t in pt-*; do grep -qs ^removed: $t/ifalias || ls -d $t 2>/dev/null || :; done";
        let links = output(self.world.root("sh").args(["-c", script])).unwrap();
        links.split_whitespace().map(String::from).collect()
    }

    /// The processes in the world whose command line contains `word`, by their number there.
    pub fn processes(&self, word: &str) -> Vec<String> {
        let script =
            "for p in /proc/[0-9]*; do printf '%s ' ${p#/proc/}; tr '\\0' ' ' <$p/cmdline; echo; done 2>/dev/null";
        let all = output(self.world.root("sh").args(["-c", script])).unwrap();
        let own = |line: &str| line.contains("setpriv") || line.contains("/proc/[0-9]");
        let hits = all.lines().filter(|line| line.contains(word) && !own(line));
        hits.filter_map(|line| line.split(' ').next()).map(String::from).collect()
    }

    /// Every file in the data directory but logs and locks, with images.
    pub fn files(&self) -> Vec<String> {
        let script = "cd \"$0\" && find . -type f -o -type s | grep -v -e '\\.log$' -e '/\\.[^/]*lock$' -e '/images/lock$' -e '/images/tmp/.*[.]lock$' -e '/run/daemon\\.lock$' -e '^./ssh/' | sort";
        let all = output(self.world.root("sh").args(["-c", script]).arg(self.world.home())).unwrap();
        all.lines().map(String::from).collect()
    }

    /// What is there of any VM: files, TAPs and processes.
    pub fn leftovers(&self) -> Vec<String> {
        let of_a_vm = |file: &String| {
            ["./state/", "./overlays/", "./run/"].iter().any(|dir| file.starts_with(dir)) && !file.contains("/daemon.")
        };
        let files = self.files().into_iter().filter(of_a_vm);
        files.chain(self.taps()).chain(self.processes("puter-emulator")).collect()
    }

    /// Waits until `met` holds.
    pub fn until(&self, limit: Duration, met: impl Fn() -> bool) {
        let end = Instant::now() + limit;
        while !met() {
            assert!(Instant::now() < end, "this did not happen within {limit:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

pub fn variable(name: &str) -> PathBuf {
    std::env::var_os(name).map(PathBuf::from).unwrap_or_else(|| panic!("{name} is not set: run `cargo xtask test`"))
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
