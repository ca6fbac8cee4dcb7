//! A machine as cloud-hypervisor's command line, written and read: the emulator takes the same words.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// A machine's hardware and where its files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Number of virtual processors.
    pub cpus: u32,
    /// Bytes.
    pub memory: u64,
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    pub disks: Vec<Disk>,
    pub nets: Vec<Net>,
    pub vsock: Option<Vsock>,
    /// Directories of the host that the guest may mount.
    pub shares: Vec<Share>,
    pub serial: Serial,
    /// The Unix socket of the REST API.
    pub api_socket: PathBuf,
    /// Where events are written, as JSON.
    pub events: Option<PathBuf>,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    pub path: PathBuf,
    pub format: DiskFormat,
    pub readonly: bool,
}

/// What is in a disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    Raw,
    /// `backing` allows a backing file, which cloud-hypervisor refuses unless told (since v51).
    Qcow2 {
        backing: bool,
    },
}

/// A network link: a TAP that is there already and the guest's MAC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Net {
    pub tap: String,
    pub mac: String,
}

/// The guest's vsock and its socket on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vsock {
    pub cid: u32,
    pub socket: PathBuf,
}

/// Where the serial console is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serial {
    /// Its output goes to this file.
    File(PathBuf),
    /// The hypervisor makes this Unix socket, and serves the one who connected last.
    Socket(PathBuf),
}

/// A virtiofs device: the name under which the guest mounts it, and virtiofsd's socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    pub tag: String,
    pub socket: PathBuf,
}

/// A machine that is brought back from a snapshot's directory, which names its hardware and its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restore {
    /// The directory, as [`super::snapshot::prepare`] makes it.
    pub source: PathBuf,
    pub memory: MemoryMode,
    pub api_socket: PathBuf,
    pub events: Option<PathBuf>,
}

/// How a restored machine gets its memory from the hypervisor. Where the directory's configuration maps the snapshot's
/// memory file into the machine, there is nothing left to get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryMode {
    /// All of it before it runs.
    #[default]
    Copy,
    /// Each page when it is touched, by userfaultfd (cloud-hypervisor 52 and newer).
    OnDemand,
}

/// What a hypervisor's command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    Boot(Box<Machine>),
    Restore(Restore),
}

impl Restore {
    /// The command line, without the program. The machine runs at once.
    ///
    /// # Errors
    /// When a path holds a character that the options' syntax cannot carry.
    pub fn to_arguments(&self) -> Result<Vec<String>> {
        let mode = match self.memory {
            MemoryMode::Copy => "",
            MemoryMode::OnDemand => ",memory_restore_mode=ondemand",
        };
        let source = plain(&self.source)?;
        plain(&self.api_socket)?;
        let mut words = vec!["--api-socket".to_string(), api_socket(&self.api_socket)];
        words.extend(["--restore".into(), format!("source_url=file://{source},resume=true{mode}")]);
        if let Some(events) = &self.events {
            words.extend(["--event-monitor".into(), format!("path={}", plain(events)?)]);
        }
        Ok(words)
    }

    fn from_arguments(words: &[String]) -> Result<Restore> {
        let (mut source, mut api_socket, mut events, mut memory) = (None, None, None, MemoryMode::Copy);
        let mut rest = words.iter();
        while let Some(option) = rest.next() {
            let value = rest.next().with_context(|| format!("the option {option} has no value"))?;
            let parts = Parts { option, value };
            match option.as_str() {
                "--api-socket" => api_socket = Some(parts.path("path")?),
                "--event-monitor" => events = Some(parts.path("path")?),
                "--restore" => {
                    let url = parts.need("source_url")?;
                    let path = url.strip_prefix("file://").with_context(|| format!("{url} is not a file:// URL"))?;
                    source = Some(PathBuf::from(path));
                    ensure!(parts.get("resume") == Some("true"), "the emulator restores only with resume=true");
                    if parts.get("memory_restore_mode") == Some("ondemand") {
                        memory = MemoryMode::OnDemand;
                    }
                }
                _ => bail!("the emulator does not know the option {option} beside --restore"),
            }
        }
        Ok(Restore {
            source: source.context("the option --restore is missing")?,
            memory,
            api_socket: api_socket.context("the option --api-socket is missing")?,
            events,
        })
    }
}

