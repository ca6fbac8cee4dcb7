//! What a pull shows, on a terminal that is emulated and on a pipe, while a real registry answers slowly.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::image::{ARCHITECTURE, Sample, entry, noise, tar};
use super::real::{Layout, Registry, gzip_free};
use super::screen::Terminal;

/// Bytes that the way from the registry carries in a second, each connection its own.
const SLOW: usize = 500_000;
/// The same where nobody looks at the bars: slow enough for a download to be worth a line.
const FAST: usize = 5_000_000;
/// Layers of the image.
const LAYERS: usize = 8;
/// As many are on their way at once.
const AT_ONCE: usize = 3;

/// A real registry behind a slow line, with one image: `app:1`.
struct Slow {
    _registry: Registry,
    address: String,
    dir: tempfile::TempDir,
}

impl Slow {
    fn new(speed: usize) -> Slow {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::start(dir.path(), "");
        let mut layout = Layout::new(&dir.path().join("layout"));
        // This is little to download and much to convert.
        let long = b"the same again\n".repeat(6 << 20);
        let mut layers = vec![gzip_free(&Sample::new()), tar(&[entry("long", b'0', 0o644, "", &long)])];
        let more =
            (2..LAYERS).map(|n| tar(&[entry(&format!("file{n}"), b'0', 0o644, "", &noise(200_000 + n * 10_000))]));
        layers.extend(more);
        layout.add(ARCHITECTURE, &layers);
        registry.push(&layout.finish("v"), "app:1", &["--override-arch", ARCHITECTURE]);
        let address = slow_line(registry.address.clone(), speed);
        Slow { _registry: registry, address, dir }
    }

    fn image(&self) -> String {
        format!("{}/app:1", self.address)
    }

    /// `puter`, with a new home for each number.
    fn puter(&self, home: u32, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_puter-multi"));
        command.arg0("puter").args(args).env_clear().env("PUTER_HOME", self.home(home)).env("TERM", "xterm");
        command
            .env("HOME", self.dir.path())
            .env("XDG_CONFIG_HOME", self.dir.path().join("config"))
            .stdin(Stdio::null());
        command
    }

    fn home(&self, number: u32) -> std::path::PathBuf {
        self.dir.path().join(format!("h{number}"))
    }
}

/// Passes connections on to `to`, and what comes back at this speed.
fn slow_line(to: String, speed: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for inward in listener.incoming().flatten() {
            let Ok(outward) = TcpStream::connect(&to) else { return };
            let (mut from, mut into) = (inward.try_clone().unwrap(), outward.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut from, &mut into));
            std::thread::spawn(move || -> Option<()> {
                let (mut from, mut into) = (outward, inward);
                let mut buffer = vec![0; speed / 50];
                loop {
                    let count = from.read(&mut buffer).ok().filter(|count| *count > 0)?;
                    into.write_all(&buffer[..count]).ok()?;
                    std::thread::sleep(Duration::from_secs_f64(count as f64 / speed as f64));
                }
            });
        }
    });
    address
}

fn is_layer(line: &str) -> bool {
    line.starts_with("  layer ")
}

/// The bytes of a bar's line: `  layer 0123456789ab [==>  ] 1.5M/3M 400K/s 4s`.
fn done(line: &str) -> Option<&str> {
    line.split_whitespace().rev().nth(2)?.split_once('/').map(|(done, _)| done)
}

/// What the pull leaves on the screen: a line for each thing that took its time, and what came of it.
fn check_rest(lines: &[String], image: &str) {
    // What takes no time on a quick machine.
    let slow = ["resolving", "finishing"].map(|stage| format!("{image}: {stage} "));
    let lines: Vec<&String> = lines.iter().filter(|line| !slow.iter().any(|slow| line.starts_with(slow))).collect();
    assert_eq!(lines.len(), 3, "{lines:#?}");
    let expected = [format!("{image}: downloading {LAYERS} layers, "), format!("{image}: converting ")];
    for (line, start) in lines.iter().zip(&expected) {
        assert!(line.starts_with(start) && line.ends_with(" s"), "{lines:#?}");
    }
    assert!(lines[2].starts_with(&format!("{image} pulled (")), "{lines:#?}");
}

#[test]
#[ignore = "needs root"]
fn a_terminal_shows_a_bar_for_each_layer_and_is_left_clean() {
    let slow = Slow::new(SLOW);
    let image = slow.image();
    let terminal = Terminal::run(slow.puter(1, &["image", "pull", &image]), 24, 80);
    let first = terminal.until("all bars", |rows| rows.iter().filter(|row| is_layer(row)).count() == AT_ONCE);
    let whole = &first[0];
    assert!(whole.starts_with("downloading 127.0.0.1:") && whole.contains("] "), "{first:#?}");
    assert!(first[1..=AT_ONCE].iter().all(|row| is_layer(row)), "{first:#?}");
    let moved = terminal.until("a rate", |rows| rows[0].contains("/s ") && done(&rows[0]) != done(whole));
    let left = moved[0].split_whitespace().last().unwrap();
    assert!(left.ends_with('s'), "{moved:#?}");
    let (status, lines, seen) = terminal.end();
    assert!(status.success(), "{lines:#?}");
    check_rest(&lines, &image);
    for rows in &seen.pictures {
        let bars = rows.iter().filter(|row| is_layer(row) || row.contains(" [")).count();
        assert!(bars <= 1 + AT_ONCE && rows.iter().all(|row| row.chars().count() < 80), "{rows:#?}");
    }
}

