//! What else on this host filters VMs' packets, and what puterd says is wrong.

use std::path::Path;

use super::{Check, advice, missing, ok, quoted};
use crate::protocol::daemon::{Firewall, Status};
use crate::protocol::ipv6::Ipv6;
use crate::protocol::neighbours::{self, Limits};
use crate::protocol::ports::show_list;
use crate::vm::settings::Settings;

/// What there is of others' firewalls besides what puterd sees of them.
#[derive(Clone, Copy, Debug, Default)]
struct Signs {
    docker: bool,
    firewalld: bool,
    ufw: bool,
}

impl Signs {
    fn here() -> Signs {
        let ufw = std::fs::read_to_string("/etc/ufw/ufw.conf").unwrap_or_default();
        Signs {
            docker: Path::new("/sys/class/net/docker0").exists(),
            firewalld: Path::new("/run/firewalld").exists(),
            ufw: ufw.lines().any(|line| line.trim() == "ENABLED=yes"),
        }
    }
}

const DOCKER: &str =
    "sudo iptables -I DOCKER-USER -i puter0 -j ACCEPT && sudo iptables -I DOCKER-USER -o puter0 -j ACCEPT";
const FIREWALLD: &str =
    "sudo firewall-cmd --permanent --zone=trusted --add-interface=puter0 && sudo firewall-cmd --reload";
const UFW: &str = "sudo ufw allow in on puter0 && sudo ufw route allow in on puter0";

/// All checks of the network besides puterd itself.
pub fn checks(status: Option<&Status>, settings: &Settings) -> Vec<Check> {
    let signs = Signs::here();
    let Some(status) = status else { return without_puterd(signs) };
    let mut checks = by_status(status, signs);
    checks.extend(["ipv4", "ipv6"].iter().filter_map(|family| {
        let vms = if *family == "ipv6" && status.ipv6.is_none() { 0 } else { status.taps };
        neighbours(family, neighbours::limits(family)?, vms)
    }));
    let routes = std::fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    let disabled = std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6");
    checks.extend(ipv6(status, settings.ipv6, &routes, disabled.is_ok_and(|text| text.trim() == "1")));
    if status.host_ports != settings.host_ports {
        let (open, wanted) = (show_list(&status.host_ports), show_list(&settings.host_ports));
        let found =
            format!("puterd opens the ports '{open}' of the host to VMs, the setting host_ports says '{wanted}'");
        checks.push(advice("host_ports", found, "puter daemon stop && puter daemon start").by_command());
    }
    checks
}

/// puterd sees all of nftables.
fn by_status(status: &Status, signs: Signs) -> Vec<Check> {
    let further = status.further.iter().map(|bridge| bridge.name.as_str());
    let bridges: Vec<&str> = [status.bridge.as_str()].into_iter().chain(further).collect();
    let mut checks: Vec<Check> = status.firewalls.iter().map(|firewall| chain(firewall, &bridges)).collect();
    let sees = |table: &str| status.firewalls.iter().any(|firewall| firewall.table == table);
    // What filters packets in the old way is seen by root alone, and no rule of nftables lets them pass there.
    let legacy = "its rules are not in nftables, so puterd neither sees them nor adds to them";
    let of_bridge = |mend: &str| mend.replace("puter0", &status.bridge);
    if signs.docker && !sees("filter") && !sees("docker-bridges") {
        let found = format!(
            "docker is here; {legacy} (old iptables), or it drops nothing: VMs that do not reach the internet need \
             the command below"
        );
        checks.push(advice("docker", found, of_bridge(DOCKER)).by_command());
    }
    if signs.ufw && !sees("filter") {
        let found = format!("ufw is on; {legacy} (old iptables): VMs may get no address and not reach the internet");
        checks.push(advice("ufw", found, of_bridge(UFW)).by_command());
    }
    let mend = "see the message, and `puter daemon logs`";
    checks.extend(status.problems.iter().map(|problem| match problem.contains("was removed") {
        true => missing("network", problem, "puter daemon stop && puter daemon start").by_command(),
        false => advice("network", problem, mend),
    }));
    checks
}

