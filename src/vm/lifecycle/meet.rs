//! From a machine that boots to one whose agent has answered and made it what it is to be.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, ensure};
use base64::Engine;

use super::Context;
use crate::failpoint::{self, reach};
use crate::hypervisor::process;
use crate::protocol::agent::{Configure, Configured, Identity};
use crate::vm::agent::{Agent, printable};
use crate::vm::daemon::Client;
use crate::vm::home::Home;
use crate::vm::machine::Event;
use crate::vm::state::Vm;
use crate::vm::{Hint, Hinted, cancel, files, key};
use crate::watch;

/// Pause between two attempts to reach an agent that has not told that it is there.
const AGENT_RETRY: Duration = Duration::from_secs(3);
/// These pauses in the first second of a machine that was restored: the agent is there from the beginning. After that
/// each is twice as long as the one before.
const RESTORED_RETRY: Duration = Duration::from_millis(5);
/// How long the first attempt to reach the agent may take: a guest whose driver is not up yet can leave it hanging.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// And one of the later ones, since a guest may be slow to answer.
const LONGEST_CONNECT_TIMEOUT: Duration = Duration::from_secs(8);
/// `configure` runs `netplan apply` and makes host keys; under emulation that takes a while.
const CONFIGURE_TIMEOUT: Duration = Duration::from_secs(180);

/// Where the guest's agent tells that it is there: it connects to this port of its host when it has begun to listen
/// (cloud-hypervisor's docs/vsock.md, connections from the guest). So nobody has to ask again and again.
pub struct Knock {
    listener: UnixListener,
    path: PathBuf,
}

impl Knock {
    /// Begins to listen. The caller holds the VM's lock.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn listen(home: &Home, vm: &str) -> Result<Knock> {
        let path = home.knock(vm);
        files::remove(&path)?;
        let bind = || failpoint::write().and_then(|()| UnixListener::bind(&path));
        let listener = bind().with_context(|| format!("cannot listen on {}", path.display()))?;
        listener.set_nonblocking(true)?;
        Ok(Knock { listener, path })
    }

    fn take(&self) {
        while self.listener.accept().is_ok() {}
    }
}

impl Drop for Knock {
    fn drop(&mut self) {
        let _ = files::remove(&self.path);
    }
}

