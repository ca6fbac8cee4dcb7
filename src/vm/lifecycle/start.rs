//! `start`: from a name to a machine whose agent answered.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use super::create::create;
use super::meet::{Knock, meet_agent, share_tag, with_log};
use super::{Context, MOST_SHARES, delete, publish, snapshot, stop, unix_now};
use crate::disk::qcow2;
use crate::failpoint::reach;
use crate::hypervisor::virtiofs::Server;
use crate::hypervisor::{self, Disk, DiskFormat, Kind, Machine, Net, Serial, Share, Vsock};
use crate::image::{Reference, Store};
use crate::protocol::daemon::{Membership, Tap, TapRequest};
use crate::vm::daemon::{self, Refused};
use crate::vm::machine::{Action, Command, Event, Refusal, State};
use crate::vm::port::{self, Forward};
use crate::vm::settings::show_size;
use crate::vm::state::{Mount, Restart, Retry, Vm, existing, ready_for, refusal};
use crate::vm::{Hint, cancel, files, monitor};

/// How long the hypervisor may take to begin with the machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(30);

/// Less memory than this and no Linux boots, in bytes.
const LEAST_MEMORY: u64 = 64 << 20;

/// What the user asked for; what is absent comes from the settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StartOptions {
    pub image: Option<String>,
    pub cpus: Option<u32>,
    pub memory: Option<u64>,
    pub disk: Option<u64>,
    /// Return once the hypervisor runs; a process in the background finishes the rest.
    pub no_wait: bool,
    /// Directories to share; they replace those of before.
    pub mounts: Option<Vec<Mount>>,
    /// Ports to publish; they replace those of before.
    pub ports: Option<Vec<Forward>>,
    pub restart: Option<Restart>,
    pub autostart: Option<bool>,
    /// Whether the VM is kept from all others.
    pub isolate: Option<bool>,
    /// The place in a cluster that a new VM takes, and that one which is there must have.
    pub member: Option<Membership>,
    /// This start is the restart that the state says is due: it happens only if that still holds.
    pub retry: Option<Retry>,
}

/// A VM that was started.
#[derive(Debug)]
pub struct Started {
    pub vm: Vm,
    pub took: Duration,
    /// Whether the VM was made by this command.
    pub created: bool,
}

/// Starts the VM `name`; makes it first where there is none.
///
/// # Errors
/// When any step fails or the user cancels: what this command made is removed again, and a VM that was there before is
/// stopped as it was.
pub fn start(context: &Context, name: &str, options: &StartOptions) -> Result<Started> {
    context.locked(name, || start_locked(context, name, options))
}

/// Stops the VM where it runs, and starts it: under one lock, so that no other command comes between.
///
/// # Errors
/// As for [`stop::stop`] and [`start`].
pub fn restart(context: &Context, name: &str, timeout: Duration, force: bool) -> Result<Started> {
    context.locked(name, || {
        let mut vm = ready_for(context.home, name, Command::Restart)?;
        snapshot::thaw(context, &mut vm)?;
        if vm.state().decide(Command::Restart) == Action::EndAndBoot {
            stop::end(context, &mut vm, timeout, force)?;
        }
        start_locked(context, name, &StartOptions::default())
    })
}

