//! Published ports: which a VM may have, and what its monitor makes of them.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};

use super::Context;
use crate::failpoint::reach;
use crate::vm::Hint;
use crate::vm::machine::Command;
use crate::vm::monitor::{self, NoReply, Published, Request};
use crate::vm::port::{self, Forward};
use crate::vm::state::{Vm, existing, load_all, ready_for};

/// How long `ports` waits for a command that works on a VM before it shows what it knows.
const PATIENCE: Duration = Duration::from_secs(1);

/// A change of a VM's published ports.
#[derive(Debug)]
pub enum Change {
    Add(Vec<Forward>),
    Remove(Vec<Forward>),
}

/// A published port as it is now.
#[derive(Debug)]
pub struct Line {
    pub vm: String,
    pub forward: Forward,
    /// Whether the VM runs; where it does not, nothing is to listen.
    pub active: bool,
    pub listening: bool,
    /// Why it does not listen although the VM runs.
    pub why: Option<String>,
    /// Connections, or clients of UDP, that are open.
    pub open: usize,
}

/// Changes what a VM publishes: at once where it runs, else with its next start.
///
/// # Errors
/// When there is no such VM or it cannot be so; then everything is as before.
pub fn publish(context: &Context, name: &str, change: &Change) -> Result<Vm> {
    context.locked(name, || {
        let mut vm = ready_for(context.home, name, Command::Publish)?;
        let wanted = after(&vm, change)?;
        save(context, &mut vm, wanted)?;
        Ok(vm)
    })
}

/// What the VM publishes after the change.
fn after(vm: &Vm, change: &Change) -> Result<Vec<Forward>> {
    let mut ports = vm.ports.clone();
    match change {
        Change::Add(added) => {
            for forward in added {
                if let Some(same) = ports.iter().find(|port| port.is_meant_by(forward)) {
                    return Err(anyhow!("'{}' publishes {same} already", vm.name))
                        .hint(format!("`puter port list {}` shows what it publishes", vm.name));
                }
            }
            ports.extend(added);
        }
        Change::Remove(removed) => {
            for forward in removed {
                let Some(at) = ports.iter().position(|port| port.is_meant_by(forward)) else {
                    return Err(anyhow!("'{}' does not publish {forward}", vm.name))
                        .hint(format!("`puter port list {}` shows what it publishes", vm.name));
                };
                ports.remove(at);
            }
        }
    }
    Ok(ports)
}

/// Publishes these and no others, and saves the VM, whose lock the caller holds.
///
/// # Errors
/// When that cannot be: what listened before still does.
pub(super) fn save(context: &Context, vm: &mut Vm, wanted: Vec<Forward>) -> Result<()> {
    check(context, &vm.name, &vm.ports, &wanted)?;
    let active = vm.state().is_active();
    if active {
        check_order(&vm.name, &vm.ports, &wanted)?;
    }
    let former = vm.clone();
    vm.ports = wanted;
    if active {
        match tell(context, &former, &vm.ports, true) {
            Ok(shown) => vm.ports = shown.iter().map(|port| port.forward).collect(),
            // It has just ended: then it is for the next start.
            Err(_) if !vm.is_alive() => {}
            Err(error) => return Err(error),
        }
    }
    reach("publish: told");
    vm.save(context.home).inspect_err(|_| {
        if active {
            let _ = tell(context, &former, &former.ports, false);
        }
    })
}

/// Checks what the VM is to publish, before anything is made for its start.
///
/// # Errors
/// When it cannot be had.
pub(super) fn check_for_start(context: &Context, name: &str, former: &[Forward], wanted: &[Forward]) -> Result<()> {
    if wanted.is_empty() {
        return Ok(());
    }
    check(context, name, former, wanted)?;
    monitor::wait_for_former(context.home, name);
    monitor::probe(wanted)
}

/// Checks what needs no sockets: that no two are the same, and that no other VM has one of them.
///
/// # Errors
/// When that is so; the hint tells the way out.
pub(super) fn check(context: &Context, name: &str, former: &[Forward], wanted: &[Forward]) -> Result<()> {
    if let Err((why, hint)) = port::check(wanted) {
        return Err(anyhow!(why)).hint(hint);
    }
    check_taken(context, &|other| other == name, former, wanted)
}

