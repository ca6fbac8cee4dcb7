//! The user's terminal while a program in a guest has it.

use std::sync::Mutex;

use async_signal::{Signal, Signals};
use rustix::stdio::{stdin, stdout};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::protocol::agent::Window;
use crate::vm::exec::Keyboard;

/// The terminal's own settings while it is raw.
static FORMER: Mutex<Option<Termios>> = Mutex::new(None);

/// While it lives, each key goes to the guest as it is typed, Ctrl-C too.
pub struct Raw(());

impl Raw {
    /// Makes standard input raw; without a terminal there nothing is changed.
    pub fn enter() -> Raw {
        if let (Ok(former), Ok(mut place)) = (tcgetattr(stdin()), FORMER.lock()) {
            let mut raw = former.clone();
            raw.make_raw();
            if tcsetattr(stdin(), OptionalActions::Drain, &raw).is_ok() {
                *place = Some(former);
                crate::vm::cancel::at_exit(restore);
            }
        }
        Raw(())
    }

    /// The size of the terminal that shows the output.
    pub fn size() -> Window {
        match tcgetwinsize(stdout()) {
            Ok(size) if size.ws_row > 0 && size.ws_col > 0 => Window { rows: size.ws_row, columns: size.ws_col },
            _ => Window { rows: 24, columns: 80 },
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(former) = FORMER.lock().ok().and_then(|mut place| place.take()) {
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &former);
    }
}

/// Tells the program each new size of the terminal.
pub fn follow_size(keyboard: Keyboard) {
    let Ok(mut signals) = Signals::new([Signal::Winch]) else { return };
    std::thread::spawn(move || {
        smol::block_on(async {
            use smol::stream::StreamExt;
            while signals.next().await.is_some() && keyboard.resize(Raw::size()).is_ok() {}
        });
    });
}
