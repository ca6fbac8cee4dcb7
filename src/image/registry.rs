//! A registry's API (OCI distribution spec 1.1) for one repository: manifests and blobs, with authentication and
//! patience.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use ureq::Body;
use ureq::http::Response;

use super::auth::{self, Challenge};
use super::credentials::{self, Credentials};
use super::digest::Digest;
use super::http::{Client, Request, Transport, text_header};
use super::manifest::{ACCEPT, MAX_MANIFEST};
use super::patience::{self, retry_after};
use super::progress::{Cancelled, PullOptions, TICK};
use super::reference::RegistryReference;
use super::url::Url;

/// How often a registry that asks for patience, or is in trouble, is asked again.
const PATIENCE: u32 = 3;
const MAX_ERROR_BODY: u64 = 64 << 10;

/// Ends every wait of the threads that share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop {
    own: Arc<AtomicBool>,
    above: Option<Arc<AtomicBool>>,
}

impl Stop {
    /// One that this one sets as well, but that does not set this one.
    pub fn child(&self) -> Stop {
        Stop { own: Arc::default(), above: Some(self.own.clone()) }
    }

    pub fn set(&self) {
        self.own.store(true, Ordering::Relaxed);
    }

    pub fn check(&self) -> Result<()> {
        let set = |flag: &Arc<AtomicBool>| flag.load(Ordering::Relaxed);
        if set(&self.own) || self.above.as_ref().is_some_and(set) { Err(Cancelled.into()) } else { Ok(()) }
    }

    /// Sleeps, unless it is time to stop.
    pub fn sleep(&self, duration: Duration) -> Result<()> {
        let end = Instant::now() + duration;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(TICK));
        }
    }
}

/// A manifest as it came: its bytes are verified against every digest that is known for it.
pub(crate) struct RawManifest {
    pub bytes: Vec<u8>,
    pub content_type: String,
}

/// A session with a registry about one repository.
pub(crate) struct Registry {
    pub client: Client,
    pub reference: RegistryReference,
    pub stop: Stop,
    tls: AtomicBool,
    authorization: Mutex<Option<String>>,
    max_retry_after: Duration,
}

impl Registry {
    pub fn new(reference: &RegistryReference, options: &PullOptions, stop: Stop) -> Registry {
        let client = Client::new(options);
        Registry {
            tls: AtomicBool::new(!client.allows_plain(&reference.registry.to_ascii_lowercase())),
            client,
            reference: reference.clone(),
            stop,
            authorization: Mutex::new(None),
            max_retry_after: options.max_retry_after,
        }
    }

    fn url(&self, kind: &str, selector: &str) -> Url {
        let path = format!("/v2/{}/{kind}/{selector}", self.reference.repository);
        Url { tls: self.tls.load(Ordering::Relaxed), authority: self.reference.host().to_ascii_lowercase(), path }
    }

    /// The manifest that the reference names, or the one with `digest`.
    pub fn manifest(&self, digest: Option<&Digest>) -> Result<RawManifest> {
        let selector = digest.map_or_else(|| self.reference.selector(), Digest::to_string);
        let (mut response, url) = self.get("manifests", &selector, Some(ACCEPT), 0, false)?;
        let host = &url.authority;
        if response.status().as_u16() != 200 {
            return Err(self.refusal(&url, response));
        }
        let bytes = self.client.read_small(host, &mut response, MAX_MANIFEST, "a manifest")?;
        let found = Digest::of(&bytes);
        if let Some(expected) = digest.or(self.reference.digest.as_ref())
            && *expected != found
        {
            bail!("{host} answers with the wrong manifest: asked for {expected}, got {found}; nothing of it is used");
        }
        let content_type = text_header(response.headers(), "content-type").unwrap_or_default().to_string();
        let claimed = text_header(response.headers(), "docker-content-digest").and_then(|text| text.parse().ok());
        // Docker signs schema 1 manifests in a way that makes their digest not that of their bytes.
        if claimed.is_some_and(|claimed: Digest| claimed != found) && !content_type.contains("prettyjws") {
            bail!("{host} sends a damaged manifest: its digest is {found}, which is not what the registry announces");
        }
        Ok(RawManifest { bytes, content_type })
    }

    /// Asks for a blob from byte `from` on; the answer is 200 or 206.
    pub fn blob(&self, digest: &Digest, from: u64) -> Result<(Response<Body>, Url)> {
        let (response, url) = self.get("blobs", &digest.to_string(), None, from, true)?;
        match response.status().as_u16() {
            200 | 206 => Ok((response, url)),
            // The range is not to be had, so let the caller begin anew.
            416 if from > 0 => self.blob(digest, 0),
            404 => bail!(
                "{} does not have the layer {digest} of '{}': it was pushed only in part",
                url.authority,
                self.reference
            ),
            _ => Err(self.refusal(&url, response)),
        }
    }

