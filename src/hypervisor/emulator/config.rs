//! A machine as cloud-hypervisor's `config.json` has it: what a snapshot of the emulator's names, with the fields that
//! puter rewrites for a restore at the same places.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::hypervisor::arguments::{Disk, DiskFormat, Machine, Net, Restore, Serial, Share, Vsock};

#[derive(Debug, Serialize, Deserialize)]
pub struct Config {
    cpus: Cpus,
    memory: Memory,
    payload: Payload,
    disks: Vec<DiskConfig>,
    net: Vec<NetConfig>,
    vsock: Option<VsockConfig>,
    #[serde(default)]
    fs: Vec<FsConfig>,
    serial: SerialConfig,
}

#[derive(Debug, Serialize, Deserialize)]
struct Cpus {
    boot_vcpus: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Memory {
    size: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Payload {
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
    cmdline: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct DiskConfig {
    path: PathBuf,
    readonly: bool,
    image_type: ImageType,
    backing_files: bool,
}

#[derive(Debug, Serialize, Deserialize)]
enum ImageType {
    Raw,
    Qcow2,
}

#[derive(Debug, Serialize, Deserialize)]
struct NetConfig {
    tap: String,
    mac: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct VsockConfig {
    cid: u32,
    socket: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
struct FsConfig {
    tag: String,
    socket: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
struct SerialConfig {
    mode: SerialMode,
    file: Option<PathBuf>,
    socket: Option<PathBuf>,
}

#[derive(Debug, Serialize, Deserialize)]
enum SerialMode {
    File,
    Socket,
}

impl Config {
    pub fn of(machine: &Machine) -> Config {
        let disk = |disk: &Disk| {
            let (image_type, backing_files) = match disk.format {
                DiskFormat::Raw => (ImageType::Raw, false),
                DiskFormat::Qcow2 { backing } => (ImageType::Qcow2, backing),
            };
            DiskConfig { path: disk.path.clone(), readonly: disk.readonly, image_type, backing_files }
        };
        let net = |net: &Net| NetConfig { tap: net.tap.clone(), mac: net.mac.clone() };
        let vsock = |vsock: &Vsock| VsockConfig { cid: vsock.cid, socket: vsock.socket.clone() };
        let fs = |share: &Share| FsConfig { tag: share.tag.clone(), socket: share.socket.clone() };
        let serial = match &machine.serial {
            Serial::File(path) => SerialConfig { mode: SerialMode::File, file: Some(path.clone()), socket: None },
            Serial::Socket(path) => SerialConfig { mode: SerialMode::Socket, file: None, socket: Some(path.clone()) },
        };
        Config {
            cpus: Cpus { boot_vcpus: machine.cpus },
            memory: Memory { size: machine.memory },
            payload: Payload {
                kernel: machine.kernel.clone(),
                initramfs: machine.initrd.clone(),
                cmdline: machine.cmdline.clone(),
            },
            disks: machine.disks.iter().map(disk).collect(),
            net: machine.nets.iter().map(net).collect(),
            vsock: machine.vsock.as_ref().map(vsock),
            fs: machine.shares.iter().map(fs).collect(),
            serial,
        }
    }

    /// The machine that it tells of, with the sockets that the command line named.
    ///
    /// # Errors
    /// When something is missing.
    pub fn into_machine(self, restore: &Restore) -> Result<Machine> {
        let disk = |disk: DiskConfig| Disk {
            path: disk.path,
            readonly: disk.readonly,
            format: match disk.image_type {
                ImageType::Raw => DiskFormat::Raw,
                ImageType::Qcow2 => DiskFormat::Qcow2 { backing: disk.backing_files },
            },
        };
        if !self.fs.is_empty() {
            bail!("a machine with shared directories cannot be restored");
        }
        Ok(Machine {
            cpus: self.cpus.boot_vcpus,
            memory: self.memory.size,
            kernel: self.payload.kernel,
            initrd: self.payload.initramfs,
            cmdline: self.payload.cmdline,
            disks: self.disks.into_iter().map(disk).collect(),
            nets: self.net.into_iter().map(|net| Net { tap: net.tap, mac: net.mac }).collect(),
            vsock: self.vsock.map(|vsock| Vsock { cid: vsock.cid, socket: vsock.socket }),
            shares: Vec::new(),
            serial: match self.serial.mode {
                SerialMode::File => Serial::File(self.serial.file.context("the serial console has no file")?),
                SerialMode::Socket => Serial::Socket(self.serial.socket.context("the serial console has no socket")?),
            },
            api_socket: restore.api_socket.clone(),
            events: restore.events.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::arguments::MemoryMode;
    use crate::hypervisor::arguments::tests::sample;

    #[test]
    fn a_machine_is_read_as_it_was_written() {
        let machine = Machine { shares: Vec::new(), ..sample() };
        let text = serde_json::to_string(&Config::of(&machine)).unwrap();
        let restore = Restore {
            source: "/s".into(),
            memory: MemoryMode::Copy,
            api_socket: machine.api_socket.clone(),
            events: machine.events.clone(),
        };
        let config: Config = serde_json::from_str(&text).unwrap();
        assert_eq!(config.into_machine(&restore).unwrap(), machine);
        let shared: Config = serde_json::from_str(&serde_json::to_string(&Config::of(&sample())).unwrap()).unwrap();
        assert!(shared.into_machine(&restore).unwrap_err().to_string().contains("shared directories"));
    }
}