#[test]
#[ignore = "needs root"]
fn a_terminal_of_another_size_or_a_very_low_one_keeps_its_lines() {
    let slow = Slow::new(SLOW);
    let image = slow.image();
    let terminal = Terminal::run(slow.puter(1, &["image", "pull", &image]), 24, 100);
    terminal.until("all bars", |rows| rows.iter().filter(|row| is_layer(row)).count() == AT_ONCE);
    for columns in [52, 130, 90] {
        terminal.resize(24, columns);
        // A line that is there twice would be one that nobody takes away.
        let fits = |rows: &[String]| {
            let bars: Vec<_> = rows.iter().filter(|row| is_layer(row)).collect();
            !bars.is_empty() && bars.iter().all(|row| row.contains(" [") == (columns > 60))
        };
        let rows = terminal.until("bars of the new width", fits);
        let mut names: Vec<_> =
            rows.iter().filter(|row| is_layer(row)).map(|row| row.split_whitespace().nth(1)).collect();
        let bars = names.len();
        names.dedup();
        assert_eq!(names.len(), bars, "{rows:#?}");
        assert_eq!(rows.iter().filter(|row| row.starts_with("downloading ")).count(), 1, "{rows:#?}");
    }
    let (status, lines, _) = terminal.end();
    assert!(status.success(), "{lines:#?}");
    check_rest(&lines, &image);

    // Two rows above the one of the cursor.
    let terminal = Terminal::run(slow.puter(2, &["image", "pull", &image]), 3, 70);
    terminal.until("a layer", |rows| rows.iter().any(|row| is_layer(row)));
    let (status, lines, seen) = terminal.end();
    assert!(status.success(), "{lines:#?}");
    check_rest(&lines, &image);
    let most = |rows: &Vec<String>| rows.iter().filter(|row| is_layer(row)).count() <= 1;
    let wrong: Vec<_> = seen.pictures.iter().filter(|rows| !most(rows)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
#[ignore = "needs root"]
fn an_interrupted_pull_takes_its_bars_away_and_ends_at_once() {
    let slow = Slow::new(SLOW);
    let terminal = Terminal::run(slow.puter(1, &["image", "pull", &slow.image()]), 24, 80);
    terminal.until("a layer", |rows| rows.iter().any(|row| is_layer(row)));
    let pid = rustix::process::Pid::from_child(&terminal.child);
    let began = Instant::now();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let (status, lines, _) = terminal.end();
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(status.code(), Some(130), "{lines:#?}");
    assert!(lines.iter().all(|line| !line.contains(" [") && !is_layer(line)), "{lines:#?}");
    assert!(lines.iter().any(|line| line.starts_with("puter: ") && line.ends_with("interrupted")), "{lines:#?}");
    let left = std::fs::read_dir(slow.home(1).join("images/tmp")).unwrap().count();
    assert_eq!(left, 0, "it takes its files away");
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// That nothing in it moves a cursor, and every line is whole.
fn check_plain(output: &Output) {
    let said = [text(&output.stdout), text(&output.stderr)].concat();
    assert!(said.ends_with('\n') && said.chars().all(|c| c == '\n' || !c.is_control()), "{said:?}");
}

#[test]
#[ignore = "needs root"]
fn a_pipe_gets_plain_lines_and_a_program_nothing_but_the_result() {
    let slow = Slow::new(FAST);
    let image = slow.image();
    let run = |home, args: &[&str]| {
        let output = slow.puter(home, args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        check_plain(&output);
        output
    };
    let output = run(1, &["image", "pull", &image]);
    let lines: Vec<String> = text(&output.stderr).lines().map(String::from).collect();
    check_rest(&[lines, vec![text(&output.stdout).trim_end().to_string()]].concat(), &image);

    // The same where another command pulls.
    let output = run(2, &["init", "--image", &image]);
    let expected = format!("{image}: downloading {LAYERS} layers, ");
    assert!(text(&output.stderr).lines().any(|line| line.starts_with(&expected)), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with(&format!("ready: {image} (")));

    let digest = text(&run(1, &["image", "inspect", "--json", &image]).stdout).to_string();
    let digest: serde_json::Value = serde_json::from_str(&digest).unwrap();
    let digest = digest[0]["digest"].as_str().unwrap().to_string();
    let quiet = run(3, &["image", "pull", "--quiet", &image]);
    assert_eq!((text(&quiet.stdout), text(&quiet.stderr)), (format!("{digest}\n").as_str(), ""));
    let output = run(4, &["image", "pull", "--json", &image]);
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&shown[0]["digest"], &shown[0]["changed"]), (&digest.clone().into(), &true.into()), "{shown}");
    assert_eq!(text(&output.stderr), "");

    // Nor does a terminal get more than it was asked for.
    let (status, lines, seen) = Terminal::run(slow.puter(5, &["image", "pull", "-q", &image]), 24, 80).end();
    assert!(status.success() && lines == [digest], "{lines:#?}");
    assert!(!seen.raw.contains(&0x1b), "{:?}", text(&seen.raw));
    // And one that knows no controls gets lines.
    let mut dumb = slow.puter(6, &["image", "pull", &image]);
    dumb.env("TERM", "dumb");
    let (status, lines, seen) = Terminal::run(dumb, 24, 80).end();
    assert!(status.success() && !seen.raw.contains(&0x1b), "{:?}", text(&seen.raw));
    check_rest(&lines, &image);
    assert!(Path::new(&slow.home(6)).join("images/disks").is_dir());
}
