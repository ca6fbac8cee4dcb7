//! What a hypervisor's process has of the host's memory.

use anyhow::{Context, Result};

/// Bytes (proc_pid_smaps_rollup(5)).
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// All that it has mapped in.
    pub resident: u64,
    /// What it has for itself.
    pub private: u64,
    /// Its fair share, where that which several have is divided.
    pub share: u64,
}

/// What the process and its children, of which the emulator's QEMU is one, have.
///
/// # Errors
/// When the process has ended.
pub fn of(pid: u32) -> Result<Memory> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("the hypervisor has ended")?;
    let field = |name: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    let mut all = Memory {
        resident: field("Rss:"),
        private: field("Private_Clean:") + field("Private_Dirty:"),
        share: field("Pss:"),
    };
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    for child in children.split_whitespace().filter_map(|child| child.parse().ok()) {
        let child = of(child)?;
        all.resident += child.resident;
        all.private += child.private;
        all.share += child.share;
    }
    Ok(all)
}
