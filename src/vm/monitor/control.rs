//! What is asked of a monitor while its VM runs: one JSON object a line, one request for each connection.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use smol::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use smol::{Async, Timer};

use super::MAX_LINE;
use super::forward::{Forwards, Published};
use crate::ending;
use crate::vm::home::Home;
use crate::vm::port::Forward;
use crate::vm::{Hint, Hinted};

/// How long a client may take to say what it wants and to take the answer: the next one waits meanwhile.
const CLIENT_LIMIT: Duration = Duration::from_secs(2);
/// How long the answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Pause after an error that may last.
const PAUSE: Duration = Duration::from_millis(100);

/// How often one that hangs up is asked again, and the time between.
const HANG_UPS: usize = 50;
const BETWEEN: Duration = Duration::from_millis(20);

/// What is wanted.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// How the published ports are.
    Ports {},
    /// Publish these and no others; all of them or nothing changes, or else as many as can be.
    Publish { forwards: Vec<Forward>, all: bool },
}

/// An error that came through a socket or a pipe, with its way out.
#[derive(Debug, Serialize, Deserialize)]
pub struct Failure {
    why: String,
    hint: Option<String>,
}

impl From<&anyhow::Error> for Failure {
    fn from(error: &anyhow::Error) -> Failure {
        let hint = error.downcast_ref::<Hinted>().map(|hinted| hinted.hint().to_string());
        Failure { why: format!("{error:#}"), hint }
    }
}

impl From<Failure> for anyhow::Error {
    fn from(failure: Failure) -> anyhow::Error {
        let error = anyhow!(failure.why);
        match failure.hint {
            Some(hint) => Err::<(), _>(error).hint(hint).expect_err("it is an error"),
            None => error,
        }
    }
}

type Reply = Result<Vec<Published>, Failure>;

/// Why there is no answer.
#[derive(Debug)]
pub enum NoReply {
    /// Nobody listens: the monitor was killed.
    Gone,
    /// It is there and does not answer.
    Silent(anyhow::Error),
    /// It refuses.
    Refused(anyhow::Error),
}

/// Asks the VM's monitor.
///
/// # Errors
/// When there is none, it does not answer in time, or it cannot do so.
pub fn ask(home: &Home, vm: &str, request: &Request) -> Result<Vec<Published>, NoReply> {
    let mut reply = once(home, vm, request);
    // One that was killed may still take a connection and then drop it, until its last thread has ended. To ask twice does no
    // harm: a request says what is to be, not what is to change.
    for _ in 0..HANG_UPS {
        match &reply {
            Err(NoReply::Silent(error)) if is_hang_up(error) => thread::sleep(BETWEEN),
            _ => break,
        }
        reply = once(home, vm, request);
    }
    reply
}

fn is_hang_up(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        kind.is_some_and(|kind| [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset].contains(&kind))
            || cause.downcast_ref::<serde_json::Error>().is_some_and(serde_json::Error::is_eof)
    })
}

fn once(home: &Home, vm: &str, request: &Request) -> Result<Vec<Published>, NoReply> {
    let Ok(stream) = ending::connect(&home.monitor(vm)) else { return Err(NoReply::Gone) };
    let exchange = || -> Result<Reply> {
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_write_timeout(Some(CLIENT_LIMIT))?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        (&stream).write_all(&line)?;
        let mut line = String::new();
        BufReader::new((&stream).take(MAX_LINE)).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    };
    match exchange().with_context(|| format!("the monitor of '{vm}' does not answer")) {
        Ok(Ok(shown)) => Ok(shown),
        Ok(Err(failure)) => Err(NoReply::Refused(failure.into())),
        Err(error) => Err(NoReply::Silent(error)),
    }
}

/// Answers until dropped, one client after the other.
pub async fn serve(listener: UnixListener, forwards: Rc<Forwards>) {
    let Ok(listener) = Async::<UnixListener>::new(listener) else { return };
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(answer(stream, &forwards).await),
            Err(_) => drop(Timer::after(PAUSE).await),
        }
    }
}

