//! Snapshots of a whole cluster: all members of one instant, and clusters that go on from there.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use serde::{Deserialize, Serialize};

use super::model::{Cluster, Member, Role, vm_name};
use super::run::{Tell, check_names};
use super::store::{locked, machine};
use super::{AT_ONCE, Outcome, existing, for_each, whole, wrong};
use crate::failpoint::reach;
use crate::protocol::address::check_vm_name;
use crate::vm::home::Home;
use crate::vm::lifecycle::{
    self, AnotherFailed, Context, RestoreOptions, Restored, Silent, SnapshotOptions, Taken, Together, unix_now,
};
use crate::vm::snapshots::{self, Reference, Snapshot, check_name};
use crate::vm::state::Origin;
use crate::vm::{Hint, files};

/// A snapshot of all members at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    pub name: String,
    /// Seconds since 1970-01-01 UTC.
    pub created: u64,
    /// The roles as they were.
    pub roles: Vec<Role>,
    /// The id of each member's snapshot.
    pub members: BTreeMap<String, String>,
}

/// A cluster, and a snapshot of it: `NAME` or `NAME@SNAPSHOT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CutName {
    pub cluster: String,
    /// The latest one where it is absent.
    pub which: Option<String>,
}

impl std::str::FromStr for CutName {
    type Err = String;

    fn from_str(text: &str) -> Result<CutName, String> {
        let Reference { vm, which } = text.parse()?;
        Ok(CutName { cluster: vm, which })
    }
}

impl std::fmt::Display for CutName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.which {
            Some(which) => write!(f, "{}@{which}", self.cluster),
            None => f.write_str(&self.cluster),
        }
    }
}

impl Cut {
    /// The members' snapshots, whether they are there or not.
    fn origins(&self, cluster: &str) -> impl Iterator<Item = Origin> {
        self.members.iter().map(move |(member, id)| Origin { vm: vm_name(cluster, member), id: id.clone() })
    }

    fn origin(&self, member: &Member) -> Result<Origin> {
        let id = self.members.get(&member.member);
        let id = id.with_context(|| format!("the snapshot '{}' has no member '{}'", self.name, member.member))?;
        Ok(Origin { vm: member.vm.clone(), id: id.clone() })
    }

    /// The members' snapshots, each of which must be there.
    fn snapshots(&self, home: &Home, members: &[Member]) -> Result<Vec<Snapshot>> {
        let one = |member: &Member| {
            let origin = self.origin(member)?;
            let reference = Reference { vm: origin.vm, which: Some(origin.id) };
            snapshots::find(home, &reference).with_context(|| format!("the snapshot '{}' is not whole", self.name))
        };
        members.iter().map(one).collect()
    }
}

/// A snapshot of the whole that was taken.
#[derive(Debug)]
pub struct TakenCut {
    pub cut: Cut,
    /// How far apart the first and the last member that ran came to stand still.
    pub spread: Option<Duration>,
    pub members: Vec<Outcome<Taken>>,
}

/// Takes a snapshot of all members at one instant: all stand still before the first is written, and go on together.
///
/// # Errors
/// When there is no such cluster, a member is not there, the name is taken, or one of the snapshots cannot be taken: none
/// is left then, and all members go on.
pub fn snapshot(context: &Context, name: &str, label: Option<&str>, disk_only: bool) -> Result<TakenCut> {
    locked(context.home, name, || {
        let options = SnapshotOptions { name: label.map(String::from), disk_only, automatic: false };
        let mut cluster = whole(context.home, name)?;
        // What somebody has removed member by member is no snapshot of the whole any more.
        let is_there = |origin: Origin| snapshots::load(context.home, &origin).is_ok();
        cluster.snapshots.retain(|cut| cut.origins(name).any(is_there));
        if let Some(label) = label {
            check_name(label).map_err(anyhow::Error::msg)?;
            if cluster.snapshots.iter().any(|cut| cut.name == label) {
                return Err(wrong(format!("'{name}' has a snapshot '{label}' already"), "choose another name"));
            }
        }
        let taken = take(context, &cluster, &options)?;
        cluster.snapshots.push(taken.cut.clone());
        if let Err(error) = cluster.save(context.home) {
            discard(context.home, &taken.members);
            return Err(error);
        }
        reach("cluster: snapshot written down");
        Ok(taken)
    })
}

