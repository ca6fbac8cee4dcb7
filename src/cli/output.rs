//! What goes to stdout: tables for people, JSON for programs.

use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use super::progress::aside;

/// Prints a text and a line feed. A reader that went away (`puter list | head -1`) is no error.
pub fn print(text: &str) {
    let written = aside(|| {
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{text}").and_then(|()| stdout.flush())
    });
    if written.is_err() {
        std::process::exit(1);
    }
}

/// Prints a value as indented JSON.
///
/// # Errors
/// When the value has no JSON form.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    print(&serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Lays out rows in columns; the first row is the heading.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_string()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A length of time in the two largest units that matter: `3d4h`, `5m20s`, `7s`.
pub fn show_seconds(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, _, _) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["NAME", "IP"], ["a-long-name", "10.0.0.11"], ["b", "-"]].map(|row| row.map(String::from));
        assert_eq!(table(&rows), "NAME         IP\na-long-name  10.0.0.11\nb            -");
    }

    #[test]
    fn times_show_two_units() {
        for (seconds, text) in [(7, "7s"), (320, "5m20s"), (3600, "1h0m"), (273_600, "3d4h")] {
            assert_eq!(show_seconds(seconds), text);
        }
    }
}
