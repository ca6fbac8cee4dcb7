//! Manifests, image indexes and configurations (OCI image spec; docker's image manifest v2, schema 2).

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::digest::{Digest, clip};

/// The longest manifest that is read (the OCI distribution spec's recommendation).
pub const MAX_MANIFEST: u64 = 4 << 20;
/// The longest image configuration that is read.
pub const MAX_CONFIG: u64 = 8 << 20;
const MAX_LAYERS: usize = 512;

/// What to accept, the newest first.
pub const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// A piece of content by its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    pub digest: Digest,
    pub size: u64,
    pub media_type: String,
}

/// An image's manifest, checked.
#[derive(Debug, Clone)]
pub struct Manifest {
    pub digest: Digest,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// What a manifest document turned out to be.
#[derive(Debug)]
pub enum Document {
    /// An image.
    Image(Manifest),
    /// An index; this is the manifest for the wanted platform.
    Index(Descriptor),
}

#[derive(Deserialize)]
struct Raw {
    #[serde(rename = "schemaVersion", default)]
    schema_version: u64,
    #[serde(rename = "mediaType", default)]
    media_type: String,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
struct RawDescriptor {
    digest: String,
    size: i64,
    #[serde(rename = "mediaType", default)]
    media_type: String,
    platform: Option<RawPlatform>,
    #[serde(default)]
    urls: Vec<String>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawPlatform {
    os: String,
    architecture: String,
    variant: String,
}

impl RawDescriptor {
    fn check(&self) -> Result<Descriptor> {
        let digest = self.digest.parse().context("a descriptor has a bad digest")?;
        let Ok(size) = u64::try_from(self.size) else { bail!("a descriptor has a negative size ({})", self.size) };
        Ok(Descriptor { digest, size, media_type: self.media_type.clone() })
    }

    fn platform(&self) -> String {
        match &self.platform {
            None => "unknown".into(),
            Some(platform) if platform.variant.is_empty() => {
                clip(&format!("{}/{}", platform.os, platform.architecture))
            }
            Some(one) => clip(&format!("{}/{}/{}", one.os, one.architecture, one.variant)),
        }
    }

