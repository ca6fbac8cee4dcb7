//! A VM's state file: `state/<vm>.json`, written whole or not at all.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use super::Hint;
use super::files::{self, write_atomic};
use super::home::Home;
use super::machine::{Action, Command, Event, Refusal, State};
use super::port::Forward;
use super::records;
use super::snapshots::check_name;
use crate::hypervisor::process;
use crate::protocol::address::{Mac, Subnet, check_vm_name};
use crate::protocol::daemon::Membership;

/// Version of the state file's layout; a newer one is never touched.
pub const SCHEMA: u32 = 1;

/// What puter last did with the VM. Whether it still holds is told by the process: see [`Vm::status`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Its disk is being made.
    Creating,
    /// The hypervisor was started, the agent has not answered yet.
    Starting,
    /// The agent answered and was configured.
    Running,
    /// A snapshot of it is being made.
    Paused,
    /// It was asked to power off.
    Stopping,
    Stopped,
    /// Its files are being removed.
    Deleting,
}

/// A process that cannot be mistaken for another with a recycled number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: u32,
    /// Start time in clock ticks since boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
}

/// The image that a VM was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageId {
    pub reference: String,
    pub digest: String,
}

/// Everything that is known of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    pub schema: u32,
    pub name: String,
    pub id: u32,
    pub status: Status,
    pub process: Option<ProcessId>,
    pub mac: Mac,
    pub ip: Ipv4Addr,
    /// The address that it gives itself where VMs have IPv6, as of its last start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip6: Option<Ipv6Addr>,
    pub tap: String,
    pub cid: u32,
    pub image: ImageId,
    pub overlay: PathBuf,
    pub cpus: u32,
    /// Bytes.
    pub memory: u64,
    /// Bytes.
    pub disk: u64,
    /// Names this machine's identity, new for each machine; see [`crate::protocol::agent::Identity`].
    pub instance: String,
    pub machine_id: String,
    /// Seconds since 1970-01-01 UTC.
    pub created: u64,
    /// Seconds since 1970-01-01 UTC; when the hypervisor was last started.
    pub started: Option<u64>,
    /// What runs it: `cloud-hypervisor 54.0` or `emulator`.
    pub hypervisor: Option<String>,
    /// Directories of the host that the guest sees.
    #[serde(default)]
    pub mounts: Vec<Mount>,
    /// Ports of the host that lead to the guest's.
    #[serde(default)]
    pub ports: Vec<Forward>,
    /// What is done when it ends without having been asked to.
    #[serde(default)]
    pub restart: Restart,
    /// Whether it starts when its user's services do.
    #[serde(default)]
    pub autostart: bool,
    /// Whether it is kept from all other VMs.
    #[serde(default)]
    pub isolate: bool,
    /// How it last ended by itself.
    #[serde(default)]
    pub exit: Option<Exit>,
    /// Restarts in a row, and when the next one is due, in seconds since 1970-01-01 UTC.
    #[serde(default)]
    pub retry: Option<Retry>,
    /// The snapshot that it last came from or that was last taken of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<Origin>,
    /// The cluster that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<Membership>,
    /// What its cluster runs once at its first boot has been run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub prepared: bool,
}

/// Names a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Written")]
pub struct Origin {
    /// The VM that it was taken of.
    pub vm: String,
    /// Its directory's name.
    pub id: String,
}

/// An origin as a file has it: only with names that cannot lead out of the snapshots' directory it is one.
#[derive(Deserialize)]
struct Written {
    vm: String,
    id: String,
}

impl TryFrom<Written> for Origin {
    type Error = String;

    fn try_from(Written { vm, id }: Written) -> Result<Origin, String> {
        check_vm_name(&vm)?;
        check_name(&id)?;
        Ok(Origin { vm, id })
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.vm, self.id)
    }
}

/// A directory of the host that a guest sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    pub host: PathBuf,
    /// An absolute path in the guest.
    pub guest: String,
    /// Enforced on the host: the guest cannot change it.
    pub read_only: bool,
}

impl std::str::FromStr for Mount {
    type Err = String;

    /// Reads `HOST:GUEST` or `HOST:GUEST:ro`; a relative HOST is one of the working directory.
    fn from_str(text: &str) -> Result<Mount, String> {
        let wrong = |why: &str| format!("'{text}' is no mount: {why}; it is written HOST:GUEST or HOST:GUEST:ro");
        let (rest, read_only) = match (text.strip_suffix(":ro"), text.strip_suffix(":rw")) {
            (Some(rest), _) => (rest, true),
            (_, Some(rest)) => (rest, false),
            _ => (text, false),
        };
        let (host, guest) = rest.rsplit_once(':').ok_or_else(|| wrong("it names no place in the guest"))?;
        if !guest.starts_with('/') || guest == "/" || guest.split('/').any(|part| part == "..") {
            return Err(wrong("the place in the guest must be an absolute path other than /"));
        }
        if host.is_empty() || text.chars().any(char::is_control) {
            return Err(wrong("it names no directory of the host"));
        }
        let host = std::path::absolute(host).map_err(|error| wrong(&error.to_string()))?;
        Ok(Mount { host, guest: guest.to_string(), read_only })
    }
}

