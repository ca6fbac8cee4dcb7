//! How a registry asks for authentication (RFC 9110 section 11, the distribution project's token protocol).

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::credentials::Credentials;
use super::digest::clip;
use super::http::{Client, Request};
use super::url::{Url, encode};

const MAX_TOKEN_ANSWER: u64 = 1 << 20;

/// One challenge of a `WWW-Authenticate` header.
#[derive(Debug, PartialEq, Eq)]
pub struct Challenge {
    /// The scheme, lower case.
    pub scheme: String,
    /// Its parameters, names lower case.
    pub parameters: Vec<(String, String)>,
}

impl Challenge {
    /// The parameter of this name, which is in lower case.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Parses a `WWW-Authenticate` value, which may hold several challenges.
pub fn parse_challenges(header: &str) -> Vec<Challenge> {
    let is_token = |letter: char| letter.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~/".contains(letter);
    let mut challenges: Vec<Challenge> = vec![];
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find(|letter| !is_token(letter)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            return challenges;
        }
        let after = after.trim_start_matches([' ', '\t']);
        // A word before '=' is a parameter of the challenge under way, any other begins a challenge.
        let Some(value) = after.strip_prefix('=').filter(|_| !challenges.is_empty()) else {
            challenges.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: vec![] });
            rest = after;
            continue;
        };
        let value = value.trim_start_matches([' ', '\t', '=']);
        let (text, after) = match value.strip_prefix('"') {
            Some(quoted) => unquote(quoted),
            None => {
                let end = value.find([',', ' ', '\t']).unwrap_or(value.len());
                let (text, after) = value.split_at(end);
                (text.to_string(), after)
            }
        };
        if let Some(challenge) = challenges.last_mut() {
            challenge.parameters.push((word.to_ascii_lowercase(), text));
        }
        rest = after;
    }
}

/// The text up to the closing quote, and what follows it.
fn unquote(quoted: &str) -> (String, &str) {
    let mut text = String::new();
    let mut letters = quoted.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return (text, quoted.get(at + 1..).unwrap_or_default()),
            '\\' => text.extend(letters.next().map(|(_, letter)| letter)),
            _ => text.push(letter),
        }
    }
    (text, "")
}

/// The `Authorization` value of the Basic scheme (RFC 7617).
pub(crate) fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

/// Fetches the token that a Bearer challenge asks for; without credentials, an anonymous one.
pub(crate) fn fetch_token(
    client: &Client,
    registry: &Url,
    challenge: &Challenge,
    repository: &str,
    credentials: Option<&Credentials>,
) -> Result<String> {
    let host = &registry.authority;
    let realm = challenge.get("realm").with_context(|| format!("{host} asks for a token but names no realm"))?;
    let mut url = Url::parse(realm).with_context(|| format!("{host} names a bad token server"))?;
    // The user's secret goes to the realm, so it must be at least as well protected as the registry itself.
    if !url.tls && (registry.tls || !client.allows_plain(&url.authority)) {
        bail!("{host} asks for a token from {} without TLS: refused", url.authority);
    }
    let scope = match challenge.get("scope") {
        Some(scope) if !scope.is_empty() => scope.to_string(),
        _ => format!("repository:{repository}:pull"),
    };
    let mut query = format!("scope={}", encode(&scope));
    if let Some(service) = challenge.get("service") {
        query.push_str(&format!("&service={}", encode(service)));
    }
    let mut authorization = None;
    let mut form = None;
    match credentials {
        Some(Credentials::IdentityToken(token)) => {
            form = Some(format!("grant_type=refresh_token&client_id=puter&refresh_token={}&{query}", encode(token)));
        }
        Some(Credentials::Password { user, password }) => {
            authorization = Some(basic(user, password));
            query.push_str(&format!("&account={}", encode(user)));
        }
        None => {}
    }
    if form.is_none() {
        url.path.push(if url.path.contains('?') { '&' } else { '?' });
        url.path.push_str(&query);
    }
    let request = Request {
        authorization: authorization.as_deref(),
        form: form.as_deref(),
        accept: Some("application/json"),
        ..Request::default()
    };
    let (mut response, url) = client.send(&url, &request).with_context(|| format!("cannot get a token for {host}"))?;
    let server = &url.authority;
    match response.status().as_u16() {
        200 => {}
        401 | 403 if credentials.is_some() => {
            bail!("{server} refuses the login stored for {host}: log in again with 'docker login {host}'")
        }
        401 | 403 => bail!("{server} gives no anonymous access to '{repository}': log in with 'docker login {host}'"),
        status => bail!("{server} answers {status} when asked for a token for {host}"),
    }
    let body = client.read_small(server, &mut response, MAX_TOKEN_ANSWER, "a token")?;
    let answer: TokenAnswer = serde_json::from_slice(&body)
        .map_err(|_| anyhow::anyhow!("{server} answers with something that is no token"))?;
    match answer.token.or(answer.access_token).filter(|token| !token.is_empty()) {
        Some(token) if token.bytes().all(|byte| byte.is_ascii_graphic()) => Ok(format!("Bearer {token}")),
        Some(_) => bail!("{server} answers with a token that holds unusable characters"),
        None => bail!("{server} answers without a token"),
    }
}

/// What a registry's own error body says, in the form `(code: message)`; empty if it says nothing usable.
pub(crate) fn error_detail(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let Ok(Errors { errors }) = serde_json::from_slice(body) else { return String::new() };
    match errors.first() {
        Some(Entry { message, .. }) if !message.is_empty() => format!(" ({})", clip(message)),
        Some(Entry { code, .. }) if !code.is_empty() => format!(" ({})", clip(code)),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    #[test]
    fn a_bearer_challenge_is_parsed() {
        let header = r#"Bearer realm="https://auth.example/token",service="reg",scope="repository:a/b:pull,push""#;
        let [challenge] = &parse_challenges(header)[..] else { panic!() };
        assert_eq!(challenge.scheme, "bearer");
        assert_eq!(challenge.get("realm"), Some("https://auth.example/token"));
        assert_eq!(challenge.get("scope"), Some("repository:a/b:pull,push"));
    }

    #[test]
    fn several_challenges_in_one_header_are_told_apart() {
        let header = r#"Negotiate, BASIC Realm = "a \"b\" c" , charset=UTF-8, Bearer realm=x"#;
        let found: Vec<_> = parse_challenges(header).into_iter().map(|one| (one.scheme, one.parameters)).collect();
        assert_eq!(
            found,
            [
                ("negotiate".to_string(), vec![]),
                ("basic".to_string(), parameters(&[("realm", "a \"b\" c"), ("charset", "UTF-8")])),
                ("bearer".to_string(), parameters(&[("realm", "x")])),
            ]
        );
    }

    #[test]
    fn a_hostile_challenge_ends() {
        for header in ["", "=", "\"", ",,,", "Bearer realm=\"x", "Bearer realm=\"x\\", "Bearer =", "a=b=c=\"", "é"] {
            assert!(parse_challenges(header).len() <= 2, "{header}");
        }
    }

    #[test]
    fn the_registrys_own_words_are_quoted_safely() {
        assert_eq!(error_detail(br#"{"errors":[{"code":"X","message":"manifest unknown"}]}"#), " (manifest unknown)");
        assert_eq!(error_detail(br#"{"errors":[{"code":"DENIED"}]}"#), " (DENIED)");
        assert_eq!(error_detail(b"<html>"), "");
        assert_eq!(error_detail(br#"{"errors":[]}"#), "");
    }
}
