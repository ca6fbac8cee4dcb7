//! Making a VM: its id, its state, its disk.

use anyhow::{Context as _, Result, anyhow};

use super::meet::random;
use super::{Context, StartOptions, unix_now};
use crate::disk::qcow2;
use crate::failpoint::reach;
use crate::image::{Image, Store};
use crate::protocol::address::{FIRST_CID, Mac, Subnet, tap_name};
use crate::vm::home::free_space;
use crate::vm::machine::Event;
use crate::vm::settings::show_size;
use crate::vm::state::{ImageId, Restart, SCHEMA, Status, Vm, with_new_id};
use crate::vm::{Hint, daemon, files};

/// A disk can grow only as long as its host has room; less than this and no VM is made.
const LEAST_FREE: u64 = 64 << 20;

/// Checks that a VM could be made of the image, which is pulled where it is not here yet.
///
/// # Errors
/// When the image cannot be had or is no machine's, or the disk would be too small for it.
pub fn check_image(context: &Context, options: &StartOptions) -> Result<()> {
    let store = Store::open(&context.home.images())?;
    disk_size(context, options, &image(context, options, &store)?).map(drop)
}

/// The image for a new VM, pulled where it is not here yet.
fn image(context: &Context, options: &StartOptions, store: &Store) -> Result<Image> {
    let chosen = options.image.clone().or_else(|| crate::vm::init::default_image(context));
    let text = chosen
        .context("no image is named, and `puter init` chose none")
        .hint("run `puter init --image IMAGE`, or give --image IMAGE")?;
    context.pull(store, &text, false)
}

/// The size of a new VM's disk, in bytes.
fn disk_size(context: &Context, options: &StartOptions, image: &Image) -> Result<u64> {
    let disk = options.disk.unwrap_or_else(|| context.settings.disk.max(image.disk_size)).next_multiple_of(4096);
    if disk < image.disk_size {
        let (wanted, least) = (show_size(disk), show_size(image.disk_size));
        return Err(anyhow!("a disk of {wanted} is too small for {}, which has {least}", image.reference))
            .hint(format!("give --disk {least} or more, or leave it out"));
    }
    Ok(disk)
}

pub(super) fn create(context: &Context, name: &str, options: &StartOptions, daemon: &daemon::Client) -> Result<Vm> {
    let store = Store::open(&context.home.images())?;
    // Until the state names the image, nothing else says that it is needed.
    let _hold = store.hold()?;
    let image = image(context, options, &store)?;
    let disk = disk_size(context, options, &image)?;
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
    let mut vm = reserve(context, name, daemon, |id, subnet| {
        let image = ImageId { reference: image.reference.to_string(), digest: image.digest.to_string() };
        let (cpus, memory) = (context.settings.cpus, context.settings.memory);
        let vm = new_vm(context, name, id, subnet, NewVm { image, cpus, memory, disk })?;
        Ok(Vm {
            mounts: options.mounts.clone().unwrap_or_default(),
            ports: options.ports.clone().unwrap_or_default(),
            restart: options.restart.unwrap_or_default(),
            autostart: options.autostart.unwrap_or_default(),
            isolate: options.isolate.unwrap_or(context.settings.isolate),
            member: options.member.clone(),
            ..vm
        })
    })?;
    let made = context.step(name, &format!("disk of {}", show_size(disk)), || {
        // A leftover of a command that was killed before it wrote a state: nothing refers to it.
        files::remove(&overlay)?;
        qcow2::create_overlay(&overlay, &image.disk, qcow2::Format::Raw, disk)?;
        reach("create: disk made");
        vm.advance(Event::Made)?;
        vm.save(context.home)?;
        reach("create: state saved");
        Ok(())
    });
    if let Err(error) = made {
        let _ = files::remove(&overlay);
        let _ = files::remove(&context.home.state(name));
        return Err(error);
    }
    Ok(vm)
}

/// What a new VM is made of.
pub(super) struct NewVm {
    pub image: ImageId,
    pub cpus: u32,
    /// Bytes.
    pub memory: u64,
    /// Bytes.
    pub disk: u64,
}

/// A VM that is being made, with all that follows from its id.
pub(super) fn new_vm(context: &Context, name: &str, id: u32, subnet: Subnet, what: NewVm) -> Result<Vm> {
    Ok(Vm {
        schema: SCHEMA,
        name: name.to_string(),
        id,
        status: Status::Creating,
        process: None,
        mac: Mac::of_id(id),
        ip: subnet.address(id).context("the id has no address")?,
        ip6: None,
        tap: tap_name(name),
        cid: id + FIRST_CID,
        image: what.image,
        overlay: context.home.overlay(name),
        cpus: what.cpus,
        memory: what.memory,
        disk: what.disk,
        instance: random_hex()?,
        machine_id: random_hex()?,
        created: unix_now(),
        started: None,
        hypervisor: None,
        mounts: Vec::new(),
        ports: Vec::new(),
        restart: Restart::No,
        autostart: false,
        isolate: context.settings.isolate,
        exit: None,
        retry: None,
        head: None,
        member: None,
        prepared: false,
    })
}

/// Chooses an id, and writes the new VM's state down with it.
pub(super) fn reserve(
    context: &Context,
    name: &str,
    daemon: &daemon::Client,
    make: impl FnOnce(u32, Subnet) -> Result<Vm>,
) -> Result<Vm> {
    let subnet = daemon.status()?.subnet;
    let taken = daemon.taps()?.into_iter().filter(|tap| tap.vm != name).map(|tap| tap.id).collect();
    with_new_id(context.home, subnet, &taken, |id| {
        let vm = make(id, subnet)?;
        vm.save(context.home)?;
        reach("create: id reserved");
        Ok(vm)
    })
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

    #[test]
    fn instances_are_32_digits_and_never_the_same() {
        let (a, b) = (random_hex().unwrap(), random_hex().unwrap());
        assert_eq!(a.len(), 32);
        assert_ne!(a, b);
    }
}