impl std::fmt::Display for Mount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let read_only = if self.read_only { ":ro" } else { "" };
        write!(f, "{}:{}{read_only}", self.host.display(), self.guest)
    }
}

/// What is done when a VM ends without having been asked to by a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// It stays stopped.
    #[default]
    No,
    /// It starts again unless its guest powered it off.
    OnFailure,
    /// It starts again in any case.
    Always,
}

impl Restart {
    pub fn word(self) -> &'static str {
        match self {
            Restart::No => "no",
            Restart::OnFailure => "on-failure",
            Restart::Always => "always",
        }
    }
}

impl std::str::FromStr for Restart {
    type Err = String;

    fn from_str(text: &str) -> Result<Restart, String> {
        let all = [Restart::No, Restart::OnFailure, Restart::Always];
        let found = all.into_iter().find(|policy| policy.word() == text);
        found.ok_or_else(|| format!("'{text}' is no restart policy; there are no, on-failure and always"))
    }
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub reason: Reason,
    /// Seconds since 1970-01-01 UTC.
    pub at: u64,
}

/// Why a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The guest powered it off.
    PoweredOff,
    /// The guest's kernel panicked.
    Panicked,
    /// The hypervisor failed with this exit code.
    Failed(i32),
    /// A signal ended the hypervisor: 9 is what the kernel sends when memory runs out.
    Killed(i32),
    /// Nobody saw it.
    Unknown,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::PoweredOff => f.write_str("the guest powered off"),
            Reason::Panicked => f.write_str("the guest's kernel panicked"),
            Reason::Failed(code) => write!(f, "the hypervisor failed with exit code {code}"),
            Reason::Killed(signal) => write!(f, "the hypervisor was ended by signal {signal}"),
            Reason::Unknown => f.write_str("the hypervisor ended"),
        }
    }
}

/// The VM is to start again by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retry {
    /// Restarts in a row.
    pub count: u32,
    /// Seconds since 1970-01-01 UTC.
    pub at: u64,
}

impl Vm {
    /// Whether the hypervisor's process lives.
    pub fn is_alive(&self) -> bool {
        self.process.is_some_and(|p| process::is_alive(p.pid, p.start_time))
    }

    /// What it is now: without its process a VM is stopped, whatever its file says.
    pub fn state(&self) -> State {
        State::of(Some(self.status), self.is_alive())
    }

    /// Goes where the event leads; the caller saves.
    ///
    /// # Errors
    /// When the event cannot happen to a VM in this state: puter has a bug then.
    pub fn advance(&mut self, event: Event) -> Result<()> {
        let state = self.state();
        self.status = match state.after(event) {
            Some(State::Creating) => Status::Creating,
            Some(State::Stopped) => Status::Stopped,
            Some(State::Starting) => Status::Starting,
            Some(State::Running) => Status::Running,
            Some(State::Paused) => Status::Paused,
            Some(State::Stopping) => Status::Stopping,
            Some(State::Deleting | State::Absent) => Status::Deleting,
            None => bail!("'{}' is {state} and cannot be {event:?} (this is a bug of puter)", self.name),
        };
        Ok(())
    }

    /// Reads a VM's state; `None` where there is no such VM.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged, or was written by a newer puter.
    pub fn load(home: &Home, name: &str) -> Result<Option<Vm>> {
        check_vm_name(name).map_err(anyhow::Error::msg)?;
        let path = home.state(name);
        let Some(bytes) = records::read(&path)? else { return Ok(None) };
        let parse = || -> Result<Vm> {
            let vm: Vm = records::parse(&bytes, SCHEMA)?;
            if vm.name != name {
                bail!("it describes the VM '{}'", vm.name.escape_default());
            }
            Ok(vm)
        };
        let what = || format!("the state file {} cannot be used", path.display());
        parse().map(Some).with_context(what).hint(format!("mend it, or remove the VM: puter delete --force {name}"))
    }

    /// Writes the state.
    ///
    /// # Errors
    /// When the file cannot be written; the former one stays.
    pub fn save(&self, home: &Home) -> Result<()> {
        write_atomic(&home.state(&self.name), &serde_json::to_vec_pretty(self)?)
    }
}

