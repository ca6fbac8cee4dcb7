//! `configure`: makes the guest the machine that the host says it is. Repeating it changes nothing.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};

use super::files::Guest;
use super::{identity, mounts, network, ssh, system};
use crate::protocol::address::{Mac, check_vm_name};
use crate::protocol::agent::{Configure, Configured};

/// One at a time.
static TURN: Mutex<()> = Mutex::new(());

/// Configures the guest. The identity comes before the network: no packet leaves under a former one.
///
/// # Errors
/// When a value is not what it must be, or the machine would not be itself: its identity, name, keys or network
/// cannot be written. The rest is told in the warnings.
pub fn configure(guest: &Guest, wanted: &Configure) -> Result<Configured> {
    let received = Instant::now();
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    check_vm_name(&wanted.hostname).map_err(anyhow::Error::msg).context("the hostname cannot be used")?;
    let mac: Mac = wanted.mac.parse().map_err(anyhow::Error::msg)?;
    let mut warnings = Vec::new();

    // First of all, while the host's time is fresh: a restored guest lives in the past.
    if let Some(time) = wanted.time {
        let waited = u64::try_from(received.elapsed().as_nanos()).unwrap_or(0);
        warn(&mut warnings, system::set_clock(guest, time.saturating_add(waited)));
    }
    let new = match &wanted.identity {
        Some(identity) => identity::take_on(guest, identity, wanted.restored, &mut warnings)?,
        None => false,
    };
    // Before what takes longer: until then a restored guest's link is mute, as the host lets no other MAC through.
    let moved = network::set_mac(guest, mac)?;
    system::set_hostname(guest, &wanted.hostname)?;
    ssh::authorize(guest, &wanted.user, &wanted.ssh_keys)?;
    let host_keys = ssh::host_keys(guest, new, &mut warnings)?;
    let address = wanted.address.parse().ok();
    let network = network::apply(guest, &wanted.netplan, moved, address, wanted.address_timeout, &mut warnings)?;
    mounts::apply(guest, &wanted.mounts).context("cannot mount the shared directories")?;
    let root_size = system::grow_root(guest).unwrap_or_else(|error| {
        warnings.push(format!("the root file system does not fill its disk: {error:#}"));
        0
    });
    Ok(Configured { hostname: guest.hostname(), network: network.into(), host_keys, root_size, warnings })
}

/// Keeps a failure that leaves the machine useful.
pub fn warn(warnings: &mut Vec<String>, result: Result<()>) {
    if let Err(error) = result {
        warnings.push(format!("{error:#}"));
    }
}
