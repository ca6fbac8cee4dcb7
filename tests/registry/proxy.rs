//! Proxies of the environment, with a real one (CONNECT, RFC 9110 section 9.3.6) on loopback.
//!
//! Names under `.test` are known to the proxy alone: who reaches them went through it. 0.0.0.0 is this machine, but not
//! by a name that is always spoken to directly.

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use puter::image::PullOptions;

use super::child::in_a_child;
use super::hostile::{assert_says, honest};
use super::image::{Sample, files, options, pull};
use super::odds::check_sample;
use super::server::{Reply, Server};
use super::tls::Authority;

const LOGIN: &str = "user:p@ss:word";

/// Leads every connection to one address, whatever it is asked for.
struct Proxy {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    /// With a login, if there is one.
    fn start(target: &str, login: Option<&str>) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(vec![]));
        let expected = login.map(|login| format!("Basic {}", STANDARD.encode(login)));
        let (target, log) = (target.to_string(), asked.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (target, log, expected) = (target.clone(), log.clone(), expected.clone());
                std::thread::spawn(move || tunnel(stream, &target, &log, expected.as_deref()));
            }
        });
        Proxy { address, asked }
    }
}

fn tunnel(mut client: TcpStream, target: &str, log: &Mutex<Vec<String>>, expected: Option<&str>) -> Option<()> {
    let mut reader = BufReader::new(client.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut login = None;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim_end().split_once(':') else { break };
        if name.eq_ignore_ascii_case("proxy-authorization") {
            login = Some(value.trim().to_string());
        }
    }
    let mut words = line.split_whitespace();
    if words.next() != Some("CONNECT") {
        client.write_all(b"HTTP/1.1 405 X\r\nContent-Length: 0\r\n\r\n").ok()?;
        return None;
    }
    if login.as_deref() != expected {
        client.write_all(b"HTTP/1.1 407 X\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n").ok()?;
        return None;
    }
    log.lock().unwrap().push(words.next()?.to_string());
    let mut server = TcpStream::connect(target).ok()?;
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").ok()?;
    let (mut up, mut to) = (reader, server.try_clone().ok()?);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut up, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    std::io::copy(&mut server, &mut client).ok()?;
    client.shutdown(Shutdown::Both).ok()
}

fn sample_server() -> Server {
    let sample = Sample::new();
    Server::start(move |request| honest(&sample, request))
}

fn insecure(name: &str) -> PullOptions {
    PullOptions { insecure: vec![name.into()], ..options() }
}

#[test]
fn a_registry_behind_a_proxy_is_reached_through_it_and_the_password_goes_along() {
    let server = sample_server();
    let proxy = Proxy::start(&server.address, Some(LOGIN));
    let variables = [("http_proxy", format!("http://user:p%40ss%3Aword@{}", proxy.address))];
    let name = "proxy::a_registry_behind_a_proxy_is_reached_through_it_and_the_password_goes_along";
    let outside = in_a_child(name, &variables, Vec::new, |_| {
        let directory = tempfile::tempdir().unwrap();
        let image = pull(directory.path(), "registry.test:5000/app:1", &insecure("registry.test:5000")).unwrap();
        check_sample(&image);
    });
    if outside {
        let asked = proxy.asked.lock().unwrap();
        assert!(!asked.is_empty() && asked.iter().all(|target| target == "registry.test:5000"), "{asked:?}");
        // What is for the proxy is for nobody else.
        assert!(server.seen("/").iter().all(|request| request.header("proxy-authorization").is_none()));
    }
}

#[test]
#[ignore = "needs openssl"]
fn tls_goes_through_the_proxy_and_redirects_do_too() {
    let authority = Authority::new(&["DNS:registry.test", "DNS:blobs.test"]);
    let sample = Sample::new();
    let server = Server::start_tls(authority.server(false), move |request| {
        let reply = honest(&sample, request);
        match request.header("host") {
            Some("registry.test") if request.path.contains("/blobs/") => {
                Reply::new(307, "").with("Location", format!("https://blobs.test:7000{}", request.path))
            }
            _ => reply,
        }
    });
    let proxy = Proxy::start(&server.address, None);
    let variables = [
        ("HTTPS_PROXY", format!("http://{}", proxy.address)),
        ("ALL_PROXY", "http://127.0.0.1:9".to_string()),
        ("SSL_CERT_FILE", authority.ca().display().to_string()),
    ];
    let name = "proxy::tls_goes_through_the_proxy_and_redirects_do_too";
    let outside = in_a_child(name, &variables, Vec::new, |_| {
        let directory = tempfile::tempdir().unwrap();
        check_sample(&pull(directory.path(), "registry.test/app:1", &options()).unwrap());
    });
    if outside {
        let asked = proxy.asked.lock().unwrap();
        let all = |target: &str| asked.iter().filter(|asked| *asked == target).count();
        assert!(all("registry.test:443") > 0 && all("blobs.test:7000") > 0, "{asked:?}");
    }
}

#[test]
fn loopback_and_what_no_proxy_names_are_reached_without_the_proxy() {
    let server = sample_server();
    // Nobody listens there.
    let variables = [("ALL_PROXY", "http://127.0.0.1:9".to_string()), ("NO_PROXY", "x, 0.0.0.0/8".to_string())];
    let name = "proxy::loopback_and_what_no_proxy_names_are_reached_without_the_proxy";
    in_a_child(
        name,
        &variables,
        || vec![server.address.clone()],
        |arguments| {
            let directory = tempfile::tempdir().unwrap();
            check_sample(&pull(directory.path(), &format!("{}/app:1", arguments[0]), &options()).unwrap());
            let port = arguments[0].rsplit(':').next().unwrap();
            check_sample(&pull(directory.path(), &format!("0.0.0.0:{port}/app:1"), &insecure("0.0.0.0")).unwrap());

            let other = tempfile::tempdir().unwrap();
            let error = pull(other.path(), "registry.test:5000/app:1", &insecure("registry.test")).unwrap_err();
            assert_says(&error, &["the proxy 127.0.0.1:9 (of ALL_PROXY) refuses the connection"]);
            assert_eq!(files(other.path()), [""; 0]);
        },
    );
}

#[test]
fn a_proxy_that_refuses_is_explained() {
    let server = sample_server();
    let proxy = Proxy::start(&server.address, Some(LOGIN));
    let variables = [
        ("HTTPS_PROXY", format!("http://user:wrong@{}", proxy.address)),
        ("HTTP_PROXY", format!("http://{}", server.address)),
    ];
    in_a_child("proxy::a_proxy_that_refuses_is_explained", &variables, Vec::new, |_| {
        let directory = tempfile::tempdir().unwrap();
        let error = pull(directory.path(), "registry.test/app:1", &options()).unwrap_err();
        assert_says(&error, &["(of HTTPS_PROXY) wants another user name and password", "NO_PROXY"]);
        assert!(!error.contains("wrong"), "{error}");
        let error = pull(directory.path(), "registry.test/app:1", &insecure("registry.test")).unwrap_err();
        assert_says(&error, &["(of HTTP_PROXY) gives no connection to registry.test (proxy server responded 404"]);
        assert_eq!(files(directory.path()), [""; 0]);
    });
}
