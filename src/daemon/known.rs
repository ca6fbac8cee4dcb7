//! Which VM has which number: what DHCP and DNS answer from.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::PoisonError;

use super::network::Network;
use super::taps::Alias;
use crate::dhcp::{Directory, Host};
use crate::dns::Names;
use crate::protocol::address::{Mac, Subnet};
use crate::protocol::ipv6::Network6;

/// The VMs that have a TAP.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) vms: BTreeMap<u32, Alias>,
    pub(super) ids: HashMap<String, u32>,
}

impl Known {
    pub(super) fn new(all: impl Iterator<Item = Alias>) -> Known {
        let mut known = Known::default();
        all.for_each(|alias| known.add(alias));
        known
    }

    pub(super) fn add(&mut self, alias: Alias) {
        if let Some(former) = self.ids.insert(alias.vm.clone(), alias.id) {
            self.vms.remove(&former);
        }
        if let Some(former) = self.vms.insert(alias.id, alias) {
            self.ids.remove(&former.vm);
        }
    }

    pub(super) fn remove(&mut self, vm: &str) {
        if let Some(id) = self.ids.remove(vm) {
            self.vms.remove(&id);
        }
    }
}

impl Directory for Network {
    /// The VM and the address that a guest's MAC stands for, from what was last seen of the interfaces; `None` for a
    /// MAC whose VM has no TAP.
    fn host(&self, mac: Mac) -> Option<Host> {
        let id = mac.id()?;
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        Some(Host { vm: known.vms.get(&id)?.vm.clone(), ip: self.settings.subnet.address(id)? })
    }
}

impl Names for Network {
    fn address(&self, vm: &str) -> Option<Ipv4Addr> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        self.settings.subnet.address(*known.ids.get(vm)?)
    }

    fn address6(&self, vm: &str) -> Option<Ipv6Addr> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        Some(self.network6?.address(Mac::of_id(*known.ids.get(vm)?)))
    }

    fn name(&self, address: IpAddr) -> Option<String> {
        let id = match address {
            IpAddr::V4(address) => self.settings.subnet.id(address)?,
            IpAddr::V6(address) => self.network6?.id(address)?,
        };
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.vms.get(&id).map(|alias| alias.vm.clone())
    }

    fn subnet(&self) -> Subnet {
        self.settings.subnet
    }

    fn network6(&self) -> Option<Network6> {
        self.network6
    }
}
