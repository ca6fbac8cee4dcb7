//! The hypervisor interface against real programs: the emulator with QEMU, vhost-device-vsock and a real kernel, and
//! cloud-hypervisor's API where `PUTER_TEST_CLOUD_HYPERVISOR` names one.
//!
//! `cargo xtask test` builds what is needed and names it in the environment.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use puter::hypervisor::{
    Client, Disk, DiskFormat, Kind, Launch, Machine, Serial, Setting, State, Vsock, detect, process, wait_ready,
};

const PUTER: &str = env!("CARGO_BIN_EXE_puter-multi");
const LIMIT: Duration = Duration::from_secs(90);

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

fn kernel() -> PathBuf {
    std::env::var_os("PUTER_TEST_KERNEL").expect("PUTER_TEST_KERNEL is not set: run `cargo xtask test`").into()
}

/// An initrd of busybox alone: it prints a marker, then does what `script` says.
fn initrd(dir: &Path, script: &str) -> PathBuf {
    let tree = dir.join("initrd.d");
    for sub in ["bin", "proc", "dev"] {
        fs::create_dir_all(tree.join(sub)).unwrap();
    }
    run(Command::new("cp").args(["/bin/busybox"]).arg(tree.join("bin/busybox")));
    let init = format!(
        "#!/bin/busybox sh\n/bin/busybox mount -t devtmpfs dev /dev\n/bin/busybox echo MARKER >/dev/ttyS0\n{script}\n"
    );
    fs::write(tree.join("init"), init).unwrap();
    run(Command::new("chmod").arg("755").arg(tree.join("init")));
    let path = dir.join("initrd");
    run(Command::new("sh").args(["-c", "cd \"$0\" && find . | cpio --quiet -o -H newc >\"$1\""]).arg(tree).arg(&path));
    path
}

fn machine(dir: &Path, kernel: PathBuf, initrd: PathBuf) -> Machine {
    let machine = Machine { kernel, initrd: Some(initrd), ..plain(dir) };
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&machine.disks[0].path).arg("64M"));
    machine
}

/// A machine whose files are not there yet.
fn plain(dir: &Path) -> Machine {
    Machine {
        cpus: 1,
        memory: 256 << 20,
        kernel: dir.join("kernel"),
        initrd: None,
        cmdline: "console=ttyS0 quiet panic=-1".into(),
        disks: vec![Disk {
            path: dir.join("disk 1.qcow2"),
            format: DiskFormat::Qcow2 { backing: true },
            readonly: false,
        }],
        nets: Vec::new(),
        vsock: Some(Vsock { cid: 5, socket: dir.join("vsock") }),
        shares: Vec::new(),
        serial: Serial::File(dir.join("console")),
        api_socket: dir.join("api"),
        events: Some(dir.join("events")),
    }
}

/// The emulator, ended with the test.
struct Emulator(Child);

impl Emulator {
    fn start(machine: &Machine, dir: &Path) -> Emulator {
        let log = fs::File::create(dir.join("log")).unwrap();
        let mut command = Command::new(PUTER);
        command.arg("puter-emulator").args(machine.to_arguments().unwrap()).stdin(Stdio::null()).stderr(log);
        Emulator(command.spawn().unwrap())
    }

