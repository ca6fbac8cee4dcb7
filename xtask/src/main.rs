//! `cargo xtask COMMAND`: what a developer runs more than once.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use argh::FromArgs;
use xtask::package::{self, Source};
use xtask::{bench, build, demo, deny, fuzz, msrv, packages, suite};

/// What a developer of puter runs more than once. Each command installs what it needs.
#[derive(FromArgs)]
struct Xtask {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum Command {
    Build(Build),
    GuestImage(GuestImage),
    Demo(Demo),
    Deny(Deny),
    Msrv(Msrv),
    Test(Test),
    Bench(Bench),
    Fuzz(Fuzz),
    Package(Package),
}

/// Build the executable in release mode with its names in target/puter/.
#[derive(FromArgs)]
#[argh(subcommand, name = "build")]
struct Build {}

/// Build the guest's OCI image in target/guest/oci from Debian packages.
#[derive(FromArgs)]
#[argh(subcommand, name = "guest-image")]
struct GuestImage {
    /// build the small guest of the tests in target/guest/small as well
    #[argh(switch)]
    small: bool,
}

/// Do the main job before your eyes: build, boot two machines, use them, clean up.
#[derive(FromArgs)]
#[argh(subcommand, name = "demo")]
struct Demo {
    /// write what was typed and what came to demo.cast, demo.txt and demo.svg in this directory
    #[argh(option)]
    record: Option<PathBuf>,
}

/// Check the dependencies: licences, duplicates, sources, and advisories where their database can be fetched.
#[derive(FromArgs)]
#[argh(subcommand, name = "deny")]
struct Deny {}

/// Check that the oldest Rust which Cargo.toml states is enough.
#[derive(FromArgs)]
#[argh(subcommand, name = "msrv")]
struct Msrv {}

/// Run all tests, those with real guests included.
#[derive(FromArgs)]
#[argh(subcommand, name = "test")]
struct Test {
    /// only tests whose name contains this
    #[argh(positional)]
    filter: Option<String>,
}

/// Measure puter against its peers, in one run on this machine. The report is target/bench/report.md, with a plot.
#[derive(FromArgs)]
#[argh(subcommand, name = "bench")]
struct Bench {
    /// what to measure: cli, net, image or clone (default: each in turn)
    #[argh(positional)]
    what: Option<String>,
}

/// Throw damaged bytes at what reads those of guests, images, other programs and the network, and puter's own files.
#[derive(FromArgs)]
#[argh(subcommand, name = "fuzz")]
struct Fuzz {
    /// what reads them, as the files in fuzz/targets are called (default: each in turn)
    #[argh(positional)]
    target: Option<String>,
    /// seconds for each (default: 60)
    #[argh(option, default = "60")]
    seconds: u32,
}

/// Make packages in target/packages/.
#[derive(FromArgs)]
#[argh(subcommand, name = "package")]
struct Package {
    /// what to make: deb (puter and puter-agent for Debian), rpm (the same for systems with RPM), tar (an archive with
    /// install.sh), sbom (the bill of materials, CycloneDX), or check (makes them, and installs, upgrades and purges those
    /// for Debian in a fresh one; needs root)
    #[argh(positional)]
    what: String,
    /// package this executable, and build none
    #[argh(option)]
    executable: Option<PathBuf>,
}

fn main() -> ExitCode {
    let command: Xtask = argh::from_env();
    match run(command.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Build(_) => build::release().map(|built| println!("{}", built.dir.display())),
        Command::GuestImage(options) => {
            packages::install(packages::GUEST_IMAGE)?;
            let built = build::release()?;
            let guest = build::guest_image(&built)?;
            if options.small {
                println!("oci:{}", build::small_guest(&built)?.display());
            }
            println!("oci:{}", guest.display());
            Ok(())
        }
        Command::Demo(options) => demo::run(options.record.as_deref()),
        Command::Deny(_) => deny::run_all(),
        Command::Msrv(_) => msrv::run_all(),
        Command::Test(test) => suite::run(test.filter.as_deref()),
        Command::Bench(bench) => bench::run(bench.what.as_deref()),
        Command::Package(options) => make_package(&options.what, options.executable),
        Command::Fuzz(options) => fuzz::run(options.target.as_deref(), options.seconds),
    }
}

fn make_package(what: &str, executable: Option<PathBuf>) -> Result<()> {
    let all = ["deb", "rpm", "tar", "sbom", "check"];
    ensure!(all.contains(&what), "there is no package '{what}'; there are: {}", all.join(", "));
    packages::install(packages::PACKAGE)?;
    let source = Source::of(executable)?;
    match what {
        "check" => package::check::run_all(&source)?,
        "sbom" => println!("{}", package::sbom::make(&source)?.display()),
        "tar" => println!("{}", package::tar::make(&source)?.display()),
        _ => {
            let made = match what {
                "rpm" => package::rpm::make(&source)?,
                _ => package::deb::make(&source)?,
            };
            println!("{}\n{}", made.host.display(), made.agent.display());
        }
    }
    Ok(())
}
