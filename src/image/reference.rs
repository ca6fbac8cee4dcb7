//! Image references as docker writes them, and two forms for hosts without a registry.
//!
//! The grammar is that of the distribution project's `reference` package:
//! `[registry[:port]/]name[:tag][@digest]`, with the defaults docker gives (`docker.io`, `library/`, `latest`).

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::digest::{Digest, clip};

/// The longest name, registry included (the distribution project's limit).
const MAX_NAME: usize = 255;
/// The longest tag.
const MAX_TAG: usize = 128;

/// Where an image comes from. `Display` writes the canonical form, which parses to the same value.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reference {
    /// An image on a registry: `registry/name:tag@digest`.
    Registry(RegistryReference),
    /// A directory in the OCI image layout: `oci:DIR[:TAG]`.
    OciLayout {
        /// The directory that holds `index.json`.
        directory: PathBuf,
        /// The annotation `org.opencontainers.image.ref.name` to choose; needed where the layout holds several.
        tag: Option<String>,
    },
    /// A file as `docker save` or `podman save` write it: `docker-archive:FILE[:TAG]`.
    DockerArchive {
        /// The tar file.
        file: PathBuf,
        /// The entry of `RepoTags` to choose; needed where the archive holds several images.
        tag: Option<String>,
    },
}

/// An image on a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegistryReference {
    /// The registry's host, with its port if one was given: `docker.io`, `localhost:5000`. It is in lower case, unless
    /// nothing but its capitals shows that it is a host.
    pub registry: String,
    /// The repository on that registry: `library/debian`.
    pub repository: String,
    /// The tag; `latest` where neither tag nor digest was given, none where only a digest was.
    pub tag: Option<String>,
    /// The digest which pins the image; it wins over the tag.
    pub digest: Option<Digest>,
}

impl RegistryReference {
    /// The host (and port) to connect to: docker.io's registry answers under another name.
    pub fn host(&self) -> &str {
        if self.registry == "docker.io" { "registry-1.docker.io" } else { &self.registry }
    }

    /// The same image at a mirror, `[https://]host[:port][/prefix]`.
    ///
    /// # Errors
    /// When that is no place on a registry.
    pub fn at(&self, mirror: &str) -> Result<RegistryReference, ReferenceError> {
        let place = mirror.strip_prefix("https://").or_else(|| mirror.strip_prefix("http://")).unwrap_or(mirror);
        let place = place.trim_end_matches('/');
        let (registry, prefix) = place.split_once('/').map_or((place, None), |(host, prefix)| (host, Some(prefix)));
        let registry = registry.to_ascii_lowercase();
        let repository = prefix.map_or(self.repository.clone(), |prefix| format!("{prefix}/{}", self.repository));
        check_registry(&registry)
            .and_then(|()| check_repository(&repository))
            .map_err(|reason| ReferenceError(format!("'{}' is no mirror: {reason}", clip(mirror))))?;
        Ok(RegistryReference { registry, repository, ..self.clone() })
    }

    /// What the registry's API is asked for: the digest if there is one, else the tag.
    pub fn selector(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".into(),
        }
    }
}

impl fmt::Display for RegistryReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, path, tag) = match self {
            Reference::Registry(reference) => return reference.fmt(f),
            Reference::OciLayout { directory, tag } => ("oci", directory, tag),
            Reference::DockerArchive { file, tag } => ("docker-archive", file, tag),
        };
        write!(f, "{scheme}:{}", path.display())?;
        match tag {
            Some(tag) => write!(f, ":{tag}"),
            None => Ok(()),
        }
    }
}

impl Reference {
    /// The same reference with an absolute path, so that it means the same from every directory.
    pub fn absolute(&self) -> std::io::Result<Reference> {
        Ok(match self {
            Reference::Registry(_) => self.clone(),
            Reference::OciLayout { directory, tag } => {
                Reference::OciLayout { directory: std::path::absolute(directory)?, tag: tag.clone() }
            }
            Reference::DockerArchive { file, tag } => {
                Reference::DockerArchive { file: std::path::absolute(file)?, tag: tag.clone() }
            }
        })
    }

    /// The path of a reference that needs no registry.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Reference::Registry(_) => None,
            Reference::OciLayout { directory, .. } => Some(directory),
            Reference::DockerArchive { file, .. } => Some(file),
        }
    }
}

/// Why a text is no image reference, as one sentence that says what would be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferenceError(String);