impl Wanted {
    /// Reads a command line that [`Machine::to_arguments`] or [`Restore::to_arguments`] could have written.
    ///
    /// # Errors
    /// When an option is unknown, missing or has no usable value; the error names it.
    pub fn from_arguments(words: &[String]) -> Result<Wanted> {
        match words.iter().any(|word| word == "--restore") {
            true => Restore::from_arguments(words).map(Wanted::Restore),
            false => Machine::from_arguments(words).map(|machine| Wanted::Boot(Box::new(machine))),
        }
    }
}

impl Machine {
    /// The command line, without the program.
    ///
    /// # Errors
    /// When a path holds a character that the options' syntax cannot carry.
    pub fn to_arguments(&self) -> Result<Vec<String>> {
        let mut words: Vec<String> = Vec::new();
        let mut add = |option: &str, value: String| words.extend([option.to_string(), value]);
        plain(&self.api_socket)?;
        add("--api-socket", api_socket(&self.api_socket));
        add("--cpus", format!("boot={}", self.cpus));
        // As a memfd, which virtiofsd maps as well, and of which a snapshot holds what the guest has touched and no more.
        add("--memory", format!("size={},shared=on", self.memory));
        add("--kernel", whole(&self.kernel)?);
        if let Some(initrd) = &self.initrd {
            add("--initramfs", whole(initrd)?);
        }
        add("--cmdline", self.cmdline.clone());
        for disk in &self.disks {
            let format = match disk.format {
                DiskFormat::Raw => "image_type=raw",
                DiskFormat::Qcow2 { backing: false } => "image_type=qcow2",
                DiskFormat::Qcow2 { backing: true } => "image_type=qcow2,backing_files=on",
            };
            let readonly = if disk.readonly { ",readonly=on" } else { "" };
            add("--disk", format!("path={},{format}{readonly}", plain(&disk.path)?));
        }
        for net in &self.nets {
            // Never ip, mask, host_mac or mtu: each would need CAP_NET_ADMIN.
            add("--net", format!("tap={},mac={}", net.tap, net.mac));
        }
        if let Some(vsock) = &self.vsock {
            add("--vsock", format!("cid={},socket={}", vsock.cid, plain(&vsock.socket)?));
        }
        for share in &self.shares {
            add("--fs", format!("tag={},socket={}", share.tag, plain(&share.socket)?));
        }
        add(
            "--serial",
            match &self.serial {
                Serial::File(path) => format!("file={}", plain(path)?),
                Serial::Socket(path) => format!("socket={}", plain(path)?),
            },
        );
        add("--console", "off".into());
        if let Some(events) = &self.events {
            add("--event-monitor", format!("path={}", plain(events)?));
        }
        // A guest's kernel tells its panic by this device.
        words.push("--pvpanic".into());
        Ok(words)
    }