    /// PIDs and start times of its children.
    fn children(&self) -> Vec<(u32, u64)> {
        let path = format!("/proc/{0}/task/{0}/children", self.0.id());
        let pids = fs::read_to_string(path).unwrap();
        pids.split_whitespace().map(|p| p.parse().unwrap()).map(|p| (p, process::start_time(p).unwrap())).collect()
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn until(what: &str, dir: &Path, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !check() {
        let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
        assert!(Instant::now() < end, "waited in vain for {what}; the log: {log}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn state(client: &Client) -> Option<State> {
    client.info().ok().map(|info| info.state)
}

fn event_names(machine: &Machine) -> Vec<String> {
    let text = fs::read_to_string(machine.events.as_ref().unwrap()).unwrap();
    let events = serde_json::Deserializer::from_str(&text).into_iter::<serde_json::Value>();
    events.map(|e| e.unwrap()).map(|e| format!("{} {}", e["source"], e["event"]).replace('"', "")).collect()
}

#[test]
#[ignore = "needs root"]
fn a_guest_boots_pauses_resumes_and_powers_off() {
    let dir = tempfile::tempdir().unwrap();
    let go = "while :; do /bin/busybox sleep 1; n=$((n+1)); [ $n = 4 ] && /bin/busybox poweroff -f; done";
    let machine = machine(dir.path(), kernel(), initrd(dir.path(), go));
    let mut emulator = Emulator::start(&machine, dir.path());
    let client = Client::new(&machine.api_socket);
    until("the machine to run", dir.path(), || state(&client) == Some(State::Running));
    assert_eq!(client.ping().unwrap().pid, i64::from(emulator.0.id()));
    client.pause().unwrap();
    assert_eq!(state(&client), Some(State::Paused));
    let error = client.pause().unwrap_err().to_string();
    assert!(error.contains("it is paused"), "{error}");
    client.resume().unwrap();
    client.power_button().unwrap(); // This guest does not listen to it.
    until("the guest to power off", dir.path(), || emulator.0.try_wait().unwrap().is_some());
    assert!(emulator.0.wait().unwrap().success());
    assert!(fs::read_to_string(dir.path().join("console")).unwrap().contains("MARKER"));
    let expected = ["vmm starting", "vm booting", "vm booted", "vm pausing", "vm paused", "vm resuming", "vm resumed"];
    let names = event_names(&machine);
    assert_eq!(names[..7], expected);
    assert_eq!(names[7..], ["vm shutdown", "vm deleted", "vmm shutdown"]);
    assert!(!machine.api_socket.exists() && !dir.path().join("vsock").exists());
}

/// As after a kill of whoever has the snapshot written: the one who lets the machine go on comes amid it.
#[test]
#[ignore = "needs root"]
fn who_lets_a_machine_go_on_waits_for_its_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path(), kernel(), initrd(dir.path(), "while :; do /bin/busybox sleep 1; done"));
    let _emulator = Emulator::start(&machine, dir.path());
    let client = Client::new(&machine.api_socket);
    let console = dir.path().join("console");
    until("the guest to run", dir.path(), || fs::read_to_string(&console).is_ok_and(|text| text.contains("MARKER")));
    for round in 0..4 {
        let to = dir.path().join(format!("snapshot-{round}"));
        fs::create_dir(&to).unwrap();
        client.remove_vsock().unwrap();
        client.pause().unwrap();
        std::thread::scope(|scope| {
            let snapshot = scope.spawn(|| Client::new(&machine.api_socket).snapshot(&to));
            until("the snapshot to begin", dir.path(), || fs::read_dir(&to).unwrap().next().is_some());
            std::thread::sleep(Duration::from_millis(20 * round));
            client.resume().unwrap();
            assert!(to.join("config.json").exists(), "it was not waited for in round {round}");
            snapshot.join().unwrap().unwrap();
        });
        assert_eq!(state(&client), Some(State::Running));
    }
}

#[test]
#[ignore = "needs root"]
fn a_guest_that_reboots_stays_the_same_machine() {
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path(), kernel(), initrd(dir.path(), "/bin/busybox sleep 1; /bin/busybox reboot -f"));
    let emulator = Emulator::start(&machine, dir.path());
    let marks = || fs::read_to_string(dir.path().join("console")).unwrap_or_default().matches("MARKER").count();
    until("the second boot", dir.path(), || marks() >= 2);
    assert!(event_names(&machine).contains(&"vm rebooted".to_owned()));
    assert_eq!(emulator.children().len(), 2, "QEMU and vhost-device-vsock are still there");
    Client::new(&machine.api_socket).shutdown_vmm().unwrap();
}

#[test]
#[ignore = "needs root"]
fn a_killed_emulator_leaves_no_process_and_the_next_launch_cleans_its_sockets() {
    let dir = tempfile::tempdir().unwrap();
    let script = "while :; do /bin/busybox sleep 9; done";
    let machine = machine(dir.path(), kernel(), initrd(dir.path(), script));
    let mut emulator = Emulator::start(&machine, dir.path());
    let client = Client::new(&machine.api_socket);
    until("the machine to run", dir.path(), || state(&client) == Some(State::Running));
    let children = emulator.children();
    assert_eq!(children.len(), 2);
    emulator.0.kill().unwrap();
    emulator.0.wait().unwrap();
    for (pid, start) in children {
        assert!(process::wait_exit(pid, start, LIMIT), "process {pid} outlived the emulator");
    }
    assert!(UnixStream::connect(&machine.api_socket).is_err() && machine.api_socket.exists());
    // Any program will do as the next hypervisor: the cleaning comes before it.
    launch(&falsehood(), &machine, &dir.path().join("log")).unwrap();
    assert!(!machine.api_socket.exists() && !dir.path().join("vsock").exists());
}

fn launch(kind: &Kind, machine: &Machine, log: &Path) -> anyhow::Result<puter::hypervisor::Process> {
    Launch::new(kind, machine, log)?.spawn()
}

/// A hypervisor that ends at once.
fn falsehood() -> Kind {
    Kind::CloudHypervisor { path: "/bin/false".into(), version: "v54.0".into() }
}

#[test]
#[ignore = "needs root"]
fn a_qemu_that_fails_at_once_ends_the_emulator_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(dir.path(), kernel(), initrd(dir.path(), ""));
    machine.disks[0].path = dir.path().join("console-is-no-qcow2");
    fs::write(&machine.disks[0].path, "no disk").unwrap();
    let mut emulator = Emulator::start(&machine, dir.path());
    until("its end", dir.path(), || emulator.0.try_wait().unwrap().is_some());
    assert_eq!(emulator.0.wait().unwrap().code(), Some(1));
    let log = fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(log.contains("not in qcow2 format") && log.contains("puter-emulator: QEMU did not start"), "{log}");
    assert!(!machine.api_socket.exists(), "it takes its socket along");
}