fn start_locked(context: &Context, name: &str, options: &StartOptions) -> Result<Started> {
    let began = Instant::now();
    context.home.check_sockets(name)?;
    let mut found = Vm::load(context.home, name)?;
    if let Some(vm) = &mut found {
        snapshot::thaw(context, vm)?;
    }
    let state = found.as_ref().map_or(State::Absent, Vm::state);
    reach("start: locked");
    if let Some(due) = options.retry {
        let still = found.as_ref().is_some_and(|vm| vm.retry == Some(due)) && state == State::Stopped;
        ensure!(still, "the restart of '{name}' is not wanted any more");
    }
    let action = state.decide(Command::Start);
    match (action, &mut found) {
        (Action::Refuse(Refusal::AlreadyRunning), Some(vm)) => {
            return Err(anyhow!("'{name}' is already running at {}", vm.ip))
                .hint(format!("log in with `puter ssh {name}`, or start another name"));
        }
        (Action::Refuse(why), _) => return Err(refusal(name, state, why)),
        (Action::ClearAndCreate, Some(vm)) => {
            // We hold the lock, so the command that was at it has ended midway.
            let what = if state == State::Creating { "start" } else { "delete" };
            context.observer.note(name, &format!("removing what a {what} that was broken off left"));
            delete::remove(context, vm)?;
            found = None;
        }
        (Action::Meet, Some(vm)) => {
            context.observer.note(name, "a start of it was broken off; going on from there");
            check_same(vm, options)?;
            let mut vm = vm.clone();
            if let Some(ports) = &options.ports {
                let wanted = port::with_former(ports.clone(), &vm.ports);
                publish::save(context, &mut vm, wanted)?;
            }
            meet_agent(context, &mut vm, &Knock::listen(context.home, name)?, false)?;
            return Ok(Started { vm, took: began.elapsed(), created: false });
        }
        (Action::EndAndBoot, Some(vm)) => {
            context.observer.note(name, "a stop of it was broken off; ending it first");
            stop::end(context, vm, context.settings.stop_timeout, false)?;
        }
        _ => {}
    }
    check_resources(options)?;
    if let Some(vm) = &found {
        check_same(vm, options)?;
    }
    let former = found.as_ref().map_or(&[][..], |vm| &vm.ports);
    let ports = ports(former, options);
    publish::check_for_start(context, name, former, &ports)?;
    let daemon = daemon::Client::new(context.home);
    daemon.status()?;
    let kind = hypervisor::detect(&context.settings.hypervisor)?;
    if let Kind::Emulated { reason } = &kind {
        context.observer.note(name, &format!("emulating the processor, which is slow: {reason}"));
    }

    let _guard = cancel::guard();
    let created = found.is_none();
    let mut vm = match found {
        Some(vm) => vm,
        None => create(context, name, options, &daemon)?,
    };
    let former = vm.clone();
    let result = resources(&mut vm, options)
        .and_then(|()| boot_files(context, &vm))
        .and_then(|boot| run(context, &mut vm, &daemon, &kind, boot, options.no_wait));
    match result {
        Ok(()) => Ok(Started { vm, took: began.elapsed(), created }),
        Err(error) => {
            undo(context, &vm, former, &daemon, created);
            Err(error)
        }
    }
}

/// Changes a VM as the options say: its resources where it is stopped, its policies and its
/// published ports in any state.
///
/// # Errors
/// When there is no such VM, it runs, or it cannot be so.
pub fn change(context: &Context, name: &str, options: &StartOptions) -> Result<Vm> {
    context.locked(name, || {
        let resources_change =
            options.cpus.is_some() || options.memory.is_some() || options.disk.is_some() || options.mounts.is_some();
        let mut vm = match (resources_change, &options.ports) {
            (true, _) => ready_for(context.home, name, Command::Set)?,
            (false, Some(_)) => ready_for(context.home, name, Command::Publish)?,
            (false, None) => existing(context.home, name)?,
        };
        check_same(&vm, options)?;
        check_resources(options)?;
        let (due, former) = (vm.retry, vm.ports.clone());
        if options.ports.is_some() {
            // Before the disk grows.
            publish::check(context, name, &former, &ports(&former, options))?;
        }
        resources(&mut vm, options)?;
        vm.retry = due.filter(|_| vm.restart != Restart::No);
        // A TAP that there is takes it on at once; before the state says so, since a wish is no isolation.
        if options.isolate.is_some() && vm.is_alive() {
            let asked = daemon::Client::new(context.home).ensure_tap(&tap_request(&vm));
            asked.with_context(|| format!("cannot change the network of '{name}'"))?;
        }
        let wanted = std::mem::replace(&mut vm.ports, former);
        match options.ports {
            Some(_) => publish::save(context, &mut vm, wanted)?,
            None => vm.save(context.home)?,
        }
        Ok(vm)
    })
}

/// Ends what `start --no-wait` began: waits for the agent and configures the guest.
///
/// # Errors
/// When the agent does not come or refuses; the VM is left running for the user to look at.
pub fn finish(context: &Context, name: &str) -> Result<Vm> {
    context.locked(name, || {
        let mut vm = existing(context.home, name)?;
        if vm.state() == State::Starting {
            meet_agent(context, &mut vm, &Knock::listen(context.home, name)?, false)?;
        }
        Ok(vm)
    })
}

