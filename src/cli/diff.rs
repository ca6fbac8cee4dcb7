//! `puter diff`.

use anyhow::{Result, anyhow};
use argh::{ArgsInfo, FromArgs};

use super::output;
use crate::vm::diff::{Kind, diff};
use crate::vm::home::Home;
use crate::vm::settings::show_size;
use crate::vm::snapshots::Reference;

/// Show which files differ between two snapshots, by their size, mode, owner and time.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "diff")]
pub struct Diff {
    /// a snapshot as VM@SNAPSHOT, or a stopped VM
    #[argh(positional, arg_name = "name")]
    before: String,
    /// what it is compared with
    #[argh(positional, arg_name = "name")]
    after: String,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Diff {
    pub fn run(self) -> Result<()> {
        let home = Home::from_env()?;
        let parse = |text: &str| text.parse::<Reference>().map_err(|why| anyhow!(why));
        let diff = diff(&home, &parse(&self.before)?, &parse(&self.after)?)?;
        if self.json {
            return output::print_json(&diff);
        }
        for change in &diff.changes {
            let sign = match change.kind {
                Kind::Added => '+',
                Kind::Deleted => '-',
                Kind::Modified => '~',
            };
            let size = match change.size {
                [Some(was), Some(is)] if was != is => format!(" ({} -> {})", show_size(was), show_size(is)),
                [_, Some(size)] | [Some(size), None] => format!(" ({})", show_size(size)),
                [None, None] => String::new(),
            };
            // A guest chose the names.
            let path: String = change.path.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
            output::print(&format!("{sign} {path}{size}"));
        }
        let files = diff.changes.len();
        let plural = if files == 1 { "file differs" } else { "files differ" };
        let memory = match diff.memory {
            [Some(was), Some(is)] => format!("; memory {} -> {}", show_size(was), show_size(is)),
            _ => String::new(),
        };
        output::print(&format!("{files} {plural}{memory}"));
        Ok(())
    }
}
