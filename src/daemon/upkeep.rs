//! Whether the network still is what puterd made it, and putting right what is not: others flush nftables, take
//! addresses away or turn settings off.

use std::fmt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, anyhow};

use super::bridge;
use super::filter::guests;
use super::network::{Network, bring_up};
use super::taps::Place;
use crate::net::address::{self, Address};
use crate::net::link::{self, Link};
use crate::net::{Socket, nft, route, sysctl};
use crate::protocol::daemon::Firewall;

/// What can be found wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// puter's own nftables tables.
    Filter,
    /// puter's rules in iptables' table.
    Passage,
    /// The bridge: gone, down, or without its address.
    Bridge,
    /// Further bridges: down, gone, or not joined to the first.
    Branches,
    /// TAPs off the bridge, down, or no longer isolated.
    Taps,
    Forwarding,
    /// The same for IPv6.
    Forwarding6,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Filter => "puter's nftables rules",
            Part::Passage => "puter's rules in iptables' table, without which it drops VMs' packets,",
            Part::Bridge => "the bridge's state or address",
            Part::Branches => "further bridges",
            Part::Taps => "TAPs of VMs",
            Part::Forwarding => "IPv4 forwarding",
            Part::Forwarding6 => "IPv6 forwarding",
        })
    }
}

impl Part {
    /// What was done, once it is mended.
    pub fn mended(self) -> &'static str {
        match self {
            Part::Filter => "puter's nftables rules were changed or flushed: put back",
            Part::Passage => "iptables' table drops what it does not know: added rules that let VMs pass",
            Part::Bridge => "the bridge was gone, down or without its address: put right",
            Part::Branches => "a further bridge was gone, down or not joined to the first: put right",
            Part::Taps => "TAPs were off the bridge, down or no longer isolated: put right",
            Part::Forwarding => "IPv4 forwarding was off: turned on",
            Part::Forwarding6 => "the host has a way out by IPv6 and did not forward: turned IPv6 forwarding on",
        }
    }
}

/// All of them, the filter before what it filters.
const PARTS: [Part; 7] =
    [Part::Filter, Part::Passage, Part::Bridge, Part::Branches, Part::Taps, Part::Forwarding, Part::Forwarding6];

/// The network, as far as the watch looks after it.
pub trait Kept {
    /// What is not as it must be. Once puterd is about to remove everything, nothing is wrong any more.
    ///
    /// # Errors
    /// When it cannot be looked at.
    fn examine(&self) -> Result<Vec<Part>>;
    /// Puts it right; true where there was something to do.
    ///
    /// # Errors
    /// The kernel's refusal.
    fn mend(&self, part: Part) -> Result<bool>;
    /// Keeps what cannot be mended, for who asks for the status.
    fn complain(&self, troubles: Vec<String>);
}

impl Network {
    /// The part's fault, as these interfaces show it.
    fn is_wrong(&self, socket: &mut Socket, links: &[Link], part: Part) -> Result<bool> {
        match part {
            Part::Filter => Ok(!self.is_sound() && !self.is_filtered(links)?),
            Part::Passage => {
                let all = nft::firewalls(&self.settings.bridge, &self.joints(links), self.network6.is_some())
                    .context("cannot read nftables")?;
                Ok(all.iter().any(|firewall| firewall.is_shared() && !firewall.admits))
            }
            Part::Bridge => {
                let own = self.bridge();
                let Some(link) = links.iter().find(|link| link.index == own) else { return Ok(true) };
                let addresses = address::list(socket).context("cannot list the addresses")?;
                Ok(!link.up || !addresses.contains(&self.address()) || self.lacks_ipv6(socket)?)
            }
            Part::Branches => Ok(self.is_torn(links)),
            Part::Taps => {
                let place = self.place();
                Ok(links.iter().any(|link| is_astray(&place, link)))
            }
            Part::Forwarding => Ok(!sysctl::forwarding()?),
            Part::Forwarding6 => self.must_forward6(socket),
        }
    }

    fn address(&self) -> Address {
        let subnet = self.settings.subnet;
        Address { index: self.bridge(), address: subnet.gateway(), prefix: subnet.prefix() }
    }

    fn put_right(&self, socket: &mut Socket, links: Vec<Link>, part: Part) -> Result<()> {
        let bridge = &self.settings.bridge;
        match part {
            Part::Filter => {
                let (policy, guests) = (self.policy(&links), guests(&self.place(), &links));
                self.guard(&policy, &guests)?;
                self.install(&policy, &guests)
            }
            Part::Passage => {
                let joints = self.joints(&links);
                let all = nft::firewalls(bridge, &joints, self.network6.is_some()).context("cannot read nftables")?;
                let closed = all.iter().filter(|firewall| firewall.is_shared() && !firewall.admits);
                for firewall in closed {
                    nft::admit(bridge, &joints, firewall).with_context(|| {
                        format!("cannot add rules to {} {} {}", firewall.family, firewall.table, firewall.chain)
                    })?;
                }
                Ok(())
            }
            Part::Bridge if links.iter().all(|link| link.index != self.bridge()) => self.remake(socket, &links),
            Part::Bridge => {
                link::set_up(socket, self.bridge()).with_context(|| format!("cannot set {bridge} up"))?;
                match address::add(socket, self.address()) {
                    Err(error) if error.errno == rustix::io::Errno::EXIST => {}
                    other => {
                        other.with_context(|| format!("cannot give {bridge} the address {}", self.settings.subnet))?;
                    }
                }
                self.bring_up6(socket)
            }
            Part::Branches => self.complete_all(socket),
            Part::Taps => {
                let place = self.place();
                for link in links {
                    if let Some(alias) = place.marked(&link).filter(|_| is_astray(&place, &link)) {
                        self.finish(socket, &link, &alias)
                            .with_context(|| format!("cannot put {} on {bridge}", link.name))?;
                    }
                }
                Ok(())
            }
            Part::Forwarding => Ok(sysctl::enable_forwarding().map(drop)?),
            Part::Forwarding6 => self.forward6(),
        }
    }