/// Checks that the options ask for nothing that an existing VM cannot change.
fn check_same(vm: &Vm, options: &StartOptions) -> Result<()> {
    let name = &vm.name;
    if options.member.is_some() && vm.member != options.member {
        return Err(anyhow!("there is a VM '{name}' already, which is not this cluster's"))
            .hint(format!("remove it (puter delete {name}), or choose another name for the cluster"));
    }
    if options.image.as_ref().is_some_and(|image| !is_made_from(vm, image)) {
        return Err(anyhow!("'{name}' was made from {}, its image cannot change", vm.image.reference))
            .hint("leave out --image, or make another VM");
    }
    if let Some(disk) = options.disk.filter(|disk| *disk < vm.disk) {
        return Err(anyhow!(
            "the disk of '{name}' has {}, it cannot shrink to {}",
            show_size(vm.disk),
            show_size(disk)
        ))
        .hint("leave out --disk, or make another VM");
    }
    Ok(())
}

/// Whether the image that is written so is the one that the VM was made from.
pub fn is_made_from(vm: &Vm, image: &str) -> bool {
    let named = image.parse::<Reference>().ok().and_then(|reference| reference.absolute().ok());
    // As much of a digest as no other has, or all of it after a name.
    let digest = image.starts_with("sha256:") && vm.image.digest.starts_with(image);
    let whole = image.split_once('@').is_some_and(|(_, digest)| digest == vm.image.digest);
    digest || whole || image == vm.image.reference || named.is_some_and(|named| named.to_string() == vm.image.reference)
}

/// Checks what no hypervisor could run, before anything is made or changed.
///
/// # Errors
/// What cannot be, with the way out.
pub fn check_resources(options: &StartOptions) -> Result<()> {
    if let Some(cpus) = options.cpus.filter(|cpus| !(1..=254).contains(cpus)) {
        return Err(anyhow!("a VM cannot have {cpus} processors")).hint("give --cpus from 1 to 254");
    }
    let mounts = options.mounts.as_deref().unwrap_or_default();
    if mounts.len() > MOST_SHARES {
        return Err(anyhow!("{} mounts are too many", mounts.len()))
            .hint(format!("give --mount up to {MOST_SHARES} times"));
    }
    for (number, mount) in mounts.iter().enumerate() {
        if mounts[..number].iter().any(|other| other.guest == mount.guest) {
            return Err(anyhow!("two directories cannot both be at {}", mount.guest))
                .hint("give each --mount its own place");
        }
    }
    if let Some(memory) = options.memory {
        let host = host_memory();
        let all = host.map_or(String::new(), |host| format!("; this host has {}", show_size(host)));
        if memory < LEAST_MEMORY || host.is_some_and(|host| memory > host) {
            return Err(anyhow!("a VM cannot have {} of memory{all}", show_size(memory)))
                .hint(format!("give --memory from {} up", show_size(LEAST_MEMORY)));
        }
    }
    Ok(())
}

/// Bytes of the host's memory (proc_meminfo(5)).
fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Takes on what the options change; the caller saves.
pub(super) fn resources(vm: &mut Vm, options: &StartOptions) -> Result<()> {
    vm.cpus = options.cpus.unwrap_or(vm.cpus);
    vm.memory = options.memory.unwrap_or(vm.memory);
    if let Some(mounts) = &options.mounts {
        vm.mounts.clone_from(mounts);
    }
    vm.ports = ports(&vm.ports, options);
    vm.restart = options.restart.unwrap_or(vm.restart);
    vm.autostart = options.autostart.unwrap_or(vm.autostart);
    vm.isolate = options.isolate.unwrap_or(vm.isolate);
    vm.retry = options.retry;
    if let Some(disk) = options.disk.filter(|disk| *disk > vm.disk) {
        // The overlay first: a state that says less than there is does no harm.
        let disk = disk.next_multiple_of(4096);
        qcow2::grow(&vm.overlay, disk)?;
        vm.disk = disk;
    }
    Ok(())
}

/// What a VM that published `former` publishes now.
fn ports(former: &[Forward], options: &StartOptions) -> Vec<Forward> {
    options.ports.as_ref().map_or(former.to_vec(), |wanted| port::with_former(wanted.clone(), former))
}

/// The VM's kernel and initrd: those that `init` installed for the image it chose, for another image its own.
pub(super) fn boot_files(context: &Context, vm: &Vm) -> Result<(PathBuf, Option<PathBuf>)> {
    if crate::vm::init::default_digest(context.home).as_deref() != Some(&vm.image.digest) {
        let digest = vm.image.digest.parse().map_err(|why| anyhow!("{why}"))?;
        let image = Store::open(&context.home.images())?.by_digest(&digest, None)?;
        if let Some((Some(kernel), initrd)) = image.map(|image| (image.kernel, image.initrd)) {
            return Ok((kernel, initrd));
        }
    }
    let kernel = context.home.kernel();
    if !kernel.is_file() {
        return Err(anyhow!("there is no kernel for '{}': {} has none", vm.name, vm.image.reference))
            .hint("`puter init --image IMAGE` installs the kernel of an image, or with --kernel FILE one of yours");
    }
    let initrd = context.home.initrd();
    let initrd = initrd.is_file().then_some(initrd);
    Ok((kernel, initrd))
}

