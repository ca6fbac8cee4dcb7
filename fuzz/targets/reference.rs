//! What a user writes for an image, and for a mirror.

use puter::image::{Reference, parse_mirrors};

pub fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    match text.parse::<Reference>() {
        Ok(reference) => {
            let canonical = reference.to_string();
            assert_eq!(canonical.parse::<Reference>().as_ref(), Ok(&reference), "{canonical}");
            let json = serde_json::to_string(&reference).expect("JSON");
            assert_eq!(serde_json::from_str::<Reference>(&json).expect("what was written"), reference);
            if let Reference::Registry(one) = &reference {
                check(one);
                assert!(canonical.len() <= 255 + 1 + 128 + 1 + 71, "{canonical}");
                let mirrored = one.at("https://mirror.example:5000/hub").map(|there| {
                    check(&there);
                    (there.registry, there.repository)
                });
                let expected = ("mirror.example:5000".to_string(), format!("hub/{}", one.repository));
                assert_eq!(mirrored, Ok(expected));
            }
        }
        Err(error) => readable(&error.to_string()),
    }
    match parse_mirrors(text) {
        Ok(mirrors) => {
            let all: Vec<String> = mirrors
                .iter()
                .flat_map(|(registry, list)| list.iter().map(move |one| format!("{registry}={one}")))
                .collect();
            assert_eq!(parse_mirrors(&all.join(",")), Ok(mirrors));
        }
        Err(error) => readable(&error),
    }
}

/// What becomes part of a URL and of a file's name.
fn check(reference: &puter::image::reference::RegistryReference) {
    let host = reference.host();
    assert!(!host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.:[]".contains(&b)), "{host}");
    assert!(host.starts_with('[') || host.bytes().any(|byte| byte.is_ascii_alphanumeric()), "{host}");
    let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._/:".contains(&byte));
    assert!(plain(&reference.repository) && plain(&reference.selector()));
    assert!(reference.repository.split('/').all(|part| !matches!(part, "" | "." | "..")));
}

fn readable(text: &str) {
    assert!(!text.is_empty() && text.chars().count() < 1000, "{} bytes", text.len());
    assert!(!text.contains(char::is_control), "{}", text.escape_debug());
}
