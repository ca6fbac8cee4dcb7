//! Registries that ask for patience.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use puter::image::PullOptions;

use super::hostile::{assert_says, honest, is_layer};
use super::image::{Sample, files, options, pull};
use super::odds::check_sample;
use super::server::{Reply, Server};

#[test]
fn a_date_to_come_back_at_is_kept() {
    let sample = Sample::new();
    let refusals = AtomicU32::new(0);
    let server = Server::start(move |request| match refusals.fetch_add(1, Ordering::Relaxed) {
        // Whole seconds: between one and two from now.
        0 => {
            Reply::new(429, "").with("Retry-After", httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(2)))
        }
        1 => Reply::new(429, "").with("Retry-After", "Sun, 06 Nov 1994 08:49:37 GMT"),
        _ => honest(&sample, request),
    });
    let directory = tempfile::tempdir().unwrap();
    let began = Instant::now();
    check_sample(&pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap());
    assert!(began.elapsed() >= Duration::from_millis(950), "{:?}", began.elapsed());
}

#[test]
fn a_limit_is_told_with_what_it_allows() {
    let body = r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"You have reached your pull rate limit"}]}"#;
    let later = SystemTime::now() + Duration::from_secs(7200);
    for wait in ["21600".to_string(), httpdate::fmt_http_date(later)] {
        let server = Server::start(move |_| {
            Reply::new(429, body)
                .with("Retry-After", wait.as_str())
                .with("ratelimit-limit", "100;w=21600")
                .with("ratelimit-remaining", "0;w=21600")
        });
        let directory = tempfile::tempdir().unwrap();
        let error = pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap_err();
        assert_says(&error, &["You have reached your pull rate limit", "it allows 100 pulls in 6 h and 0 are left"]);
        assert_says(&error, &["docker login", "registry_mirrors"]);
        assert_eq!(server.seen("/").len(), 1, "nobody waits for hours");
        assert_eq!(files(directory.path()), [""; 0]);
    }
}

#[test]
fn a_layers_limit_is_waited_for_too() {
    let sample = Arc::new(Sample::new());
    let (served, refusals) = (sample.clone(), AtomicU32::new(0));
    let server = Server::start(move |request| {
        match is_layer(&served, request) && refusals.fetch_add(1, Ordering::Relaxed) == 0 {
            true => Reply::new(429, "").with("Retry-After", "0"),
            false => honest(&served, request),
        }
    });
    let directory = tempfile::tempdir().unwrap();
    check_sample(&pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap());
    // One that never ends is given up after a few tries.
    let sample = Sample::new();
    let server = Server::start(move |request| match is_layer(&sample, request) {
        true => Reply::new(429, "").with("Retry-After", "0"),
        false => honest(&sample, request),
    });
    let directory = tempfile::tempdir().unwrap();
    let error = pull(directory.path(), &format!("{}/app:1", server.address), &PullOptions::default()).unwrap_err();
    assert_says(&error, &["too many requests"]);
    assert_eq!(files(directory.path()), [""; 0]);
}
