//! Images whose digests are right and whose content means harm: each ends in an error, soon, with nothing left behind;
//! and a few that look as if they did and are legal.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use puter::image::{Digest, PullOptions};

use super::hostile::{assert_says, honest};
use super::image::{Sample, config, entry, files, gzip, options, pull, tar};
use super::odds::check_sample;
use super::server::{Reply, Server};

/// Pulls an image of that one layer, whose decompressed form is `tar`.
fn refused(tar: &[u8], layer: Vec<u8>, options: &PullOptions) -> String {
    let sample = Sample::of(tar, layer);
    let server = Server::start(move |request| honest(&sample, request));
    let directory = tempfile::tempdir().unwrap();
    let began = Instant::now();
    let error = pull(directory.path(), &format!("{}/app:1", server.address), options).unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(20), "{:?} for: {error}", began.elapsed());
    assert_eq!(files(directory.path()), [""; 0], "after: {error}");
    error
}

fn record(key: &str, value: &str) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let length = (1..).map(|digits| rest + digits).find(|n| n.to_string().len() == n - rest).unwrap();
    format!("{length} {key}={value}\n").into_bytes()
}

/// An entry with an extended header of these records before it.
fn extended(records: &[(&str, &str)], then: Vec<u8>) -> Vec<u8> {
    let records: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
    [entry("pax", b'x', 0o644, "", &records), then].concat()
}

#[test]
fn layers_that_lead_out_or_nowhere_are_refused() {
    for (entries, reason) in [
        (vec![entry("../../etc/passwd", b'0', 0o644, "", b"x")], "leads out of the root"),
        (vec![entry("a", b'1', 0o644, "missing", b"")], "hard link to \"missing\", which is not there"),
        (vec![entry("a", b'1', 0o644, "/../../etc/shadow", b"")], "leads out of the root"),
        (vec![entry("a", b'2', 0o777, "a", b""), entry("a/b", b'0', 0o644, "", b"x")], "too many symbolic links"),
        (vec![entry("a", b'0', 0o644, "", b"x"), entry("a/b", b'0', 0o644, "", b"x")], "not a directory"),
        (vec![entry("lost+found", b'0', 0o644, "", b"x")], "lost+found must be a directory"),
        (vec![b"no archive at all ".repeat(100)], "checksum"),
    ] {
        let tar = tar(&entries);
        assert_says(&refused(&tar, gzip(&tar), &options()), &[reason]);
    }
}

#[test]
fn layers_of_endless_zeros_are_refused_by_their_headers() {
    // More than an image may hold, then more than is allowed here, in two files.
    let huge = extended(&[("size", "549755813888")], entry("zeros", b'0', 0o644, "", b""));
    let tar = tar(&[huge, vec![0; 1 << 20]]);
    assert_says(&refused(&tar, gzip(&tar), &options()), &["\"zeros\"", "more than 274877906944 bytes"]);
    let half = |name: &str| entry(name, b'0', 0o644, "", &vec![0; 700_000]);
    let tar = super::image::tar(&[half("one"), half("two")]);
    let few = PullOptions { max_unpacked: 1 << 20, ..options() };
    assert_says(&refused(&tar, gzip(&tar), &few), &["\"two\"", "more than 1048576 bytes"]);
    // What follows the archive counts as well, where no header tells of it.
    let tar = [super::image::tar(&[entry("a", b'0', 0o644, "", b"x")]), vec![0; 64 << 20]].concat();
    assert_says(&refused(&tar, gzip(&tar), &few), &["hold more data than an image may have"]);
    // A header that has no end.
    let tar = [entry("a", b'x', 0o644, "", b"")[..124].to_vec(), b"77777777777\0".to_vec(), vec![0; 888]].concat();
    assert_says(&refused(&tar, gzip(&tar), &options()), &["layer 1 of 1"]);
}