#[test]
fn bad_arguments_and_missing_tools_are_named() {
    let output = Command::new(PUTER).args(["puter-emulator", "--watchdog"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no value"));
    let dir = tempfile::tempdir().unwrap();
    let arguments = plain(dir.path()).to_arguments().unwrap();
    let output = Command::new(PUTER).arg("puter-emulator").args(arguments).env("PATH", "/nowhere").output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("qemu-system-") && error.contains("not on the PATH"), "{error}");
}

#[test]
#[ignore = "needs root"]
fn a_hypervisor_that_dies_at_once_is_noticed_at_once_and_a_live_socket_is_respected() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(dir.path(), "/k".into(), "/i".into());
    machine.vsock = None;
    let kind = falsehood();
    let process = launch(&kind, &machine, &dir.path().join("log")).unwrap();
    let id = (process.pid(), process.start_time());
    let events = dir.path().join("events");
    // A zombie has ended: nobody needs to have reaped it.
    let error = wait_ready(id, &events, &AtomicBool::new(false), LIMIT).unwrap_err().to_string();
    assert!(error.contains("ended at once"), "{error}");
    process.into_child().wait().unwrap();
    let _listener = UnixListener::bind(&machine.api_socket).unwrap();
    let error = launch(&kind, &machine, &dir.path().join("log")).unwrap_err().to_string();
    assert!(error.contains("already listens"), "{error}");
}

#[test]
#[ignore = "needs cloud-hypervisor"]
fn cloud_hypervisor_itself_takes_the_arguments_and_the_requests() {
    let path = std::env::var_os("PUTER_TEST_CLOUD_HYPERVISOR").expect("PUTER_TEST_CLOUD_HYPERVISOR names none");
    let dir = tempfile::tempdir().unwrap();
    let machine = machine(dir.path(), kernel(), initrd(dir.path(), ""));
    let kind = detect(&Setting::Path(path.into())).unwrap();
    let log = dir.path().join("log");
    let process = launch(&kind, &machine, &log).unwrap();
    let client = Client::new(&machine.api_socket);
    let checks = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        if let Err(error) = wait_ready(
            (process.pid(), process.start_time()),
            machine.events.as_deref().unwrap(),
            &AtomicBool::new(false),
            LIMIT,
        ) {
            panic!("{error:#}: {}", fs::read_to_string(&log).unwrap());
        }
        client.pause().unwrap();
        assert_eq!(state(&client), Some(State::Paused));
        assert!(client.pause().is_err());
        client.resume().unwrap();
        client.power_button().unwrap();
        client.shutdown_vmm().unwrap();
        assert!(process::wait_exit(process.pid(), process.start_time(), LIMIT));
        assert!(event_names(&machine).contains(&"vm booted".to_owned()));
    }));
    process::kill(process.pid(), process.start_time(), Duration::from_secs(10));
    if let Err(panic) = checks {
        std::panic::resume_unwind(panic);
    }
}
