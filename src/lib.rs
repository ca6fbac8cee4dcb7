//! puter: virtual machines with the ease of containers, without root.
//!
//! One executable holds every personality; [`dispatch`] picks one by the name it was called by.
//! ARCHITECTURE.md names the parts, their invariants and where to change what.

pub mod agent;
pub mod cli;
pub mod daemon;
pub mod dhcp;
pub mod disk;
pub mod dns;
pub mod ending;
pub mod failpoint;
pub mod hint;
pub mod hypervisor;
pub mod image;
pub mod net;
pub mod notify;
pub mod protocol;
pub mod ra;
pub mod sparse;
pub mod transfer;
pub mod vm;
pub mod watch;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

/// The version that every personality reports.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Exit code of a command line that could not be understood.
pub const USAGE: u8 = 2;

/// Runs the personality named by the last component of `argv[0]`; under any other name the first
/// argument is the name (`puter-multi puterd …`).
pub fn dispatch(mut argv: Vec<OsString>) -> ExitCode {
    for attempt in 0..2 {
        let Some(first) = argv.first() else { break };
        let name = Path::new(first).file_name().unwrap_or(first).to_string_lossy().into_owned();
        let personality: fn(Vec<OsString>) -> ExitCode = match name.as_str() {
            "puter" => |args| without_capabilities(cli::main, args),
            "puterd" => daemon::main,
            "puter-agent" => |args| without_capabilities(agent::main, args),
            "puter-monitor" => |args| without_capabilities(vm::monitor::main, args),
            "puter-emulator" => |args| without_capabilities(hypervisor::emulator::main, args),
            _ if attempt == 0 => {
                argv.remove(0);
                continue;
            }
            _ => break,
        };
        return personality(argv.split_off(1));
    }
    eprintln!(
        "puter: call this file as puter, puterd, puter-agent or puter-emulator, or give that name as the first argument"
    );
    ExitCode::from(USAGE)
}

/// Runs a personality that needs no capability without those that the file or the caller lent it. Root keeps its own.
fn without_capabilities(personality: fn(Vec<OsString>) -> ExitCode, args: Vec<OsString>) -> ExitCode {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    use rustix::thread::{CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities};
    if !rustix::process::geteuid().is_root() {
        let none = CapabilitySet::empty();
        let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
        let dropped = clear_ambient_capability_set().and_then(|()| set_capabilities(None, sets));
        // A file with capabilities starts undumpable, and /proc/self then belongs to root (capabilities(7)).
        let dropped = dropped.and_then(|()| set_dumpable_behavior(DumpableBehavior::Dumpable));
        if let Err(error) = dropped {
            eprintln!("puter: cannot give up capabilities: {error}");
            return ExitCode::FAILURE;
        }
    }
    personality(args)
}
