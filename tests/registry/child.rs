//! A test in a process of its own, for what comes from the environment.

use std::process::Command;

/// Runs the calling test again in a process with these variables, where `inside` is run with what `outside` returned.
/// True in the process that the test began in, when that is over.
pub fn in_a_child(
    test: &str,
    variables: &[(&str, String)],
    outside: impl FnOnce() -> Vec<String>,
    inside: impl Fn(&[String]),
) -> bool {
    const ARGUMENTS: &str = "PUTER_TEST_CHILD";
    if let Ok(arguments) = std::env::var(ARGUMENTS) {
        let arguments: Vec<_> = arguments.split('\n').map(str::to_string).collect();
        inside(&arguments);
        return false;
    }
    let arguments = outside().join("\n");
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("registry::{test}"), "--include-ignored", "--nocapture"])
        .env(ARGUMENTS, arguments)
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    true
}
