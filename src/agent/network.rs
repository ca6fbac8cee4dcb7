//! The guest's link: its MAC, and the configuration by which it gets its address.

use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::ioctl::{Setter, Updater, ioctl};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::command::run;
use super::configure::warn;
use super::files::Guest;
use crate::protocol::address::Mac;

const NETPLAN: &str = "/etc/netplan/60-puter.yaml";
const NETWORKD: &str = "/etc/systemd/network/60-puter.network";
/// How long the link may take to get its address.
const ADDRESS_TIMEOUT: u32 = 30;

/// `struct ifreq` (linux/if.h) with a hardware address.
#[repr(C)]
struct HardwareRequest {
    name: [u8; 16],
    family: u16,
    address: [u8; 6],
    rest: [u8; 16],
}

/// `struct ifreq` with an IPv4 address.
#[repr(C)]
struct AddressRequest {
    name: [u8; 16],
    family: u16,
    port: u16,
    address: [u8; 4],
    rest: [u8; 16],
}

/// How long the kernel may take to find the link: on a busy host the agent can be there before its driver is.
const LINK_TIMEOUT: Duration = Duration::from_secs(30);

/// Where the kernel lists links.
const LINKS: &str = "/sys/class/net";
/// Where it has its settings for IPv6 on each link.
const IPV6: &str = "/proc/sys/net/ipv6/conf";

/// Gives the first Ethernet link this MAC; false where it had it already. The kernel would keep the IPv6 addresses that
/// it or others made of the former one, so IPv6 is off on the link while that changes: they are gone before the first
/// frame with the new MAC, and the new ones are made after.
///
/// # Errors
/// When there is no such link or the kernel refuses.
pub fn set_mac(guest: &Guest, mac: Mac) -> Result<bool> {
    if !guest.is_real() {
        return Ok(false);
    }
    let name = wait_for_link(LINKS, LINK_TIMEOUT).context("the guest has no Ethernet link")?;
    let now = fs::read_to_string(format!("{LINKS}/{name}/address")).unwrap_or_default();
    if now.trim().parse() == Ok(mac) {
        return Ok(false);
    }
    const SIOCSIFHWADDR: u32 = 0x8924; // linux/sockios.h
    const ARPHRD_ETHER: u16 = 1; // linux/if_arp.h
    let request = HardwareRequest { name: c_name(&name), family: ARPHRD_ETHER, address: mac.0, rest: [0; 16] };
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let setting = format!("{IPV6}/{name}/disable_ipv6");
    let had_ipv6 = fs::read_to_string(&setting).is_ok_and(|text| text.trim() == "0");
    let turn = |off: &str| fs::write(&setting, off).with_context(|| format!("cannot write {off} to {setting}"));
    if had_ipv6 {
        turn("1")?;
    }
    // SAFETY: the kernel reads one ifreq, which the structure is: 40 bytes.
    let changed = unsafe { ioctl(socket.as_fd(), Setter::<SIOCSIFHWADDR, HardwareRequest>::new(request)) };
    if had_ipv6 {
        turn("0")?;
    }
    changed.with_context(|| format!("cannot give {name} the MAC {mac}"))?;
    Ok(true)
}

fn c_name(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    bytes
}

/// The link's first IPv4 address (netdevice(7), SIOCGIFADDR).
fn address_of(name: &str) -> Option<Ipv4Addr> {
    const SIOCGIFADDR: u32 = 0x8915; // linux/sockios.h
    let family = AddressFamily::INET.as_raw();
    let mut request = AddressRequest { name: c_name(name), family, port: 0, address: [0; 4], rest: [0; 16] };
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()?;
    // SAFETY: the kernel reads and writes one ifreq, which the structure is: 40 bytes.
    unsafe { ioctl(socket.as_fd(), Updater::<SIOCGIFADDR, AddressRequest>::new(&mut request)) }.ok()?;
    Some(Ipv4Addr::from(request.address))
}

/// The Ethernet link with the lowest number that is a device and not something made of software.
fn first_link(directory: &str) -> Option<String> {
    let number =
        |path: &PathBuf, file: &str| -> Option<u32> { fs::read_to_string(path.join(file)).ok()?.trim().parse().ok() };
    let links = fs::read_dir(directory).ok()?.flatten().map(|entry| entry.path());
    let real = links.filter(|path| number(path, "type") == Some(1) && path.join("device").exists());
    let first = real.min_by_key(|path| number(path, "ifindex").unwrap_or(u32::MAX))?;
    first.file_name()?.to_str().map(String::from)
}

