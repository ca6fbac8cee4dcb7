//! Images in a directory (OCI image layout 1.0): `oci-layout`, `index.json`, `blobs/sha256/…`.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::digest::Digest;
use super::manifest::{self, Descriptor, Document, MAX_CONFIG, MAX_MANIFEST};
use super::source::{Layer, Plan, check_total, read_part};

/// Finds an image in the layout. The layers stay where they are.
pub(crate) fn plan(directory: &Path, tag: Option<&str>, architecture: &str, max_download: u64) -> Result<Plan> {
    let index = directory.join("index.json");
    match std::fs::metadata(&index) {
        Ok(metadata) if metadata.is_file() => {}
        // It may well be one, for those who may look.
        Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Err(error).with_context(|| format!("cannot look at {}", index.display()));
        }
        _ => bail!(
            "{} is no OCI image layout (no index.json in it): make one with 'skopeo copy docker://… oci:DIR:TAG'",
            directory.display()
        ),
    }
    find(directory, tag, architecture, max_download).with_context(|| format!("in {}", directory.display()))
}

fn find(directory: &Path, tag: Option<&str>, architecture: &str, max_download: u64) -> Result<Plan> {
    let path = directory.join("index.json");
    let length = std::fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?.len();
    let index = read_part(&path, 0, length, MAX_MANIFEST)?;
    let mut descriptor = manifest::choose_tag(&index, tag, architecture)?;
    let mut depth = 0;
    let image = loop {
        let bytes = read_blob(directory, &descriptor, MAX_MANIFEST)?;
        match manifest::parse(&bytes, &descriptor.media_type, architecture)? {
            Document::Image(image) => break image,
            Document::Index(inner) if depth < 2 => descriptor = inner,
            Document::Index(_) => bail!("its indexes are nested too deep"),
        }
        depth += 1;
    };
    let config = read_blob(directory, &image.config, MAX_CONFIG)?;
    let checked = manifest::parse_config(&config, image.layers.len(), architecture)?;
    check_total(image.layers.iter().map(|layer| layer.size), max_download)?;
    let mut layers = vec![];
    for (layer, diff_id) in image.layers.iter().zip(checked.diff_ids) {
        let path = blob(directory, &layer.digest);
        let found = std::fs::metadata(&path).with_context(|| format!("cannot read layer {}", path.display()))?.len();
        if found != layer.size {
            bail!("layer {} has {found} bytes instead of {}: the copy is not whole", layer.digest, layer.size);
        }
        layers.push(Layer { path, offset: 0, length: layer.size, digest: Some(layer.digest), diff_id, arrival: None });
    }
    Ok(Plan { digest: image.digest, architecture: checked.architecture, config, layers })
}

fn blob(directory: &Path, digest: &Digest) -> PathBuf {
    directory.join("blobs/sha256").join(digest.hex())
}

fn read_blob(directory: &Path, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>> {
    let path = blob(directory, &descriptor.digest);
    let bytes = read_part(&path, 0, descriptor.size, limit)?;
    if Digest::of(&bytes) != descriptor.digest {
        bail!("{} is damaged: its content does not have the digest of its name", path.display());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_looked_at_is_not_said_to_be_absent() {
        let dir = tempfile::tempdir().unwrap();
        let said = || format!("{:#}", plan(dir.path(), None, "amd64", u64::MAX).map(drop).unwrap_err());
        assert!(said().contains("is no OCI image layout"), "{}", said());
        std::os::unix::fs::symlink("index.json", dir.path().join("index.json")).unwrap();
        assert!(said().starts_with("cannot look at ") && said().contains("symbolic links"), "{}", said());
    }
}
