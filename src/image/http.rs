//! HTTP as a registry needs it: TLS by default, redirects that never carry a secret elsewhere, time limits, and
//! errors in plain words.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use ureq::http::{HeaderMap, Response};
use ureq::tls::TlsConfig;
use ureq::{Agent, Body};

use super::digest::clip;
use super::progress::PullOptions;
use super::proxy::{Chosen, Proxies};
use super::tls::{Material, Trust};
use super::url::{Url, host_of, is_loopback};

const MAX_REDIRECTS: usize = 5;
/// The longest time in which a small document (a manifest, a token) must be here whole.
const SMALL_DOCUMENT: Duration = Duration::from_secs(120);

/// One request; `GET`, or `POST` where there is a form.
#[derive(Clone, Default)]
pub(crate) struct Request<'a> {
    /// The `Accept` header.
    pub accept: Option<&'a str>,
    /// The `Authorization` header; sent to the request's own origin alone.
    pub authorization: Option<&'a str>,
    /// Ask for the bytes from here to the end.
    pub from: u64,
    /// An `application/x-www-form-urlencoded` body.
    pub form: Option<&'a str>,
    /// The answer may be long: limit its silence, not its length in time.
    pub long: bool,
}

pub(crate) struct Client {
    plain: Agent,
    /// By the directories of certificates that their hosts have; most have none.
    tls: Mutex<BTreeMap<Vec<PathBuf>, Agent>>,
    trust: Trust,
    proxies: Proxies,
    insecure: Vec<String>,
    connect_timeout: Duration,
    idle_timeout: Duration,
}

impl Client {
    pub fn new(options: &PullOptions) -> Client {
        let (connect, idle) = (options.connect_timeout, options.idle_timeout);
        Client {
            plain: agent(connect, idle, None),
            tls: Mutex::default(),
            trust: Trust::new(options.ca.clone(), options.certificates.clone()),
            proxies: Proxies::from_env(),
            insecure: options.insecure.iter().map(|name| name.to_ascii_lowercase()).collect(),
            connect_timeout: connect,
            idle_timeout: idle,
        }
    }

    /// Whether `host[:port]` may be spoken to without TLS.
    pub fn allows_plain(&self, authority: &str) -> bool {
        is_loopback(authority) || self.insecure.iter().any(|name| name == authority || name == host_of(authority))
    }

    fn agent(&self, url: &Url) -> Result<Agent> {
        if !url.tls {
            return Ok(self.plain.clone());
        }
        let directories = self.trust.directories(&url.authority);
        let mut agents = self.tls.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(agent) = agents.get(&directories) {
            return Ok(agent.clone());
        }
        let material = self.trust.material(&directories)?;
        let agent = agent(self.connect_timeout, self.idle_timeout, Some(material));
        agents.insert(directories, agent.clone());
        Ok(agent)
    }

