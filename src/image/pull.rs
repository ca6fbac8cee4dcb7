//! A pull from beginning to end.
//!
//! The network is spoken to by threads of their own, which share nothing with the caller but a channel and a flag:
//! so the caller can leave at once, whatever a registry does.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::arrival::{Arrival, Arrivals};
use super::blob::{self, Event};
use super::convert::{self, Beside};
use super::digest::Digest;
use super::files::{self, Directory};
use super::manifest::{self, Document, MAX_CONFIG, Manifest};
use super::progress::{Cancelled, Progress, PullOptions, Stage, TICK, is_cancelled};
use super::reference::{Reference, RegistryReference};
use super::registry::{Registry, Stop};
use super::source::{Layer, Plan, check_total};
use super::store::{Hold, Store};
use super::{docker_archive, mirror, oci_layout};

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
            make(directory, &source, options, &hold, progress)?;
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

    /// What is to be converted, and the download that goes on meanwhile.
    fn begin(
        &self,
        directory: &Directory,
        options: &PullOptions,
        hold: &Arc<Hold>,
    ) -> Result<(Plan, Option<Apart<()>>)> {
        let (stop, registries, manifest, config, checked) = match self {
            Source::Local(plan) => return Ok((plan.clone(), None)),
            Source::Remote { stop, registries, manifest, config, checked } => {
                (stop, registries, manifest, config, checked)
            }
        };
        let missing = manifest.layers.iter().filter(|layer| !directory.has_blob(&layer.digest, layer.size));
        let arrivals: Arrivals = missing.map(|layer| (layer.digest, Arc::new(Arrival::new(stop.clone())))).collect();
        let layers = manifest.layers.iter().zip(&checked.diff_ids).map(|(layer, diff_id)| Layer {
            path: directory.blob(&layer.digest),
            offset: 0,
            length: layer.size,
            digest: Some(layer.digest),
            diff_id: *diff_id,
            arrival: arrivals.get(&layer.digest).cloned(),
        });
        let (digest, architecture) = (manifest.digest, checked.architecture.clone());
        let plan = Plan { digest, architecture, config: config.clone(), layers: layers.collect() };
        let (target, patience) = (directory.clone(), (options.parallel, options.retries));
        let (registries, layers) = (registries.clone(), manifest.layers.clone());
        let (hold, readers) = (hold.clone(), stop.clone());
        let download = Apart::start(stop.clone(), move |events| {
            let result = mirror::first(&registries, events, |registry| {
                blob::download_all(registry, &target, &layers, &arrivals, patience, events)
            });
            drop(hold);
            if result.is_err() {
                // Who waits for bytes waits in vain.
                readers.set();
            }
            result.map(drop)
        })?;
        Ok((plan, Some(download)))
    }
}

/// Downloads what is not here and converts it at the same time.
fn make(
    directory: &Directory,
    source: &Source,
    options: &PullOptions,
    hold: &Arc<Hold>,
    progress: &dyn Progress,
) -> Result<()> {
    loop {
        let (plan, apart) = source.begin(directory, options, hold)?;
        progress.stage(if apart.is_some() { Stage::Downloading } else { Stage::Converting });
        let download = Download { apart, progress, ended: Cell::new(false) };
        let Err(failed) = convert::convert(directory, &plan, options, progress, &download) else { return Ok(()) };
        // Bytes that cannot be used may have come damaged, or not at all: then that is the reason.
        if let Err(error) = download.wait() {
            download.abandon();
            return Err(error);
        }
        if is_cancelled(&failed.error) || failed.is_of_the_host() {
            return Err(failed.error);
        }
        let own: Vec<&Layer> = plan.layers.iter().filter(|layer| layer.path.starts_with(&directory.root)).collect();
        let from_the_cache = own.iter().filter(|layer| layer.arrival.is_none());
        let damaged: Vec<_> = from_the_cache.filter(|layer| layer.is_intact().is_ok_and(|is| !is)).collect();
        for layer in &damaged {
            progress.note(&format!("{} is damaged and is fetched anew", layer.path.display()));
            files::remove(&layer.path);
        }
        let anew = own.iter().filter_map(|layer| layer.arrival.as_ref()).any(|arrival| arrival.began_anew());
        if damaged.is_empty() && !anew {
            // A layer that cannot be used today cannot be used tomorrow.
            let blamed = failed.layers.iter().filter_map(|number| own.get(*number));
            blamed.for_each(|layer| files::remove(&layer.path));
            return Err(failed.error);
        }
    }
}

