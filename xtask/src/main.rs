//! `cargo xtask COMMAND`: what a developer runs more than once.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use argh::FromArgs;
use xtask::package::{self, Source};
use xtask::{build, demo, fuzz, packages, suite};

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
struct Demo {}

/// Run all tests, those with real guests included.
#[derive(FromArgs)]
#[argh(subcommand, name = "test")]
struct Test {
    /// only tests whose name contains this
    #[argh(positional)]
    filter: Option<String>,
}

/// Measure puter against its peers, in one run on this machine.
#[derive(FromArgs)]
#[argh(subcommand, name = "bench")]
struct Bench {
    /// what to measure: clone, image or net
    #[argh(positional)]
    what: String,
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
    /// what to make: deb (puter and puter-agent for Debian), tar (an archive with install.sh), or check (makes the first,
    /// and installs, upgrades and purges them in a fresh Debian; needs root)
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
        Command::Demo(_) => demo::run(),
        Command::Test(test) => suite::run(test.filter.as_deref()),
        Command::Bench(bench) => suite::bench(&bench.what),
        Command::Package(options) => make_package(&options.what, options.executable),
        Command::Fuzz(options) => fuzz::run(options.target.as_deref(), options.seconds),
    }
}

fn make_package(what: &str, executable: Option<PathBuf>) -> Result<()> {
    ensure!(["deb", "tar", "check"].contains(&what), "there is no package '{what}'; there are: deb, tar, check");
    packages::install(packages::PACKAGE)?;
    let source = Source::of(executable)?;
    match what {
        "check" => package::check::run_all(&source)?,
        "tar" => println!("{}", package::tar::make(&source)?.display()),
        _ => {
            let made = package::deb::make(&source)?;
            println!("{}\n{}", made.host.display(), made.agent.display());
        }
    }
    Ok(())
}
