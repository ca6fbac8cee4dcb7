//! The monitor's work while its VM runs: the console, the published ports, the guest's panic, the end.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Child;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use smol::io::{AsyncReadExt, AsyncWriteExt};
use smol::{Async, LocalExecutor, Timer};

use super::console::Console;
use super::control::{self, Failure};
use super::forward::{self, Forwards, Limits, Opened};
use super::{Answer, FORMER_LIMIT, MAX_LINE, Order, Started, end, shares};
use crate::ending;
use crate::hypervisor::{events, process};
use crate::vm::files::{self, Lock};
use crate::vm::home::Home;
use crate::vm::state::{ProcessId, Reason, Vm};
use crate::watch::Watch;

/// Pause before the console's socket is tried again: a guest that reboots takes it away for a moment.
const RECONNECT: Duration = Duration::from_millis(50);
/// How long a guest that panicked has to write its last words.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long the console is read on after the hypervisor's end.
const DRAIN: Duration = Duration::from_millis(500);
/// How long a hypervisor that is to end may take.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How long another monitor of a VM that runs may take to go, before this one gives way.
const ADOPT_LIMIT: Duration = Duration::from_secs(1);
/// Bytes that are read or written at once.
const PIECE: usize = 16 << 10;

/// What all of the monitor's tasks share.
struct Shared {
    console: RefCell<Console>,
    /// The hypervisor's end, while there is a connection.
    serial: RefCell<Option<Arc<Async<UnixStream>>>>,
}

/// Takes an order from standard input, and stays until the VM has ended and all that follows from it is done.
///
/// # Errors
/// When the order cannot be read, or its hypervisor cannot be started.
pub fn run(home: &Home, vm: &str) -> Result<()> {
    let _ = rustix::process::setsid();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let mut input = BufReader::new(std::io::stdin());
    let mut line = Vec::new();
    input.by_ref().take(MAX_LINE).read_until(b'\n', &mut line).context("cannot read the order")?;
    let order: Order = serde_json::from_slice(&line).context("the order is not understood")?;
    let begun = begin(home, vm, order);
    let started = |begun: &Begun| Started {
        hypervisor: begun.hypervisor,
        forwards: begun.ports.iter().map(Opened::forward).collect(),
    };
    let answer: Answer = begun.as_ref().map(started).map_err(Failure::from);
    println!("{}", serde_json::to_string(&answer)?);
    let begun = begun?;
    let id = begun.hypervisor;
    match attend(home, vm, begun, input) {
        Some(reason) => end::ended(home, vm, id, reason),
        None => Ok(()),
    }
}

/// Waits for the command to say that it saved the state. One that is killed says nothing: then the state itself tells
/// whether anybody knows of this hypervisor.
fn is_saved(input: impl Read, home: &Home, vm: &str, id: ProcessId) -> bool {
    let mut word = Vec::new();
    let read = BufReader::new(input.take(16)).read_until(b'\n', &mut word);
    (read.is_ok() && word == b"saved\n") || matches!(Vm::load(home, vm), Ok(Some(state)) if state.process == Some(id))
}

/// Puts /dev/null in a standard descriptor's place.
fn silence(descriptor: i32) {
    use rustix::fs::{Mode, OFlags};
    if let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        let _ = match descriptor {
            0 => rustix::stdio::dup2_stdin(&null),
            _ => rustix::stdio::dup2_stdout(&null),
        };
    }
}

struct Begun {
    hypervisor: ProcessId,
    /// Absent where another process started it.
    child: Option<Child>,
    listener: UnixListener,
    control: UnixListener,
    servers: shares::Servers,
    guest: Ipv4Addr,
    ports: Vec<Opened>,
    /// Held as long as the ports are.
    lock: Lock,
}

