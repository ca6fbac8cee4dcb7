//! One line of progress: a name, a bar, bytes, their rate and the time that is left, in as many columns as there are.

use std::time::Duration;

use crate::cli::output::show_seconds;
use crate::vm::settings::show_size;

/// A line that is wider tells no more.
const WIDEST: usize = 100;
/// A bar that is shorter shows nothing.
const SHORTEST_BAR: usize = 8;
/// What is wider than these stands out of its column, and no more.
const NUMBERS: usize = 14;
const RATE: usize = 9;
const LEFT: usize = 7;
/// Who waits longer than this does not want to know.
const LONGEST: Duration = Duration::from_secs(100 * 3600);

/// How far something is.
#[derive(Clone, Copy, Debug)]
pub struct Measure {
    pub done: u64,
    /// None where it is not known.
    pub total: Option<u64>,
    /// Bytes in a second.
    pub rate: f64,
    pub left: Duration,
}

/// Lays the line out, in at most one column less than the terminal has: a cursor beyond the last one would wrap it.
pub fn lay_out(name: &str, at: Measure, columns: usize) -> String {
    let columns = columns.saturating_sub(1).min(WIDEST);
    let done = at.total.map_or(at.done, |total| at.done.min(total));
    let numbers = match at.total {
        Some(total) => format!("{}/{}", show_size(done), show_size(total)),
        None => show_size(done),
    };
    let moves = at.rate >= 1.0;
    let rate = if moves { format!("{}/s", show_size(at.rate as u64)) } else { "-".into() };
    let known = moves && at.total.is_some() && at.left < LONGEST;
    let left = if known { show_seconds(at.left.as_secs()) } else { "-".into() };

    // Names of one width, so that the bars stand below one another.
    let mut room = (columns / 3).clamp(16, 36).min(columns);
    let fixed = |parts: &[usize]| parts.iter().map(|width| width + 1).sum::<usize>();
    let mut tail = format!("{numbers:>NUMBERS$} {rate:>RATE$} {left:>LEFT$}");
    let mut bar = String::new();
    if columns >= room + fixed(&[NUMBERS, RATE, LEFT]) + SHORTEST_BAR + 3 {
        let width = columns - room - fixed(&[NUMBERS, RATE, LEFT]) - 3;
        bar = match at.total {
            Some(total) => format!(" [{}]", draw(done, total, width)),
            None => " ".repeat(width + 3),
        };
    } else if columns < room + fixed(&[NUMBERS, RATE, LEFT]) {
        tail = format!("{numbers:>NUMBERS$} {left:>LEFT$}");
        if columns < room + fixed(&[NUMBERS, LEFT]) {
            tail = numbers;
            room = columns.saturating_sub(tail.chars().count() + 1);
        }
    }
    let line = format!("{:<room$}{bar} {tail}", clip(name, room));
    clip(&line, columns)
}

fn draw(done: u64, total: u64, width: usize) -> String {
    let full = match total {
        0 => width,
        _ => (u128::from(done) * width as u128 / u128::from(total)) as usize,
    };
    let head = if full < width { ">" } else { "" };
    format!("{}{head:<rest$}", "=".repeat(full), rest = width - full)
}

/// The text in so many columns; what does not fit ends in a sign that there is more.
pub fn clip(text: &str, columns: usize) -> String {
    if text.chars().count() <= columns {
        return text.to_string();
    }
    let mut short: String = text.chars().take(columns.saturating_sub(1)).collect();
    if columns > 0 {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure(done: u64, total: u64, rate: f64, left: u64) -> Measure {
        Measure { done, total: Some(total), rate, left: Duration::from_secs(left) }
    }

    #[test]
    fn a_line_shows_as_much_as_there_is_room_for() {
        let at = measure(256 << 20, 1 << 30, f64::from(12 << 20), 64);
        for (columns, expected) in [
            (
                100,
                "localhost:5000/puter/debian       [=======>                      ]        256M/1G     12M/s    1m4s",
            ),
            (80, "localhost:5000/puter/debi… [====>            ]        256M/1G     12M/s    1m4s"),
            (62, "localhost:5000/pute…        256M/1G     12M/s    1m4s"),
            (50, "localhost:5000/…        256M/1G     12M/s    1m4s"),
            (49, "localhost:5000/…        256M/1G    1m4s"),
            (32, "localhost:5000/puter/d… 256M/1G"),
            (20, "localhost:… 256M/1G"),
            (6, " 256…"),
            (1, ""),
            (0, ""),
        ] {
            assert_eq!(lay_out("localhost:5000/puter/debian", at, columns), expected, "{columns}");
        }
    }

    #[test]
    fn no_line_is_as_wide_as_the_terminal() {
        let largest = u64::MAX;
        for at in [
            measure(0, 0, 0.0, 0),
            measure(5, 3, f64::INFINITY, u64::MAX / 2),
            measure(largest, largest, f64::NAN, 9),
            measure(1, largest, 1e300, 3),
            Measure { total: None, ..measure(1 << 62, 0, 1e18, 7) },
        ] {
            for columns in 0..300 {
                let line = lay_out("ä name with a very long second half that nobody will ever read", at, columns);
                assert!(line.chars().count() < columns.max(1), "{columns}: {line:?}");
            }
        }
    }

    #[test]
    fn what_is_not_known_is_not_claimed() {
        let stands = lay_out("x", measure(1 << 20, 2 << 20, 0.0, 0), 80);
        assert!(stands.ends_with("1M/2M         -       -"), "{stands}");
        let endless = lay_out("x", measure(1, 1 << 40, 2.0, 1 << 40), 80);
        assert!(endless.ends_with("2B/s       -"), "{endless}");
        let open = lay_out("x", Measure { total: None, ..measure(1 << 20, 0, 1024.0, 9) }, 80);
        assert!(!open.contains('[') && open.ends_with("1M      1K/s       -"), "{open}");
    }
}
