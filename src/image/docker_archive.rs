//! Images in a tar file, as `docker save`, `podman save` and skopeo's `docker-archive:` write it.
//!
//! `manifest.json` names the configuration and the layers by their paths inside the archive. Only headers are read
//! here: the layers stay where they are in the file.

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::digest::{Digest, clip};
use super::manifest::{self, MAX_CONFIG, MAX_MANIFEST};
use super::source::{Layer, Plan, check_total, open_file, read_part};

const BLOCK: u64 = 512;
const MAX_ENTRIES: usize = 20_000;
const MAX_EXTENSION: u64 = 1 << 20;

/// What lies at a path inside the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Member {
    File {
        offset: u64,
        length: u64,
    },
    /// A link to another path (docker writes one for a layer that occurs twice).
    Link(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Finds an image in the archive.
pub(crate) fn plan(file: &Path, tag: Option<&str>, architecture: &str, max_download: u64) -> Result<Plan> {
    find(file, tag, architecture, max_download).with_context(|| format!("in {}", file.display()))
}

fn find(file: &Path, tag: Option<&str>, architecture: &str, max_download: u64) -> Result<Plan> {
    let opened = open_file(file)?;
    let size = opened.metadata().with_context(|| format!("cannot read {}", file.display()))?.len();
    let members = scan(&mut BufReader::new(opened), size)?;
    let read = |name: &str, limit: u64| match resolve(&members, name) {
        Some((offset, length)) => read_part(file, offset, length, limit),
        None => bail!("it holds no '{}'", clip(name)),
    };
    let text = read("manifest.json", MAX_MANIFEST)
        .context("it is no archive of 'docker save' or 'podman save --format docker-archive'")?;
    let entries: Vec<Entry> = serde_json::from_slice(&text).context("its manifest.json cannot be understood")?;
    let entry = choose(&entries, tag)?;
    let config = read(&entry.config, MAX_CONFIG)?;
    let checked = manifest::parse_config(&config, entry.layers.len(), architecture)?;
    let mut layers = vec![];
    for (name, diff_id) in entry.layers.iter().zip(checked.diff_ids) {
        let Some((offset, length)) = resolve(&members, name) else { bail!("it lacks the layer '{}'", clip(name)) };
        layers.push(Layer { path: file.to_path_buf(), offset, length, digest: None, diff_id, arrival: None });
    }
    check_total(layers.iter().map(|layer| layer.length), max_download)?;
    Ok(Plan { digest: Digest::of(&config), architecture: checked.architecture, config, layers })
}

fn choose<'a>(entries: &'a [Entry], tag: Option<&str>) -> Result<&'a Entry> {
    let names = |entry: &'a Entry| entry.repo_tags.iter().flatten();
    let all = || entries.iter().flat_map(names).take(20).map(|name| clip(name)).collect::<Vec<_>>().join(", ");
    match (entries, tag) {
        ([], _) => bail!("it holds no image"),
        ([one], None) => Ok(one),
        (_, None) => bail!("it holds several images: add ':NAME' to choose one of {}", all()),
        (_, Some(tag)) => {
            // `app` and `app:latest` are the same, and the registry may be left out.
            let fits = |name: &&String| {
                let full = if tag.contains(':') { tag.to_string() } else { format!("{tag}:latest") };
                name.as_str() == tag
                    || **name == full
                    || name.ends_with(&format!("/{full}"))
                    || name.rsplit_once(':').is_some_and(|(_, last)| last == tag)
            };
            match entries.iter().find(|entry| names(entry).any(|name| fits(&name))) {
                Some(entry) => Ok(entry),
                None => bail!("it holds no image '{}'; it has: {}", clip(tag), all()),
            }
        }
    }
}

/// Where the content of `name` lies: offset and length.
pub fn resolve(members: &BTreeMap<String, Member>, name: &str) -> Option<(u64, u64)> {
    let mut name = name.to_string();
    for _ in 0..4 {
        match members.get(&name)? {
            Member::File { offset, length } => return Some((*offset, *length)),
            Member::Link(target) => {
                let mut parts: Vec<&str> = name.split('/').collect();
                parts.pop();
                for part in target.split('/') {
                    match part {
                        "" | "." => {}
                        ".." => drop(parts.pop()),
                        part => parts.push(part),
                    }
                }
                name = parts.join("/");
            }
        }
    }
    None
}

