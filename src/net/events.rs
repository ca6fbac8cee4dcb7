//! Notifications: the kernel tells of changes as they happen, whoever makes them.

use neli::consts::socket::{Msg, NlFamily};
use neli::socket::NlSocket;
use neli::utils::Groups;
use rustix::io::Errno;

use super::Error;

/// Interfaces, addresses, settings such as forwarding, and IPv6 routes, by which the host's way to the outside comes and
/// goes (RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE,
/// RTNLGRP_IPV6_NETCONF).
const NETWORK: [u32; 6] = [1, 5, 24, 9, 11, 25];
/// nftables (NFNLGRP_NFTABLES).
const NFTABLES: [u32; 1] = [7];

/// A socket that hears of changes.
pub struct Events(NlSocket);

impl Events {
    /// Changes to interfaces, addresses, forwarding and IPv6 routes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn network() -> Result<Events, Error> {
        Events::open(NlFamily::Route, &NETWORK)
    }

    /// Changes to nftables, which only holders of CAP_NET_ADMIN hear of.
    ///
    /// # Errors
    /// The kernel's.
    pub fn nftables() -> Result<Events, Error> {
        Events::open(NlFamily::Netfilter, &NFTABLES)
    }

    fn open(family: NlFamily, groups: &[u32]) -> Result<Events, Error> {
        let socket = NlSocket::connect(family, None, Groups::empty())?;
        for group in groups {
            socket.add_mcast_membership(Groups::new_groups(&[*group]))?;
        }
        Ok(Events(socket))
    }

    /// Waits until something has changed, or may have: more at once than the socket holds is a change too.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait(&self) -> Result<(), Error> {
        // What exactly it is does not matter, so a message may be cut short.
        let mut buffer = [0; 64];
        loop {
            match self.0.recv(&mut buffer[..], Msg::empty()).map_err(Error::from) {
                Ok(_) => return Ok(()),
                Err(error) if error.errno == Errno::NOBUFS => return Ok(()),
                Err(error) if error.errno == Errno::INTR => {}
                Err(error) => return Err(error),
            }
        }
    }
}
