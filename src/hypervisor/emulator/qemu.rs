//! QEMU's command line for a machine.

use std::path::Path;

use crate::hypervisor::arguments::{DiskFormat, Machine, Serial};
use crate::hypervisor::client::VSOCK_DEVICE;

/// Each device has its own place on the PCI bus, so that a restored machine finds it where it was.
const FIRST_DISK: usize = 0x10;
const FIRST_NET: usize = 0x08;
const VSOCK: usize = 0x05;
const RANDOM: usize = 0x04;
const PANIC: usize = 0x06;
const FIRST_SHARE: usize = 0x18;

/// What is not the machine's own in its command line.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// vhost-device-vsock's socket.
    pub device_socket: &'a Path,
    /// The descriptor of the guest's memory, which QEMU inherits.
    pub memory: i32,
    /// Whether it waits for a snapshot's state. Its vsock device is then plugged in later.
    pub incoming: bool,
}

/// The vsock device, on QEMU's command line and where it is plugged in again.
pub fn vsock_device() -> String {
    format!("vhost-user-vsock-pci,chardev=vsock,id={VSOCK_DEVICE},addr={VSOCK:#x}")
}

/// A device of the command line as the arguments of QMP's `device_add`.
pub fn plug(device: &str) -> serde_json::Value {
    let mut parts = device.split(',');
    let driver = parts.next().unwrap_or_default();
    let mut arguments = serde_json::Map::from_iter([("driver".to_string(), driver.into())]);
    for (key, value) in parts.filter_map(|part| part.split_once('=')) {
        arguments.insert(key.to_string(), value.into());
    }
    arguments.into()
}