/// Lists the archive's members (POSIX.1-2017 pax, "ustar Interchange Format", and GNU's long names).
///
/// # Errors
/// When it is no archive, is cut off, or holds more than an image does.
pub fn scan(reader: &mut (impl Read + Seek), size: u64) -> Result<BTreeMap<String, Member>> {
    let mut members = BTreeMap::new();
    let mut position = 0_u64;
    let mut name: Option<String> = None;
    let mut length: Option<u64> = None;
    while position.saturating_add(BLOCK) <= size {
        reader.seek(SeekFrom::Start(position)).context("cannot seek")?;
        let mut header = [0; BLOCK as usize];
        reader.read_exact(&mut header).context("cannot read a header")?;
        if header.iter().all(|byte| *byte == 0) {
            break;
        }
        if header.starts_with(&[0x1f, 0x8b]) {
            bail!("it is compressed with gzip: decompress it with gunzip first");
        }
        let own = header_size(&header).context("it is no tar archive, or it is damaged")?;
        let kind = header[156];
        let extension = matches!(kind, b'x' | b'g' | b'L' | b'K');
        let content = if extension { own } else { length.take().unwrap_or(own) };
        let offset = position + BLOCK;
        let end = offset.checked_add(content).filter(|end| *end <= size).context("it is cut off")?;
        if extension {
            if content > MAX_EXTENSION {
                bail!("a header of {content} bytes: refused");
            }
            let mut bytes = vec![0; usize::try_from(content)?];
            reader.read_exact(&mut bytes).context("cannot read a header")?;
            match kind {
                b'x' => {
                    name = pax(&bytes, "path").or(name);
                    length = pax(&bytes, "size").and_then(|text| text.parse().ok());
                }
                b'L' => name = Some(text(&bytes)),
                _ => {}
            }
        } else {
            let path = name.take().unwrap_or_else(|| header_name(&header));
            let path = path.trim_start_matches("./").to_string();
            let member = match kind {
                b'0' | 0 | b'7' => Some(Member::File { offset, length: content }),
                b'1' => Some(Member::Link(format!(
                    "{}{}",
                    "../".repeat(path.matches('/').count()),
                    text(&header[157..257])
                ))),
                b'2' => Some(Member::Link(text(&header[157..257]))),
                _ => None,
            };
            if let Some(member) = member {
                members.insert(path, member);
            }
            if members.len() > MAX_ENTRIES {
                bail!("it holds more than {MAX_ENTRIES} files: it is no image archive");
            }
        }
        position = end.div_ceil(BLOCK).saturating_mul(BLOCK);
    }
    Ok(members)
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

fn header_name(header: &[u8; 512]) -> String {
    let prefix =
        if &header[257..262] == b"ustar" && header[263] == b'0' { text(&header[345..500]) } else { String::new() };
    let name = text(&header[..100]);
    if prefix.is_empty() { name } else { format!("{prefix}/{name}") }
}

/// The size field, if the header's checksum is right.
fn header_size(header: &[u8; 512]) -> Option<u64> {
    let sum: u64 =
        header.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u64::from(*byte) }).sum();
    if octal(&header[148..156])? != sum {
        return None;
    }
    let field = &header[124..136];
    match field.first() {
        // GNU's form for large numbers: a set high bit, then the number in base 256.
        Some(first) if first & 0x80 != 0 => field
            .iter()
            .skip(1)
            .try_fold(u64::from(first & 0x7f), |value, byte| Some(value.checked_mul(256)? | u64::from(*byte))),
        _ => octal(field),
    }
}

fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?.trim_matches(['\0', ' ']);
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

