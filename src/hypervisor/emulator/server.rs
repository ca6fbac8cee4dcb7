//! The REST API: the part of cloud-hypervisor's that puter uses, with its paths, statuses and error bodies.

use std::convert::Infallible;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use smol_hyper::rt::{FuturesIo, SmolTimer};

use super::Control;
use super::events::Events;
use super::running::Running;
use crate::hypervisor::arguments::Machine;
use crate::hypervisor::client::VSOCK_DEVICE;

/// How long a client may take to send a request's head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest body of a request, in bytes.
const MAX_BODY: usize = 64 << 10;

struct Api {
    control: Control,
    events: Arc<Events>,
    cpus: u32,
    memory: u64,
}

/// Serves the API in the background for as long as the process lives.
pub fn serve(listener: UnixListener, control: Control, events: Arc<Events>, machine: &Machine) {
    let api = Arc::new(Api { control, events, cpus: machine.cpus, memory: machine.memory });
    std::thread::spawn(move || {
        let executor = smol::LocalExecutor::new();
        smol::block_on(executor.run(async {
            let listener = match smol::Async::new(listener) {
                Ok(listener) => listener,
                Err(error) => return eprintln!("puter-emulator: cannot serve the API: {error}"),
            };
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => executor.spawn(connection(stream, api.clone())).detach(),
                    // Out of file descriptors, say: wait for better times.
                    Err(_) => drop(smol::Timer::after(Duration::from_millis(100)).await),
                }
            }
        }));
    });
}

async fn connection(stream: smol::Async<std::os::unix::net::UnixStream>, api: Arc<Api>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let api = api.clone();
        async move {
            let (method, path) = (request.method().clone(), request.uri().path().to_string());
            let body = match Limited::new(request.into_body(), MAX_BODY).collect().await {
                Ok(body) => body.to_bytes(),
                Err(error) => Bytes::from(error.to_string()),
            };
            // QEMU may take a while: other connections go on meanwhile.
            let (status, body) = smol::unblock(move || api.answer(&method, &path, &body)).await;
            let body = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
            let response = Response::builder().status(status).header("content-type", "application/json");
            Ok::<_, Infallible>(response.body(Full::new(body)).unwrap_or_default())
        }
    });
    // A client that breaks off harms only itself.
    let _ = http1::Builder::new()
        .timer(SmolTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(FuturesIo::new(stream), service)
        .await;
}

impl Api {
    fn answer(&self, method: &Method, path: &str, body: &[u8]) -> (StatusCode, Value) {
        let name = path.strip_prefix("/api/v1/").unwrap_or_default();
        let expected = match name {
            "vmm.ping" | "vm.info" => Method::GET,
            "vm.power-button" | "vm.pause" | "vm.resume" | "vm.remove-device" | "vm.snapshot" | "vmm.shutdown" => {
                Method::PUT
            }
            _ => return (StatusCode::NOT_FOUND, json!([format!("no such endpoint: {path}")])),
        };
        if *method != expected {
            return (StatusCode::METHOD_NOT_ALLOWED, json!([format!("{name} takes {expected}")]));
        }
        let done = match name {
            "vmm.ping" => return (StatusCode::OK, self.ping()),
            "vm.info" => return (StatusCode::OK, self.info()),
            "vmm.shutdown" => self.control.end(),
            _ => self.control.running().context("The VM reboots").and_then(|running| self.act(&running, name, body)),
        };
        match done {
            Ok(()) => (StatusCode::NO_CONTENT, Value::Null),
            Err(error) => {
                let chain: Vec<String> = error.chain().map(ToString::to_string).collect();
                (StatusCode::INTERNAL_SERVER_ERROR, json!(chain))
            }
        }
    }

    fn act(&self, running: &Running, name: &str, body: &[u8]) -> Result<()> {
        let paused = running.qmp.is_paused();
        match name {
            "vm.power-button" => running.qmp.execute("system_powerdown").map(drop),
            "vm.pause" => {
                ensure!(!paused, "The VM could not be paused: it is paused");
                self.events.write("vm", "pausing");
                running.qmp.execute("stop").map(drop)
            }
            "vm.resume" => {
                ensure!(paused || running.is_unplugged(), "The VM could not be resumed: it is running");
                self.events.write("vm", "resuming");
                running.resume()
            }
            "vm.remove-device" => {
                #[derive(Deserialize)]
                struct Device {
                    id: String,
                }
                let Device { id } = serde_json::from_slice(body).context("The device is not understood")?;
                ensure!(id == VSOCK_DEVICE, "The device could not be removed: there is no '{id}' that can be");
                ensure!(!paused, "The device could not be removed: the VM is paused");
                running.unplug().context("The device could not be removed")
            }
            _ => {
                #[derive(Deserialize)]
                struct Target {
                    destination_url: String,
                }
                let Target { destination_url } =
                    serde_json::from_slice(body).context("The snapshot's destination is not understood")?;
                let directory = destination_url.strip_prefix("file://").context("The destination is no file:// URL")?;
                self.events.write("vm", "snapshotting");
                running.snapshot(Path::new(directory)).context("The VM could not be snapshotted")?;
                self.events.write("vm", "snapshotted");
                Ok(())
            }
        }
    }

    fn ping(&self) -> Value {
        json!({
            "build_version": format!("puter-emulator {}", crate::VERSION),
            "version": crate::VERSION,
            "pid": std::process::id(),
            "features": ["emulated"],
        })
    }

    fn info(&self) -> Value {
        json!({
            "config": {
                "cpus": { "boot_vcpus": self.cpus, "max_vcpus": self.cpus },
                "memory": { "size": self.memory },
            },
            "state": if self.control.running().is_some_and(|vm| vm.qmp.is_paused()) { "Paused" } else { "Running" },
            "memory_actual_size": self.memory,
        })
    }
}