/// Takes the members' snapshots, all or none. The caller holds the cluster.
fn take(context: &Context, cluster: &Cluster, options: &SnapshotOptions) -> Result<TakenCut> {
    let (home, name) = (context.home, &cluster.name);
    let members = cluster.members();
    if members.is_empty() {
        return Err(wrong(format!("'{name}' has no members"), format!("puter cluster scale {name} ROLE=N")));
    }
    for member in &members {
        if machine(home, member)?.is_none() {
            return Err(anyhow!("'{}' is not there", member.vm))
                .hint(format!("make and start it: puter cluster start {name}"));
        }
    }
    let together = Together::new(members.len());
    let work = |member: &Member| lifecycle::snapshot_together(context, &member.vm, options, &together);
    // All at once, since each waits for all others.
    let outcomes = for_each(context.observer, &members, members.len(), work, &|_, _| {});
    if outcomes.iter().any(|one| one.result.is_err()) {
        discard(home, &outcomes);
        // The first cause, not what it led to.
        let errors = outcomes.into_iter().filter_map(|one| one.result.err());
        let mut errors: Vec<anyhow::Error> = errors.collect();
        let led_to = |error: &anyhow::Error| error.chain().any(|cause| cause.is::<AnotherFailed>());
        let cause = errors.iter().position(|error| !led_to(error)).unwrap_or(0);
        return Err(errors.swap_remove(cause)).with_context(|| format!("no snapshot of '{name}' is taken"));
    }
    let ids = outcomes.iter().filter_map(|one| {
        let taken = one.result.as_ref().ok()?;
        Some((one.member.member.clone(), taken.snapshot.origin.id.clone()))
    });
    let created = unix_now();
    let (members, latest) =
        (ids.collect::<BTreeMap<_, _>>(), outcomes.iter().filter_map(|one| one.result.as_ref().ok()));
    let id = latest.map(|taken| taken.snapshot.origin.id.clone()).max();
    let label = options.name.clone().or(id).context("no snapshot was taken")?;
    let cut = Cut { name: label, created, roles: cluster.roles.clone(), members };
    Ok(TakenCut { cut, spread: together.spread(), members: outcomes })
}

fn discard(home: &Home, outcomes: &[Outcome<Taken>]) {
    for taken in outcomes.iter().filter_map(|one| one.result.as_ref().ok()) {
        let Origin { vm, id } = taken.snapshot.origin.clone();
        let _ = snapshots::delete(home, &Reference { vm, which: Some(id) });
    }
}

/// The snapshot that is meant.
fn find(cluster: &Cluster, name: &CutName) -> Result<Cut> {
    let cuts = &cluster.snapshots;
    let found = match &name.which {
        Some(which) => cuts.iter().find(|cut| cut.name == *which),
        None => cuts.last(),
    };
    let what = match &name.which {
        Some(which) => format!("'{}' has no snapshot '{which}'", cluster.name),
        None => format!("'{}' has no snapshot", cluster.name),
    };
    let all: Vec<&str> = cuts.iter().map(|cut| cut.name.as_str()).collect();
    let hint = match all.as_slice() {
        [] => format!("`puter cluster snapshot {}` takes one", cluster.name),
        all => format!("there are: {}", all.join(", ")),
    };
    found.cloned().ok_or_else(|| wrong(what, hint))
}

/// Lets all members go on from a snapshot of the whole. What they did since is lost.
///
/// # Errors
/// When there is no such snapshot, it is not whole or cannot go on here, the cluster has other members by now, or some run
/// and `force` is not set: all are left as they were. Of each member the result tells.
pub fn restore(
    context: &Context,
    name: &CutName,
    force: bool,
    disk_only: bool,
    tell: Tell<'_, Restored>,
) -> Result<(Cut, Vec<Outcome<Restored>>)> {
    let home = context.home;
    locked(home, &name.cluster, || {
        let cluster = whole(home, &name.cluster)?;
        let cut = find(&cluster, name)?;
        let members = cluster.members();
        let named: Vec<&String> = cut.members.keys().collect();
        let mut now: Vec<&String> = members.iter().map(|member| &member.member).collect();
        now.sort();
        if named != now {
            let sizes: Vec<String> = cut.roles.iter().map(|role| format!("{}={}", role.name, role.count)).collect();
            return Err(wrong(
                format!("'{}' had other members when '{}' was taken", cluster.name, cut.name),
                format!("give it those again: puter cluster scale {} {}", cluster.name, sizes.join(", then ")),
            ));
        }
        let active: Vec<&Member> = members
            .iter()
            .filter(|member| machine(home, member).is_ok_and(|vm| vm.is_some_and(|vm| vm.state().is_active())))
            .collect();
        if !force && !active.is_empty() {
            let names: Vec<&str> = active.iter().map(|member| member.member.as_str()).collect();
            return Err(wrong(
                format!(
                    "members of '{}' run: {}; what they did since '{}' would be lost",
                    cluster.name,
                    names.join(", "),
                    cut.name
                ),
                "give --force, or stop them first; `puter cluster snapshot` keeps what they are now",
            ));
        }
        let options = RestoreOptions { force, disk_only, flatten: false, isolate: false };
        for snapshot in cut.snapshots(home, &members)? {
            lifecycle::clone_check(context, &snapshot, options)?;
        }
        // None of them is to meet another that is still of a later time.
        let ended = for_each(
            &Silent,
            &active.into_iter().cloned().collect::<Vec<_>>(),
            AT_ONCE,
            |member| lifecycle::stop(context, &member.vm, Duration::ZERO, true).map(drop),
            &|_, _| {},
        );
        if let Some(error) = ended.into_iter().find_map(|one| one.result.err()) {
            return Err(error);
        }
        reach("cluster: ended for a restore");
        let work = |member: &Member| {
            let Origin { vm, id } = cut.origin(member)?;
            lifecycle::restore(context, &Reference { vm, which: Some(id) }, options)
        };
        let done = for_each(context.observer, &members, AT_ONCE, work, tell);
        Ok((cut, done))
    })
}