impl Vm {
    /// Has this state ready, to be put in place when the disk may be full.
    ///
    /// # Errors
    /// When it cannot be written; the state's file is as it was.
    pub fn prepare(&self, home: &Home) -> Result<files::Prepared> {
        files::Prepared::new(&home.state(&self.name), &serde_json::to_vec_pretty(self)?)
    }
}

/// The VM of this name.
///
/// # Errors
/// When there is none, or its state cannot be used.
pub fn existing(home: &Home, name: &str) -> Result<Vm> {
    Vm::load(home, name)?.ok_or_else(|| refusal(name, State::Absent, Refusal::Absent))
}

/// The VM of this name, which must be in a state for this command.
///
/// # Errors
/// When there is none or its state does not allow the command; the hint tells what to do.
pub fn ready_for(home: &Home, name: &str, command: Command) -> Result<Vm> {
    let vm = existing(home, name)?;
    match vm.state().decide(command) {
        Action::Refuse(why) => Err(refusal(name, vm.state(), why)),
        _ => Ok(vm),
    }
}

/// The VM of this name, which must run.
///
/// # Errors
/// When there is none or it does not run; the hint tells what to do.
pub fn running(home: &Home, name: &str) -> Result<Vm> {
    ready_for(home, name, Command::Enter)
}

/// Why a command does nothing, and the way out.
pub fn refusal(name: &str, state: State, why: Refusal) -> anyhow::Error {
    let is = || anyhow!("'{name}' is {state}");
    let (error, hint) = match why {
        Refusal::Absent => {
            (anyhow!("there is no VM named '{name}'"), "`puter list` shows the VMs that exist".to_string())
        }
        Refusal::AlreadyRunning => {
            (anyhow!("'{name}' is already running"), format!("log in with `puter ssh {name}`, or start another name"))
        }
        Refusal::Active => (is(), format!("stop it first: puter stop {name}")),
        Refusal::StillStarting => {
            (anyhow!("'{name}' is still starting"), format!("`puter info {name}` shows when it runs"))
        }
        Refusal::Inactive => (is(), format!("start it first: puter start {name}")),
        Refusal::HalfMade => (
            anyhow!("a command on '{name}' was cut off, or still goes on: it is {state}"),
            format!("`puter start {name}` makes it anew, `puter delete {name}` removes what there is"),
        ),
    };
    Err::<(), _>(error).hint(hint).expect_err("it is an error")
}

/// The VMs by name, and beside them the state files that cannot be used, each with its reason.
#[derive(Debug, Default)]
pub struct All {
    pub vms: Vec<Vm>,
    pub damaged: Vec<(String, anyhow::Error)>,
}

/// Reads every state file; a damaged one hides no other.
///
/// # Errors
/// When the directory cannot be read.
pub fn load_all(home: &Home) -> Result<All> {
    let (mut vms, damaged) = records::load_each(&home.states(), |name| Vm::load(home, name))?;
    vms.sort_by_key(|vm: &Vm| vm.id);
    Ok(All { vms, damaged })
}

