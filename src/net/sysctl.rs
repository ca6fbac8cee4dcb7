//! The kernel's network settings. CAP_NET_ADMIN is enough to write them (net_ctl_permissions()).

use std::fs;
use std::io;

const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// Whether IPv4 forwarding is on.
///
/// # Errors
/// The kernel's, with the setting's path.
pub fn forwarding() -> io::Result<bool> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("cannot read {FORWARDING}: {e}"));
    Ok(fs::read_to_string(FORWARDING).map_err(named)?.trim() != "0")
}

/// Turns IPv4 forwarding on and tells whether it was off.
///
/// # Errors
/// The kernel's, with the setting's path.
pub fn enable_forwarding() -> io::Result<bool> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("cannot turn on IPv4 forwarding in {FORWARDING}: {e}"));
    // Writing the setting resets others (ip_forward in ip-sysctl.rst), so one that is right is left alone.
    if forwarding()? {
        return Ok(false);
    }
    fs::write(FORWARDING, "1\n").map_err(named)?;
    Ok(true)
}
