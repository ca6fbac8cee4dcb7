//! The terminal as indicatif draws on it, with two differences. Lines are not filled with spaces to the edge: a terminal
//! that becomes narrower would wrap them, and leave the half of each line behind. And the cursor rests on the row below, so
//! that whatever else is printed begins a line of its own.

use std::io::{self, Write};
use std::sync::Mutex;

use indicatif::TermLike;
use rustix::termios::{Winsize, tcgetwinsize};

/// Standard error.
#[derive(Debug, Default)]
pub struct Screen {
    held: Mutex<Held>,
}

/// What waits for the next flush.
#[derive(Debug, Default)]
struct Held {
    text: String,
    /// The cursor's column.
    column: usize,
    /// The line is full: what follows is on the next one.
    full: bool,
    /// The cursor is one row below the place where it was left.
    below: bool,
}

/// Columns and rows of the terminal on standard error.
pub fn size() -> (u16, u16) {
    match tcgetwinsize(rustix::stdio::stderr()) {
        Ok(Winsize { ws_col, ws_row, .. }) if ws_col > 0 && ws_row > 0 => (ws_col, ws_row),
        _ => (80, 24),
    }
}

impl Held {
    fn write(&mut self, text: &str, width: usize) {
        if text.is_empty() {
            return;
        }
        self.below = false;
        if std::mem::take(&mut self.full) {
            self.text.push_str("\r\n");
            self.column = 0;
        }
        let length = text.chars().count();
        let filler = text.bytes().all(|byte| byte == b' ') && self.column + length == width;
        match filler {
            true => self.text.push_str("\x1b[K"),
            false => self.text.push_str(text),
        }
        self.column = (self.column + length) % width.max(1);
        self.full = self.column == 0;
    }

    fn control(&mut self, sequence: &str) {
        self.full = false;
        if std::mem::take(&mut self.below) {
            self.text.push_str("\x1b[A");
        }
        self.text.push_str(sequence);
    }
}

impl Held {
    fn flush(&mut self) -> String {
        if std::mem::take(&mut self.full) {
            self.text.push_str("\r\n");
            (self.column, self.below) = (0, true);
        }
        std::mem::take(&mut self.text)
    }
}

impl Screen {
    fn with(&self, work: impl FnOnce(&mut Held)) -> io::Result<()> {
        work(&mut self.held.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        Ok(())
    }

    fn moved(&self, rows: usize, direction: char) -> io::Result<()> {
        if rows == 0 {
            return Ok(());
        }
        self.with(|held| held.control(&format!("\x1b[{rows}{direction}")))
    }
}

impl TermLike for Screen {
    fn width(&self) -> u16 {
        size().0
    }

    fn height(&self) -> u16 {
        // The row below is the cursor's.
        size().1.saturating_sub(1).max(1)
    }

    fn move_cursor_up(&self, rows: usize) -> io::Result<()> {
        self.moved(rows, 'A')
    }

    fn move_cursor_down(&self, rows: usize) -> io::Result<()> {
        self.moved(rows, 'B')
    }

    fn move_cursor_right(&self, columns: usize) -> io::Result<()> {
        self.moved(columns, 'C')
    }

    fn move_cursor_left(&self, columns: usize) -> io::Result<()> {
        self.moved(columns, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        let width = usize::from(self.width());
        self.with(|held| {
            held.write(text, width);
            held.control("\r\n");
            held.column = 0;
        })
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        let width = usize::from(self.width());
        self.with(|held| match text {
            "\r" => {
                held.control(text);
                held.column = 0;
            }
            _ => held.write(text, width),
        })
    }

    fn clear_line(&self) -> io::Result<()> {
        self.with(|held| {
            held.control("\r\x1b[2K");
            held.column = 0;
        })
    }

    fn flush(&self) -> io::Result<()> {
        let text = self.held.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).flush();
        io::stderr().lock().write_all(text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_where_their_text_does() {
        let mut held = Held::default();
        for text in ["one", "       ", "a line", "    ", "0123456789", "", "x", "         "] {
            held.write(text, 10);
        }
        assert_eq!(held.flush(), "one\x1b[K\r\na line\x1b[K\r\n0123456789\r\nx\x1b[K\r\n");
        held.control("\r\x1b[2K");
        held.write("y", 10);
        assert_eq!(held.flush(), "\x1b[A\r\x1b[2Ky", "from where it was left");
    }

    #[test]
    fn what_follows_begins_a_line_of_its_own() {
        let mut held = Held::default();
        for _ in 0..2 {
            held.write("line", 10);
            held.write("      ", 10);
            assert_eq!(held.flush(), "line\x1b[K\r\n");
        }
    }
}
