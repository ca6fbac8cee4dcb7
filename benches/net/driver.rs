//! Clients of a DHCP server and of a DNS server, by the hundred, on one thread.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use puter::dhcp::message::{Request, code, kind};
use puter::protocol::address::Mac;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// `struct virtio_net_hdr` before each frame of a TAP, and what is before a DHCP message in one.
const VNET: usize = 10;
const HEADERS: usize = VNET + 14 + 20 + 8;
/// Clients that wait for an answer at the same time.
const AT_ONCE: u32 = 32;
/// After this silence what is missing is asked for again.
const SILENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 300_000_000 };

/// A client between its first message and its address.
struct Client {
    began: Instant,
    /// What it sent last.
    last: Vec<u8>,
}

/// What a run comes to.
pub struct Run {
    pub per_second: f64,
    /// The time of the 99th of 100 exchanges, in milliseconds.
    pub p99: f64,
    pub again: usize,
}

fn frame(id: u32, kind: u8, options: &[(u8, &[u8])]) -> Vec<u8> {
    let mac = Mac::of_id(id).0;
    let mut message = vec![0; 236];
    message[..4].copy_from_slice(&[1, 1, 6, 0]);
    message[4..8].copy_from_slice(&id.to_be_bytes());
    message[28..34].copy_from_slice(&mac);
    message.extend([99, 130, 83, 99, code::MESSAGE_TYPE, 1, kind]);
    for (code, value) in [&[(code::PARAMETERS, &[1, 3, 6, 12, 15, 28][..])], options].concat() {
        message.extend([code, value.len() as u8]);
        message.extend(value);
    }
    message.push(code::END);
    message.resize(300, 0);
    let udp = 8 + message.len() as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let checksum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut frame = vec![0; VNET];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend([8, 0]);
    frame.extend(ip);
    for value in [68, 67, udp, 0] {
        frame.extend(value.to_be_bytes());
    }
    frame.extend(message);
    frame
}

/// A DHCP server's answer: who it is for, its type, the address, the server.
fn read(frame: &[u8]) -> Option<(u32, u8, [u8; 4], [u8; 4])> {
    let udp = frame.get(VNET + 12..VNET + 14)? == [8, 0] && *frame.get(VNET + 14 + 9)? == 17;
    let from_server = frame.get(VNET + 14 + 20..VNET + 14 + 22)? == [0, 67];
    let mut message = frame.get(HEADERS..)?.to_vec();
    if !udp || !from_server || message.first() != Some(&2) {
        return None;
    }
    message[0] = 1;
    let reply = Request::parse(&message)?;
    Some((reply.mac.id()?, reply.kind()?, message[16..20].try_into().ok()?, reply.option(54)?.try_into().ok()?))
}

/// Lets machines 1 to `machines` ask for their addresses, over and over, until `total` have got theirs.
pub fn dhcp(tap: &File, machines: u32, total: usize) -> Run {
    let mut clients: Vec<Option<Client>> = (0..=machines).map(|_| None).collect();
    let (mut next, mut times, mut again) = (0, Vec::with_capacity(total), 0);
    let began = Instant::now();
    let mut begin = |clients: &mut Vec<Option<Client>>| {
        next = next % machines + 1;
        let last = frame(next, kind::DISCOVER, &[]);
        (&*tap).write_all(&last).unwrap();
        clients[next as usize] = Some(Client { began: Instant::now(), last });
    };
    (0..AT_ONCE).for_each(|_| begin(&mut clients));
    let mut buffer = [0; 2048];
    while times.len() < total {
        let mut ready = [PollFd::new(tap, PollFlags::IN)];
        if poll(&mut ready, Some(&SILENCE)).unwrap() == 0 {
            for client in clients.iter().flatten() {
                (&*tap).write_all(&client.last).unwrap();
                again += 1;
            }
            assert!(began.elapsed() < Duration::from_secs(120), "the server has answered {} clients", times.len());
            continue;
        }
        let size = (&*tap).read(&mut buffer).unwrap();
        let Some((id, kind, address, server)) = read(&buffer[..size]) else { continue };
        let Some(Some(client)) = clients.get_mut(id as usize) else { continue };
        match kind {
            kind::OFFER if client.last[HEADERS + 242] == kind::DISCOVER => {
                client.last = frame(id, kind::REQUEST, &[(code::REQUESTED_IP, &address), (code::SERVER_ID, &server)]);
                (&*tap).write_all(&client.last).unwrap();
            }
            kind::ACK => {
                times.push(client.began.elapsed().as_secs_f64() * 1e3);
                clients[id as usize] = None;
                begin(&mut clients);
            }
            _ => {}
        }
    }
    let per_second = total as f64 / began.elapsed().as_secs_f64();
    times.sort_by(f64::total_cmp);
    Run { per_second, p99: times[total * 99 / 100], again }
}

/// Asks for a machine's address and returns how many answers came in a second.
pub fn dns(server: Ipv4Addr, name: &str, total: usize) -> f64 {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    socket.connect((server, 53)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut query = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(label.len() as u8);
        query.extend(label.bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let send = || drop(socket.send(&query));
    let began = Instant::now();
    (0..AT_ONCE).for_each(|_| send());
    let (mut answered, mut buffer) = (0, [0; 512]);
    while answered < total {
        match socket.recv(&mut buffer) {
            Ok(size) => {
                assert!(size > query.len() && buffer[7] == 1, "no answer: {}", buffer[..size].escape_ascii());
                answered += 1;
                send();
            }
            Err(_) => {
                assert!(began.elapsed() < Duration::from_secs(60), "{answered} answers");
                (0..AT_ONCE).for_each(|_| send());
            }
        }
    }
    total as f64 / began.elapsed().as_secs_f64()
}