fn begin(home: &Home, vm: &str, order: Order) -> Result<Begun> {
    // That of a VM that was just stopped may still be about to let its ports go.
    let patience = if matches!(order, Order::Launch { .. }) { FORMER_LIMIT } else { ADOPT_LIMIT };
    let lock = super::hold(home, vm, patience)?;
    ensure!(ending::connect(&home.console(vm)).is_err(), "another monitor serves {}", home.console(vm).display());
    let listener = listen(&home.console(vm))?;
    let control = listen(&home.monitor(vm))?;
    match order {
        Order::Launch { hypervisor, shares, ports } => {
            let opened = forward::prepare(&ports.forwards, true)?;
            let mut servers = shares::Servers::start(shares, &home.hypervisor_log(vm))?;
            let hypervisor = hypervisor.spawn().inspect_err(|_| servers.end())?;
            let id = ProcessId { pid: hypervisor.pid(), start_time: hypervisor.start_time() };
            let child = Some(hypervisor.into_child());
            Ok(Begun { hypervisor: id, child, listener, control, servers, guest: ports.guest, ports: opened, lock })
        }
        Order::Adopt { hypervisor: id, ports } => {
            ensure!(process::is_alive(id.pid, id.start_time), "the hypervisor has ended");
            let opened = forward::prepare(&ports.forwards, false)?;
            let servers = shares::Servers::default();
            Ok(Begun {
                hypervisor: id,
                child: None,
                listener,
                control,
                servers,
                guest: ports.guest,
                ports: opened,
                lock,
            })
        }
    }
}

fn listen(path: &Path) -> Result<UnixListener> {
    files::remove(path)?;
    let bind = || crate::failpoint::write().and_then(|()| UnixListener::bind(path));
    bind().with_context(|| format!("cannot listen on {}", path.display()))
}

/// Serves the console and the ports until the hypervisor ends, and tells how it did; `None` where the command was killed before it had
/// written down that there is this VM.
fn attend(home: &Home, vm: &str, begun: Begun, input: impl Read + Send + 'static) -> Option<Reason> {
    let shared = Rc::new(Shared {
        console: RefCell::new(Console::new(home.console_log(vm), home.former_console_log(vm))),
        serial: RefCell::new(None),
    });
    let executor = Rc::new(LocalExecutor::new());
    let id = begun.hypervisor;
    smol::block_on(executor.clone().run(async {
        let serial = executor.spawn(read_serial(shared.clone(), home.serial(vm)));
        let _listening = executor.spawn(accept(executor.clone(), shared.clone(), begun.listener));
        let ports = Forwards::new(executor.clone(), begun.guest, Limits::of_process(), begun.ports);
        let control = executor.spawn(control::serve(begun.control, ports.clone()));
        let mut servers = begun.servers;
        let keeper = executor.spawn(async move {
            servers.keep().await;
        });
        let panic = executor.spawn(watch_for_panic(home.events(vm), id));
        let (its_home, its_name) = (home.clone(), vm.to_string());
        let leash = executor.spawn(async move {
            let saved = smol::unblock(move || is_saved(input, &its_home, &its_name, id)).await;
            // Whoever reads the command's output waits for every holder of it.
            (0..=1).for_each(silence);
            if !saved {
                smol::unblock(move || process::kill(id.pid, id.start_time, KILL_LIMIT)).await;
            }
            saved
        });
        let status = match begun.child {
            Some(mut child) => smol::unblock(move || child.wait()).await.ok(),
            None => {
                smol::unblock(move || while !process::wait_exit(id.pid, id.start_time, Duration::from_secs(3600)) {})
                    .await;
                None
            }
        };
        // First of all: who starts the VM again wants them.
        control.cancel().await;
        ports.close().await;
        drop(begun.lock);
        // What it wrote last is still in the socket.
        for _ in 0..DRAIN.as_millis() / RECONNECT.as_millis() {
            if shared.serial.borrow().is_none() {
                break;
            }
            Timer::after(RECONNECT).await;
        }
        drop((serial, keeper));
        if !leash.await {
            return None;
        }
        let panicked = panic.cancel().await.unwrap_or(false) || events::panicked(&events::read(&home.events(vm)));
        Some(match status {
            _ if panicked => Reason::Panicked,
            Some(status) => match (status.code(), status.signal()) {
                (Some(0), _) => Reason::PoweredOff,
                (Some(code), _) => Reason::Failed(code),
                (None, signal) => Reason::Killed(signal.unwrap_or(0)),
            },
            None => Reason::Unknown,
        })
    }))
}