    fn is_for(&self, architecture: &str) -> bool {
        let Some(platform) = &self.platform else { return false };
        let variant = platform.variant.as_str();
        platform.os == "linux"
            && platform.architecture == architecture
            && (variant.is_empty() || architecture != "arm64" || variant == "v8")
            && (architecture != "amd64" || matches!(variant, "" | "v1"))
    }
}

/// Parses a manifest or an index; `content_type` is what the registry called it, if it did.
pub fn parse(bytes: &[u8], content_type: &str, architecture: &str) -> Result<Document> {
    let raw: Raw = match serde_json::from_slice(bytes) {
        Ok(raw) => raw,
        Err(error) => bail!("{}: {}", not_json(bytes, "a manifest"), clip(&error.to_string())),
    };
    let media_type = if raw.media_type.is_empty() { content_type } else { &raw.media_type };
    if raw.schema_version == 1 || media_type.contains("manifest.v1+prettyjws") {
        bail!(
            "it is in docker's old manifest format (schema 1), which nothing has written since 2017: push it again \
             with a current docker, podman or skopeo"
        );
    }
    if let Some(manifests) = raw.manifests {
        return choose(&manifests, architecture).map(Document::Index);
    }
    let (Some(config), Some(layers)) = (raw.config, raw.layers) else {
        bail!("it is neither an image manifest nor an image index (media type '{}')", clip(media_type));
    };
    if !matches!(
        config.media_type.as_str(),
        "" | "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json"
    ) {
        bail!(
            "it is no image but {} (configuration type '{}'): a machine needs a container image",
            artifact(&config.media_type),
            clip(&config.media_type)
        );
    }
    check_count(layers.len())?;
    for (number, layer) in layers.iter().enumerate() {
        check_layer(layer).with_context(|| format!("layer {}", number + 1))?;
    }
    let layers = layers.iter().map(RawDescriptor::check).collect::<Result<Vec<_>>>()?;
    let mut sizes = BTreeMap::new();
    for layer in &layers {
        if *sizes.entry(layer.digest).or_insert(layer.size) != layer.size {
            bail!("layer {} occurs twice, and it gives two sizes for it", layer.digest.short());
        }
    }
    Ok(Document::Image(Manifest { digest: Digest::of(bytes), config: config.check()?, layers }))
}

fn check_count(layers: usize) -> Result<()> {
    if layers > MAX_LAYERS {
        bail!("it has {layers} layers: more than {MAX_LAYERS} are refused");
    }
    Ok(())
}

/// What an artifact is, by its configuration's type.
fn artifact(media_type: &str) -> &'static str {
    match media_type {
        _ if media_type.contains(".helm.") => "a Helm chart",
        _ if media_type.contains(".wasm.") => "a WebAssembly module",
        _ if media_type.contains(".cosign.") || media_type.contains(".sigstore.") => "a signature",
        _ if media_type.contains(".docker.plugin.") => "a plugin of docker's",
        _ => "an artifact",
    }
}

/// Refuses a layer that is no archive of files which can be had and read.
fn check_layer(layer: &RawDescriptor) -> Result<()> {
    let kind = layer.media_type.as_str();
    if kind.contains("nondistributable") || kind.contains(".foreign.") {
        let place = layer.urls.first().map_or("nowhere".to_string(), |url| clip(url));
        bail!(
            "it is not in the registry but at an address of its maker's ({place}), as those of Windows are: \
             puter takes layers from registries only; use an image whose layers are all there"
        );
    }
    if kind.ends_with("+encrypted") {
        bail!("it is encrypted: decrypt the image with 'skopeo copy --decryption-key' first");
    }
    let archive = kind
        .strip_prefix("application/vnd.oci.image.layer.v1.tar")
        .or_else(|| kind.strip_prefix("application/vnd.docker.image.rootfs.diff.tar"));
    match archive {
        Some("" | "+gzip" | "+zstd" | ".gzip" | ".zstd") => Ok(()),
        None if kind.is_empty() => Ok(()),
        Some(form) => bail!(
            "it is compressed in a way that puter does not know ('{}'): push the image again with gzip or zstd",
            clip(form.trim_start_matches(['+', '.']))
        ),
        None => bail!("it holds no files of a machine but '{}': is it an image at all?", clip(kind)),
    }
}

/// Explains a document that is not JSON: a web page where an API was expected is the usual case.
fn not_json(bytes: &[u8], what: &str) -> String {
    let start: String = String::from_utf8_lossy(bytes.get(..64).unwrap_or(bytes)).trim_start().to_ascii_lowercase();
    if start.starts_with('<') {
        return format!(
            "a web page came instead of {what} (a login page or a proxy between? is it a registry at all?)"
        );
    }
    format!("what came is not {what}")
}

fn choose(manifests: &[RawDescriptor], architecture: &str) -> Result<Descriptor> {
    let found = manifests.iter().find(|one| one.is_for(architecture));
    // A lone image without a platform (as many tools write it) is taken; its configuration names the platform.
    let lone = || match manifests {
        [one] if one.platform.is_none() => Some(one),
        _ => None,
    };
    let Some(found) = found.or_else(lone) else {
        let mut offered: Vec<String> = manifests
            .iter()
            .filter(|one| !one.annotations.contains_key("vnd.docker.reference.type"))
            .map(RawDescriptor::platform)
            .take(20)
            .collect();
        offered.sort();
        offered.dedup();
        let offered = if offered.is_empty() { "nothing".to_string() } else { offered.join(", ") };
        bail!("it is not made for linux/{architecture}; it offers {offered}");
    };
    let descriptor = found.check()?;
    if descriptor.size > MAX_MANIFEST {
        bail!("the manifest for linux/{architecture} is larger than {} MiB: refused", MAX_MANIFEST >> 20);
    }
    Ok(descriptor)
}

/// Chooses an image of an OCI layout's `index.json` by its tag.
pub fn choose_tag(bytes: &[u8], tag: Option<&str>, architecture: &str) -> Result<Descriptor> {
    const NAME: &str = "org.opencontainers.image.ref.name";
    let Ok(Raw { manifests: Some(manifests), .. }) = serde_json::from_slice(bytes) else {
        bail!("index.json is no image index");
    };
    let name = |one: &RawDescriptor| one.annotations.get(NAME).map(|name| clip(name));
    let Some(tag) = tag else {
        return match &manifests[..] {
            [] => bail!("the layout holds no image"),
            [one] => one.check(),
            several
                if several.iter().any(|one| one.is_for(architecture))
                    && several.iter().all(|one| name(one).is_none()) =>
            {
                choose(several, architecture)
            }
            several => match several.iter().find(|one| name(one).as_deref() == Some("latest")) {
                Some(latest) => latest.check(),
                None => {
                    let names: Vec<_> = several.iter().filter_map(name).take(20).collect();
                    bail!("the layout holds several images ({}): add ':TAG' to choose one", names.join(", "))
                }
            },
        };
    };
    let mut tagged = manifests.iter().filter(|one| name(one).as_deref() == Some(tag));
    let first = tagged.next();
    match tagged.chain(first).find(|one| one.is_for(architecture)).or(first) {
        Some(one) => one.check(),
        None => {
            let names: Vec<_> = manifests.iter().filter_map(name).take(20).collect();
            bail!("the layout has no image '{}'; it has: {}", clip(tag), names.join(", "))
        }
    }
}

/// What of an image's configuration matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub architecture: String,
    /// The digests of the decompressed layers, lowest first.
    pub diff_ids: Vec<Digest>,
}

/// Parses and checks an image's configuration against what is wanted.
pub fn parse_config(bytes: &[u8], layers: usize, architecture: &str) -> Result<Config> {
    #[derive(Deserialize)]
    struct RawConfig {
        #[serde(default)]
        architecture: String,
        #[serde(default)]
        os: String,
        rootfs: RawRootfs,
    }
    #[derive(Deserialize)]
    struct RawRootfs {
        diff_ids: Vec<Digest>,
    }
    let raw: RawConfig = match serde_json::from_slice(bytes) {
        Ok(raw) => raw,
        Err(error) => bail!("{}: {}", not_json(bytes, "an image configuration"), clip(&error.to_string())),
    };
    if !matches!(raw.os.as_str(), "" | "linux") {
        bail!("it is made for {}, not for linux", clip(&raw.os));
    }
    if !raw.architecture.is_empty() && raw.architecture != architecture {
        bail!("it is not made for linux/{architecture}; it offers linux/{}", clip(&raw.architecture));
    }
    let diff_ids = raw.rootfs.diff_ids;
    if diff_ids.len() != layers {
        bail!("its configuration names {} layers, its manifest {layers}", diff_ids.len());
    }
    if layers == 0 {
        bail!("it has no layers");
    }
    check_count(layers)?;
    Ok(Config { architecture: architecture.to_string(), diff_ids })
}

#[cfg(test)]
mod tests;
