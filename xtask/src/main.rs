//! What a developer runs more than once: `cargo xtask COMMAND`.

use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let mut cargo = Command::new("cargo");
    cargo.args(["test", "--workspace"]);
    match cargo.status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
