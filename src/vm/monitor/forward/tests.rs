//! Forwards with real sockets: the guest is this host's own loopback.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use smol::{LocalExecutor, Timer, unblock};
use socket2::{Domain, SockRef, Socket, Type};

use super::{Forwards, Limits, prepare};
use crate::vm::port::Forward;

const LIMIT: Duration = Duration::from_secs(20);
const LIMITS: Limits =
    Limits { connections: 40, associations: 8, connect: Duration::from_millis(300), idle: Duration::from_millis(400) };

/// Runs a test on the executor on which the forwards are.
fn with(limits: Limits, specs: &[String], test: impl AsyncFnOnce(&Forwards, Vec<u16>)) {
    let specs: Vec<Forward> = specs.iter().map(|spec| spec.parse().unwrap()).collect();
    let opened = prepare(&specs, true).unwrap();
    let ports = opened.iter().map(|opened| opened.forward().host_port).collect();
    let executor = Rc::new(LocalExecutor::new());
    let forwards = Forwards::new(executor.clone(), Ipv4Addr::LOCALHOST, limits, opened);
    smol::block_on(executor.run(async {
        test(&forwards, ports).await;
        forwards.close().await;
    }));
}

/// A server of the guest, which does this with each connection.
fn server(work: impl Fn(TcpStream) + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let work = std::sync::Arc::new(work);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let work = work.clone();
            thread::spawn(move || work(stream.unwrap()));
        }
    });
    port
}

fn echo() -> u16 {
    server(|mut stream| {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..length]).is_err() {
                return;
            }
        }
    })
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Whether what is said comes back.
fn answers(stream: &mut TcpStream, limit: Duration) -> bool {
    stream.set_read_timeout(Some(limit)).unwrap();
    let mut back = [0; 5];
    stream.write_all(b"hello").is_ok() && stream.read_exact(&mut back).is_ok() && back == *b"hello"
}

fn reset(stream: &TcpStream) {
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

async fn until(met: impl Fn() -> bool) {
    let end = Instant::now() + LIMIT;
    while !met() {
        assert!(Instant::now() < end, "this did not happen");
        Timer::after(Duration::from_millis(5)).await;
    }
}

fn open_now(forwards: &Forwards) -> usize {
    forwards.shown().iter().map(|port| port.open).sum()
}

#[test]
fn bytes_go_both_ways_and_each_end_has_its_own_last_word() {
    // Answers when it has heard all.
    let counter = server(|mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
    });
    // Has said all before it listens.
    let (sender, heard) = mpsc::channel();
    let speaker = server(move |mut stream| {
        stream.write_all(b"bye").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        sender.send(all).unwrap();
    });
    let specs = [format!("0:{counter}"), format!("[::1]:0:{counter}"), format!("0:{speaker}")];
    with(LIMITS, &specs, async |forwards, ports| {
        let whole: Vec<u8> = (0..3 << 20).map(|n: u32| (n % 251) as u8).collect();
        for at in [("127.0.0.1", ports[0]), ("::1", ports[1])] {
            let (sent, mut client) = (whole.clone(), TcpStream::connect(at).unwrap());
            let back = unblock(move || {
                client.write_all(&sent).unwrap();
                client.shutdown(Shutdown::Write).unwrap();
                let mut back = Vec::new();
                client.read_to_end(&mut back).unwrap();
                back
            });
            assert!(back.await == whole, "{at:?}");
        }
        let mut client = connect(ports[2]);
        let said = unblock(move || {
            let mut all = String::new();
            client.read_to_string(&mut all).unwrap();
            client.write_all(b"still here").unwrap();
            all
        });
        assert_eq!(said.await, "bye");
        assert_eq!(unblock(move || heard.recv_timeout(LIMIT).unwrap()).await, b"still here");
        until(|| open_now(forwards) == 0).await;
    });
}

