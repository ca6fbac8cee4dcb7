//! From a machine that boots to one whose agent has answered and made it what it is to be.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, ensure};
use base64::Engine;

use super::Context;
use crate::protocol::address::Mac;
use crate::protocol::agent::{Configure, Configured, Identity};
use crate::vm::agent::{Agent, printable};
use crate::vm::state::{Status, Vm};
use crate::vm::{Hint, Hinted, cancel, files, key};

/// Pause between two attempts to reach an agent that is still booting.
const AGENT_RETRY: Duration = Duration::from_millis(100);
/// `configure` runs `netplan apply` and makes host keys; under emulation that takes a while.
const CONFIGURE_TIMEOUT: Duration = Duration::from_secs(180);

/// Waits for the agent, configures the guest and saves that it runs.
///
/// # Errors
/// When the machine ends, the agent does not come in time, or it refuses.
pub fn meet_agent(context: &Context, vm: &mut Vm) -> Result<()> {
    let home = context.home;
    let name = vm.name.clone();
    let mut agent = context.step(&name, "boot", || wait_for_agent(context, vm))?;
    let configured = context.step(&name, "configure", || {
        agent
            .configure(configuration(context, vm)?, CONFIGURE_TIMEOUT)
            .with_context(|| format!("cannot configure '{name}'"))
    })?;
    for warning in &configured.warnings {
        context.observer.note(&name, &printable(warning));
    }
    accept(context, vm, &configured)?;
    vm.status = Status::Running;
    vm.save(home)
}

fn accept(context: &Context, vm: &Vm, configured: &Configured) -> Result<()> {
    ensure!(
        configured.hostname == vm.name,
        "the guest calls itself '{}' instead of '{}'",
        printable(&configured.hostname),
        vm.name
    );
    key::remember_host(context.home, &vm.name, &configured.host_keys)
}

fn wait_for_agent(context: &Context, vm: &Vm) -> Result<Agent> {
    let home = context.home;
    let limit = context.settings.start_timeout;
    let end = Instant::now() + limit;
    let socket = home.vsock(&vm.name);
    let explain = |error: anyhow::Error| with_log(error, &home.console_log(&vm.name), "the guest's last lines");
    loop {
        cancel::check()?;
        if !vm.is_alive() {
            let error = anyhow!("'{}' ended while it booted", vm.name);
            let error = with_log(error, &home.hypervisor_log(&vm.name), "the hypervisor's last lines");
            return Err(explain(error));
        }
        // A guest whose driver is not up yet can leave the connection hanging: short limits, many attempts.
        let attempt = Agent::connect(&socket, Duration::from_secs(2))
            .and_then(|mut agent| agent.ping(Duration::from_secs(5)).map(|_| agent));
        match attempt {
            Ok(agent) => return Ok(agent),
            Err(error) if Instant::now() >= end => {
                let error =
                    error.context(format!("the agent of '{}' did not answer within {} s", vm.name, limit.as_secs()));
                return Err(explain(error)).hint("a slow host needs more time: set PUTER_START_TIMEOUT (seconds)");
            }
            Err(_) => std::thread::sleep(AGENT_RETRY),
        }
    }
}

fn configuration(context: &Context, vm: &Vm) -> Result<Configure> {
    let mut seed = [0; 64];
    random(&mut seed)?;
    let time = SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|d| u64::try_from(d.as_nanos()).ok());
    Ok(Configure {
        hostname: vm.name.clone(),
        mac: vm.mac.to_string(),
        netplan: netplan(vm.mac),
        ssh_keys: vec![key::public(context.home)?],
        user: String::new(),
        time,
        identity: Some(Identity {
            instance: vm.instance.clone(),
            machine_id: vm.machine_id.clone(),
            seed: base64::engine::general_purpose::STANDARD.encode(seed),
        }),
    })
}

/// The guest's network: the link with our MAC, by DHCP; the MAC as the client's identity, so that a clone with an old
/// DUID gets its own address.
fn netplan(mac: Mac) -> String {
    format!(
        "network:\n  version: 2\n  renderer: networkd\n  ethernets:\n    puter:\n      match:\n        macaddress: \"{mac}\"\n      dhcp4: true\n      dhcp-identifier: mac\n"
    )
}

/// Adds the last lines of a log to an error.
pub fn with_log(error: anyhow::Error, log: &Path, title: &str) -> anyhow::Error {
    let tail = files::tail(log, 8);
    if tail.is_empty() {
        return error;
    }
    let indented: String = tail.lines().map(|line| format!("\n  {line}")).collect();
    let told = anyhow!("{error:#}\n{title} ({}):{indented}", log.display());
    match error.downcast_ref::<Hinted>() {
        Some(hinted) => Err::<(), _>(told).hint(hinted.hint()).expect_err("it is an error"),
        None => told,
    }
}

/// Fills the bytes with the kernel's randomness.
///
/// # Errors
/// When the kernel gives none.
pub fn random(bytes: &mut [u8]) -> Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
            .context("cannot get random bytes")?;
    }
    Ok(())
}
