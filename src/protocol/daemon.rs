//! puterd's HTTP API, version 1: JSON bodies on a Unix socket.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::address::{Mac, Subnet, check_vm_name};
use super::ipv6::Network6;
use super::ports::HostPort;

/// Answer to `GET /v1/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// puterd's version.
    pub version: String,
    pub pid: u32,
    /// The user whom puterd serves.
    pub uid: u32,
    /// The bridge's interface name.
    pub bridge: String,
    /// The bridge's address and prefix.
    pub subnet: Subnet,
    /// The bridge's IPv6 address and prefix, where guests have IPv6.
    #[serde(default)]
    pub ipv6: Option<Network6>,
    /// Whether guests reach the outside by IPv6: the host does.
    #[serde(default)]
    pub ipv6_outside: bool,
    /// Further bridges, of one network with the first, where that has too few ports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub further: Vec<FurtherBridge>,
    /// How many TAPs there are.
    pub taps: usize,
    /// Seconds since puterd started.
    pub uptime: u64,
    /// Ports of the host that guests may reach, besides DHCP and DNS.
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
    /// Firewalls of others that drop what they do not know.
    #[serde(default)]
    pub firewalls: Vec<Firewall>,
    /// What is wrong and puterd cannot mend, a sentence each.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// A bridge that is joined to the first one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FurtherBridge {
    /// Its interface's name.
    pub name: String,
    /// Ports on it, TAPs above all.
    pub ports: usize,
}

/// A chain of somebody else's nftables that drops what it does not know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Firewall {
    /// The table's family and name and the chain's name, as nft(8) writes them.
    pub family: String,
    pub table: String,
    pub chain: String,
    /// `input` for what goes to the host, `forward` for what goes through it.
    pub hook: String,
    /// Whether it lets the bridge pass: by puterd's rules in it, or because its own speak of the bridge.
    pub passes: bool,
    /// Whether puterd's rules are in it.
    pub by_puterd: bool,
    /// Whether its policy drops, and not its last rule.
    pub by_policy: bool,
}

/// Body of `POST /v1/taps`. The same request twice answers with the same TAP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapRequest {
    /// The VM's name.
    pub vm: String,
    /// The VM's id, which decides its addresses.
    pub id: u32,
    /// Whether this VM and all others are kept from each other.
    #[serde(default)]
    pub isolated: bool,
    /// The cluster that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<Membership>,
}

/// A VM's place in a cluster, whose members know one another by these names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Membership {
    pub cluster: String,
    /// Its name in the cluster, such as `node1`.
    pub member: String,
}

impl Membership {
    /// Checks both names, which come from outside.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        check_vm_name(&self.cluster).and_then(|()| check_vm_name(&self.member))
    }
}

/// A TAP, in the answers to `POST /v1/taps` and, as a list, `GET /v1/taps`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tap {
    pub vm: String,
    pub id: u32,
    /// The interface's name.
    pub name: String,
    pub mac: Mac,
    pub ip: Ipv4Addr,
    /// The IPv6 address that the guest gives itself, where guests have IPv6.
    #[serde(default)]
    pub ip6: Option<Ipv6Addr>,
    pub isolated: bool,
    /// Whether a hypervisor holds the TAP open.
    pub attached: bool,
}

/// An address that a guest obtained, in the answer to `GET /v1/leases`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub vm: String,
    pub mac: Mac,
    pub ip: Ipv4Addr,
    /// The name the guest gave, if any; untrusted.
    pub hostname: Option<String>,
    /// Seconds until the lease ends.
    pub remaining: u64,
}

/// Body of every answer whose status is 400 or above.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

/// What went wrong: a word for programs and a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    pub code: String,
    pub message: String,
}
