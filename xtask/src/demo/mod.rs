//! `cargo xtask demo`: the main job, before the reader's eyes, on real parts.

pub mod picture;
pub mod recording;

use std::cell::RefCell;
use std::fs;
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use self::recording::{Recorder, Recording};
use crate::shell::output;

use crate::world::{INTERNET, PAGE, World};
use crate::{build, packages, registry};

const TWO: &str = "Two machines, side by side";
const FORK: &str = "A copy that goes on from this moment, as a machine of its own";

/// What the picture shows; the transcript has all of it.
pub const PICTURE: [&str; 2] = [TWO, FORK];

/// The files of a recording.
pub const CAST: &str = "demo.cast";
pub const TRANSCRIPT: &str = "demo.txt";
pub const SVG: &str = "demo.svg";

/// Builds everything, then boots two machines and uses them as a user would. Where `record` names a directory, what was
/// typed and what came is written there, when all has worked.
///
/// # Errors
/// At the first step that does not do what it should.
pub fn run(record: Option<&Path>) -> Result<()> {
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

    let demo = Demo { world: &world, recorder: RefCell::default() };
    demo.scene("The daemon makes the network; init fetches the image and its kernel");
    demo.show(&["puter", "daemon", "start"])?;
    demo.show(&["puter", "init", "--image", &image])?;
    demo.show(&["puter", "doctor"])?;

    demo.scene(TWO);
    demo.show(&["puter", "start", "web", "db", "--memory", "512M", "--disk", "5G"])?;
    demo.show(&["puter", "list"])?;

    let (ip, mac) = (demo.tell_of("web", "ip")?, demo.tell_of("web", "mac")?);
    let other = demo.tell_of("db", "ip")?;

    demo.scene("Inside the first: its name, its addresses, its disk");
    demo.expect(&["puter", "ssh", "web", "hostname"], "web")?;
    demo.expect(&["puter", "ssh", "web", "ip", "-brief", "address"], &format!("{ip}/24"))?;
    demo.expect(&["puter", "ssh", "web", "ip", "-brief", "link"], &mac)?;
    demo.show(&["puter", "ssh", "web", "df", "-h", "/"])?;

    demo.scene("From the first to the second, and out to the internet");
    demo.expect(&["puter", "ssh", "web", "ping", "-c", "3", &other], " 0% packet loss")?;
    demo.expect(&["puter", "ssh", "web", "curl", "--silent", &format!("http://{INTERNET}/")], PAGE)?;

    demo.scene(FORK);
    demo.show(&["puter", "clone", "web", "copy"])?;
    demo.expect(&["puter", "ssh", "copy", "hostname; uptime -p"], "copy")?;
    demo.show(&["puter", "list"])?;

    demo.scene("And away");
    demo.show(&["puter", "stop", "web", "db", "copy"])?;
    demo.show(&["puter", "delete", "copy", "web", "db"])?;
    demo.show(&["puter", "list"])?;
    demo.show(&["puter", "daemon", "stop"])?;
    let about = about(&world)?;
    let recording = demo.recorder.into_inner().finish(about);
    drop(world);
    if let Some(dir) = record {
        write(&recording, dir)?;
    }
    println!("\nAll of it worked ({} s).", began.elapsed().as_secs());
    Ok(())
}

/// On what the demo runs, in a line.
fn about(world: &World) -> Result<String> {
    let versions = output(world.command("puter").arg("version"))?.replace('\n', ", ");
    let processors = std::thread::available_parallelism()?;
    let load = fs::read_to_string("/proc/loadavg").context("cannot read the load")?;
    // Of the last quarter of an hour: the demo's own work of a minute is a part of the other two.
    let load = load.split_whitespace().nth(2).context("no load")?.to_string();
    let day = output(Command::new("date").args(["--utc", "+%F"]))?;
    let host = format!("{processors} processors under a load of {load}");
    Ok(format!("A run of `cargo xtask demo` on {day}: {versions}; a host with {host}."))
}

/// Writes the recording, its transcript and its picture.
fn write(recording: &Recording, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let files =
        [(CAST, recording.to_cast()), (TRANSCRIPT, recording.to_text()), (SVG, picture::draw(recording, &PICTURE))];
    for (name, text) in files {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        tell(&format!("recorded in {}", path.display()));
    }
    Ok(())
}

struct Demo<'a> {
    world: &'a World,
    recorder: RefCell<Recorder>,
}

impl Demo<'_> {
    fn scene(&self, text: &str) {
        title(text);
        self.recorder.borrow_mut().scene(text);
    }

    /// Shows a command and its output.
    fn show(&self, words: &[&str]) -> Result<()> {
        self.expect(words, "").map(|_| ())
    }

    /// Shows a command and its output, in which `expected` must occur.
    fn expect(&self, words: &[&str], expected: &str) -> Result<()> {
        let typed = words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
        println!("{}", bold(&format!("$ {typed}")));
        let (program, args) = words.split_first().context("no command")?;
        // One pipe for both, so that lines come in their order.
        let (reader, writer) = std::io::pipe()?;
        let mut command = self.world.command(program);
        command.args(args).stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
        self.recorder.borrow_mut().begin(&typed);
        let mut child = command.spawn().with_context(|| format!("cannot run `{typed}`"))?;
        // It holds the pipe's other end.
        drop(command);
        let mut text = String::new();
        for line in BufReader::new(reader).lines() {
            let line = line?;
            println!("{line}");
            self.recorder.borrow_mut().line(&line);
            text.push_str(&line);
            text.push('\n');
        }
        let status = child.wait()?;
        self.recorder.borrow_mut().end();
        ensure!(status.success(), "`{typed}` failed: {status}");
        ensure!(text.contains(expected), "`{typed}` was to print '{expected}'");
        Ok(())
    }
}

/// A word as one types it for a shell.
fn quoted(word: &str) -> String {
    match word.chars().any(|c| c.is_whitespace() || ";*&|<>$".contains(c)) {
        true => format!("'{word}'"),
        false => word.to_string(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shell::top;

    #[test]
    fn the_recording_in_the_repository_is_the_one_that_is_shown() {
        let dir = top().join("packaging/demo");
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        let recording = Recording::from_cast(&read(CAST)).unwrap();
        // Another way to draw is no other run.
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            write(&recording, &dir).unwrap();
        }
        assert_eq!(recording.to_text(), read(TRANSCRIPT));
        assert_eq!(picture::draw(&recording, &PICTURE), read(SVG));
        let titles: Vec<&str> = recording.scenes.iter().map(|scene| scene.title.as_str()).collect();
        assert!(PICTURE.iter().all(|title| titles.contains(title)), "{titles:?}");
    }

    #[test]
    fn words_are_quoted_where_a_shell_needs_it() {
        assert_eq!(["web", "a b", "/etc/*.yaml"].map(quoted), ["web", "'a b'", "'/etc/*.yaml'"]);
    }
}
