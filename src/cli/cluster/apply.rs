//! `puter cluster apply`.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use argh::{ArgsInfo, FromArgs};
use serde_json::json;

use super::super::{misused, output, with_context};
use super::{as_json, began, conclude};
use crate::vm::Hint;
use crate::vm::cluster::{self, Action, Applied, Member, Outcome, Plan, Planned, RoleChange, Takes};
use crate::vm::files::plain;
use crate::vm::lifecycle::Context;

/// Make a cluster what its file says: shows what differs, and changes no more than that takes. Before members are deleted
/// or made again it asks. The same command again completes what failed.
///
/// What the file does not say, and did not say before, is left as it is.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "apply")]
pub struct Apply {
    /// name of the cluster; a file may have it
    #[argh(positional, arg_name = "cluster")]
    name: Option<String>,
    /// file with the cluster's roles, in TOML
    #[argh(option, short = 'f')]
    file: Option<PathBuf>,
    /// delete members, and make members again, without asking
    #[argh(switch)]
    yes: bool,
    /// show what would be done, and change nothing
    #[argh(switch)]
    dry_run: bool,
    /// seconds to wait before a member is stopped by force (default: the setting stop_timeout, 30)
    #[argh(option)]
    timeout: Option<u64>,
    /// print the plan, and what came of it, as JSON
    #[argh(switch)]
    json: bool,
}

impl Apply {
    pub fn run(self) -> Result<()> {
        let Some(file) = &self.file else {
            return Err(misused("no file is named", "puter cluster apply -f FILE"));
        };
        let wanted = cluster::read(file, self.name.as_deref())?;
        with_context(|context| {
            let plan = cluster::compare(context, &wanted)?;
            if !self.json {
                output::print(&text(&plan));
            }
            let done = self.go_on(context, &wanted, &plan);
            if self.json {
                let results = done.as_ref().ok().and_then(Option::as_ref);
                let mut all = json!(plan);
                all["applied"] = results.is_some().into();
                all["results"] =
                    results.map(|all| all.iter().map(|one| as_json(one, shown)).collect::<Vec<_>>()).into();
                output::print_json(&all)?;
            }
            match done? {
                Some(done) => conclude(&done, format_args!("puter cluster apply -f {}", file.display())),
                None => Ok(()),
            }
        })
    }

    /// Does what is planned where that is wanted.
    fn go_on(
        &self,
        context: &Context,
        wanted: &cluster::Cluster,
        plan: &Plan,
    ) -> Result<Option<Vec<Outcome<Applied>>>> {
        if plan.is_empty() && (self.dry_run || !plan.broken_off) {
            return Ok(None);
        }
        // Also of a dry run: it would be no help if it left that out.
        cluster::check_plan(context, wanted, plan)?;
        if self.dry_run {
            return Ok(None);
        }
        self.agree(plan)?;
        let timeout = self.timeout.map_or(context.settings.stop_timeout, Duration::from_secs);
        cluster::apply(context, wanted, plan, timeout, &tell(self.json)).map(Some)
    }

    /// Asks before anything is lost.
    fn agree(&self, plan: &Plan) -> Result<()> {
        let (gone, again) = (plan.count(Action::Delete), plan.count(Action::Recreate));
        if self.yes || gone + again == 0 {
            return Ok(());
        }
        let what = match (gone, again) {
            (gone, 0) => format!("{} deleted", members(gone)),
            (0, again) => format!("{} made again", members(again)),
            (gone, again) => format!("{} deleted and {again} made again", members(gone)),
        };
        if !std::io::stdin().is_terminal() {
            return Err(anyhow!("{what}, and there is nobody to ask: standard input is no terminal"))
                .hint("`--yes` does it without asking, `--dry-run` only shows what would be done");
        }
        eprint!("{what}, with all that is on their disks. Go on? [y/N] ");
        std::io::stderr().flush()?;
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer).context("cannot read the answer")?;
        match answer.trim() {
            "y" | "Y" | "yes" => Ok(()),
            _ => Err(anyhow!("'{}' is left as it is", plan.cluster)).hint("`--yes` does it without asking"),
        }
    }
}

fn members(count: usize) -> String {
    format!("{count} member{} {}", if count == 1 { "" } else { "s" }, if count == 1 { "is" } else { "are" })
}

/// The plan for people, a line for each member and each role.
fn text(plan: &Plan) -> String {
    let name = &plan.cluster;
    if plan.is_empty() {
        return format!("{name} is as the file says; there is nothing to do");
    }
    let width = plan.members.iter().map(|one| one.member.member.len()).max().unwrap_or(0);
    let mut lines = vec![match plan.new {
        true => format!("{name} is not there yet; to be done:"),
        false => format!("{name} differs from the file; to be done:"),
    }];
    lines.extend(plan.roles.iter().map(of_role));
    lines.extend(plan.members.iter().map(|one| {
        let (sign, what) = of_member(one);
        format!("  {sign} {:<width$}  {what}", one.member.member)
    }));
    let all = [
        (Action::Create, "create"),
        (Action::Start, "start"),
        (Action::Change, "change"),
        (Action::Recreate, "make again"),
        (Action::Delete, "delete"),
    ];
    let counts: Vec<String> = all.map(|(action, word)| format!("{} to {word}", plan.count(action))).into();
    lines.push(counts.join(", "));
    plain(&lines.join("\n"))
}

