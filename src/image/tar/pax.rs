//! Extended headers: records of the form "LENGTH KEY=VALUE\n" (POSIX.1-2001, pax).

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};

use super::Time;
use super::sparse::PaxSparse;

/// What an extended header says of the entry after it; an absent value leaves the entry's own header in force.
#[derive(Debug, Default)]
pub struct Pax {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub mtime: Option<Time>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub sparse: PaxSparse,
}

impl Pax {
    pub fn parse(mut data: &[u8]) -> Result<Self> {
        let mut pax = Self::default();
        while !data.is_empty() {
            // Some writers pad with NULs.
            if data.iter().all(|&byte| byte == 0) {
                break;
            }
            let (key, value, rest) = record(data).context("a damaged extended header")?;
            pax.set(key, value).with_context(|| format!("the extended header {}", super::show(key)))?;
            data = rest;
        }
        Ok(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let some = !value.is_empty();
        match key {
            b"path" => self.path = some.then(|| text(value)).transpose()?,
            b"linkpath" => self.link = some.then(|| text(value)).transpose()?,
            b"size" => self.size = some.then(|| decimal(value)).transpose()?,
            b"uid" => self.uid = some.then(|| id(value)).transpose()?,
            b"gid" => self.gid = some.then(|| id(value)).transpose()?,
            b"mtime" => self.mtime = some.then(|| time(value)).transpose()?,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.insert(text(name)?, value.to_vec());
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    // The same attribute may come in both forms; libarchive's is only a second copy.
                    self.xattrs.entry(text(&unescape(name))?).or_insert(BASE64.decode(value).context("bad base64")?);
                } else if let Some(name) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.set(name, value)?;
                }
            }
        }
        Ok(())
    }
}

/// libarchive writes no padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// Splits the first record off: key, value and what follows.
fn record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = data.iter().take(20).position(|&byte| byte == b' ')?;
    let length = usize::try_from(decimal(data.get(..space)?).ok()?).ok()?;
    let line = data.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = line.iter().position(|&byte| byte == b'=')?;
    let key = line.get(..equals).filter(|key| !key.is_empty())?;
    Some((key, line.get(equals + 1..)?, data.get(length..)?))
}

/// Bytes that become a name: no NUL.
pub fn text(value: &[u8]) -> Result<Vec<u8>> {
    ensure!(!value.contains(&0), "it contains a NUL byte");
    Ok(value.to_vec())
}

pub fn decimal(value: &[u8]) -> Result<u64> {
    ensure!(!value.is_empty() && value.iter().all(u8::is_ascii_digit), "{} is not a number", super::show(value));
    let digits = value.iter().map(|digit| u64::from(digit - b'0'));
    digits
        .into_iter()
        .try_fold(0_u64, |number, digit| number.checked_mul(10)?.checked_add(digit))
        .context("a number is out of range")
}

fn id(value: &[u8]) -> Result<u32> {
    u32::try_from(decimal(value)?).ok().with_context(|| format!("{} does not fit 32 bits", super::show(value)))
}

/// Seconds with an optional sign and fraction; "-1.25" is 1.25 seconds before 1970.
pub fn time(value: &[u8]) -> Result<Time> {
    let (negative, digits) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let mut parts = digits.splitn(2, |&byte| byte == b'.');
    let whole = i64::try_from(decimal(parts.next().unwrap_or_default())?).ok().context("a time is out of range")?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        bail!("{} is not a time", super::show(value));
    }
    let nanoseconds = (0..9).fold(0, |nanos, at| nanos * 10 + fraction.get(at).map_or(0, |d| u32::from(d - b'0')));
    Ok(match (negative, nanoseconds) {
        (false, _) => Time { seconds: whole, nanoseconds },
        (true, 0) => Time { seconds: -whole, nanoseconds: 0 },
        (true, _) => Time { seconds: -whole - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

/// Undoes "%41"; anything else stays as it is.
fn unescape(name: &[u8]) -> Vec<u8> {
    let hex = |at: usize| name.get(at).and_then(|&byte| char::from(byte).to_digit(16));
    let mut plain = Vec::with_capacity(name.len());
    let mut at = 0;
    while let Some(&byte) = name.get(at) {
        match (byte, hex(at + 1), hex(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                plain.push((high * 16 + low) as u8);
                at += 3;
            }
            _ => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    plain
}
