//! Downloads blobs: several at once, taken up again where a connection broke, verified before they get their name.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use ureq::http::HeaderMap;

use super::arrival::{Arrival, Arrivals};
use super::digest::{Digest, Hasher};
use super::files::{self, Directory};
use super::http::{Transport, text_header};
use super::manifest::Descriptor;
use super::registry::Registry;
use crate::failpoint::reach;

const CHUNK: usize = 128 << 10;
/// A connection that brought this much before it broke does not count as a failed try.
const PROGRESS: u64 = 1 << 20;

/// What a pull's threads tell the one that watches.
pub(crate) enum Event {
    Total(usize, u64),
    Begin(Digest, u64),
    Advance(Digest, u64),
    End(Digest),
    Note(String),
}

/// Downloads those of `layers` that `arrivals` has, lowest first.
pub(crate) fn download_all(
    registry: &Registry,
    directory: &Directory,
    layers: &[Descriptor],
    arrivals: &Arrivals,
    (parallel, retries): (usize, u32),
    events: &Sender<Event>,
) -> Result<()> {
    let mut missing: VecDeque<(&Descriptor, &Arrival)> = VecDeque::new();
    for layer in layers {
        let known = missing.iter().any(|(one, _)| one.digest == layer.digest);
        if let Some(arrival) = arrivals.get(&layer.digest).filter(|_| !known) {
            missing.push_back((layer, arrival));
        }
    }
    let total = missing.iter().map(|(layer, _)| layer.size).fold(0, u64::saturating_add);
    files::check_space(&directory.root, total)?;
    let _ = events.send(Event::Total(missing.len(), total));
    let workers = parallel.clamp(1, 16).min(missing.len());
    let queue = Mutex::new(missing);
    let failure: Mutex<Option<anyhow::Error>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                while let Some((layer, arrival)) = next() {
                    if let Err(error) = download(registry, directory, layer, arrival, retries, events) {
                        // The first error is the cause; the others only say that they were stopped.
                        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                        registry.stop.set();
                        return;
                    }
                }
            });
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Removes the file unless it was given its final name.
struct Partial<'a>(&'a Path);

impl Drop for Partial<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0);
    }
}

fn download(
    registry: &Registry,
    directory: &Directory,
    layer: &Descriptor,
    arrival: &Arrival,
    retries: u32,
    events: &Sender<Event>,
) -> Result<()> {
    let _ = events.send(Event::Begin(layer.digest, layer.size));
    // Whoever downloads the same layer for another image holds this lock.
    let lock =
        files::lock(&directory.temporary(&format!("blob-{}.lock", layer.digest.hex())), &|| registry.stop.check());
    let _lock = lock?;
    if !directory.has_blob(&layer.digest, layer.size) {
        let path = directory.temporary(&format!("blob-{}", layer.digest.hex()));
        let _partial = Partial(&path);
        let cannot = || format!("cannot write {}", path.display());
        let mut options = OpenOptions::new();
        let mut file =
            options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&path).with_context(cannot)?;
        arrival.begin(file.try_clone().with_context(cannot)?);
        let advance = |done| {
            arrival.advance(done);
            let _ = events.send(Event::Advance(layer.digest, done));
        };
        fetch(registry, layer, &mut file, retries, &advance, events)
            .with_context(|| format!("layer {}", layer.digest.short()))?;
        file.sync_all().with_context(cannot)?;
        reach("image pull: layer fetched");
        files::rename(&path, &directory.blob(&layer.digest))?;
        reach("image pull: layer here");
    }
    arrival.end(directory.blob(&layer.digest));
    let _ = events.send(Event::End(layer.digest));
    Ok(())
}

