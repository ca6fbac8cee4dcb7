//! Which VM has which number: what DHCP and DNS answer from.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::PoisonError;

use super::network::Network;
use super::taps::Alias;
use crate::dhcp::{Directory, Host};
use crate::dns::Names;
use crate::protocol::address::{Mac, Subnet};
use crate::protocol::daemon::Membership;
use crate::protocol::ipv6::Network6;

/// The VMs that have a TAP.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) vms: BTreeMap<u32, Alias>,
    pub(super) ids: HashMap<String, u32>,
    /// The VM of each place in a cluster.
    members: BTreeMap<Membership, String>,
}

impl Known {
    pub(super) fn new(all: impl Iterator<Item = Alias>) -> Known {
        let mut known = Known::default();
        all.for_each(|alias| known.add(alias));
        known
    }

    pub(super) fn add(&mut self, alias: Alias) {
        self.remove(&alias.vm);
        if let Some(former) = self.vms.get(&alias.id).map(|former| former.vm.clone()) {
            self.remove(&former);
        }
        if let Some(member) = alias.member.clone() {
            self.members.insert(member, alias.vm.clone());
        }
        self.ids.insert(alias.vm.clone(), alias.id);
        self.vms.insert(alias.id, alias);
    }

    pub(super) fn remove(&mut self, vm: &str) {
        let member = self.ids.remove(vm).and_then(|id| self.vms.remove(&id)).and_then(|alias| alias.member);
        if let Some(member) = member.filter(|member| self.members.get(member).is_some_and(|of| of == vm)) {
            self.members.remove(&member);
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

    fn cluster(&self, address: IpAddr) -> Option<String> {
        let IpAddr::V4(address) = address else { return None };
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let alias = known.vms.get(&self.settings.subnet.id(address)?)?;
        Some(alias.member.as_ref()?.cluster.clone())
    }

    fn member(&self, cluster: &str, member: &str) -> Option<String> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.members.get(&Membership { cluster: cluster.to_owned(), member: member.to_owned() }).cloned()
    }

    fn has_cluster(&self, cluster: &str) -> bool {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let first = Membership { cluster: cluster.to_owned(), member: String::new() };
        known.members.range(first..).next().is_some_and(|(place, _)| place.cluster == cluster)
    }

    fn subnet(&self) -> Subnet {
        self.settings.subnet
    }

    fn network6(&self) -> Option<Network6> {
        self.network6
    }
}
