use std::ffi::OsString;
use std::process::ExitCode;

/// Entry point; `args` is the command line without the program's name.
pub fn main(_args: Vec<OsString>) -> ExitCode {
    ExitCode::FAILURE
}
