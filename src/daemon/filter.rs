//! The network's rules in nftables, as puterd gives them to the kernel and looks whether they are there.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};

use super::branch;
use super::network::Network;
use super::taps::{Alias, Place};
use crate::net::link::{self, Link};
use crate::net::nft::{self, Chain, Guest, Isolation, Joint, Policy};
use crate::net::{Error, Socket};
use crate::protocol::address::{Mac, TAP_PREFIX};

/// What the guest of a TAP may call itself.
pub(super) fn guest_of(place: &Place, tap: &str, alias: &Alias) -> Option<Guest> {
    let (address, mac) = (place.subnet.address(alias.id)?, Mac::of_id(alias.id));
    let address6 = place.network6.map(|network| network.address(mac));
    let isolated = alias.isolated.then(|| match &alias.member {
        Some(member) => Isolation::WithCluster(member.cluster.clone()),
        None => Isolation::Alone,
    });
    Some(Guest { tap: tap.to_owned(), mac, address, address6, isolated })
}

/// The guests of all TAPs that carry puterd's mark. One that is about to go keeps its filter until it has gone: its user
/// may still open it.
pub(super) fn guests(place: &Place, links: &[Link]) -> Vec<Guest> {
    links.iter().filter_map(|link| guest_of(place, &link.name, &place.of(link)?)).collect()
}

impl Network {
    /// The rules that hold for all guests of these bridges.
    pub(super) fn policy(&self, links: &[Link]) -> Policy {
        Policy {
            bridge: self.settings.bridge.clone(),
            joints: self.joints(links),
            subnet: self.settings.subnet,
            network6: self.network6,
            host_ports: self.settings.host_ports.clone(),
        }
    }

    /// How the further bridges that there are are joined to the first.
    pub(super) fn joints(&self, links: &[Link]) -> Vec<Joint> {
        let found = branch::find(&self.settings, links).into_iter().filter(|(_, branch)| branch.bridge.is_some());
        found.map(|(number, _)| branch::names(&self.settings.bridge, number)).collect()
    }

    /// Puts the bridges' nftables tables in place, and who is isolated.
    pub(super) fn install(&self, policy: &Policy, guests: &[Guest]) -> Result<()> {
        let failed = || format!("cannot install the nftables table {}", nft::table_name(&policy.bridge));
        nft::install(policy, guests).with_context(failed)?;
        nft::separate(policy, guests).with_context(failed)
    }

    /// Gives the TAPs and further bridges their filters where they are not as they must be: what is right is not touched,
    /// so that thousands take no longer than it takes to look at them.
    pub(super) fn guard(&self, policy: &Policy, guests: &[Guest]) -> Result<()> {
        let gaps = nft::unguarded(policy, guests).context("cannot read nftables")?;
        nft::guard(&policy.bridge, &gaps.guests).context("cannot filter the TAPs in nftables")?;
        nft::unguard(&gaps.strays).context("cannot remove the filters of TAPs that are gone")?;
        for joint in &gaps.joints {
            nft::seal(&policy.bridge, joint)
                .with_context(|| format!("cannot close {} to the host in nftables", joint.bridge))?;
        }
        Ok(())
    }

    /// Filters a VM's TAP that was made just now.
    pub(super) fn guard_new(&self, vm: &str, guest: &Guest) -> Result<(), Error> {
        // Where it had another id before, a chain may be left in another table.
        let table = nft::chain_of(&self.settings.bridge, guest).table;
        let is_former = |chain: &Chain| chain.name == guest.tap && chain.table != table;
        let mut former: Vec<Chain> = self.unguarded().extract_if(.., |chain| is_former(chain)).collect();
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let removed = known.ids.get(vm).map(|id| Guest { mac: Mac::of_id(*id), ..guest.clone() });
        drop(known);
        former.extend(removed.map(|removed| nft::chain_of(&self.settings.bridge, &removed)).filter(is_former));
        if !former.is_empty() {
            nft::unguard(&former)?;
        }
        self.change(1, || nft::guard_new(&self.settings.bridge, guest))?;
        if guest.tap != format!("{TAP_PREFIX}{vm}") {
            // Another VM may have had this shortened name: so all is looked at.
            *self.sound.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        Ok(())
    }

    /// Removes the filters of TAPs that are gone; one of a name that there is again was replaced.
    pub(super) fn sweep(&self) -> Result<()> {
        if self.unguarded().is_empty() {
            return Ok(());
        }
        let mut socket = self.lock();
        if self.closing.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut chains = std::mem::take(&mut *self.unguarded());
        let mut found = Ok(());
        chains.retain(|chain| match link::find(&mut socket, &chain.name) {
            Ok(link) => link.is_none(),
            Err(error) => {
                found = Err(error);
                false
            }
        });
        found.context("cannot look for interfaces")?;
        let swept = self.change(nft::batches_to_unguard(&chains), || nft::unguard(&chains));
        swept.context("cannot remove the filters of TAPs that are gone")
    }

    /// Begins or ends a guest's isolation in nftables; `before` is what it was, where there was one.
    pub(super) fn isolate(&self, socket: &mut Socket, before: Option<&Guest>, guest: &Guest) -> Result<()> {
        match nft::isolate(&self.settings.bridge, before, guest) {
            // The table was of no use as long as nobody was isolated, or others have been at it.
            Err(error) if error.errno == rustix::io::Errno::NOENT => {
                let links = link::list(socket).context("cannot list the interfaces")?;
                let mut all = guests(&self.place(), &links);
                all.retain(|other| other.tap != guest.tap);
                all.push(guest.clone());
                self.install(&self.policy(&links), &all)
            }
            other => Ok(other?),
        }
    }

    /// Whether nftables is still as it was when all of it was found right: then it need not be read again, which takes
    /// the longer the more TAPs there are.
    pub(super) fn is_sound(&self) -> bool {
        let sound = *self.sound.lock().unwrap_or_else(PoisonError::into_inner);
        sound.is_some() && nft::generation().ok() == sound
    }

    /// Whether the filters are all as they must be.
    pub(super) fn is_filtered(&self, links: &[Link]) -> Result<bool> {
        let before = nft::generation().context("cannot read nftables")?;
        let whole =
            nft::is_whole(&self.policy(links), &guests(&self.place(), links)).context("cannot read nftables")?;
        if whole && nft::generation().is_ok_and(|now| now == before) {
            *self.sound.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        }
        Ok(whole)
    }

    /// Makes a change of this many batches. Where all was right before, and nobody else changed anything meanwhile, it
    /// still is.
    fn change(&self, batches: u32, work: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        let mut sound = self.sound.lock().unwrap_or_else(PoisonError::into_inner);
        let before = sound.take().filter(|sound| nft::generation().is_ok_and(|now| now == *sound));
        work()?;
        let after = before.map(|before| before.wrapping_add(batches));
        *sound = after.filter(|after| nft::generation().is_ok_and(|now| now == *after));
        Ok(())
    }
}