/// The words after `qemu-system-…`. QMP is on standard input.
pub fn arguments(machine: &Machine, around: Surroundings) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| words.extend([option.to_string(), value]);
    add("-machine", "pc,memory-backend=memory,usb=off,hpet=off".into());
    add("-accel", "tcg,thread=multi".into());
    add("-cpu", "max".into());
    add("-smp", machine.cpus.to_string());
    add("-m", format!("{}B", machine.memory));
    // vhost-device-vsock maps the guest's memory by this descriptor, and a snapshot copies it.
    let memory = format!("memory-backend-file,id=memory,size={}B,share=on", machine.memory);
    add("-object", format!("{memory},mem-path=/proc/self/fd/{}", around.memory));
    add("-kernel", text(&machine.kernel));
    if let Some(initrd) = &machine.initrd {
        add("-initrd", text(initrd));
    }
    // Where the host is busy, the kernel's test for a broken timer takes a slow one for that, and panics. Its tests of
    // each cipher, which FIPS mode runs all the same, are a fifth of an emulated boot (Linux's kernel-parameters.txt).
    add("-append", format!("{} no_timer_check cryptomgr.notests", machine.cmdline));
    for (index, disk) in machine.disks.iter().enumerate() {
        let driver = match disk.format {
            DiskFormat::Raw => "driver=raw",
            DiskFormat::Qcow2 { backing: true } => "driver=qcow2",
            // An empty name keeps QEMU from opening whatever the file's header names.
            DiskFormat::Qcow2 { backing: false } => "driver=qcow2,backing=",
        };
        let readonly = if disk.readonly { "on" } else { "off" };
        let file = escape(&text(&disk.path));
        add(
            "-blockdev",
            format!(
                "{driver},node-name=disk{index},read-only={readonly},discard=unmap,\
                 file.driver=file,file.filename={file},file.discard=unmap"
            ),
        );
        add("-device", format!("virtio-blk-pci,drive=disk{index},id=disk-{index},addr={:#x}", FIRST_DISK + index));
    }
    for (index, net) in machine.nets.iter().enumerate() {
        let tap = escape(&net.tap);
        add("-netdev", format!("tap,id=net{index},ifname={tap},script=no,downscript=no,vhost=off"));
        let address = FIRST_NET + index;
        add(
            "-device",
            format!(
                "virtio-net-pci,netdev=net{index},id=net-{index},mac={},addr={address:#x},romfile=",
                escape(&net.mac)
            ),
        );
    }
    if machine.vsock.is_some() && !around.incoming {
        add("-chardev", format!("socket,id=vsock,path={}", escape(&text(around.device_socket))));
        add("-device", vsock_device());
    }
    for (index, share) in machine.shares.iter().enumerate() {
        add("-chardev", format!("socket,id=fs{index},path={}", escape(&text(&share.socket))));
        let address = FIRST_SHARE + index;
        let tag = escape(&share.tag);
        add("-device", format!("vhost-user-fs-pci,chardev=fs{index},id=fs-{index},tag={tag},addr={address:#x}"));
    }
    add("-device", format!("virtio-rng-pci,id=random,addr={RANDOM:#x}"));
    add("-device", format!("pvpanic-pci,id=panic,addr={PANIC:#x}"));
    let serial = match &machine.serial {
        Serial::File(path) => format!("file,id=serial,append=on,path={}", escape(&text(path))),
        Serial::Socket(path) => format!("socket,id=serial,path={},server=on,wait=off", escape(&text(path))),
    };
    add("-chardev", serial);
    // As cloud-hypervisor does: the guest's panic is told, and the guest is left as it is.
    add("-action", "panic=none".into());
    add("-serial", "chardev:serial".into());
    add("-chardev", "socket,id=qmp,fd=0".into());
    add("-mon", "chardev=qmp,mode=control".into());
    add("-display", "none".into());
    add("-vga", "none".into());
    add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny".into());
    if around.incoming {
        words.extend(["-S", "-incoming", "defer"].map(String::from));
    }
    words.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(String::from));
    words
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// In QEMU's lists a comma is written twice.
fn escape(text: &str) -> String {
    text.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::arguments::tests::sample;

    #[test]
    fn each_device_is_there_once_and_at_its_own_place() {
        let around = Surroundings { device_socket: Path::new("/h/run/web.vhost"), memory: 9, incoming: false };
        let words = arguments(&sample(), around);
        let line = words.join(" ");
        for part in [
            "-kernel /h/vmlinuz -initrd /h/initrd -append console=ttyS0 root=/dev/vda rw",
            "driver=qcow2,node-name=disk0,read-only=off,discard=unmap,file.driver=file,file.filename=/h/web.qcow2",
            "driver=raw,node-name=disk1,read-only=on",
            "tap,id=net0,ifname=pt-web,script=no",
            "mac=52:54:00:00:00:0b",
            "socket,id=vsock,path=/h/run/web.vhost",
            "size=536870912B,share=on,mem-path=/proc/self/fd/9",
            "socket,id=fs0,path=/h/run/web.fs0",
            "vhost-user-fs-pci,chardev=fs0,id=fs-0,tag=share0",
            "socket,id=serial,path=/h/run/web.serial,server=on,wait=off",
        ] {
            assert!(line.contains(part), "{line}");
        }
        let mut places: Vec<&str> = words.iter().filter_map(|word| word.split("addr=").nth(1)).collect();
        places.iter_mut().for_each(|place| *place = place.split(',').next().unwrap());
        let count = places.len();
        places.sort_unstable();
        places.dedup();
        assert_eq!((count, places.len()), (7, 7), "{places:?}");
        let waiting = arguments(&sample(), Surroundings { incoming: true, ..around }).join(" ");
        assert!(waiting.contains("-S -incoming defer") && !waiting.contains("vhost-user-vsock"), "{waiting}");
    }

    #[test]
    fn a_comma_in_a_name_starts_no_option() {
        let mut machine = sample();
        machine.disks[0].path = "/h/a,read-only=on".into();
        let around = Surroundings { device_socket: Path::new("/s"), memory: 9, incoming: false };
        assert!(arguments(&machine, around).join(" ").contains("file.filename=/h/a,,read-only=on"));
    }
}