/// The first link, as soon as there is one.
fn wait_for_link(directory: &str, limit: Duration) -> Option<String> {
    let end = Instant::now() + limit;
    loop {
        match first_link(directory) {
            None if Instant::now() < end => std::thread::sleep(Duration::from_millis(10)),
            found => return found,
        }
    }
}

/// Writes the configuration and lets it take effect where it is new; tells which program holds it. Where the link has
/// `moved` to another MAC its former address is given up and a new one asked for.
///
/// # Errors
/// When it cannot be written or the program refuses it.
pub fn apply(
    guest: &Guest,
    netplan: &str,
    moved: bool,
    address: Option<Ipv4Addr>,
    timeout: Option<u32>,
    warnings: &mut Vec<String>,
) -> Result<&'static str> {
    let has_netplan = guest.path("/usr/sbin/netplan").exists() || guest.path("/usr/bin/netplan").exists();
    let (program, changed) = match has_netplan {
        // It may hold secrets in other setups, and netplan complains of a mode that lets others read.
        true => ("netplan", guest.write(NETPLAN, netplan.as_bytes(), 0o600)?),
        false => ("networkd", guest.write(NETWORKD, NETWORK.as_bytes(), 0o644)?),
    };
    if !guest.is_real() {
        return Ok(program);
    }
    if changed {
        match has_netplan {
            true => run("netplan", &["apply"])?,
            false => {
                run("systemctl", &["enable", "--now", "systemd-networkd.service"])?;
                run("networkctl", &["reload"])?;
            }
        }
    }
    if moved {
        let link = first_link(LINKS).context("the guest has no Ethernet link")?;
        run("networkctl", &["reconfigure", &link])?;
    }
    let timeout = timeout.unwrap_or(ADDRESS_TIMEOUT);
    if timeout > 0 {
        warn(warnings, wait_for_address(address, timeout));
    }
    Ok(program)
}

/// The same for systemd-networkd alone (systemd.network(5)).
const NETWORK: &str = "[Match]
Driver=virtio_net

[Network]
DHCP=ipv4
LinkLocalAddressing=ipv6
IPv6LinkLocalAddressGenerationMode=eui64
IPv6AcceptRA=yes
IPv6PrivacyExtensions=no

[DHCPv4]
ClientIdentifier=mac
UseDomains=yes
";

/// Waits for the address, and for the first route, which comes with it.
fn wait_for_address(wanted: Option<Ipv4Addr>, seconds: u32) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(seconds.into());
    let has = |wanted: Ipv4Addr| first_link(LINKS).and_then(|link| address_of(&link)) == Some(wanted);
    while !wanted.is_none_or(has) || !has_route(&fs::read_to_string("/proc/net/route").unwrap_or_default()) {
        if Instant::now() >= end {
            let which = wanted.map_or("no address".to_string(), |wanted| format!("no address {wanted}"));
            bail!("the guest got {which} within {seconds} s");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Whether there is a default route: a line whose destination is zero, after the heading (proc_net(5)).
fn has_route(table: &str) -> bool {
    table.lines().skip(1).any(|line| line.split_whitespace().nth(1) == Some("00000000"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_route_tells_that_there_is_an_address() {
        let heading = "Iface\tDestination\tGateway\tFlags\n";
        assert!(!has_route(""));
        assert!(!has_route(&format!("{heading}ens8\t0000000A\t00000000\t0001\n")));
        assert!(has_route(&format!("{heading}ens8\t00000000\t0100000A\t0003\n")));
    }

    #[test]
    fn the_first_device_is_chosen_and_no_bridge() {
        let dir = tempfile::tempdir().unwrap();
        for (name, kind, index, device) in
            [("lo", "772", "1", false), ("br0", "1", "2", false), ("ens9", "1", "4", true), ("ens8", "1", "3", true)]
        {
            let link = dir.path().join(name);
            fs::create_dir_all(if device { link.join("device") } else { link.clone() }).unwrap();
            fs::write(link.join("type"), format!("{kind}\n")).unwrap();
            fs::write(link.join("ifindex"), format!("{index}\n")).unwrap();
        }
        assert_eq!(first_link(dir.path().to_str().unwrap()), Some("ens8".into()));
    }

    #[test]
    fn a_link_that_comes_later_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        assert_eq!(wait_for_link(path, Duration::from_millis(20)), None);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                let link = dir.path().join("ens3");
                fs::create_dir_all(link.join("device")).unwrap();
                fs::write(link.join("ifindex"), "2\n").unwrap();
                fs::write(link.join("type"), "1\n").unwrap();
            });
            assert_eq!(wait_for_link(path, Duration::from_secs(10)), Some("ens3".into()));
        });
    }

    #[test]
    fn the_kernels_structure_has_its_size() {
        assert_eq!(size_of::<HardwareRequest>(), 40);
    }
}
