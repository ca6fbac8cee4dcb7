//! Members that go: `delete` and `scale`.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};

use super::model::{Cluster, Member, vm_name};
use super::run::{Began, Tell, check_names, start_locked, stop_member};
use super::store::{locked, strays, whole};
use super::{AT_ONCE, Outcome, existing, for_each, wrong};
use crate::failpoint::reach;
use crate::vm::home::Home;
use crate::vm::lifecycle::{self, Context};
use crate::vm::state::Vm;
use crate::vm::{Hint, files, snapshots};

/// Deletes the cluster with its members, and their snapshots where `with_snapshots` is set. Before anything goes, all
/// that is in the way is looked for.
///
/// # Errors
/// When there is no such cluster, members run and `force` is not set, or snapshots are in the way: nothing is deleted
/// then. Of each member the result tells; the record goes when all of them are gone.
pub fn delete(
    context: &Context,
    name: &str,
    force: bool,
    with_snapshots: bool,
    tell: Tell<'_, ()>,
) -> Result<Vec<Outcome<()>>> {
    let home = context.home;
    locked(home, name, || {
        let cluster = match Cluster::load(home, name) {
            // Its members say themselves whose they are.
            Err(error) if force => {
                context.observer.note(name, &format!("removing what its VMs tell: {error:#}"));
                None
            }
            Err(error) => return Err(error),
            Ok(None) => Some(existing(home, name)?),
            found => found?,
        };
        let members = all(home, name, cluster.as_ref())?;
        check(home, &members, force, with_snapshots, "give --snapshots to delete them too, or ")?;
        let outcomes = remove(context, &members, force, with_snapshots, tell);
        if outcomes.iter().all(|outcome| outcome.result.is_ok()) {
            files::remove(&home.cluster(name))?;
            reach("cluster: record removed");
        }
        Ok(outcomes)
    })
}

/// The members that are there, with those that only say so.
pub(super) fn all(home: &Home, name: &str, cluster: Option<&Cluster>) -> Result<Vec<Member>> {
    let mut members = cluster.map_or(Vec::new(), Cluster::members);
    for vm in strays(home, name, &members)? {
        let (member, role) = (vm.strip_prefix(&vm_name(name, "")).unwrap_or(&vm).to_string(), String::new());
        members.push(Member { member, role, number: 0, vm, cluster: name.into() });
    }
    // One whose state is damaged counts as there, one that is another's does not.
    members.retain(|member| match Vm::load(home, &member.vm) {
        Ok(vm) => vm.is_some_and(|vm| vm.member.is_some_and(|place| place.cluster == name)),
        Err(_) => true,
    });
    Ok(members)
}

/// Checks that nothing is in the way of a removal, and names what is; `way` is another way out where that is snapshots.
pub(super) fn check(home: &Home, members: &[Member], force: bool, with_snapshots: bool, way: &str) -> Result<()> {
    let name = members.first().map_or("", |member| member.cluster.as_str());
    let names = |of: &[&Member]| of.iter().map(|member| member.member.as_str()).collect::<Vec<_>>().join(", ");
    let active =
        |member: &&Member| Vm::load(home, &member.vm).is_ok_and(|vm| vm.is_some_and(|vm| vm.state().is_active()));
    let run: Vec<&Member> = members.iter().filter(active).collect();
    if !force && !run.is_empty() {
        return Err(wrong(
            format!("members of '{name}' run: {}", names(&run)),
            format!("stop them first: puter cluster stop {name}; or give --force"),
        ));
    }
    if !with_snapshots {
        let kept: Vec<String> = members
            .iter()
            .map(|member| Ok(snapshots::asked_for(home, &member.vm)?.into_iter().map(|origin| origin.to_string())))
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .flatten()
            .collect();
        if !kept.is_empty() {
            let what = format!("members of '{name}' have snapshots: {}", kept.join(", "));
            return Err(wrong(what, format!("{way}remove them one by one: puter snapshot delete")));
        }
        return Ok(());
    }
    let users = snapshots::users(home)?;
    let mut needed = Vec::new();
    for (origin, users) in users.iter().filter(|(origin, _)| members.iter().any(|member| member.vm == origin.vm)) {
        // An automatic one stays by itself as long as somebody stands on it.
        if snapshots::load(home, origin).is_ok_and(|snapshot| snapshot.automatic) {
            continue;
        }
        let foreign = users.iter().filter(|user| match user {
            snapshots::User::Vm(vm) => *vm != origin.vm,
            snapshots::User::Snapshot(other) => other.vm != origin.vm,
        });
        needed.extend(foreign.map(|user| format!("{origin} by {user}")));
    }
    if needed.is_empty() {
        return Ok(());
    }
    Err(wrong(
        format!("snapshots of '{name}' are needed: {}", needed.join(", ")),
        "delete those first, or make them stand alone: puter clone --flatten",
    ))
}

