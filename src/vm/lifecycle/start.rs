//! `start`: from a name to a machine whose agent answered.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use super::meet::{meet_agent, random, with_log};
use super::{Context, delete, unix_now};
use crate::disk::qcow2;
use crate::hypervisor::{self, Disk, DiskFormat, Kind, Machine, Net, Vsock};
use crate::image::{Image, Store};
use crate::protocol::address::{FIRST_CID, Mac, tap_name};
use crate::protocol::daemon::TapRequest;
use crate::vm::daemon::{self, Refused};
use crate::vm::home::free_space;
use crate::vm::settings::show_size;
use crate::vm::state::{ImageId, ProcessId, SCHEMA, Status, Vm, existing, with_new_id};
use crate::vm::{Hint, cancel, files};

/// A disk can grow only as long as its host has room; less than this and the VM does not start.
const LEAST_FREE: u64 = 64 << 20;
/// How long the hypervisor may take to answer on its API socket.
const API_TIMEOUT: Duration = Duration::from_secs(30);
/// What the user asked for; what is absent comes from the settings.
#[derive(Clone, Debug, Default)]
pub struct StartOptions {
    pub image: Option<String>,
    pub cpus: Option<u32>,
    pub memory: Option<u64>,
    pub disk: Option<u64>,
    /// Return once the hypervisor runs; a process in the background finishes the rest.
    pub no_wait: bool,
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

fn start_locked(context: &Context, name: &str, options: &StartOptions) -> Result<Started> {
    let began = Instant::now();
    context.home.check_sockets(name)?;
    let existing = match Vm::load(context.home, name)? {
        // We hold the lock, so the command that was at it has ended midway.
        Some(mut vm) if matches!(vm.status, Status::Creating | Status::Deleting) => {
            let what = if vm.status == Status::Creating { "start" } else { "delete" };
            context.observer.note(name, &format!("removing what a {what} that was broken off left"));
            delete::remove(context, &mut vm)?;
            None
        }
        existing => existing,
    };
    if let Some(vm) = &existing {
        check_startable(vm, options)?;
    }
    let daemon = daemon::Client::new(context.home);
    daemon.status()?;
    let kind = hypervisor::detect(&context.settings.hypervisor)?;
    if let Kind::Emulated { reason } = &kind {
        context.observer.note(name, &format!("emulating the processor, which is slow: {reason}"));
    }

    let _guard = cancel::guard();
    let created = existing.is_none();
    let vm = match existing {
        Some(vm) => vm,
        None => create(context, name, options, &daemon)?,
    };
    let mut vm = resources(vm, options);
    let result = boot_files(context, &vm).and_then(|boot| run(context, &mut vm, &daemon, &kind, boot, options.no_wait));
    match result {
        Ok(()) => Ok(Started { vm, took: began.elapsed(), created }),
        Err(error) => {
            undo(context, vm, &daemon, created);
            Err(error)
        }
    }
}

/// Ends what `start --no-wait` began: waits for the agent and configures the guest.
///
/// # Errors
/// When the agent does not come or refuses; the VM is left running for the user to look at.
pub fn finish(context: &Context, name: &str) -> Result<Vm> {
    context.locked(name, || {
        let mut vm = existing(context.home, name)?;
        if vm.status() == Status::Starting {
            meet_agent(context, &mut vm)?;
        }
        Ok(vm)
    })
}

fn check_startable(vm: &Vm, options: &StartOptions) -> Result<()> {
    let name = &vm.name;
    match vm.status() {
        Status::Stopped => {}
        Status::Running => {
            return Err(anyhow!("'{name}' is already running at {}", vm.ip))
                .hint(format!("log in with `puter ssh {name}`, or start another name"));
        }
        status => {
            return Err(anyhow!("'{name}' is {}", status.word()))
                .hint(format!("`puter info {name}` shows its state; `puter stop {name}` ends it"));
        }
    }
    if options.image.as_ref().is_some_and(|image| *image != vm.image.reference) {
        return Err(anyhow!("'{name}' was made from {}, its image cannot change", vm.image.reference))
            .hint("leave out --image, or make another VM");
    }
    if options.disk.is_some_and(|disk| disk != vm.disk) {
        return Err(anyhow!("the disk of '{name}' has {}, its size cannot change", show_size(vm.disk)))
            .hint("leave out --disk, or make another VM");
    }
    Ok(())
}

fn resources(mut vm: Vm, options: &StartOptions) -> Vm {
    vm.cpus = options.cpus.unwrap_or(vm.cpus);
    vm.memory = options.memory.unwrap_or(vm.memory);
    vm
}

/// The VM's kernel and initrd: those that `init` installed for the image it chose, for another image its own.
fn boot_files(context: &Context, vm: &Vm) -> Result<(PathBuf, Option<PathBuf>)> {
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

/// The image for a new VM, pulled where it is not here yet.
fn image(context: &Context, options: &StartOptions, store: &Store) -> Result<Image> {
    let chosen = options.image.clone().or_else(|| crate::vm::init::default_image(context.home));
    let text = chosen
        .or_else(|| context.settings.image.clone())
        .context("no image is named, and `puter init` chose none")
        .hint("run `puter init --image IMAGE`, or give --image IMAGE")?;
    context.pull(store, &text, false)
}

fn create(context: &Context, name: &str, options: &StartOptions, daemon: &daemon::Client) -> Result<Vm> {
    let store = Store::open(&context.home.images())?;
    // Until the state names the image, nothing else says that it is needed.
    let _hold = store.hold()?;
    let image = image(context, options, &store)?;
    let disk = options.disk.unwrap_or_else(|| context.settings.disk.max(image.disk_size)).next_multiple_of(4096);
    if disk < image.disk_size {
        let (wanted, least) = (show_size(disk), show_size(image.disk_size));
        return Err(anyhow!("a disk of {wanted} is too small for {}, which has {least}", image.reference))
            .hint(format!("give --disk {least} or more, or leave it out"));
    }
    let overlay = context.home.overlay(name);
    let free = free_space(&context.home.overlays())?;
    if free < LEAST_FREE {
        return Err(anyhow!(
            "no disk space for '{name}': {} has {} free, at least {} are needed",
            context.home.overlays().display(),
            show_size(free),
            show_size(LEAST_FREE)
        ))
        .hint("free some space, or set PUTER_HOME to a larger file system");
    }
    let subnet = daemon.status()?.subnet;
    let taken = daemon.taps()?.into_iter().filter(|tap| tap.vm != name).map(|tap| tap.id).collect();
    let mut vm = with_new_id(context.home, subnet, &taken, |id| {
        let vm = Vm {
            schema: SCHEMA,
            name: name.to_string(),
            id,
            status: Status::Creating,
            process: None,
            mac: Mac::of_id(id),
            ip: subnet.address(id).context("the id has no address")?,
            tap: tap_name(name),
            cid: id + FIRST_CID,
            image: ImageId { reference: image.reference.to_string(), digest: image.digest.to_string() },
            overlay: overlay.clone(),
            cpus: context.settings.cpus,
            memory: context.settings.memory,
            disk,
            instance: random_hex()?,
            machine_id: random_hex()?,
            created: unix_now(),
            started: None,
            hypervisor: None,
        };
        vm.save(context.home)?;
        Ok(vm)
    })?;
    let made = context.step(name, &format!("disk of {}", show_size(disk)), || {
        // A leftover of a command that was killed before it wrote a state: nothing refers to it.
        files::remove(&overlay)?;
        qcow2::create_overlay(&overlay, &image.disk, qcow2::Format::Raw, disk)?;
        vm.status = Status::Stopped;
        vm.save(context.home)
    });
    if let Err(error) = made {
        let _ = files::remove(&overlay);
        let _ = files::remove(&context.home.state(name));
        return Err(error);
    }
    Ok(vm)
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
    let request = TapRequest { vm: name.clone(), id: vm.id, isolated: false };
    let tap = context.step(&name, "network", || daemon.ensure_tap(&request)).map_err(|error| {
        match error.downcast_ref::<Refused>() {
            Some(refused) if refused.status == 409 => error.context(format!("cannot connect '{name}' to the network")),
            _ => error,
        }
    })?;
    ensure!(
        tap.mac == vm.mac && tap.ip == vm.ip,
        "puterd gives '{name}' the address {}, its state says {}: the subnet has changed; delete and make the VM again",
        tap.ip,
        vm.ip
    );
    vm.tap = tap.name;

    let machine = Machine {
        cpus: vm.cpus,
        memory: vm.memory,
        kernel,
        initrd,
        cmdline: "console=ttyS0 root=/dev/vda rw quiet".into(),
        disks: vec![Disk { path: vm.overlay.clone(), format: DiskFormat::Qcow2 { backing: true }, readonly: false }],
        nets: vec![Net { tap: vm.tap.clone(), mac: vm.mac.to_string() }],
        vsock: Some(Vsock { cid: vm.cid, socket: home.vsock(&name) }),
        console_log: home.console_log(&name),
        api_socket: home.api(&name),
        events: Some(home.events(&name)),
    };
    context.end_strays(&name);
    let log = home.hypervisor_log(&name);
    files::remove(&home.console_log(&name))?;
    files::remove(&home.events(&name))?;
    context.step(&name, kind.name(), || {
        let mut process = hypervisor::launch(kind, &machine, &log)?;
        vm.process = Some(ProcessId { pid: process.pid(), start_time: process.start_time() });
        vm.status = Status::Starting;
        vm.started = Some(unix_now());
        vm.hypervisor = Some(kind.to_string());
        vm.save(home)?;
        let client = hypervisor::Client::new(&home.api(&name));
        let cancelled: &AtomicBool = cancel::flag();
        hypervisor::wait_ready(&mut process, &client, cancelled, API_TIMEOUT)
            .map_err(|error| with_log(error, &log, "the hypervisor's last lines"))
    })?;
    if no_wait {
        return finish_in_background(&name, home.root());
    }
    meet_agent(context, vm)
}

/// Checks that the overlay and what it stands on are still there and what the state says.
fn check_disk(vm: &Vm) -> Result<()> {
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
fn undo(context: &Context, mut vm: Vm, daemon: &daemon::Client, created: bool) {
    let home = context.home;
    if let Some(process) = vm.process {
        hypervisor::process::kill(process.pid, process.start_time, Duration::from_secs(10));
    }
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
        vm.status = Status::Stopped;
        vm.process = None;
        let _ = vm.save(home);
    }
}

/// 32 hexadecimal digits.
fn random_hex() -> Result<String> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::state::tests::sample;

    #[test]
    fn only_a_stopped_vm_may_start_and_the_error_says_what_to_do() {
        let mut vm = sample("web", 1);
        check_startable(&vm, &StartOptions::default()).unwrap();
        vm.process = Some(ProcessId {
            pid: std::process::id(),
            start_time: hypervisor::process::start_time(std::process::id()).unwrap(),
        });
        for (status, expected) in [
            (Status::Running, "already running at 10.0.0.11"),
            (Status::Starting, "is starting"),
            (Status::Stopping, "is stopping"),
        ] {
            vm.status = status;
            let error = check_startable(&vm, &StartOptions::default()).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert!(error.downcast_ref::<crate::vm::Hinted>().is_some());
        }
    }

    #[test]
    fn an_existing_vm_keeps_its_image_and_disk() {
        let vm = sample("web", 1);
        let other = StartOptions { image: Some("other".into()), ..StartOptions::default() };
        assert!(check_startable(&vm, &other).unwrap_err().to_string().contains("cannot change"));
        let larger = StartOptions { disk: Some(2 << 30), ..StartOptions::default() };
        assert!(check_startable(&vm, &larger).unwrap_err().to_string().contains("cannot change"));
        let same = StartOptions { image: Some("r".into()), disk: Some(1 << 30), ..StartOptions::default() };
        check_startable(&vm, &same).unwrap();
    }

    #[test]
    fn instances_are_32_digits_and_never_the_same() {
        let (a, b) = (random_hex().unwrap(), random_hex().unwrap());
        assert_eq!(a.len(), 32);
        assert_ne!(a, b);
    }
}
