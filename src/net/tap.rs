//! Persistent TAP interfaces (linux/if_tun.h, Documentation/networking/tuntap.rst).

use std::ffi::c_int;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{self, IntegerSetter, Opcode, Setter, opcode};

use crate::protocol::address::MAX_INTERFACE_NAME;

const DEVICE: &str = "/dev/net/tun";
const TUNSETIFF: Opcode = opcode::write::<c_int>(b'T', 202);
const TUNSETPERSIST: Opcode = opcode::write::<c_int>(b'T', 203);
const TUNSETOWNER: Opcode = opcode::write::<c_int>(b'T', 204);
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// `struct ifreq` as TUNSETIFF reads it: a name, flags, and the rest of the union.
#[repr(C)]
#[derive(Debug)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<Request>() == 40); // sizeof(struct ifreq) where pointers have 64 bits.

/// Opens a TAP by name, or makes it where there is none. Without CAP_NET_ADMIN only the owner of one opens it.
///
/// # Errors
/// The kernel's, with what failed; `ResourceBusy` where another process holds it.
pub fn open(name: &str) -> io::Result<File> {
    let mut request = Request { name: [0; 16], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, rest: [0; 22] };
    if name.is_empty() || name.len() > MAX_INTERFACE_NAME || name.contains('%') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("'{name}' cannot name an interface")));
    }
    for (to, from) in request.name.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let device = File::options().read(true).write(true).open(DEVICE).map_err(|e| {
        let remedy = match e.kind() {
            io::ErrorKind::PermissionDenied => "; let all users open it, as udev does: sudo chmod 666 /dev/net/tun",
            io::ErrorKind::NotFound => "; load its module: sudo modprobe tun",
            _ => "",
        };
        io::Error::new(e.kind(), format!("cannot open {DEVICE}: {e}{remedy}"))
    })?;
    // SAFETY: TUNSETIFF reads a struct ifreq, whose layout Request has; the kernel's answer is written into it, and
    // the Setter owns it for the call.
    unsafe { ioctl::ioctl(device.as_fd(), Setter::<TUNSETIFF, Request>::new(request)) }
        .map_err(|e| io::Error::new(e.kind(), format!("cannot open the TAP {name}: {e}")))?;
    Ok(device)
}

/// Makes a TAP that stays when no process holds it, with vnet_hdr, for this user to open.
///
/// # Errors
/// The kernel's, with what failed.
pub fn create(name: &str, owner: u32) -> io::Result<()> {
    let device = open(name)?;
    let named = |e: rustix::io::Errno| {
        let e = io::Error::from(e);
        io::Error::new(e.kind(), format!("cannot give the TAP {name} to uid {owner}: {e}"))
    };
    // SAFETY: TUNSETOWNER takes a user's number by value.
    unsafe { ioctl::ioctl(&device, IntegerSetter::<TUNSETOWNER>::new_usize(owner as usize)) }.map_err(named)?;
    // SAFETY: TUNSETPERSIST takes a truth value by value.
    unsafe { ioctl::ioctl(&device, IntegerSetter::<TUNSETPERSIST>::new_usize(1)) }.map_err(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_have_the_kernels_numbers() {
        assert_eq!((TUNSETIFF, TUNSETPERSIST, TUNSETOWNER), (0x4004_54ca, 0x4004_54cb, 0x4004_54cc));
    }

    #[test]
    fn names_that_the_kernel_would_cut_or_expand_are_refused() {
        for name in ["", "sixteen-letters-", "pt-%d"] {
            assert_eq!(open(name).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name}");
        }
    }
}