/// A download beside the conversion.
struct Download<'a> {
    apart: Option<Apart<()>>,
    progress: &'a dyn Progress,
    /// Well, and that is known.
    ended: Cell<bool>,
}

impl Download<'_> {
    /// Ends it.
    fn abandon(self) {
        if let Some(apart) = self.apart {
            apart.end(self.progress);
        }
    }
}

impl Beside for Download<'_> {
    fn look(&self) -> bool {
        let Some(apart) = &self.apart else { return false };
        let before = apart.over.get();
        apart.forward(self.progress);
        if apart.over.get() && !before {
            self.progress.stage(Stage::Converting);
        }
        !apart.over.get()
    }

    fn wait(&self) -> Result<()> {
        let Some(apart) = self.apart.as_ref().filter(|_| !self.ended.get()) else { return Ok(()) };
        apart.wait(self.progress)?;
        self.ended.set(true);
        Ok(())
    }

    fn stop(&self) {
        if let Some(apart) = &self.apart {
            apart.stop.set();
        }
    }
}

/// Runs `work` on a thread of its own, passes on what it tells, and leaves it behind if the caller wants to end.
fn apart<T: Send + 'static>(
    stop: Stop,
    progress: &dyn Progress,
    work: impl FnOnce(&Sender<Event>) -> Result<T> + Send + 'static,
) -> Result<T> {
    let apart = Apart::start(stop, work)?;
    let result = apart.wait(progress);
    if result.is_err() {
        apart.end(progress);
    }
    result
}

/// Work on a thread of its own.
struct Apart<T> {
    stop: Stop,
    events: Receiver<Event>,
    result: Receiver<Result<T>>,
    /// Nothing will be told any more.
    over: Cell<bool>,
}

impl<T: Send + 'static> Apart<T> {
    fn start(stop: Stop, work: impl FnOnce(&Sender<Event>) -> Result<T> + Send + 'static) -> Result<Apart<T>> {
        let (events, received) = mpsc::channel();
        let (sender, result) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("pull".into()).spawn(move || {
            let outcome = work(&events);
            let _ = sender.send(outcome);
        });
        thread.context("cannot start a thread")?;
        Ok(Apart { stop, events: received, result, over: Cell::new(false) })
    }

    /// Passes on what has been told.
    fn forward(&self, progress: &dyn Progress) {
        loop {
            match self.events.try_recv() {
                Ok(event) => self.pass_on(progress, event),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => return self.over.set(true),
            }
        }
    }

    /// Waits for the result.
    fn wait(&self, progress: &dyn Progress) -> Result<T> {
        loop {
            match self.events.recv_timeout(TICK) {
                Ok(event) => self.pass_on(progress, event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    self.over.set(true);
                    let ended = self.result.recv();
                    return ended.unwrap_or_else(|_| Err(anyhow!("the download's thread ended without a word")));
                }
            }
            if progress.cancelled() {
                return Err(Cancelled.into());
            }
        }
    }

    /// Tells it to stop, and waits a little for that.
    fn end(self, progress: &dyn Progress) {
        self.stop.set();
        let end = Instant::now() + FAREWELL;
        while Instant::now() < end {
            match self.events.recv_timeout(TICK) {
                Ok(event) => self.pass_on(progress, event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    }

    fn pass_on(&self, progress: &dyn Progress, event: Event) {
        match event {
            Event::Total(layers, bytes) => progress.total(layers, bytes),
            Event::Begin(layer, size) => progress.layer_begin(&layer, size),
            Event::Advance(layer, done) => progress.layer_advance(&layer, done),
            Event::End(layer) => progress.layer_end(&layer),
            Event::Note(text) => progress.note(&text),
        }
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
