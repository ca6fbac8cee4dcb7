//! `apply`: makes a cluster what its file says, and changes no more than that takes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};

use super::delete::{all, check, stop_and_remove};
use super::model::{Cluster, Member, Role, in_role};
use super::plan::{Action, Defaults, Found, Plan, Planned, plan, said};
use super::run::{Began, Tell, check_names, in_waves, options, start_member, stop_member};
use super::store::{locked, machine, whole};
use super::{AT_ONCE, Outcome, announce, for_each};
use crate::failpoint::reach;
use crate::vm::Hint;
use crate::vm::lifecycle::{self, Change, Context, Silent, unix_now};
use crate::vm::port::Forward;

/// What was done of a member.
#[derive(Clone, Debug)]
pub struct Applied {
    pub action: Action,
    /// How it came to run; absent of one that is gone.
    pub began: Option<Began>,
}

/// Compares a cluster with what it is to be, and changes nothing.
///
/// # Errors
/// When no cluster can be so, what there is of it cannot be read, or it is a clone that was broken off.
pub fn compare(context: &Context, wanted: &Cluster) -> Result<Plan> {
    look(context, wanted).map(|(_, plan)| plan)
}

fn look(context: &Context, wanted: &Cluster) -> Result<(Option<Cluster>, Plan)> {
    wanted.check()?;
    let (home, name) = (context.home, &wanted.name);
    let record = match Cluster::load(home, name)? {
        Some(_) => Some(whole(home, name)?),
        None => None,
    };
    let mut found = BTreeMap::new();
    let members = wanted.members();
    for member in &members {
        if let Some(vm) = machine(home, member)? {
            let state = vm.state();
            found.insert(member.member.clone(), Found { vm, state });
        }
    }
    let mut surplus = all(home, name, record.as_ref())?;
    surplus.retain(|there| members.iter().all(|member| member.vm != there.vm));
    let settings = context.settings;
    let defaults = Defaults {
        image: crate::vm::init::default_image(context),
        cpus: settings.cpus,
        memory: settings.memory,
        isolate: settings.isolate,
    };
    let plan = plan(record.as_ref(), wanted, &found, surplus, &defaults);
    Ok((record, plan))
}

/// Looks for all that is in the plan's way.
///
/// # Errors
/// What it is, with the way out.
pub fn check_plan(context: &Context, wanted: &Cluster, plan: &Plan) -> Result<()> {
    let home = context.home;
    check_names(context, wanted)?;
    let own: BTreeSet<&str> = plan.members.iter().map(|one| one.member.vm.as_str()).collect();
    let stays: BTreeSet<String> = wanted.members().into_iter().map(|member| member.vm).collect();
    let own = |vm: &str| own.contains(vm) || stays.contains(vm);
    for role in &wanted.roles {
        lifecycle::check_resources(&options(role)).map_err(|error| in_role(role, error))?;
        // Members that are alike have what is not any port but once.
        let added = plan.members.iter().filter(|one| one.member.role == role.name).flat_map(|one| match one.action {
            Action::Create => role.publish.clone(),
            _ => one.added.clone(),
        });
        let added: Vec<Forward> = added.collect();
        lifecycle::check_taken(context, &own, &[], &added).map_err(|error| in_role(role, error))?;
    }
    let destroyed: Vec<Member> = plan.destroyed().map(|one| one.member.clone()).collect();
    match destroyed.is_empty() {
        true => Ok(()),
        false => check(home, &destroyed, true, false, ""),
    }
}

/// Makes the cluster what it is to be. `shown` is the plan that was agreed to: no member is lost that it does not name.
/// First goes what is to go; then the record says what is to be; then the members follow, those of a role after those of
/// the roles that come first. Whatever ends it, the same again does the rest.
///
/// # Errors
/// When something is in the way: nothing is changed then. Of each member the result tells.
pub fn apply(
    context: &Context,
    wanted: &Cluster,
    shown: &Plan,
    timeout: Duration,
    tell: Tell<'_, Applied>,
) -> Result<Vec<Outcome<Applied>>> {
    let home = context.home;
    locked(home, &wanted.name, || {
        let (record, plan) = look(context, wanted)?;
        let lost = |one: &&Planned| !shown.destroyed().any(|other| other.member.vm == one.member.vm);
        if let Some(lost) = plan.destroyed().find(lost) {
            return Err(anyhow!("'{}' would be lost as well: the cluster has changed meanwhile", lost.member.vm))
                .hint("the same again shows what is to be done now");
        }
        if let (true, Some(record)) = (plan.is_empty(), &record) {
            finish(context, record.clone())?;
            return Ok(Vec::new());
        }
        check_plan(context, wanted, &plan)?;
        check_images(context, wanted, &plan)?;
        announce(context.observer, &plan.members.iter().map(|one| one.member.clone()).collect::<Vec<_>>());
        let gone = delete(context, &plan, timeout, tell);
        if gone.iter().any(|one| one.result.is_err()) {
            return Ok(gone);
        }
        let cluster = write_down(context, record.as_ref(), wanted)?;
        let mut outcomes = take_back(context, &plan, tell);
        if outcomes.is_empty() {
            let bring = |member: &Member, role: &Role| {
                let planned = plan.members.iter().find(|one| one.member.vm == member.vm);
                bring(context, planned.context("the member is not planned")?, role, timeout)
            };
            let stays = plan.members.iter().filter(|one| one.action != Action::Delete);
            outcomes = in_waves(context, &cluster, stays.map(|one| one.member.clone()).collect(), bring, tell)?;
        }
        if outcomes.iter().all(|one| one.result.is_ok()) {
            finish(context, cluster)?;
        }
        Ok(gone.into_iter().chain(outcomes).collect())
    })
}

