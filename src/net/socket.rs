//! A netlink socket: requests, dumps and batches, each waited for.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use neli::consts::socket::{Msg, NlFamily};
use neli::socket::NlSocket;
use neli::utils::Groups;
use rustix::io::Errno;

use super::message::{self, Message, flags};

/// The message that ends a dump (NLMSG_DONE).
const DONE: u16 = 3;
/// The message that holds an error or, with the number 0, an acknowledgement (NLMSG_ERROR).
const ERROR: u16 = 2;
/// The kernel fills at most 32 KiB of a dump at a time (NLMSG_GOODSIZE and netlink_dump()).
const BUFFER: usize = 64 * 1024;
/// How often a dump is begun again after a change overtook it.
const ATTEMPTS: usize = 8;
/// The attribute of an error that explains it (NLMSGERR_ATTR_MSG).
const ERROR_MESSAGE: u16 = 1;

/// Why the kernel refused a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The error's number.
    pub errno: Errno,
    /// The kernel's own explanation, where it gives one.
    pub detail: Option<String>,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = io::Error::from(self.errno);
        match &self.detail {
            Some(detail) => write!(f, "{error}: {detail}"),
            None => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Error {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        Error { errno, detail: None }
    }
}

/// A netlink socket of one family. The kernel answers each request before its `send` returns, so nothing here waits.
pub struct Socket {
    socket: NlSocket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket for links, addresses and routes (NETLINK_ROUTE).
    ///
    /// # Errors
    /// The kernel's.
    pub fn route() -> Result<Socket, Error> {
        Socket::open(NlFamily::Route)
    }

    /// Opens a socket for nftables (NETLINK_NETFILTER).
    ///
    /// # Errors
    /// The kernel's.
    pub fn netfilter() -> Result<Socket, Error> {
        Socket::open(NlFamily::Netfilter)
    }

    fn open(family: NlFamily) -> Result<Socket, Error> {
        let socket = NlSocket::connect(family, None, Groups::empty())?;
        socket.enable_ext_ack(true)?;
        socket.nonblock()?;
        Ok(Socket { socket, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// Lets one datagram have this many bytes, beyond what an administrator allows for any socket.
    ///
    /// # Errors
    /// The kernel's; it needs CAP_NET_ADMIN.
    pub fn widen(&mut self, bytes: usize) -> Result<(), Error> {
        // SAFETY: the descriptor is the socket's, which is open for as long as `self` is.
        let fd = unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) };
        let set = rustix::net::sockopt::set_socket_send_buffer_size_force(fd, bytes);
        set.map_err(|errno| Error { errno, detail: None })
    }

    /// Sends a request and returns when the kernel has done it.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn request(&mut self, message: &Message) -> Result<(), Error> {
        self.batch(std::slice::from_ref(message), false)
    }

