//! The members of a cluster that are worked on together: a row for each, with what it is at and for how long. Pure.

use std::time::{Duration, Instant};

use super::line::clip;
use crate::vm::files::plain;

/// A row that is wider tells no more.
const WIDEST: usize = 120;
/// Columns of the time, at the end of a row.
const TIME: usize = 8;
/// A phase has as many columns at least, so that rows seldom move.
const SHORTEST_PHASE: usize = 24;

/// The rows, in the order in which they came.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    vm: String,
    name: String,
    at: At,
}

#[derive(Debug)]
enum At {
    Waits,
    Works {
        phase: String,
        /// When the first phase began.
        since: Instant,
    },
    Ended {
        /// Why it failed.
        failed: Option<String>,
        took: Duration,
    },
}

impl Row {
    fn phase(&self) -> String {
        match &self.at {
            At::Waits => "waits".into(),
            At::Works { phase, .. } => phase.clone(),
            At::Ended { failed: None, .. } => "ok".into(),
            At::Ended { failed: Some(why), .. } => format!("failed: {why}"),
        }
    }

    fn time(&self, now: Instant) -> String {
        match &self.at {
            At::Waits => String::new(),
            At::Works { since, .. } => format!("{} s", now.saturating_duration_since(*since).as_secs()),
            At::Ended { took, .. } => format!("{:.1} s", took.as_secs_f64()),
        }
    }

    /// Who is of more interest where not all can be shown.
    fn rank(&self) -> u8 {
        match &self.at {
            At::Ended { failed: Some(_), .. } => 0,
            At::Works { .. } => 1,
            At::Waits => 2,
            At::Ended { failed: None, .. } => 3,
        }
    }
}

/// A line that steers no terminal, whatever a guest made it of.
fn harmless(text: &str) -> String {
    let line = plain(text.lines().next().unwrap_or_default()).replace('\t', " ");
    // Letters of two columns, or of none, would move what is beside them.
    line.chars().map(|c| if c < '\u{300}' || matches!(c, '\u{2010}'..='\u{2027}') { c } else { '?' }).collect()
}

impl Table {
    /// Adds a row for a VM that has none yet.
    pub fn add(&mut self, vm: &str, name: &str) {
        if !self.has(vm) {
            self.rows.push(Row { vm: vm.into(), name: harmless(name), at: At::Waits });
        }
    }

    pub fn has(&self, vm: &str) -> bool {
        self.rows.iter().any(|row| row.vm == vm)
    }

    /// A phase of this VM begins.
    pub fn begin(&mut self, vm: &str, phase: &str, now: Instant) {
        if let Some(row) = self.rows.iter_mut().find(|row| row.vm == vm) {
            let since = if let At::Works { since, .. } = &row.at { *since } else { now };
            row.at = At::Works { phase: harmless(phase), since };
        }
    }

    /// The work on this VM has ended, with an error where there is one.
    pub fn end(&mut self, vm: &str, failed: Option<&str>, now: Instant) {
        if let Some(row) = self.rows.iter_mut().find(|row| row.vm == vm) {
            let took = match &row.at {
                At::Works { since, .. } => now.saturating_duration_since(*since),
                At::Ended { took, .. } => *took,
                At::Waits => Duration::ZERO,
            };
            row.at = At::Ended { failed: failed.map(harmless), took };
        }
    }