/// Whether the kernel may know as many neighbours as there are VMs. puterd sees to it where the system lets it.
fn neighbours(family: &str, now: Limits, vms: usize) -> Option<Check> {
    let needed = neighbours::needed(now, neighbours::of_vms(family, vms))?;
    let found = format!(
        "the kernel knows at most {} {family} neighbours and there are {vms} VMs: it drops packets between them and the \
         host or the outside",
        now[2]
    );
    let set = |at: usize| format!("net.{family}.neigh.default.gc_thresh{}={}", at + 1, needed[at]);
    Some(advice("neighbours", found, format!("sudo sysctl -w {} {} {}", set(2), set(1), set(0))).by_command())
}

/// Whether a line of the kernel's list of IPv6 routes is one to anywhere, by an interface that leads away.
fn leads_out(line: &str) -> bool {
    // The flag of a route that is there to refuse (RTF_REJECT, linux/route.h).
    const REJECT: u32 = 0x0200;
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [to, "00", _, _, _, _, _, _, flags, interface] = fields[..] else { return false };
    let passes = u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & REJECT == 0);
    to.bytes().all(|digit| digit == b'0') && passes && interface != "lo"
}

/// Why VMs have no IPv6 where the host reaches the outside by it.
fn ipv6(status: &Status, setting: Ipv6, routes: &str, disabled: bool) -> Option<Check> {
    const AGAIN: &str = "puter daemon stop && puter daemon start";
    if !routes.lines().any(leads_out) || status.ipv6_outside {
        return None;
    }
    if setting == Ipv6::Off && status.ipv6.is_none() {
        return Some(ok("ipv6", "the host has it, VMs have none: the setting ipv6 is off"));
    }
    let (why, mend) = match status.ipv6 {
        None if disabled => (
            "VMs have none: it is turned off for all interfaces but some (net.ipv6.conf.all.disable_ipv6)",
            format!("sudo sysctl -w net.ipv6.conf.all.disable_ipv6=0 && {AGAIN}"),
        ),
        None => {
            ("VMs have none: there was none, or the setting ipv6 was off, when puterd was started", AGAIN.to_owned())
        }
        Some(_) => ("VMs do not reach the outside by it: puterd sees no such route", AGAIN.to_owned()),
    };
    Some(advice("ipv6", format!("the host has a default route by IPv6, and {why}"), mend).by_command())
}

/// The command that gives bridges to firewalld's trusted zone.
fn firewalld(bridges: &[&str]) -> String {
    let all: Vec<String> = bridges.iter().map(|bridge| format!("--add-interface={}", quoted(bridge))).collect();
    FIREWALLD.replace("--add-interface=puter0", &all.join(" "))
}

/// One chain of somebody else, and what lets VMs pass it. Where the host shows bridged packets to its firewalls, those on
/// further bridges come with that bridge's name.
fn chain(firewall: &Firewall, bridges: &[&str]) -> Check {
    let Firewall { family, table, chain, .. } = firewall;
    let how = if firewall.by_policy { "by its policy" } else { "by its last rule" };
    let drops = format!("nftables' {family} {table} {chain} drops what it does not know ({how})");
    if firewall.passes {
        let by = if firewall.by_puterd { "puterd has added rules" } else { "it has rules for the bridge" };
        return ok("firewall", format!("{drops}; {by}, so VMs pass"));
    }
    let what = match firewall.hook.as_str() {
        "input" => "VMs may get no address and no names",
        _ => "VMs do not reach the internet",
    };
    let set = match bridges {
        [one] => (*one).to_owned(),
        all => format!("{{ {} }}", all.join(", ")),
    };
    let names = [table.as_str(), chain.as_str(), &set].map(quoted);
    let [table, chain, bridge] = &names;
    let is_firewalld = table == "firewalld";
    let mend = match firewall.hook.as_str() {
        _ if is_firewalld => firewalld(bridges),
        "input" => format!("sudo nft insert rule {family} {table} {chain} iifname {bridge} accept"),
        // A policy leaves room at the end, where the owner's own rules come first; a last rule does not.
        _ => {
            let verb = if firewall.by_policy { "add" } else { "insert" };
            let rule = |key: &str| format!("sudo nft {verb} rule {family} {table} {chain} {key} {bridge} accept");
            format!("{} && {}", rule("iifname"), rule("oifname"))
        }
    };
    let lasting = "the command holds until that firewall is loaded anew";
    let note = if is_firewalld { String::new() } else { format!("; {lasting}") };
    advice("firewall", format!("{drops}: {what}{note}"), mend).by_command()
}

