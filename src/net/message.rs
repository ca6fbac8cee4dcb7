//! Netlink messages as bytes (netlink(7), linux/netlink.h): pure functions, all lengths checked.

/// Set in the type of an attribute that holds attributes (NLA_F_NESTED).
const NESTED: u16 = 0x8000;
/// The bits of an attribute's type that are the type (NLA_TYPE_MASK).
const TYPE_MASK: u16 = 0x3fff;
/// Size of `struct nlmsghdr`.
pub const HEADER: usize = 16;

/// Flags of a request (NLM_F_*).
pub mod flags {
    /// This is a request (NLM_F_REQUEST).
    pub const REQUEST: u16 = 0x1;
    /// Answer with an acknowledgement (NLM_F_ACK).
    pub const ACK: u16 = 0x4;
    /// Return all entries (NLM_F_DUMP).
    pub const DUMP: u16 = 0x300;
    /// Fail if it exists (NLM_F_EXCL).
    pub const EXCLUSIVE: u16 = 0x200;
    /// Create what does not exist (NLM_F_CREATE).
    pub const CREATE: u16 = 0x400;
    /// Add at the end of a list (NLM_F_APPEND).
    pub const APPEND: u16 = 0x800;
    /// On an answer: the dump was overtaken by a change (NLM_F_DUMP_INTR).
    pub const INTERRUPTED: u16 = 0x10;
    /// On an error: the request is not repeated in it (NLM_F_CAPPED).
    pub const CAPPED: u16 = 0x100;
    /// On an error: attributes follow (NLM_F_ACK_TLVS).
    pub const ACK_ATTRIBUTES: u16 = 0x200;
}

/// The attributes of a message, in the order they were added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// No attribute yet.
    pub fn new() -> Attributes {
        Attributes::default()
    }

    /// The attributes' bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Adds an attribute with these bytes, which the caller keeps far below 64 KiB.
    pub fn bytes(mut self, kind: u16, payload: &[u8]) -> Attributes {
        self.push(kind, payload);
        self
    }

    /// Adds a string with its closing NUL.
    pub fn string(self, kind: u16, text: &str) -> Attributes {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// Adds a number in the machine's byte order.
    pub fn u32(self, kind: u16, value: u32) -> Attributes {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// Adds a number in network byte order.
    pub fn be32(self, kind: u16, value: u32) -> Attributes {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// Adds an attribute that holds these attributes.
    pub fn nest(self, kind: u16, inner: Attributes) -> Attributes {
        self.bytes(kind | NESTED, &inner.0)
    }

    fn push(&mut self, kind: u16, payload: &[u8]) {
        let length = payload.len() + 4;
        debug_assert!(length <= usize::from(u16::MAX), "attribute {kind} of {length} bytes");
        self.0.extend((length as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(payload);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// A request: its type, its flags beyond REQUEST, and what follows the netlink header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The message's type (RTM_*, NFT_MSG_*).
    pub kind: u16,
    /// Flags besides REQUEST.
    pub flags: u16,
    body: Vec<u8>,
}

impl Message {
    /// A request of a family's own fixed header, a multiple of four bytes, and attributes.
    pub fn new(kind: u16, flags: u16, header: &[u8], attributes: Attributes) -> Message {
        debug_assert!(header.len().is_multiple_of(4));
        let mut body = header.to_vec();
        body.extend(attributes.0);
        Message { kind, flags, body }
    }

    /// How many bytes [`Message::encode`] makes.
    pub fn length(&self) -> usize {
        HEADER + self.body.len()
    }

    /// The bytes for the kernel, with `flags` added.
    pub fn encode(&self, flags: u16, sequence: u32, out: &mut Vec<u8>) {
        out.extend((self.length() as u32).to_ne_bytes());
        out.extend(self.kind.to_ne_bytes());
        out.extend((self.flags | flags | self::flags::REQUEST).to_ne_bytes());
        out.extend(sequence.to_ne_bytes());
        out.extend(0u32.to_ne_bytes()); // The port: the kernel's.
        out.extend(&self.body);
    }
}

/// An answer from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer<'a> {
    /// The message's type.
    pub kind: u16,
    /// The message's flags.
    pub flags: u16,
    /// The sequence number of the request that it answers.
    pub sequence: u32,
    /// What follows the netlink header.
    pub body: &'a [u8],
}

/// The answers in a datagram; a damaged one ends the list.
pub fn answers(mut bytes: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    std::iter::from_fn(move || {
        let length = u32_at(bytes, 0)? as usize;
        let body = bytes.get(HEADER..length)?;
        let answer = Answer { kind: u16_at(bytes, 4)?, flags: u16_at(bytes, 6)?, sequence: u32_at(bytes, 8)?, body };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(answer)
    })
}

/// The attributes in a message's body, after its fixed header; a damaged one ends the list.
pub fn attributes(body: &[u8], header: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut bytes = body.get(header..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & TYPE_MASK;
        let payload = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// Whether `seen` has every attribute of `sent` with the same value, in whatever order among other kinds; a list of
/// attributes within one is compared alike. So the kernel may tell more than it was told, but nothing else.
pub fn covers(sent: &[u8], seen: &[u8]) -> bool {
    let mut rest: Vec<(u16, &[u8])> = attributes(seen, 0).collect();
    raw_attributes(sent).all(|(kind, nested, payload)| {
        let Some(at) = rest.iter().position(|(other, _)| *other == kind) else { return nested && payload.is_empty() };
        let (_, found) = rest.remove(at);
        if nested { covers(payload, found) } else { payload == found }
    })
}

/// As [`attributes`], and whether each was sent as one that holds attributes.
fn raw_attributes(body: &[u8]) -> impl Iterator<Item = (u16, bool, &[u8])> {
    let mut bytes = body;
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)?;
        let payload = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & TYPE_MASK, kind & NESTED != 0, payload))
    })
}

/// A string attribute without its closing NUL.
pub fn text(payload: &[u8]) -> String {
    let end = payload.iter().position(|b| *b == 0).unwrap_or(payload.len());
    String::from_utf8_lossy(payload.get(..end).unwrap_or_default()).into_owned()
}

/// The 16-bit number at this offset, in the machine's byte order.
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..)?.first_chunk().map(|b| u16::from_ne_bytes(*b))
}