/// Makes a second cluster that goes on from a snapshot of the first, or from now where none is named. Each member has an
/// identity of its own, and the members' names lead to the new ones. It publishes no ports.
///
/// # Errors
/// When there is a cluster of this name, the snapshot is not whole, or any member cannot be cloned: nothing of the new
/// one is left then.
pub fn clone(
    context: &Context,
    source: &CutName,
    new: &str,
    options: RestoreOptions,
    tell: Tell<'_, Restored>,
) -> Result<Vec<Outcome<Restored>>> {
    let home = context.home;
    check_vm_name(new).map_err(anyhow::Error::msg)?;
    // Before anything stands still.
    let first = whole(home, &source.cluster)?;
    check_new(context, &first.roles, new, options.isolate)?;
    if source.which.is_some() {
        let cut = find(&first, source)?;
        let from = cut.snapshots(home, &Cluster { roles: cut.roles.clone(), ..first }.members())?;
        return locked(home, new, || clone_from(context, &cut, &from, new, options, tell));
    }
    let taken = locked(home, &source.cluster, || {
        let wanted = SnapshotOptions { name: None, disk_only: options.disk_only, automatic: true };
        take(context, &whole(home, &source.cluster)?, &wanted)
    })?;
    let snapshots = taken.members.into_iter().filter_map(|one| one.result.ok()).map(|taken| taken.snapshot);
    let from: Vec<Snapshot> = snapshots.collect();
    let done = locked(home, new, || clone_from(context, &taken.cut, &from, new, options, tell));
    for snapshot in &from {
        lifecycle::clones_made(context, snapshot);
    }
    done
}

/// The new cluster's record, if there can be such a one.
fn check_new(context: &Context, roles: &[Role], new: &str, isolate: bool) -> Result<Cluster> {
    let of = |role: &Role| {
        // Those that are added later are to be as these.
        let isolate = if isolate { Some(true) } else { role.isolate };
        Role { publish: Vec::new(), isolate, ..role.clone() }
    };
    let roles = roles.iter().map(of).collect();
    let wanted = Cluster { roles, unfinished: true, ..Cluster::new(new, Vec::new(), unix_now()) };
    wanted.check()?;
    match Cluster::load(context.home, new)? {
        Some(former) if !former.unfinished => Err(wrong(
            format!("there is a cluster '{new}' already"),
            format!("choose another name, or remove it: puter cluster delete {new}"),
        )),
        Some(_) => Ok(wanted),
        None => check_names(context, &wanted).map(|()| wanted),
    }
}