#[test]
fn a_reset_reaches_the_other_end_and_so_does_a_refusal() {
    let rude = server(|mut stream| {
        let _ = stream.read(&mut [0; 5]);
        reset(&stream);
    });
    let (sender, heard) = mpsc::channel();
    let patient = server(move |mut stream| {
        let mut all = Vec::new();
        sender.send(stream.read_to_end(&mut all).map_err(|error| error.kind())).unwrap();
    });
    let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let specs = [format!("0:{rude}"), format!("0:{patient}"), format!("0:{nobody}")];
    with(LIMITS, &specs, async |forwards, ports| {
        for port in [ports[0], ports[2]] {
            let mut client = connect(port);
            let told = unblock(move || {
                let heard = client.write_all(b"hello").and_then(|()| client.read_to_end(&mut Vec::new()));
                heard.map_err(|error| error.kind())
            });
            assert_eq!(told.await, Err(ErrorKind::ConnectionReset));
        }
        let client = connect(ports[1]);
        until(|| open_now(forwards) == 1).await;
        (&client).write_all(b"never mind").unwrap();
        Timer::after(Duration::from_millis(50)).await;
        reset(&client);
        drop(client);
        let told = unblock(move || heard.recv_timeout(LIMIT).unwrap()).await;
        assert_eq!(told, Err(ErrorKind::ConnectionReset));
        until(|| open_now(forwards) == 0).await;
    });
}

