//! Published ports: which port of the host leads to which port of a guest, as docker writes it. Pure: no sockets here.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Ports that one VM may publish: each costs its monitor a socket.
pub const MOST: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    pub fn word(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

/// A port of the host that leads to one of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// Where the host listens.
    pub address: IpAddr,
    /// 0 where one has yet to be chosen.
    pub host_port: u16,
    pub guest_port: u16,
    pub protocol: Protocol,
    /// Any free port of the host will do: `host_port` is the one it had last, and is tried first.
    #[serde(default)]
    pub any: bool,
}

impl Forward {
    /// Where the host listens.
    pub fn endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.host_port)
    }

    /// The guest's end, as `80/tcp`.
    pub fn target(&self) -> String {
        format!("{}/{}", self.guest_port, self.protocol.word())
    }

    /// Whether both cannot listen at the same time: an address that stands for all of its family includes the others.
    pub fn overlaps(&self, other: &Forward) -> bool {
        let addresses = match (self.address, other.address) {
            (one, two) if one.is_ipv4() != two.is_ipv4() => false,
            (one, two) => one == two || one.is_unspecified() || two.is_unspecified(),
        };
        addresses && self.protocol == other.protocol && self.host_port == other.host_port && self.host_port != 0
    }

    /// Whether what the user wrote means this one.
    pub fn is_meant_by(&self, written: &Forward) -> bool {
        let number = match written.any {
            true => self.any,
            false => self.host_port == written.host_port,
        };
        number
            && (self.address, self.guest_port, self.protocol) == (written.address, written.guest_port, written.protocol)
    }
}

impl FromStr for Forward {
    type Err = String;

    /// Reads `[ADDRESS:]HOSTPORT:GUESTPORT[/tcp|/udp]`; without HOSTPORT, or where it is 0, any free one will do.
    fn from_str(text: &str) -> Result<Forward, String> {
        let wrong = |why: &str| {
            format!("'{text}' publishes no port: {why}; it is written [ADDRESS:]HOSTPORT:GUESTPORT[/tcp|/udp]")
        };
        let number = |word: &str| -> Result<u16, String> {
            let digits = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
            word.parse().ok().filter(|_| digits).ok_or_else(|| wrong(&format!("'{word}' is no port from 0 to 65535")))
        };
        let (rest, protocol) = match text.rsplit_once('/') {
            None => (text, Protocol::Tcp),
            Some((rest, "tcp")) => (rest, Protocol::Tcp),
            Some((rest, "udp")) => (rest, Protocol::Udp),
            Some((_, other)) => return Err(wrong(&format!("'{other}' is neither tcp nor udp"))),
        };
        let (address, ports) = match rest.strip_prefix('[') {
            Some(rest) => {
                let (address, ports) = rest.split_once("]:").ok_or_else(|| wrong("no ports follow the address"))?;
                let six = address.parse().map(IpAddr::V6).map_err(|_| wrong("no IPv6 address is in the brackets"))?;
                (Some(six), ports)
            }
            None if rest.split(':').count() > 3 => return Err(wrong("an IPv6 address is written in brackets")),
            None => match rest.split_once(':') {
                Some((address, ports)) if ports.contains(':') => {
                    let four = address.parse::<Ipv4Addr>();
                    (Some(four.map_err(|_| wrong(&format!("'{address}' is no address")))?.into()), ports)
                }
                _ => (None, rest),
            },
        };
        let address = address.map_or(Ipv4Addr::LOCALHOST.into(), |address: IpAddr| address.to_canonical());
        if address.is_multicast() || address == IpAddr::V4(Ipv4Addr::BROADCAST) {
            return Err(wrong("that address is no host's own"));
        }
        if matches!(address, IpAddr::V6(six) if six.is_unicast_link_local()) {
            return Err(wrong("an address of a link alone cannot be listened on"));
        }
        let (host, guest) = match ports.split_once(':') {
            Some(("", guest)) => (0, guest),
            Some((host, guest)) => (number(host)?, guest),
            None => (0, ports),
        };
        let guest_port = number(guest)?;
        if guest_port == 0 {
            return Err(wrong("a guest has no port 0"));
        }
        Ok(Forward { address, host_port: host, guest_port, protocol, any: host == 0 })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.endpoint(), self.target())
    }
}

/// What the user wrote, with the numbers that were chosen before for those that may have any.
pub fn with_former(mut wanted: Vec<Forward>, former: &[Forward]) -> Vec<Forward> {
    for forward in wanted.iter_mut().filter(|forward| forward.any && forward.host_port == 0) {
        if let Some(before) = former.iter().find(|before| before.is_meant_by(forward)) {
            forward.host_port = before.host_port;
        }
    }
    wanted
}

/// Checks that one VM can publish all of these at once.
///
/// # Errors
/// Why not, and the way out.
pub fn check(all: &[Forward]) -> Result<(), (String, String)> {
    if all.len() > MOST {
        return Err((format!("{} published ports are too many", all.len()), format!("a VM may have up to {MOST}")));
    }
    for (number, forward) in all.iter().enumerate() {
        let before = &all[..number];
        if let Some(same) = before.iter().find(|other| other.is_meant_by(forward)) {
            return Err((format!("{same} is named twice"), "publish each port once".into()));
        }
        if let Some(other) = before.iter().find(|other| other.overlaps(forward)) {
            let why = format!("{forward} and {other} cannot both have port {} of the host", forward.host_port);
            return Err((why, "give each its own port of the host".into()));
        }
    }
    Ok(())
}

