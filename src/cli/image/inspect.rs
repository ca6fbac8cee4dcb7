//! `puter image inspect`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use super::{each, shown_users, verdict};
use crate::cli::output::{self, show_seconds};
use crate::image::{Image, LayerId, Store, host_architecture};
use crate::vm::files::plain;
use crate::vm::home::Home;
use crate::vm::images::{self, Entry};
use crate::vm::lifecycle::unix_now;
use crate::vm::settings::{Settings, show_size};

/// Show everything about images: what they boot with or why they cannot, their layers and who needs them. With --json also
/// the configuration as the image's maker wrote it.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "inspect")]
pub struct Inspect {
    /// names of the images, or digests
    #[argh(positional, arg_name = "image")]
    images: Vec<String>,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Inspect {
    pub fn run(self) -> Result<()> {
        let (home, settings) = (Home::from_env()?, Settings::load()?);
        let (found, failed) = each(&self.images, |text| images::find(&home, &settings, text))?;
        if self.json {
            let shown: Result<Vec<_>> = found.iter().map(|(store, entry)| shown(&home, store, entry)).collect();
            output::print_json(&shown?)?;
        } else if !found.is_empty() {
            let texts: Vec<_> = found.iter().map(|(store, entry)| text(&home, store, entry)).collect();
            output::print(&texts.join("\n\n"));
        }
        verdict(&self.images, failed)
    }
}

/// Why a VM cannot be made of the image on this host; none where it can.
fn hindrance(home: &Home, image: &Image) -> Option<String> {
    if image.architecture != host_architecture() {
        return Some(format!("it is made for {}, this host is {}", image.architecture, host_architecture()));
    }
    if let Some(missing) = image.lacks() {
        return Some(format!("it lacks {missing}"));
    }
    let installed = image.kernel.is_some() || home.kernel().is_file();
    (!installed).then(|| "it has no kernel, and `puter init` has installed none".into())
}

fn text(home: &Home, store: &Store, entry: &Entry) -> String {
    let mut rows = Vec::new();
    let mut row = |name: &str, value: String| rows.push([format!("{name}:"), plain(&value)]);
    for name in &entry.kept.names {
        row("image", name.to_string());
    }
    row("digest", entry.kept.digest.to_string());
    if let Some(image) = &entry.kept.image {
        row("platform", format!("linux/{}", image.architecture));
        row("size", format!("{}, {} on disk", show_size(image.disk_size), show_size(entry.kept.used)));
        row("made", format!("{} ago", show_seconds(unix_now().saturating_sub(image.created))));
        let none = || "none".to_string();
        let own = |name: &Option<String>| name.clone().unwrap_or_else(none);
        row("kernel", own(&image.kernel_name));
        row("initrd", own(&image.initrd_name));
        row("init", own(&image.init));
        row("agent", own(&image.agent));
        row("bootable", hindrance(home, image).map_or("yes".into(), |why| format!("no: {why}")));
        row("disk", image.disk.display().to_string());
        for layer in &image.layers {
            let cached = if store.has_layer(layer) { ", cached" } else { "" };
            row("layer", format!("{} ({}{cached})", named(layer), show_size(layer.size)));
        }
    } else {
        row("size", format!("{} on disk", show_size(entry.kept.used)));
        row("bootable", "no: it is damaged, or made by another version of puter; pull it again".into());
    }
    row("used by", shown_users(&entry.users));
    if entry.is_default {
        row("default", "new VMs are made of it".into());
    }
    output::table(&rows)
}

fn named(layer: &LayerId) -> String {
    layer.digest.unwrap_or(layer.diff_id).to_string()
}

fn shown(home: &Home, store: &Store, entry: &Entry) -> Result<serde_json::Value> {
    let image = entry.kept.image.as_ref();
    let layer = |layer: &LayerId| {
        json!({
            "digest": layer.digest,
            "diff_id": layer.diff_id,
            "size": layer.size,
            "cached": store.has_layer(layer),
        })
    };
    let why = match image {
        Some(image) => hindrance(home, image),
        None => Some("it is damaged, or made by another version of puter".into()),
    };
    Ok(json!({
        "references": entry.kept.names,
        "digest": entry.kept.digest,
        "os": "linux",
        "architecture": image.map(|image| &image.architecture),
        "size": image.map(|image| image.disk_size),
        "used": entry.kept.used,
        "created": image.map(|image| image.created),
        "kernel": image.and_then(|image| image.kernel_name.as_ref()),
        "initrd": image.and_then(|image| image.initrd_name.as_ref()),
        "init": image.and_then(|image| image.init.as_ref()),
        "agent": image.and_then(|image| image.agent.as_ref()),
        "bootable": why.is_none(),
        "why_not": why,
        "disk": image.map(|image| &image.disk),
        "layers": image.map(|image| image.layers.iter().map(layer).collect::<Vec<_>>()),
        "default": entry.is_default,
        "used_by": entry.users.iter().map(|user| user.name()).collect::<Vec<_>>(),
        "config": image.map(Image::config).transpose()?,
    }))
}