    /// Reads a command line that [`Machine::to_arguments`] could have written.
    ///
    /// # Errors
    /// When an option is unknown, missing or has no usable value; the error names it.
    pub fn from_arguments(words: &[String]) -> Result<Machine> {
        let (mut cpus, mut memory, mut kernel, mut initrd) = (None, None, None, None);
        let (mut serial, mut api_socket, mut events, mut vsock) = (None, None, None, None);
        let (mut cmdline, mut disks, mut nets) = (String::new(), Vec::new(), Vec::new());
        let mut shares = Vec::new();
        let mut rest = words.iter();
        while let Some(option) = rest.next() {
            if option == "--pvpanic" {
                continue;
            }
            let value = rest.next().with_context(|| format!("the option {option} has no value"))?;
            let parts = Parts { option, value };
            match option.as_str() {
                "--api-socket" => api_socket = Some(parts.path("path")?),
                "--cpus" => cpus = Some(parts.number("boot")?),
                "--memory" => memory = Some(parts.number("size")?),
                "--kernel" => kernel = Some(PathBuf::from(value)),
                "--initramfs" => initrd = Some(PathBuf::from(value)),
                "--cmdline" => cmdline.clone_from(value),
                "--disk" => disks.push(parts.disk()?),
                "--net" => nets.push(Net { tap: parts.need("tap")?.into(), mac: parts.need("mac")?.into() }),
                "--vsock" => vsock = Some(Vsock { cid: parts.number("cid")?, socket: parts.path("socket")? }),
                "--fs" => shares.push(Share { tag: parts.need("tag")?.into(), socket: parts.path("socket")? }),
                "--serial" => {
                    serial = Some(match parts.get("socket") {
                        Some(_) => Serial::Socket(parts.path("socket")?),
                        None => Serial::File(parts.path("file")?),
                    });
                }
                "--console" => ensure!(value == "off", "the emulator knows only --console off"),
                "--event-monitor" => events = Some(parts.path("path")?),
                _ => bail!("the emulator does not know the option {option}"),
            }
        }
        let cpus = cpus.context("the option --cpus is missing")?;
        let memory = memory.context("the option --memory is missing")?;
        ensure!((1..=254).contains(&cpus), "--cpus boot={cpus} is not from 1 to 254");
        ensure!(memory >= 16 << 20, "--memory size={memory} is less than 16 MiB");
        Ok(Machine {
            cpus,
            memory,
            kernel: kernel.context("the option --kernel is missing")?,
            initrd,
            cmdline,
            disks,
            nets,
            vsock,
            shares,
            serial: serial.context("the option --serial is missing")?,
            api_socket: api_socket.context("the option --api-socket is missing")?,
            events,
        })
    }
}

/// An option's value, `key=value,key=value`.
struct Parts<'a> {
    option: &'a str,
    value: &'a str,
}

impl<'a> Parts<'a> {
    fn get(&self, key: &str) -> Option<&'a str> {
        self.value.split(',').find_map(|part| part.strip_prefix(key)?.strip_prefix('='))
    }

    fn need(&self, key: &str) -> Result<&'a str> {
        let found = self.get(key).filter(|value| !value.is_empty());
        found.with_context(|| format!("the option {} {} has no {key}", self.option, self.value))
    }

    fn path(&self, key: &str) -> Result<PathBuf> {
        self.need(key).map(PathBuf::from)
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> Result<T> {
        let text = self.need(key)?;
        text.parse().ok().with_context(|| format!("the option {} has {key}={text}, which is no number", self.option))
    }

    fn disk(&self) -> Result<Disk> {
        let backing = self.get("backing_files") == Some("on");
        let format = match self.need("image_type")? {
            "raw" => DiskFormat::Raw,
            "qcow2" => DiskFormat::Qcow2 { backing },
            other => bail!("the emulator does not know the image_type {other}"),
        };
        Ok(Disk { path: self.path("path")?, format, readonly: self.get("readonly") == Some("on") })
    }
}

/// The value of `--api-socket`, by which a machine's hypervisor is told from all other processes.
pub fn api_socket(path: &Path) -> String {
    format!("path={}", path.display())
}

/// A path that stands alone as a word.
fn whole(path: &Path) -> Result<String> {
    path.to_str().map(String::from).with_context(|| format!("the path {} is not UTF-8", path.display()))
}

