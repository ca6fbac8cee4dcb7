//! What a hostile or broken registry can do: each ends in an error that says what, and leaves nothing behind.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use puter::image::{Digest, PullOptions, Store, is_cancelled};

use super::image::{Sample, Watch, files, noise, options, pull};
use super::server::{Reply, Request, Server};

/// Answers as an honest registry would.
pub fn honest(sample: &Sample, request: &Request) -> Reply {
    let path = request.path.as_str();
    if path.starts_with("/v2/app/manifests/") {
        Reply::new(200, sample.manifest.as_str()).with("Content-Type", "application/vnd.oci.image.manifest.v1+json")
    } else if path == format!("/v2/app/blobs/{}", Digest::of(&sample.config)) {
        Reply::new(200, sample.config.clone())
    } else if path == format!("/v2/app/blobs/{}", sample.digest()) {
        let from =
            request.header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        match from {
            None => Reply::new(200, sample.layer.clone()),
            Some(from) => {
                let (end, total) = (sample.layer.len() - 1, sample.layer.len());
                Reply::new(206, &sample.layer[from..]).with("Content-Range", format!("bytes {from}-{end}/{total}"))
            }
        }
    } else {
        Reply::new(404, r#"{"errors":[{"code":"NAME_UNKNOWN","message":"repository name not known"}]}"#)
    }
}

pub fn is_layer(sample: &Sample, request: &Request) -> bool {
    request.path.ends_with(&sample.digest().to_string())
}

/// Pulls from a server that answers so, and returns the error; the store must be as empty as before.
fn fails(options: &PullOptions, answer: impl Fn(&Sample, &Request) -> Reply + Send + Sync + 'static) -> String {
    let sample = Sample::new();
    let server = Server::start(move |request| answer(&sample, request));
    let directory = tempfile::tempdir().unwrap();
    let error = pull(directory.path(), &format!("{}/app:1", server.address), options).unwrap_err();
    assert_eq!(files(directory.path()), [""; 0], "after: {error}");
    assert!(error.starts_with(&format!("cannot pull '{}/app:1': ", server.address)), "{error}");
    error
}

#[track_caller]
pub fn assert_says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "'{part}' is missing: {error}");
    }
}

