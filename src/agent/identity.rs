//! What makes a machine itself: machine-id, randomness, host keys. Taken on once for each instance.

use std::fs;
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use rustix::ioctl::{NoArg, Setter, ioctl, opcode};

use super::configure::warn;
use super::files::Guest;
use super::ssh;
use crate::protocol::agent::{Identity, MAX_SEED};

/// Names the identity that the guest has taken on.
const INSTANCE: &str = "/var/lib/puter/instance";
/// Counts identities and restores; programs in the guest watch it to learn that time has jumped or the machine is new.
const GENERATION: &str = "/run/puter/generation";

/// Takes on the identity; false when the guest had it already. In a machine that was `restored` the randomness is new
/// and the generation another in either case.
///
/// # Errors
/// When a value cannot be used or a file cannot be written: the machine would not be itself.
pub fn take_on(guest: &Guest, identity: &Identity, restored: bool, warnings: &mut Vec<String>) -> Result<bool> {
    let plain = |text: &str| !text.is_empty() && text.len() <= 64 && text.bytes().all(|b| b.is_ascii_alphanumeric());
    ensure!(plain(&identity.instance), "the instance is not 1 to 64 letters and digits");
    let id = &identity.machine_id;
    let hex = id.len() == 32 && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    ensure!(hex, "the machine-id is not 32 hexadecimal digits");
    let seed = base64::engine::general_purpose::STANDARD.decode(&identity.seed).context("the seed is not base64")?;
    ensure!(seed.len() <= MAX_SEED, "the seed has {} bytes, more than {MAX_SEED}", seed.len());

    // First: the new keys must not come from a pool that another machine shares.
    warn(warnings, stir(guest, &seed));
    if fs::read_to_string(guest.path(INSTANCE)).is_ok_and(|former| former.trim() == identity.instance) {
        if restored {
            next_generation(guest)?;
        }
        return Ok(false);
    }
    guest.write("/etc/machine-id", format!("{id}\n").as_bytes(), 0o444)?;
    let dbus = guest.path("/var/lib/dbus/machine-id");
    if fs::symlink_metadata(&dbus).is_ok_and(|metadata| metadata.is_file()) {
        guest.write("/var/lib/dbus/machine-id", format!("{id}\n").as_bytes(), 0o444)?;
    }
    ssh::forget_host_keys(guest)?;
    next_generation(guest)?;
    // Last: a guest that is cut off midway does all of it again.
    guest.write(INSTANCE, format!("{}\n", identity.instance).as_bytes(), 0o600)?;
    Ok(true)
}

/// Counts the generation on. Programs that hold secrets or numbers which must not be used twice watch this file.
fn next_generation(guest: &Guest) -> Result<()> {
    let generation = fs::read_to_string(guest.path(GENERATION)).ok().and_then(|text| text.trim().parse().ok());
    let generation = generation.unwrap_or(0_u64).saturating_add(1);
    guest.write(GENERATION, format!("{generation}\n").as_bytes(), 0o644).map(drop)
}

/// `struct rand_pool_info` (linux/random.h) with room for the largest seed.
#[repr(C)]
struct Pool {
    /// Bits.
    entropy: i32,
    /// Bytes.
    size: i32,
    bytes: [u8; MAX_SEED],
}

/// Mixes the host's random bytes into the kernel's pool, credited, and makes it reseed at once (random(4)).
fn stir(guest: &Guest, seed: &[u8]) -> Result<()> {
    if !guest.is_real() || seed.is_empty() {
        return Ok(());
    }
    let device = fs::OpenOptions::new().write(true).open("/dev/urandom").context("cannot open /dev/urandom")?;
    let mut pool = Pool { entropy: (seed.len() * 8) as i32, size: seed.len() as i32, bytes: [0; MAX_SEED] };
    for (to, from) in pool.bytes.iter_mut().zip(seed) {
        *to = *from;
    }
    const ADD_ENTROPY: u32 = opcode::write::<[i32; 2]>(b'R', 0x03);
    const RESEED: u32 = opcode::none(b'R', 0x07);
    // SAFETY: RNDADDENTROPY reads a rand_pool_info whose `size` bytes are inside `Pool`; RNDRESEEDCRNG takes nothing.
    unsafe {
        ioctl(device.as_fd(), Setter::<ADD_ENTROPY, Pool>::new(pool)).context("the kernel refuses the random seed")?;
        ioctl(device.as_fd(), NoArg::<RESEED>::new()).context("the kernel does not reseed")?;
    }
    Ok(())
}