fn run(
    context: &Context,
    vm: &mut Vm,
    daemon: &daemon::Client,
    kind: &Kind,
    (kernel, initrd): (PathBuf, Option<PathBuf>),
    no_wait: bool,
) -> Result<()> {
    let home = context.home;
    let name = vm.name.clone();
    check_disk(vm)?;
    let shares = shares(context, vm)?;
    connect(context, vm, daemon)?;
    let machine = Machine {
        cpus: vm.cpus,
        memory: vm.memory,
        kernel,
        initrd,
        cmdline: "console=ttyS0 root=/dev/vda rw quiet".into(),
        disks: vec![Disk { path: vm.overlay.clone(), format: DiskFormat::Qcow2 { backing: true }, readonly: false }],
        nets: vec![Net { tap: vm.tap.clone(), mac: vm.mac.to_string() }],
        vsock: Some(Vsock { cid: vm.cid, socket: home.vsock(&name) }),
        shares: (0..vm.mounts.len()).map(|n| Share { tag: share_tag(n), socket: home.share(&name, n) }).collect(),
        serial: Serial::Socket(home.serial(&name)),
        api_socket: home.api(&name),
        events: Some(home.events(&name)),
    };
    reach("start: network made");
    clean(context, &name)?;
    let knock = Knock::listen(home, &name)?;
    let launch = hypervisor::Launch::new(kind, &machine, &home.hypervisor_log(&name))?;
    bring_up(context, vm, kind, launch, shares)?;
    if no_wait {
        drop(knock);
        return finish_in_background(&name, home.root());
    }
    meet_agent(context, vm, &knock, false)
}

/// Has puterd make the VM's TAP.
pub(super) fn connect(context: &Context, vm: &mut Vm, daemon: &daemon::Client) -> Result<()> {
    let made = context.step(&vm.name, "network", || daemon.ensure_tap(&tap_request(vm)));
    take_tap(vm, made)
}

/// The TAP that the VM needs.
pub(super) fn tap_request(vm: &Vm) -> TapRequest {
    TapRequest { vm: vm.name.clone(), id: vm.id, isolated: vm.isolate, member: vm.member.clone() }
}

/// Takes puterd's answer to the request.
pub(super) fn take_tap(vm: &mut Vm, made: Result<Tap>) -> Result<()> {
    let name = &vm.name;
    let tap = made.map_err(|error| match error.downcast_ref::<Refused>() {
        Some(refused) if refused.status == 409 => error.context(format!("cannot connect '{name}' to the network")),
        _ => error,
    })?;
    ensure!(
        tap.mac == vm.mac && tap.ip == vm.ip,
        "puterd gives '{name}' the address {}, its state says {}: the subnet has changed; delete and make the VM again",
        tap.ip,
        vm.ip
    );
    vm.ip6 = tap.ip6;
    vm.tap = tap.name;
    Ok(())
}

/// Removes what a former run left.
pub(super) fn clean(context: &Context, name: &str) -> Result<()> {
    let home = context.home;
    context.end_strays(name);
    for former in home.volatile(name).into_iter().chain([home.console_log(name), home.former_console_log(name)]) {
        files::remove(&former)?;
    }
    Ok(())
}

/// Starts the hypervisor under a monitor, and waits until the machine runs.
pub(super) fn bring_up(
    context: &Context,
    vm: &mut Vm,
    kind: &Kind,
    launch: hypervisor::Launch,
    shares: Vec<Server>,
) -> Result<()> {
    let home = context.home;
    let name = vm.name.clone();
    let log = home.hypervisor_log(&name);
    context.step(&name, kind.name(), || {
        let monitored = monitor::launch(home, vm, launch, shares)?;
        reach("start: hypervisor launched");
        let id = monitored.hypervisor;
        vm.advance(Event::Launched)?;
        vm.process = Some(id);
        vm.ports.clone_from(&monitored.ports);
        vm.exit = None;
        vm.started = Some(unix_now());
        vm.hypervisor = Some(kind.to_string());
        vm.save(home)?;
        reach("start: hypervisor saved");
        monitored.let_go()?;
        reach("start: hypervisor let go");
        let cancelled: &AtomicBool = cancel::flag();
        hypervisor::wait_ready((id.pid, id.start_time), &home.events(&name), cancelled, BOOT_TIMEOUT)
            .map_err(|error| with_log(error, &log, "the hypervisor's last lines"))
    })?;
    reach("start: machine boots");
    Ok(())
}

