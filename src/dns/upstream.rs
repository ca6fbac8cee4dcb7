//! The host's own name servers: which they are, and how they are asked.

use std::cell::RefCell;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use async_io::{Async, Timer};
use smol::io::{AsyncReadExt, AsyncWriteExt};

use super::{HEADER, question_end};

/// Most servers that resolvers use (MAXNS, resolv.h).
const MOST: usize = 3;
/// How long one server may take before the next is asked.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often all of them are asked.
const ROUNDS: usize = 2;
/// How long an exchange by TCP may take.
const TCP_PATIENCE: Duration = Duration::from_secs(5);
/// Longest answer that is taken by UDP, in bytes; a longer one is told to be cut off, and the client asks by TCP.
const MAX_ANSWER: usize = 8192;
const PORT: u16 = 53;
/// A server that fails (RFC 1035, RCODE 2), and one that does not want to (5): the next may.
const FAILURES: [u8; 2] = [2, 5];

/// The servers of the host's resolv.conf(5), read again when it has changed.
pub struct Upstream {
    file: PathBuf,
    /// Our own addresses: to ask ourselves would go round and round.
    own: Vec<IpAddr>,
    read: RefCell<(Option<Mark>, Vec<SocketAddr>)>,
}

/// What tells one state of a file from another.
type Mark = (u64, i64, i64, u64);

impl Upstream {
    pub fn new(file: PathBuf, own: Vec<IpAddr>) -> Upstream {
        Upstream { file, own, read: RefCell::default() }
    }

    fn servers(&self) -> Vec<SocketAddr> {
        let mark = fs::metadata(&self.file).ok().map(|file| (file.ino(), file.mtime(), file.mtime_nsec(), file.size()));
        let mut read = self.read.borrow_mut();
        if mark.is_none() || read.0 != mark {
            *read = (mark, parse(&fs::read_to_string(&self.file).unwrap_or_default(), &self.own));
        }
        read.1.clone()
    }

    /// Asks the servers by UDP, one after the other.
    ///
    /// # Errors
    /// When there is none, or none answers.
    pub async fn ask(&self, query: &[u8]) -> Result<Vec<u8>> {
        let servers = self.servers();
        ensure!(!servers.is_empty(), "{} names no server", self.file.display());
        let mut failed = None;
        for server in servers.iter().cycle().take(servers.len() * ROUNDS) {
            match within(PATIENCE, exchange(*server, query)).await {
                Ok(answer) if FAILURES.contains(&(answer[3] & 0x0f)) => failed = Some(answer),
                Ok(answer) => return Ok(answer),
                Err(_) => {}
            }
        }
        failed.context("no server answers")
    }

    /// Asks the servers by TCP, one after the other.
    ///
    /// # Errors
    /// When there is none, or none answers.
    pub async fn ask_by_tcp(&self, query: &[u8]) -> Result<Vec<u8>> {
        for server in self.servers() {
            if let Ok(answer) = within(TCP_PATIENCE, exchange_by_tcp(server, query)).await {
                return Ok(answer);
            }
        }
        bail!("no server answers by TCP")
    }
}

/// Asks one server, from a port of its own and with an id of its own, so that an answer is hard to forge (RFC 5452).
async fn exchange(server: SocketAddr, query: &[u8]) -> Result<Vec<u8>> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = Async::<UdpSocket>::bind(any)?;
    socket.get_ref().connect(server)?;
    let mut id = [0; 2];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    let mut asked = query.to_vec();
    asked.get_mut(..2).context("no query")?.copy_from_slice(&id);
    socket.send(&asked).await?;
    let mut buffer = vec![0; MAX_ANSWER + 1];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if let Some(answer) = relayed(query, &asked, &buffer[..length]) {
            return Ok(answer);
        }
    }
}

/// What a guest is told of a server's answer by UDP to `asked`, which is its query under another id; `None` where it is
/// no answer to that.
pub fn relayed(query: &[u8], asked: &[u8], answer: &[u8]) -> Option<Vec<u8>> {
    if !answers(asked, answer) {
        return None;
    }
    let mut told = answer.to_vec();
    told.get_mut(..2)?.copy_from_slice(query.get(..2)?);
    if answer.len() > MAX_ANSWER {
        // TC (RFC 1035, section 4.1.1), and the question alone.
        told.truncate(question_end(&told)?);
        *told.get_mut(2)? |= 2;
        told.get_mut(6..HEADER)?.fill(0);
    }
    Some(told)
}

