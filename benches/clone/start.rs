//! A cold start, against the hypervisor's own of the same machine: what puter adds to a boot.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use puter::hypervisor::arguments::Machine;
use puter::hypervisor::snapshot::Own;
use puter::hypervisor::{Launch, process};
use puter::protocol::daemon::TapRequest;
use puter::vm::state::Vm;

use xtask::report::median;

use super::{Bare, Bench, SOURCE};

/// Pairs of starts.
const ROUNDS: usize = 3;

impl Bench {
    /// Starts the source by puter and without it in turn; tells the median time of each to the agent's answer. The source
    /// runs at the beginning and at the end.
    pub(super) fn starts(&self) -> Result<(f64, f64)> {
        let vm = Vm::load(&self.home, SOURCE)?.context("the source is gone")?;
        let pid = vm.process.context("the source does not run")?.pid;
        // What puter made of the machine is on the command line that it runs by.
        let words = std::fs::read(format!("/proc/{pid}/cmdline"))?;
        let words = words.split(|byte| *byte == 0).filter(|word| !word.is_empty()).skip(1);
        let words: Vec<String> = words.map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let machine = Machine::from_arguments(&words)?;
        let (mut ours, mut bare) = (Vec::new(), Vec::new());
        for round in 1..=ROUNDS {
            self.puter(&["stop", SOURCE])?;
            bare.push(self.bare_start(&vm, &machine)?);
            let (cold, _) = self.timed(&["start", SOURCE], &[SOURCE], "boot")?;
            eprintln!("start {round} of {ROUNDS}: {cold:.3} s, bare {:.3} s", bare[round - 1]);
            ours.push(cold);
        }
        Ok((median(ours), median(bare)))
    }

    fn bare_start(&self, vm: &Vm, machine: &Machine) -> Result<f64> {
        let request = TapRequest { vm: vm.name.clone(), id: vm.id, isolated: false, member: None };
        self.daemon.ensure_tap(&request)?;
        let own = Own {
            disk: vm.overlay.clone(),
            tap: vm.tap.clone(),
            mac: vm.mac.to_string(),
            vsock: machine.vsock.as_ref().map(|vsock| vsock.socket.clone()).context("the machine has no vsock")?,
            serial: PathBuf::new(),
            kernel: machine.kernel.clone(),
            initrd: machine.initrd.clone(),
        };
        let began = Instant::now();
        let process = Launch::new(&self.kind, machine, &self.home.hypervisor_log(&vm.name))?.spawn()?;
        let start_time = process.start_time();
        let name = vm.name.clone();
        let mut bare = Bare { name, own, began, child: process.into_child(), start_time, _coming: None };
        let answered = self.answer(&bare);
        let seconds = began.elapsed().as_secs_f64();
        process::kill(bare.child.id(), bare.start_time, Duration::from_secs(10));
        let _ = bare.child.wait();
        let _ = self.daemon.delete_tap(&vm.name);
        answered.map(|()| seconds)
    }
}
