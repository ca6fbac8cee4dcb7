//! The scripts of packaging/examples/ci as they stand: jobs in clones of a prepared machine, none of which is left behind.

#[path = "e2e/host.rs"]
mod host;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use host::{Host, text};
use xtask::shell::{output, top};

const LIMIT: Duration = Duration::from_secs(120);

/// The example in the user's home.
fn example(host: &Host) -> PathBuf {
    let to = host.world.dir().join("home/ci");
    output(host.world.command("cp").arg("-r").arg(top().join("packaging/examples/ci")).arg(&to)).unwrap();
    to
}

/// A directory with one file, of the user's.
fn checkout(host: &Host, name: &str, words: &str) -> PathBuf {
    let dir = host.world.dir().join("home").join(name);
    output(host.world.command("mkdir").arg(&dir)).unwrap();
    output(host.world.command("sh").args(["-c", "echo \"$1\" >\"$0/input\""]).arg(&dir).arg(words)).unwrap();
    dir
}

fn job(host: &Host, scripts: &Path, variables: &[(&str, &str)], name: &str, dir: &Path, script: &str) -> Command {
    let mut command = host.world.command_with(variables, scripts.join("job.sh"));
    command.arg(name).arg(dir).args(["sh", "-c", script]).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Starts a job that would take long, waits until its command runs, and gives the number of its process inside.
fn long_job(host: &Host, scripts: &Path, name: &str, dir: &Path) -> (Child, String) {
    let pid = host.world.dir().join("home").join(format!("{name}.pid"));
    let script = "echo $$ >\"$0\"; exec \"$@\"";
    let mut command = host.world.command("sh");
    command.args(["-c", script]).arg(&pid).arg(scripts.join("job.sh")).arg(name).arg(dir);
    command.args(["sh", "-c", "busybox touch /run/begun; busybox sleep 600"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let vm = format!("ci-{name}");
    host.until(LIMIT, || {
        let begun = host.world.puter(&["exec", &vm, "--", "sh", "-c", "test -e /run/begun"]).unwrap();
        begun.status.success()
    });
    (child, fs::read_to_string(pid).unwrap().trim().to_string())
}

/// The names of all VMs.
fn vms(host: &Host) -> Vec<String> {
    let shown = host.json(&["list", "--json"]);
    shown.as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap().to_string()).collect()
}

#[test]
#[ignore = "needs root"]
fn jobs_run_in_clones_and_leave_none_behind() {
    let host = Host::new();
    host.ready();
    let scripts = example(&host);
    let tools = host.world.dir().join("home/tools.sh");
    output(host.world.command("sh").args(["-c", "echo 'echo compiler >/etc/tools' >\"$0\""]).arg(&tools)).unwrap();
    let mut prepare = host.world.command(scripts.join("prepare.sh"));
    output(prepare.arg("localhost:5000/puter/small").arg(&tools).arg("ready")).unwrap();
    assert_eq!(vms(&host), ["ci-base"]);

    // Two at once, each with its own files, output and exit code.
    let one = checkout(&host, "one", "first");
    let two = checkout(&host, "two", "second");
    let work = "busybox cat /etc/tools input; busybox mkdir out; busybox cp input out/result; echo oh >&2; exit $0";
    let start = |name: &str, dir: &Path, code: &str| {
        job(&host, &scripts, &[], name, dir, &work.replace("$0", code)).spawn().unwrap()
    };
    let (a, b) = (start("a", &one, "0"), start("b", &two, "7"));
    for (child, dir, words, code) in [(a, &one, "first", 0), (b, &two, "second", 7)] {
        let done = child.wait_with_output().unwrap();
        let errors = text(&done.stderr);
        assert_eq!((text(&done.stdout), done.status.code()), (format!("compiler\n{words}\n"), Some(code)), "{errors}");
        assert!(errors.ends_with("oh\n"), "{errors}");
        assert_eq!(fs::read_to_string(dir.join("out/result")).unwrap(), format!("{words}\n"));
    }
    assert_eq!(vms(&host), ["ci-base"]);

    // One whose time is over.
    let over = job(&host, &scripts, &[("CI_TIMEOUT", "1")], "over", &one, "busybox sleep 600").output().unwrap();
    assert_eq!(over.status.code(), Some(124), "{}", text(&over.stderr));
    assert_eq!(vms(&host), ["ci-base"]);

    // One that is asked to end cleans up after itself.
    let (mut child, pid) = long_job(&host, &scripts, "asked", &one);
    output(host.world.root("kill").args(["-TERM", &pid])).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert_eq!(vms(&host), ["ci-base"]);

    // One that is killed cannot; what it leaves goes by the sweep, and nothing of one that lives.
    let (mut killed, dead) = long_job(&host, &scripts, "killed", &one);
    let (mut living, alive) = long_job(&host, &scripts, "living", &two);
    let again = job(&host, &scripts, &[], "living", &two, "true").output().unwrap();
    assert_eq!(again.status.code(), Some(1), "a second job of the same name");
    output(host.world.root("kill").args(["-KILL", &dead])).unwrap();
    let _ = killed.wait().unwrap();
    assert_eq!(vms(&host), ["ci-base", "ci-killed", "ci-living"]);
    let swept = output(&mut host.world.command(scripts.join("sweep.sh"))).unwrap();
    assert_eq!(swept, "ci-killed was left behind, and is gone");
    assert_eq!(vms(&host), ["ci-base", "ci-living"]);
    output(host.world.root("kill").args(["-TERM", &alive])).unwrap();
    let _ = living.wait().unwrap();
    assert_eq!(vms(&host), ["ci-base"]);
    let locks = host.world.dir().join("home/.cache/puter-ci");
    assert_eq!(fs::read_dir(locks).unwrap().count(), 0, "locks of jobs that have ended");

    host.ok(&["delete", "--snapshots", "ci-base"]);
    host.until(LIMIT, || host.leftovers().is_empty());
}