/// The 32-bit number at this offset, in the machine's byte order.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().map(|b| u32::from_ne_bytes(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_as_it_was_written() {
        let inner = Attributes::new().u32(7, 0x0102_0304).bytes(8, &[9]);
        let message =
            Message::new(20, flags::CREATE, &[1, 2, 3, 4], Attributes::new().string(3, "pt-a").nest(5, inner));
        let mut bytes = Vec::new();
        message.encode(flags::ACK, 42, &mut bytes);
        message.encode(0, 43, &mut bytes);
        let all: Vec<_> = answers(&bytes).collect();
        assert_eq!(all.iter().map(|a| a.sequence).collect::<Vec<_>>(), [42, 43]);
        assert_eq!((all[0].kind, all[0].flags), (20, flags::REQUEST | flags::CREATE | flags::ACK));
        assert_eq!(all[1].flags, flags::REQUEST | flags::CREATE);
        assert_eq!(&all[0].body[..4], [1, 2, 3, 4]);
        let found: Vec<_> = attributes(all[0].body, 4).collect();
        assert_eq!(found[0], (3, &b"pt-a\0"[..]));
        assert_eq!(text(found[0].1), "pt-a");
        assert_eq!(found[1].0, 5);
        let nested: Vec<_> = attributes(found[1].1, 0).collect();
        assert_eq!(nested, [(7, &0x0102_0304u32.to_ne_bytes()[..]), (8, &[9][..])]);
    }

    #[test]
    fn a_message_covers_one_that_tells_more_but_none_that_differs() {
        let element = |value| Attributes::new().nest(1, Attributes::new().string(1, "cmp").u32(2, value));
        let sent = element(1).nest(1, Attributes::new());
        let more = element(1).u32(9, 9).nest(1, Attributes::new().u32(7, 7));
        assert!(covers(sent.as_bytes(), more.as_bytes()));
        assert!(!covers(more.as_bytes(), sent.as_bytes()));
        for other in [element(2), Attributes::new(), element(1).bytes(3, &[])] {
            let expected = element(1).nest(5, element(3));
            assert!(!covers(expected.as_bytes(), other.as_bytes()), "{other:?}");
        }
        let short = Attributes::new().bytes(2, &[1, 2, 3]);
        assert!(!covers(Attributes::new().bytes(2, &[1, 2, 4]).as_bytes(), short.as_bytes()));
    }

    #[test]
    fn damaged_lengths_end_the_list() {
        let mut bytes = Vec::new();
        Message::new(1, 0, &[], Attributes::new().u32(1, 5)).encode(0, 1, &mut bytes);
        for cut in 0..bytes.len() {
            assert_eq!(answers(&bytes[..cut]).count(), 0, "{cut}");
        }
        for length in [0u32, 15, 1000, u32::MAX] {
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(answers(&bytes).count(), 0, "{length}");
        }
        assert_eq!(attributes(&[3, 0, 1, 0], 0).count(), 0);
        assert_eq!(attributes(&[9, 0, 1, 0, 0, 0, 0, 0], 0).count(), 0);
        assert_eq!(attributes(&[], 16).count(), 0);
    }
}