fn clone_from(
    context: &Context,
    cut: &Cut,
    from: &[Snapshot],
    new: &str,
    options: RestoreOptions,
    tell: Tell<'_, Restored>,
) -> Result<Vec<Outcome<Restored>>> {
    let home = context.home;
    let wanted = check_new(context, &cut.roles, new, options.isolate)?;
    if let Some(former) = Cluster::load(home, new)? {
        context.observer.note(new, "removing what a clone that was broken off left");
        clear(context, &former)?;
        check_names(context, &wanted)?;
    }
    let kinds =
        from.iter().map(|snapshot| lifecycle::clone_check(context, snapshot, options)).collect::<Result<Vec<_>>>()?;
    wanted.save(home)?;
    reach("cluster: clone written down");
    let members = wanted.members();
    let work = |member: &Member| {
        let at = members.iter().position(|other| other.member == member.member).unwrap_or(0);
        let (Some(snapshot), Some(kind)) = (from.get(at), kinds.get(at)) else {
            return Err(anyhow!("the snapshot '{}' has no member '{}'", cut.name, member.member));
        };
        lifecycle::clone(context, snapshot, kind, &member.vm, options, Some(member.place()))
    };
    let mut done = for_each(context.observer, &members, AT_ONCE, work, tell);
    if done.iter().all(|one| one.result.is_ok()) {
        Cluster { unfinished: false, ..wanted }.save(home)?;
        reach("cluster: clone finished");
        return Ok(done);
    }
    // Half a cluster is of no use.
    clear(context, &wanted)?;
    done.retain(|one| one.result.is_err());
    let error = done.swap_remove(0).result.err().unwrap_or_else(|| anyhow!("a member failed"));
    Err(error).with_context(|| format!("'{new}' is not made"))
}

/// Removes the members that there are, and the record.
fn clear(context: &Context, cluster: &Cluster) -> Result<()> {
    let work = |member: &Member| match machine(context.home, member)? {
        Some(_) => lifecycle::delete(context, &member.vm, true, false),
        None => Ok(()),
    };
    let gone = for_each(&Silent, &cluster.members(), AT_ONCE, work, &|_, _| {});
    match gone.into_iter().find_map(|one| one.result.err()) {
        Some(error) => Err(error),
        None => files::remove(&context.home.cluster(&cluster.name)),
    }
}

/// Deletes a snapshot of the whole: the parts, and then what the record says of it.
///
/// # Errors
/// When there is no such cluster or snapshot, or a part is needed: nothing is deleted then. When a part cannot be removed:
/// the same again does the rest.
pub fn delete_cut(home: &Home, name: &CutName) -> Result<Cut> {
    locked(home, &name.cluster, || {
        let mut cluster = existing(home, &name.cluster)?;
        if name.which.is_none() {
            let hint = format!("name one as {0}@SNAPSHOT; `puter cluster snapshots {0}` shows them", cluster.name);
            return Err(wrong("no snapshot is named", hint));
        }
        let cut = find(&cluster, name)?;
        let parts: Vec<Origin> = cut.origins(&cluster.name).collect();
        snapshots::delete_together(home, &parts).with_context(|| format!("cannot delete {name}"))?;
        reach("cluster: snapshot's parts removed");
        cluster.snapshots.retain(|other| *other != cut);
        cluster
            .save(home)
            .context("its parts are deleted, the record still names it")
            .hint("the same again ends it")?;
        reach("cluster: snapshot forgotten");
        Ok(cut)
    })
}

/// The snapshots of a cluster, the oldest first, each with whether all its parts are there.
///
/// # Errors
/// When there is no such cluster.
pub fn cuts(home: &Home, name: &str) -> Result<Vec<(Cut, bool)>> {
    let cluster = existing(home, name)?;
    let is_whole = |cut: &Cut| cut.origins(name).all(|origin| snapshots::load(home, &origin).is_ok());
    Ok(cluster.snapshots.into_iter().map(|cut| (cut.clone(), is_whole(&cut))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::cluster::model::tests::{cluster, role};

    #[test]
    fn the_latest_snapshot_is_meant_where_none_is_named() {
        let mut shop = cluster(vec![role("web", 1, &[])]);
        let name = |text: &str| text.parse::<CutName>().unwrap();
        assert!(find(&shop, &name("shop")).unwrap_err().to_string().contains("has no snapshot"));
        for label in ["one", "two"] {
            let members = [("web1".to_string(), "20260101-000000".to_string())].into();
            shop.snapshots.push(Cut { name: label.into(), created: 0, roles: shop.roles.clone(), members });
        }
        assert_eq!(find(&shop, &name("shop")).unwrap().name, "two");
        assert_eq!(find(&shop, &name("shop@one")).unwrap().name, "one");
        let error = find(&shop, &name("shop@three")).unwrap_err();
        assert_eq!(error.to_string(), "'shop' has no snapshot 'three'");
        assert_eq!(error.downcast_ref::<crate::vm::Hinted>().unwrap().hint(), "there are: one, two");
        assert!("Shop@x".parse::<CutName>().is_err() && "shop@".parse::<CutName>().is_err());
        assert_eq!(name("shop@one").to_string(), "shop@one");
    }
}