#[test]
fn a_guest_that_accepts_nothing_or_reads_nothing_holds_up_nobody() {
    // Its queue is full: further connections are not answered at all.
    let deaf = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    deaf.bind(&std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    deaf.listen(0).unwrap();
    let at = deaf.local_addr().unwrap().as_socket().unwrap();
    let _first = TcpStream::connect(at).unwrap();
    let lazy = server(|stream| {
        thread::sleep(LIMIT);
        drop(stream);
    });
    let specs = [format!("0:{}", at.port()), format!("0:{lazy}"), format!("0:{}", echo())];
    with(LIMITS, &specs, async |_, ports| {
        let mut waiting = connect(ports[0]);
        let stuck = connect(ports[1]);
        stuck.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        let sent = unblock(move || {
            let (mut stuck, piece, mut sent) = (stuck, vec![0; 1 << 20], 0_u64);
            while let Ok(length @ 1..) = stuck.write(&piece) {
                sent += length as u64;
            }
            (stuck, sent)
        });
        let (_stuck, sent) = sent.await;
        assert!(sent < 256 << 20, "memory has a limit: {sent}");
        let mut client = connect(ports[2]);
        assert!(unblock(move || answers(&mut client, LIMIT)).await);
        let began = Instant::now();
        let told = unblock(move || waiting.read(&mut [0; 1]).map_err(|error| error.kind())).await;
        assert_eq!(told, Err(ErrorKind::ConnectionReset));
        assert!(began.elapsed() < LIMIT / 2);
    });
}

#[test]
fn connections_have_a_limit_and_one_port_leaves_some_to_the_others() {
    let specs = [format!("0:{}", echo()), format!("0:{}", echo())];
    with(Limits { connections: 4, ..LIMITS }, &specs, async |forwards, ports| {
        let open = async |port| {
            let mut client = connect(port);
            let limit = Duration::from_millis(500);
            unblock(move || {
                let answered = answers(&mut client, limit);
                (client, answered)
            })
            .await
        };
        let mut all = Vec::new();
        for _ in 0..3 {
            let (client, answered) = open(ports[0]).await;
            assert!(answered);
            all.push(client);
        }
        let (mut fourth, answered) = open(ports[0]).await;
        assert!(!answered, "it waits for its turn");
        assert_eq!(open_now(forwards), 3);
        let (_other, answered) = open(ports[1]).await;
        assert!(answered, "the other port has its own");
        drop(all.pop());
        let late = unblock(move || {
            fourth.set_read_timeout(Some(LIMIT)).unwrap();
            fourth.read_exact(&mut [0; 5]).is_ok()
        });
        assert!(late.await, "now it has one");
    });
}

#[test]
fn what_is_open_and_silent_takes_no_processor() {
    let quiet = server(|mut stream| {
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        thread::sleep(LIMIT);
    });
    let specs = [format!("0:{quiet}"), format!("0:{}", echo()), "0:9/udp".to_string()];
    with(LIMITS, &specs, async |forwards, ports| {
        let half = connect(ports[0]);
        half.shutdown(Shutdown::Write).unwrap();
        let _whole = connect(ports[1]);
        until(|| open_now(forwards) == 2).await;
        let used = || rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        let before = used();
        Timer::after(Duration::from_millis(500)).await;
        let after = used();
        let nanoseconds = (after.tv_sec - before.tv_sec) * 1_000_000_000 + (after.tv_nsec - before.tv_nsec);
        assert!(nanoseconds < 100_000_000, "{nanoseconds} ns of 500 ms");
    });
}

/// A client of UDP.
fn datagrams(port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket
}

async fn exchange(socket: &UdpSocket, said: Vec<u8>) -> Option<Vec<u8>> {
    let socket = socket.try_clone().unwrap();
    unblock(move || {
        socket.send(&said).ok()?;
        let mut buffer = vec![0; 64 << 10];
        let length = socket.recv(&mut buffer).ok()?;
        Some(buffer[..length].to_vec())
    })
    .await
}

/// Answers each datagram with what it heard and the number of its sender's port.
fn udp_echo(socket: UdpSocket) {
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
}

#[test]
fn datagrams_find_their_way_back_and_silent_clients_are_forgotten() {
    let guest = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = guest.local_addr().unwrap().port();
    udp_echo(guest);
    with(LIMITS, &[format!("0:{port}/udp")], async |forwards, ports| {
        let (one, two) = (datagrams(ports[0]), datagrams(ports[0]));
        for (client, said) in [(&one, vec![1; 1]), (&two, vec![2; 60_000]), (&one, vec![]), (&two, vec![4; 1400])] {
            assert_eq!(exchange(client, said.clone()).await, Some(said));
        }
        assert_eq!(open_now(forwards), 2);
        until(|| open_now(forwards) == 0).await;
        assert_eq!(exchange(&one, vec![5]).await, Some(vec![5]), "and come back");
        // More than there is room for: the one that has been silent for longest gives way.
        let many: Vec<UdpSocket> = (0..20).map(|_| datagrams(ports[0])).collect();
        for client in &many {
            assert_eq!(exchange(client, vec![6]).await, Some(vec![6]));
            assert!(open_now(forwards) <= LIMITS.associations);
        }
    });
}

#[test]
fn a_guest_that_does_not_listen_yet_gets_the_datagrams_when_it_does() {
    let guest = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let at = guest.local_addr().unwrap();
    drop(guest);
    with(LIMITS, &[format!("0:{}/udp", at.port())], async |_, ports| {
        let client = datagrams(ports[0]);
        for _ in 0..3 {
            assert_eq!(exchange(&client, vec![1]).await, None);
        }
        udp_echo(UdpSocket::bind(at).unwrap());
        assert_eq!(exchange(&client, vec![2]).await, Some(vec![2]));
    });
}

#[test]
fn a_change_is_whole_or_not_at_all_and_leaves_the_rest_alone() {
    let (first, second) = (echo(), server(|mut stream| drop(stream.write_all(b"second"))));
    with(LIMITS, &[format!("0:{first}"), format!("0:{first}")], async |forwards, ports| {
        let read = |text: String| text.parse::<Forward>().unwrap();
        let now = || forwards.shown().iter().map(|port| port.forward).collect::<Vec<_>>();
        let before = now();
        let mut kept = connect(ports[0]);
        let mut gone = connect(ports[1]);
        until(|| open_now(forwards) == 2).await;
        let holder = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let taken = read(format!("{}:1", holder.local_addr().unwrap().port()));
        let other = read(format!("0:{second}"));
        let error = forwards.set(&[before[0], other, taken], true).await.unwrap_err();
        assert!(error.to_string().contains("is taken"), "{error}");
        assert_eq!(now(), before);
        // As many as can be.
        forwards.set(&[before[0], before[1], taken], false).await.unwrap();
        let shown = forwards.shown();
        assert_eq!(shown.iter().map(|port| port.why.is_some()).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(open_now(forwards), 2, "the connections are as they were");

        // The second port leads elsewhere, and whoever was there is cut off.
        let moved = Forward { guest_port: second, ..before[1] };
        forwards.set(&[before[0], moved], true).await.unwrap();
        let told = unblock(move || gone.read(&mut [0; 1]).map_err(|error| error.kind())).await;
        assert_eq!(told, Err(ErrorKind::ConnectionReset));
        let mut client = connect(ports[1]);
        let said = unblock(move || {
            let mut said = String::new();
            client.read_to_string(&mut said).unwrap();
            said
        });
        assert_eq!(said.await, "second");
        assert!(unblock(move || answers(&mut kept, LIMIT)).await);

        forwards.set(&[], true).await.unwrap();
        for forward in before {
            assert!(TcpStream::connect(forward.endpoint()).is_err(), "nobody listens");
            drop(TcpListener::bind(forward.endpoint()).unwrap());
        }
    });
}
