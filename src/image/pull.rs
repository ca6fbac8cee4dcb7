//! A pull from beginning to end.
//!
//! The network is spoken to by threads of their own, which share nothing with the caller but a channel and a flag:
//! so the caller can leave at once, whatever a registry does.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::blob::{self, Event};
use super::digest::Digest;
use super::files::{self, Directory};
use super::manifest::{self, Document, MAX_CONFIG, Manifest};
use super::progress::{Cancelled, Progress, PullOptions, Stage};
use super::reference::{Reference, RegistryReference};
use super::registry::{Registry, Stop};
use super::source::{Layer, Plan, check_total};
use super::store::{Hold, Store};
use super::{convert, docker_archive, mirror, oci_layout};

/// How often the caller is asked whether it wants to go on.
const TICK: Duration = Duration::from_millis(50);
/// How long a thread that was told to stop is waited for.
const FAREWELL: Duration = Duration::from_millis(300);

/// Pulls, and returns the digest of the image, whose disk is then in the store.
pub(crate) fn pull(
    directory: &Directory,
    store: &Store,
    reference: &Reference,
    options: &PullOptions,
    progress: &dyn Progress,
) -> Result<Digest> {
    let check = || if progress.cancelled() { Err(Cancelled.into()) } else { Ok(()) };
    let hold = Arc::new(store.hold_unless(&check)?);
    progress.stage(Stage::Resolving);
    let architecture = options.architecture();
    let source = match reference {
        Reference::Registry(remote) => Source::registry(remote, options, progress)?,
        Reference::OciLayout { directory, tag } => {
            Source::Local(oci_layout::plan(directory, tag.as_deref(), architecture, options.max_download)?)
        }
        Reference::DockerArchive { file, tag } => {
            Source::Local(docker_archive::plan(file, tag.as_deref(), architecture, options.max_download)?)
        }
    };
    let digest = source.digest();
    if store.record(&digest)?.is_none() {
        let lock = directory.temporary(&format!("disk-{}.lock", digest.hex()));
        let waiting = std::cell::Cell::new(0_u32);
        let _lock = files::lock(&lock, &|| {
            waiting.set(waiting.get().saturating_add(1));
            if waiting.get() == 2 {
                progress.stage(Stage::Waiting);
            }
            check()
        })?;
        // Whoever held the lock may have made it meanwhile.
        if store.record(&digest)?.is_none() {
            let plan = source.fetch(directory, options, &hold, progress)?;
            convert::convert(directory, &plan, options, progress)?;
        }
    }
    store.name(reference, &digest)?;
    Ok(digest)
}

enum Source {
    Local(Plan),
    /// `registries` begin with the one that had the manifest.
    Remote {
        stop: Stop,
        registries: Arc<[Registry]>,
        manifest: Manifest,
        config: Vec<u8>,
        checked: manifest::Config,
    },
}

impl Source {
    fn registry(reference: &RegistryReference, options: &PullOptions, progress: &dyn Progress) -> Result<Source> {
        let stop = Stop::default();
        let places = mirror::places(reference, &options.mirrors)?;
        let registries = places.iter().map(|place| Registry::new(place, options, stop.child())).collect();
        let architecture = options.architecture().to_string();
        let max_download = options.max_download;
        let (registries, (manifest, config, checked)) = apart(stop.clone(), progress, move |events| {
            let registries: Vec<Registry> = registries;
            let (at, found) = mirror::first(&registries, events, |registry| {
                let manifest = resolve(registry, &architecture)?;
                check_total(manifest.layers.iter().map(|layer| layer.size), max_download)?;
                let config = small_blob(registry, &manifest)?;
                let checked = manifest::parse_config(&config, manifest.layers.len(), &architecture)?;
                Ok((manifest, config, checked))
            })?;
            Ok((registries.into_iter().skip(at).collect(), found))
        })?;
        Ok(Source::Remote { stop, registries, manifest, config, checked })
    }

    fn digest(&self) -> Digest {
        match self {
            Source::Local(plan) => plan.digest,
            Source::Remote { manifest, .. } => manifest.digest,
        }
    }

