//! A registry's JSON: manifests, indexes, configurations, and the index of a layout.

use puter::image::manifest::{Document, MAX_MANIFEST, choose_tag, parse, parse_config};

pub fn run(input: &[u8]) {
    for content_type in ["", "application/vnd.docker.distribution.manifest.v1+prettyjws"] {
        match parse(input, content_type, "amd64") {
            Ok(Document::Image(manifest)) => {
                assert!(manifest.layers.len() <= 512);
                for layer in &manifest.layers {
                    let same = manifest.layers.iter().filter(|other| other.digest == layer.digest);
                    assert!(same.clone().all(|other| other.size == layer.size));
                }
            }
            Ok(Document::Index(descriptor)) => assert!(descriptor.size <= MAX_MANIFEST),
            Err(error) => readable(&error),
        }
    }
    for tag in [None, Some("v")] {
        if let Err(error) = choose_tag(input, tag, "amd64") {
            readable(&error);
        }
    }
    for layers in 0..3 {
        match parse_config(input, layers, "amd64") {
            Ok(config) => assert_eq!((config.diff_ids.len(), config.architecture.as_str()), (layers, "amd64")),
            Err(error) => readable(&error),
        }
    }
}

/// An error is one line that no terminal minds.
fn readable(error: &anyhow::Error) {
    let text = format!("{error:#}");
    assert!(!text.is_empty() && text.chars().count() < 4000, "{} bytes", text.len());
    assert!(!text.contains(char::is_control), "{}", text.escape_debug());
}
