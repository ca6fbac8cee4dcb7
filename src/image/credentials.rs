//! Logins that docker and podman stored: their auth files and credential helpers.
//!
//! Formats: docker's `config.json` (`auths`, `credHelpers`, `credsStore`), containers-auth.json(5), and the
//! protocol of docker-credential-helpers (`docker-credential-NAME get`, host on stdin, JSON on stdout).

use std::collections::BTreeMap;
use std::fmt;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::digest::clip;
use super::reference::RegistryReference;

const MAX_FILE: u64 = 4 << 20;
const MAX_HELPER_ANSWER: u64 = 1 << 20;
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);

/// A stored login.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// For Basic authentication, at the registry or at its token server.
    Password { user: String, password: String },
    /// An OAuth refresh token, to be changed for an access token.
    IdentityToken(String),
}

/// A secret is never printed.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Credentials::Password { user, .. } => write!(f, "password of {user:?}"),
            Credentials::IdentityToken(_) => f.write_str("identity token"),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AuthFile {
    auths: BTreeMap<String, AuthEntry>,
    #[serde(rename = "credHelpers")]
    cred_helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    creds_store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AuthEntry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

/// Where logins may be stored, the first that has one wins.
pub(crate) fn auth_files(variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let home = variable("HOME");
    let under_home = |path: &str| home.as_ref().map(|home| home.join(path));
    let config = variable("XDG_CONFIG_HOME").or_else(|| under_home(".config"));
    let docker = variable("DOCKER_CONFIG").or_else(|| under_home(".docker"));
    // Podman's place where there is no session.
    let system = || format!("/run/containers/{}", rustix::process::getuid().as_raw()).into();
    let runtime = variable("XDG_RUNTIME_DIR").map_or_else(system, |directory| directory.join("containers"));
    [
        variable("REGISTRY_AUTH_FILE"),
        Some(runtime.join("auth.json")),
        config.map(|directory| directory.join("containers/auth.json")),
        docker.map(|directory| directory.join("config.json")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The login stored for an image's registry, if there is one.
pub(crate) fn find(reference: &RegistryReference) -> Result<Option<Credentials>> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    for file in auth_files(variable) {
        let bytes = match read_limited(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
        };
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let found = find_in(&bytes, reference, &run_helper).with_context(|| format!("in {}", file.display()))?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

fn read_limited(file: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![];
    std::fs::File::open(file)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(std::io::Error::other("it is larger than 4 MiB"));
    }
    Ok(bytes)
}

/// The login that an auth file has for an image's registry. `helper` asks a credential helper, by its name, for that of a
/// server.
///
/// # Errors
/// When the file is none, or the helper fails.
pub fn find_in(
    file: &[u8],
    reference: &RegistryReference,
    helper: &dyn Fn(&str, &str) -> Result<Option<Credentials>>,
) -> Result<Option<Credentials>> {
    // The parser's own words could quote a secret.
    let Ok(file) = serde_json::from_slice::<AuthFile>(file) else {
        bail!("it is no valid auth file (JSON expected): mend it or move it away");
    };
    let registry = reference.registry.to_ascii_lowercase();
    let registry = registry.as_str();
    let is_hub = registry == "docker.io";
    // Docker's helpers know the hub by the address of its first API.
    let server = if is_hub { "https://index.docker.io/v1/" } else { registry };
    let named = file.cred_helpers.iter().find(|(key, _)| normal(key) == registry).map(|(_, name)| name.as_str());
    let store = Some(file.creds_store.as_str()).filter(|name| !name.is_empty());
    if let Some(name) = named.or(store)
        && let Some(found) = helper(name, server)?
    {
        return Ok(Some(found));
    }
    // containers-auth.json allows keys for a namespace or a repository: the longest that matches wins.
    let full = format!("{registry}/{}", reference.repository);
    let entry = file
        .auths
        .iter()
        .map(|(key, entry)| (normal(key), entry))
        .filter(|(key, _)| full.strip_prefix(key.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
        .filter_map(|(key, entry)| Some((key.len(), decode(entry)?)))
        .max_by_key(|(length, _)| *length);
    Ok(entry.map(|(_, found)| found))
}

/// A key of an auth file as `registry[/namespace]`: without scheme, API version or trailing slash.
fn normal(key: &str) -> String {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let key = key.trim_end_matches('/');
    let key = key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key);
    let (host, path) = key.split_once('/').map_or((key, None), |(host, path)| (host, Some(path)));
    let host = match host.to_ascii_lowercase().as_str() {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_string(),
        host => host.to_string(),
    };
    match path {
        Some(path) => format!("{host}/{path}"),
        None => host,
    }
}

fn decode(entry: &AuthEntry) -> Option<Credentials> {
    if !entry.identitytoken.is_empty() {
        return Some(Credentials::IdentityToken(entry.identitytoken.clone()));
    }
    if !entry.username.is_empty() && !entry.password.is_empty() {
        return Some(Credentials::Password { user: entry.username.clone(), password: entry.password.clone() });
    }
    let text = String::from_utf8(STANDARD.decode(entry.auth.trim()).ok()?).ok()?;
    let (user, password) = text.split_once(':')?;
    let password = password.trim_end_matches('\0');
    Some(Credentials::Password { user: user.into(), password: password.into() })
}

fn run_helper(name: &str, server: &str) -> Result<Option<Credentials>> {
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
        bail!("'{}' is no name of a credential helper", clip(name));
    }
    ask_helper(&format!("docker-credential-{name}"), server, HELPER_TIMEOUT)
}

fn ask_helper(program: &str, server: &str, limit: Duration) -> Result<Option<Credentials>> {
    let mut child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run {program}: install it, or take the helper out of the file"))?;
    let (sender, receiver) = mpsc::channel();
    if let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) {
        let server = server.to_string();
        // A grandchild may keep the pipe open beyond the helper's end, hence a thread that nobody joins.
        std::thread::spawn(move || {
            let _ = stdin.write_all(server.as_bytes());
            drop(stdin);
            let mut output = vec![];
            let _ = stdout.take(MAX_HELPER_ANSWER).read_to_end(&mut output);
            let _ = sender.send(output);
        });
    }
    let deadline = Instant::now() + limit;
    let output = receiver.recv_timeout(limit);
    let status = loop {
        match child.try_wait().with_context(|| format!("cannot wait for {program}"))? {
            Some(status) if output.is_ok() => break status,
            None if output.is_ok() && Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                bail!("{program} has not answered within {} s: run it by hand to see why", limit.as_secs_f32());
            }
        }
    };
    let output = output.unwrap_or_default();
    if !status.success() {
        let words = String::from_utf8_lossy(&output).to_ascii_lowercase();
        if words.contains("credentials not found") || words.contains("not found in native keychain") {
            return Ok(None);
        }
        bail!("{program} failed ({status}): run it by hand to see why");
    }
    helper_answer(&output).with_context(|| format!("{program} answered with something that is no login"))
}

/// The login that a credential helper printed; `None` within where it has none, and nothing where it is no answer.
pub fn helper_answer(output: &[u8]) -> Option<Option<Credentials>> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(rename = "Username")]
        username: String,
        #[serde(rename = "Secret")]
        secret: String,
    }
    let answer: Answer = serde_json::from_slice(output).ok()?;
    Some(match answer.username.as_str() {
        "" if answer.secret.is_empty() => None,
        "<token>" => Some(Credentials::IdentityToken(answer.secret)),
        _ => Some(Credentials::Password { user: answer.username, password: answer.secret }),
    })
}