async fn exchange_by_tcp(server: SocketAddr, query: &[u8]) -> Result<Vec<u8>> {
    let mut stream = Async::<TcpStream>::connect(server).await?;
    stream.write_all(&framed(query)?).await?;
    let answer = read_framed(&mut stream).await?.context("the server closed the connection")?;
    ensure!(answers(query, &answer), "the answer is to another question");
    Ok(answer)
}

/// Whether this answers the query: the id and the question are the same.
fn answers(query: &[u8], answer: &[u8]) -> bool {
    let Some(end) = question_end(query) else { return false };
    answer.len() >= end
        && answer[..2] == query[..2]
        && answer[2] & 0x80 != 0
        && answer[4..6] == query[4..6]
        && answer[HEADER..end].eq_ignore_ascii_case(&query[HEADER..end])
}

/// A message as TCP carries it: its length goes before it (RFC 1035, section 4.2.2).
///
/// # Errors
/// When it is too long for that.
pub fn framed(message: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok([&length.to_be_bytes(), message].concat())
}

/// Reads one message; `None` at the end of the stream.
///
/// # Errors
/// When the connection breaks in its midst.
pub async fn read_framed(stream: &mut Async<TcpStream>) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    if stream.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut length[1..]).await?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

/// Gives up after a time.
///
/// # Errors
/// The work's own, and the lack of time.
pub async fn within<T>(limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    smol::future::or(work, async {
        Timer::after(limit).await;
        bail!("no answer within {limit:?}")
    })
    .await
}

/// The servers of a resolv.conf(5).
fn parse(text: &str, own: &[IpAddr]) -> Vec<SocketAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then_some(())?;
        let word = words.next()?;
        // A link-local address names its link.
        let address = match word.split_once('%') {
            None => SocketAddr::new(word.parse().ok()?, PORT),
            Some((address, link)) => {
                let socket =
                    rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None);
                let index = link.parse().ok().or(rustix::net::netdevice::name_to_index(socket.ok()?, link).ok())?;
                std::net::SocketAddrV6::new(address.parse().ok()?, PORT, 0, index).into()
            }
        };
        Some(address).filter(|address| !own.contains(&address.ip()))
    });
    servers.take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: [IpAddr; 2] =
        [IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x53))];

    #[test]
    fn the_hosts_servers_are_read_and_we_are_none_of_them() {
        let text = "# by hand\nsearch lan\nnameserver 10.0.0.1\nnameserver fd00::53\nnameserver 127.0.0.53\n nameserver fd00::1\nnameserver x\n";
        let text = format!("{text}nameserver fe80::1%lo\nnameserver 192.0.2.1\n");
        let found: Vec<String> = parse(&text, &OWN).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["127.0.0.53:53", "[fd00::1]:53", "[fe80::1%1]:53"]);
        assert!(parse("", &OWN).is_empty());
    }

    #[test]
    fn a_change_of_the_file_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("resolv.conf");
        let upstream = Upstream::new(file.clone(), OWN.into());
        assert!(upstream.servers().is_empty());
        for address in ["192.0.2.1", "192.0.2.2"] {
            let new = dir.path().join("new");
            fs::write(&new, format!("nameserver {address}\n")).unwrap();
            fs::rename(&new, &file).unwrap();
            assert_eq!(upstream.servers(), [format!("{address}:53").parse().unwrap()]);
        }
        fs::remove_file(&file).unwrap();
        assert!(upstream.servers().is_empty());
    }

    #[test]
    fn only_the_answer_to_the_question_counts() {
        let query = [&[1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], b"\x03Web\x03org\0\0\x01\0\x01"].concat();
        let mut answer = query.to_ascii_lowercase();
        answer[2] = 0x81;
        assert!(answers(&query, &answer));
        assert!(!answers(&query, &query), "a query");
        assert!(!answers(&query, &answer[..20]));
        for at in [0, 1, 5, 13, answer.len() - 1] {
            let mut other = answer.clone();
            other[at] ^= 0x11;
            assert!(!answers(&query, &other), "{at}");
        }
    }
}
