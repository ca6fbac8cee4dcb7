//! Whose certificates are believed, with real ones that openssl makes.
//!
//! The servers are at 0.0.0.0, since what is loopback by its name is asked without TLS first.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use puter::image::PullOptions;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

use super::child::in_a_child;
use super::hostile::{assert_says, honest};
use super::image::{Sample, files, options, pull};
use super::odds::check_sample;
use super::server::Server;

/// A certificate authority, and a certificate of it for a server or a client.
pub struct Authority(tempfile::TempDir);

impl Authority {
    /// With these names (`DNS:…` or `IP:…`).
    pub fn new(names: &[&str]) -> Authority {
        let authority = Authority(tempfile::tempdir().unwrap());
        let path = |name: &str| authority.path(name).display().to_string();
        let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
        openssl(&[
            &["req", "-x509", "-days", "2", "-subj", "/CN=authority"],
            &key,
            &["-keyout", &path("ca.key"), "-out", &path("ca.crt")],
        ]);
        openssl(&[
            &["req", "-subj", "/CN=leaf", "-addext", &format!("subjectAltName={}", names.join(","))],
            &key,
            &["-keyout", &path("leaf.key"), "-out", &path("leaf.csr")],
        ]);
        openssl(&[
            &["x509", "-req", "-days", "2", "-copy_extensions", "copyall", "-in", &path("leaf.csr")],
            &["-CA", &path("ca.crt"), "-CAkey", &path("ca.key"), "-CAcreateserial", "-out", &path("leaf.cert")],
        ]);
        authority
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The authority's own certificate.
    pub fn ca(&self) -> PathBuf {
        self.path("ca.crt")
    }

    /// A server with the certificate; with `clients`, it wants one of the same authority from them.
    pub fn server(&self, clients: bool) -> ServerConfig {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder =
            ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
        let builder = match clients {
            false => builder.with_no_client_auth(),
            true => {
                let mut roots = RootCertStore::empty();
                roots.add(CertificateDer::from_pem_file(self.ca()).unwrap()).unwrap();
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                builder.with_client_cert_verifier(verifier.unwrap())
            }
        };
        let certificate = CertificateDer::from_pem_file(self.path("leaf.cert")).unwrap();
        let key = PrivateKeyDer::from_pem_file(self.path("leaf.key")).unwrap();
        builder.with_single_cert(vec![certificate], key).unwrap()
    }

    /// Puts files into `DIRECTORY/HOST`.
    fn install(&self, directory: &Path, host: &str, names: &[&str]) {
        std::fs::create_dir_all(directory.join(host)).unwrap();
        for name in names {
            std::fs::copy(self.path(name), directory.join(host).join(name)).unwrap();
        }
    }
}

fn openssl(arguments: &[&[&str]]) {
    let output = Command::new("openssl").args(arguments.concat()).output().expect("openssl must be installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn serve(config: ServerConfig) -> String {
    let sample = Sample::new();
    let server = Server::start_tls(config, move |request| honest(&sample, request));
    server.address.replace("127.0.0.1", "0.0.0.0")
}

#[test]
#[ignore = "needs openssl"]
fn an_authority_of_the_setting_or_of_the_registrys_directory_is_believed() {
    let authority = Authority::new(&["IP:0.0.0.0"]);
    let address = serve(authority.server(false));
    let reference = format!("{address}/app:1");
    let directory = tempfile::tempdir().unwrap();
    let (store, certificates) = (directory.path().join("store"), directory.path().join("certs.d"));
    let with = |ca: Option<PathBuf>| PullOptions { ca, certificates: vec![certificates.clone()], ..options() };

    let error = pull(&store, &reference, &with(None)).unwrap_err();
    assert_says(&error, &["is not accepted", &format!("certs.d/{address}/ca.crt"), "'registry_ca'"]);
    // Another registry's directory, and another authority.
    authority.install(&certificates, "0.0.0.0", &["ca.crt"]);
    let stranger = Authority::new(&["IP:0.0.0.0"]);
    assert_says(&pull(&store, &reference, &with(Some(stranger.ca()))).unwrap_err(), &["is not accepted"]);
    assert_eq!(files(&store), [""; 0]);

    check_sample(&pull(&store, &reference, &with(Some(authority.ca()))).unwrap());
    let again = directory.path().join("again");
    authority.install(&certificates, &address, &["ca.crt"]);
    check_sample(&pull(&again, &reference, &with(None)).unwrap());
}

#[test]
#[ignore = "needs openssl"]
fn a_registry_that_wants_a_certificate_gets_that_of_its_directory() {
    let authority = Authority::new(&["IP:0.0.0.0"]);
    let address = serve(authority.server(true));
    let directory = tempfile::tempdir().unwrap();
    let (store, certificates) = (directory.path().join("store"), directory.path().join("certs.d"));
    let options = PullOptions { certificates: vec![certificates.clone()], ..options() };
    authority.install(&certificates, &address, &["ca.crt"]);
    let error = pull(&store, &format!("{address}/app:1"), &options).unwrap_err();
    assert_eq!(files(&store), [""; 0], "{error}");
    authority.install(&certificates, &address, &["leaf.cert", "leaf.key"]);
    check_sample(&pull(&store, &format!("{address}/app:1"), &options).unwrap());
}

#[test]
#[ignore = "needs openssl"]
fn the_directory_of_the_environment_takes_the_systems_place() {
    let authority = Authority::new(&["IP:0.0.0.0"]);
    let directory = tempfile::tempdir().unwrap();
    authority.install(directory.path(), "certs", &["ca.crt"]);
    let certificates = directory.path().join("certs").display().to_string();
    openssl(&[&["rehash", &certificates]]);
    let address = serve(authority.server(false));
    let variables = [("SSL_CERT_DIR", certificates), ("SSL_CERT_FILE", String::new())];
    let name = "tls::the_directory_of_the_environment_takes_the_systems_place";
    in_a_child(
        name,
        &variables,
        || vec![address.clone()],
        |arguments| {
            let store = tempfile::tempdir().unwrap();
            check_sample(&pull(store.path(), &format!("{}/app:1", arguments[0]), &options()).unwrap());
        },
    );
}

#[test]
#[ignore = "needs openssl"]
fn a_certificate_for_another_name_is_refused() {
    let authority = Authority::new(&["DNS:other.test"]);
    let address = serve(authority.server(false));
    let directory = tempfile::tempdir().unwrap();
    let options = PullOptions { ca: Some(authority.ca()), ..options() };
    let error = pull(directory.path(), &format!("{address}/app:1"), &options).unwrap_err();
    assert_says(&error, &["is not accepted (NotValidForName"]);
    assert_eq!(files(directory.path()), [""; 0]);
}

#[test]
fn plain_http_is_for_loopback_and_for_what_the_user_named() {
    let sample = Sample::new();
    let server = Server::start(move |request| honest(&sample, request));
    let address = server.address.replace("127.0.0.1", "0.0.0.0");
    let directory = tempfile::tempdir().unwrap();
    let error = pull(directory.path(), &format!("{address}/app:1"), &options()).unwrap_err();
    assert_says(&error, &["no TLS with 0.0.0.0:", "'insecure_registries'"]);
    assert!(server.seen("/").is_empty(), "nothing may be asked without TLS");
    let options = PullOptions { insecure: vec![address.clone()], ..options() };
    check_sample(&pull(directory.path(), &format!("{address}/app:1"), &options).unwrap());
}
