//! Ctrl-C: ends a command at once, or, while it holds something half-made, as soon as it has put that back.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use async_signal::{Signal, Signals};

static CANCELLED: AtomicBool = AtomicBool::new(false);
static GUARDS: AtomicUsize = AtomicUsize::new(0);

/// Exit code of a command ended by SIGINT, as shells give it.
pub const EXIT_CODE: i32 = 130;

/// The flag itself, for code that takes one.
pub fn flag() -> &'static AtomicBool {
    &CANCELLED
}

/// Fails once the user has asked to stop.
///
/// # Errors
/// [`Cancelled`].
pub fn check() -> Result<(), Cancelled> {
    if CANCELLED.load(Ordering::Relaxed) { Err(Cancelled) } else { Ok(()) }
}

/// The user pressed Ctrl-C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cancelled;

impl std::fmt::Display for Cancelled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Cancelled {}

/// While one lives, the first Ctrl-C only sets the flag, so that its owner can undo what it began.
#[derive(Debug)]
pub struct Guard(());

/// Marks the beginning of something that must not be left half-made.
pub fn guard() -> Guard {
    GUARDS.fetch_add(1, Ordering::SeqCst);
    Guard(())
}

impl Drop for Guard {
    fn drop(&mut self) {
        GUARDS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What is to be done before a signal ends the process.
static AT_EXIT: Mutex<Option<fn()>> = Mutex::new(None);

/// Has this done before a signal ends the process, such as giving a terminal its settings back.
pub fn at_exit(work: fn()) {
    if let Ok(mut place) = AT_EXIT.lock() {
        *place = Some(work);
    }
}

/// Begins to listen for SIGINT, SIGTERM and SIGHUP on a thread of its own. A second signal always ends the process:
/// all state survives that.
pub fn listen() {
    let Ok(mut signals) = Signals::new([Signal::Int, Signal::Term, Signal::Hup]) else { return };
    std::thread::spawn(move || {
        smol::block_on(async {
            use smol::stream::StreamExt;
            while signals.next().await.is_some() {
                let again = CANCELLED.swap(true, Ordering::SeqCst);
                if again || GUARDS.load(Ordering::SeqCst) == 0 {
                    if let Some(work) = AT_EXIT.lock().ok().and_then(|place| *place) {
                        work();
                    }
                    std::process::exit(EXIT_CODE);
                }
            }
        });
    });
}
