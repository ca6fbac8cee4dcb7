//! How many neighbours the host's kernel must be able to know: the machines on the bridge whose MACs it has asked for.
//! It keeps one list for each family, whatever the interface, and beyond its limit packets are dropped.

/// The kernel's three limits (gc_thresh1 to gc_thresh3, arp(7)): up to the first nothing is forgotten, beyond the third
/// nothing is learned.
pub type Limits = [u32; 3];

/// Where the limits of `ipv4` or `ipv6` are; a network namespace other than the host's first has none of its own.
pub fn path(family: &str, limit: usize) -> String {
    format!("/proc/sys/net/{family}/neigh/default/gc_thresh{}", limit + 1)
}

/// The limits as they are, where they can be seen.
pub fn limits(family: &str) -> Option<Limits> {
    let read = |limit| std::fs::read_to_string(path(family, limit)).ok()?.trim().parse().ok();
    Some([read(0)?, read(1)?, read(2)?])
}

/// The limits that leave room for so many and for the host's own neighbours; `None` where those that are do.
pub fn needed(now: Limits, neighbours: usize) -> Option<Limits> {
    let neighbours = u32::try_from(neighbours).unwrap_or(u32::MAX / 8);
    if neighbours.saturating_mul(2) <= now[2] {
        return None;
    }
    let room = neighbours.min(1 << 28).next_power_of_two();
    Some([now[0].max(room), now[1].max(2 * room), now[2].max(4 * room)])
}

/// How many neighbours VMs are: by IPv6 each has an address of its link as well.
pub fn of_vms(family: &str, vms: usize) -> usize {
    if family == "ipv6" { 2 * vms } else { vms }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_grow_with_the_vms_and_never_shrink() {
        let usual = [128, 512, 1024];
        assert_eq!(needed(usual, 0), None);
        assert_eq!(needed(usual, 512), None);
        assert_eq!(needed(usual, 513), Some([1024, 2048, 4096]));
        assert_eq!(needed(usual, 4000), Some([4096, 8192, 16384]));
        assert_eq!(needed([128, 100_000, 1024], 600), Some([1024, 100_000, 4096]));
        assert_eq!(needed([4096, 8192, 16384], 8000), None);
        assert!(needed(usual, usize::MAX).is_some());
    }
}
