//! `puter image prune`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use crate::cli::output;
use crate::image::{Gone, Removed};
use crate::vm::files::plain;
use crate::vm::home::Home;
use crate::vm::images;
use crate::vm::settings::{Settings, show_size};

/// Delete the images that no VM and no snapshot needs, and the layers in the cache, which make the next pull of something
/// similar shorter and are of no other use. The image of new VMs stays.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "prune")]
pub struct Prune {
    /// tell what would go, and delete nothing
    #[argh(switch)]
    dry_run: bool,
    /// the image of new VMs as well, unless one of them needs it; it is pulled again for the next
    #[argh(switch)]
    all: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Prune {
    pub fn run(self) -> Result<()> {
        let (home, settings) = (Home::from_env()?, Settings::load()?);
        let removed = images::prune(&home, &settings, self.all, self.dry_run)?;
        if self.json {
            return output::print_json(&json!({
                "dry_run": self.dry_run,
                "images": removed.images,
                "layers": removed.layers,
                "layer_bytes": removed.layer_bytes,
                "bytes": removed.bytes(),
            }));
        }
        output::print(&text(&removed, self.dry_run));
        Ok(())
    }
}

fn text(removed: &Removed, dry: bool) -> String {
    let mut rows = Vec::new();
    for image in &removed.images {
        rows.push(["image".into(), name(image), image.digest.short(), show_size(image.bytes)]);
    }
    if removed.layers > 0 {
        rows.push(["layers".into(), removed.layers.to_string(), "-".into(), show_size(removed.layer_bytes)]);
    }
    if rows.is_empty() {
        return "nothing to delete: everything is needed".into();
    }
    let all = show_size(removed.bytes());
    let sum = if dry { format!("{all} would be free again") } else { format!("{all} are free again") };
    format!("{}\n\n{sum}", output::table(&rows))
}

fn name(image: &Gone) -> String {
    match image.names.as_slice() {
        [] => "-".into(),
        names => plain(&names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")),
    }
}
