//! Progress for people, on stderr: spinners and bars on a terminal, of a cluster a table of its members; elsewhere a plain
//! line when something has ended.

mod line;
mod pull;
mod screen;
mod table;

use std::collections::BTreeMap;
use std::fmt;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use crate::image;
use crate::vm::files::plain;
use crate::vm::lifecycle::Observer;
use line::{Measure, clip, lay_out};
use pull::Pull;
use screen::{Screen, size};
use table::Table;

/// Times in a second that the screen is drawn at most.
const RATE: u8 = 20;
/// How often a bar is drawn although nothing moves.
const TICK: Duration = Duration::from_millis(100);
/// Rows of the terminal that a table leaves to others: a pull, and what was printed before.
const SPARE: usize = 4;
/// A table has so many rows, whatever the terminal's height.
const FEWEST: usize = 3;

/// The bars that are on the terminal.
static SHOWN: Mutex<Option<MultiProgress>> = Mutex::new(None);

/// Writes to the terminal while no bar is there: what is written stays, and the bars are below it.
pub fn aside<T>(write: impl FnOnce() -> T) -> T {
    let shown = SHOWN.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
    match shown {
        Some(bars) => bars.suspend(write),
        None => write(),
    }
}

/// Shows what each VM's command waits for.
pub struct Progress {
    terminal: bool,
    bars: MultiProgress,
    steps: Mutex<BTreeMap<String, ProgressBar>>,
    /// The VMs that are worked on together, and their place on the terminal.
    table: Arc<Mutex<Table>>,
    drawn: Mutex<Option<ProgressBar>>,
}

impl Progress {
    pub fn new() -> Progress {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let terminal = std::io::stderr().is_terminal() && !dumb;
        let target = match terminal {
            true => ProgressDrawTarget::term_like_with_hz(Box::<Screen>::default(), RATE),
            false => ProgressDrawTarget::hidden(),
        };
        let bars = MultiProgress::with_draw_target(target);
        if terminal {
            *SHOWN.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(bars.clone());
        }
        Progress { terminal, bars, steps: Mutex::default(), table: Arc::default(), drawn: Mutex::default() }
    }

    /// A bar for bytes whose number is not known beforehand.
    pub fn bytes(&self, what: &str) -> ProgressBar {
        self.meter(what, None)
    }

    /// Takes what is still drawn off the screen; what became of VMs that were worked on together stays.
    pub fn finish(&self) {
        let drawn = lock(&self.drawn).take();
        if let Some(bar) = &drawn {
            bar.finish_and_clear();
        }
        for bar in self.steps().values() {
            bar.finish_and_clear();
        }
        let _ = self.bars.clear();
        if drawn.is_some() {
            eprintln!("{}", rows(&self.table));
        }
    }

    /// A bar for bytes.
    fn meter(&self, what: &str, total: Option<u64>) -> ProgressBar {
        let bar = match total {
            Some(total) => ProgressBar::new(total),
            None => ProgressBar::no_length(),
        };
        self.add(bar, meter_style(what))
    }

    /// Has a bar, such as a spinner, show bytes from now on.
    fn make_meter(&self, bar: &ProgressBar, what: &str, total: u64) {
        bar.set_length(total);
        bar.set_position(0);
        bar.reset_eta();
        if let Some(style) = meter_style(what) {
            bar.set_style(style);
        }
        bar.force_draw();
    }

    /// A sign that something goes on.
    fn spinner(&self, what: &str) -> ProgressBar {
        let name = plain(what);
        let style = style(move |state, w| {
            let sign = ["|", "/", "-", "\\"][(state.elapsed().as_millis() / TICK.as_millis()) as usize % 4];
            let text = format!("{name} {} s {sign}", state.elapsed().as_secs());
            let _ = w.write_str(&clip(&text, usize::from(size().0).saturating_sub(1)));
        });
        self.add(ProgressBar::no_length(), style)
    }

    fn add(&self, bar: ProgressBar, style: Option<ProgressStyle>) -> ProgressBar {
        let bar = self.bars.add(bar);
        if let Some(style) = style {
            bar.set_style(style);
        }
        if self.terminal {
            bar.tick();
            bar.enable_steady_tick(TICK);
        }
        bar
    }

    fn steps(&self) -> MutexGuard<'_, BTreeMap<String, ProgressBar>> {
        lock(&self.steps)
    }

    /// Prints a line that stays. What a registry or a guest said steers no terminal.
    fn line(&self, text: &str) {
        let text = plain(text);
        match self.terminal {
            true => drop(self.bars.println(text)),
            false => eprintln!("{text}"),
        }
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The table as it is now, for the terminal as it is now.
fn rows(table: &Mutex<Table>) -> String {
    let (columns, rows) = size();
    let most = usize::from(rows).saturating_sub(SPARE).max(FEWEST);
    lock(table).lay_out(Instant::now(), columns.into(), most).join("\n")
}

/// A line that is written by this.
fn style(write: impl Fn(&ProgressState, &mut dyn fmt::Write) + Clone + Send + Sync + 'static) -> Option<ProgressStyle> {
    Some(ProgressStyle::with_template("{line}").ok()?.with_key("line", write))
}

fn meter_style(what: &str) -> Option<ProgressStyle> {
    let name = plain(what);
    style(move |state, w| {
        let at = Measure { done: state.pos(), total: state.len(), rate: state.per_sec(), left: state.eta() };
        let _ = w.write_str(&lay_out(&name, at, size().0.into()));
    })
}

impl Observer for Progress {
    fn begin(&self, vm: &str, step: &str) {
        if !self.terminal {
            return;
        }
        let mut table = lock(&self.table);
        if table.has(vm) {
            return table.begin(vm, step, Instant::now());
        }
        drop(table);
        let bar = self.spinner(&format!("{vm}: {step}"));
        if let Some(former) = self.steps().insert(vm.to_string(), bar) {
            former.finish_and_clear();
        }
    }

    fn end(&self, vm: &str, step: &str, took: Duration) {
        // Its row tells.
        if self.terminal && lock(&self.table).has(vm) {
            return;
        }
        if let Some(bar) = self.steps().remove(vm) {
            bar.finish_and_clear();
        }
        self.line(&format!("{vm}: {step} {:.1} s", took.as_secs_f64()));
    }

    fn note(&self, vm: &str, text: &str) {
        self.line(&format!("{vm}: {text}"));
    }

    fn together(&self, vms: &[(&str, &str)]) {
        if !self.terminal || vms.is_empty() {
            return;
        }
        {
            let mut table = lock(&self.table);
            vms.iter().for_each(|(vm, name)| table.add(vm, name));
        }
        lock(&self.drawn).get_or_insert_with(|| {
            let table = self.table.clone();
            let style = style(move |_, w| {
                let _ = w.write_str(&rows(&table));
            });
            self.add(ProgressBar::no_length(), style)
        });
    }

    fn ended(&self, vm: &str, error: Option<&anyhow::Error>) {
        let why = error.map(|error| format!("{error:#}"));
        lock(&self.table).end(vm, why.as_deref(), Instant::now());
    }

    fn pull<'a>(&'a self, what: &str) -> Box<dyn image::Progress + 'a> {
        Box::new(Pull::new(self, what))
    }
}