/// The value of a pax record `<length> <key>=<value>\n`.
fn pax(bytes: &[u8], key: &str) -> Option<String> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let space = rest.iter().position(|byte| *byte == b' ')?;
        let length: usize = std::str::from_utf8(rest.get(..space)?).ok()?.parse().ok()?;
        let record = rest.get(space + 1..length)?.strip_suffix(b"\n")?;
        if let Some(value) = record.strip_prefix(key.as_bytes()).and_then(|value| value.strip_prefix(b"=")) {
            return Some(String::from_utf8_lossy(value).into_owned());
        }
        rest = rest.get(length..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn header(name: &str, size: u64, kind: u8, link: &str) -> Vec<u8> {
        let mut block = vec![0; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        block[156] = kind;
        block[157..157 + link.len()].copy_from_slice(link.as_bytes());
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[148..156].fill(b' ');
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        block
    }

    fn member(name: &str, kind: u8, content: &[u8]) -> Vec<u8> {
        let mut bytes = header(name, content.len() as u64, kind, "");
        bytes.extend(content);
        bytes.resize(bytes.len().div_ceil(512) * 512, 0);
        bytes
    }

    fn scan_bytes(bytes: &[u8]) -> Result<BTreeMap<String, Member>> {
        scan(&mut Cursor::new(bytes), bytes.len() as u64)
    }

    #[test]
    fn members_are_found_where_they_lie() {
        let long = "d/".repeat(80) + "layer.tar";
        let record = format!("{} path={long}\n", long.len() + 10);
        let bytes = [
            member("./a", b'0', b"hello"),
            header("b/layer.tar", 0, b'2', "../a"),
            header("c", 0, b'1', "b/layer.tar"),
            member("pax", b'x', record.as_bytes()),
            member("short", b'0', b"x"),
            member("long", b'L', b"named/by/gnu\0"),
            member("short", b'0', b"y"),
            vec![0; 1024],
        ]
        .concat();
        let members = scan_bytes(&bytes).unwrap();
        let content = |name: &str| {
            let (offset, length) = resolve(&members, name)?;
            Some(&bytes[offset as usize..(offset + length) as usize])
        };
        assert_eq!(content("a"), Some(&b"hello"[..]));
        assert_eq!(content("b/layer.tar"), Some(&b"hello"[..]));
        assert_eq!(content("c"), Some(&b"hello"[..]));
        assert_eq!(content(&long), Some(&b"x"[..]));
        assert_eq!(content("named/by/gnu"), Some(&b"y"[..]));
        assert_eq!(content("missing"), None);
    }

    #[test]
    fn hostile_archives_are_errors() {
        let fails = |bytes: &[u8], reason: &str| {
            let error = format!("{:#}", scan_bytes(bytes).unwrap_err());
            assert!(error.contains(reason), "{error}");
        };
        fails(&[&[0x1f, 0x8b][..], &[0; 600]].concat(), "compressed with gzip");
        fails(&[1; 512], "no tar archive");
        fails(&header("a", 1 << 30, b'0', ""), "cut off");
        fails(&[header("a", 2 << 20, b'x', ""), vec![0; 3 << 20]].concat(), "refused");
        let looping = [header("x", 0, b'2', "y"), header("y", 0, b'2', "x")].concat();
        assert_eq!(resolve(&scan_bytes(&looping).unwrap(), "x"), None);
        assert_eq!(pax(b"99999999999999999999 path=x\n", "path"), None);
        assert_eq!(pax(b"3 path=x\n", "path"), None);
        assert_eq!(pax(b"0 path=x\n", "path"), None);
    }

    #[test]
    fn an_image_is_chosen_by_its_name() {
        let entry = |tag: &str| Entry { config: tag.into(), repo_tags: Some(vec![tag.into()]), layers: vec![] };
        let entries = [entry("docker.io/library/a:latest"), entry("localhost/b:1")];
        for (tag, found) in [("a", 0), ("library/a:latest", 0), ("b:1", 1), ("localhost/b:1", 1), ("1", 1)] {
            assert_eq!(choose(&entries, Some(tag)).unwrap().config, entries[found].config, "{tag}");
        }
        let reason = |result: Result<&Entry>| result.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(reason(choose(&entries, Some("c"))).contains("no image 'c'; it has: docker.io/library/a:latest"));
        assert!(reason(choose(&entries, None)).contains("several images"));
        assert!(reason(choose(&[], None)).contains("no image"));
    }
}
