//! Layers as they come: gzip (several members), zstd (several frames) or plain tar, told apart by their first bytes.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// The largest zstd window: memory that the decoder needs (`zstd --ultra -22` uses 128 MiB only with `--long`).
const MAX_WINDOW: u64 = 100 << 20;
const BUFFER: usize = 256 << 10;
const ZSTD_MAGIC: u32 = 0xfd2f_b528;

/// The decompressed stream of `reader`.
pub fn decompress<'a>(reader: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut reader = BufReader::with_capacity(BUFFER, reader);
    let mut start = [0; 6];
    let known = fill(&mut reader, &mut start)?;
    let whole = io::Cursor::new(start.get(..known).unwrap_or_default().to_vec()).chain(reader);
    Ok(match start {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(whole)),
        [a, b, c, d, ..] if u32::from_le_bytes([a, b, c, d]) == ZSTD_MAGIC => Box::new(Zstd::new(whole)),
        [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Box::new(Zstd::new(whole)),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => return Err(unsupported("xz")),
        [b'B', b'Z', b'h', ..] => return Err(unsupported("bzip2")),
        _ => Box::new(whole),
    })
}

fn unsupported(name: &str) -> io::Error {
    io::Error::other(format!("the layer is compressed with {name}: push the image again with gzip or zstd"))
}

/// Reads until the buffer is full or the stream ends.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut known = 0;
    while let Some(rest) = buffer.get_mut(known..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) => break,
            Ok(length) => known += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(known)
}

fn damaged(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("damaged zstd stream: {what}"))
}

/// Decodes one zstd frame after the other (RFC 8878 section 3), skippable ones left out.
struct Zstd<R> {
    source: R,
    decoder: FrameDecoder,
    inside: bool,
}

impl<R: BufRead> Zstd<R> {
    fn new(source: R) -> Zstd<R> {
        Zstd { source, decoder: FrameDecoder::new(), inside: false }
    }