/// Checks that no other VM than those that are `own` has one of the ports.
///
/// # Errors
/// When one has, or the host does not let its users have such a port.
pub fn check_taken(
    context: &Context,
    own: &dyn Fn(&str) -> bool,
    former: &[Forward],
    wanted: &[Forward],
) -> Result<()> {
    monitor::check_privilege(wanted)?;
    let others = load_all(context.home)?.vms;
    for other in others.iter().filter(|other| !own(&other.name)) {
        let active = other.state().is_active();
        for forward in wanted.iter().filter(|forward| !forward.any) {
            // What it has, or will have for certain; which of two that are stopped has the older right is not asked.
            let holds = |port: &&Forward| port.overlaps(forward) && (active || !port.any && !former.contains(forward));
            if let Some(port) = other.ports.iter().find(holds) {
                let (number, protocol) = (forward.host_port, forward.protocol.word());
                return Err(anyhow!("port {number}/{protocol} is published by '{}', as {port}", other.name))
                    .hint(format!("choose another, or take it from that VM: puter port remove {} {port}", other.name));
            }
        }
    }
    Ok(())
}

/// Two sockets that cannot be there together cannot follow one another without a moment in which there is neither.
fn check_order(name: &str, former: &[Forward], wanted: &[Forward]) -> Result<()> {
    for forward in wanted {
        let blocks = |old: &&Forward| old.overlaps(forward) && old.endpoint() != forward.endpoint();
        if let Some(old) = former.iter().find(blocks) {
            return Err(anyhow!("{forward} cannot take the place of {old} while '{name}' runs"))
                .hint(format!("remove that first: puter port remove {name} {old}"));
        }
    }
    Ok(())
}

/// Has the VM's monitor publish these; where that was killed another one is started.
fn tell(context: &Context, vm: &Vm, wanted: &[Forward], all: bool) -> Result<Vec<Published>> {
    let request = Request::Publish { forwards: wanted.to_vec(), all };
    let ask = || monitor::ask(context.home, &vm.name, &request);
    let reply = match ask() {
        Err(NoReply::Gone) => {
            monitor::adopt(context.home, vm).with_context(|| format!("the monitor of '{}' is gone", vm.name))?;
            context.observer.note(&vm.name, "its monitor was gone; another one has taken over");
            ask()
        }
        reply => reply,
    };
    match reply {
        Ok(shown) => Ok(shown),
        Err(NoReply::Refused(error)) => Err(error),
        Err(NoReply::Silent(error)) => Err(error).hint(format!("`puter restart {}` gives it another monitor", vm.name)),
        Err(NoReply::Gone) => bail!("the monitor of '{}' ended at once", vm.name),
    }
}

/// The published ports of one VM or of all, as they are. What is not as it should be is mended first, where no other
/// command works on the VM.
///
/// # Errors
/// When the states cannot be read, or there is no such VM.
pub fn ports(context: &Context, name: Option<&str>) -> Result<Vec<Line>> {
    let vms = match name {
        Some(name) => vec![existing(context.home, name)?],
        None => load_all(context.home)?.vms,
    };
    Ok(vms.into_iter().flat_map(|vm| of_one(context, vm)).collect())
}

fn of_one(context: &Context, mut vm: Vm) -> Vec<Line> {
    let active = vm.state().is_active();
    let asked = active.then(|| monitor::ask(context.home, &vm.name, &Request::Ports {}));
    let mut why = None;
    let shown = match asked {
        None => Vec::new(),
        Some(Ok(shown)) if is_in_order(&vm, &shown) => shown,
        // There is nothing to see to.
        Some(Err(NoReply::Gone)) if vm.ports.is_empty() => Vec::new(),
        Some(asked) => match mend(context, &vm.name) {
            Ok((mended, shown)) => {
                vm = mended;
                shown
            }
            Err(error) => {
                why = Some(format!("{error:#}"));
                asked.unwrap_or_default()
            }
        },
    };
    let active = vm.state().is_active();
    let line = |forward: &Forward| {
        let found = shown.iter().find(|port| port.forward == *forward).filter(|_| active);
        let reason = || found.and_then(|port| port.why.clone()).or_else(|| why.clone());
        let listening = found.is_some_and(|port| port.why.is_none());
        Line {
            vm: vm.name.clone(),
            forward: *forward,
            active,
            listening,
            why: if active && !listening { reason() } else { None },
            open: found.map_or(0, |port| port.open),
        }
    };
    vm.ports.iter().map(line).collect()
}

