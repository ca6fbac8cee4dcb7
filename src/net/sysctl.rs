//! The kernel's network settings. CAP_NET_ADMIN is enough to write them (net_ctl_permissions()).

use std::fs;
use std::io;

use crate::protocol::neighbours::{self, Limits};

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

const IPV6: &str = "/proc/sys/net/ipv6/conf";

/// Whether the kernel has IPv6 and nobody turned it off.
pub fn has_ipv6() -> bool {
    fs::read_to_string(format!("{IPV6}/all/disable_ipv6")).is_ok_and(|text| text.trim() == "0")
}

/// Gives an interface's IPv6 setting this value, unless it has it.
fn set6(interface: &str, setting: &str, value: &str) -> io::Result<()> {
    let path = format!("{IPV6}/{interface}/{setting}");
    if fs::read_to_string(&path).is_ok_and(|now| now.trim() == value) {
        return Ok(());
    }
    fs::write(&path, value).map_err(|e| io::Error::new(e.kind(), format!("cannot write {value} to {path}: {e}")))
}

/// Makes an interface one whose IPv6 addresses are given by hand and whose machines are led nowhere by what comes in:
/// no address of the kernel's own, no question whether another has it, no router and no better way from the link.
///
/// # Errors
/// The kernel's, with the setting's path.
pub fn prepare_ipv6(interface: &str) -> io::Result<()> {
    for (setting, value) in [
        ("addr_gen_mode", "1"),
        ("accept_dad", "0"),
        ("accept_ra", "0"),
        ("accept_redirects", "0"),
        ("disable_ipv6", "0"),
    ] {
        set6(interface, setting, value)?;
    }
    Ok(())
}

/// Whether an interface is as [`prepare_ipv6`] makes it, as far as guests depend on it.
pub fn is_ipv6_ready(interface: &str) -> bool {
    let is = |setting: &str, value: &str| {
        fs::read_to_string(format!("{IPV6}/{interface}/{setting}")).is_ok_and(|text| text.trim() == value)
    };
    is("disable_ipv6", "0") && is("accept_ra", "0")
}

/// Keeps the host's own IPv6 away from an interface that is a mere port.
///
/// # Errors
/// The kernel's, with the setting's path.
pub fn silence_ipv6(interface: &str) -> io::Result<()> {
    set6(interface, "disable_ipv6", "1")
}

/// Whether IPv6 forwarding is on.
///
/// # Errors
/// The kernel's, with the setting's path.
pub fn forwarding6() -> io::Result<bool> {
    let path = format!("{IPV6}/all/forwarding");
    let named = |e: io::Error| io::Error::new(e.kind(), format!("cannot read {path}: {e}"));
    Ok(fs::read_to_string(&path).map_err(named)?.trim() != "0")
}

/// Turns IPv6 forwarding on and tells on which interfaces router advertisements are still believed because of that: a
/// host that forwards would ignore them, and lose its own address and way out, unless told otherwise (accept_ra in
/// ip-sysctl.rst).
///
/// # Errors
/// The kernel's, with the setting's path.
pub fn enable_forwarding6() -> io::Result<Vec<String>> {
    let mut kept = Vec::new();
    for entry in fs::read_dir(IPV6)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        // Not for interfaces to come: among them are bridges of others with machines that nobody vouches for.
        if ["all", "default", "lo"].contains(&name.as_str()) {
            continue;
        }
        if fs::read_to_string(format!("{IPV6}/{name}/accept_ra")).is_ok_and(|text| text.trim() == "1") {
            match set6(&name, "accept_ra", "2") {
                // It has just gone.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => {
                    other?;
                    kept.push(name);
                }
            }
        }
    }
    set6("all", "forwarding", "1")?;
    Ok(kept)
}

/// Gives the kernel's limits of neighbours new values, where they differ.
///
/// # Errors
/// The kernel's, with the setting's path.
pub fn set_neighbours(family: &str, now: Limits, wanted: Limits) -> io::Result<()> {
    for (limit, (now, wanted)) in
        now.into_iter().zip(wanted).enumerate().rev().filter(|(_, (now, wanted))| now != wanted)
    {
        let path = neighbours::path(family, limit);
        fs::write(&path, format!("{wanted}\n"))
            .map_err(|e| io::Error::new(e.kind(), format!("cannot write {wanted} to {path}, where {now} is: {e}")))?;
    }
    Ok(())
}