    /// Sends messages in one datagram. With `framed` the first and the last are the marks of a batch, which get no
    /// acknowledgement of their own (nfnetlink), so there must be a message between them.
    ///
    /// # Errors
    /// The kernel's first refusal; a framed batch then has no effect at all.
    pub fn batch(&mut self, messages: &[Message], framed: bool) -> Result<(), Error> {
        let mut bytes = Vec::new();
        // One acknowledgement is enough, since refusals come unasked and before it; one for each message of a long
        // batch would overflow the socket's buffer.
        let asked = messages.len().saturating_sub(if framed { 2 } else { 1 });
        let first = self.sequence.wrapping_add(1);
        let mut last = first;
        for (at, message) in messages.iter().enumerate() {
            self.sequence = self.sequence.wrapping_add(1);
            if at == asked {
                last = self.sequence;
            }
            message.encode(if at == asked { flags::ACK } else { 0 }, self.sequence, &mut bytes);
        }
        self.socket.send(&bytes, Msg::empty())?;
        loop {
            let size = self.receive()?;
            for answer in message::answers(self.buffer.get(..size).unwrap_or_default()) {
                // What a batch that failed left behind is not an answer to this one.
                let ours = (answer.sequence.wrapping_sub(first) as usize) < messages.len();
                if answer.kind == ERROR && ours {
                    check(&answer)?;
                    if answer.sequence == last {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Sends a request for one entry and returns its type and body.
    ///
    /// # Errors
    /// The kernel's refusal, such as `NODEV` where there is none.
    pub fn get(&mut self, message: &Message) -> Result<(u16, Vec<u8>), Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        message.encode(0, self.sequence, &mut bytes);
        self.socket.send(&bytes, Msg::empty())?;
        loop {
            let size = self.receive()?;
            for answer in message::answers(self.buffer.get(..size).unwrap_or_default()) {
                match answer.kind {
                    _ if answer.sequence != self.sequence => {}
                    ERROR => check(&answer)?,
                    kind => return Ok((kind, answer.body.to_vec())),
                }
            }
        }
    }

    /// Sends a request for a list and returns the type and body of each entry.
    ///
    /// # Errors
    /// See [`Socket::fold`].
    pub fn dump(&mut self, message: &Message) -> Result<Vec<(u16, Vec<u8>)>, Error> {
        self.fold(message, Vec::new, |entries, kind, body| entries.push((kind, body.to_vec())))
    }

    /// Sends a request for a list and makes something of the type and body of each entry as it comes, so that a long
    /// list is never held whole. It is begun again, with `init`, where a change overtakes it.
    ///
    /// # Errors
    /// The kernel's refusal; `INTR` where changes overtake every attempt.
    pub fn fold<T>(
        &mut self,
        message: &Message,
        init: impl Fn() -> T,
        mut step: impl FnMut(&mut T, u16, &[u8]),
    ) -> Result<T, Error> {
        for _ in 0..ATTEMPTS {
            self.sequence = self.sequence.wrapping_add(1);
            let mut bytes = Vec::new();
            message.encode(flags::DUMP, self.sequence, &mut bytes);
            self.socket.send(&bytes, Msg::empty())?;
            let mut made = init();
            let mut interrupted = false;
            'parts: loop {
                let size = self.receive()?;
                for answer in message::answers(self.buffer.get(..size).unwrap_or_default()) {
                    if answer.sequence != self.sequence {
                        continue; // Left over from a request that failed midway.
                    }
                    interrupted |= answer.flags & flags::INTERRUPTED != 0;
                    match answer.kind {
                        DONE => break 'parts,
                        ERROR => check(&answer)?,
                        kind => step(&mut made, kind, answer.body),
                    }
                }
            }
            if !interrupted {
                return Ok(made);
            }
        }
        Err(Error { errno: Errno::INTR, detail: Some("the list changes faster than it can be read".to_owned()) })
    }

    fn receive(&mut self) -> Result<usize, Error> {
        loop {
            match self.socket.recv(self.buffer.as_mut_slice(), Msg::empty()) {
                Ok((size, _)) => return Ok(size),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Reads `struct nlmsgerr`.
///
/// # Errors
/// The one that it holds.
pub fn check(answer: &message::Answer<'_>) -> Result<(), Error> {
    let code = message::u32_at(answer.body, 0).unwrap_or(0) as i32;
    if code == 0 {
        return Ok(());
    }
    // Error numbers are below 4096 (linux/err.h), and rustix insists on that.
    let number = Some(code.saturating_neg()).filter(|number| (1..4096).contains(number));
    let errno = number.map_or(Errno::IO, Errno::from_raw_os_error);
    // The request's header follows, and its body unless capped; then the attributes.
    let request = message::u32_at(answer.body, 4).unwrap_or(0) as usize;
    let repeated = if answer.flags & flags::CAPPED != 0 { message::HEADER } else { request };
    let detail = (answer.flags & flags::ACK_ATTRIBUTES != 0)
        .then(|| message::attributes(answer.body, 4usize.saturating_add(repeated.saturating_add(3) & !3)))
        .and_then(|mut list| list.find(|(kind, _)| *kind == ERROR_MESSAGE))
        .map(|(_, payload)| message::text(payload));
    Err(Error { errno, detail })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::message::{Answer, Attributes};

    #[test]
    fn an_error_carries_the_kernels_explanation() {
        let mut request = Vec::new();
        Message::new(16, 0, &[0; 4], Attributes::new().u32(1, 2)).encode(0, 1, &mut request);
        let mut body = (-17i32).to_ne_bytes().to_vec();
        body.extend(&request);
        let text = b"exists\0";
        body.extend((4 + text.len() as u16).to_ne_bytes());
        body.extend(ERROR_MESSAGE.to_ne_bytes());
        body.extend(text);
        let answer = Answer { kind: ERROR, flags: flags::ACK_ATTRIBUTES, sequence: 1, body: &body };
        let error = check(&answer).unwrap_err();
        assert_eq!(error, Error { errno: Errno::EXIST, detail: Some("exists".to_owned()) });
        let bare = check(&Answer { flags: 0, ..answer }).unwrap_err();
        assert_eq!(bare.detail, None);
        let short = Answer { body: &body[..6], ..answer };
        assert_eq!(check(&short).unwrap_err().detail, None);
        check(&Answer { body: &[0; 20], ..answer }).unwrap();
        for code in [1, 4096, -4096, i32::MAX, i32::MIN] {
            let nonsense = Answer { body: &code.to_ne_bytes(), ..answer };
            assert_eq!(check(&nonsense).unwrap_err().errno, Errno::IO, "{code}");
        }
    }

    #[test]
    fn the_loopback_interface_is_in_the_list_of_links() {
        let links = crate::net::link::list(&mut Socket::route().unwrap()).unwrap();
        assert!(links.iter().any(|l| l.name == "lo" && l.index > 0), "{links:?}");
    }
}
