//! Starts, stops and commands of whole clusters. What is done to a member is what is done to any VM.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use super::first_boot::first_boot;
use super::model::{Cluster, Member, Role, Target, in_role};
use super::store::{locked, machine, whole};
use super::{ASKED_AT_ONCE, AT_ONCE, Outcome, announce, existing, for_each, wrong};
use crate::failpoint::reach;
use crate::protocol::agent::Exec;
use crate::vm::home::Home;
use crate::vm::lifecycle::{self, Context, Silent, StartOptions, Stopped, unix_now};
use crate::vm::machine::State;
use crate::vm::state::{Vm, running};
use crate::vm::{Hint, cancel};

/// How often a command in a guest looks whether it is to end.
const TURN: Duration = Duration::from_millis(100);

/// A member that runs.
#[derive(Clone, Debug)]
pub struct Began {
    pub ip: Ipv4Addr,
    pub took: Duration,
    /// Nothing was to be done.
    pub ran: bool,
}

/// Where a member's output and its errors go.
pub type Outputs<'a> = (Box<dyn Write + 'a>, Box<dyn Write + 'a>);

/// Hears what came of each member, as soon as that is known.
pub type Tell<'a, T> = &'a (dyn Fn(&Member, &Result<T>) + Sync);

/// Makes the cluster, and starts it where `begin` is set. One that is the same already is gone on with.
///
/// # Errors
/// When there is another cluster of this name, or no such can be on this host; of each member the result tells.
pub fn create(context: &Context, wanted: Cluster, begin: bool, tell: Tell<'_, Began>) -> Result<Vec<Outcome<Began>>> {
    wanted.check()?;
    let (home, name) = (context.home, wanted.name.clone());
    locked(home, &name, || {
        let cluster = match Cluster::load(home, &name)? {
            Some(former) if former.roles == wanted.roles && !former.unfinished => former,
            Some(former) if former.unfinished || !is_empty(home, &former) => {
                return Err(wrong(
                    format!("there is a cluster '{name}' already, and it is not the same"),
                    "`puter cluster apply -f FILE` makes it what a file says, `puter cluster scale` changes its size; or \
                     choose another name",
                ));
            }
            // Of one that has no member yet nothing would be lost.
            _ => {
                check_names(context, &wanted)?;
                for role in &wanted.roles {
                    lifecycle::check_resources(&options(role)).map_err(|error| in_role(role, error))?;
                }
                let cluster = Cluster { created: unix_now(), ..wanted };
                cluster.save(home)?;
                reach("cluster: written down");
                cluster
            }
        };
        match begin {
            true => start_locked(context, &cluster, cluster.members(), tell),
            false => Ok(Vec::new()),
        }
    })
}

/// Whether none of the cluster's members is there: another may then take its name.
fn is_empty(home: &Home, cluster: &Cluster) -> bool {
    cluster.members().iter().all(|member| machine(home, member).is_ok_and(|vm| vm.is_none()))
}

/// What a new member of the role is made with.
pub(super) fn options(role: &Role) -> StartOptions {
    StartOptions {
        image: role.image.clone(),
        cpus: role.cpus,
        memory: role.memory,
        disk: role.disk,
        ports: Some(role.publish.clone()).filter(|ports| !ports.is_empty()),
        isolate: role.isolate,
        ..StartOptions::default()
    }
}

/// Checks that the members' names and addresses are free.
pub(super) fn check_names(context: &Context, wanted: &Cluster) -> Result<()> {
    let home = context.home;
    let members = wanted.members();
    let (subnet, count) = (context.settings.subnet, members.len());
    if u32::try_from(count).is_ok_and(|count| count > subnet.last_id()) {
        return Err(wrong(
            format!("{count} members are too many: the subnet {subnet} has room for {} VMs", subnet.last_id()),
            "choose a wider subnet in the settings (`puter config` shows it), or fewer members",
        ));
    }
    for member in &members {
        home.check_sockets(&member.vm)?;
        if machine(home, member)?.is_none() {
            check_free(home, member)?;
        }
    }
    let names: BTreeSet<&str> = members.iter().map(|member| member.vm.as_str()).collect();
    for other in super::load_all(home)?.clusters.iter().filter(|other| other.name != wanted.name) {
        if let Some(same) = other.members().iter().find(|member| names.contains(member.vm.as_str())) {
            return Err(wrong(
                format!("'{}' is the name of a member of the cluster '{}'", same.vm, other.name),
                "choose another name for the cluster or the role",
            ));
        }
    }
    Ok(())
}

