//! What follows when a VM has ended: it is written down, its network is given back, and it starts again where its
//! policy says so.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::vm::home::Home;
use crate::vm::lifecycle::{self, Context, Silent, StartOptions, unix_now};
use crate::vm::settings::Settings;
use crate::vm::state::{Exit, ProcessId, Reason, Restart, Retry, Vm};

/// A VM that ran this long starts the count of its restarts anew.
const STEADY: u64 = 60;
/// The longest pause before a restart.
const LONGEST: u64 = 60;

/// Does what is to be done after the end of this hypervisor.
///
/// # Errors
/// When the state cannot be written or the restart fails; the next command finds a stopped VM in either case.
pub fn ended(home: &Home, vm: &str, hypervisor: ProcessId, reason: Reason) -> Result<()> {
    let settings = Settings::load()?;
    let context = Context { home, settings: &settings, observer: &Silent };
    let began = Instant::now();
    let retry = loop {
        // A command that has stopped, started or deleted the VM meanwhile has done all this itself.
        if Vm::load(home, vm)?.is_none_or(|vm| vm.process != Some(hypervisor)) {
            return Ok(());
        }
        match lifecycle::settle(&context, vm, hypervisor, |vm| write_down(vm, reason, unix_now())) {
            Ok(retry) => break retry,
            Err(error) if began.elapsed() > Duration::from_secs(600) => return Err(error),
            // A command that works on it holds the lock, for as long as it takes.
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    };
    let Some(mut retry) = retry else { return Ok(()) };
    loop {
        std::thread::sleep(Duration::from_secs(retry.at.saturating_sub(unix_now())));
        let options = StartOptions { retry: Some(retry), ..StartOptions::default() };
        let Err(error) = lifecycle::start(&context, vm, &options) else { return Ok(()) };
        // puterd may be away for a while, or the disk full: it is tried again, unless a command has had its way.
        let next = Retry { count: retry.count + 1, at: unix_now() + pause(retry.count) };
        if !lifecycle::put_off(&context, vm, retry, next)? {
            return Err(error);
        }
        retry = next;
    }
}

/// Notes the end in the state, and whether the VM is to start again.
fn write_down(vm: &mut Vm, reason: Reason, now: u64) -> Option<Retry> {
    let ran = now.saturating_sub(vm.started.unwrap_or(now));
    let former = vm.retry.filter(|_| ran < STEADY).map_or(0, |retry| retry.count);
    vm.exit = Some(Exit { reason, at: now });
    vm.retry = wanted(vm.restart, reason).then(|| Retry { count: former + 1, at: now + pause(former) });
    vm.retry
}

fn wanted(policy: Restart, reason: Reason) -> bool {
    match policy {
        Restart::No => false,
        Restart::OnFailure => reason != Reason::PoweredOff,
        Restart::Always => true,
    }
}

/// Seconds before the next restart: 1, 2, 4 and so on.
fn pause(former: u32) -> u64 {
    1_u64.checked_shl(former).unwrap_or(LONGEST).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::state::tests::sample;

    #[test]
    fn policies_decide_by_the_reason() {
        let reasons = [Reason::PoweredOff, Reason::Panicked, Reason::Failed(1), Reason::Killed(9), Reason::Unknown];
        for (policy, expected) in [
            (Restart::No, [false; 5]),
            (Restart::OnFailure, [false, true, true, true, true]),
            (Restart::Always, [true; 5]),
        ] {
            assert_eq!(reasons.map(|reason| wanted(policy, reason)), expected, "{policy:?}");
        }
    }

    #[test]
    fn a_vm_that_fails_again_and_again_waits_longer_each_time() {
        let mut vm = sample("web", 1);
        vm.restart = Restart::Always;
        let mut now = 1000;
        for (count, pause) in [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 32), (7, 60), (8, 60)] {
            vm.started = Some(now);
            assert_eq!(write_down(&mut vm, Reason::Failed(1), now + 2), Some(Retry { count, at: now + 2 + pause }));
            now += 100;
        }
        vm.started = Some(now);
        let steady = write_down(&mut vm, Reason::Failed(1), now + STEADY);
        assert_eq!(steady.map(|retry| retry.count), Some(1));
        assert_eq!(super::pause(u32::MAX), LONGEST);
    }
}
