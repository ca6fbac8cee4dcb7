//! `cargo xtask bench`: the benchmarks in benches/, one or all, and their report.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::report::{self, Figure};
use crate::shell::top;
use crate::suite::as_root;
use crate::world::World;
use crate::{build, packages, registry};

/// All of them, the short ones first.
const ALL: [&str; 4] = ["cli", "net", "image", "clone"];

/// Runs one benchmark, or each in turn, and writes the report in target/bench/.
///
/// # Errors
/// When there is none of this name, what it needs cannot be had, or one fails; the report has the figures of the others.
pub fn run(only: Option<&str>) -> Result<()> {
    let known = only.is_none_or(|what| ALL.contains(&what));
    ensure!(known, "there is no benchmark '{}'; there are: {}", only.unwrap_or_default(), ALL.join(", "));
    let directory = top().join("target/bench");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let (mut figures, mut failed) = (Vec::new(), Vec::new());
    for what in ALL.into_iter().filter(|what| only.is_none_or(|only| only == *what)) {
        println!("\n# {what}\n");
        if let Err(error) = one(what, &mut figures) {
            eprintln!("{what}: {error:#}");
            failed.push(what.to_owned());
        }
    }
    report::write(&directory, &figures, &failed)?;
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

fn one(what: &str, figures: &mut Vec<Figure>) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.args(["bench", "--bench", what]).current_dir(top()).env(report::VARIABLE, "1");
    match what {
        "net" => {
            packages::install(packages::BENCH_NET)?;
            as_root(&mut cargo)?;
        }
        "image" => {
            for list in [packages::GUEST_IMAGE, packages::RUN, packages::BENCH_IMAGE] {
                packages::install(list)?;
            }
            let guest = build::guest_image(&build::release()?)?;
            as_root(&mut cargo)?;
            cargo.env("PUTER_TEST_LARGE_IMAGE", build::large_image(&guest)?);
        }
        _ => {
            for list in [packages::GUEST_IMAGE, packages::RUN, packages::BENCH_CLI] {
                packages::install(list)?;
            }
            let built = build::release()?;
            cargo.env("PUTER_TEST_BIN", &built.dir).env("PUTER_TEST_SMALL_GUEST", build::small_guest(&built)?);
            cargo.env("PUTER_VHOST_DEVICE_VSOCK", build::vhost_device_vsock()?);
        }
    }
    let mut child = cargo.stdout(Stdio::piped()).spawn().context("cannot run cargo")?;
    for line in BufReader::new(child.stdout.take().context("cargo has no output")?).lines() {
        let line = line.context("cannot read cargo's output")?;
        match Figure::of_line(&line)? {
            Some(figure) => figures.push(figure),
            None => println!("{line}"),
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "the benchmark failed ({status})");
    Ok(())
}

fn variable(name: &str) -> Result<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).with_context(|| format!("{name} is not set: run `cargo xtask bench`"))
}

/// A world with puterd, and with the small guest as the image of new VMs, from what [`run`] has built.
///
/// # Errors
/// When the environment does not name what was built, or a step fails.
pub fn world() -> Result<World> {
    let (executable, vsock) = (variable("PUTER_TEST_BIN")?.join("puter-multi"), variable("PUTER_VHOST_DEVICE_VSOCK")?);
    let world = World::new(&executable, &vsock)?;
    world.grant()?;
    registry::start(&world)?;
    let image = registry::push(&world, &variable("PUTER_TEST_SMALL_GUEST")?, build::GUEST_TAG, "puter/small")?;
    for words in [&["daemon", "start"][..], &["init", "--image", &image]] {
        let output = world.puter(words)?;
        ensure!(output.status.success(), "puter {}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(world)
}

/// Runs the calling program again, with `--here`, in such a world and as its user.
///
/// # Errors
/// When it cannot be run, or fails.
pub fn run_in(world: &World, variables: &[(&str, &str)]) -> Result<()> {
    let copy = world.dir().join("bin/bench");
    fs::copy(std::env::current_exe()?, &copy)?;
    let mut variables = variables.to_vec();
    variables.extend(std::env::var_os(report::VARIABLE).map(|_| (report::VARIABLE, "1")));
    let status = world.command_with(&variables, &copy).arg("--here").status()?;
    ensure!(status.success(), "the measurement failed ({status})");
    Ok(())
}