/// The programs that serve the VM's shared directories.
fn shares(context: &Context, vm: &Vm) -> Result<Vec<Server>> {
    let all = vm.mounts.iter().enumerate();
    all.map(|(number, mount)| {
        let host = &mount.host;
        let found = std::fs::metadata(host).with_context(|| format!("cannot share {}", host.display()))?;
        ensure!(found.is_dir(), "cannot share {}: it is no directory", host.display());
        Server::new(host, &context.home.share(&vm.name, number), mount.read_only)
    })
    .collect()
}

/// Checks that the overlay and what it stands on are still there and what the state says.
pub(super) fn check_disk(vm: &Vm) -> Result<()> {
    let header = qcow2::read_header(&vm.overlay)?;
    ensure!(
        header.size == vm.disk,
        "the disk {} has {} bytes, the state of '{}' says {}",
        vm.overlay.display(),
        header.size,
        vm.name,
        vm.disk
    );
    match header.backing {
        Some(base) if base.is_file() => Ok(()),
        Some(base) => bail!("the base image {} of '{}' is gone", base.display(), vm.name),
        None => bail!("the disk {} has no base image", vm.overlay.display()),
    }
}

/// Starts this program again, out of the terminal's reach, to end the start.
fn finish_in_background(name: &str, home: &Path) -> Result<()> {
    use std::os::unix::process::CommandExt;
    let me = std::env::current_exe().context("cannot find puter's own executable")?;
    let mut command = std::process::Command::new(me);
    command.arg0("puter").args(["start-finish", name]).env("PUTER_HOME", home);
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    command.process_group(0);
    command.spawn().context("cannot start the process that waits for the agent")?;
    Ok(())
}

/// Puts back what a failed start made. Nothing here may hide the first error.
pub(super) fn undo(context: &Context, vm: &Vm, mut former: Vm, daemon: &daemon::Client, created: bool) {
    let home = context.home;
    context.end(vm.process);
    monitor::wait_for_former(home, &vm.name);
    let _ = daemon.delete_tap(&vm.name);
    for path in home.volatile(&vm.name) {
        let _ = files::remove(&path);
    }
    if created {
        let _ = files::remove(&vm.overlay);
        for path in home.leftovers(&vm.name) {
            let _ = files::remove(&path);
        }
        let _ = files::remove(&home.state(&vm.name));
    } else {
        // The disk may have grown, and stays so.
        former.disk = vm.disk;
        former.process = None;
        let _ = former.save(home);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::state::ImageId;
    use crate::vm::state::tests::sample;

    #[test]
    fn an_existing_vm_keeps_its_image_and_its_disk_never_shrinks() {
        let vm = sample("web", 1);
        let other = StartOptions { image: Some("other".into()), ..StartOptions::default() };
        assert!(check_same(&vm, &other).unwrap_err().to_string().contains("cannot change"));
        let named =
            Vm { image: ImageId { reference: "localhost:5000/a/b:latest".into(), ..vm.image.clone() }, ..vm.clone() };
        for same in ["localhost:5000/a/b", "localhost:5000/a/b:latest"] {
            check_same(&named, &StartOptions { image: Some(same.into()), ..StartOptions::default() }).unwrap();
        }
        let smaller = StartOptions { disk: Some(1 << 29), ..StartOptions::default() };
        assert!(check_same(&vm, &smaller).unwrap_err().to_string().contains("cannot shrink"));
        assert!(is_made_from(&vm, "sha256:0") && !is_made_from(&vm, "sha256:1") && !is_made_from(&vm, "sha256:00"));
        let same = StartOptions { image: Some("r".into()), disk: Some(1 << 30), ..StartOptions::default() };
        check_same(&vm, &same).unwrap();
        let member = Some(Membership { cluster: "c".into(), member: "node1".into() });
        let wanted = StartOptions { member: member.clone(), ..StartOptions::default() };
        assert!(check_same(&vm, &wanted).unwrap_err().to_string().contains("not this cluster's"));
        check_same(&Vm { member, ..vm }, &wanted).unwrap();
    }
}