fn fetch(
    registry: &Registry,
    layer: &Descriptor,
    file: &mut File,
    retries: u32,
    advance: &dyn Fn(u64),
    events: &Sender<Event>,
) -> Result<()> {
    let mut hasher = Hasher::default();
    let mut done = 0;
    let mut failures = 0;
    // The most that was ever here: a server that begins anew each time makes no progress.
    let mut most = 0;
    while done < layer.size || done == 0 {
        match attempt(registry, layer, file, &mut hasher, &mut done, advance) {
            Ok(()) => break,
            Err(error) => {
                let Some(transport) = error.downcast_ref::<Transport>() else { return Err(error) };
                if done >= most + PROGRESS {
                    failures = 0;
                    most = done;
                }
                // A registry that hangs has taken its time already.
                let allowed = if transport.timeout { retries.min(1) } else { retries };
                if failures >= allowed {
                    return Err(error);
                }
                let _ = events.send(Event::Note(format!("{error}; trying again from byte {done}")));
                registry.stop.sleep(Duration::from_millis(200 << failures.min(5)))?;
                failures += 1;
            }
        }
    }
    let found = hasher.finish();
    if found != layer.digest {
        bail!(
            "{} sends wrong content: its digest is {found} instead of {}; nothing of it is used. \
             Try again; if it stays so, the registry's copy is damaged: push the image again",
            registry.reference.host(),
            layer.digest
        );
    }
    Ok(())
}

/// One request; appends what it brings to the file. `Ok` means that all bytes are here.
fn attempt(
    registry: &Registry,
    layer: &Descriptor,
    file: &mut File,
    hasher: &mut Hasher,
    done: &mut u64,
    advance: &dyn Fn(u64),
) -> Result<()> {
    let (mut response, url) = registry.blob(&layer.digest, *done)?;
    let host = &url.authority;
    let wrong_size = |size: u64| {
        let expected = layer.size;
        anyhow!(
            "{host} lies about the size: the manifest says {expected} bytes, the registry {size}; push the image again"
        )
    };
    let start = match response.status().as_u16() {
        206 => content_range(response.headers()).with_context(|| format!("{host} sends a part without its range"))?,
        _ => 0,
    };
    if start != *done {
        if start != 0 {
            bail!("{host} sends bytes from {start} on instead of {done}: its answers to ranges cannot be used");
        }
        // The server does not know ranges: begin anew.
        *done = 0;
        *hasher = Hasher::default();
        advance(0);
        file.rewind().and_then(|()| file.set_len(0)).context("cannot truncate the download")?;
    }
    if let Some(length) = response.body().content_length()
        && start.saturating_add(length) != layer.size
    {
        return Err(wrong_size(start.saturating_add(length)));
    }
    let mut reader = response.body_mut().as_reader();
    let mut buffer = vec![0; CHUNK];
    loop {
        registry.stop.check()?;
        let length = reader.read(&mut buffer).map_err(|error| registry.client.explain_io(host, error))?;
        let Some(bytes) = buffer.get(..length) else { bail!("the HTTP client returned too much") };
        if bytes.is_empty() {
            break;
        }
        if *done + length as u64 > layer.size {
            return Err(wrong_size(*done + length as u64));
        }
        file.write_all(bytes).context("cannot write the download")?;
        hasher.update(bytes);
        *done += length as u64;
        advance(*done);
    }
    if *done < layer.size {
        let error = std::io::Error::new(
            std::io::ErrorKind::UnexpectedEof,
            format!("it ended after {done} of {} bytes", layer.size),
        );
        return Err(registry.client.explain_io(host, error));
    }
    Ok(())
}

/// The first byte's position in `Content-Range: bytes 5-9/10` (RFC 9110 section 14.4).
fn content_range(headers: &HeaderMap) -> Option<u64> {
    text_header(headers, "content-range")?.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_range_gives_its_first_byte() {
        let range = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("content-range", value.parse().unwrap());
            content_range(&headers)
        };
        assert_eq!(range("bytes 5-9/10"), Some(5));
        assert_eq!(range("bytes 0-0/*"), Some(0));
        for bad in ["", "bytes */10", "items 5-9/10", "bytes x-9/10", "bytes 99999999999999999999-9/10"] {
            assert_eq!(range(bad), None, "{bad}");
        }
    }
}