/// Checks that nobody else has the name of a member that is not there.
fn check_free(home: &Home, member: &Member) -> Result<()> {
    match home.state(&member.vm).exists() {
        true => Err(wrong(
            format!("there is a VM '{}' already, which is not this cluster's", member.vm),
            format!("remove it (puter delete {}), or choose another name for the cluster", member.vm),
        )),
        false => Ok(()),
    }
}

/// Starts the members that do not run, those of a role after those of the roles that come first.
///
/// # Errors
/// When there is no such cluster; of each member the result tells.
pub fn start(context: &Context, target: &Target, tell: Tell<'_, Began>) -> Result<Vec<Outcome<Began>>> {
    locked(context.home, &target.cluster, || {
        let cluster = whole(context.home, &target.cluster)?;
        start_locked(context, &cluster, target.select(&cluster)?, tell)
    })
}

pub(super) fn start_locked(
    context: &Context,
    cluster: &Cluster,
    members: Vec<Member>,
    tell: Tell<'_, Began>,
) -> Result<Vec<Outcome<Began>>> {
    in_waves(context, cluster, members, |member, role| start_member(context, member, role), tell)
}

/// Does `work` for each of the members, for those of a role after those of the roles that come first.
pub(super) fn in_waves<T: Send>(
    context: &Context,
    cluster: &Cluster,
    members: Vec<Member>,
    work: impl Fn(&Member, &Role) -> Result<T> + Sync,
    tell: Tell<'_, T>,
) -> Result<Vec<Outcome<T>>> {
    announce(context.observer, &members);
    let mut outcomes = Vec::new();
    let mut failed: BTreeSet<&str> = BTreeSet::new();
    for wave in cluster.waves()? {
        let (mut ready, mut held) = (Vec::new(), Vec::new());
        for role in &wave {
            let first = role.after.iter().find(|first| failed.contains(first.as_str()));
            let of_it = members.iter().filter(|member| member.role == role.name).cloned();
            match first {
                Some(first) => held.extend(of_it.map(|member| (member, first.clone()))),
                None => ready.extend(of_it),
            }
        }
        // Those that cannot start yet keep what comes after them as well.
        failed.extend(
            wave.iter().filter(|role| held.iter().any(|(m, _)| m.role == role.name)).map(|role| role.name.as_str()),
        );
        let begin = |member: &Member| work(member, cluster.role(&member.role).context("the role is gone")?);
        let done = for_each(context.observer, &ready, AT_ONCE, begin, tell);
        for role in wave {
            if done.iter().any(|one| one.member.role == role.name && one.result.is_err()) {
                failed.insert(&role.name);
            }
        }
        outcomes.extend(done);
        outcomes.extend(held.into_iter().map(|(member, first)| {
            let result = Err(anyhow!("'{}' waits for the role '{first}', which failed", member.vm));
            context.observer.ended(&member.vm, result.as_ref().err());
            tell(&member, &result);
            Outcome { member, result }
        }));
    }
    Ok(outcomes)
}

