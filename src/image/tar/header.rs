//! The fixed fields of a tar header record.

use anyhow::{Context, Result, ensure};

use super::RECORD;

/// A header record.
pub struct Header<'a>(pub &'a [u8; RECORD]);

impl Header<'_> {
    /// The bytes of a field; offsets and lengths are the format's constants.
    pub fn field(&self, at: usize, length: usize) -> &[u8] {
        &self.0[at..at + length]
    }

    pub fn flag(&self) -> u8 {
        self.0[156]
    }

    pub fn number(&self, at: usize, length: usize) -> Result<u64> {
        let value = signed(self.field(at, length))?;
        u64::try_from(value).ok().with_context(|| format!("the number {value} is negative"))
    }

    pub fn number_u32(&self, at: usize, length: usize) -> Result<u32> {
        let value = self.number(at, length)?;
        u32::try_from(value).ok().with_context(|| format!("the number {value} does not fit 32 bits"))
    }

    pub fn size(&self) -> Result<u64> {
        self.number(124, 12).context("its size")
    }

    /// The name, with ustar's or star's prefix before it. GNU keeps other fields in the prefix's place.
    pub fn path(&self) -> Vec<u8> {
        let name = cut(self.field(0, 100));
        let prefix = match self.field(257, 6) {
            b"ustar\0" if self.field(508, 4) == b"tar\0" => cut(self.field(345, 131)),
            b"ustar\0" => cut(self.field(345, 155)),
            _ => &[],
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    /// Checks the sum over the header; some old writers summed signed bytes.
    pub fn verify(&self) -> Result<()> {
        let stored = signed(self.field(148, 8)).context("its checksum")?;
        let bytes = || self.0.iter().enumerate().map(|(at, &byte)| if (148..156).contains(&at) { b' ' } else { byte });
        let unsigned: i64 = bytes().map(i64::from).sum();
        let as_signed: i64 = bytes().map(|byte| i64::from(byte as i8)).sum();
        ensure!(stored == unsigned || stored == as_signed, "its checksum is {stored}, not {unsigned}");
        Ok(())
    }
}

/// The bytes before the first NUL.
pub fn cut(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// A number in octal digits, or in base 256 when the first bit is set.
pub fn signed(field: &[u8]) -> Result<i64> {
    if let Some((&first, rest)) = field.split_first().filter(|(first, _)| *first & 0x80 != 0) {
        // Two's complement: the second bit is the sign.
        let start = if first & 0x40 != 0 { i64::from(first as i8) } else { i64::from(first & 0x7f) };
        return rest
            .iter()
            .try_fold(start, |value, &byte| value.checked_mul(256)?.checked_add(i64::from(byte)))
            .context("a number is out of range");
    }
    let text = field.trim_ascii_start();
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit());
    let mut value: i64 = 0;
    let mut length = 0;
    for &digit in digits {
        ensure!(digit < b'8', "the number {} is not octal", super::show(field));
        value = value
            .checked_mul(8)
            .and_then(|v| v.checked_add(i64::from(digit - b'0')))
            .context("a number is out of range")?;
        length += 1;
    }
    let rest = text.get(length..).unwrap_or_default();
    ensure!(rest.iter().all(|byte| matches!(byte, 0 | b' ')), "the number {} is not octal", super::show(field));
    Ok(value)
}