#[test]
fn streams_that_need_too_much_memory_or_end_early_are_refused() {
    // Frame header: no single segment, window descriptor 0xff.
    let window = [&0xfd2f_b528_u32.to_le_bytes()[..], &[0x00, 0xff, 1, 0, 0]].concat();
    assert_says(&refused(b"x", window, &options()), &["larger than 100 MiB", "--long"]);
    let whole = tar(&[entry("a", b'0', 0o644, "", &vec![7; 100_000])]);
    let packed = gzip(&whole);
    let cut = packed[..packed.len() / 2].to_vec();
    assert_says(&refused(&whole, cut, &options()), &["layer 1 of 1"]);
    assert_says(&refused(b"x", b"\xfd7zXZ\0rest".to_vec(), &options()), &["compressed with xz"]);
}

#[test]
fn a_file_of_nothing_but_a_hole_is_made_at_once() {
    let sparse = [
        ("GNU.sparse.major", "0"),
        ("GNU.sparse.minor", "1"),
        ("GNU.sparse.name", "hole"),
        ("GNU.sparse.size", "1000000000000"),
        ("GNU.sparse.numblocks", "0"),
        ("GNU.sparse.map", ""),
    ];
    let tar = tar(&[extended(&sparse, entry("hole", b'0', 0o644, "", b""))]);
    let sample = Sample::of(&tar, gzip(&tar));
    let server = Server::start(move |request| honest(&sample, request));
    let directory = tempfile::tempdir().unwrap();
    let image = pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap();
    let disk = std::fs::metadata(&image.disk).unwrap();
    assert!(disk.blocks() * 512 < 32 << 20 && disk.len() < 2 << 30, "{disk:?}");
    // Two of them are more than an image may have.
    let two = |name| extended(&sparse, entry(name, b'0', 0o644, "", b""));
    let tar = super::image::tar(&[two("a"), two("b")]);
    assert_says(&refused(&tar, gzip(&tar), &options()), &["the image's files have more than"]);
}

/// A registry of documents and blobs by their digests; the tag leads to `top`.
fn registry(top: &str, blobs: Vec<Vec<u8>>) -> Server {
    registry_that(top, blobs, || ())
}

/// The same, which does something before it answers with a blob or a document.
pub fn registry_that(top: &str, blobs: Vec<Vec<u8>>, first: impl Fn() + Send + Sync + 'static) -> Server {
    let blobs: BTreeMap<String, Vec<u8>> =
        blobs.into_iter().map(|bytes| (Digest::of(&bytes).to_string(), bytes)).collect();
    let (top, blobs) = (top.to_string(), Arc::new(blobs));
    Server::start(move |request| match request.path.rsplit('/').next() {
        Some("1") => Reply::new(200, top.as_str()),
        Some(digest) => {
            first();
            blobs.get(digest).map_or(Reply::new(404, ""), |bytes| Reply::new(200, bytes.clone()))
        }
        None => Reply::new(404, ""),
    })
}

