//! The hypervisor's local migration, from and to a process that hands the memory over as memfds (cloud-hypervisor's
//! docs/snapshot_restore.md, offload). Its reference program `offload_daemon` is that process, where it is on the PATH.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use puter::hypervisor::snapshot::{CONFIG, Own, prepare};
use puter::hypervisor::{Client, Kind};
use puter::protocol::unix_http;
use puter::sparse;
use puter::vm::files;
use puter::vm::home::Home;
use serde_json::{Value, json};

const PROGRAM: &str = "offload_daemon";
/// What the program calls the machine's configuration.
const ABOUT: &str = "migration_config.json";
/// Taking and bringing back may each write or read all of the memory.
const LIMIT: Duration = Duration::from_secs(900);

/// A machine that the program took.
pub struct Offload {
    program: PathBuf,
    pub directory: PathBuf,
    pub disk: PathBuf,
}

/// The process that hands a machine its memory.
pub struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Offload {
    /// Has the program take the machine, which goes on; `None` where there is no such program, or an emulator.
    pub fn take(home: &Home, kind: &Kind, vm: &str) -> Result<Option<Offload>> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let program = std::env::split_paths(&path).map(|dir| dir.join(PROGRAM)).find(|file| file.is_file());
        let (Some(program), Kind::CloudHypervisor { .. }) = (program, kind) else { return Ok(None) };
        let directory = home.root().join("bench-offload");
        files::remove(&directory)?;
        fs::create_dir(&directory)?;
        let taken = Offload { disk: directory.join("disk.qcow2"), program, directory };
        let socket = taken.directory.join("socket");
        let mut receiver =
            taken.run(&["snapshot", "--socket", &text(&socket)?, "--output-dir", &text(&taken.directory)?])?;
        wait_for(&socket, &mut receiver)?;
        let client = Client::new(&home.api(vm));
        client.pause()?;
        let asked =
            json!({ "destination_url": format!("unix:{}", text(&socket)?), "local": true, "preserve_source": true });
        let sent = put(&home.api(vm), "vm.send-migration", &asked);
        let received = sent.and_then(|()| Ok(receiver.wait()?));
        let copied = sparse::copy_file(&home.overlay(vm), &taken.disk);
        // The program ends a little before the hypervisor is done with it.
        let began = Instant::now();
        while let Err(error) = client.resume() {
            ensure!(began.elapsed() < Duration::from_secs(10), "{error:#}");
            std::thread::sleep(Duration::from_millis(20));
        }
        copied?;
        ensure!(received?.success(), "{PROGRAM} failed; its log is {}", taken.log().display());
        let about: Value = serde_json::from_slice(&fs::read(taken.directory.join(ABOUT))?)?;
        fs::write(taken.directory.join(CONFIG), about["vm_config"].to_string())?;
        Ok(Some(taken))
    }

    /// Makes the directory from which the program brings the machine back as another one.
    pub fn prepare(&self, target: &Path, own: &Own) -> Result<()> {
        prepare(&self.directory, target, own, false)?;
        let mut about: Value = serde_json::from_slice(&fs::read(self.directory.join(ABOUT))?)?;
        about["vm_config"] = serde_json::from_slice(&fs::read(target.join(CONFIG))?)?;
        fs::write(target.join(ABOUT), about.to_string())?;
        for entry in fs::read_dir(&self.directory)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with("memory-") {
                symlink(entry.path(), target.join(entry.file_name()))?;
            }
        }
        for socket in [&own.vsock, &own.serial] {
            files::remove(socket)?;
        }
        Ok(())
    }

    /// Starts the hypervisor and has the program bring the machine back.
    pub fn restore(
        &self,
        kind: &Kind,
        source: &Path,
        api: &Path,
        log: &Path,
        on_demand: bool,
    ) -> Result<(Child, Helper)> {
        let Kind::CloudHypervisor { path, .. } = kind else { bail!("only cloud-hypervisor can") };
        for stale in [api.to_path_buf(), format!("{}.lock", api.display()).into()] {
            files::remove(&stale)?;
        }
        let log = fs::File::create(log)?;
        let mut hypervisor = Command::new(path)
            .args(["--api-socket", &format!("path={}", api.display())])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        wait_for(api, &mut hypervisor)?;
        let socket = source.join("socket");
        let mut asked = json!({ "receiver_url": format!("unix:{}", text(&socket)?) });
        if on_demand {
            asked["memory_mode"] = json!("Postcopy");
        }
        let api = api.to_path_buf();
        // It answers when the machine is there; it may not listen yet.
        std::thread::spawn(move || {
            while UnixStream::connect(&api).is_err() {
                std::thread::sleep(Duration::from_millis(1));
            }
            put(&api, "vm.receive-migration", &asked)
        });
        wait_for(&socket, &mut hypervisor)?;
        let (socket, input) = (text(&socket)?, text(source)?);
        let mut words = vec!["restore", "--socket", &socket, "--input-dir", &input, "--resume"];
        words.extend(on_demand.then_some("--ondemand"));
        Ok((hypervisor, Helper(self.run(&words)?)))
    }

    fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    fn run(&self, words: &[&str]) -> Result<Child> {
        let log = fs::File::options().create(true).append(true).open(self.log())?;
        let mut command = Command::new(&self.program);
        command.args(words).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        command.spawn().context("cannot run the program")
    }
}

impl Drop for Offload {
    fn drop(&mut self) {
        let _ = files::remove(&self.directory);
    }
}

fn text(path: &Path) -> Result<String> {
    path.to_str().map(String::from).context("the path is not UTF-8")
}

fn wait_for(socket: &Path, maker: &mut Child) -> Result<()> {
    let began = Instant::now();
    while fs::symlink_metadata(socket).is_err() {
        ensure!(maker.try_wait()?.is_none() && began.elapsed() < LIMIT, "there is no {}", socket.display());
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn put(api: &Path, name: &str, body: &Value) -> Result<()> {
    let request = unix_http::agent(api, LIMIT).put(format!("http://localhost/api/v1/{name}"));
    let mut answer = request.header("content-type", "application/json").send(body.to_string())?;
    ensure!(answer.status().is_success(), "{name}: {}", answer.body_mut().read_to_string()?);
    Ok(())
}
