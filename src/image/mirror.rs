//! Mirrors: places that are asked for an image before its own registry.

use std::collections::BTreeMap;
use std::sync::mpsc::Sender;

use anyhow::{Result, anyhow};

use super::blob::Event;
use super::digest::clip;
use super::progress::is_cancelled;
use super::reference::RegistryReference;
use super::registry::Registry;

/// The mirrors of each registry, in order.
pub type Mirrors = BTreeMap<String, Vec<String>>;

/// Reads `REGISTRY=MIRROR[,REGISTRY=MIRROR…]`; a mirror is `host[:port][/prefix]`.
///
/// # Errors
/// A sentence that says what is wrong with which of them.
pub fn parse_mirrors(text: &str) -> Result<Mirrors, String> {
    let mut mirrors = Mirrors::new();
    for one in text.split(',').map(str::trim).filter(|one| !one.is_empty()) {
        let Some((registry, mirror)) = one.split_once('=') else {
            let one = clip(one);
            return Err(format!("'{one}' names no mirror; an example is docker.io=mirror.example:5000"));
        };
        let any = RegistryReference {
            registry: registry.trim().to_ascii_lowercase(),
            repository: "any".into(),
            tag: None,
            digest: None,
        };
        any.at(registry.trim()).and_then(|_| any.at(mirror.trim())).map_err(|error| error.to_string())?;
        mirrors.entry(any.registry).or_default().push(mirror.trim().to_string());
    }
    Ok(mirrors)
}

/// Where `reference` is to be had: its mirrors in order, then its registry.
pub(crate) fn places(reference: &RegistryReference, mirrors: &Mirrors) -> Result<Vec<RegistryReference>> {
    let list = mirrors.get(&reference.registry.to_ascii_lowercase()).into_iter().flatten();
    let mut places =
        list.map(|mirror| reference.at(mirror)).collect::<Result<Vec<_>, _>>().map_err(|why| anyhow!(why))?;
    places.push(reference.clone());
    Ok(places)
}

/// Asks one place after the other, and tells which one it was that had it. Only the last one's failure is an error.
pub(crate) fn first<T>(
    registries: &[Registry],
    events: &Sender<Event>,
    ask: impl Fn(&Registry) -> Result<T>,
) -> Result<(usize, T)> {
    for (at, registry) in registries.iter().enumerate() {
        match (ask(registry), registries.get(at + 1)) {
            (Ok(found), _) => return Ok((at, found)),
            (Err(error), Some(next)) if !is_cancelled(&error) => {
                let (mirror, next) = (&registry.reference.registry, &next.reference.registry);
                let _ = events.send(Event::Note(format!("the mirror {mirror} is of no use: {error:#}; asking {next}")));
            }
            (Err(error), _) => return Err(error),
        }
    }
    Err(anyhow!("there is no place to pull from"))
}

#[cfg(test)]
mod tests {
    use super::super::reference::Reference;
    use super::*;

    #[test]
    fn mirrors_come_in_their_order_before_the_registry() {
        let mirrors = parse_mirrors("docker.io=https://a.example/, ghcr.io=x:1,Docker.io=b:5000/hub").unwrap();
        let Ok(Reference::Registry(reference)) = "debian:12".parse() else { panic!() };
        let places: Vec<_> = places(&reference, &mirrors).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(
            places,
            ["a.example/library/debian:12", "b:5000/hub/library/debian:12", "docker.io/library/debian:12"]
        );
        let Ok(Reference::Registry(other)) = "quay.io/a".parse() else { panic!() };
        assert_eq!(super::places(&other, &mirrors).unwrap(), [other]);
    }

    #[test]
    fn what_is_no_mirror_is_told() {
        for (text, reason) in [
            ("docker.io", "names no mirror"),
            ("docker.io\u{1b}[2J", "'docker.io\u{fffd}[2J' names no mirror"),
            ("docker.io=", "is no mirror"),
            ("=a.io", "is no mirror"),
            ("docker.io=a b", "is no mirror"),
            ("docker.io=a.io/UPPER", "lower case"),
            ("docker.io=ftp://a.io", "is no mirror"),
            ("docker.io=a.io/../b", "is no mirror"),
        ] {
            let error = parse_mirrors(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert_eq!(parse_mirrors(" , "), Ok(Mirrors::new()));
    }
}
