//! Disks of VMs: qcow2 overlays over shared base images.

pub mod qcow2;