    /// Lays out at most so many rows, each in one column less than the terminal has: a cursor beyond the last one would
    /// wrap it. Where there is no room for all, those that are of more interest are shown, and the rest is counted.
    pub fn lay_out(&self, now: Instant, columns: usize, most: usize) -> Vec<String> {
        let columns = columns.saturating_sub(1).min(WIDEST);
        let mut shown: Vec<&Row> = self.rows.iter().collect();
        let mut rest = None;
        if shown.len() > most {
            let mut order: Vec<usize> = (0..shown.len()).collect();
            order.sort_by_key(|at| self.rows[*at].rank());
            let mut kept = order[..most.saturating_sub(1)].to_vec();
            kept.sort_unstable();
            shown = kept.iter().map(|at| &self.rows[*at]).collect();
            rest = Some(self.count(self.rows.len() - shown.len()));
        }
        // Of all, so that the columns stay where they are.
        let name = self.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0).min(columns / 3);
        let room = columns.saturating_sub(name + 2 + TIME);
        let phase = shown.iter().map(|row| row.phase().chars().count()).max().unwrap_or(0);
        let phase = phase.max(SHORTEST_PHASE).min(room);
        let line = |row: &&Row| {
            let (short, what) = (clip(&row.name, name), clip(&row.phase(), phase));
            let line = format!("{short:<name$}  {what:<phase$}{:>TIME$}", row.time(now));
            clip(line.trim_end(), columns)
        };
        let lines = shown.iter().map(line);
        lines.chain(rest.map(|rest| clip(&rest, columns))).filter(|line| !line.is_empty()).collect()
    }

    fn count(&self, more: usize) -> String {
        let of = |rank| self.rows.iter().filter(|row| row.rank() == rank).count();
        let (failed, works, waits, ok) = (of(0), of(1), of(2), of(3));
        format!("and {more} more; of all {ok} ok, {failed} failed, {works} at work, {waits} waiting")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(names: &[&str]) -> Table {
        let mut table = Table::default();
        names.iter().for_each(|name| table.add(&format!("red-{name}"), name));
        table
    }

    #[test]
    fn each_member_has_a_row_that_follows_it() {
        let began = Instant::now();
        let after = |seconds: u64| began + Duration::from_secs(seconds);
        let mut red = table(&["db1", "web1", "web10"]);
        red.add("red-db1", "again");
        assert!(red.has("red-db1") && !red.has("db1"));
        assert_eq!(red.lay_out(began, 80, 20), ["db1    waits", "web1   waits", "web10  waits"]);
        red.begin("red-db1", "network", began);
        red.begin("red-db1", "boot", after(2));
        red.begin("red-web1", "network", after(3));
        red.begin("alone", "boot", began);
        let rows = |table: &Table, seconds, columns| table.lay_out(after(seconds), columns, 20);
        assert_eq!(
            rows(&red, 5, 80),
            ["db1    boot                         5 s", "web1   network                      2 s", "web10  waits",]
        );
        red.end("red-db1", None, after(7));
        red.end("red-web1", Some("no \x1b[31mway\x1b[0m\r \u{202e}\u{4e2d}\nhint: none"), after(9));
        red.end("red-web10", Some("waits for web"), after(9));
        assert_eq!(
            rows(&red, 20, 80),
            [
                "db1    ok                         7.0 s",
                "web1   failed: no way ??          6.0 s",
                "web10  failed: waits for web      0.0 s",
            ]
        );
        // The next thing that is done to it has a time of its own.
        red.begin("red-db1", "power off", after(30));
        assert_eq!(rows(&red, 31, 80)[0], "db1    power off                    1 s");
    }

    #[test]
    fn no_row_is_as_wide_as_the_terminal_and_no_more_are_shown_than_fit() {
        let now = Instant::now();
        let names: Vec<String> = (1..=40).map(|n| format!("a-role-with-a-long-name{n}")).collect();
        let mut red = table(&names.iter().map(String::as_str).collect::<Vec<_>>());
        for n in [3, 20] {
            red.begin(&format!("red-a-role-with-a-long-name{n}"), "a phase that is described at great length", now);
        }
        red.end("red-a-role-with-a-long-name1", None, now);
        red.end("red-a-role-with-a-long-name30", Some(&"why ".repeat(100)), now);
        for columns in 0..200 {
            for most in 0..50 {
                let lines = red.lay_out(now, columns, most);
                assert!(lines.len() <= most.max(1), "{columns} {most}: {lines:?}");
                assert!(lines.iter().all(|line| line.chars().count() < columns.max(1)), "{columns}: {lines:?}");
            }
        }
        let lines = red.lay_out(now, 100, 5);
        let starts = |at: usize, name: &str| assert!(lines[at].starts_with(name), "{lines:#?}");
        starts(0, "a-role-with-a-long-name2 ");
        starts(1, "a-role-with-a-long-name3 ");
        starts(2, "a-role-with-a-long-name20 ");
        starts(3, "a-role-with-a-long-name30  failed: why why");
        assert_eq!(lines[4], "and 36 more; of all 1 ok, 1 failed, 2 at work, 36 waiting");
    }
}