/// Reads the guest's output for as long as the hypervisor's socket comes back.
async fn read_serial(shared: Rc<Shared>, path: std::path::PathBuf) {
    // Watched before the first try: what comes between the two is not missed.
    let directory = path.parent().and_then(|parent| Watch::directory(parent).ok());
    let directory = directory.and_then(|watch| Async::new_nonblocking(watch).ok());
    loop {
        match Async::<UnixStream>::connect(&path).await {
            Ok(stream) => {
                let stream = Arc::new(stream);
                *shared.serial.borrow_mut() = Some(stream.clone());
                let mut buffer = vec![0; PIECE];
                while let Ok(length @ 1..) = (&*stream).read(&mut buffer).await {
                    shared.console.borrow_mut().take(&buffer[..length]);
                }
                *shared.serial.borrow_mut() = None;
                Timer::after(RECONNECT).await;
            }
            Err(_) => {
                let changed = async {
                    match &directory {
                        Some(directory) => {
                            let _ = directory.readable().await;
                            directory.get_ref().drain();
                        }
                        None => smol::future::pending().await,
                    }
                };
                // The socket's file can be there before it listens.
                let pause = async {
                    Timer::after(RECONNECT).await;
                };
                smol::future::or(changed, pause).await;
            }
        }
    }
}

/// Takes everybody who attaches.
async fn accept(executor: Rc<LocalExecutor<'static>>, shared: Rc<Shared>, listener: UnixListener) {
    let Ok(listener) = Async::<UnixListener>::new(listener) else { return };
    loop {
        match listener.accept().await {
            Ok((stream, _)) => executor.spawn(serve(shared.clone(), Arc::new(stream))).detach(),
            Err(_) => {
                Timer::after(RECONNECT).await;
            }
        }
    }
}

async fn serve(shared: Rc<Shared>, stream: Arc<Async<UnixStream>>) {
    let (past, pieces) = shared.console.borrow_mut().attach();
    let output = async {
        (&*stream).write_all(&past).await?;
        while let Ok(piece) = pieces.recv().await {
            (&*stream).write_all(&piece).await?;
        }
        std::io::Result::Ok(())
    };
    let input = async {
        let mut buffer = vec![0; PIECE];
        while let Ok(length @ 1..) = (&*stream).read(&mut buffer).await {
            let serial = shared.serial.borrow().clone();
            if let Some(serial) = serial {
                let _ = (&*serial).write_all(&buffer[..length]).await;
            }
        }
        std::io::Result::Ok(())
    };
    let _ = smol::future::or(output, input).await;
}

/// Ends a VM whose guest has panicked: it would spin for ever. True when it did.
async fn watch_for_panic(path: std::path::PathBuf, id: ProcessId) -> bool {
    let watch = path.parent().and_then(|parent: &Path| Watch::directory(parent).ok());
    let Some(Ok(watch)) = watch.map(Async::new_nonblocking) else { return smol::future::pending().await };
    loop {
        watch.get_ref().drain();
        let now = path.clone();
        if smol::unblock(move || events::panicked(&events::read(&now))).await {
            Timer::after(LAST_WORDS).await;
            // It may have been told to reboot by itself.
            let now = path.clone();
            if smol::unblock(move || events::panicked(&events::read(&now))).await {
                smol::unblock(move || process::kill(id.pid, id.start_time, KILL_LIMIT)).await;
                return true;
            }
        }
        if watch.readable().await.is_err() {
            return smol::future::pending().await;
        }
    }
}