/// A path inside an option's list.
fn plain(path: &Path) -> Result<String> {
    let text = whole(path)?;
    if let Some(bad) = text.chars().find(|c| matches!(c, ',' | '"' | '[' | ']' | '=') || c.is_control()) {
        bail!(
            "the path {text} contains {bad:?}, which the hypervisor's options cannot carry; set PUTER_HOME elsewhere"
        );
    }
    Ok(text)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> Machine {
        Machine {
            cpus: 2,
            memory: 512 << 20,
            kernel: "/h/vmlinuz".into(),
            initrd: Some("/h/initrd".into()),
            cmdline: "console=ttyS0 root=/dev/vda rw".into(),
            disks: vec![
                Disk { path: "/h/web.qcow2".into(), format: DiskFormat::Qcow2 { backing: true }, readonly: false },
                Disk { path: "/h/seed.raw".into(), format: DiskFormat::Raw, readonly: true },
            ],
            nets: vec![Net { tap: "pt-web".into(), mac: "52:54:00:00:00:0b".into() }],
            vsock: Some(Vsock { cid: 4, socket: "/h/run/web.vsock".into() }),
            shares: vec![Share { tag: "share0".into(), socket: "/h/run/web.fs0".into() }],
            serial: Serial::Socket("/h/run/web.serial".into()),
            api_socket: "/h/run/web.api".into(),
            events: Some("/h/run/web.events".into()),
        }
    }

    #[test]
    fn a_machine_is_read_as_it_was_written() {
        let words = sample().to_arguments().unwrap();
        let line = words.join(" ");
        for part in [
            "--api-socket path=/h/run/web.api",
            "--disk path=/h/web.qcow2,image_type=qcow2,backing_files=on",
            "--net tap=pt-web,mac=52:54:00:00:00:0b",
            "--vsock cid=4,socket=/h/run/web.vsock",
            "--memory size=536870912,shared=on",
            "--fs tag=share0,socket=/h/run/web.fs0",
            "--serial socket=/h/run/web.serial --console off",
        ] {
            assert!(line.contains(part), "{line}");
        }
        assert_eq!(Machine::from_arguments(&words).unwrap(), sample());
    }

    #[test]
    fn a_restore_is_read_as_it_was_written() {
        let restore = Restore {
            source: "/h/run/web.restore".into(),
            memory: MemoryMode::OnDemand,
            api_socket: "/h/run/web.api".into(),
            events: Some("/h/run/web.events".into()),
        };
        let words = restore.to_arguments().unwrap();
        assert!(
            words
                .contains(&"source_url=file:///h/run/web.restore,resume=true,memory_restore_mode=ondemand".to_string())
        );
        assert_eq!(Wanted::from_arguments(&words).unwrap(), Wanted::Restore(restore));
        let boot = sample();
        let words = boot.to_arguments().unwrap();
        assert_eq!(Wanted::from_arguments(&words).unwrap(), Wanted::Boot(Box::new(boot)));
        for (wrong, why) in [
            (["--restore", "source_url=http://x,resume=true"], "file://"),
            (["--restore", "source_url=file:///x"], "resume=true"),
            (["--cpus", "boot=1"], "beside --restore"),
        ] {
            let mut words: Vec<String> = wrong.map(String::from).into();
            words.extend(["--restore".into(), "source_url=file:///x,resume=true".into()]);
            let error = Wanted::from_arguments(&words).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_path_cannot_smuggle_an_option() {
        let mut machine = sample();
        machine.disks[0].path = "/h/a,readonly=off".into();
        let error = machine.to_arguments().unwrap_err().to_string();
        assert!(error.contains("','") && error.contains("PUTER_HOME"), "{error}");
    }

    #[test]
    fn a_wrong_command_line_is_named() {
        let good = sample().to_arguments().unwrap();
        let cases = [
            ("--cpus", "boot=0", "from 1 to 254"),
            ("--cpus", "boot=x", "no number"),
            ("--memory", "size=1", "16 MiB"),
            ("--disk", "path=/x,image_type=vhd", "vhd"),
            ("--disk", "image_type=raw", "no path"),
            ("--net", "tap=a", "no mac"),
            ("--balloon", "x", "--balloon"),
        ];
        for (option, value, expected) in cases {
            let mut words = good.clone();
            words.extend([option.to_string(), value.to_string()]);
            let error = Machine::from_arguments(&words).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(Machine::from_arguments(&good[..good.len() - 2]).unwrap_err().to_string().contains("no value"));
        assert!(Machine::from_arguments(&[]).unwrap_err().to_string().contains("--cpus is missing"));
    }
}