#[test]
fn an_unknown_image_is_an_error_that_names_image_and_registry() {
    let error = fails(&options(), |_, _| {
        Reply::new(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#)
    });
    assert_says(&error, &["there is no image 'app:1' on 127.0.0.1:", "the registry answered 404 (manifest unknown)"]);
}

#[test]
fn a_layer_with_the_wrong_content_is_refused() {
    let error = fails(&options(), |sample, request| match is_layer(sample, request) {
        true => Reply::new(200, noise(sample.layer.len())),
        false => honest(sample, request),
    });
    assert_says(&error, &["sends wrong content: its digest is", "nothing of it is used"]);
}

#[test]
fn a_configuration_with_the_wrong_content_is_refused() {
    let error =
        fails(&options(), |sample, request| match request.path.ends_with(&Digest::of(&sample.config).to_string()) {
            true => Reply::new(200, r#"{"os":"linux"}"#),
            false => honest(sample, request),
        });
    assert_says(&error, &["sends a wrong configuration"]);
}

#[test]
fn a_manifest_other_than_the_pinned_one_is_refused() {
    let sample = Sample::new();
    let server = Server::start(move |request| honest(&sample, request));
    let directory = tempfile::tempdir().unwrap();
    let pinned = format!("{}/app@{}", server.address, Digest::of(b"another"));
    let error = pull(directory.path(), &pinned, &options()).unwrap_err();
    assert_says(&error, &["answers with the wrong manifest"]);
    assert!(server.seen("/v2/app/blobs/").is_empty(), "nothing it names may be fetched");
    assert_eq!(files(directory.path()), [""; 0]);
}

#[test]
fn a_manifest_other_than_the_announced_one_is_refused() {
    let error = fails(&options(), |sample, request| {
        honest(sample, request).with("Docker-Content-Digest", Digest::of(b"another").to_string())
    });
    assert_says(&error, &["sends a damaged manifest"]);
}

#[test]
fn a_content_length_that_is_not_the_manifests_size_is_refused() {
    let error = fails(&options(), |sample, request| {
        let mut reply = honest(sample, request);
        if is_layer(sample, request) {
            reply.length = Some(reply.body.len() as u64 + 5);
        }
        reply
    });
    assert_says(&error, &["lies about the size"]);
}

#[test]
fn a_manifest_that_lies_about_a_size_is_refused() {
    for difference in [-7, 7] {
        let error = fails(&options(), move |sample, request| match request.path.contains("/manifests/") {
            true => Reply::new(200, sample.manifest_with(sample.layer.len() as i64 + difference)),
            false => honest(sample, request),
        });
        assert_says(&error, &["lies about the size"]);
    }
}

#[test]
fn sizes_beyond_all_measure_are_refused_before_anything_is_downloaded() {
    for (size, reason) in [(i64::MAX, "are refused"), (-1, "negative size")] {
        let error = fails(&options(), move |sample, request| match request.path.contains("/manifests/") {
            true => Reply::new(200, sample.manifest_with(size)),
            false => honest(sample, request),
        });
        assert_says(&error, &[reason]);
    }
}

#[test]
fn a_download_that_breaks_every_time_ends_in_an_error() {
    let options = PullOptions { retries: 2, ..options() };
    let error = fails(&options, |sample, request| {
        let mut reply = honest(sample, request);
        if is_layer(sample, request) {
            reply.length = Some(reply.body.len() as u64);
            reply.body.clear();
        }
        reply
    });
    assert_says(&error, &["layer ", "the connection to 127.0.0.1:", "failed"]);
}

#[test]
fn a_part_that_does_not_follow_is_refused() {
    let error = fails(&options(), |sample, request| {
        let mut reply = honest(sample, request);
        if is_layer(sample, request) {
            if request.header("range").is_some() {
                return Reply::new(206, &sample.layer[7..]).with("Content-Range", "bytes 7-9/10");
            }
            reply.length = Some(reply.body.len() as u64);
            reply.body.truncate(1000);
        }
        reply
    });
    assert_says(&error, &["sends bytes from 7 on instead of 1000"]);
}

#[test]
fn a_registry_that_hangs_is_given_up() {
    let options = PullOptions { idle_timeout: Duration::from_millis(300), ..options() };
    // Before it says anything, after the headers, and in the middle of a layer.
    let error = fails(&options, |_, _| {
        std::thread::sleep(Duration::from_secs(20));
        Reply::new(200, "")
    });
    assert_says(&error, &["127.0.0.1:", "has been silent for 0.3 s"]);
    for length in [0, 1000] {
        let error = fails(&options, move |sample, request| {
            let mut reply = honest(sample, request);
            if is_layer(sample, request) {
                reply.length = Some(reply.body.len() as u64);
                reply.body.truncate(length);
                reply.hang = Duration::from_secs(20);
            }
            reply
        });
        assert_says(&error, &["has been silent for 0.3 s"]);
    }
}

#[test]
fn an_interrupted_pull_ends_at_once_and_leaves_nothing() {
    let sample = Sample::new();
    let server = Server::start(move |request| {
        let mut reply = honest(&sample, request);
        if is_layer(&sample, request) {
            reply.length = Some(reply.body.len() as u64);
            reply.body.truncate(100_000);
            reply.hang = Duration::from_secs(20);
        }
        reply
    });
    let directory = tempfile::tempdir().unwrap();
    let (store, watch) = (Store::open(directory.path()).unwrap(), Watch::default());
    let reference = format!("{}/app:1", server.address).parse().unwrap();
    let options = PullOptions { idle_timeout: Duration::from_secs(2), ..options() };
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while server.requests.lock().unwrap().len() < 3 {
                std::thread::sleep(Duration::from_millis(10));
            }
            watch.cancel.store(true, Ordering::Relaxed);
        });
        let error = store.pull(&reference, &options, &watch).unwrap_err();
        assert!(is_cancelled(&error), "{error:#}");
    });
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    // The thread that hung in a read goes away when its time is up; then the next command cleans.
    for _ in 0..200 {
        Store::open(directory.path()).unwrap();
        if files(directory.path()).is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{:?}", files(directory.path()));
}

