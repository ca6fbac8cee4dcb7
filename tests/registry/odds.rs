//! Pulls that reach their end against odds.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use puter::image::{Digest, Image, PullOptions, Store};

use super::bombs::{manifest, registry_that};
use super::hostile::{assert_says, honest, is_layer};
use super::image::{ARCHITECTURE, Sample, Watch, config, entry, files, options, pull, tar};
use super::server::{Reply, Server};

/// That the image is the sample: its disk, its kernel, what makes it a machine.
pub fn check_sample(image: &Image) {
    use std::os::unix::fs::MetadataExt;
    let disk = std::fs::metadata(&image.disk).unwrap();
    assert_eq!((disk.len(), disk.mode() & 0o7777), (image.disk_size, 0o444));
    assert_eq!(std::fs::read(image.kernel.as_ref().unwrap()).unwrap(), b"new kernel");
    assert_eq!(std::fs::read(image.initrd.as_ref().unwrap()).unwrap(), b"new initrd");
    assert_eq!(image.init.as_deref(), Some("/sbin/init"));
    assert_eq!(image.agent.as_deref(), Some("/usr/bin/puter-agent"));
    assert_eq!(image.architecture, ARCHITECTURE);
    image.check_bootable().unwrap();
}

#[test]
fn a_broken_download_is_taken_up_where_it_broke() {
    let sample = Arc::new(Sample::new());
    let (served, breaks) = (sample.clone(), AtomicU32::new(0));
    let server = Server::start(move |request| {
        let mut reply = honest(&served, request);
        if is_layer(&served, request) && breaks.fetch_add(1, Ordering::Relaxed) < 3 {
            reply.length = Some(reply.body.len() as u64);
            reply.body.truncate(500_000);
        }
        reply
    });
    let directory = tempfile::tempdir().unwrap();
    let (store, watch) = (Store::open(directory.path()).unwrap(), Watch::default());
    let reference = format!("{}/app:1", server.address).parse().unwrap();
    let image = store.pull(&reference, &options(), &watch).unwrap();
    check_sample(&image);
    let ranges: Vec<_> = server
        .seen(&format!("/v2/app/blobs/{}", sample.digest()))
        .iter()
        .map(|request| request.header("range").map(str::to_string))
        .collect();
    let from = |at: u32| Some(format!("bytes={at}-"));
    assert_eq!(ranges, [None, from(500_000), from(1_000_000), from(1_500_000)]);
    let notes = watch.notes.lock().unwrap();
    assert_says(&notes.join("\n"), &["trying again from byte 500000", "trying again from byte 1500000"]);
}

