//! Whether the network still is what puterd made it, and putting right what is not: others flush nftables, take
//! addresses away or turn settings off.

use std::fmt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};

use super::bridge;
use super::network::{Network, guests, install, policy};
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
    /// The bridge: down, or without its address.
    Bridge,
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
            Part::Bridge => "the bridge was down or without its address: put right",
            Part::Taps => "TAPs were off the bridge, down or no longer isolated: put right",
            Part::Forwarding => "IPv4 forwarding was off: turned on",
            Part::Forwarding6 => "the host has a way out by IPv6 and did not forward: turned IPv6 forwarding on",
        }
    }
}

/// All of them, the filter before what it filters.
const PARTS: [Part; 6] = [Part::Filter, Part::Passage, Part::Bridge, Part::Taps, Part::Forwarding, Part::Forwarding6];

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
    /// The part's fault, with the socket locked.
    fn is_wrong(&self, socket: &mut Socket, part: Part) -> Result<bool> {
        let links = |socket: &mut Socket| link::list(socket).context("cannot list the interfaces");
        match part {
            Part::Filter => {
                let guests = guests(&self.place, &links(socket)?);
                Ok(!nft::is_whole(&policy(&self.settings, &self.place), &guests).context("cannot read nftables")?)
            }
            Part::Passage => {
                let all = nft::firewalls(&self.settings.bridge, self.place.network6.is_some())
                    .context("cannot read nftables")?;
                Ok(all.iter().any(|firewall| firewall.is_shared() && !firewall.admits))
            }
            Part::Bridge => {
                let links = links(socket)?;
                // One that is gone is not this one's to bring back: DHCP and DNS were on it.
                let Some(link) = links.iter().find(|link| link.index == self.place.bridge) else { return Ok(false) };
                let addresses = address::list(socket).context("cannot list the addresses")?;
                Ok(!link.up || !addresses.contains(&self.address()) || self.lacks_ipv6(socket)?)
            }
            Part::Taps => Ok(links(socket)?.iter().any(|link| self.is_astray(link))),
            Part::Forwarding => Ok(!sysctl::forwarding()?),
            Part::Forwarding6 => self.must_forward6(socket),
        }
    }

    fn address(&self) -> Address {
        let subnet = self.settings.subnet;
        Address { index: self.place.bridge, address: subnet.gateway(), prefix: subnet.prefix() }
    }

    /// Whether a TAP of this bridge is not as its alias says.
    fn is_astray(&self, link: &Link) -> bool {
        let Some(alias) = self.place.marked(link) else { return false };
        link.master != Some(self.place.bridge) || !link.up || link.isolated != alias.isolated
    }

    fn put_right(&self, socket: &mut Socket, part: Part) -> Result<()> {
        let bridge = &self.settings.bridge;
        match part {
            Part::Filter => {
                let links = link::list(socket).context("cannot list the interfaces")?;
                let guests = guests(&self.place, &links);
                nft::guard(bridge, &guests).context("cannot filter the TAPs in nftables")?;
                install(&policy(&self.settings, &self.place), &guests)
            }
            Part::Passage => {
                let all = nft::firewalls(bridge, self.place.network6.is_some()).context("cannot read nftables")?;
                let closed = all.iter().filter(|firewall| firewall.is_shared() && !firewall.admits);
                for firewall in closed {
                    nft::admit(bridge, firewall).with_context(|| {
                        format!("cannot add rules to {} {} {}", firewall.family, firewall.table, firewall.chain)
                    })?;
                }
                Ok(())
            }
            Part::Bridge => {
                link::set_up(socket, self.place.bridge).with_context(|| format!("cannot set {bridge} up"))?;
                match address::add(socket, self.address()) {
                    Err(error) if error.errno == rustix::io::Errno::EXIST => {}
                    other => {
                        other.with_context(|| format!("cannot give {bridge} the address {}", self.settings.subnet))?;
                    }
                }
                self.bring_up6(socket)
            }
            Part::Taps => {
                for link in link::list(socket).context("cannot list the interfaces")? {
                    if let Some(alias) = self.place.marked(&link).filter(|_| self.is_astray(&link)) {
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

    /// Firewalls of others, as the API shows them.
    pub(super) fn firewalls(&self) -> Result<Vec<Firewall>> {
        let all =
            nft::firewalls(&self.settings.bridge, self.place.network6.is_some()).context("cannot read nftables")?;
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
        let (bridge, own) = (&self.settings.bridge, self.place.bridge);
        if !links.iter().any(|link| link.index == own) {
            problems.push(format!("the bridge {bridge} was removed: start puterd again"));
        }
        let addresses = address::list(&mut socket).context("cannot list the addresses")?;
        let routes = route::list(&mut socket).context("cannot list the routes")?;
        problems.extend(bridge::overlap(self.settings.subnet, own, &links, &addresses, &routes));
        problems.extend(self.overlap6(&mut socket, &links)?);
        Ok(problems)
    }
}

impl Kept for Network {
    fn examine(&self) -> Result<Vec<Part>> {
        let mut socket = self.lock();
        if self.closing.load(Ordering::SeqCst) {
            return Ok(Vec::new());
        }
        if let Err(error) = self.sweep(&mut socket) {
            log!("{error:#}");
        }
        let mut wrong = Vec::new();
        for part in PARTS {
            if self.is_wrong(&mut socket, part)? {
                wrong.push(part);
            }
        }
        Ok(wrong)
    }

    fn mend(&self, part: Part) -> Result<bool> {
        let mut socket = self.lock();
        if self.closing.load(Ordering::SeqCst) || !self.is_wrong(&mut socket, part)? {
            return Ok(false);
        }
        self.put_right(&mut socket, part).map(|()| true)
    }

    fn complain(&self, troubles: Vec<String>) {
        *self.troubles.lock().unwrap_or_else(PoisonError::into_inner) = troubles;
    }
}
