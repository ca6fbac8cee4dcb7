//! Running the guest's own programs, with limits on time and output.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long a program may run.
const LIMIT: Duration = Duration::from_secs(90);
/// How much of its complaint is kept, in bytes.
const MAX_OUTPUT: u64 = 4096;

/// Runs a program to its end.
///
/// # Errors
/// When it cannot be started, fails or takes too long; the error holds what it said on stderr.
pub fn run(program: &str, args: &[&str]) -> Result<()> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {program}"))?;
    let stderr = child.stderr.take();
    let reader = std::thread::spawn(move || {
        let mut said = Vec::new();
        if let Some(mut stderr) = stderr {
            let _ = stderr.by_ref().take(MAX_OUTPUT).read_to_end(&mut said);
            let _ = std::io::copy(&mut stderr, &mut std::io::sink());
        }
        String::from_utf8_lossy(&said).trim().to_string()
    });
    let end = Instant::now() + LIMIT;
    let status = loop {
        match child.try_wait().with_context(|| format!("cannot wait for {program}"))? {
            Some(status) => break status,
            None if Instant::now() >= end => {
                let _ = child.kill();
                let _ = child.wait();
                bail!("{program} took longer than {} s", LIMIT.as_secs());
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    if status.success() {
        return Ok(());
    }
    // A program that it left behind may hold the pipe open: its words are not waited for without limit.
    let said = if reader.is_finished() || wait(&reader) { reader.join().unwrap_or_default() } else { String::new() };
    bail!("{program} {}: {status}: {said}", args.join(" "))
}

fn wait<T>(thread: &std::thread::JoinHandle<T>) -> bool {
    for _ in 0..100 {
        if thread.is_finished() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_programs_complaint_is_in_the_error() {
        run("true", &[]).unwrap();
        let error = run("sh", &["-c", "echo why >&2; exit 3"]).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.ends_with("why"), "{error}");
        assert!(run("/no/such/program", &[]).unwrap_err().to_string().contains("/no/such/program"));
    }
}
