//! Both ends of a forward in the tests: a server for the guest, clients for the host. Compiled by the test itself into
//! one static file, since the small guest has neither a server for datagrams nor a loader.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", port] => serve(port),
        ["tcp", address, text] => {
            println!("{}", tcp(address, text).unwrap_or_else(|error| format!("{:?}", error.kind())))
        }
        ["udp", address, text] => {
            println!("{}", udp(address, text).unwrap_or_else(|error| format!("{:?}", error.kind())))
        }
        ["hold", address] => hold(address),
        _ => panic!("what? {words:?}"),
    }
}

/// Says back what it hears, and at the end of a connection how much that was.
fn serve(port: &str) {
    let datagrams = UdpSocket::bind(format!("0.0.0.0:{port}")).unwrap();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let (length, from) = datagrams.recv_from(&mut buffer).unwrap();
            let _ = datagrams.send_to(&buffer[..length], from);
        }
    });
    for stream in TcpListener::bind(format!("0.0.0.0:{port}")).unwrap().incoming() {
        let mut stream = stream.unwrap();
        thread::spawn(move || {
            let (mut buffer, mut all) = (vec![0; 64 << 10], 0);
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                all += length;
                let _ = stream.write_all(&buffer[..length]);
            }
            let _ = stream.write_all(format!(" ({all} bytes)").as_bytes());
        });
    }
}

/// Hears its text back before it says that this was all, and then the rest.
fn tcp(address: &str, text: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(text.as_bytes())?;
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back)?;
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut back)?;
    Ok(String::from_utf8_lossy(&back).into_owned())
}

fn udp(address: &str, text: &str) -> std::io::Result<String> {
    let any = if address.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(any)?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.send(text.as_bytes())?;
    let mut buffer = vec![0; 64 << 10];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// Connects, says so, and tells how the connection ends.
fn hold(address: &str) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut [0; 1]).unwrap();
    println!("held");
    match stream.read(&mut [0; 1]) {
        Ok(0) => println!("closed"),
        Ok(_) => println!("heard something"),
        Err(error) => println!("{:?}", error.kind()),
    }
}