    /// Sends a request and follows its redirects. An answer of any status is `Ok`; it comes with the address that
    /// gave it.
    pub fn send(&self, url: &Url, request: &Request) -> Result<(Response<Body>, Url)> {
        let mut url = url.clone();
        let mut authorization = request.authorization;
        for _ in 0..=MAX_REDIRECTS {
            let agent = self.agent(&url)?;
            let proxy = self.proxies.find(&url)?;
            let response = self.send_once(&agent, &url, proxy.as_ref(), request, authorization);
            let response = response.map_err(|error| match &proxy {
                Some(proxy) => self.explain_proxy(&url.authority, proxy, error),
                None => self.explain(&url.authority, error),
            })?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((response, url));
            }
            let location = text_header(response.headers(), "location")
                .with_context(|| format!("{} redirects to nowhere (no Location header)", url.authority))?;
            let next = url.join(location).with_context(|| format!("{} redirects to a bad address", url.authority))?;
            if !next.tls && (url.tls || !self.allows_plain(&next.authority)) {
                bail!("{} redirects to {} without TLS: refused", url.authority, next.authority);
            }
            if request.form.is_some() {
                bail!("{} redirects a request that holds a secret to {}: refused", url.authority, next.authority);
            }
            if !next.same_origin(&url) {
                authorization = None;
            }
            url = next;
        }
        bail!("{} redirects more than {MAX_REDIRECTS} times", url.authority)
    }

    fn send_once(
        &self,
        agent: &Agent,
        url: &Url,
        proxy: Option<&Chosen>,
        request: &Request,
        authorization: Option<&str>,
    ) -> std::result::Result<Response<Body>, ureq::Error> {
        let total = if request.long { None } else { Some(SMALL_DOCUMENT) };
        let address = url.to_string();
        let proxy = proxy.map(|chosen| chosen.proxy.clone());
        let mut headers = vec![];
        if let Some(value) = authorization {
            headers.push(("authorization", value.to_string()));
        }
        if let Some(value) = request.accept {
            headers.push(("accept", value.to_string()));
        }
        if request.from > 0 {
            headers.push(("range", format!("bytes={}-", request.from)));
        }
        match request.form {
            None => {
                let builder = agent.get(&address).config().timeout_global(total).proxy(proxy).build();
                headers.iter().fold(builder, |builder, (name, value)| builder.header(*name, value)).call()
            }
            Some(form) => {
                headers.push(("content-type", "application/x-www-form-urlencoded".to_string()));
                let builder = agent.post(&address).config().timeout_global(total).proxy(proxy).build();
                headers.iter().fold(builder, |builder, (name, value)| builder.header(*name, value)).send(form)
            }
        }
    }

    /// Reads a small document; one longer than `limit` bytes is an error that calls it `what`.
    pub fn read_small(&self, host: &str, response: &mut Response<Body>, limit: u64, what: &str) -> Result<Vec<u8>> {
        let too_long = || anyhow!("{host} sends {what} of more than {} KiB: refused", limit >> 10);
        if response.body().content_length().is_some_and(|length| length > limit) {
            return Err(too_long());
        }
        let mut bytes = vec![];
        let mut reader = response.body_mut().as_reader().take(limit.saturating_add(1));
        reader.read_to_end(&mut bytes).map_err(|error| self.explain_io(host, error))?;
        if bytes.len() as u64 > limit {
            return Err(too_long());
        }
        Ok(bytes)
    }

    /// An error met on the way through a proxy.
    fn explain_proxy(&self, host: &str, chosen: &Chosen, error: ureq::Error) -> anyhow::Error {
        use ureq::Timeout;
        let (proxy, variable) = (chosen.describe(), chosen.variable);
        let text = match &error {
            ureq::Error::ConnectProxyFailed(reason) if reason.contains("407") => {
                format!(
                    "{proxy} wants another user name and password: set {variable}=http://USER:PASSWORD@HOST:PORT, or \
                     name {} in NO_PROXY",
                    host_of(host)
                )
            }
            ureq::Error::ConnectProxyFailed(reason) => {
                format!("{proxy} gives no connection to {host} ({}); ask who runs it", clip(reason))
            }
            ureq::Error::HostNotFound => format!("the name of {proxy} cannot be resolved: check the variable"),
            ureq::Error::Io(io) if io.kind() == io::ErrorKind::ConnectionRefused => {
                format!("{proxy} refuses the connection: is it running?")
            }
            ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => {
                format!("no connection to {host} within {} through {proxy}", seconds(self.connect_timeout))
            }
            _ => return self.explain(host, error),
        };
        anyhow::Error::new(Transport { text, timeout: matches!(error, ureq::Error::Timeout(_)) })
    }

    /// An error of the transport in words, with the way out.
    pub fn explain(&self, host: &str, error: ureq::Error) -> anyhow::Error {
        use ureq::Timeout;
        // TLS errors met in a handshake come wrapped.
        let error = match error {
            ureq::Error::Io(io) => match io.downcast::<rustls::Error>() {
                Ok(tls) => ureq::Error::Rustls(tls),
                Err(io) => ureq::Error::Io(io),
            },
            other => other,
        };
        let text = match &error {
            ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => format!(
                "no connection to {host} within {}: check the address, the network and the proxy settings",
                seconds(self.connect_timeout)
            ),
            ureq::Error::Timeout(Timeout::Global) => {
                format!("{host} needs longer than {} to answer", seconds(SMALL_DOCUMENT))
            }
            ureq::Error::Timeout(_) => {
                format!("{host} has been silent for {}: it hangs; try again later", seconds(self.idle_timeout))
            }
            ureq::Error::HostNotFound => {
                format!("the name '{}' cannot be resolved: check the spelling and the network", host_of(host))
            }
            ureq::Error::Io(io) if io.kind() == io::ErrorKind::ConnectionRefused => {
                format!("{host} refuses the connection: is a registry running there?")
            }
            ureq::Error::Rustls(rustls::Error::InvalidCertificate(reason)) => format!(
                "the certificate of {host} is not accepted ({}): put its authority's into \
                 /etc/containers/certs.d/{host}/ca.crt, name the file in the setting 'registry_ca' or in SSL_CERT_FILE",
                clip(&format!("{reason:?}"))
            ),
            ureq::Error::Rustls(reason) => format!(
                "no TLS with {host} ({}): if it speaks plain HTTP only and you trust the network, \
                 name it in the setting 'insecure_registries'",
                clip(&reason.to_string())
            ),
            ureq::Error::Io(io) => format!("the connection to {host} failed: {io}"),
            other => format!("{host} cannot be spoken to: {}", clip(&other.to_string())),
        };
        anyhow::Error::new(Transport { text, timeout: matches!(error, ureq::Error::Timeout(_)) })
    }

    /// The same for an error met while reading a body.
    pub fn explain_io(&self, host: &str, error: io::Error) -> anyhow::Error {
        match error.downcast::<ureq::Error>() {
            Ok(error) => self.explain(host, error),
            Err(error) => self.explain(host, ureq::Error::Io(error)),
        }
    }
}

/// An error of the transport: trying again may help.
#[derive(Debug)]
pub(crate) struct Transport {
    text: String,
    /// The other side was silent for too long.
    pub timeout: bool,
}

impl std::fmt::Display for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Transport {}

fn seconds(duration: Duration) -> String {
    format!("{} s", (duration.as_millis() as f64 / 100.0).round() / 10.0)
}

/// A header's value, if it is text.
pub(crate) fn text_header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn agent(connect: Duration, idle: Duration, tls: Option<Material>) -> Agent {
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .user_agent(concat!("puter/", env!("CARGO_PKG_VERSION")))
        .timeout_resolve(Some(connect))
        .timeout_connect(Some(connect))
        .timeout_recv_response(Some(idle))
        .timeout_per_read(Some(idle))
        .timeout_per_write(Some(idle))
        .max_response_header_size(64 << 10)
        .max_idle_connections_per_host(8)
        // Each request names its own.
        .proxy(None);
    if let Some(Material { roots, client }) = tls {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = TlsConfig::builder()
            .root_certs(roots)
            .client_cert(client)
            .unversioned_rustls_crypto_provider(provider)
            .build();
        config = config.https_only(true).tls_config(tls);
    }
    config.build().into()
}