pub fn manifest(config: &[u8], layers: &[(Digest, usize)]) -> String {
    let list: Vec<_> =
        layers.iter().map(|(digest, size)| format!(r#"{{"digest":"{digest}","size":{size}}}"#)).collect();
    let (digest, size) = (Digest::of(config), config.len());
    format!(r#"{{"schemaVersion":2,"config":{{"digest":"{digest}","size":{size}}},"layers":[{}]}}"#, list.join(","))
}

#[test]
fn the_same_layer_twice_is_fetched_once_and_applied_twice() {
    let sample = Sample::new();
    let mut base = vec![];
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&sample.layer[..]), &mut base).unwrap();
    let gone = tar(&[entry("boot/.wh.vmlinuz-6.1.0-31", b'0', 0o644, "", b"")]);
    let (full, empty) = ((sample.digest(), sample.layer.len()), (Digest::of(&gone), gone.len()));
    let config = config(&[Digest::of(&base), Digest::of(&gone), Digest::of(&base)]);
    let top = manifest(&config, &[full, empty, full]);
    let server = registry(&top, vec![config, sample.layer.clone(), gone]);
    let directory = tempfile::tempdir().unwrap();
    // The kernel that the second layer takes away is back with the third.
    check_sample(&pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap());
    assert_eq!(server.seen(&format!("/v2/app/blobs/{}", sample.digest())).len(), 1);
}

#[test]
fn a_layer_with_two_sizes_is_refused() {
    let sample = Sample::new();
    for other in [sample.layer.len() - 1, sample.layer.len() + 1] {
        let config = config(&[Digest::of(b"a"), Digest::of(b"b")]);
        let top = manifest(&config, &[(sample.digest(), sample.layer.len()), (sample.digest(), other)]);
        let server = registry(&top, vec![config, sample.layer.clone()]);
        let directory = tempfile::tempdir().unwrap();
        let error = pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap_err();
        assert_says(&error, &["layer ", "gives two sizes"]);
        assert_eq!(files(directory.path()), [""; 0], "{error}");
    }
}

#[test]
fn a_thousand_layers_are_refused_before_anything_is_fetched() {
    let config = config(&[]);
    let layers: Vec<_> = (0..1000_u32).map(|number| (Digest::of(&number.to_le_bytes()), 10)).collect();
    let server = registry(&manifest(&config, &layers), vec![config]);
    let directory = tempfile::tempdir().unwrap();
    let error = pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap_err();
    assert_says(&error, &["it has 1000 layers: more than 512 are refused"]);
    assert_eq!(server.seen("/").len(), 1);
    assert_eq!(files(directory.path()), [""; 0]);
}

#[test]
fn indexes_of_indexes_without_end_are_refused() {
    let platform = format!(r#""platform":{{"os":"linux","architecture":"{}"}}"#, super::image::ARCHITECTURE);
    let mut documents = vec![b"{}".to_vec()];
    for _ in 0..6 {
        let inner = documents.last().unwrap();
        let (digest, size) = (Digest::of(inner), inner.len());
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{{"digest":"{digest}","size":{size},{platform}}}]}}"#);
        documents.push(index.into_bytes());
    }
    let top = String::from_utf8(documents.last().unwrap().clone()).unwrap();
    let server = registry(&top, documents);
    let directory = tempfile::tempdir().unwrap();
    let error = pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap_err();
    assert_says(&error, &["nested too deep"]);
    assert!(server.seen("/").len() <= 4);
    // One that names itself by a digest of its own choice is not what it was asked for.
    let lie =
        format!(r#"{{"schemaVersion":2,"manifests":[{{"digest":"{}","size":5,{platform}}}]}}"#, Digest::of(b"itself"));
    let server = Server::start(move |_| Reply::new(200, lie.as_str()));
    let error = pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap_err();
    assert_says(&error, &["answers with the wrong manifest"]);
    assert_eq!(files(directory.path()), [""; 0]);
}

#[test]
fn pipes_in_a_layout_are_no_files() {
    use std::os::unix::ffi::OsStrExt;
    let directory = tempfile::tempdir().unwrap();
    let layout = directory.path().join("layout");
    std::fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    let store = directory.path().join("store");
    let digest = Digest::of(b"");
    let index = format!(r#"{{"schemaVersion":2,"manifests":[{{"digest":"{digest}","size":0}}]}}"#);
    std::fs::write(layout.join("index.json"), index).unwrap();
    let pipe = layout.join("blobs/sha256").join(digest.hex());
    rustix::fs::mknodat(
        rustix::fs::CWD,
        pipe.as_os_str().as_bytes(),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let error = pull(&store, &format!("oci:{}", layout.display()), &options()).unwrap_err();
    assert_says(&error, &["is no regular file"]);
    let error = pull(&store, &format!("docker-archive:{}", pipe.display()), &options()).unwrap_err();
    assert_says(&error, &["is no regular file"]);
    assert_eq!(files(&store), [""; 0]);
}