impl fmt::Display for ReferenceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ReferenceError {}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Reference, ReferenceError> {
        if let Some(rest) = text.strip_prefix("oci:") {
            let (directory, tag) = split_path(text, rest)?;
            return Ok(Reference::OciLayout { directory, tag });
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (file, tag) = split_path(text, rest)?;
            return Ok(Reference::DockerArchive { file, tag });
        }
        parse_registry(text)
            .map(Reference::Registry)
            .map_err(|reason| ReferenceError(format!("'{}' is no image reference: {reason}", clip(text))))
    }
}

/// `PATH[:TAG]`, split at the first colon as skopeo does, since a tag may hold colons itself.
fn split_path(text: &str, rest: &str) -> Result<(PathBuf, Option<String>), ReferenceError> {
    let fail = |reason| ReferenceError(format!("'{}' is no image reference: {reason}", clip(text)));
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    if path.is_empty() || path.contains('\0') {
        return Err(fail("a path must follow the first colon"));
    }
    match tag {
        Some(tag) if tag.is_empty() || tag.len() > MAX_NAME + MAX_TAG => Err(fail("the tag is empty or too long")),
        Some(tag) if !tag.bytes().all(|byte| byte.is_ascii_graphic()) => {
            Err(fail("a tag is letters, digits and punctuation"))
        }
        tag => Ok((PathBuf::from(path), tag.map(str::to_string))),
    }
}

fn parse_registry(text: &str) -> Result<RegistryReference, String> {
    if text.is_empty() {
        return Err("it is empty; write [registry/]name[:tag]".into());
    }
    if text.contains("://") {
        return Err("leave out the scheme; write [registry/]name[:tag]".into());
    }
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => (name, Some(digest.parse::<Digest>().map_err(|error| error.to_string())?)),
        None => (text, None),
    };
    // A colon after the last slash begins a tag; one before it belongs to the registry's port.
    let tag_at = name.rfind(':').filter(|colon| name.rfind('/').is_none_or(|slash| *colon > slash));
    let (name, tag) = match tag_at.and_then(|at| Some((name.get(..at)?, name.get(at + 1..)?))) {
        Some((name, tag)) => (name, Some(tag)),
        None => (name, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (registry, repository) = match name.split_once('/') {
        Some((first, rest)) if is_registry(first) => {
            let lower = first.to_ascii_lowercase();
            // A host that its capitals alone tell from a repository keeps them: its name must mean the same tomorrow.
            (if is_registry(&lower) { lower } else { first.to_string() }, rest.to_string())
        }
        _ => ("docker.io".to_string(), name.to_string()),
    };
    check_registry(&registry)?;
    let registry = if registry == "index.docker.io" { "docker.io".to_string() } else { registry };
    check_repository(&repository)?;
    let repository = match registry == "docker.io" && !repository.contains('/') {
        true => format!("library/{repository}"),
        false => repository,
    };
    if registry.len() + 1 + repository.len() > MAX_NAME {
        return Err(format!("its name is longer than {MAX_NAME} characters"));
    }
    let tag = match (tag, &digest) {
        (Some(tag), _) => Some(tag.to_string()),
        (None, Some(_)) => None,
        (None, None) => Some("latest".to_string()),
    };
    Ok(RegistryReference { registry, repository, tag, digest })
}

/// Docker's rule for telling a registry from the first part of a repository on docker.io.
fn is_registry(first: &str) -> bool {
    first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn check_registry(registry: &str) -> Result<(), String> {
    let fail = || format!("'{}' is no registry; write host or host:port", clip(registry));
    let (host, port) = match registry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) => {
            address.parse::<std::net::Ipv6Addr>().map_err(|_| fail())?;
            match rest.strip_prefix(':') {
                Some(port) => (None, Some(port)),
                None if rest.is_empty() => (None, None),
                None => return Err(fail()),
            }
        }
        None => match registry.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(registry), None),
        },
    };
    if let Some(port) = port {
        let number = port.bytes().all(|byte| byte.is_ascii_digit()).then(|| port.parse::<u16>().ok()).flatten();
        if number.is_none_or(|number| number == 0) {
            return Err(fail());
        }
    }
    let label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    match host {
        Some(host) if !host.split('.').all(label) => Err(fail()),
        _ => Ok(()),
    }
}

fn check_repository(repository: &str) -> Result<(), String> {
    if repository.bytes().any(|byte| byte.is_ascii_uppercase()) {
        let lower = clip(&repository.to_ascii_lowercase());
        return Err(format!("a repository's name is lower case; did you mean '{lower}'?"));
    }
    match repository.split('/').find(|part| !is_path_component(part)) {
        None => Ok(()),
        Some("") => Err("a part of its name is empty; write [registry/]name[:tag]".into()),
        Some(part) => {
            Err(format!("'{}' may hold only a-z, 0-9 and single separators (. _ __ -) between them", clip(part)))
        }
    }
}

