//! HTTP/1.1 on the Unix socket, with limits on who, how much and how long.

use std::convert::Infallible;
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_io::{Async, Timer};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use smol::LocalExecutor;
use smol::future::FutureExt;
use smol::io::AsyncWriteExt;
use smol::lock::Semaphore;
use smol_hyper::rt::{FuturesIo, SmolTimer};

use super::api::{self, ApiError, Backend, Reply};

/// The most bytes of a request's line and headers.
const MAX_HEADER: usize = 16 * 1024;
/// The most bytes of a request's body.
const MAX_BODY: usize = 64 * 1024;
/// How long a request may take, from the connection to the last byte of its body.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// How much longer its answer may take.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// How many connections are served at once; more wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 64;
/// How long open connections may go on once puterd stops.
const STOP_TIME: Duration = Duration::from_secs(2);

/// Serves until `stop` ends, then lets open connections finish.
///
/// # Errors
/// The socket's; a single connection's errors end that connection alone.
pub async fn serve(
    listener: &UnixListener,
    uid: u32,
    backend: Arc<dyn Backend>,
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let listener = listener.try_clone().and_then(Async::new).context("cannot listen")?;
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let executor = Rc::new(LocalExecutor::new());
    let accept = async {
        loop {
            let slot = slots.acquire_arc().await;
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors or memory: waiting is all that helps.
                    log!("cannot accept a connection: {error}");
                    Timer::after(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let backend = Arc::clone(&backend);
            let task = async move {
                connection(stream, uid, backend).await;
                drop(slot);
            };
            executor.spawn(task).detach();
        }
    };
    executor.run(stop.or(accept)).await;
    let end = Instant::now() + STOP_TIME;
    while !executor.is_empty() && Instant::now() < end {
        executor.run(Timer::after(Duration::from_millis(5))).await;
    }
    Ok(())
}

/// The user whom this process runs as.
pub fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// The uid at the socket's other end.
fn peer(stream: &Async<UnixStream>) -> Option<u32> {
    rustix::net::sockopt::socket_peercred(stream).ok().map(|peer| peer.uid.as_raw())
}

/// Serves one connection to its end.
pub async fn connection(mut stream: Async<UnixStream>, uid: u32, backend: Arc<dyn Backend>) {
    match peer(&stream) {
        Some(other) if other == uid => {}
        other => {
            let who = other.map_or_else(|| "an unknown user".to_owned(), |uid| format!("uid {uid}"));
            log!("refused a connection of {who}");
            let message = format!("this puterd serves uid {uid} alone, not {who}: start one as that user");
            let body = Reply::from(ApiError::new(403, "forbidden", message)).body;
            let head = format!(
                "HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
                 Connection: close\r\n\r\n",
                body.len()
            );
            // It fits the socket's buffer; a peer that does not read it waits for nobody.
            let _ = stream.write(&[head.as_bytes(), &body].concat()).await;
            return;
        }
    }
    let deadline = Instant::now() + REQUEST_TIME;
    let service = service_fn(move |request| {
        let backend = Arc::clone(&backend);
        async move { Ok::<_, Infallible>(response(answer(request, backend, deadline).await)) }
    });
    let served = async {
        // A client that breaks off or talks nonsense is its own problem: hyper has answered it where that is possible.
        let _ = http1::Builder::new()
            .timer(SmolTimer::new())
            .header_read_timeout(REQUEST_TIME)
            .keep_alive(false)
            .max_header_size(MAX_HEADER)
            .max_buf_size(2 * MAX_HEADER)
            .serve_connection(FuturesIo::new(stream), service)
            .await;
    };
    let cut = async {
        Timer::at(deadline + ANSWER_TIME).await;
    };
    served.or(cut).await;
}

async fn answer(request: Request<Incoming>, backend: Arc<dyn Backend>, deadline: Instant) -> Reply {
    let (head, body) = request.into_parts();
    let body = match read(body).or(late(deadline)).await {
        Ok(body) => body,
        Err(error) => return error.into(),
    };
    let (method, path) = (head.method.as_str().to_owned(), head.uri.path().to_owned());
    // The kernel answers at once, but another request may be at work.
    smol::unblock(move || api::respond(&method, &path, &body, &*backend)).await
}

async fn read(body: Incoming) -> Result<Bytes, ApiError> {
    let large = || ApiError::new(413, "body_too_large", format!("the body has more than {MAX_BODY} bytes"));
    if body.size_hint().lower() > MAX_BODY as u64 {
        return Err(large());
    }
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(whole) => Ok(whole.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(large()),
        Err(error) => Err(ApiError::new(400, "invalid_body", format!("cannot read the body: {error}"))),
    }
}

async fn late(deadline: Instant) -> Result<Bytes, ApiError> {
    Timer::at(deadline).await;
    let seconds = REQUEST_TIME.as_secs();
    Err(ApiError::new(408, "timeout", format!("the request did not arrive whole within {seconds} seconds")))
}

fn response(reply: Reply) -> Response<Full<Bytes>> {
    let empty = reply.body.is_empty();
    let mut response = Response::new(Full::new(Bytes::from(reply.body)));
    *response.status_mut() = StatusCode::from_u16(reply.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if !empty {
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    if let Some(allow) = reply.allow {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
    }
    response
}