/// Nobody who may look at the rules runs.
fn without_puterd(signs: Signs) -> Vec<Check> {
    let all = [
        (signs.docker, "docker", "docker is here; it may drop VMs' packets to the internet", DOCKER),
        (signs.firewalld, "firewalld", "firewalld is here; it drops what comes from interfaces in no zone", FIREWALLD),
        (signs.ufw, "ufw", "ufw is on; it drops DHCP from VMs unless told otherwise", UFW),
    ];
    let found = all.into_iter().filter(|(is_here, ..)| *is_here);
    found
        .map(|(_, name, what, mend)| {
            let found = format!("{what}; once puterd runs, it adds its rules where it can");
            advice(name, found, mend).by_command()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::address::Subnet;
    use crate::protocol::daemon::FurtherBridge;
    use crate::vm::doctor::State;

    fn firewall(family: &str, table: &str, chain: &str, hook: &str) -> Firewall {
        let word = str::to_owned;
        Firewall {
            family: word(family),
            table: word(table),
            chain: word(chain),
            hook: word(hook),
            passes: false,
            by_puterd: false,
            by_policy: true,
        }
    }

    fn status(firewalls: Vec<Firewall>, problems: &[&str]) -> Status {
        Status {
            version: "0".to_owned(),
            pid: 1,
            uid: 1,
            bridge: "puter0".to_owned(),
            ipv6: None,
            ipv6_outside: false,
            further: Vec::new(),
            subnet: Subnet::default(),
            taps: 0,
            uptime: 0,
            host_ports: Vec::new(),
            firewalls,
            problems: problems.iter().map(|problem| (*problem).to_owned()).collect(),
        }
    }

    #[test]
    fn each_chain_that_drops_is_named_with_the_command_that_mends_it() {
        let own = firewall("inet", "own", "forward", "forward");
        let last = Firewall { by_policy: false, ..own.clone() };
        let all =
            vec![own, last, firewall("inet", "own", "in put", "input"), firewall("inet", "firewalld", "x", "input")];
        let checks = by_status(&status(all, &[]), Signs::default());
        let mends: Vec<&str> = checks.iter().map(|check| check.mend.as_deref().unwrap()).collect();
        let rule = |verb: &str, key: &str| format!("sudo nft {verb} rule inet own forward {key} puter0 accept");
        let both = |verb: &str| format!("{} && {}", rule(verb, "iifname"), rule(verb, "oifname"));
        assert_eq!(mends[0], both("add"));
        assert_eq!(mends[1], both("insert"));
        assert_eq!(mends[2], "sudo nft insert rule inet own 'in put' iifname puter0 accept");
        assert_eq!(mends[3], FIREWALLD);
        let all = vec![firewall("inet", "own", "forward", "forward"), firewall("inet", "firewalld", "x", "forward")];
        let further = vec![FurtherBridge { name: "puter0-1".to_owned(), ports: 3 }];
        let wide = by_status(&Status { further, ..status(all, &[]) }, Signs::default());
        let rule = "sudo nft add rule inet own forward iifname '{ puter0, puter0-1 }' accept";
        assert!(wide[0].mend.as_deref().unwrap().starts_with(rule), "{wide:?}");
        assert!(wide[1].mend.as_deref().unwrap().contains(" --add-interface=puter0 --add-interface=puter0-1 "));
        assert!(checks.iter().all(|check| check.state == State::Advice && check.is_command), "{checks:?}");
        assert!(checks[0].found.starts_with("nftables' inet own forward drops"), "{checks:?}");
    }

    #[test]
    fn why_vms_have_no_ipv6_is_told_where_the_host_has_it() {
        let zero = "0".repeat(32);
        let route = |length: &str, flags: &str, by: &str| {
            format!("{zero} {length} {zero} 00 {} 00000400 00000001 00000000 {flags}     {by}\n", "f".repeat(32))
        };
        let out = route("00", "00000003", "eth0");
        // As every kernel has: one that refuses all, one of a network, one of the machine itself.
        let none = [route("00", "00200200", "lo"), route("40", "00000001", "eth0"), route("00", "00200200", "eth0")];
        let none = none.concat();
        let without = status(Vec::new(), &[]);
        let told = |status: &Status, setting, routes: &str, disabled| {
            ipv6(status, setting, routes, disabled).map(|check| (check.state, check.found, check.mend))
        };
        assert_eq!(told(&without, Ipv6::Auto, &none, false), None);
        assert_eq!(told(&without, Ipv6::Off, &out, false).unwrap().0, State::Ok);
        let (state, found, mend) = told(&without, Ipv6::Auto, &(none + &out), true).unwrap();
        assert!(state == State::Advice && found.contains("disable_ipv6"), "{found}");
        assert!(mend.unwrap().starts_with("sudo sysctl -w net.ipv6.conf.all.disable_ipv6=0 && puter daemon stop"));
        assert!(told(&without, Ipv6::Auto, &out, false).unwrap().1.contains("when puterd was started"));
        let with = Status { ipv6: Some("fd00::/64".parse().unwrap()), ..without };
        assert!(told(&with, Ipv6::Auto, &out, false).unwrap().1.contains("puterd sees no such route"));
        assert_eq!(told(&Status { ipv6_outside: true, ..with }, Ipv6::Auto, &out, false), None);
    }

    #[test]
    fn too_few_neighbours_come_with_the_command_that_allows_more() {
        assert!(neighbours("ipv4", [128, 512, 1024], 500).is_none());
        let check = neighbours("ipv6", [128, 512, 1024], 600).unwrap();
        assert!(check.found.contains("at most 1024 ipv6 neighbours and there are 600 VMs"), "{check:?}");
        let command = "sudo sysctl -w net.ipv6.neigh.default.gc_thresh3=8192 net.ipv6.neigh.default.gc_thresh2=4096 \
                       net.ipv6.neigh.default.gc_thresh1=2048";
        assert_eq!((check.mend.as_deref(), check.is_command), (Some(command), true));
    }

    #[test]
    fn what_puterd_sees_to_is_well_and_what_it_does_not_see_is_told() {
        let signs = Signs { docker: true, firewalld: false, ufw: true };
        let passes = Firewall { passes: true, by_puterd: true, ..firewall("ip", "filter", "FORWARD", "forward") };
        let checks = by_status(&status(vec![passes], &[]), signs);
        assert_eq!(checks.iter().map(|check| check.state).collect::<Vec<_>>(), [State::Ok]);
        let names = |checks: Vec<Check>| checks.iter().map(|check| check.name).collect::<Vec<_>>();
        assert_eq!(names(by_status(&status(Vec::new(), &[]), signs)), ["docker", "ufw"]);
        assert_eq!(names(without_puterd(signs)), ["docker", "ufw"]);
        let checks = by_status(&status(Vec::new(), &["the bridge puter0 was removed: x", "y"]), Signs::default());
        assert_eq!(checks.iter().map(|check| check.state).collect::<Vec<_>>(), [State::Missing, State::Advice]);
    }
}