    /// Goes to the next frame; false at the end of the stream.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            let mut magic = [0; 4];
            match fill(&mut self.source, &mut magic)? {
                0 => return Ok(false),
                4 => {}
                _ => return Err(damaged("it ends within a frame's header")),
            }
            match u32::from_le_bytes(magic) {
                ZSTD_MAGIC => break,
                0x184d_2a50..=0x184d_2a5f => {
                    let mut length = [0; 4];
                    self.source.read_exact(&mut length)?;
                    let length = u64::from(u32::from_le_bytes(length));
                    if io::copy(&mut (&mut self.source).take(length), &mut io::sink())? != length {
                        return Err(damaged("it ends within a skippable frame"));
                    }
                }
                other => return Err(damaged(format!("unknown frame {other:#x}"))),
            }
        }
        let header = self.header()?;
        self.decoder.reset(&header[..]).map_err(damaged)?;
        self.inside = true;
        Ok(true)
    }

    /// Reads a frame's header, and refuses a window that needs too much memory: the decoder itself does not look
    /// at its first frame's.
    fn header(&mut self) -> io::Result<Vec<u8>> {
        let mut descriptor = [0; 1];
        self.source.read_exact(&mut descriptor)?;
        let [flags] = descriptor;
        let single_segment = flags & 0x20 != 0;
        let window_length = usize::from(!single_segment);
        let dictionary_length = [0, 1, 2, 4][usize::from(flags & 3)];
        let size_length = match (flags >> 6, single_segment) {
            (0, false) => 0,
            (0, true) => 1,
            (1, _) => 2,
            (2, _) => 4,
            _ => 8,
        };
        let mut rest = vec![0; window_length + dictionary_length + size_length];
        self.source.read_exact(&mut rest)?;
        let window = if single_segment {
            let size = rest.iter().skip(dictionary_length).rev().fold(0_u64, |size, byte| size << 8 | u64::from(*byte));
            if size_length == 2 { size.saturating_add(256) } else { size }
        } else {
            let byte = rest.first().copied().unwrap_or_default();
            let base = 1_u64 << (10 + (byte >> 3));
            base + base / 8 * u64::from(byte & 7)
        };
        if window > MAX_WINDOW {
            return Err(damaged(format!(
                "its window of {} MiB is larger than {} MiB: compress it again without --long",
                window >> 20,
                MAX_WINDOW >> 20
            )));
        }
        let mut header = ZSTD_MAGIC.to_le_bytes().to_vec();
        header.push(flags);
        header.append(&mut rest);
        Ok(header)
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if self.inside {
                while self.decoder.can_collect() < buffer.len() && !self.decoder.is_finished() {
                    let wanted = buffer.len() - self.decoder.can_collect();
                    let strategy = BlockDecodingStrategy::UptoBytes(wanted);
                    self.decoder.decode_blocks(&mut self.source, strategy).map_err(damaged)?;
                }
                let length = self.decoder.read(buffer)?;
                if length > 0 {
                    return Ok(length);
                }
                self.inside = false;
            }
            if !self.next_frame()? {
                return Ok(0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    fn all(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = vec![];
        decompress(bytes)?.read_to_end(&mut out)?;
        Ok(out)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(vec![], Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        compress_to_vec(bytes, CompressionLevel::Fastest)
    }

    #[test]
    fn every_form_gives_the_same_bytes() {
        let text: Vec<u8> = (0..300_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let (first, second) = text.split_at(100_001);
        let skippable = [&0x184d_2a5a_u32.to_le_bytes()[..], &3_u32.to_le_bytes(), b"abc"].concat();
        for (name, packed) in [
            ("plain", text.clone()),
            ("gzip", gzip(&text)),
            ("gzip members", [gzip(first), gzip(second)].concat()),
            ("zstd", zstd(&text)),
            ("zstd frames", [zstd(first), skippable.clone(), zstd(second)].concat()),
            ("zstd after a skippable frame", [skippable, zstd(&text)].concat()),
        ] {
            assert!(all(&packed).unwrap() == text, "{name}");
        }
        for short in [&b""[..], b"a", b"\x1f"] {
            assert_eq!(all(short).unwrap(), short);
        }
    }

    #[test]
    fn layers_made_to_be_fetched_in_parts_are_ordinary_ones() {
        let text: Vec<u8> = (0..50_000_u32).flat_map(u32::to_le_bytes).collect();
        let parts = text.chunks(30_001);
        // eStargz: a gzip member for each file, and a last one that is empty and tells in its extra field where the
        // table of contents is.
        let mut stargz = parts.clone().map(gzip).collect::<Vec<_>>().concat();
        let extra = [&b"SG"[..], &22_u16.to_le_bytes(), b"00000000000c3500STARGZ"].concat();
        let mut footer = flate2::GzBuilder::new().extra(extra).write(vec![], Compression::none());
        footer.flush().unwrap();
        stargz.extend(footer.finish().unwrap());
        assert!(all(&stargz).unwrap() == text);
        // zstd:chunked: a frame for each file, then skippable ones with the table of contents and where it is.
        let skippable = |content: &[u8]| {
            [&0x184d_2a50_u32.to_le_bytes()[..], &(content.len() as u32).to_le_bytes(), content].concat()
        };
        let mut chunked = parts.map(zstd).collect::<Vec<_>>().concat();
        chunked.extend(skippable(&zstd(b"{\"version\":1,\"entries\":[]}")));
        chunked.extend(skippable(&[7; 64]));
        assert!(all(&chunked).unwrap() == text);
    }

    #[test]
    fn damaged_streams_are_errors() {
        let text = vec![7; 200_000];
        for packed in [gzip(&text), zstd(&text)] {
            for end in [7, packed.len() / 2, packed.len() - 1] {
                assert!(all(&packed[..end]).is_err(), "cut at {end} of {}", packed.len());
            }
        }
        assert!(all(&[&zstd(&text)[..], b"junk"].concat()).is_err());
        assert!(all(&[&gzip(&text)[..], b"junk"].concat()).is_err());
        for at in 4..60 {
            let mut packed = zstd(&text);
            if let Some(byte) = packed.get_mut(at) {
                *byte ^= 0xff;
            }
            let _ = all(&packed); // an error or other bytes, but no panic
        }
    }

    #[test]
    fn a_huge_window_is_refused_before_memory_is_taken() {
        // Frame header: no single segment, window descriptor 0xff: 2^41 * 1.875 bytes.
        let bomb = [&ZSTD_MAGIC.to_le_bytes()[..], &[0x00, 0xff, 1, 0, 0]].concat();
        assert!(all(&bomb).unwrap_err().to_string().contains("larger than 100 MiB"));
        // A single segment that claims 2^62 bytes.
        let bomb = [&ZSTD_MAGIC.to_le_bytes()[..], &[0xe0, 0, 0, 0, 0, 0, 0, 0, 0x40, 1, 0, 0]].concat();
        assert!(all(&bomb).unwrap_err().to_string().contains("larger than 100 MiB"));
    }

    #[test]
    fn forms_that_no_registry_should_hold_are_named() {
        assert!(all(b"\xfd7zXZ\0rest").unwrap_err().to_string().contains("compressed with xz"));
        assert!(all(b"BZh91AY").unwrap_err().to_string().contains("compressed with bzip2"));
    }
}