/// `[a-z0-9]+ ((\. | _ | __ | -+) [a-z0-9]+)*`
fn is_path_component(part: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = part.as_bytes();
    if !bytes.first().copied().is_some_and(is_word) || !bytes.last().copied().is_some_and(is_word) {
        return false;
    }
    part.split(|letter: char| letter.is_ascii() && is_word(letter as u8))
        .all(|separator| matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|byte| byte == b'-'))
}

/// `[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}`
fn check_tag(tag: &str) -> Result<(), String> {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let good = tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(is_word)
        && tag.bytes().all(|byte| is_word(byte) || matches!(byte, b'.' | b'-'));
    match good {
        true => Ok(()),
        false => Err(format!("'{}' is no tag: at most {MAX_TAG} of letters, digits, _ . and -", clip(tag))),
    }
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Reference, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn references_get_the_defaults_that_docker_gives() {
        let pinned = format!("debian@{DIGEST}");
        let both = format!("localhost:5000/a/b:1@{DIGEST}");
        for (text, canonical) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("team/app", "docker.io/team/app:latest"),
            ("docker.io/debian", "docker.io/library/debian:latest"),
            ("index.docker.io/library/debian", "docker.io/library/debian:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app", "localhost:5000/app:latest"),
            ("127.0.0.1:5000/a/b/c:v1.2-x_3", "127.0.0.1:5000/a/b/c:v1.2-x_3"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            ("GHCR.io/team/app", "ghcr.io/team/app:latest"),
            ("MyHost/app", "MyHost/app:latest"),
            ("ghcr.io/a--b/c__d/e.f_g", "ghcr.io/a--b/c__d/e.f_g:latest"),
            (&pinned, &format!("docker.io/library/debian@{DIGEST}")),
            (&both, &both),
            ("oci:/tmp/x", "oci:/tmp/x"),
            ("oci:x/y:v1", "oci:x/y:v1"),
            ("docker-archive:a.tar:team/app:1", "docker-archive:a.tar:team/app:1"),
        ] {
            let reference: Reference = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(reference.to_string(), canonical);
            assert_eq!(canonical.parse::<Reference>().as_ref(), Ok(&reference), "{canonical}");
        }
    }

    #[test]
    fn a_bad_reference_is_refused_with_the_reason() {
        for (text, reason) in [
            ("", "it is empty"),
            ("Debian", "did you mean 'debian'?"),
            ("A\u{1b}[2J", "did you mean 'a\u{fffd}[2j'?"),
            ("ghcr.io/Team/app", "did you mean 'team/app'?"),
            ("https://ghcr.io/a", "leave out the scheme"),
            ("a:", "is no tag"),
            ("a:-x", "is no tag"),
            (&format!("a:{}", "x".repeat(129)), "is no tag"),
            ("a@sha256:12", "64 lower-case hex"),
            ("a@md5:12", "'md5' is not supported"),
            ("a//b", "is empty"),
            ("/a", "is empty"),
            ("a/", "is empty"),
            ("a..b", "single separators"),
            ("a___b", "single separators"),
            ("-a", "single separators"),
            ("é", "single separators"),
            ("a b", "single separators"),
            ("../../etc/passwd", "is no registry"),
            ("localhost:/a", "is no registry"),
            ("localhost:0/a", "is no registry"),
            ("localhost:99999/a", "is no registry"),
            ("localhost:+80/a", "is no registry"),
            ("-x.io/a", "is no registry"),
            ("user@evil.io/a", "is no digest"),
            ("[zz]:1/a", "is no registry"),
            (&"a/".repeat(130), "is empty"),
            (&format!("{}a", "a/".repeat(130)), "longer than 255"),
            ("oci:", "a path must follow"),
            ("oci:dir:", "tag is empty"),
            ("oci:dir:a b", "letters, digits and punctuation"),
            ("docker-archive:", "a path must follow"),
        ] {
            let error = text.parse::<Reference>().expect_err(text).to_string();
            assert!(error.contains(reason), "{text}: {error}");
            assert!(error.starts_with('\''), "{error}");
        }
    }

    #[test]
    fn a_digest_wins_over_the_tag_when_the_registry_is_asked() {
        let Ok(Reference::Registry(reference)) = format!("debian:12@{DIGEST}").parse() else { panic!() };
        assert_eq!((reference.selector().as_str(), reference.host()), (DIGEST, "registry-1.docker.io"));
        let Ok(Reference::Registry(reference)) = "ghcr.io/a/b:c".parse() else { panic!() };
        assert_eq!((reference.selector().as_str(), reference.host()), ("c", "ghcr.io"));
    }
}
