//! A pull: its stage with a bar for all of it, and below that one for each layer on its way.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use indicatif::ProgressBar;

use super::Progress;
use crate::image::{self, Digest, Stage};
use crate::vm::cancel;
use crate::vm::settings::show_size;

/// More layers at once have no bar of their own; their bytes are in that of the whole.
const MOST_BARS: usize = 8;

/// Shows one pull until it is dropped.
pub struct Pull<'a> {
    screen: &'a Progress,
    what: String,
    at: Mutex<At>,
}

/// What is drawn.
#[derive(Default)]
struct At {
    /// The stage that goes on, with its bar and its begin.
    stage: Option<(Stage, ProgressBar, Instant)>,
    layers: BTreeMap<String, ProgressBar>,
    /// Bytes of each layer that are here.
    done: BTreeMap<String, u64>,
    /// What is downloaded: layers and bytes.
    load: Option<(usize, u64)>,
}

impl<'a> Pull<'a> {
    pub fn new(screen: &'a Progress, what: &str) -> Pull<'a> {
        Pull { screen, what: crate::vm::files::plain(what), at: Mutex::default() }
    }

    fn at(&self) -> MutexGuard<'_, At> {
        self.at.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn name(&self, stage: Stage) -> String {
        format!("{} {}", stage.name(), self.what)
    }

    /// Takes the stage off the screen; one that ended well and took its time leaves a line.
    fn end_stage(&self, at: &mut At, well: bool) {
        for (_, bar) in std::mem::take(&mut at.layers) {
            bar.finish_and_clear();
        }
        at.done.clear();
        let load = at.load.take().filter(|(layers, _)| *layers > 0);
        let Some((stage, bar, began)) = at.stage.take() else { return };
        bar.finish_and_clear();
        let took = began.elapsed().as_secs_f64();
        // What was over in no time needs no line, unless it used the network.
        if well && (took >= 0.1 || load.is_some()) {
            let plural = |layers| if layers == 1 { "" } else { "s" };
            let load = load.map(|(layers, bytes)| format!(" {layers} layer{}, {}", plural(layers), show_size(bytes)));
            self.screen.line(&format!("{}: {}{} {took:.1} s", self.what, stage.name(), load.unwrap_or_default()));
        }
    }
}

impl Drop for Pull<'_> {
    fn drop(&mut self) {
        let mut at = self.at();
        // Only what has come to its end leaves a line: nothing follows the last stage of a pull that went well.
        let well = matches!(at.stage, Some((Stage::Finishing, ..)));
        self.end_stage(&mut at, well);
    }
}

impl image::Progress for Pull<'_> {
    fn stage(&self, stage: Stage) {
        let mut at = self.at();
        self.end_stage(&mut at, true);
        let bar = self.screen.spinner(&self.name(stage));
        at.stage = Some((stage, bar, Instant::now()));
    }

    fn total(&self, layers: usize, bytes: u64) {
        let mut at = self.at();
        at.load = Some((layers, bytes));
        if let Some((stage, bar, _)) = &at.stage {
            self.screen.make_meter(bar, &self.name(*stage), bytes);
        }
    }

    fn layer_begin(&self, layer: &Digest, size: u64) {
        let mut at = self.at();
        if at.layers.len() < MOST_BARS {
            let bar = self.screen.meter(&format!("  layer {}", layer.short()), Some(size));
            at.layers.insert(layer.to_string(), bar);
        }
    }

    fn layer_advance(&self, layer: &Digest, done: u64) {
        let mut at = self.at();
        let name = layer.to_string();
        if let Some(bar) = at.layers.get(&name) {
            bar.set_position(done);
        }
        at.done.insert(name, done);
        let sum = at.done.values().sum();
        if let Some((_, bar, _)) = &at.stage {
            bar.set_position(sum);
        }
    }

    fn layer_end(&self, layer: &Digest) {
        if let Some(bar) = self.at().layers.remove(&layer.to_string()) {
            bar.finish_and_clear();
        }
    }

    fn converted(&self, done: u64, total: u64) {
        if let Some((stage, bar, _)) = &self.at().stage {
            if bar.length() != Some(total) {
                self.screen.make_meter(bar, &self.name(*stage), total);
            }
            bar.set_position(done);
        }
    }

    fn note(&self, text: &str) {
        self.screen.line(&format!("{}: {text}", self.what));
    }

    fn cancelled(&self) -> bool {
        cancel::check().is_err()
    }
}
