//! Mirrors: asked first, trusted with nothing.

use std::path::Path;
use std::sync::Arc;

use base64::Engine;
use puter::image::{Mirrors, PullOptions, Store};

use super::child::in_a_child;
use super::hostile::{assert_says, honest, is_layer};
use super::image::{Sample, Watch, files, noise, options};
use super::odds::check_sample;
use super::server::{Reply, Request, Server};

/// The same request as the registry would get it: the mirror has the repository under `hub/`.
fn unprefixed(request: &Request) -> Request {
    let mut request = request.clone();
    request.path = request.path.replacen("/v2/hub/app/", "/v2/app/", 1);
    request
}

fn with_mirrors(registry: &Server, mirrors: &[String]) -> PullOptions {
    PullOptions { mirrors: Mirrors::from([(registry.address.clone(), mirrors.to_vec())]), ..options() }
}

/// Pulls `app:1` of the registry, and returns what was noted.
fn pulled(store: &Path, registry: &Server, options: &PullOptions) -> Result<String, String> {
    let watch = Watch::default();
    let reference = format!("{}/app:1", registry.address).parse().unwrap();
    let image = Store::open(store).unwrap().pull(&reference, options, &watch).map_err(|error| format!("{error:#}"))?;
    check_sample(&image);
    assert_eq!(image.reference, reference, "the image's name is the registry's");
    Ok(watch.notes.into_inner().unwrap().join("\n"))
}

#[test]
fn a_mirror_is_asked_instead_of_the_registry() {
    let sample = Sample::new();
    let mirror = Server::start(move |request| honest(&sample, &unprefixed(request)));
    let registry = Server::start(|_| Reply::new(500, ""));
    let directory = tempfile::tempdir().unwrap();
    let options = with_mirrors(&registry, &[format!("http://{}/hub/", mirror.address)]);
    assert_eq!(pulled(directory.path(), &registry, &options).unwrap(), "");
    assert!(registry.seen("/").is_empty());
    assert!(mirror.seen("/").iter().all(|request| request.path.starts_with("/v2/hub/app/")));
}

#[test]
fn mirrors_that_fail_are_noted_and_passed_over_in_their_order() {
    let sample = Arc::new(Sample::new());
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let missing = Server::start(|_| Reply::new(404, ""));
    let served = sample.clone();
    let lying = Server::start(move |request| match is_layer(&served, request) {
        true => Reply::new(200, noise(served.layer.len())),
        false => honest(&served, request),
    });
    let registry = Server::start(move |request| honest(&sample, request));
    let mirrors = [closed.clone(), missing.address.clone(), lying.address.clone()];
    let directory = tempfile::tempdir().unwrap();
    let notes = pulled(directory.path(), &registry, &with_mirrors(&registry, &mirrors)).unwrap();
    let [first, second, third] = &notes.lines().collect::<Vec<_>>()[..] else { panic!("{notes}") };
    assert_says(first, &[&format!("the mirror {closed} is of no use"), "refuses the connection"]);
    assert_says(second, &[&missing.address, "there is no image 'app:1'", &format!("asking {}", lying.address)]);
    assert_says(third, &[&lying.address, "sends wrong content", &format!("asking {}", registry.address)]);
    // The manifest was the liar's, and right; only the layer had to come from the registry.
    assert!(registry.seen("/v2/app/manifests/").is_empty());
    assert_eq!(registry.seen("/v2/app/blobs/").len(), 1);
}

#[test]
fn the_error_is_the_registrys_when_nobody_has_the_image() {
    let mirror = Server::start(|_| Reply::new(404, ""));
    let registry = Server::start(|_| Reply::new(403, ""));
    let directory = tempfile::tempdir().unwrap();
    let error = pulled(directory.path(), &registry, &with_mirrors(&registry, std::slice::from_ref(&mirror.address)))
        .unwrap_err();
    assert_says(&error, &[&format!("{} does not let you pull 'app:1'", registry.address)]);
    assert_eq!(files(directory.path()), [""; 0]);
}

#[test]
fn a_pinned_digest_binds_the_mirror_too() {
    let other = Sample::of(b"another archive", noise(1000));
    let sample = Sample::new();
    let digest = puter::image::Digest::of(sample.manifest.as_bytes());
    let mirror = Server::start(move |request| honest(&other, request));
    let registry = Server::start(move |request| honest(&sample, request));
    let directory = tempfile::tempdir().unwrap();
    let options = with_mirrors(&registry, std::slice::from_ref(&mirror.address));
    let watch = Watch::default();
    let reference = format!("{}/app@{digest}", registry.address).parse().unwrap();
    let image = Store::open(directory.path()).unwrap().pull(&reference, &options, &watch).unwrap();
    assert_eq!(image.digest, digest);
    assert_says(&watch.notes.lock().unwrap().join("\n"), &["answers with the wrong manifest"]);
}

#[test]
fn the_login_of_the_registry_never_goes_to_a_mirror() {
    let directory = tempfile::tempdir().unwrap();
    let auth = directory.path().join("auth.json");
    let sample = Arc::new(Sample::new());
    let asks = |reply: Reply, request: &Request, login: &str| {
        let expected = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(login));
        match request.header("authorization") == Some(expected.as_str()) {
            true => reply,
            false => Reply::new(401, "").with("WWW-Authenticate", "Basic realm=x"),
        }
    };
    // Wants a login, and would take the registry's.
    let greedy = Server::start(|_| Reply::new(401, "").with("WWW-Authenticate", "Basic realm=x"));
    // Has a login of its own, but lacks the layer.
    let served = sample.clone();
    let own = Server::start(move |request| match is_layer(&served, request) {
        true => Reply::new(404, ""),
        false => asks(honest(&served, request), request, "mirror:its"),
    });
    let registry = Server::start(move |request| asks(honest(&sample, request), request, "me:mine"));
    let variables = [("REGISTRY_AUTH_FILE", auth.display().to_string())];
    let start = || {
        let encode = |login: &str| base64::engine::general_purpose::STANDARD.encode(login);
        let logins = format!(
            r#"{{"auths":{{"{}":{{"auth":"{}"}},"{}":{{"auth":"{}"}}}}}}"#,
            registry.address,
            encode("me:mine"),
            own.address,
            encode("mirror:its")
        );
        std::fs::write(&auth, logins).unwrap();
        vec![registry.address.clone(), greedy.address.clone(), own.address.clone()]
    };
    let name = "mirror::the_login_of_the_registry_never_goes_to_a_mirror";
    let outside = in_a_child(name, &variables, start, |arguments| {
        let [registry, greedy, own] = arguments else { panic!("{arguments:?}") };
        let mirrors = Mirrors::from([(registry.clone(), vec![greedy.clone(), own.clone()])]);
        let options = PullOptions { mirrors, ..options() };
        let directory = tempfile::tempdir().unwrap();
        let reference = format!("{registry}/app:1").parse().unwrap();
        check_sample(&Store::open(directory.path()).unwrap().pull(&reference, &options, &()).unwrap());
    });
    if outside {
        assert!(!greedy.seen("/").is_empty() && !own.seen("/").is_empty());
        assert!(greedy.seen("/").iter().all(|request| request.header("authorization").is_none()));
        let mine = base64::engine::general_purpose::STANDARD.encode("me:mine");
        assert!(own.seen("/").iter().all(|request| !format!("{request:?}").contains(&mine)));
        assert_eq!(registry.seen("/v2/app/blobs/").len(), 2, "the layer, without and with the login");
    }
}