    fn get(
        &self,
        kind: &str,
        selector: &str,
        accept: Option<&str>,
        from: u64,
        long: bool,
    ) -> Result<(Response<Body>, Url)> {
        let mut logins = 0;
        let mut waits = 0;
        loop {
            self.stop.check()?;
            let start = self.url(kind, selector);
            let authorization = self.authorization().clone();
            let request = Request { accept, authorization: authorization.as_deref(), from, long, form: None };
            let (mut response, url) = match self.client.send(&start, &request) {
                // Downloads have a patience of their own.
                Err(error)
                    if !long && waits < 1 && error.downcast_ref::<Transport>().is_some_and(|one| !one.timeout) =>
                {
                    waits += 1;
                    self.stop.sleep(Duration::from_millis(200))?;
                    continue;
                }
                answer => answer?,
            };
            match response.status().as_u16() {
                // A login is for the registry, not for where it redirects to.
                401 if logins < 2 && url.same_origin(&start) => {
                    logins += 1;
                    self.log_in(&start, &response, authorization)?;
                }
                400 if !start.tls && logins == 0 => {
                    let body = self.client.read_small(&url.authority, &mut response, MAX_ERROR_BODY, "an error");
                    if !String::from_utf8_lossy(&body.unwrap_or_default()).contains("HTTPS") {
                        bail!("{} answers 400 (bad request): is it a registry?", url.authority);
                    }
                    self.tls.store(true, Ordering::Relaxed);
                    logins += 1;
                }
                429 | 500 | 502 | 503 | 504 if waits < PATIENCE => {
                    let limited = response.status().as_u16() == 429;
                    let wait = match retry_after(response.headers(), SystemTime::now()) {
                        Some(wait) if wait > self.max_retry_after => return Ok((response, url)),
                        Some(wait) => wait,
                        None => Duration::from_millis(if limited { 1000 } else { 200 } << waits),
                    };
                    waits += 1;
                    self.stop.sleep(wait.min(self.max_retry_after))?;
                }
                _ => return Ok((response, url)),
            }
        }
    }

    fn authorization(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.authorization.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers a 401; `used` is what the refused request had sent.
    fn log_in(&self, url: &Url, response: &Response<Body>, used: Option<String>) -> Result<()> {
        let mut authorization = self.authorization();
        if *authorization != used {
            return Ok(()); // another layer's download has logged in meanwhile
        }
        let host = &url.authority;
        let challenges: Vec<Challenge> = response
            .headers()
            .get_all("www-authenticate")
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(auth::parse_challenges)
            .collect();
        let login = credentials::find(&self.reference).context("cannot look up the stored login")?;
        let named = |scheme: &str| challenges.iter().find(|one| one.scheme == scheme);
        let registry = &self.reference.registry;
        *authorization = Some(match (named("bearer"), named("basic"), &login) {
            (Some(bearer), _, login) => {
                auth::fetch_token(&self.client, url, bearer, &self.reference.repository, login.as_ref())?
            }
            (None, Some(_), Some(Credentials::Password { user, password })) => {
                let value = auth::basic(user, password);
                if used.as_ref() == Some(&value) {
                    bail!("{host} refuses the stored login of '{user}': log in again with 'docker login {registry}'");
                }
                value
            }
            (None, Some(_), Some(Credentials::IdentityToken(_))) => {
                bail!(
                    "{host} wants a user name and a password, but only a token is stored: log in with 'docker login {registry}'"
                )
            }
            (None, Some(_), None) => bail!(
                "{host} wants a login: log in with 'docker login {registry}' or 'podman login {registry}', and try again"
            ),
            (None, None, _) => bail!("{host} answers 401 and asks for no login that puter knows (Bearer, Basic)"),
        });
        Ok(())
    }

    /// The error for an answer that is no success.
    fn refusal(&self, url: &Url, mut response: Response<Body>) -> anyhow::Error {
        let host = &url.authority;
        let name = &self.reference;
        let status = response.status().as_u16();
        let body = self.client.read_small(host, &mut response, MAX_ERROR_BODY, "an error").unwrap_or_default();
        let detail = auth::error_detail(&body);
        let short = short_name(name);
        match status {
            404 => anyhow!(
                "there is no image '{short}' on {}: the registry answered 404{detail}; check the name and the tag",
                name.registry
            ),
            401 | 403 => anyhow!(
                "{host} does not let you pull '{short}': it answered {status}{detail}; \
                 check the name, or log in with 'docker login {}'",
                name.registry
            ),
            429 => {
                let wait = retry_after(response.headers(), SystemTime::now());
                let wait = wait.map_or("a while".to_string(), |time| patience::show(time.as_secs()));
                let limit = patience::rate_limit(response.headers());
                let limit = if limit.is_empty() { limit } else { format!("; {limit}") };
                anyhow!(
                    "{host} has had too many requests from here (429{detail}{limit}): wait {wait}, log in with \
                     'docker login {}' for a higher limit, or name a mirror in the setting 'registry_mirrors'",
                    name.registry
                )
            }
            500.. => anyhow!("{host} is in trouble: it answered {status}{detail}; try again later"),
            _ => anyhow!("{host} answered {status}{detail} when asked for '{short}': is it a registry?"),
        }
    }
}

/// The reference without its registry, as an error reads best.
fn short_name(reference: &RegistryReference) -> String {
    let RegistryReference { repository, tag, digest, .. } = reference;
    let tag = tag.as_ref().map_or(String::new(), |tag| format!(":{tag}"));
    let digest = digest.map_or(String::new(), |digest| format!("@{digest}"));
    format!("{repository}{tag}{digest}")
}
