//! `puter image list`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use super::shown_users;
use crate::cli::output::{self, show_seconds};
use crate::vm::home::Home;
use crate::vm::images::{self, Entry};
use crate::vm::lifecycle::unix_now;
use crate::vm::settings::{Settings, show_size};

/// List the images: their size as a guest sees it and on the disk, their age here, and who needs them. The one with a star
/// is that of new VMs; one without a name has lost it to a newer image.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "list")]
pub struct List {
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl List {
    pub fn run(self) -> Result<()> {
        let (home, settings) = (Home::from_env()?, Settings::load()?);
        let all = images::list(&home, &settings)?;
        let mut lines: Vec<(Option<String>, &Entry)> = Vec::new();
        for entry in &all {
            match entry.kept.names.as_slice() {
                [] => lines.push((None, entry)),
                names => lines.extend(names.iter().map(|name| (Some(name.to_string()), entry))),
            }
        }
        lines.sort_by(|a, b| (a.0.is_none(), &a.0).cmp(&(b.0.is_none(), &b.0)));
        if self.json {
            return output::print_json(&lines.iter().map(shown).collect::<Vec<_>>());
        }
        if lines.is_empty() {
            output::print("no images yet; `puter init --image IMAGE` or `puter image pull IMAGE` gets one");
            return Ok(());
        }
        let mut rows = vec![["IMAGE", "DIGEST", "ARCH", "SIZE", "ON DISK", "AGE", "USED BY"].map(String::from)];
        for (name, entry) in &lines {
            let star = if entry.is_default { " *" } else { "" };
            let image = entry.kept.image.as_ref();
            let known = |text: Option<String>| text.unwrap_or_else(|| "?".into());
            rows.push([
                format!("{}{star}", crate::vm::files::plain(name.as_deref().unwrap_or("-"))),
                entry.kept.digest.short(),
                known(image.map(|image| image.architecture.clone())),
                known(image.map(|image| show_size(image.disk_size))),
                show_size(entry.kept.used),
                known(image.map(|image| show_seconds(unix_now().saturating_sub(image.created)))),
                shown_users(&entry.users),
            ]);
        }
        output::print(&output::table(&rows));
        if all.iter().any(|entry| entry.kept.image.is_none()) {
            output::print("\n?: damaged, or made by another version of puter; `puter image pull IMAGE` makes it anew");
        }
        Ok(())
    }
}

fn shown((name, entry): &(Option<String>, &Entry)) -> serde_json::Value {
    let image = entry.kept.image.as_ref();
    json!({
        "reference": name,
        "digest": entry.kept.digest,
        "architecture": image.map(|image| &image.architecture),
        "size": image.map(|image| image.disk_size),
        "used": entry.kept.used,
        "created": image.map(|image| image.created),
        "default": entry.is_default,
        "whole": image.is_some(),
        "used_by": entry.users.iter().map(|user| user.name()).collect::<Vec<_>>(),
    })
}