fn remove(
    context: &Context,
    members: &[Member],
    force: bool,
    with_snapshots: bool,
    tell: Tell<'_, ()>,
) -> Vec<Outcome<()>> {
    let work = |member: &Member| remove_member(context, member, force, with_snapshots);
    for_each(context.observer, members, AT_ONCE, work, tell)
}

fn remove_member(context: &Context, member: &Member, force: bool, with_snapshots: bool) -> Result<()> {
    lifecycle::delete(context, &member.vm, force, with_snapshots)?;
    reach("cluster: member removed");
    Ok(())
}

/// Removes a member that may run.
pub(super) fn stop_and_remove(context: &Context, member: &Member, timeout: Duration) -> Result<()> {
    stop_member(context, member, timeout, false)?;
    remove_member(context, member, false, false)
}

/// What a change of size came to.
#[derive(Debug, Default)]
pub struct Scaled {
    pub started: Vec<Outcome<Began>>,
    pub removed: Vec<Outcome<()>>,
}

/// Gives a role another number of members. New ones are started; of those that are too many the last go, stopped first.
///
/// # Errors
/// When there is no such role, the cluster cannot be so, or those that would go have snapshots that are asked for:
/// nothing is changed then. Of each member the result tells.
pub fn scale(
    context: &Context,
    name: &str,
    role: &str,
    count: u32,
    timeout: Duration,
    tell: (Tell<'_, Began>, Tell<'_, ()>),
) -> Result<Scaled> {
    let home = context.home;
    locked(home, name, || {
        let mut cluster = whole(home, name)?;
        let of_role = |cluster: &Cluster| -> Vec<Member> {
            cluster.members().into_iter().filter(|member| member.role == role).collect()
        };
        let Some(at) = cluster.roles.iter().position(|one| one.name == role) else {
            return Err(anyhow!("'{name}' has no role '{role}'"))
                .hint(format!("its roles are {}", cluster.role_names()));
        };
        let mut wanted = cluster.clone();
        wanted.roles[at].count = count;
        wanted.check()?;
        check_names(context, &wanted)?;
        let mut scaled = Scaled::default();
        let keep = usize::try_from(count)?;
        let too_many: Vec<Member> = of_role(&cluster).into_iter().skip(keep).collect();
        // Also those that a command left which was killed before it could write them down.
        let beyond = |member: &Member| {
            member.role.is_empty()
                && member.member.strip_prefix(role).is_some_and(|n| n.parse::<u32>().is_ok_and(|n| n > count))
        };
        let mut surplus = all(home, name, Some(&cluster))?;
        surplus.retain(|member| too_many.contains(member) || beyond(member));
        if !surplus.is_empty() {
            check(home, &surplus, true, false, "")?;
            let work = |member: &Member| stop_and_remove(context, member, timeout);
            scaled.removed = for_each(context.observer, &surplus, AT_ONCE, work, tell.1);
        }
        // The record names all that there are, whatever became of the others.
        let last = scaled.removed.iter().filter(|one| one.result.is_err()).map(|one| one.member.number).max();
        cluster.roles[at].count = count.max(last.unwrap_or(0));
        cluster
            .save(home)
            .context("the members have changed, the record has not")
            .hint("the same command again ends it")?;
        reach("cluster: scaled");
        scaled.started = start_locked(context, &cluster, of_role(&cluster), tell.0)?;
        Ok(scaled)
    })
}
