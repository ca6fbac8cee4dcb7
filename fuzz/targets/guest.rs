//! Lines of a guest's agent to the host: the answers to `ping`, `configure` and `exec`, then what its program prints, over a
//! real pair of sockets.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use puter::protocol::agent::{Configure, Exec};
use puter::vm::agent::Agent;
use puter::vm::exec::Running;
use puter::vm::key::known_hosts;

const LIMIT: Duration = Duration::from_secs(10);

pub fn run(input: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
    // All of it fits the socket's buffer.
    theirs.write_all(&input[..input.len().min(64 << 10)]).expect("room");
    theirs.shutdown(Shutdown::Write).expect("a socket");
    if let Err(error) = talk(Agent::over(ours), input.len()) {
        let text = format!("{error:#}");
        assert!(
            !text.contains(|c: char| c.is_control() && !"\n\t".contains(c)) && text.len() < 20_000,
            "{}",
            text.escape_debug()
        );
    }
}

fn talk(mut agent: Agent, length: usize) -> anyhow::Result<()> {
    agent.ping(LIMIT)?;
    let configured = agent.configure(Configure::default(), LIMIT)?;
    let hosts = known_hosts("web", &configured.host_keys);
    assert!(hosts.len() <= length + 4 * configured.host_keys.len());
    for line in hosts.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        assert!(matches!(words.as_slice(), ["web", kind, key] if !kind.is_empty() && !key.is_empty()), "{line:?}");
        assert!(line.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' '), "{line:?}");
    }
    let running = Running::begin(agent, Exec::default())?;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let ended = running.attend(&mut stdout, &mut stderr);
    // Each byte took more than one of base64.
    assert!((stdout.len() + stderr.len()) * 4 <= length * 3);
    ended.map(drop)
}