/// Chooses the lowest id that neither a state file nor `taken` holds, and lets `write` reserve it under the lock.
///
/// # Errors
/// When the subnet is full or `write` fails.
pub fn with_new_id<T>(
    home: &Home,
    subnet: Subnet,
    taken: &BTreeSet<u32>,
    write: impl FnOnce(u32) -> Result<T>,
) -> Result<T> {
    let limit = std::time::Duration::from_secs(10);
    let _lock = files::lock(&home.id_lock(), limit, "another command has been choosing an id for 10 seconds")?;
    let all = load_all(home)?;
    let used: BTreeSet<u32> = all.vms.iter().map(|vm| vm.id).chain(taken.iter().copied()).collect();
    let Some(id) = (1..=subnet.last_id()).find(|id| !used.contains(id)) else {
        bail!(
            "the subnet {subnet} is full: it has {} addresses and as many VMs; delete one, or choose a wider subnet",
            subnet.last_id()
        );
    };
    write(id)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample(name: &str, id: u32) -> Vm {
        Vm {
            schema: SCHEMA,
            name: name.into(),
            id,
            status: Status::Running,
            process: None,
            mac: Mac::of_id(id),
            ip: Subnet::default().address(id).unwrap(),
            ip6: None,
            tap: crate::protocol::address::tap_name(name),
            cid: id + 3,
            image: ImageId { reference: "r".into(), digest: "sha256:0".into() },
            overlay: "/o".into(),
            cpus: 1,
            memory: 1 << 30,
            disk: 1 << 30,
            instance: "i".into(),
            machine_id: "m".into(),
            created: 0,
            started: None,
            hypervisor: None,
            mounts: Vec::new(),
            ports: Vec::new(),
            restart: Restart::No,
            autostart: false,
            isolate: false,
            exit: None,
            retry: None,
            head: None,
            member: None,
            prepared: false,
        }
    }

    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.prepare().unwrap();
        (dir, home)
    }

    #[test]
    fn a_state_reads_back_and_without_its_process_is_stopped() {
        let (_dir, home) = home();
        let mut vm = sample("web", 1);
        vm.save(&home).unwrap();
        assert_eq!(Vm::load(&home, "web").unwrap(), Some(vm.clone()));
        assert_eq!(vm.state(), State::Stopped);
        let me = std::process::id();
        let start_time = process::start_time(me).unwrap();
        vm.process = Some(ProcessId { pid: me, start_time });
        assert_eq!(vm.state(), State::Running);
        vm.process = Some(ProcessId { pid: me, start_time: start_time + 1 });
        assert_eq!(vm.state(), State::Stopped);
        assert_eq!(Vm::load(&home, "absent").unwrap(), None);
    }

    #[test]
    fn a_state_of_before_there_were_published_ports_reads_as_one_without() {
        let (_dir, home) = home();
        let vm = sample("web", 1);
        let mut text = serde_json::to_value(&vm).unwrap();
        assert!(text.as_object_mut().unwrap().remove("ports").is_some());
        std::fs::write(home.state("web"), text.to_string()).unwrap();
        assert_eq!(Vm::load(&home, "web").unwrap(), Some(vm));
    }

    #[test]
    fn an_origin_leads_nowhere_else() {
        let read = |vm: &str, id: &str| {
            serde_json::from_value::<Origin>(serde_json::json!({ "vm": vm, "id": id }))
                .map_err(|error| error.to_string())
        };
        assert_eq!(read("web", "1").unwrap(), Origin { vm: "web".into(), id: "1".into() });
        for (vm, id) in [("..", "1"), ("web", ".."), ("web", "../../x"), ("web", "/x"), ("web", ""), ("web", ".lock")] {
            assert!(read(vm, id).is_err(), "{vm} {id}");
        }
    }

    #[test]
    fn mounts_are_read_and_wrong_ones_say_why() {
        let mount: Mount = "/srv/a:b:/data:ro".parse().unwrap();
        assert_eq!(mount, Mount { host: "/srv/a:b".into(), guest: "/data".into(), read_only: true });
        assert_eq!(mount.to_string().parse(), Ok(mount));
        let here: Mount = ".:/work".parse().unwrap();
        assert_eq!(here.host, std::env::current_dir().unwrap());
        for bad in ["", "/srv", "/srv:data", "/srv:/", ":/data", "/srv:/a/../b", "/srv:/a\nb"] {
            assert!(bad.parse::<Mount>().unwrap_err().contains("HOST:GUEST"), "{bad}");
        }
    }

    #[test]
    fn damaged_files_are_named_and_hide_no_other_vm() {
        let (_dir, home) = home();
        sample("good", 1).save(&home).unwrap();
        std::fs::write(home.state("binary"), [0xff, 0, 1]).unwrap();
        std::fs::write(home.state("cut"), "{\"schema\":1,\"na").unwrap();
        std::fs::write(home.state("newer"), "{\"schema\":2}").unwrap();
        std::fs::copy(home.state("good"), home.state("other")).unwrap();
        let all = load_all(&home).unwrap();
        assert_eq!(all.vms.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(), ["good"]);
        let names: Vec<_> = all.damaged.iter().map(|d| d.0.as_str()).collect();
        assert_eq!(names, ["binary", "cut", "newer", "other"]);
        assert!(format!("{:#}", all.damaged[2].1).contains("schema 2"));
    }

    #[test]
    fn ids_are_the_lowest_free_ones_and_run_out_clearly() {
        let (_dir, home) = home();
        let subnet: Subnet = "10.0.0.0/27".parse().unwrap();
        for id in [1, 2, 4] {
            sample(&format!("vm{id}"), id).save(&home).unwrap();
        }
        let taken = BTreeSet::from([3]);
        assert_eq!(with_new_id(&home, subnet, &taken, Ok).unwrap(), 5);
        assert_eq!(with_new_id(&home, subnet, &BTreeSet::new(), Ok).unwrap(), 3);
        let full: BTreeSet<u32> = (1..=subnet.last_id()).collect();
        let error = with_new_id(&home, subnet, &full, Ok).unwrap_err().to_string();
        assert!(error.contains("full"), "{error}");
    }
}
