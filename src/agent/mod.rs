//! `puter-agent`: in each guest, under systemd; answers the host on vsock.

mod command;
pub mod configure;
mod exec;
pub mod files;
mod identity;
mod mounts;
mod network;
pub mod request;
mod server;
mod ssh;
mod system;
mod transfer;

use std::ffi::OsString;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use argh::FromArgs;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

use self::files::Guest;
use self::server::Server;
use crate::notify::notify;
use crate::protocol::agent::PORT;

/// The guest's part of puter: answers the host's requests on vsock.
#[derive(FromArgs, Debug)]
struct Options {
    /// where to listen: vsock:PORT or unix:PATH (default: vsock:1024)
    #[argh(option, default = "format!(\"vsock:{PORT}\")")]
    listen: String,
    /// directory that stands for the guest's root; with another than / the running system is left alone
    #[argh(option, default = "PathBuf::from(\"/\")")]
    root: PathBuf,
    /// print the version and exit
    #[argh(switch)]
    version: bool,
}

/// Entry point; `args` is the command line without the program's name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let words: Vec<String> = args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    // As `exec` calls it, whatever the executable's own name.
    let words = words.strip_prefix(&["puter-agent"]).unwrap_or(&words);
    if matches!(words.first(), Some(&("pack" | "unpack"))) {
        return match transfer::Transfer::from_args(&["puter-agent"], words).map(transfer::Transfer::run) {
            Ok(Ok(())) => ExitCode::SUCCESS,
            Ok(Err(error)) => {
                eprintln!("puter-agent: {error:#}");
                ExitCode::FAILURE
            }
            Err(exit) => {
                eprintln!("puter-agent: {}", exit.output.trim_end());
                ExitCode::from(crate::USAGE)
            }
        };
    }
    let options = match Options::from_args(&["puter-agent"], words) {
        Ok(options) => options,
        Err(exit) if exit.status.is_ok() => {
            println!("{}", exit.output.trim_end());
            return ExitCode::SUCCESS;
        }
        Err(exit) => {
            eprintln!("puter-agent: {}", exit.output.trim_end());
            return ExitCode::from(crate::USAGE);
        }
    };
    if options.version {
        println!("puter-agent {}", crate::VERSION);
        return ExitCode::SUCCESS;
    }
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("puter-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    // What others wrote into the environment or the mask is not for files that a root service makes.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let server = Server::new(Guest::at(&options.root));
    match options.listen.split_once(':') {
        Some(("vsock", port)) => {
            let port = port.parse().with_context(|| format!("'{port}' is not a vsock port"))?;
            let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)
                .with_context(|| format!("cannot listen on vsock port {port}"))?;
            ready();
            knock();
            server.serve(|| {
                let (stream, peer) = listener.accept()?;
                // A program in this guest reaches the port as well, by the local transport.
                Ok((peer.cid() == VMADDR_CID_HOST).then_some(stream))
            })
        }
        Some(("unix", path)) => {
            let _ = std::fs::remove_file(path);
            let listener = UnixListener::bind(path).with_context(|| format!("cannot listen on {path}"))?;
            ready();
            server.serve(|| Ok(Some(listener.accept()?.0)))
        }
        _ => bail!("cannot listen on '{}': give vsock:PORT or unix:PATH", options.listen),
    }
}

/// Tells the host that it can come: a connection to the same port there. Without anybody who listens, nothing is lost.
fn knock() {
    std::thread::spawn(|| drop(VsockStream::connect_with_cid_port(VMADDR_CID_HOST, PORT)));
}

fn ready() {
    if let Err(error) = notify("READY=1") {
        eprintln!("puter-agent: cannot notify systemd: {error}");
    }
}