    fn fetch(
        self,
        directory: &Directory,
        options: &PullOptions,
        hold: &Arc<Hold>,
        progress: &dyn Progress,
    ) -> Result<Plan> {
        let (stop, registries, manifest, config, checked) = match self {
            Source::Local(plan) => return Ok(plan),
            Source::Remote { stop, registries, manifest, config, checked } => {
                (stop, registries, manifest, config, checked)
            }
        };
        progress.stage(Stage::Downloading);
        let (target, parallel, retries) = (directory.clone(), options.parallel, options.retries);
        let (layers, hold) = (manifest.layers.clone(), hold.clone());
        apart(stop, progress, move |events| {
            let result = mirror::first(&registries, events, |registry| {
                blob::download_all(registry, &target, &layers, parallel, retries, events)
            });
            drop(hold);
            result
        })?;
        let layers = manifest.layers.iter().zip(checked.diff_ids).map(|(layer, diff_id)| Layer {
            path: directory.blob(&layer.digest),
            offset: 0,
            length: layer.size,
            digest: Some(layer.digest),
            diff_id,
        });
        Ok(Plan { digest: manifest.digest, architecture: checked.architecture, config, layers: layers.collect() })
    }
}

/// Runs `work` on a thread of its own, passes on what it tells, and leaves it behind if the caller wants to end.
fn apart<T: Send + 'static>(
    stop: Stop,
    progress: &dyn Progress,
    work: impl FnOnce(&Sender<Event>) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (events, received) = mpsc::channel();
    let (sender, result) = mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name("pull".into())
        .spawn(move || {
            let outcome = work(&events);
            let _ = sender.send(outcome);
        })
        .context("cannot start a thread")?;
    loop {
        match received.recv_timeout(TICK) {
            Ok(event) => forward(progress, event),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return result.recv().unwrap_or_else(|_| Err(anyhow!("the download's thread ended without a word")));
            }
        }
        if progress.cancelled() {
            stop.set();
            let end = Instant::now() + FAREWELL;
            while Instant::now() < end && !matches!(received.recv_timeout(TICK), Err(RecvTimeoutError::Disconnected)) {}
            return Err(Cancelled.into());
        }
    }
}

fn forward(progress: &dyn Progress, event: Event) {
    match event {
        Event::Total(layers, bytes) => progress.total(layers, bytes),
        Event::Begin(layer, size) => progress.layer_begin(&layer, size),
        Event::Advance(layer, done) => progress.layer_advance(&layer, done),
        Event::End(layer) => progress.layer_end(&layer),
        Event::Note(text) => progress.note(&text),
    }
}

/// Follows the reference to the manifest of one image.
fn resolve(registry: &Registry, architecture: &str) -> Result<Manifest> {
    let mut wanted = None;
    for _ in 0..3 {
        let raw = registry.manifest(wanted.as_ref())?;
        let parsed = manifest::parse(&raw.bytes, &raw.content_type, architecture);
        match parsed.with_context(|| format!("'{}' cannot be used", registry.reference))? {
            Document::Image(image) => return Ok(image),
            Document::Index(inner) => wanted = Some(inner.digest),
        }
    }
    bail!("the indexes of '{}' are nested too deep", registry.reference)
}

/// The image's configuration, verified.
fn small_blob(registry: &Registry, manifest: &Manifest) -> Result<Vec<u8>> {
    let wanted = &manifest.config;
    if wanted.size > MAX_CONFIG {
        bail!(
            "the image's configuration has {} MiB: more than {} MiB are refused",
            wanted.size >> 20,
            MAX_CONFIG >> 20
        );
    }
    let (mut response, url) = registry.blob(&wanted.digest, 0)?;
    let bytes = registry.client.read_small(&url.authority, &mut response, MAX_CONFIG, "a configuration")?;
    let found = Digest::of(&bytes);
    if found != wanted.digest {
        bail!(
            "{} sends a wrong configuration: its digest is {found} instead of {}; nothing of it is used",
            url.authority,
            wanted.digest
        );
    }
    Ok(bytes)
}
