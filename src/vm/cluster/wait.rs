//! Waiting for members to be of use.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::model::{Member, Target};
use super::run::member_that_runs;
use super::{Outcome, existing, for_each};
use crate::vm::agent::Agent;
use crate::vm::home::Home;
use crate::vm::lifecycle::Silent;
use crate::vm::{Hint, cancel};

/// What a member must do to count as ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// Its agent answers.
    Agent,
    /// An ssh server introduces itself.
    Ssh,
    /// Something takes connections on this TCP port.
    Port(u16),
}

impl std::str::FromStr for Sign {
    type Err = String;

    fn from_str(text: &str) -> Result<Sign, String> {
        let port = text.strip_prefix("port:").map(|port| port.parse().ok().filter(|port| *port > 0));
        match (text, port) {
            ("agent", _) => Ok(Sign::Agent),
            ("ssh", _) => Ok(Sign::Ssh),
            (_, Some(Some(port))) => Ok(Sign::Port(port)),
            _ => Err(format!("'{text}' is none of agent, ssh and port:N, such as port:80")),
        }
    }
}

impl std::fmt::Display for Sign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Sign::Agent => f.write_str("agent"),
            Sign::Ssh => f.write_str("ssh"),
            Sign::Port(port) => write!(f, "port:{port}"),
        }
    }
}

const SSH_PORT: u16 = 22;
/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(250);

/// Waits until each of the members is ready, and tells how long each took.
///
/// # Errors
/// When there is no such cluster or member; of each member the result tells.
pub fn wait(home: &Home, target: &Target, sign: Sign, limit: Duration) -> Result<Vec<Outcome<Duration>>> {
    let cluster = existing(home, &target.cluster)?;
    let members = target.select(&cluster)?;
    let began = Instant::now();
    let work = |member: &Member| loop {
        cancel::check()?;
        let Err(error) = look(home, member, sign, limit.saturating_sub(began.elapsed())) else {
            return Ok(began.elapsed());
        };
        let left = limit.saturating_sub(began.elapsed());
        if left.is_zero() {
            let what = format!("'{}' was not ready ({sign}) within {} s", member.vm, limit.as_secs());
            return Err(anyhow!("{what}: {error:#}")).hint("give it more time: --timeout SECONDS");
        }
        std::thread::sleep(PAUSE.min(left));
    };
    // All of them at once: one that is never ready is to take no turn of another.
    Ok(for_each(&Silent, &members, members.len(), work, &|_, _| {}))
}

fn look(home: &Home, member: &Member, sign: Sign, left: Duration) -> Result<()> {
    let vm = member_that_runs(home, member)?;
    let limit = ATTEMPT.min(left).max(Duration::from_millis(100));
    let connect = |port: u16| TcpStream::connect_timeout(&SocketAddr::from((vm.ip, port)), limit);
    match sign {
        Sign::Agent => Agent::reach(&home.vsock(&vm.name), limit).map(drop),
        Sign::Port(port) => Ok(connect(port).map(drop)?),
        Sign::Ssh => {
            let mut stream = connect(SSH_PORT)?;
            stream.set_read_timeout(Some(limit))?;
            let mut word = [0; 4];
            stream.read_exact(&mut word)?;
            // RFC 4253, section 4.2.
            if &word != b"SSH-" {
                return Err(anyhow!("what listens on port {SSH_PORT} is no ssh server"));
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_are_read_as_they_are_written() {
        for (text, sign) in [("agent", Sign::Agent), ("ssh", Sign::Ssh), ("port:80", Sign::Port(80))] {
            assert_eq!((text.parse(), sign.to_string().as_str()), (Ok(sign), text));
        }
        for bad in ["", "port", "port:", "port:0", "port:65536", "port:x", "Agent", "ssh:22"] {
            assert!(bad.parse::<Sign>().unwrap_err().contains("port:N"), "{bad}");
        }
    }
}
