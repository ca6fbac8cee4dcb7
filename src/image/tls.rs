//! Whose certificates are believed: the system's authorities (or those of `SSL_CERT_FILE` and `SSL_CERT_DIR`), the
//! user's own, and per registry those in a directory of its name, as docker and podman have them (containers-certs.d(5)).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, parse_pem};

/// The largest file of certificates that is read: the system's own bundle has a quarter of it.
const MAX_FILE: u64 = 1 << 20;

/// What TLS with one host needs.
pub(crate) struct Material {
    pub roots: RootCerts,
    /// What proves to a registry who asks.
    pub client: Option<ClientCert>,
}

/// Finds [`Material`].
pub(crate) struct Trust {
    extra: Option<PathBuf>,
    directories: Vec<PathBuf>,
    system: OnceLock<std::result::Result<Vec<Certificate<'static>>, String>>,
}

impl Trust {
    /// `extra` is a file of authorities for every host, `directories` those that hold one per host.
    pub fn new(extra: Option<PathBuf>, directories: Vec<PathBuf>) -> Trust {
        Trust { extra, directories, system: OnceLock::new() }
    }

    /// The directories that are there for `host[:port]`.
    pub fn directories(&self, authority: &str) -> Vec<PathBuf> {
        // The hub's registry answers under another name than users know.
        let name = if authority == "registry-1.docker.io" { "docker.io" } else { authority };
        if !name.bytes().any(|byte| byte.is_ascii_alphanumeric()) || name.contains('/') {
            return vec![];
        }
        self.directories.iter().map(|directory| directory.join(name)).filter(|path| path.is_dir()).collect()
    }

    /// Collects what is known, with the files of `directories` last.
    pub fn material(&self, directories: &[PathBuf]) -> Result<Material> {
        let mut own = vec![];
        if let Some(file) = &self.extra {
            own.extend(certificates(file).context("the setting 'registry_ca' cannot be used")?);
        }
        let mut client = None;
        for directory in directories {
            for file in sorted(directory)? {
                match file.extension().and_then(|extension| extension.to_str()) {
                    Some("crt") => own.extend(certificates(&file)?),
                    Some("cert") => client = Some(client_certificate(&file)?),
                    _ => {}
                }
            }
        }
        let system = self.system.get_or_init(|| system().map_err(|error| format!("{error:#}")));
        let roots = match system {
            Ok(system) => system.iter().cloned().chain(own).collect(),
            Err(_) if !own.is_empty() => own,
            Err(error) => bail!("{error}"),
        };
        Ok(Material { roots: RootCerts::from(roots.into_iter()), client })
    }
}

/// The files of a directory, in the order of their names.
fn sorted(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    Ok(files)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    let data = fs::metadata(file).with_context(|| format!("cannot read {}", file.display()))?;
    if !data.is_file() || data.len() > MAX_FILE {
        bail!("{} is no file of certificates", file.display());
    }
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

fn certificates(file: &Path) -> Result<Vec<Certificate<'static>>> {
    let bytes = read(file)?;
    let mut found = vec![];
    for item in parse_pem(&bytes) {
        match item {
            Ok(PemItem::Certificate(certificate)) => found.push(certificate.to_owned()),
            Ok(_) => {}
            Err(error) => bail!("{} is damaged: {error}", file.display()),
        }
    }
    if found.is_empty() {
        bail!("{} holds no certificate (PEM: '-----BEGIN CERTIFICATE-----')", file.display());
    }
    Ok(found)
}

/// `NAME.cert` and the key beside it, `NAME.key`.
fn client_certificate(file: &Path) -> Result<ClientCert> {
    let key = file.with_extension("key");
    let bytes = read(&key).with_context(|| format!("{} needs its key beside it", file.display()))?;
    // The parser's own words could quote the key.
    let Ok(private) = PrivateKey::from_pem(&bytes) else {
        bail!("{} holds no private key (PEM)", key.display());
    };
    Ok(ClientCert::new_with_certs(&certificates(file)?, private))
}

/// The system's certificate authorities.
fn system() -> Result<Vec<Certificate<'static>>> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        let reasons: Vec<_> = found.errors.iter().map(ToString::to_string).collect();
        bail!(
            "no certificate authorities on this system ({}): install the package ca-certificates, or set SSL_CERT_FILE",
            if reasons.is_empty() { "none found".to_string() } else { reasons.join("; ") }
        );
    }
    Ok(found.certs.iter().map(|der| Certificate::from_der(der).to_owned()).collect())
}

/// Where docker and podman have a directory for each registry.
pub(crate) fn usual_directories(home: Option<&Path>) -> Vec<PathBuf> {
    let own = home.map(|home| home.join(".config/containers/certs.d"));
    own.into_iter().chain(["/etc/containers/certs.d".into(), "/etc/docker/certs.d".into()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_of_a_registry_is_found_by_its_name_and_port() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["reg.io:5000", "docker.io"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        let trust = Trust::new(None, vec![directory.path().into(), directory.path().join("missing")]);
        assert_eq!(trust.directories("reg.io:5000"), [directory.path().join("reg.io:5000")]);
        assert_eq!(trust.directories("registry-1.docker.io"), [directory.path().join("docker.io")]);
        for other in ["reg.io", "reg.io:5001", "..", ".", ""] {
            assert!(trust.directories(other).is_empty(), "{other}");
        }
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let (file, cert) = (directory.path().join("a.crt"), directory.path().join("b.cert"));
        let fails = |trust: &Trust, directories: &[PathBuf], words: &[&str]| {
            let error = format!("{:#}", trust.material(directories).err().unwrap());
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        let trust = Trust::new(Some(file.clone()), vec![]);
        fails(&trust, &[], &["'registry_ca'", "a.crt"]);
        fs::write(&file, "no certificate").unwrap();
        fails(&trust, &[], &["a.crt holds no certificate"]);
        let trust = Trust::new(None, vec![]);
        fails(&trust, &[directory.path().into()], &["a.crt holds no certificate"]);
        fs::remove_file(&file).unwrap();
        fs::write(&cert, "x").unwrap();
        fails(&trust, &[directory.path().into()], &["b.cert needs its key beside it"]);
        fs::write(cert.with_extension("key"), "hush").unwrap();
        fails(&trust, &[directory.path().into()], &["b.key holds no private key"]);
    }
}
