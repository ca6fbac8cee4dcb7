//! Ports of the host that guests may reach, written `tcp/22`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How many there may be: each is a rule that every packet to the host passes.
pub const MOST_PORTS: usize = 64;

/// What a port belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
}

/// A port of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostPort {
    pub protocol: Protocol,
    /// Not 0.
    pub port: u16,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{protocol}/{}", self.port)
    }
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<HostPort, String> {
        let wrong = || format!("'{}' is no port of the host; examples are tcp/22 and udp/123", text.escape_debug());
        let (protocol, port) = text.split_once('/').ok_or_else(wrong)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(wrong()),
        };
        let digits = port.bytes().all(|b| b.is_ascii_digit());
        let port = port.parse().ok().filter(|port| *port > 0 && digits).ok_or_else(wrong)?;
        Ok(HostPort { protocol, port })
    }
}

impl TryFrom<String> for HostPort {
    type Error = String;

    fn try_from(text: String) -> Result<HostPort, String> {
        text.parse()
    }
}

impl From<HostPort> for String {
    fn from(port: HostPort) -> String {
        port.to_string()
    }
}

/// Reads a list with commas between; in order and without doubles.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn parse_list(text: &str) -> Result<Vec<HostPort>, String> {
    let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
    let mut ports = words.map(str::parse).collect::<Result<Vec<HostPort>, String>>()?;
    ports.sort_unstable();
    ports.dedup();
    if ports.len() > MOST_PORTS {
        return Err(format!("{} ports of the host are too many; {MOST_PORTS} may be open to guests", ports.len()));
    }
    Ok(ports)
}

/// Writes a list as [`parse_list`] reads it.
pub fn show_list(ports: &[HostPort]) -> String {
    ports.iter().map(HostPort::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_as_it_was_written() {
        let ports = parse_list("udp/123, tcp/22,tcp/22,").unwrap();
        assert_eq!(show_list(&ports), "tcp/22,udp/123");
        assert_eq!(parse_list(&show_list(&ports)), Ok(ports));
        assert_eq!(parse_list(""), Ok(Vec::new()));
    }

    #[test]
    fn what_is_no_port_is_refused() {
        for text in ["22", "tcp/", "tcp/0", "tcp/65536", "tcp/+1", "sctp/1", "TCP/1", "tcp/22/", "tcp/ssh"] {
            assert!(parse_list(text).unwrap_err().contains("tcp/22 and udp/123"), "{text}");
        }
        let many: Vec<String> = (1..=65).map(|n| format!("tcp/{n}")).collect();
        assert!(parse_list(&many.join(",")).unwrap_err().contains("too many"));
    }
}
