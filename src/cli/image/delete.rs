//! `puter image delete`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::{each, verdict};
use crate::cli::output;
use crate::image::Removed;
use crate::vm::files::plain;
use crate::vm::home::Home;
use crate::vm::images;
use crate::vm::settings::{Settings, show_size};

/// Forget names of images, and delete an image with its last name, or by its digest with all of them. One that a VM or a
/// snapshot needs stays.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "delete")]
pub struct Delete {
    /// names of the images, or digests
    #[argh(positional, arg_name = "image")]
    images: Vec<String>,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Delete {
    pub fn run(self) -> Result<()> {
        let (home, settings) = (Home::from_env()?, Settings::load()?);
        let (removed, failed) = each(&self.images, |text| {
            let (removed, was_default) = images::delete(&home, &settings, text)?;
            if !self.json {
                tell(text, &removed);
            }
            if was_default {
                eprintln!("note: new VMs were made of it; the next `puter start` of one pulls it again");
            }
            Ok(removed)
        })?;
        if self.json {
            output::print_json(&removed)?;
        }
        verdict(&self.images, failed)
    }
}

fn tell(text: &str, removed: &Removed) {
    for image in &removed.images {
        let told = match image.left.first() {
            Some(other) => format!("{text} forgotten; the image is still there as {other}"),
            None => format!("{text} deleted ({} are free again)", show_size(removed.bytes())),
        };
        output::print(&plain(&told));
    }
}