/// Waits for the agent, configures the guest and saves that it runs. A machine that was `restored` remembers an earlier
/// time, and perhaps that it was another machine.
///
/// # Errors
/// When the machine ends, the agent does not come in time, or it refuses.
pub fn meet_agent(context: &Context, vm: &mut Vm, knock: &Knock, restored: bool) -> Result<()> {
    let home = context.home;
    let name = vm.name.clone();
    let step = if restored { "agent" } else { "boot" };
    let mut agent = context.step(&name, step, || wait_for_agent(context, vm, knock, restored))?;
    reach("start: agent met");
    let configured = context.step(&name, "configure", || {
        // Nobody would answer the guest, and it asks on: there is nothing to wait for.
        let alone = Client::new(home).status().err();
        if let Some(error) = &alone {
            context.observer.note(&name, &format!("it has no address until puterd runs: {error:#}"));
        }
        agent
            .configure(configuration(context, vm, restored, alone.is_some())?, CONFIGURE_TIMEOUT)
            .with_context(|| format!("cannot configure '{name}'"))
    })?;
    reach("start: guest configured");
    for warning in &configured.warnings {
        context.observer.note(&name, &printable(warning));
    }
    accept(context, vm, &configured)?;
    vm.advance(Event::Met)?;
    vm.save(home)?;
    reach("start: saved that it runs");
    Ok(())
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

fn wait_for_agent(context: &Context, vm: &Vm, knock: &Knock, restored: bool) -> Result<Agent> {
    let home = context.home;
    let limit = context.settings.start_timeout;
    let began = Instant::now();
    let socket = home.vsock(&vm.name);
    let explain = |error: anyhow::Error| with_log(error, &home.console_log(&vm.name), "the guest's last lines");
    let ended = || {
        let error = anyhow!("'{}' ended while it booted", vm.name);
        explain(with_log(error, &home.hypervisor_log(&vm.name), "the hypervisor's last lines"))
    };
    let held = vm.process.and_then(|id| process::hold(id.pid, id.start_time)).ok_or_else(ended)?;
    // An agent that came before anybody listened, or does not know how to tell, is asked now and then.
    let mut ask_at = Duration::ZERO;
    let mut pause = if restored { RESTORED_RETRY } else { AGENT_RETRY };
    let mut last = anyhow!("it has not come up");
    let mut patience = CONNECT_TIMEOUT;
    loop {
        cancel::check()?;
        if !vm.is_alive() {
            return Err(ended());
        }
        if began.elapsed() >= limit {
            let error = last.context(format!("the agent of '{}' did not answer within {} s", vm.name, limit.as_secs()));
            return Err(explain(error)).hint("a slow host needs more time: set PUTER_START_TIMEOUT (seconds)");
        }
        if began.elapsed() >= ask_at {
            let asked = Instant::now();
            let attempt = Agent::connect(&socket, patience)
                .and_then(|mut agent| agent.ping(Duration::from_secs(5)).map(|_| agent));
            match attempt {
                Ok(agent) => return Ok(agent),
                Err(error) => last = error,
            }
            if asked.elapsed() >= patience {
                patience = (patience * 2).min(LONGEST_CONNECT_TIMEOUT);
            }
            ask_at = began.elapsed() + pause;
            if began.elapsed() > Duration::from_secs(1) {
                pause = (pause * 2).min(AGENT_RETRY);
            }
        }
        // Short turns, so that Ctrl-C is heard.
        let left = ask_at.saturating_sub(began.elapsed()).min(Duration::from_millis(200));
        if watch::wait(&[knock.listener.as_fd(), held.as_fd()], left)?.first() == Some(&true) {
            knock.take();
            ask_at = Duration::ZERO;
        }
    }
}

fn configuration(context: &Context, vm: &Vm, restored: bool, alone: bool) -> Result<Configure> {
    let mut seed = [0; 64];
    random(&mut seed)?;
    let time = SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|d| u64::try_from(d.as_nanos()).ok());
    Ok(Configure {
        hostname: vm.name.clone(),
        mac: vm.mac.to_string(),
        netplan: NETPLAN.into(),
        ssh_keys: vec![key::public(context.home)?],
        user: String::new(),
        address: vm.ip.to_string(),
        address_timeout: alone.then_some(0),
        restored,
        time,
        mounts: vm
            .mounts
            .iter()
            .enumerate()
            .map(|(number, mount)| crate::protocol::agent::Mount {
                tag: share_tag(number),
                path: mount.guest.clone(),
                read_only: mount.read_only,
            })
            .collect(),
        identity: Some(Identity {
            instance: vm.instance.clone(),
            machine_id: vm.machine_id.clone(),
            seed: base64::engine::general_purpose::STANDARD.encode(seed),
        }),
    })
}

/// The name by which the guest knows one of its shared directories.
pub fn share_tag(number: usize) -> String {
    format!("puter{number}")
}

/// The guest's network: its link by DHCP, with the MAC as the client's identity, so that a clone with an old DUID gets
/// its own address. The link is named by its driver and not by its MAC, which a clone changes while it runs: so the file
/// stays the same, and nothing needs to be applied again. Its IPv6 addresses are made of its MAC, as networkd does by
/// itself, and nothing else would pass the host's filter.
const NETPLAN: &str = "network:
  version: 2
  renderer: networkd
  ethernets:
    puter:
      match:
        driver: virtio_net
      dhcp4: true
      accept-ra: true
      ipv6-privacy: false
      dhcp-identifier: mac
      dhcp4-overrides:
        use-domains: true
";

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
