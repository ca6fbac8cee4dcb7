//! Which proxy stands between here and a host: `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`, upper or lower
//! case.
//!
//! The HTTP client's own reading of these has `ALL_PROXY` win over the others, matches names of `NO_PROXY` to the letter
//! and knows no networks there; here they mean what they do for curl and for Go's programs, docker and podman among them.

use std::net::IpAddr;

use anyhow::{Result, bail};
use ureq::Proxy;

use super::url::{Url, host_of, is_loopback};

/// What the environment says of proxies.
#[derive(Default)]
pub(crate) struct Proxies {
    https: Option<Setting>,
    http: Option<Setting>,
    bypass: Vec<Bypass>,
}

struct Setting {
    variable: &'static str,
    /// May hold a password: never printed.
    value: String,
}

/// A proxy, and the variable that names it.
pub(crate) struct Chosen {
    pub proxy: Proxy,
    pub variable: &'static str,
}

impl Chosen {
    /// `host:port` of the proxy, and where that was said.
    pub fn describe(&self) -> String {
        format!("the proxy {}:{} (of {})", self.proxy.host(), self.proxy.port(), self.variable)
    }
}

/// An entry of `NO_PROXY`.
#[derive(Debug, PartialEq, Eq)]
enum Bypass {
    All,
    /// The network's address and the length of its prefix.
    Network(IpAddr, u32),
    /// A domain; with `below`, only names under it.
    Name {
        name: String,
        below: bool,
        port: Option<u16>,
    },
}

impl Proxies {
    /// Reads the environment.
    pub fn from_env() -> Proxies {
        Proxies::new(|name| std::env::var(name).ok())
    }

