//! Progress for people, on stderr: a spinner and bars on a terminal, plain lines elsewhere.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::image::{self, Digest, Stage};
use crate::vm::cancel;
use crate::vm::lifecycle::Observer;
use crate::vm::settings::show_size;

/// Shows what each VM's command waits for.
pub struct Progress {
    terminal: bool,
    bars: MultiProgress,
    steps: Mutex<BTreeMap<String, ProgressBar>>,
    pull: Mutex<Pull>,
}

/// What is drawn of a pull.
#[derive(Default)]
struct Pull {
    /// The stage that goes on, with its bar and its begin.
    stage: Option<(Stage, ProgressBar, Instant)>,
    layers: BTreeMap<String, ProgressBar>,
    /// Bytes of each layer that are here.
    done: BTreeMap<String, u64>,
    what: String,
}

impl Progress {
    pub fn new() -> Progress {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let terminal = std::io::stderr().is_terminal() && !dumb;
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Progress {
            terminal,
            bars: MultiProgress::with_draw_target(target),
            steps: Mutex::default(),
            pull: Mutex::default(),
        }
    }

    /// A bar for bytes whose number is not known beforehand.
    pub fn bytes(&self, what: &str) -> ProgressBar {
        let bar = self.bar(0, "{msg} {bytes} {bytes_per_sec}");
        bar.set_message(what.to_string());
        bar
    }

    /// Takes what is still drawn off the screen.
    pub fn finish(&self) {
        for bar in self.steps().values() {
            bar.finish_and_clear();
        }
        let _ = self.bars.clear();
    }

    fn pulling(&self) -> MutexGuard<'_, Pull> {
        self.pull.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn end_stage(&self, pull: &mut Pull) {
        for (_, bar) in std::mem::take(&mut pull.layers) {
            bar.finish_and_clear();
        }
        pull.done.clear();
        let Some((stage, bar, began)) = pull.stage.take() else { return };
        bar.finish_and_clear();
        let took = began.elapsed().as_secs_f64();
        // What was over in no time needs no line.
        if took >= 0.1 {
            self.line(&format!("image: {}{} {took:.1} s", stage.name(), std::mem::take(&mut pull.what)));
        }
    }

    fn bar(&self, length: u64, template: &str) -> ProgressBar {
        let bar = self.bars.add(ProgressBar::new(length));
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar
    }

    fn steps(&self) -> MutexGuard<'_, BTreeMap<String, ProgressBar>> {
        self.steps.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn line(&self, text: &str) {
        match self.terminal {
            true => drop(self.bars.println(text)),
            false => eprintln!("{text}"),
        }
    }
}

impl Observer for Progress {
    fn begin(&self, vm: &str, step: &str) {
        if !self.terminal {
            return;
        }
        let bar = self.bar(0, "{msg} {elapsed} {spinner}");
        bar.set_message(format!("{vm}: {step}"));
        bar.enable_steady_tick(Duration::from_millis(100));
        if let Some(former) = self.steps().insert(vm.to_string(), bar) {
            former.finish_and_clear();
        }
    }

    fn end(&self, vm: &str, step: &str, took: Duration) {
        if let Some(bar) = self.steps().remove(vm) {
            bar.finish_and_clear();
        }
        self.line(&format!("{vm}: {step} {:.1} s", took.as_secs_f64()));
    }

    fn note(&self, vm: &str, text: &str) {
        self.line(&format!("{vm}: {text}"));
    }

    fn pull(&self) -> &dyn image::Progress {
        self
    }

    fn pulled(&self) {
        self.end_stage(&mut self.pulling());
    }
}

const BYTES: &str = "{msg} [{bar:24}] {bytes}/{total_bytes} {bytes_per_sec} {eta} left";

impl image::Progress for Progress {
    fn stage(&self, stage: Stage) {
        let mut pull = self.pulling();
        self.end_stage(&mut pull);
        let bar = self.bar(0, "{msg} {elapsed} {spinner}");
        bar.set_message(format!("image: {}", stage.name()));
        if self.terminal {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        pull.stage = Some((stage, bar, Instant::now()));
    }

    fn total(&self, layers: usize, bytes: u64) {
        let mut pull = self.pulling();
        let plural = if layers == 1 { "" } else { "s" };
        pull.what = format!(" {layers} layer{plural}, {}", show_size(bytes));
        if let Some((_, bar, _)) = &mut pull.stage {
            bar.finish_and_clear();
            *bar = self.bar(bytes, BYTES);
            bar.set_message("image: downloading");
        }
    }

    fn layer_begin(&self, layer: &Digest, size: u64) {
        let bar = self.bar(size, BYTES);
        let name = layer.to_string();
        let short = name.split_once(':').map_or(name.as_str(), |(_, hex)| hex.get(..12).unwrap_or(hex));
        bar.set_message(format!("  {short}"));
        self.pulling().layers.insert(name, bar);
    }

    fn layer_advance(&self, layer: &Digest, done: u64) {
        let mut pull = self.pulling();
        let name = layer.to_string();
        if let Some(bar) = pull.layers.get(&name) {
            bar.set_position(done);
        }
        pull.done.insert(name, done);
        let sum = pull.done.values().sum();
        if let Some((_, bar, _)) = &pull.stage {
            bar.set_position(sum);
        }
    }

    fn layer_end(&self, layer: &Digest) {
        if let Some(bar) = self.pulling().layers.remove(&layer.to_string()) {
            bar.finish_and_clear();
        }
    }

    fn converted(&self, done: u64, total: u64) {
        let mut pull = self.pulling();
        if let Some((stage, bar, _)) = &mut pull.stage {
            if bar.length() != Some(total) {
                bar.finish_and_clear();
                *bar = self.bar(total, BYTES);
                bar.set_message(format!("image: {}", stage.name()));
            }
            bar.set_position(done);
        }
    }

    fn note(&self, text: &str) {
        self.line(&format!("image: {text}"));
    }

    fn cancelled(&self) -> bool {
        cancel::check().is_err()
    }
}
