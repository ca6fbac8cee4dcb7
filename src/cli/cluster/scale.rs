//! `puter cluster scale`.

use std::time::Duration;

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use super::super::{output, with_context};
use super::{as_json, began, conclude, tell_began, tell_deleted};
use crate::vm::cluster;

/// Give a role another number of members. New ones start; where there are too many the last are stopped and deleted.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "scale")]
pub struct Scale {
    /// name of the cluster
    #[argh(positional, arg_name = "cluster")]
    name: String,
    /// the role and how many members it is to have, as ROLE=N
    #[argh(positional, arg_name = "spec", from_str_fn(size))]
    size: (String, u32),
    /// seconds to wait before force (default: the setting stop_timeout, 30)
    #[argh(option)]
    timeout: Option<u64>,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

fn size(text: &str) -> Result<(String, u32), String> {
    let parts = text.split_once('=').and_then(|(role, count)| Some((role.to_string(), count.parse().ok()?)));
    parts.ok_or_else(|| format!("'{text}' is not ROLE=N, such as node=3"))
}

impl Scale {
    pub fn run(self) -> Result<()> {
        with_context(|context| {
            let timeout = self.timeout.map_or(context.settings.stop_timeout, Duration::from_secs);
            let (role, count) = &self.size;
            let (runs, gone) = (tell_began(self.json), tell_deleted(self.json));
            let done = cluster::scale(context, &self.name, role, *count, timeout, (&runs, &gone))?;
            if self.json {
                let started: Vec<_> = done.started.iter().map(|one| as_json(one, began)).collect();
                let removed: Vec<_> = done.removed.iter().map(|one| as_json(one, |()| json!({}))).collect();
                output::print_json(&json!({ "running": started, "deleted": removed }))?;
            }
            let again = format!("puter cluster scale {} {role}={count}", self.name);
            let removed = conclude(&done.removed, &again);
            conclude(&done.started, &again).and(removed)
        })
    }
}
