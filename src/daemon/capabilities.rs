//! The three capabilities that puterd needs, and the giving up of all others (capabilities(7)).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::thread::{self, CapabilitySet, CapabilitySets};

/// What puterd needs, as setcap(8) writes it: for interfaces and nftables, for DHCP's packets, for ports 53 and 67.
const NEEDED: [(CapabilitySet, &str); 3] = [
    (CapabilitySet::NET_ADMIN, "cap_net_admin"),
    (CapabilitySet::NET_RAW, "cap_net_raw"),
    (CapabilitySet::NET_BIND_SERVICE, "cap_net_bind_service"),
];

/// The needed capabilities that are not in this set.
fn missing(permitted: CapabilitySet) -> Vec<&'static str> {
    NEEDED.iter().filter(|(set, _)| !permitted.contains(*set)).map(|(_, name)| *name).collect()
}

/// Says what is missing and how to grant it.
fn refusal(missing: &[&str], executable: &Path) -> String {
    let all: Vec<&str> = NEEDED.iter().map(|(_, name)| *name).collect();
    let path = executable.to_string_lossy();
    let plain = path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-+".contains(&b));
    let path = if plain { path.into_owned() } else { format!("'{}'", path.replace('\'', r"'\''")) };
    format!("missing capability {}: grant it with: sudo setcap {}=+ep {path}", missing.join(", "), all.join(","))
}

/// Checks that the needed capabilities are there and gives up all others, for good. Called before any thread starts,
/// since capabilities are a thread's own.
///
/// # Errors
/// A message which names each missing capability and the command that grants it.
pub fn keep_needed() -> Result<()> {
    let permitted = thread::capabilities(None).context("cannot read the process's capabilities")?.permitted;
    let absent = missing(permitted);
    if !absent.is_empty() {
        let executable = fs::read_link("/proc/self/exe").unwrap_or_else(|_| "PUTERD".into());
        bail!(refusal(&absent, &executable));
    }
    let needed = NEEDED.iter().fold(CapabilitySet::empty(), |all, (set, _)| all | *set);
    // Only root may cut the bounding set; to anyone else no_new_privs does the same, as puterd starts no program.
    if permitted.contains(CapabilitySet::SETPCAP) {
        for bit in 0..u64::BITS {
            let capability = CapabilitySet::from_bits_retain(1 << bit);
            if needed.contains(capability) {
                continue;
            }
            match thread::remove_capability_from_bounding_set(capability) {
                Ok(()) => {}
                Err(rustix::io::Errno::INVAL) => break, // The kernel knows no more.
                Err(error) => return Err(error).context("cannot shrink the capability bounding set"),
            }
        }
    }
    if permitted != needed {
        log!("gives up every capability but its three for the network");
    }
    let only = CapabilitySets { effective: needed, permitted: needed, inheritable: CapabilitySet::empty() };
    thread::set_capabilities(None, only).context("cannot give up capabilities")?;
    thread::set_no_new_privs(true).context("cannot set no_new_privs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_missing_capabilities_are_named() {
        let all = CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW | CapabilitySet::NET_BIND_SERVICE;
        assert!(missing(all | CapabilitySet::SYS_ADMIN).is_empty());
        assert_eq!(missing(all - CapabilitySet::NET_RAW), ["cap_net_raw"]);
        assert_eq!(missing(CapabilitySet::SYS_ADMIN).len(), 3);
        assert_eq!(
            refusal(&["cap_net_raw"], Path::new("/usr/bin/puterd")),
            "missing capability cap_net_raw: grant it with: \
             sudo setcap cap_net_admin,cap_net_raw,cap_net_bind_service=+ep /usr/bin/puterd"
        );
        assert!(refusal(&["cap_net_raw"], Path::new("/o/it's here")).ends_with(r"=+ep '/o/it'\''s here'"));
    }
}
