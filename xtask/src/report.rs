//! What the benchmarks found, as one report: a table in Markdown and a plot in SVG.
//!
//! A benchmark tells each figure as a line on its standard output, where the environment asks for it; `cargo xtask bench`
//! gathers them.

mod plot;

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::shell;

/// Where it is set, figures are told.
pub const VARIABLE: &str = "PUTER_BENCH_FIGURES";
/// What such a line begins with.
const MARK: &str = "figure: ";

/// What the peer needed for the same, in the same run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Peer {
    pub name: String,
    pub value: f64,
}

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// The benchmark.
    pub bench: String,
    pub what: String,
    pub value: f64,
    pub unit: String,
    /// Whether a larger one is better.
    pub more: bool,
    pub peer: Option<Peer>,
    /// What the figure, divided by the peer's, is meant to be at most, or at least where more is better.
    pub goal: Option<f64>,
}

impl Figure {
    /// A figure of which less is better.
    pub fn new(bench: &str, what: &str, value: f64, unit: &str) -> Figure {
        let (bench, what, unit) = (bench.to_owned(), what.to_owned(), unit.to_owned());
        Figure { bench, what, value, unit, more: false, peer: None, goal: None }
    }

    /// More of it is better.
    #[must_use]
    pub fn more(mut self) -> Figure {
        self.more = true;
        self
    }

    #[must_use]
    pub fn against(mut self, name: &str, value: f64) -> Figure {
        self.peer = Some(Peer { name: name.to_owned(), value });
        self
    }

    #[must_use]
    pub fn goal(mut self, ratio: f64) -> Figure {
        self.goal = Some(ratio);
        self
    }

    /// The figure divided by the peer's.
    pub fn ratio(&self) -> Option<f64> {
        self.peer.as_ref().filter(|peer| peer.value > 0.0).map(|peer| self.value / peer.value)
    }

    /// What puter costs for each unit that the peer costs: below 1 puter is better.
    pub fn cost(&self) -> Option<f64> {
        self.ratio().map(|ratio| if self.more { 1.0 / ratio } else { ratio })
    }

    fn is_reached(&self) -> Option<bool> {
        let (ratio, goal) = (self.ratio()?, self.goal?);
        Some(if self.more { ratio > goal } else { ratio < goal })
    }

    /// Tells it to who asked for a report, if anybody did.
    pub fn tell(&self) {
        if env::var_os(VARIABLE).is_some() {
            println!("{MARK}{}", serde_json::to_string(self).expect("a figure is JSON"));
        }
    }

    /// The figure of a line, where that tells one.
    ///
    /// # Errors
    /// When the line has a figure's mark, and something else after it.
    pub fn of_line(line: &str) -> Result<Option<Figure>> {
        let Some(text) = line.strip_prefix(MARK) else { return Ok(None) };
        serde_json::from_str(text).map(Some).with_context(|| format!("not a figure: {text}"))
    }
}

/// The machine and the programs that were measured, a line each.
pub fn machine() -> Vec<(String, String)> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once([':', '='])?.1.trim().trim_matches('"').to_owned())
    };
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = field(&read("/proc/meminfo"), "MemTotal").and_then(|text| text.split(' ').next()?.parse::<f64>().ok());
    let first = |program: &str, word: &str| {
        let said = shell::output(Command::new(program).arg(word)).ok()?;
        said.lines().next().map(str::to_owned)
    };
    let load = read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" ");
    let all = [
        ("processors", field(&read("/proc/cpuinfo"), "model name").map(|model| format!("{cpus}, {model}"))),
        ("memory", memory.map(|kib| format!("{:.1} GiB", kib / 1024.0 / 1024.0))),
        ("kernel", Some(read("/proc/sys/kernel/osrelease").trim().to_owned())),
        ("system", field(&read("/etc/os-release"), "PRETTY_NAME")),
        ("load at the end", Some(load)),
        ("QEMU", first("qemu-system-x86_64", "--version")),
        ("libvirt", first("virsh", "--version")),
        ("dnsmasq", first("dnsmasq", "--version")),
        ("Kea", first("kea-dhcp4", "-v")),
        ("skopeo", first("skopeo", "--version")),
        ("umoci", first("umoci", "--version")),
    ];
    all.into_iter().filter_map(|(name, text)| Some((name.to_owned(), text?))).collect()
}

/// The one in the middle; of none, 0.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// `VmRSS` of a process's status, in MiB (proc_pid_status(5)).
///
/// # Errors
/// When the text has none.
pub fn resident(status: &str) -> Result<f64> {
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    Ok(kib.with_context(|| format!("no VmRSS in '{status}'"))? / 1024.0)
}