    fn new(variable: impl Fn(&str) -> Option<String>) -> Proxies {
        let find = |names: &[&'static str]| {
            names.iter().find_map(|name| {
                let value = variable(name)?.trim().to_string();
                (!value.is_empty()).then_some(Setting { variable: name, value })
            })
        };
        let bypass = find(&["NO_PROXY", "no_proxy"]).map(|setting| setting.value).unwrap_or_default();
        Proxies {
            https: find(&["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]),
            http: find(&["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"]),
            bypass: bypass.split([',', ' ', '\t']).filter_map(Bypass::parse).collect(),
        }
    }

    /// The proxy for `url`; this machine is always spoken to directly.
    pub fn find(&self, url: &Url) -> Result<Option<Chosen>> {
        let Some(Setting { variable, value }) = (if url.tls { &self.https } else { &self.http }) else {
            return Ok(None);
        };
        if is_loopback(&url.authority) || self.bypass.iter().any(|entry| entry.covers(url)) {
            return Ok(None);
        }
        let lower = value.to_ascii_lowercase();
        if lower.starts_with("socks") {
            bail!(
                "{variable} names a SOCKS proxy, and registries are reached through HTTP proxies only: set \
                 HTTPS_PROXY=http://HOST:PORT, or name {} in NO_PROXY",
                host_of(&url.authority)
            );
        }
        match Proxy::new(value) {
            Ok(proxy) if !proxy.host().is_empty() => Ok(Some(Chosen { proxy, variable })),
            _ => bail!("{variable} is no proxy's address: write http://[USER:PASSWORD@]HOST:PORT"),
        }
    }
}

impl Bypass {
    fn parse(text: &str) -> Option<Bypass> {
        if text == "*" {
            return Some(Bypass::All);
        }
        if let Some((address, length)) = text.split_once('/') {
            let address: IpAddr = address.parse().ok()?;
            let length: u32 = length.parse().ok()?;
            let longest = if address.is_ipv4() { 32 } else { 128 };
            return (length <= longest).then_some(Bypass::Network(address, length));
        }
        if let Ok(address) = text.trim_matches(['[', ']']).parse::<IpAddr>() {
            return Some(Bypass::Network(address, if address.is_ipv4() { 32 } else { 128 }));
        }
        let text = text.strip_prefix('*').unwrap_or(text).to_ascii_lowercase();
        let (name, port) = match text.rsplit_once(':') {
            Some((name, port)) => (name, Some(port.parse().ok()?)),
            None => (text.as_str(), None),
        };
        let below = name.starts_with('.');
        let name = host_of(name).trim_matches('.').to_string();
        (!name.is_empty()).then_some(Bypass::Name { name, below, port })
    }

    fn covers(&self, url: &Url) -> bool {
        let host = host_of(&url.authority).trim_end_matches('.');
        match self {
            Bypass::All => true,
            Bypass::Network(network, length) => {
                host.parse().is_ok_and(|address: IpAddr| first_bits(address, *length) == first_bits(*network, *length))
            }
            Bypass::Name { name, below, port } => {
                let under = host.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'));
                (under || !below && host == name) && port.is_none_or(|port| port == url.port())
            }
        }
    }
}

/// The address without what follows its first `length` bits, and its family.
fn first_bits(address: IpAddr, length: u32) -> (bool, u128) {
    match address.to_canonical() {
        IpAddr::V4(four) => (true, u128::from(u32::from(four)) >> 32_u32.saturating_sub(length)),
        IpAddr::V6(six) => (false, u128::from(six).checked_shr(128_u32.saturating_sub(length)).unwrap_or(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(variables: &[(&str, &str)]) -> Proxies {
        Proxies::new(|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string()))
    }

    fn chosen(variables: &[(&str, &str)], url: &str) -> Option<String> {
        let chosen = proxies(variables).find(&Url::parse(url).unwrap()).unwrap()?;
        Some(format!("{} {}:{}", chosen.variable, chosen.proxy.host(), chosen.proxy.port()))
    }

    #[test]
    fn the_variable_for_the_scheme_comes_before_the_one_for_all() {
        let all = [("ALL_PROXY", "http://all:1"), ("HTTPS_PROXY", "http://tls:2"), ("http_proxy", "plain:3")];
        assert_eq!(chosen(&all, "https://a/").as_deref(), Some("HTTPS_PROXY tls:2"));
        assert_eq!(chosen(&all, "http://a/").as_deref(), Some("http_proxy plain:3"));
        assert_eq!(chosen(&all[..1], "https://a/").as_deref(), Some("ALL_PROXY all:1"));
        assert_eq!(chosen(&all[..1], "http://a/").as_deref(), Some("ALL_PROXY all:1"));
        assert_eq!(chosen(&[("HTTP_PROXY", "http://plain:3")], "https://a/"), None);
        assert_eq!(
            chosen(&[("https_proxy", "http://b:4"), ("HTTPS_PROXY", " ")], "https://a/").unwrap(),
            "https_proxy b:4"
        );
    }

    #[test]
    fn loopback_and_the_exceptions_are_spoken_to_directly() {
        let direct = |exceptions: &str, host: &str| {
            chosen(&[("ALL_PROXY", "http://p:1"), ("no_proxy", exceptions)], &format!("https://{host}/")).is_none()
        };
        for host in ["localhost", "127.0.0.1:5000", "[::1]:5000"] {
            assert!(direct("", host), "{host}");
        }
        for (exceptions, inside, outside) in [
            ("example.com", "example.com", "notexample.com"),
            ("example.com", "a.example.com:5000", "example.com.evil.io"),
            (".example.com", "a.b.example.com", "example.com"),
            ("*.Example.com, other", "a.example.COM", "example.com"),
            ("x y,10.1.0.0/16", "10.1.2.3:5000", "10.2.2.3"),
            ("10.0.0.1", "10.0.0.1", "10.0.0.11"),
            ("fd00::/8", "[fd12::1]:443", "[fe80::1]"),
            ("[fd12::1]", "[fd12::1]:443", "[fd12::2]"),
            ("reg:5000", "reg:5000", "reg:5001"),
            ("reg:443", "reg", "reg:444"),
        ] {
            assert!(direct(exceptions, inside), "{exceptions} {inside}");
            assert!(!direct(exceptions, outside), "{exceptions} {outside}");
        }
        assert!(direct("*", "anything.io"));
        for nonsense in ["/", "10.0.0.0/33", "x/8", ":", ".", "a:b", ",,"] {
            assert!(!direct(nonsense, "10.0.0.1"), "{nonsense}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_an_error_that_keeps_the_password() {
        for (value, reason) in [
            ("socks5://u:hush@p:1", "SOCKS"),
            ("http://u:hush@:1/", "is no proxy's address"),
            ("http://u:hush@a b/", "is no proxy's address"),
        ] {
            let found = proxies(&[("HTTPS_PROXY", value)]).find(&Url::parse("https://a/").unwrap());
            let error = format!("{:#}", found.err().unwrap());
            assert!(error.contains(reason) && error.contains("HTTPS_PROXY") && !error.contains("hush"), "{error}");
        }
    }
}
