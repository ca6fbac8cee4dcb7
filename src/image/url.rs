//! The few things about URLs that a registry client decides by.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Result, bail};

use super::digest::clip;

/// The longest `host:port`: a name has at most 253 characters.
const MAX_AUTHORITY: usize = 253 + 6;
/// The longest path and query: signed addresses of blob stores have about 2 KiB.
const MAX_PATH: usize = 16 << 10;

/// An absolute `http` or `https` URL without user name or fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// `https`, else `http`.
    pub tls: bool,
    /// `host` or `host:port`, lower case.
    pub authority: String,
    /// The path and the query, beginning with `/`.
    pub path: String,
}

impl Url {
    /// Parses an absolute URL.
    ///
    /// # Errors
    /// When it is none, or one that no registry needs.
    pub fn parse(text: &str) -> Result<Url> {
        let lower = text.get(..8).unwrap_or(text).to_ascii_lowercase();
        let (tls, rest) = if lower.starts_with("https://") {
            (true, text.get(8..))
        } else if lower.starts_with("http://") {
            (false, text.get(7..))
        } else {
            bail!("'{}' is no http or https address", clip(text));
        };
        let rest = rest.unwrap_or_default();
        let rest = rest.split('#').next().unwrap_or_default();
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        // A user name in an address is a way to show one host and go to another.
        if authority.is_empty() || !authority.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b)) {
            bail!("'{}' holds no usable host name", clip(text));
        }
        if authority.len() > MAX_AUTHORITY || path.len() > MAX_PATH {
            bail!("'{}' is longer than any address needs to be", clip(text));
        }
        if !path.bytes().all(|byte| byte.is_ascii_graphic()) {
            bail!("'{}' holds characters that no address may hold", clip(text));
        }
        let slash = if path.starts_with('/') { "" } else { "/" };
        Ok(Url { tls, authority: authority.to_ascii_lowercase(), path: format!("{slash}{path}") })
    }

    /// Where a `Location` header of an answer from here points to (RFC 3986 section 5, without dot segments).
    ///
    /// # Errors
    /// As for [`Url::parse`].
    pub fn join(&self, location: &str) -> Result<Url> {
        let scheme = if self.tls { "https:" } else { "http:" };
        if location.contains("://") && !location.starts_with(['/', '?']) {
            return Url::parse(location);
        }
        if location.starts_with("//") {
            return Url::parse(&format!("{scheme}{location}"));
        }
        let own = self.path.split('?').next().unwrap_or("/");
        let path = match location.chars().next() {
            Some('/') => location.to_string(),
            Some('?') => format!("{own}{location}"),
            _ => format!("{}{location}", own.get(..=own.rfind('/').unwrap_or(0)).unwrap_or("/")),
        };
        Url::parse(&format!("{scheme}//{}{path}", self.authority))
    }

    /// The port that is connected to.
    pub fn port(&self) -> u16 {
        let after = self.authority.rsplit_once(']').map_or(self.authority.as_str(), |(_, after)| after);
        let named = after.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
        named.unwrap_or(if self.tls { 443 } else { 80 })
    }

    /// Whether both speak to the same server in the same way, so that a secret meant for one may go to the other.
    pub fn same_origin(&self, other: &Url) -> bool {
        self.tls == other.tls && self.authority == other.authority
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http{}://{}{}", if self.tls { "s" } else { "" }, self.authority, self.path)
    }
}

/// The host of `host[:port]`, without the brackets of an IPv6 address.
pub(crate) fn host_of(authority: &str) -> &str {
    match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => authority.split(':').next().unwrap_or(authority),
    }
}

/// Whether `host[:port]` is this machine by its very name: 127.0.0.0/8, ::1 or localhost.
pub(crate) fn is_loopback(authority: &str) -> bool {
    let host = host_of(authority);
    host == "localhost"
        || host.parse::<Ipv4Addr>().is_ok_and(|address| address.is_loopback())
        || host.parse::<Ipv6Addr>().is_ok_and(|address| address.is_loopback())
}

/// Percent-encodes all but RFC 3986's unreserved characters.
pub(crate) fn encode(text: &str) -> String {
    use fmt::Write;
    text.bytes().fold(String::new(), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(byte as char);
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
        encoded
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_resolved_against_the_address_it_came_from() {
        let base = Url::parse("https://Reg.example:5000/v2/a/blobs/x?y=1").unwrap();
        assert_eq!(base.authority, "reg.example:5000");
        for (location, result) in [
            ("https://cdn.example/b?s=1#f", "https://cdn.example/b?s=1"),
            ("//cdn.example/b", "https://cdn.example/b"),
            ("/c?next=http://x/", "https://reg.example:5000/c?next=http://x/"),
            ("z", "https://reg.example:5000/v2/a/blobs/z"),
            ("?q", "https://reg.example:5000/v2/a/blobs/x?q"),
            ("http://h", "http://h/"),
            ("HTTP://h?x", "http://h/?x"),
        ] {
            assert_eq!(base.join(location).unwrap().to_string(), result, "{location}");
        }
        for location in ["ftp://x/y", "https://a@b/", "https:///x", "/a b", "/a\r\nX: y", "https://é/"] {
            assert!(base.join(location).is_err(), "{location}");
        }
    }

    #[test]
    fn addresses_have_a_longest_form_and_a_port() {
        assert!(Url::parse(&format!("https://{}/", "a".repeat(260))).is_err());
        assert!(Url::parse(&format!("https://a/{}", "a".repeat(20_000))).is_err());
        for (url, port) in [("https://a/", 443), ("http://a/", 80), ("http://[::1]/", 80), ("https://[::1]:5/", 5)] {
            assert_eq!(Url::parse(url).unwrap().port(), port, "{url}");
        }
    }

    #[test]
    fn another_port_or_scheme_is_another_origin() {
        let base = Url::parse("https://a:1/x").unwrap();
        assert!(base.same_origin(&Url::parse("https://A:1/y").unwrap()));
        for other in ["http://a:1/x", "https://a:2/x", "https://a/x", "https://b:1/x"] {
            assert!(!base.same_origin(&Url::parse(other).unwrap()), "{other}");
        }
    }

    #[test]
    fn only_this_machine_is_loopback() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:1", "127.9.9.9", "[::1]:5000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.evil.io", "127.0.0.1.evil.io", "10.0.0.1", "[::2]:5", "127.1", "0.0.0.0"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn a_query_value_is_encoded() {
        assert_eq!(encode("repository:a/b:pull é"), "repository%3Aa%2Fb%3Apull%20%C3%A9");
    }
}