#[cfg(test)]
mod tests {
    use super::super::reference::Reference;
    use super::*;

    fn registry(text: &str) -> RegistryReference {
        match text.parse() {
            Ok(Reference::Registry(reference)) => reference,
            other => panic!("{other:?}"),
        }
    }

    fn look(file: &str, reference: &str) -> Option<Credentials> {
        let helper = |name: &str, server: &str| match name {
            "empty" => Ok(None),
            _ => Ok(Some(Credentials::IdentityToken(format!("{name} {server}")))),
        };
        find_in(file.as_bytes(), &registry(reference), &helper).unwrap()
    }

    fn password(user: &str, password: &str) -> Option<Credentials> {
        Some(Credentials::Password { user: user.into(), password: password.into() })
    }

    #[test]
    fn the_entry_that_matches_best_is_used() {
        let file = r#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "aHViOnB3Og=="},
            "localhost:5000": {"username": "a", "password": "b"},
            "localhost:5000/team": {"auth": "dDpw"},
            "localhost:50": {"auth": "eDp5"},
            "https://ghcr.io": {"identitytoken": "i"}, "broken.io": {"auth": "%%%"}, "empty.io": {}}}"#;
        assert_eq!(look(file, "debian"), password("hub", "pw:"));
        assert_eq!(look(file, "localhost:5000/x"), password("a", "b"));
        assert_eq!(look(r#"{"auths": {"myhost": {"auth": "dDpw"}}}"#, "MyHost/x"), password("t", "p"));
        assert_eq!(look(file, "localhost:5000/team/x"), password("t", "p"));
        assert_eq!(look(file, "localhost:5000/teams/x"), password("a", "b"));
        assert_eq!(look(file, "ghcr.io/a/b"), Some(Credentials::IdentityToken("i".into())));
        for other in ["broken.io/a", "empty.io/a", "quay.io/a", "localhost:5001/a"] {
            assert_eq!(look(file, other), None, "{other}");
        }
    }

    #[test]
    fn a_helper_for_the_registry_comes_before_the_store_and_the_file() {
        let file = r#"{"credsStore": "desk", "credHelpers": {"ghcr.io": "gh", "quay.io": "empty"},
            "auths": {"quay.io": {"auth": "dDpw"}}}"#;
        let token = |text: &str| Some(Credentials::IdentityToken(text.into()));
        assert_eq!(look(file, "ghcr.io/a"), token("gh ghcr.io"));
        assert_eq!(look(file, "debian"), token("desk https://index.docker.io/v1/"));
        assert_eq!(look(file, "quay.io/a"), password("t", "p"));
    }

    #[test]
    fn files_are_looked_for_where_podman_and_docker_write_them() {
        let files = auth_files(|name| match name {
            "HOME" => Some("/h".into()),
            "XDG_RUNTIME_DIR" => Some("/run/u".into()),
            _ => None,
        });
        let expected = ["/run/u/containers/auth.json", "/h/.config/containers/auth.json", "/h/.docker/config.json"];
        assert_eq!(files, expected.map(PathBuf::from));
        let files = auth_files(|name| matches!(name, "REGISTRY_AUTH_FILE" | "DOCKER_CONFIG").then(|| "/x".into()));
        let own = format!("/run/containers/{}/auth.json", rustix::process::getuid().as_raw());
        assert_eq!(files, ["/x", &own, "/x/config.json"].map(PathBuf::from));
    }

    #[test]
    fn a_helper_that_hangs_is_ended_and_named() {
        use std::os::unix::fs::OpenOptionsExt;
        let directory = tempfile::tempdir().unwrap();
        // The second leaves a child that keeps its output open.
        for (number, script) in ["exec sleep 30", "sleep 30 & exit 0"].iter().enumerate() {
            let path = directory.path().join(format!("helper-{number}"));
            let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o755).open(&path);
            writeln!(file.unwrap(), "#!/bin/sh\n{script}").unwrap();
            let began = Instant::now();
            let error = ask_helper(path.to_str().unwrap(), "x", Duration::from_millis(500)).unwrap_err().to_string();
            assert!(error.contains(&format!("helper-{number} has not answered within 0.5 s")), "{error}");
            assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        }
    }

    #[test]
    fn a_helpers_name_cannot_be_a_path_and_a_missing_one_is_named() {
        for name in ["", "../x", "a b", "x/y"] {
            assert!(format!("{:#}", run_helper(name, "x").unwrap_err()).contains("is no name"), "{name}");
        }
        let error = format!("{:#}", run_helper("puter-test-missing", "x").unwrap_err());
        assert!(error.contains("cannot run docker-credential-puter-test-missing"), "{error}");
    }

    #[test]
    fn secrets_are_not_printed() {
        let text = format!("{:?} {:?}", password("u", "hush").unwrap(), Credentials::IdentityToken("hush".into()));
        assert!(!text.contains("hush"), "{text}");
    }
}