    /// Makes the first bridge again, which somebody removed. What was on it comes back by itself: further bridges and TAPs
    /// as ports that went astray, and servers start anew.
    fn remake(&self, socket: &mut Socket, links: &[Link]) -> Result<()> {
        let plan = match links.iter().find(|link| link.name == self.settings.bridge) {
            // As far as the last attempt came, or somebody else's.
            Some(link) => {
                bridge::own(&self.settings, link, true).map_err(|error| anyhow!(error))?;
                bridge::Plan::Adopt { index: link.index, outdated: Vec::new() }
            }
            None => bridge::Plan::Create,
        };
        let addresses = address::list(socket).context("cannot list the addresses")?;
        let index = bring_up(socket, &self.settings, plan, &addresses)?;
        self.place_mut().bridges.renew_first(index);
        self.bring_up6(socket)?;
        self.end.renew();
        Ok(())
    }

    /// Firewalls of others, as the API shows them.
    pub(super) fn firewalls(&self) -> Result<Vec<Firewall>> {
        let links = link::list(&mut self.lock()).context("cannot list the interfaces")?;
        let all = nft::firewalls(&self.settings.bridge, &self.joints(&links), self.network6.is_some())
            .context("cannot read nftables")?;
        let show = |firewall: nft::Firewall| Firewall {
            passes: firewall.admits || firewall.knows_bridge,
            by_puterd: firewall.admits,
            by_policy: firewall.by_policy(),
            family: firewall.family.to_owned(),
            table: firewall.table,
            chain: firewall.chain,
            hook: match firewall.place {
                nft::Place::Input => "input".to_owned(),
                nft::Place::Forward => "forward".to_owned(),
            },
        };
        Ok(all.into_iter().map(show).collect())
    }

    /// What is wrong now and puterd cannot mend.
    pub(super) fn problems(&self) -> Result<Vec<String>> {
        let mut socket = self.lock();
        let mut problems = self.troubles.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let links = link::list(&mut socket).context("cannot list the interfaces")?;
        let (bridge, own) = (&self.settings.bridge, self.bridge());
        if !links.iter().any(|link| link.index == own) {
            problems
                .push(format!("the bridge {bridge} was removed, and puterd cannot make it again: start puterd again"));
        }
        let addresses = address::list(&mut socket).context("cannot list the addresses")?;
        let routes = route::list(&mut socket).context("cannot list the routes")?;
        problems.extend(bridge::overlap(self.settings.subnet, own, &links, &addresses, &routes));
        problems.extend(self.overlap6(&mut socket, &links)?);
        Ok(problems)
    }
}

/// Whether a TAP of these bridges is not as its alias says.
fn is_astray(place: &Place, link: &Link) -> bool {
    let Some(alias) = place.marked(link) else { return false };
    !place.bridges.holds(link.master) || !link.up || link.isolated != alias.is_alone()
}

impl Kept for Network {
    /// Looks without a lock on the network, so that no request waits for it; what is seen amid a change is looked at again
    /// before it is mended.
    fn examine(&self) -> Result<Vec<Part>> {
        if self.closing.load(Ordering::SeqCst) {
            return Ok(Vec::new());
        }
        if let Err(error) = self.sweep() {
            log!("{error:#}");
        }
        let mut socket = Socket::route().context("cannot open a netlink socket")?;
        let links = link::list(&mut socket).context("cannot list the interfaces")?;
        let mut wrong = Vec::new();
        for part in PARTS {
            if self.is_wrong(&mut socket, &links, part)? {
                wrong.push(part);
            }
        }
        Ok(wrong)
    }

    fn mend(&self, part: Part) -> Result<bool> {
        let mut socket = self.lock();
        if self.closing.load(Ordering::SeqCst) {
            return Ok(false);
        }
        let links = link::list(&mut socket).context("cannot list the interfaces")?;
        if !self.is_wrong(&mut socket, &links, part)? {
            return Ok(false);
        }
        self.put_right(&mut socket, links, part).map(|()| true)
    }

    fn complain(&self, troubles: Vec<String>) {
        *self.troubles.lock().unwrap_or_else(PoisonError::into_inner) = troubles;
    }
}