/// Checks that each of several VMs can publish all of these: a number of the host leads to one alone.
///
/// # Errors
/// Why not, and the way out.
pub fn check_for(vms: &[String], all: &[Forward]) -> Result<(), (String, String)> {
    match (vms, all.iter().find(|forward| !forward.any)) {
        ([one, other, ..], Some(forward)) => {
            let (port, protocol) = (forward.host_port, forward.protocol.word());
            let why = format!("port {port}/{protocol} of the host cannot lead to both '{one}' and '{other}'");
            Err((why, format!("leave it out for any that is free: --publish {}", forward.target())))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Forward {
        text.parse().unwrap_or_else(|why| panic!("{why}"))
    }

    #[test]
    fn ports_are_read_as_docker_writes_them() {
        for (text, whole, any) in [
            ("8080:80", "127.0.0.1:8080:80/tcp", false),
            ("8080:80/tcp", "127.0.0.1:8080:80/tcp", false),
            ("53:53/udp", "127.0.0.1:53:53/udp", false),
            ("0.0.0.0:8080:80", "0.0.0.0:8080:80/tcp", false),
            ("192.168.1.5:65535:1", "192.168.1.5:65535:1/tcp", false),
            ("[::1]:8080:80", "[::1]:8080:80/tcp", false),
            ("[::]:8080:80/udp", "[::]:8080:80/udp", false),
            ("[::ffff:127.0.0.1]:8080:80", "127.0.0.1:8080:80/tcp", false),
            ("80", "127.0.0.1:0:80/tcp", true),
            (":80", "127.0.0.1:0:80/tcp", true),
            ("0:80/udp", "127.0.0.1:0:80/udp", true),
            ("0.0.0.0::80", "0.0.0.0:0:80/tcp", true),
            ("[::1]::80", "[::1]:0:80/tcp", true),
        ] {
            let forward = read(text);
            assert_eq!((forward.to_string().as_str(), forward.any), (whole, any), "{text}");
            assert_eq!(read(whole), forward, "what is shown can be written");
        }
    }

    #[test]
    fn what_publishes_no_port_says_why() {
        for (text, why) in [
            ("", "'' is no port"),
            ("80:", "'' is no port"),
            ("0", "a guest has no port 0"),
            ("8080:0", "a guest has no port 0"),
            ("65536:80", "'65536' is no port"),
            ("+80:80", "'+80' is no port"),
            ("8000-8010:80", "'8000-8010' is no port"),
            ("8080:http", "'http' is no port"),
            ("8080:80/sctp", "'sctp' is neither tcp nor udp"),
            ("8080:80/", "'' is neither"),
            ("localhost:8080:80", "'localhost' is no address"),
            (":8080:80", "'' is no address"),
            ("127.0.0.1:1:2:3", "IPv6 address is written in brackets"),
            ("::1:8080:80", "IPv6 address is written in brackets"),
            ("[::1]", "no ports follow the address"),
            ("[127.0.0.1]:8080:80", "no IPv6 address is in the brackets"),
            ("[fe80::1]:8080:80", "an address of a link alone"),
            ("224.0.0.1:8080:80", "no host's own"),
            ("8080:80\n", "is no port"),
        ] {
            let error = text.parse::<Forward>().unwrap_err();
            assert!(error.contains(why) && error.contains("[ADDRESS:]HOSTPORT:GUESTPORT"), "{text}: {error}");
        }
    }

    #[test]
    fn two_that_cannot_listen_together_are_told() {
        let list = |texts: &[&str]| texts.iter().map(|text| read(text)).collect::<Vec<_>>();
        let wrong = |texts: &[&str]| check(&list(texts)).map_err(|(why, _)| why);
        assert_eq!(wrong(&["8080:80", "8080:80/udp", "[::1]:8080:80", "8081:80", "80", "80/udp"]), Ok(()));
        assert_eq!(wrong(&["0.0.0.0:8080:80", "[::]:8080:80"]), Ok(()), "each family is its own");
        for (texts, why) in [
            (&["8080:80", "8080:80/tcp"][..], "127.0.0.1:8080:80/tcp is named twice"),
            (&["80", "0:80"], "127.0.0.1:0:80/tcp is named twice"),
            (&["8080:80", "8080:81"], "cannot both have port 8080"),
            (&["8080:80", "0.0.0.0:8080:80"], "cannot both have port 8080"),
        ] {
            let error = wrong(texts).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        let many: Vec<String> = (0..=MOST).map(|number| format!("{}:80", 2000 + number)).collect();
        assert!(wrong(&many.iter().map(String::as_str).collect::<Vec<_>>()).unwrap_err().contains("too many"));
    }

    #[test]
    fn several_vms_have_one_port_only_where_any_will_do() {
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let wrong = check_for(&names(&["web", "db"]), &[read("81"), read("8080:80/udp")]).unwrap_err();
        assert!(wrong.0.contains("8080/udp") && wrong.0.contains("'web' and 'db'"), "{wrong:?}");
        assert!(wrong.1.ends_with("--publish 80/udp"), "{wrong:?}");
        check_for(&names(&["web"]), &[read("8080:80")]).unwrap();
        check_for(&names(&["web", "db"]), &[read("80")]).unwrap();
    }

    #[test]
    fn any_port_keeps_the_number_it_had() {
        let had = Forward { host_port: 40_123, ..read("80") };
        assert_eq!(with_former(vec![read("80"), read("81"), read("8080:80")], &[had])[0].host_port, 40_123);
        assert!(had.is_meant_by(&read("80")) && had.is_meant_by(&read("40123:80")) && !had.is_meant_by(&read("81")));
        assert!(!read("8080:80").is_meant_by(&read("80")), "the user chose that one");
        let text = serde_json::to_string(&had).unwrap();
        assert_eq!(serde_json::from_str::<Forward>(&text).unwrap(), had);
    }
}
