//! Frames as a guest writes them, honest or not.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::thread;

use rustix::thread::LinkNameSpaceType;

use crate::lab::{Lab, Process, wait};

/// Runs something on a thread that has moved into the network namespace of this process.
pub fn inside<T: Send>(holder: &Process, work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/proc/{}/ns/net", holder.pid())).unwrap();
    let moved = move || {
        rustix::thread::move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&namespace),
            Some(LinkNameSpaceType::Network),
        )
        .unwrap();
        work()
    };
    thread::scope(|scope| scope.spawn(moved).join().unwrap())
}

/// Takes a VM's TAP, as its hypervisor does, and waits until the bridge passes frames to it.
pub fn take(lab: &Lab, tap: &str) -> File {
    let file = inside(lab.host_holder(), || puter::net::tap::open(tap).unwrap());
    wait("the bridge's port forwards", || lab.host(&format!("cat /sys/class/net/{tap}/brport/state")) == "3\n");
    file
}

/// All frames that wait to be read, without their virtio header.
pub fn drain(tap: &File) -> Vec<Vec<u8>> {
    rustix::io::ioctl_fionbio(tap, true).unwrap();
    let mut all = Vec::new();
    let mut frame = [0; 4096];
    while let Ok(size) = (&*tap).read(&mut frame) {
        all.push(frame[10..size].to_vec());
    }
    rustix::io::ioctl_fionbio(tap, false).unwrap();
    all
}

/// All frames up to one that the host sends now, without their virtio header: whatever was on its way before is among
/// them, or will never come. The host knows where this address is.
pub fn drain_after(tap: &File, host: &UdpSocket, address: Ipv4Addr) -> Vec<Vec<u8>> {
    const LAST: &str = "the host's own word";
    host.send_to(LAST.as_bytes(), (address, 9)).unwrap();
    let mut all = Vec::new();
    wait("the host's frame comes", || {
        all.extend(drain(tap));
        all.iter().any(|frame: &Vec<u8>| String::from_utf8_lossy(frame).contains(LAST))
    });
    all
}

/// The same frame to one MAC instead of all.
pub fn to(mac: [u8; 6], mut frame: Vec<u8>) -> Vec<u8> {
    frame[10..16].copy_from_slice(&mac);
    frame
}

/// Who a frame claims to come from.
#[derive(Clone, Copy)]
pub struct Sender {
    pub mac: [u8; 6],
    pub ip: Ipv4Addr,
}

pub fn ethernet(source: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 10]; // struct virtio_net_hdr, which asks for nothing.
    frame.extend([0xff; 6]);
    frame.extend(source);
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

/// An ARP request for `target`, with a MAC of its own in the Ethernet header.
pub fn arp(outer: [u8; 6], sender: Sender, target: Ipv4Addr) -> Vec<u8> {
    arp_of(1, outer, sender, target)
}

/// An ARP request (1) or reply (2).
pub fn arp_of(operation: u8, outer: [u8; 6], sender: Sender, target: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, operation];
    packet.extend(sender.mac);
    packet.extend(sender.ip.octets());
    packet.extend([0; 6]);
    packet.extend(target.octets());
    ethernet(outer, 0x0806, &packet)
}

/// A UDP datagram.
pub fn udp(sender: Sender, port: u16, to: (Ipv4Addr, u16), text: &str) -> Vec<u8> {
    let length = 8 + text.len() as u16;
    let mut packet = vec![0x45, 0];
    packet.extend((20 + length).to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(sender.ip.octets());
    packet.extend(to.0.octets());
    let sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let checksum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    for value in [port, to.1, length, 0] {
        packet.extend(value.to_be_bytes());
    }
    packet.extend(text.bytes());
    ethernet(sender.mac, 0x0800, &packet)
}

/// Sends frames, each whole.
pub fn send(tap: &File, frames: &[Vec<u8>]) {
    for frame in frames {
        assert_eq!((&*tap).write(frame).unwrap(), frame.len());
    }
}

/// Waits for the next answer to an ARP request and returns to which MAC and address it goes.
pub fn arp_answer(tap: &File) -> ([u8; 6], Ipv4Addr) {
    loop {
        let mut frame = [0; 2048];
        let size = (&*tap).read(&mut frame).unwrap();
        if size >= 52 && frame[22..24] == [8, 6] && frame[30..32] == [0, 2] {
            let address: [u8; 4] = frame[48..52].try_into().unwrap();
            return (frame[42..48].try_into().unwrap(), address.into());
        }
    }
}
