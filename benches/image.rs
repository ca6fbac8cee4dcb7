//! From a registry to a disk that boots: puter against the tools that people put together for it, over the same registry
//! and the same image of one GiB.
//!
//! `cargo xtask bench image` runs it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use puter::disk::qcow2::{self, Format};
use puter::image::{PullOptions, Reference, Store};
use xtask::large_image::TAGS;
use xtask::report::{Figure, median};
use xtask::world::World;
use xtask::{registry, shell};

const ROUNDS: usize = 3;
/// Overlays made in a row.
const OVERLAYS: usize = 200;
const OVERLAY_SIZE: u64 = 10 << 30;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let result = match words.iter().position(|word| word == "--pull") {
        Some(at) => pull(&words[at + 1], Path::new(&words[at + 2])),
        None => measure(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What `puter image pull` does, in a process of its own.
fn pull(reference: &str, store: &Path) -> Result<()> {
    let reference: Reference = reference.parse().map_err(|error| anyhow::anyhow!("{error}"))?;
    Store::open(store)?.pull(&reference, &PullOptions::default(), &())?;
    let status = fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    println!("{}", peak.trim().trim_end_matches(" kB"));
    Ok(())
}

/// What something cost.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    seconds: f64,
    /// MiB handed to the file system that it did not take back before they were on the disk.
    written: f64,
    /// Seconds of processors.
    busy: f64,
}

/// Bytes written and processor time of this process and of those that it waited for (proc(5): io, stat).
fn used() -> Result<(f64, f64)> {
    let io = fs::read_to_string("/proc/self/io")?;
    let field = |name: &str| -> Result<f64> {
        let line = io.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
        Ok(line.trim().parse()?)
    };
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // utime to cstime are fields 14 to 17, in ticks of 10 ms; the first after the name is the third.
    let ticks: f64 = fields.iter().skip(11).take(4).filter_map(|field| field.parse::<f64>().ok()).sum();
    Ok((field("write_bytes:")? - field("cancelled_write_bytes:")?, ticks / 100.0))
}

fn cost<T>(work: impl FnOnce() -> Result<T>) -> Result<(Cost, T)> {
    let before = used()?;
    let began = Instant::now();
    let result = work()?;
    let seconds = began.elapsed().as_secs_f64();
    let after = used()?;
    Ok((Cost { seconds, written: (after.0 - before.0) / f64::from(1 << 20), busy: after.1 - before.1 }, result))
}

/// The medians of several rounds.
fn typical(costs: &[Cost]) -> Cost {
    let of = |part: fn(&Cost) -> f64| median(costs.iter().map(part));
    Cost { seconds: of(|cost| cost.seconds), written: of(|cost| cost.written), busy: of(|cost| cost.busy) }
}

/// A registry with the images, and a place for what is made of them.
struct Bench {
    world: World,
    references: Vec<String>,
    itself: PathBuf,
}

impl Bench {
    fn new() -> Result<Bench> {
        let variable = |name: &str| {
            let value = std::env::var_os(name).map(PathBuf::from);
            value.with_context(|| format!("{name} is not set: run `cargo xtask bench image`"))
        };
        let itself = std::env::current_exe()?;
        // The world wants an executable and a device for machines, which this measurement does not have.
        let world = World::new(&itself, &itself)?;
        registry::start(&world)?;
        let large = variable("PUTER_TEST_LARGE_IMAGE")?;
        let push = |tag: &&str| registry::push(&world, &large, tag, &format!("bench/{tag}"));
        let references = TAGS.iter().map(push).collect::<Result<_>>()?;
        Ok(Bench { world, references, itself })
    }

    fn place(&self) -> PathBuf {
        self.world.dir().join("home/made")
    }

    /// Makes a place with nothing in it, and lets the disk come to rest.
    fn clear(&self) -> Result<()> {
        shell::run(self.world.root("rm").arg("-rf").arg(self.place()))?;
        shell::run(self.world.command("mkdir").arg(self.place()))?;
        rustix::fs::sync();
        Ok(())
    }

    /// puter's pull, as the user; gives its highest resident memory in MiB as well.
    fn puter(&self, number: usize) -> Result<(Cost, f64)> {
        let mut command = self.world.command(&self.itself);
        command.arg("--pull").arg(&self.references[number]).arg(self.place().join("images"));
        let (cost, said) = cost(|| shell::output(&mut command))?;
        Ok((cost, said.trim().parse::<f64>()? / 1024.0))
    }

    /// The disks of a pull and how many bytes of storage all of it takes, in MiB.
    fn disk(&self) -> Result<PathBuf> {
        let mut disks = fs::read_dir(self.place().join("images/disks"))?;
        Ok(disks.next().context("no disk")??.path().join("disk.raw"))
    }

    /// The same by the tools, as root: they must be, for owners and devices to be right.
    fn tools(&self) -> Result<Vec<(&'static str, Cost)>> {
        let place = self.place();
        let at = |name: &str| place.join(name).display().to_string();
        let source = format!("docker://{}", self.references[0]);
        let (layout, rootfs) = (format!("oci:{}:a", at("oci")), at("bundle/rootfs"));
        let image = format!("{}:a", at("oci"));
        let steps: [(&str, &[&str]); 4] = [
            ("skopeo", &["--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", &source, &layout]),
            ("umoci", &["unpack", "--image", &image, &at("bundle")]),
            ("mke2fs", &["-q", "-t", "ext4", "-d", &rootfs, &at("disk.raw"), "2G"]),
            (
                "qemu-img",
                &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &at("disk.raw"), &at("disk.qcow2"), "10G"],
            ),
        ];
        let run = |(program, words): (&'static str, &[&str])| -> Result<(&'static str, Cost)> {
            let mut command = self.world.root(program);
            Ok((program, cost(|| shell::output(command.args(words)))?.0))
        };
        steps.into_iter().map(run).collect()
    }
}

