//! Logins and what a registry asks for: an auth file, a credential helper's answer, a challenge, an address and where it
//! leads, each a piece.

use std::cell::RefCell;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use puter::image::Reference;
use puter::image::auth::parse_challenges;
use puter::image::credentials::{Credentials, find_in, helper_answer};
use puter::image::url::Url;

use crate::{pieces, readable};

pub fn run(input: &[u8]) {
    let mut pieces = pieces(input);
    let mut next = || pieces.next().unwrap_or_default();
    let (file, answer) = (next(), next());
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (challenge, base, location) = (text(next()), text(next()), text(next()));
    login(file, answer);
    for one in parse_challenges(&challenge) {
        assert!(!one.scheme.is_empty() && !one.scheme.bytes().any(|byte| byte.is_ascii_uppercase()));
        for (name, value) in &one.parameters {
            assert!(value.len() <= challenge.len() && !name.is_empty());
            assert!(one.get(name).is_some());
        }
    }
    match Url::parse(&base) {
        Ok(base) => {
            assert_eq!(Url::parse(&base.to_string()).expect("what was written"), base);
            assert!(base.same_origin(&base) && base.path.starts_with('/'));
            match base.join(&location) {
                Ok(there) => {
                    assert_eq!(Url::parse(&there.to_string()).expect("what was written"), there);
                    // Where a secret may go is told by what is connected to.
                    assert!(!there.same_origin(&base) || there.port() == base.port());
                }
                Err(error) => readable(&error),
            }
        }
        Err(error) => readable(&error),
    }
}

fn login(file: &[u8], answer: &[u8]) {
    let Ok(Reference::Registry(reference)) = "localhost:5000/team/app".parse() else { panic!("a reference") };
    let asked = RefCell::new(Vec::new());
    let helper = |name: &str, server: &str| {
        asked.borrow_mut().push((name.to_string(), server.to_string()));
        Ok(helper_answer(answer).flatten())
    };
    match find_in(file, &reference, &helper) {
        Ok(found) => {
            let helped = asked.borrow().iter().all(|(name, server)| {
                assert_eq!(server, "localhost:5000");
                // An empty name is no helper; the others are checked before they are run.
                !name.is_empty() || text_has(file, "credHelpers")
            });
            assert!(helped && asked.borrow().len() <= 1);
            if let Some(found) = found {
                assert!(comes_from(&found, file) || comes_from(&found, answer));
            }
        }
        Err(error) => readable(&error),
    }
}

fn text_has(bytes: &[u8], word: &str) -> bool {
    String::from_utf8_lossy(bytes).contains(word)
}

/// Whether the secret is one of the document's strings, or in base64 within one.
fn comes_from(found: &Credentials, document: &[u8]) -> bool {
    // What nobody asks for may be no UTF-8, or a number that is too large.
    let document = String::from_utf8_lossy(document);
    let Ok(document) = serde_json::from_str::<serde_json::Value>(&document) else { return !document.is_empty() };
    let mut left = vec![&document];
    while let Some(value) = left.pop() {
        match value {
            serde_json::Value::Array(all) => left.extend(all),
            serde_json::Value::Object(all) => left.extend(all.values()),
            serde_json::Value::String(text) => match found {
                Credentials::IdentityToken(token) if token == text => return true,
                Credentials::Password { password, .. } if password == text => return true,
                Credentials::Password { user, password } => {
                    let plain = STANDARD.decode(text.trim()).unwrap_or_default();
                    if plain.starts_with(format!("{user}:{password}").as_bytes()) {
                        return true;
                    }
                }
                Credentials::IdentityToken(_) => {}
            },
            _ => {}
        }
    }
    false
}
