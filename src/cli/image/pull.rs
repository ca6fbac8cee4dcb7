//! `puter image pull`.

use std::time::Instant;

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use super::{each, verdict};
use crate::cli::output;
use crate::cli::progress::Progress;
use crate::image::host_architecture;
use crate::vm::home::Home;
use crate::vm::images::{self, Pulled};
use crate::vm::lifecycle::{Context, Observer, Silent};
use crate::vm::settings::{Settings, show_size};

/// Pull images and make their disks. The registry is always asked what the name means now; what is here already is not
/// downloaded again. VMs stay on the image that they were made of.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "pull")]
pub struct Pull {
    /// names of the images
    #[argh(positional, arg_name = "image")]
    images: Vec<String>,
    /// which of the images that share the name, as linux/arm64 or arm64 (default: the host's)
    #[argh(option, from_str_fn(platform))]
    platform: Option<String>,
    /// print the images' digests and nothing else, no progress either
    #[argh(switch, short = 'q')]
    quiet: bool,
    /// print JSON when all is done, and no progress
    #[argh(switch)]
    json: bool,
}

/// Reads `[linux/]ARCHITECTURE[/VARIANT]`, in OCI's words or those of uname.
fn platform(text: &str) -> Result<String, String> {
    let wrong = |why: &str| Err(format!("'{text}' is no platform: {why}; write linux/amd64 or linux/arm64"));
    let parts: Vec<&str> = text.split('/').collect();
    let (architecture, variant) = match parts.as_slice() {
        ["linux"] => (host_architecture(), None),
        [architecture] | ["linux", architecture] => (*architecture, None),
        ["linux", architecture, variant] => (*architecture, Some(*variant)),
        _ => return wrong("VMs run Linux"),
    };
    let architecture = match architecture {
        "x86_64" | "x86-64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    if architecture.is_empty() || !architecture.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()) {
        return wrong("an architecture is a word such as amd64");
    }
    match variant {
        None => Ok(architecture.into()),
        // What every image for it is.
        Some("v8") if architecture == "arm64" => Ok(architecture.into()),
        Some(_) => wrong("puter does not tell variants of an architecture apart"),
    }
}

impl Pull {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        home.prepare()?;
        let settings = Settings::load()?;
        let progress = Progress::new();
        let silent = self.quiet || self.json;
        let observer: &dyn Observer = if silent { &Silent } else { &progress };
        let context = Context { home: &home, settings: &settings, observer };
        let outcome = each(&self.images, |text| {
            let began = Instant::now();
            let pulled = images::pull(&context, text, self.platform.as_deref())?;
            let seconds = began.elapsed().as_secs_f64();
            if self.quiet && !self.json {
                output::print(&pulled.image.digest.to_string());
            } else if !self.json {
                tell(&pulled, seconds);
            }
            Ok((pulled, seconds))
        });
        progress.finish();
        let (pulled, failed) = outcome?;
        if self.json {
            output::print_json(&pulled.iter().map(shown).collect::<Vec<_>>())?;
        }
        verdict(&self.images, failed)
    }
}

fn tell(Pulled { image, former }: &Pulled, seconds: f64) {
    let (name, digest, size) = (&image.reference, image.digest.short(), show_size(image.disk_size));
    let told = match former {
        Some(former) if *former == image.digest => format!("{name} is up to date ({digest}, {size})"),
        Some(former) => format!("{name} is {digest} now, no longer {} ({size}, {seconds:.1} s)", former.short()),
        None => format!("{name} pulled ({digest}, {size}, {seconds:.1} s)"),
    };
    output::print(&crate::vm::files::plain(&told));
    if image.architecture != host_architecture() {
        eprintln!("note: it is made for {}, and no VM on this host can run it", image.architecture);
    } else if let Some(missing) = image.lacks() {
        eprintln!("note: no VM can be made of it: it lacks {missing}");
    }
}

fn shown((Pulled { image, former }, seconds): &(Pulled, f64)) -> serde_json::Value {
    json!({
        "reference": image.reference,
        "digest": image.digest,
        "former": former,
        "changed": *former != Some(image.digest),
        "architecture": image.architecture,
        "size": image.disk_size,
        "disk": image.disk,
        "seconds": seconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_platform_is_written_as_docker_or_uname_does_it() {
        for (text, architecture) in [
            ("linux/arm64", "arm64"),
            ("linux/arm64/v8", "arm64"),
            ("arm64", "arm64"),
            ("linux/x86_64", "amd64"),
            ("aarch64", "arm64"),
            ("linux/riscv64", "riscv64"),
            ("linux", host_architecture()),
        ] {
            assert_eq!(platform(text).as_deref(), Ok(architecture), "{text}");
        }
        for bad in ["", "windows/amd64", "linux/", "linux/arm/v7", "linux/arm64/v9", "a/b/c/d", "linux/a b"] {
            assert!(platform(bad).unwrap_err().contains("is no platform"), "{bad}");
        }
    }
}
