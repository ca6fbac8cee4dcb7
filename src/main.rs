//! Dispatch by the name the executable is called by, as BusyBox does; nothing else lives here.

use std::process::ExitCode;

fn main() -> ExitCode {
    puter::dispatch(std::env::args_os().collect())
}