pub(super) fn start_member(context: &Context, member: &Member, role: &Role) -> Result<Began> {
    let began = Instant::now();
    let home = context.home;
    let there = machine(home, member)?;
    if there.is_none() {
        check_free(home, member)?;
    }
    let ran = there.as_ref().is_some_and(|vm| vm.state() == State::Running);
    let mut vm = match there {
        Some(vm) if ran => vm,
        Some(_) => {
            // As it was made, or as somebody has changed it since.
            let options = StartOptions { member: Some(member.place()), ..StartOptions::default() };
            lifecycle::start(context, &member.vm, &options)?.vm
        }
        None => {
            let options = StartOptions { member: Some(member.place()), ..options(role) };
            lifecycle::start(context, &member.vm, &options)?.vm
        }
    };
    let due = role.run.as_ref().filter(|_| !vm.prepared);
    let idle = ran && due.is_none();
    if let Some(text) = due {
        first_boot(context, member, role, text)?;
        reach("cluster: first boot done");
        vm = lifecycle::prepared(context, &member.vm)?;
    }
    Ok(Began { ip: vm.ip, took: began.elapsed(), ran: idle })
}

/// Runs a program without input in a guest, and gives its exit code. Ctrl-C hangs up on it.
pub(super) fn run_in(home: &Home, vm: &str, wanted: Exec, out: &mut dyn Write, err: &mut dyn Write) -> Result<i32> {
    let program = crate::vm::exec::start(home, vm, wanted)?;
    let keyboard = program.keyboard();
    // One that has ended already reads nothing.
    let _ = keyboard.end();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _guard = cancel::guard();
        let watcher = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                if cancel::check().is_err() {
                    keyboard.hang_up();
                    return;
                }
                std::thread::park_timeout(TURN);
            }
        });
        let code = program.attend(out, err);
        done.store(true, Ordering::Relaxed);
        watcher.thread().unpark();
        cancel::check()?;
        code
    })
}

/// Stops the members that run, those of a role before those of the roles that it comes after.
///
/// # Errors
/// When there is no such cluster; of each member the result tells. One that is not there is stopped.
pub fn stop(
    context: &Context,
    target: &Target,
    timeout: Duration,
    force: bool,
    tell: Tell<'_, Option<Stopped>>,
) -> Result<Vec<Outcome<Option<Stopped>>>> {
    locked(context.home, &target.cluster, || {
        let cluster = existing(context.home, &target.cluster)?;
        let members = target.select(&cluster)?;
        announce(context.observer, &members);
        let mut outcomes = Vec::new();
        for wave in cluster.waves()?.into_iter().rev() {
            let of_it: Vec<Member> =
                members.iter().filter(|member| wave.iter().any(|role| role.name == member.role)).cloned().collect();
            let work = |member: &Member| stop_member(context, member, timeout, force);
            outcomes.extend(for_each(context.observer, &of_it, AT_ONCE, work, tell));
        }
        Ok(outcomes)
    })
}

pub(super) fn stop_member(
    context: &Context,
    member: &Member,
    timeout: Duration,
    force: bool,
) -> Result<Option<Stopped>> {
    match machine(context.home, member)? {
        Some(_) => lifecycle::stop(context, &member.vm, timeout, force).map(Some),
        None => Ok(None),
    }
}

/// Runs a command on each of the members, all at once, and gives the exit codes. `output` makes the two places to which
/// a member's output goes.
///
/// # Errors
/// When there is no such cluster or no such member; of each member the result tells.
pub fn exec<'a>(
    home: &Home,
    target: &Target,
    wanted: &Exec,
    output: &(dyn Fn(&Member) -> Outputs<'a> + Sync),
) -> Result<Vec<Outcome<i32>>> {
    let cluster = existing(home, &target.cluster)?;
    let members = target.select(&cluster)?;
    let run = |member: &Member| -> Result<i32> {
        member_that_runs(home, member)?;
        let (mut out, mut err) = output(member);
        run_in(home, &member.vm, wanted.clone(), &mut *out, &mut *err)
    };
    Ok(for_each(&Silent, &members, ASKED_AT_ONCE, run, &|_, _| {}))
}

/// The member's VM, which must run.
pub(super) fn member_that_runs(home: &Home, member: &Member) -> Result<Vm> {
    match machine(home, member)? {
        Some(_) => running(home, &member.vm),
        None => Err(anyhow!("'{}' is not there", member.vm))
            .hint(format!("make and start it: puter cluster start {}", member.cluster)),
    }
}
