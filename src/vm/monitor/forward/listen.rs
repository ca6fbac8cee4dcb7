//! Sockets of the host on which forwards listen, and why one cannot be had.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::rc::Rc;

use anyhow::{Result, anyhow};
use smol::Async;
use socket2::{Domain, Socket, Type};

use crate::vm::Hint;
use crate::vm::port::{Forward, Protocol};

/// Connections that wait to be taken.
const BACKLOG: i32 = 128;

/// A socket that listens; its copies are the same socket.
#[derive(Clone, Debug)]
pub enum Listener {
    Tcp(Rc<Async<TcpListener>>),
    Udp(Rc<Async<UdpSocket>>),
}

/// Begins to listen, and tells where: a forward that may have any port has one then.
///
/// # Errors
/// When that cannot be had; the hint tells the way out.
pub fn open(forward: &Forward) -> Result<(Forward, Listener)> {
    let former = bind(forward.endpoint(), forward.protocol);
    let bound = match former {
        Err(_) if forward.any && forward.host_port != 0 => bind(SocketAddr::new(forward.address, 0), forward.protocol),
        bound => bound,
    };
    let listening = bound.and_then(|socket| {
        let at = socket.local_addr()?.as_socket().ok_or(ErrorKind::Unsupported)?;
        let listener = match forward.protocol {
            Protocol::Tcp => Listener::Tcp(Rc::new(Async::new(socket.into())?)),
            Protocol::Udp => Listener::Udp(Rc::new(Async::new(socket.into())?)),
        };
        Ok((Forward { host_port: at.port(), ..*forward }, listener))
    });
    match listening {
        Ok(listening) => Ok(listening),
        Err(error) => explain(forward, error),
    }
}

/// Sees that all of these could be had now.
///
/// # Errors
/// As for [`open`].
pub fn probe(forwards: &[Forward]) -> Result<()> {
    let all = forwards.iter().map(open);
    all.collect::<Result<Vec<_>>>().map(drop)
}

fn bind(address: SocketAddr, protocol: Protocol) -> io::Result<Socket> {
    let kind = match protocol {
        Protocol::Tcp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
    };
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        // So that [::] means all of IPv6, and 0.0.0.0 can be had beside it.
        socket.set_only_v6(true)?;
    }
    // What is left of former connections keeps nobody from listening again. For UDP it would share the port.
    if protocol == Protocol::Tcp {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    if protocol == Protocol::Tcp {
        socket.listen(BACKLOG)?;
    }
    Ok(socket)
}

fn explain<T>(forward: &Forward, error: io::Error) -> Result<T> {
    let (number, protocol) = (forward.host_port, forward.protocol.word());
    let (why, hint) = match error.kind() {
        ErrorKind::AddrInUse => (
            format!("port {number}/{protocol} of {} is taken", forward.address),
            format!(
                "choose another, or leave it out for any that is free; `ss -lp{} sport = :{number}` shows who has it",
                if forward.protocol == Protocol::Tcp { "t" } else { "u" }
            ),
        ),
        ErrorKind::PermissionDenied => (
            format!("you may not listen on port {number}: those below {} are root's", first_unprivileged()),
            privilege_hint(number),
        ),
        ErrorKind::AddrNotAvailable => (
            format!("this host does not have the address {}", forward.address),
            "`ip address` shows those that it has; 0.0.0.0 stands for all of them".into(),
        ),
        _ => (format!("cannot listen on {} ({protocol}): {error}", forward.endpoint()), String::new()),
    };
    match hint.is_empty() {
        true => Err(anyhow!(why)),
        false => Err(anyhow!(why)).hint(hint),
    }
}

/// Checks that the user may have these ports of the host at all.
///
/// # Errors
/// When one is root's.
pub fn check_privilege(forwards: &[Forward]) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let first = first_unprivileged();
    match forwards.iter().find(|forward| forward.host_port != 0 && forward.host_port < first) {
        Some(low) => explain(low, ErrorKind::PermissionDenied.into()),
        None => Ok(()),
    }
}

/// The lowest port on which everybody may listen (ip(7)).
fn first_unprivileged() -> u16 {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(1024)
}

fn privilege_hint(number: u16) -> String {
    format!(
        "choose one from {} up, or let everybody have it: sudo sysctl net.ipv4.ip_unprivileged_port_start={number}",
        first_unprivileged()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::Hinted;

    fn failure(text: &str) -> (String, String) {
        let error = open(&text.parse().unwrap()).unwrap_err();
        let hint = error.downcast_ref::<Hinted>().map(|hinted| hinted.hint().to_string());
        (error.to_string(), hint.unwrap_or_default())
    }

    #[test]
    fn any_port_is_a_free_one_and_a_taken_one_is_told() {
        for protocol in ["tcp", "udp"] {
            let (forward, held) = open(&format!("0:80/{protocol}").parse().unwrap()).unwrap();
            assert!(forward.any && forward.host_port != 0);
            let (why, hint) = failure(&format!("{}:80/{protocol}", forward.host_port));
            assert_eq!(why, format!("port {}/{protocol} of 127.0.0.1 is taken", forward.host_port));
            assert!(hint.contains(&format!("sport = :{}", forward.host_port)), "{hint}");
            assert!(failure(&format!("0.0.0.0:{}:80/{protocol}", forward.host_port)).0.contains("is taken"));
            let (other, _held) = open(&forward).unwrap();
            assert_ne!(other.host_port, forward.host_port, "any other will do");
            drop(held);
            let fixed = Forward { any: false, ..forward };
            assert_eq!(open(&fixed).unwrap().0, fixed, "nothing keeps it");
            probe(&[fixed]).unwrap();
        }
    }

    #[test]
    fn ipv6_is_its_own_and_a_foreign_address_is_told() {
        let (six, _held) = open(&"[::1]:0:80".parse().unwrap()).unwrap();
        assert!(six.address.is_ipv6());
        let (all, held) = open(&"[::]:0:80".parse().unwrap()).unwrap();
        let four = Forward { address: "0.0.0.0".parse().unwrap(), any: false, ..all };
        open(&four).unwrap();
        drop(held);
        let (why, hint) = failure("203.0.113.77:8080:80");
        assert_eq!(why, "this host does not have the address 203.0.113.77");
        assert!(hint.contains("0.0.0.0"));
    }

    #[test]
    fn who_may_not_have_a_port_is_told_how_to() {
        let low = "80:80".parse().unwrap();
        let error = explain::<()>(&low, ErrorKind::PermissionDenied.into()).unwrap_err();
        let hint = error.downcast_ref::<Hinted>().unwrap().hint();
        assert!(error.to_string().contains("port 80"), "{error}");
        assert!(hint.ends_with("sudo sysctl net.ipv4.ip_unprivileged_port_start=80"), "{hint}");
    }
}
