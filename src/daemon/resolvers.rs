//! The host's own name servers, which guests are told of.

use std::fs;
use std::net::Ipv4Addr;

/// Where the host's resolver keeps its servers; the second is systemd-resolved's, whose stub guests cannot reach.
const FILES: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
/// Most servers that resolvers use (MAXNS, resolv.h).
const MOST: usize = 3;

/// The name servers that a guest can reach through the host; none where the host has none of that kind.
pub fn of_host() -> Vec<Ipv4Addr> {
    FILES
        .iter()
        .map(|file| parse(&fs::read_to_string(file).unwrap_or_default()))
        .find(|servers| !servers.is_empty())
        .unwrap_or_default()
}

/// The IPv4 servers of a resolv.conf(5) that are not the host's own loopback.
fn parse(text: &str) -> Vec<Ipv4Addr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then_some(())?;
        words.next()?.parse::<Ipv4Addr>().ok()
    });
    servers.filter(|server| !server.is_loopback() && !server.is_unspecified()).take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_servers_that_guests_reach_are_told() {
        let text =
            "# by hand\nsearch lan\nnameserver 127.0.0.53\nnameserver fd00::1\n nameserver 192.0.2.7 \nnameserver x\n";
        assert_eq!(parse(text), [Ipv4Addr::new(192, 0, 2, 7)]);
        assert!(parse("").is_empty());
    }
}