/// Has the images of what is to be made, before anything is lost.
fn check_images(context: &Context, wanted: &Cluster, plan: &Plan) -> Result<()> {
    for role in &wanted.roles {
        let made = |one: &Planned| matches!(one.action, Action::Create | Action::Recreate);
        if plan.members.iter().any(|one| one.member.role == role.name && made(one)) {
            lifecycle::check_image(context, &options(role)).map_err(|error| in_role(role, error))?;
        }
    }
    Ok(())
}

fn delete(context: &Context, plan: &Plan, timeout: Duration, tell: Tell<'_, Applied>) -> Vec<Outcome<Applied>> {
    let surplus = plan.members.iter().filter(|one| one.action == Action::Delete);
    let surplus: Vec<Member> = surplus.map(|one| one.member.clone()).collect();
    let work = |member: &Member| {
        stop_and_remove(context, member, timeout)?;
        Ok(Applied { action: Action::Delete, began: None })
    };
    for_each(context.observer, &surplus, AT_ONCE, work, tell)
}

/// Writes down what is to be, with what was said before for as long as members have not followed.
fn write_down(context: &Context, record: Option<&Cluster>, wanted: &Cluster) -> Result<Cluster> {
    let home = context.home;
    let Some(record) = record else {
        let cluster = Cluster { created: unix_now(), ..wanted.clone() };
        cluster.save(home)?;
        reach("cluster: apply written down");
        return Ok(cluster);
    };
    // Who is there already has its first boot behind it.
    for role in wanted.roles.iter().filter(|role| role.run.is_some()) {
        if said(record, &role.name).is_some_and(|said| said.run.is_none()) {
            for member in record.members().iter().filter(|member| member.role == role.name) {
                if machine(home, member)?.is_some_and(|vm| !vm.prepared) {
                    lifecycle::prepared(context, &member.vm)?;
                }
            }
        }
    }
    let former = wanted.roles.iter().filter_map(|role| said(record, &role.name)).collect();
    let cluster = Cluster { roles: wanted.roles.clone(), former, ..record.clone() };
    cluster.save(home)?;
    reach("cluster: apply written down");
    Ok(cluster)
}

/// Takes back the ports that members publish no more, of all before any publishes another: one may have been another's.
/// Gives the failures.
fn take_back(context: &Context, plan: &Plan, tell: Tell<'_, Applied>) -> Vec<Outcome<Applied>> {
    let less = |one: &&Planned| one.action == Action::Change && !one.taken_back.is_empty();
    let of: BTreeMap<&str, &Planned> =
        plan.members.iter().filter(less).map(|one| (one.member.vm.as_str(), one)).collect();
    let members: Vec<Member> = of.values().map(|one| one.member.clone()).collect();
    let work = |member: &Member| {
        let ports = of.get(member.vm.as_str()).map_or(Vec::new(), |one| one.taken_back.clone());
        lifecycle::publish(context, &member.vm, &Change::Remove(ports))?;
        reach("cluster: ports taken back");
        Ok(Applied { action: Action::Change, began: None })
    };
    let mut done = for_each(&Silent, &members, AT_ONCE, work, &|_, _| {});
    done.retain(|one| one.result.is_err());
    for one in &done {
        context.observer.ended(&one.member.vm, one.result.as_ref().err());
        tell(&one.member, &one.result);
    }
    done
}

/// Brings a member to what it is to be, and to run.
fn bring(context: &Context, planned: &Planned, role: &Role, timeout: Duration) -> Result<Applied> {
    let (member, action) = (&planned.member, planned.action);
    match action {
        Action::Recreate => stop_and_remove(context, member, timeout)?,
        Action::Change => {
            if planned.restart {
                stop_member(context, member, timeout, false)?;
            }
            lifecycle::change(context, &member.vm, &planned.options)?;
            reach("cluster: member changed");
        }
        _ => {}
    }
    Ok(Applied { action, began: Some(start_member(context, member, role)?) })
}

/// All members have followed: what was said before does not matter any more.
fn finish(context: &Context, cluster: Cluster) -> Result<()> {
    if !cluster.former.is_empty() {
        Cluster { former: Vec::new(), ..cluster }.save(context.home)?;
    }
    reach("cluster: applied");
    Ok(())
}
