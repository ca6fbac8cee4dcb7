//! Room in the kernel's lists of neighbours for thousands of VMs.

use std::sync::atomic::Ordering;

use super::network::Network;
use crate::net::sysctl;
use crate::protocol::neighbours;

impl Network {
    /// Raises the kernel's limits where the VMs would soon come to them. Where it cannot, `puter doctor` tells.
    pub(super) fn make_room_for_neighbours(&self, vms: usize) {
        if vms <= self.neighbours.load(Ordering::Relaxed) {
            return;
        }
        let families = if self.network6.is_some() { &["ipv4", "ipv6"][..] } else { &["ipv4"] };
        for family in families {
            let Some(now) = neighbours::limits(family) else { continue };
            let Some(needed) = neighbours::needed(now, neighbours::of_vms(family, vms)) else { continue };
            match sysctl::set_neighbours(family, now, needed) {
                Ok(()) => log!(
                    "{vms} VMs: raised the kernel's limit of {family} neighbours from {} to {} (net.{family}.neigh.default)",
                    now[2],
                    needed[2]
                ),
                Err(error) => log!("{vms} VMs, and the kernel knows at most {} {family} neighbours: {error}", now[2]),
            }
        }
        // Looked at again when there are many more.
        self.neighbours.store(vms + vms / 4 + 32, Ordering::Relaxed);
    }
}