/// A number with three digits that count.
fn short(value: f64) -> String {
    let digits = if value == 0.0 { 0 } else { (2 - value.abs().log10().floor() as i32).clamp(0, 4) as usize };
    format!("{value:.digits$}")
}

/// The report in Markdown; `failed` are the benchmarks that did not come to their end.
pub fn markdown(figures: &[Figure], machine: &[(String, String)], failed: &[String]) -> String {
    let mut text = String::from(
        "# Benchmarks of puter\n\nEach figure and its peer's were measured in the same run, on one machine. The ratio is \
         puter's figure divided by the peer's.\n\n![Cost against peers](report.svg)\n\n| | |\n| --- | --- |\n",
    );
    for (name, what) in machine {
        let _ = writeln!(text, "| {name} | {what} |");
    }
    for what in failed {
        let _ = writeln!(text, "\nThe benchmark `{what}` failed: its figures are missing or not all there.");
    }
    let mut benches: Vec<&str> = Vec::new();
    for figure in figures {
        if !benches.contains(&figure.bench.as_str()) {
            benches.push(&figure.bench);
        }
    }
    for bench in benches {
        let _ = writeln!(text, "\n## {bench}\n\n| | puter | peer | ratio | goal |\n| --- | --- | --- | --- | --- |");
        for figure in figures.iter().filter(|figure| figure.bench == bench) {
            let unit = &figure.unit;
            let peer = figure.peer.as_ref().map(|peer| format!("{} {unit} ({})", short(peer.value), peer.name));
            let ratio = figure.ratio().map(short);
            let goal = figure.goal.map(|goal| {
                let word = if figure.more { "above" } else { "below" };
                let reached = if figure.is_reached() == Some(true) { "" } else { ": **not reached**" };
                format!("{word} {goal}{reached}")
            });
            let [peer, ratio, goal] = [peer, ratio, goal].map(Option::unwrap_or_default);
            let _ = writeln!(text, "| {} | {} {unit} | {peer} | {ratio} | {goal} |", figure.what, short(figure.value));
        }
    }
    text
}

/// Writes the report and its plot, and tells where it is.
///
/// # Errors
/// When a file cannot be written.
pub fn write(directory: &Path, figures: &[Figure], failed: &[String]) -> Result<()> {
    let report = directory.join("report.md");
    for (path, text) in
        [(&report, markdown(figures, &machine(), failed)), (&directory.join("report.svg"), plot::svg(figures))]
    {
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("\n{}", report.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn figures() -> Vec<Figure> {
        vec![
            Figure::new("net", "exchanges", 3000.0, "/s").more().against("dnsmasq", 1000.0).goal(2.0),
            Figure::new("net", "a TAP <made>", 6.5, "ms").against("ip & nft", 10.0).goal(0.25),
            Figure::new("cli", "the executable", 7.8, "MiB"),
        ]
    }

    #[test]
    fn ratios_and_goals_are_of_what_is_better() {
        let all = figures();
        assert_eq!(all.iter().map(Figure::ratio).collect::<Vec<_>>(), [Some(3.0), Some(0.65), None]);
        assert_eq!(all.iter().map(Figure::is_reached).collect::<Vec<_>>(), [Some(true), Some(false), None]);
        assert!((all[0].cost().unwrap() - 1.0 / 3.0).abs() < 1e-9);
        assert_eq!(Figure::new("x", "y", 1.0, "s").against("broken", 0.0).ratio(), None);
    }

    #[test]
    fn a_report_has_each_figure_and_what_was_missed() {
        let text = markdown(&figures(), &[("kernel".into(), "6.1".into())], &["image".into()]);
        assert!(text.contains("| exchanges | 3000 /s | 1000 /s (dnsmasq) | 3.00 | above 2 |"), "{text}");
        assert!(text.contains("| a TAP <made> | 6.50 ms | 10.0 ms (ip & nft) | 0.650 | below 0.25: **not reached** |"));
        assert!(text.contains("| the executable | 7.80 MiB |  |  |  |") && text.contains("| kernel | 6.1 |"));
        assert!(text.contains("`image` failed"));
    }

    #[test]
    fn numbers_keep_three_digits() {
        let all = [0.0, 0.012_345, 0.5, 9.87, 12.34, 123.4, 12_345.6].map(short);
        assert_eq!(all, ["0", "0.0123", "0.500", "9.87", "12.3", "123", "12346"]);
    }
}
