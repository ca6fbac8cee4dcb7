//! Disks of VMs: qcow2 overlays over shared base images.

pub mod chain;
pub mod qcow2;
