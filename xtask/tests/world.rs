//! The world itself: what the end-to-end tests and the demo stand on.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use xtask::shell::output;
use xtask::world::{INTERNET, PAGE, World};

#[test]
#[ignore = "needs root"]
fn a_world_has_an_internet_an_unprivileged_user_and_an_end() {
    let world = World::new(Path::new("/bin/true"), Path::new("/bin/true")).unwrap();
    let url = format!("http://{INTERNET}/");
    let page = output(world.command("busybox").args(["wget", "-q", "-O", "-", &url])).unwrap();
    assert_eq!(page, PAGE);
    assert_eq!(output(world.command("id").arg("-u")).unwrap(), world.uid().to_string());
    let links = output(world.command("ls").arg("/sys/class/net")).unwrap();
    assert_eq!(links.split_whitespace().collect::<Vec<_>>(), ["lo", "uplink"]);
    // One that leaves its caller, as hypervisors do.
    let mut sleeper = world.command("setsid").args(["sleep", "4242"]).stdin(Stdio::null()).spawn().unwrap();
    while sleepers() == 0 {
        assert!(sleeper.try_wait().unwrap().is_none(), "the sleeper did not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    let dir = world.dir().to_path_buf();
    drop(world);
    sleeper.wait().unwrap();
    assert_eq!(sleepers(), 0);
    assert!(!dir.exists());
    assert!(!Path::new("/sys/class/net/uplink").exists());
}

fn sleepers() -> usize {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    lines.filter(|line| line == b"sleep\x004242\0").count()
}