async fn answer(mut stream: Async<UnixStream>, forwards: &Forwards) -> Result<()> {
    let mut line = String::new();
    let mut reader = smol::io::BufReader::new((&mut stream).take(MAX_LINE));
    within(async { Ok(reader.read_line(&mut line).await?) }).await?;
    let reply: Reply = match serde_json::from_str(&line) {
        Ok(Request::Ports {}) => Ok(forwards.shown()),
        Ok(Request::Publish { forwards: wanted, all }) => {
            let set = forwards.set(&wanted, all).await;
            set.map(|()| forwards.shown()).map_err(|error| Failure::from(&error))
        }
        Err(error) => Err(Failure::from(&anyhow!("the request is not understood: {error}"))),
    };
    let mut line = serde_json::to_vec(&reply)?;
    line.push(b'\n');
    within(async { Ok(stream.write_all(&line).await?) }).await
}

async fn within<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let late = async {
        Timer::after(CLIENT_LIMIT).await;
        Err(anyhow!("too slow"))
    };
    smol::future::or(work, late).await
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use smol::{LocalExecutor, unblock};

    use super::*;
    use crate::vm::monitor::forward::{Limits, prepare};

    #[test]
    fn one_that_ends_amid_a_request_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.prepare().unwrap();
        let listener = UnixListener::bind(home.monitor("web")).unwrap();
        let ends = thread::spawn(move || {
            (0..2).for_each(|_| drop(listener.accept().unwrap()));
        });
        let reply = ask(&home, "web", &Request::Ports {});
        assert!(matches!(reply, Err(NoReply::Gone)), "{reply:?}");
        ends.join().unwrap();
    }

    #[test]
    fn clients_that_are_silent_or_talk_nonsense_keep_nobody_from_an_answer() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.prepare().unwrap();
        assert!(matches!(ask(&home, "web", &Request::Ports {}), Err(NoReply::Gone)));
        let listener = UnixListener::bind(home.monitor("web")).unwrap();
        let opened = prepare(&["0:80".parse().unwrap()], true).unwrap();
        let forward = opened[0].forward();
        let executor = Rc::new(LocalExecutor::new());
        let forwards = Forwards::new(executor.clone(), Ipv4Addr::LOCALHOST, Limits::of_process(), opened);
        let _serving = executor.spawn(serve(listener, forwards));
        smol::block_on(executor.run(unblock(move || {
            let connect = || UnixStream::connect(home.monitor("web")).unwrap();
            let _silent = connect();
            let mut gone = connect();
            gone.write_all(b"{\"ports\":").unwrap();
            drop(gone);
            let mut endless = connect();
            // It is cut off, at the latest when its time is up.
            while endless.write_all(&[b'['; 64 << 10]).is_ok() {}
            let mut strange = connect();
            strange.write_all(b"{\"dance\":{}}\n").unwrap();
            let mut said = String::new();
            strange.read_to_string(&mut said).unwrap();
            assert!(said.contains("not understood"), "{said}");
            let shown = ask(&home, "web", &Request::Ports {}).unwrap();
            assert_eq!(shown, [Published { forward, why: None, open: 0 }]);
            // What cannot be had comes with its way out.
            let taken = Forward { any: false, address: Ipv4Addr::UNSPECIFIED.into(), ..forward };
            let request = Request::Publish { forwards: vec![forward, taken], all: true };
            let Err(NoReply::Refused(error)) = ask(&home, "web", &request) else { panic!("it is taken") };
            assert!(error.downcast_ref::<Hinted>().unwrap().hint().contains("choose another"), "{error}");
            let request = Request::Publish { forwards: Vec::new(), all: true };
            assert_eq!(ask(&home, "web", &request).unwrap(), []);
        })));
    }
}