#[test]
fn a_layer_is_converted_while_it_comes() {
    let sample = Sample::new();
    let size = sample.layer.len() as u64;
    let directory = tempfile::tempdir().unwrap();
    let store = directory.path().to_path_buf();
    let written = move || -> u64 {
        let disks = std::fs::read_dir(store.join("tmp")).unwrap().flatten().map(|entry| entry.path().join("disk.raw"));
        disks.filter_map(|disk| disk.metadata().ok()).map(|disk| disk.len()).max().unwrap_or_default()
    };
    let seen = Arc::new(AtomicU64::new(0));
    let told = seen.clone();
    let server = Server::start(move |request| {
        let mut reply = honest(&sample, request);
        if is_layer(&sample, request) {
            match request.header("range") {
                None => {
                    reply.length = Some(size);
                    reply.body.truncate(2_500_000);
                }
                // The rest comes only once the file system holds what came before.
                Some(_) => {
                    let end = Instant::now() + Duration::from_secs(20);
                    while written() < 1 << 20 && Instant::now() < end {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    told.store(written(), Ordering::Relaxed);
                }
            }
        }
        reply
    });
    let options = PullOptions { idle_timeout: Duration::from_secs(30), ..options() };
    let image = pull(directory.path(), &format!("{}/app:1", server.address), &options);
    let seen = seen.load(Ordering::Relaxed);
    assert!(seen >= 1 << 20, "{seen} bytes: {image:?}");
    check_sample(&image.unwrap());
}

#[test]
fn a_layer_damaged_in_the_cache_is_fetched_anew() {
    let sample = Sample::new();
    let blob = format!("blobs/sha256/{}", Digest::of(&sample.layer).hex());
    let server = Server::start({
        let sample = Sample::new();
        move |request| honest(&sample, request)
    });
    let reference = format!("{}/app:1", server.address);
    for damage in [100, sample.layer.len() - 100] {
        let directory = tempfile::tempdir().unwrap();
        pull(directory.path(), &reference, &options()).unwrap();
        // The disk goes, the layer stays: with one bit changed.
        std::fs::remove_dir_all(directory.path().join("disks")).unwrap();
        let path = directory.path().join(&blob);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[damage] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let watch = Watch::default();
        let store = Store::open(directory.path()).unwrap();
        check_sample(&store.pull(&reference.parse().unwrap(), &options(), &watch).unwrap());
        assert_says(&watch.notes.lock().unwrap().join("\n"), &[&blob, "is damaged and is fetched anew"]);
        assert!(std::fs::read(&path).unwrap() == sample.layer);
    }
}

#[test]
fn a_layer_that_is_not_what_the_configuration_says_is_refused() {
    let sample = Sample::new();
    let other = Sample::of(b"another archive", sample.layer.clone());
    let server = Server::start(move |request| honest(&other, request));
    let directory = tempfile::tempdir().unwrap();
    let error = pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap_err();
    assert_says(&error, &["layer 1 is not what the image says"]);
    assert_eq!(files(directory.path()), [""; 0]);
}

#[test]
fn a_redirect_to_another_host_carries_no_secret() {
    let sample = Arc::new(Sample::new());
    let served = sample.clone();
    let store = Server::start(move |_| Reply::new(200, served.layer.clone()));
    let (served, target) = (sample.clone(), store.address.clone());
    let server = Server::start(move |request| {
        if request.path.starts_with("/token") {
            Reply::new(200, r#"{"token":"t0ken"}"#)
        } else if request.header("authorization") != Some("Bearer t0ken") {
            let realm = format!("Bearer realm=\"http://{}/token\"", request.header("host").unwrap());
            Reply::new(401, "").with("WWW-Authenticate", realm)
        } else if is_layer(&served, request) {
            Reply::new(307, "").with("Location", format!("http://{target}/bucket/layer?signature=x"))
        } else {
            honest(&served, request)
        }
    });
    let directory = tempfile::tempdir().unwrap();
    check_sample(&pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap());
    let [request] = &store.seen("/")[..] else { panic!() };
    assert_eq!(request.header("authorization"), None);
    assert_eq!(request.path, "/bucket/layer?signature=x");
}

#[test]
fn a_registry_that_asks_for_patience_is_obeyed() {
    let sample = Sample::new();
    let refusals = AtomicU32::new(0);
    let server = Server::start(move |request| match refusals.fetch_add(1, Ordering::Relaxed) {
        0 => Reply::new(429, "").with("Retry-After", "0"),
        1 => Reply::new(503, "").with("Retry-After", "1"),
        _ => honest(&sample, request),
    });
    let directory = tempfile::tempdir().unwrap();
    check_sample(&pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap());
}

#[test]
fn a_server_without_ranges_is_asked_from_the_beginning() {
    let sample = Sample::new();
    let breaks = AtomicU32::new(0);
    let server = Server::start(move |request| {
        let mut reply = honest(&sample, request);
        if is_layer(&sample, request) {
            reply = Reply::new(200, sample.layer.clone());
            if breaks.fetch_add(1, Ordering::Relaxed) < 2 {
                reply.length = Some(reply.body.len() as u64);
                reply.body.truncate(700_000);
            }
        }
        reply
    });
    let directory = tempfile::tempdir().unwrap();
    check_sample(&pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap());
}

#[test]
fn layers_are_fetched_side_by_side_up_to_the_limit() {
    let layers: Vec<Vec<u8>> =
        (0..6).map(|number| tar(&[entry(&format!("f{number}"), b'0', 0o644, "", b"x")])).collect();
    let digests: Vec<Digest> = layers.iter().map(|layer| Digest::of(layer)).collect();
    let config = config(&digests);
    let sizes: Vec<_> = digests.iter().zip(&layers).map(|(digest, layer)| (*digest, layer.len())).collect();
    let top = manifest(&config, &sizes);
    let (now, most) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let seen = most.clone();
    let server = registry_that(&top, [layers, vec![config]].concat(), move || {
        seen.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(500));
        now.fetch_sub(1, Ordering::SeqCst);
    });
    let directory = tempfile::tempdir().unwrap();
    let options = PullOptions { parallel: 3, ..options() };
    pull(directory.path(), &format!("{}/app:1", server.address), &options).unwrap();
    assert_eq!(most.load(Ordering::SeqCst), 3);
}

#[test]
fn a_server_that_begins_anew_each_time_is_given_up() {
    let sample = Sample::new();
    let tries = Arc::new(AtomicU32::new(0));
    let counter = tries.clone();
    // In turns one mebibyte from the beginning, and nothing: that looks like progress again and again.
    let server = Server::start(move |request| {
        let mut reply = honest(&sample, request);
        if is_layer(&sample, request) {
            reply = Reply::new(200, sample.layer.clone());
            reply.length = Some(reply.body.len() as u64);
            let number = counter.fetch_add(1, Ordering::Relaxed);
            reply.body.truncate(if number.is_multiple_of(2) { (1 << 20) + 1000 } else { 0 });
        }
        reply
    });
    let directory = tempfile::tempdir().unwrap();
    let options = PullOptions { retries: 2, ..options() };
    let error = pull(directory.path(), &format!("{}/app:1", server.address), &options).unwrap_err();
    assert_says(&error, &["the connection to 127.0.0.1:", "failed"]);
    assert!(tries.load(Ordering::Relaxed) <= 4, "{tries:?}");
    assert_eq!(files(directory.path()), [""; 0]);
}

#[test]
fn a_token_is_fetched_where_the_registry_says() {
    let sample = Arc::new(Sample::new());
    let tokens = Server::start(|request| match request.path.contains("service=reg%20istry") {
        true => Reply::new(200, r#"{"token":"t0ken","expires_in":300}"#),
        false => Reply::new(400, ""),
    });
    let realm = tokens.address.clone();
    let server = Server::start(move |request| match request.header("authorization") {
        Some("Bearer t0ken") => honest(&sample, request),
        _ => Reply::new(401, "").with(
            "WWW-Authenticate",
            format!(r#"Bearer realm="http://{realm}/token",service="reg istry",scope="repository:app:pull""#),
        ),
    });
    let directory = tempfile::tempdir().unwrap();
    check_sample(&pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap());
    let asked = tokens.seen("/");
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert_says(&asked[0].path, &["/token?", "scope=repository%3Aapp%3Apull"]);
}

#[test]
fn two_pulls_at_once_do_the_work_once() {
    let sample = Arc::new(Sample::new());
    let served = sample.clone();
    let server = Server::start(move |request| {
        if is_layer(&served, request) {
            std::thread::sleep(Duration::from_millis(300));
        }
        honest(&served, request)
    });
    let directory = tempfile::tempdir().unwrap();
    let reference = format!("{}/app:1", server.address);
    std::thread::scope(|scope| {
        let pulls: Vec<_> =
            (0..3).map(|_| scope.spawn(|| pull(directory.path(), &reference, &options()).unwrap())).collect();
        let images: Vec<_> = pulls.into_iter().map(|pull| pull.join().unwrap()).collect();
        assert_eq!(images[0], images[1]);
        assert_eq!(images[1], images[2]);
        check_sample(&images[0]);
    });
    assert_eq!(server.seen(&format!("/v2/app/blobs/{}", sample.digest())).len(), 1);
}

#[test]
fn what_is_here_is_not_asked_for_again_until_a_refresh() {
    let sample = Sample::new();
    let server = Server::start(move |request| honest(&sample, request));
    let directory = tempfile::tempdir().unwrap();
    let reference = format!("{}/app:1", server.address);
    let first = pull(directory.path(), &reference, &options()).unwrap();
    let asked = server.requests.lock().unwrap().len();
    assert_eq!(pull(directory.path(), &reference, &options()).unwrap(), first);
    assert_eq!(server.requests.lock().unwrap().len(), asked);
    let refresh = PullOptions { refresh: true, ..options() };
    assert_eq!(pull(directory.path(), &reference, &refresh).unwrap(), first);
    assert_eq!(server.requests.lock().unwrap().len(), asked + 2);

    let store = Store::open(directory.path()).unwrap();
    let needed = |_: &Digest| Ok(vec!["VM 'a'".to_string()]);
    let error = store.delete(&reference, &needed).unwrap_err().to_string();
    assert_says(&error, &["is needed by VM 'a'"]);
    let cached = store.cached();
    assert!(cached > 0 && store.has_layer(&first.layers[0]));
    assert_eq!(store.prunable(&needed).unwrap().bytes(), cached);
    assert_eq!(store.cached(), cached, "it only tells");
    let pruned = store.prune(&needed).unwrap();
    assert_eq!((pruned.images.len(), pruned.layers, pruned.bytes()), (0, 1, cached));
    assert!(first.disk.exists());
    assert_eq!(store.cached(), 0);
    assert_eq!(store.list().unwrap(), [first]);
    let hold = store.hold().unwrap();
    let error = store.delete(&reference, &|_| Ok(vec![])).unwrap_err().to_string();
    assert_says(&error, &["another command is using the images"]);
    drop(hold);
    let removed = store.delete(&reference, &|_| Ok(vec![])).unwrap();
    assert!(removed.bytes() > 3 << 20, "{removed:?}");
    assert_eq!(files(directory.path()), [""; 0]);
    assert_eq!(store.get(&reference.parse().unwrap()).unwrap(), None);
}
