//! Logins: tokens that end in the middle of a pull, tokens of identity, files and helpers of every kind.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use puter::image::PullOptions;

use super::child::in_a_child;
use super::hostile::{assert_says, honest, is_layer};
use super::image::{Sample, files, options, pull};
use super::odds::check_sample;
use super::server::{Reply, Request, Server};

fn challenge(realm: &str) -> Reply {
    let value = format!(r#"Bearer realm="http://{realm}/token",service="reg",scope="repository:app:pull""#);
    Reply::new(401, "").with("WWW-Authenticate", value)
}

#[test]
fn a_token_that_ends_in_the_middle_of_a_pull_is_fetched_anew() {
    let sample = Arc::new(Sample::new());
    let issued = Arc::new(AtomicU32::new(0));
    let counter = issued.clone();
    let tokens = Server::start(move |_| {
        let number = counter.fetch_add(1, Ordering::Relaxed) + 1;
        Reply::new(200, format!(r#"{{"access_token":"token-{number}","expires_in":1}}"#))
    });
    let (served, realm) = (sample.clone(), tokens.address.clone());
    let parts = AtomicU32::new(0);
    // A token is good until it has brought a piece of the layer.
    let server = Server::start(move |request| {
        let good = 1 + parts.load(Ordering::Relaxed);
        if request.header("authorization") != Some(&format!("Bearer token-{good}")) {
            return challenge(&realm);
        }
        let mut reply = honest(&served, request);
        if is_layer(&served, request) && parts.fetch_add(1, Ordering::Relaxed) < 3 {
            reply.length = Some(reply.body.len() as u64);
            reply.body.truncate(400_000);
        }
        reply
    });
    let directory = tempfile::tempdir().unwrap();
    check_sample(&pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap());
    assert_eq!(issued.load(Ordering::Relaxed), 4);
    let ranges: Vec<_> = server
        .seen(&format!("/v2/app/blobs/{}", sample.digest()))
        .iter()
        .filter_map(|request| request.header("range").map(str::to_string))
        .collect();
    assert!(ranges.contains(&"bytes=1200000-".to_string()), "{ranges:?}");
}

#[test]
fn a_registry_that_takes_no_token_of_its_own_server_is_given_up() {
    let tokens = Server::start(|_| Reply::new(200, r#"{"token":"t"}"#));
    let realm = tokens.address.clone();
    let server = Server::start(move |_| challenge(&realm));
    let directory = tempfile::tempdir().unwrap();
    let error = pull(directory.path(), &format!("{}/app:1", server.address), &options()).unwrap_err();
    assert_says(&error, &["does not let you pull 'app:1': it answered 401"]);
    assert!(tokens.seen("/").len() <= 2);
    assert_eq!(files(directory.path()), [""; 0]);
}

/// Gives `t0ken` for the password of `user`, or for the identity token `idt`.
fn token_server() -> Server {
    Server::start(|request| {
        let identity = request.body.contains("grant_type=refresh_token&")
            && request.body.contains("refresh_token=idt%2B1&")
            && request.body.contains("scope=repository%3Aapp%3Apull");
        // user:pass
        let password = request.header("authorization") == Some("Basic dXNlcjpwYXNz");
        match identity || password {
            true => Reply::new(200, r#"{"access_token":"t0ken"}"#),
            false => Reply::new(401, ""),
        }
    })
}

fn guarded(sample: &Sample, realm: &str, request: &Request) -> Reply {
    match request.header("authorization") {
        Some("Bearer t0ken") => honest(sample, request),
        _ => challenge(realm),
    }
}

#[test]
fn logins_are_found_in_every_file_and_from_every_helper() {
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path().to_path_buf();
    let (sample, tokens) = (Sample::new(), token_server());
    let realm = tokens.address.clone();
    let server = Server::start(move |request| guarded(&sample, &realm, request));
    let path = |name: &str| home.join(name).display().to_string();
    let variables = [
        ("REGISTRY_AUTH_FILE", String::new()),
        ("HOME", home.display().to_string()),
        ("XDG_RUNTIME_DIR", path("run")),
        ("XDG_CONFIG_HOME", String::new()),
        ("DOCKER_CONFIG", path("docker")),
        ("PATH", format!("{}:{}", path("bin"), std::env::var("PATH").unwrap())),
    ];
    let name = "login::logins_are_found_in_every_file_and_from_every_helper";
    let start = || vec![home.display().to_string(), server.address.clone()];
    in_a_child(name, &variables, start, |arguments| {
        let [home, address] = arguments else { panic!("{arguments:?}") };
        let home = Path::new(home);
        let refresh = PullOptions { refresh: true, ..options() };
        let pulled = || pull(&home.join("store"), &format!("{address}/app:1"), &refresh);
        assert_says(&pulled().unwrap_err(), &["gives no anonymous access to 'app'"]);

        let password = format!(r#"{{"auths":{{"{address}/app":{{"auth":"dXNlcjpwYXNz"}}}}}}"#);
        let wrong = format!(r#"{{"auths":{{"{address}":{{"auth":"dXNlcjp3cm9uZw=="}}}}}}"#);
        let identity = format!(r#"{{"auths":{{"https://{address}/v2/":{{"identitytoken":"idt+1"}}}}}}"#);
        let write = |file: &str, text: &str| {
            std::fs::create_dir_all(home.join(file).parent().unwrap()).unwrap();
            std::fs::write(home.join(file), text).unwrap();
        };
        for file in ["run/containers/auth.json", ".config/containers/auth.json", "docker/config.json"] {
            for good in [&password, &identity] {
                write(file, good);
                check_sample(&pulled().unwrap_or_else(|error| panic!("{file}: {error}")));
            }
            write(file, &wrong);
            assert_says(&pulled().unwrap_err(), &["refuses the login stored for"]);
            std::fs::remove_file(home.join(file)).unwrap();
        }

        let helper = |text: &str| {
            write("bin/docker-credential-puter-test", "");
            let mut file = std::fs::File::create(home.join("bin/docker-credential-puter-test")).unwrap();
            write!(file, "#!/bin/sh\nread -r server\n{text}\n").unwrap();
            file.set_permissions(PermissionsExt::from_mode(0o755)).unwrap();
        };
        let store = r#"{"credsStore":"puter-test"}"#;
        write("docker/config.json", store);
        let error = pulled().unwrap_err();
        assert_says(&error, &["config.json", "cannot run docker-credential-puter-test: install it"]);
        helper(r#"echo '{"Username":"<token>","Secret":"idt+1"}'"#);
        check_sample(&pulled().unwrap());
        helper(r#"echo '{"Username":"user","Secret":"pass"}'"#);
        check_sample(&pulled().unwrap());
        helper("echo 'hush, no JSON'");
        let error = pulled().unwrap_err();
        assert_says(&error, &["docker-credential-puter-test answered with something that is no login"]);
        assert!(!error.contains("hush"), "{error}");
        helper("echo hush; exit 3");
        let error = pulled().unwrap_err();
        assert_says(&error, &["docker-credential-puter-test failed (exit status: 3): run it by hand"]);
        assert!(!error.contains("hush"), "{error}");
        helper("yes");
        assert_says(&pulled().unwrap_err(), &["docker-credential-puter-test"]);
    });
}
