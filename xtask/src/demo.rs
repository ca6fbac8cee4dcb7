//! `cargo xtask demo`: the main job, before the reader's eyes, on real parts.

use std::io::IsTerminal;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::world::{INTERNET, PAGE, World};
use crate::{build, packages, registry};

/// Builds everything, then boots two machines and uses them as a user would.
///
/// # Errors
/// At the first step that does not do what it should.
pub fn run() -> Result<()> {
    let began = Instant::now();
    title("Building: the packages, the executable, and a guest image from Debian packages");
    for list in [packages::GUEST_IMAGE, packages::RUN] {
        packages::install(list)?;
    }
    let built = build::release()?;
    let vsock = build::vhost_device_vsock()?;
    let guest = build::guest_image(&built)?;
    let size = std::fs::metadata(&built.executable)?.len();
    tell(&format!("one static executable of {:.1} MiB: {}", size as f64 / 1048576.0, built.executable.display()));

    title("A world of its own: a host, an internet behind its uplink, a registry with the guest image");
    let world = World::new(&built.executable, &vsock)?;
    registry::start(&world)?;
    let image = registry::push(&world, &guest, build::GUEST_TAG, "puter/debian")?;
    world.grant()?;
    tell(&format!("from here on everything runs as the user {}, who is not root", world.user()));
    tell("/dev/kvm is left alone: the machines run under emulation, the same on every computer");

    title("The daemon makes the network; init fetches the image and its kernel");
    let demo = Demo { world: &world };
    demo.show(&["puter", "daemon", "start"])?;
    demo.show(&["puter", "init", "--image", &image])?;
    demo.show(&["puter", "doctor"])?;

    title("Two machines, side by side");
    demo.show(&["puter", "start", "web", "db", "--memory", "512M", "--disk", "5G"])?;
    demo.show(&["puter", "list"])?;

    let (ip, mac) = (demo.tell_of("web", "ip")?, demo.tell_of("web", "mac")?);
    let other = demo.tell_of("db", "ip")?;

    title("Inside the first: its name, its addresses, its disk");
    demo.expect(&["puter", "ssh", "web", "hostname"], "web")?;
    demo.expect(&["puter", "ssh", "web", "ip", "-brief", "address"], &format!("{ip}/24"))?;
    demo.expect(&["puter", "ssh", "web", "cat", "/etc/netplan/*.yaml"], &mac)?;
    demo.show(&["puter", "ssh", "web", "df", "-h", "/"])?;

    title("From the first to the second, and out to the internet");
    demo.expect(&["puter", "ssh", "web", "ping", "-c", "3", &other], " 0% packet loss")?;
    demo.expect(&["puter", "ssh", "web", "curl", "--silent", &format!("http://{INTERNET}/")], PAGE)?;

    title("And away");
    demo.show(&["puter", "stop", "web", "db"])?;
    demo.show(&["puter", "delete", "web", "db"])?;
    demo.show(&["puter", "list"])?;
    demo.show(&["puter", "daemon", "stop"])?;
    drop(world);
    println!("\nAll of it worked ({} s).", began.elapsed().as_secs());
    Ok(())
}

struct Demo<'a> {
    world: &'a World,
}

impl Demo<'_> {
    /// Shows a command and its output.
    fn show(&self, words: &[&str]) -> Result<()> {
        self.expect(words, "").map(|_| ())
    }

    /// Shows a command and its output, in which `expected` must occur.
    fn expect(&self, words: &[&str], expected: &str) -> Result<()> {
        let typed = words.join(" ");
        println!("{}", bold(&format!("$ {typed}")));
        let (program, args) = words.split_first().context("no command")?;
        let output = self.world.command(program).args(args).stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        println!("{}", text.trim_end());
        ensure!(output.status.success(), "`{typed}` failed: {}", output.status);
        ensure!(text.contains(expected), "`{typed}` was to print '{expected}'");
        Ok(())
    }
}

impl Demo<'_> {
    /// A field of `puter info --json`, for the demo's own use.
    fn tell_of(&self, vm: &str, field: &str) -> Result<String> {
        let output = self.world.puter(&["info", vm, "--json"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let key = format!("\"{field}\": \"");
        let value = text.split(&key).nth(1).and_then(|rest| rest.split('"').next());
        Ok(value.with_context(|| format!("`puter info {vm} --json` tells no {field}"))?.to_string())
    }
}

fn title(text: &str) {
    println!("\n{}", bold(&format!("== {text}")));
}

fn tell(text: &str) {
    println!("{text}");
}

fn bold(text: &str) -> String {
    match std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        true => format!("\x1b[1m{text}\x1b[0m"),
        false => text.to_string(),
    }
}
