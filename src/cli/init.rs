//! `puter init`.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, anyhow};
use argh::{ArgsInfo, FromArgs};

use super::{output, with_context};
use crate::vm::settings::show_size;
use crate::vm::{Hint, init};

/// Pull the default image, make its disk and install its kernel.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "init")]
pub struct Init {
    /// image for new VMs, as docker writes it, or oci:DIR[:TAG], or docker-archive:FILE
    #[argh(option)]
    image: Option<String>,
    /// kernel file to use in place of the image's own
    #[argh(option)]
    kernel: Option<PathBuf>,
    /// initrd file that goes with --kernel
    #[argh(option)]
    initrd: Option<PathBuf>,
    /// ask the registry again even where the image is here
    #[argh(switch)]
    refresh: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Init {
    pub fn run(self) -> Result<()> {
        let began = Instant::now();
        with_context(|context| {
            let image = self
                .image
                .clone()
                .or_else(|| init::default_image(context))
                .ok_or_else(|| anyhow!("no image is named"))
                .hint("`puter init --image IMAGE`; IMAGE can be a registry's or oci:DIR for one on this disk")?;
            let (kernel, initrd) = (self.kernel.as_deref(), self.initrd.as_deref());
            let image = init::init(context, &image, kernel, initrd, self.refresh)?;
            if self.json {
                return output::print_json(&serde_json::json!({
                    "image": image.reference.to_string(),
                    "digest": image.digest.to_string(),
                    "disk": image.disk,
                    "disk_size": image.disk_size,
                    "kernel": context.home.kernel(),
                    "seconds": began.elapsed().as_secs_f64(),
                }));
            }
            output::print(&format!(
                "ready: {} ({}, {:.1} s)\nnext: puter start NAME",
                image.reference,
                show_size(image.disk_size),
                began.elapsed().as_secs_f64()
            ));
            Ok(())
        })
    }
}