fn is_in_order(vm: &Vm, shown: &[Published]) -> bool {
    let same = shown.iter().zip(&vm.ports).all(|(shown, port)| shown.forward == *port && shown.why.is_none());
    same && shown.len() == vm.ports.len()
}

/// Has the monitor do what the state says.
fn mend(context: &Context, name: &str) -> Result<(Vm, Vec<Published>)> {
    context.locked_within(name, PATIENCE, || {
        let mut vm = existing(context.home, name)?;
        if !vm.state().is_active() {
            return Ok((vm, Vec::new()));
        }
        let shown = tell(context, &vm, &vm.ports, false)?;
        let now: Vec<Forward> = shown.iter().map(|port| port.forward).collect();
        if now != vm.ports {
            vm.ports = now;
            vm.save(context.home)?;
        }
        Ok((vm, shown))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::process;
    use crate::vm::home::Home;
    use crate::vm::lifecycle::Silent;
    use crate::vm::settings::Settings;
    use crate::vm::state::{ProcessId, tests::sample};

    fn read(texts: &[&str]) -> Vec<Forward> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn with_home(work: impl Fn(&Context)) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.prepare().unwrap();
        let settings = Settings::load().unwrap();
        work(&Context { home: &home, settings: &settings, observer: &Silent });
    }

    fn why<T: std::fmt::Debug>(result: Result<T>) -> String {
        format!("{:#}", result.unwrap_err())
    }

    #[test]
    fn ports_of_a_stopped_vm_are_added_and_removed_and_mistakes_change_nothing() {
        with_home(|context| {
            sample("web", 1).save(context.home).unwrap();
            let change = |change| publish(context, "web", &change).map(|vm| vm.ports);
            let both = read(&["8080:80", "53"]);
            assert_eq!(change(Change::Add(both.clone())).unwrap(), both);
            assert!(why(change(Change::Add(read(&["8080:80"])))).contains("publishes 127.0.0.1:8080:80/tcp already"));
            assert!(why(change(Change::Add(read(&["53"])))).contains("already"));
            assert!(why(change(Change::Add(read(&["0.0.0.0:8080:81"])))).contains("cannot both have port 8080"));
            assert!(why(change(Change::Remove(read(&["8080:81"])))).contains("does not publish"));
            assert_eq!(existing(context.home, "web").unwrap().ports, both);
            assert_eq!(change(Change::Remove(read(&["53", "8080:80"]))).unwrap(), []);
            let lines = ports(context, None).unwrap();
            assert!(lines.is_empty());
            assert!(why(ports(context, Some("db"))).contains("no VM named 'db'"));
        });
    }

    #[test]
    fn a_port_of_another_vm_is_refused_with_its_name() {
        with_home(|context| {
            let mut web = sample("web", 1);
            web.ports = read(&["8080:80", "80"]);
            web.ports[1].host_port = 40_123;
            web.save(context.home).unwrap();
            sample("db", 2).save(context.home).unwrap();
            let add = |text: &str| publish(context, "db", &Change::Add(read(&[text])));
            let told = why(add("0.0.0.0:8080:5432"));
            assert!(told.contains("port 8080/tcp is published by 'web', as 127.0.0.1:8080:80/tcp"), "{told}");
            add("8080:80/udp").unwrap();
            add("[::1]:8080:80").unwrap();
            // One that had any port takes another when it starts; while it runs it has this one.
            check(context, "db", &[], &read(&["40123:80"])).unwrap();
            let pid = std::process::id();
            web.process = Some(ProcessId { pid, start_time: process::start_time(pid).unwrap() });
            web.save(context.home).unwrap();
            assert!(why(check(context, "db", &[], &read(&["40123:80"]))).contains("published by 'web'"));
            let own = read(&["8080:80"]);
            assert!(why(check(context, "db", &own, &own)).contains("published by 'web'"), "it runs");
        });
    }

    #[test]
    fn a_socket_in_place_of_one_that_excludes_it_is_refused_while_the_vm_runs() {
        let former = read(&["8080:80"]);
        check_order("web", &former, &read(&["8080:81"])).unwrap();
        check_order("web", &former, &read(&["0.0.0.0:8080:80/udp"])).unwrap();
        let told = why(check_order("web", &former, &read(&["0.0.0.0:8080:80"])));
        assert!(told.contains("cannot take the place of 127.0.0.1:8080:80/tcp"), "{told}");
    }
}