fn of_role(change: &RoleChange) -> String {
    let RoleChange { role, setting, from, to } = change;
    match (*setting, from, to) {
        ("role", _, Some(what)) => format!("  ~ the role {role} is {what}"),
        (_, None, None) => {
            format!("  ~ the role {role} has another '{setting}', for members that are made from now on")
        }
        _ => {
            let word = |text: &Option<String>| text.clone().unwrap_or_else(|| "unsaid".into());
            format!("  ~ the role {role}: {setting} {} -> {}; no member changes", word(from), word(to))
        }
    }
}

/// The sign of what is done, and what that is.
fn of_member(one: &Planned) -> (char, String) {
    let changes: Vec<String> = one
        .changes
        .iter()
        .map(|change| {
            let takes = match change.takes {
                Takes::Nothing => "",
                Takes::Restart => " (restart)",
                Takes::Recreation => " (re-creation)",
            };
            let what = match (&change.from, &change.to) {
                (Some(from), Some(to)) => format!("{} {from} -> {to}", change.setting),
                (None, Some(to)) => format!("{} {to}", change.setting),
                (from, None) => format!("{} no more {}", change.setting, from.as_deref().unwrap_or_default()),
            };
            format!("{what}{takes}")
        })
        .collect();
    let changes = changes.join(", ");
    match one.action {
        Action::Create => ('+', "create".into()),
        Action::Start => ('>', "start".into()),
        Action::Change if one.start => ('~', format!("change {changes}; start")),
        Action::Change => ('~', format!("change {changes}")),
        Action::Recreate => ('!', format!("delete and create again: {changes}")),
        Action::Delete => ('-', "delete".into()),
    }
}

fn shown(applied: &Applied) -> serde_json::Value {
    let mut all = applied.began.as_ref().map_or(json!({}), began);
    all["action"] = json!(applied.action);
    all
}

/// Tells what was done of a member.
fn tell(json: bool) -> impl Fn(&Member, &Result<Applied>) + Sync {
    move |member, result| {
        let (false, Ok(Applied { action, began })) = (json, result) else { return };
        let what = match action {
            Action::Delete => Some("deleted"),
            Action::Recreate => Some("made again"),
            Action::Change => Some("changed"),
            _ => None,
        };
        let runs = began.as_ref().filter(|began| !began.ran);
        let runs = runs.map(|began| format!("runs at {} ({:.1} s)", began.ip, began.took.as_secs_f64()));
        let all: Vec<&str> = what.into_iter().chain(runs.as_deref()).collect();
        let all = if all.is_empty() { "runs already".into() } else { all.join(", ") };
        output::print(&format!("{}: {all}", member.member));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::cluster::Change;

    #[test]
    fn a_plan_is_a_line_for_each_member_and_nothing_in_it_steers_a_terminal() {
        let planned = |member: &str, action, start, changes: Vec<Change>| {
            let member = Member {
                member: member.into(),
                role: "web".into(),
                number: 1,
                vm: format!("shop-{member}"),
                cluster: "shop".into(),
            };
            let (restart, options) = (false, Default::default());
            Planned { member, action, restart, start, changes, options, taken_back: Vec::new(), added: Vec::new() }
        };
        let change = |setting, from: Option<&str>, to: Option<&str>, takes| Change {
            setting,
            from: from.map(String::from),
            to: to.map(String::from),
            takes,
        };
        let mut plan = Plan {
            cluster: "shop".into(),
            new: false,
            broken_off: false,
            roles: vec![
                RoleChange { role: "web".into(), setting: "run", from: None, to: None },
                RoleChange { role: "db".into(), setting: "cpus", from: None, to: Some("1".into()) },
                RoleChange { role: "old".into(), setting: "role", from: None, to: Some("removed".into()) },
            ],
            members: vec![
                planned("web1", Action::Create, true, vec![]),
                planned("web2", Action::Start, true, vec![]),
                planned(
                    "web3",
                    Action::Change,
                    false,
                    vec![
                        change("cpus", Some("1"), Some("2"), Takes::Restart),
                        change("publish", None, Some("127.0.0.1:0:80/tcp"), Takes::Nothing),
                        change("publish", Some("127.0.0.1:8080:80/tcp"), None, Takes::Nothing),
                    ],
                ),
                planned("web4", Action::Change, true, vec![change("cpus", Some("1"), Some("2"), Takes::Restart)]),
                planned(
                    "web10",
                    Action::Recreate,
                    true,
                    vec![change("image", Some("a"), Some("\x1b[2Jb\r"), Takes::Recreation)],
                ),
                planned("web11", Action::Delete, false, vec![]),
            ],
        };
        let expected = "\
shop differs from the file; to be done:
  ~ the role web has another 'run', for members that are made from now on
  ~ the role db: cpus unsaid -> 1; no member changes
  ~ the role old is removed
  + web1   create
  > web2   start
  ~ web3   change cpus 1 -> 2 (restart), publish 127.0.0.1:0:80/tcp, publish no more 127.0.0.1:8080:80/tcp
  ~ web4   change cpus 1 -> 2 (restart); start
  ! web10  delete and create again: image a -> b (re-creation)
  - web11  delete
1 to create, 1 to start, 2 to change, 1 to make again, 1 to delete";
        assert_eq!(text(&plan), expected);
        plan.new = true;
        assert!(text(&plan).starts_with("shop is not there yet"));
        (plan.roles, plan.members) = (Vec::new(), Vec::new());
        assert_eq!(text(&plan), "shop is as the file says; there is nothing to do");
    }
}