fn measure() -> Result<()> {
    let bench = Bench::new()?;
    let (mut first, mut second, mut tools, mut peaks, mut steps) = (vec![], vec![], vec![], vec![], vec![]);
    for round in 0..ROUNDS {
        // In turns, so that a change of the machine's mood hits both.
        bench.clear()?;
        steps = bench.tools()?;
        tools.push(steps.iter().fold(Cost::default(), |sum, (_, cost)| Cost {
            seconds: sum.seconds + cost.seconds,
            written: sum.written + cost.written,
            busy: sum.busy + cost.busy,
        }));
        bench.clear()?;
        let (cost, peak) = bench.puter(0)?;
        first.push(cost);
        peaks.push(peak);
        if round == 0 {
            let mut check = bench.world.root("e2fsck");
            shell::output(check.args(["-f", "-n"]).arg(bench.disk()?)).context("the file system is not sound")?;
        }
        rustix::fs::sync();
        second.push(bench.puter(1)?.0);
        eprintln!("round {}: {:?} {:?} {:?}", round + 1, tools[round], first[round], second[round]);
    }
    let (first, second, tools) = (typical(&first), typical(&second), typical(&tools));
    println!("\n## From a registry to a disk that boots, an image of one GiB (medians of {ROUNDS})\n");
    println!("| | seconds | processor seconds | MiB written |");
    println!("| --- | --- | --- | --- |");
    let line = |name: &str, cost: Cost| {
        println!("| {name} | {:.2} | {:.2} | {:.0} |", cost.seconds, cost.busy, cost.written);
    };
    steps.into_iter().for_each(|(program, cost)| line(&format!("{program} (of the last round)"), cost));
    line("the four of them", tools);
    line("puter", first);
    line("puter, the image with another last layer", second);
    let ratio = |a: Cost, b: Cost| {
        format!("{:.2} of the time, {:.2} of the bytes", a.seconds / b.seconds, a.written / b.written)
    };
    println!("\nputer against the tools: {}", ratio(first, tools));
    println!("second image against the first: {}", ratio(second, first));
    let peak = median(peaks);
    println!("highest resident memory: {peak:.1} MiB");
    let figure = |what: &str, value, unit: &str| Figure::new("image", what, value, unit);
    let peers = "skopeo, umoci, mke2fs, qemu-img";
    figure("from a registry to a disk", first.seconds, "s").against(peers, tools.seconds).goal(0.33).tell();
    figure("processor time for it", first.busy, "s").against(peers, tools.busy).tell();
    figure("written for it", first.written, "MiB").against(peers, tools.written).goal(0.25).tell();
    figure("another last layer", second.seconds, "s").against("the whole image", first.seconds).tell();
    figure("highest resident", peak, "MiB").tell();
    overlays(&bench)
}

/// Overlays over the disk that was made.
fn overlays(bench: &Bench) -> Result<()> {
    let (disk, place) = (bench.disk()?, bench.place());
    let (mut own, mut peer) = (vec![], vec![]);
    for number in 0..OVERLAYS {
        let path = place.join(format!("{number}.qcow2"));
        own.push(cost(|| qcow2::create_overlay(&path, &disk, Format::Raw, OVERLAY_SIZE))?.0);
        if number % 10 == 0 {
            let mut command = Command::new("qemu-img");
            command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&disk);
            command.arg(place.join(format!("{number}.peer"))).arg(OVERLAY_SIZE.to_string());
            peer.push(cost(|| shell::output(&mut command))?.0);
        }
    }
    let (own, peer) = (typical(&own).seconds * 1e3, typical(&peer).seconds * 1e3);
    ensure!(peer > 0.0, "qemu-img took no time");
    println!("\nan overlay: puter {own:.3} ms, qemu-img {peer:.3} ms: {:.3}", own / peer);
    Figure::new("image", "an overlay", own, "ms").against("qemu-img", peer).goal(0.1).tell();
    Ok(())
}