#[test]
fn token_servers_that_cannot_be_used_are_errors() {
    for (realm, answer, reason) in [
        ("http://192.0.2.1/token", Reply::new(200, ""), "asks for a token from 192.0.2.1 without TLS: refused"),
        ("ftp://x/", Reply::new(200, ""), "names a bad token server"),
        ("", Reply::new(200, "<html>"), "something that is no token"),
        ("", Reply::new(200, "{}"), "answers without a token"),
        ("", Reply::new(200, r#"{"token":"a\r\nX: y"}"#), "unusable characters"),
        ("", Reply::new(401, ""), "gives no anonymous access to 'app'"),
        ("", Reply::new(500, ""), "answers 500 when asked for a token"),
        ("", Reply::new(200, vec![b' '; 2 << 20]), "a token of more than 1024 KiB"),
    ] {
        let tokens = Server::start(move |_| answer.clone());
        let realm = if realm.is_empty() { format!("http://{}/token", tokens.address) } else { realm.to_string() };
        let error = fails(&options(), move |_, _| {
            Reply::new(401, "").with("WWW-Authenticate", format!("Bearer realm=\"{realm}\""))
        });
        assert_says(&error, &[reason]);
    }
}

#[test]
fn redirects_that_lead_astray_are_errors() {
    for (location, reason) in [
        ("http://192.0.2.1/x", "redirects to 192.0.2.1 without TLS: refused"),
        ("file:///etc/passwd", "redirects to a bad address"),
        ("/v2/app/manifests/1", "redirects more than 5 times"),
    ] {
        let error = fails(&options(), move |_, _| Reply::new(302, "").with("Location", location));
        assert_says(&error, &[reason]);
    }
    assert_says(&fails(&options(), |_, _| Reply::new(302, "")), &["redirects to nowhere"]);
}

#[test]
fn a_manifest_without_end_is_refused() {
    let error = fails(&options(), |_, _| Reply::new(200, vec![b' '; 100 << 20]));
    assert_says(&error, &["a manifest of more than 4096 KiB: refused"]);
}

#[test]
fn answers_that_are_no_manifest_are_explained() {
    for (body, reason) in [
        ("<!DOCTYPE html><html>Please log in", "a web page came instead of a manifest"),
        ("{\"schemaVersion\":2", "what came is not a manifest"),
        ("[]", "what came is not a manifest"),
        ("{}", "neither an image manifest nor an image index"),
        (r#"{"schemaVersion":1,"name":"app","fsLayers":[]}"#, "old manifest format (schema 1)"),
    ] {
        assert_says(&fails(&options(), move |_, _| Reply::new(200, body)), &[reason]);
    }
}

#[test]
fn a_registry_that_does_not_run_is_an_error_that_says_so() {
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let error = pull(directory.path(), &format!("{address}/app:1"), &options()).unwrap_err();
    assert_says(&error, &["refuses the connection: is a registry running there?"]);
    assert_eq!(files(directory.path()), [""; 0]);
}

#[test]
fn what_a_killed_pull_left_is_cleaned_when_nobody_works() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let left = directory.path().join("tmp/disk-x");
    std::fs::create_dir(&left).unwrap();
    std::fs::write(left.join("disk.raw"), "half").unwrap();
    let hold = store.hold().unwrap();
    Store::open(directory.path()).unwrap();
    assert!(left.exists(), "somebody may be at work");
    drop(hold);
    Store::open(directory.path()).unwrap();
    assert_eq!(files(directory.path()), [""; 0]);
}

#[test]
fn a_registry_that_asks_for_too_much_patience_is_given_up() {
    let error = fails(&options(), |_, _| Reply::new(429, "").with("Retry-After", "86400"));
    assert_says(&error, &["too many requests", "wait 24 h"]);
    let error = fails(&options(), |_, _| Reply::new(503, "").with("Retry-After", "0"));
    assert_says(&error, &["is in trouble: it answered 503"]);
}
