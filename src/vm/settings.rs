//! Settings: flags before environment before `~/.config/puter/config.toml` before defaults.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::Hint;
use crate::hypervisor::Setting as HypervisorSetting;
use crate::image::{Mirrors, parse_mirrors};
use crate::protocol::address::Subnet;
use crate::protocol::ipv6::Ipv6;
use crate::protocol::ports::{HostPort, parse_list};

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Default,
    File,
    Environment,
}

impl Source {
    pub fn word(self) -> &'static str {
        match self {
            Source::Default => "default",
            Source::File => "file",
            Source::Environment => "environment",
        }
    }
}

/// A setting's name, its value as text and where it came from, for `puter config`.
pub type Shown = (&'static str, String, Source);

/// All settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Image for `init` and for new VMs.
    pub image: Option<String>,
    pub cpus: u32,
    /// Bytes.
    pub memory: u64,
    /// Bytes.
    pub disk: u64,
    pub hypervisor: HypervisorSetting,
    pub subnet: Subnet,
    /// Whether VMs have IPv6, and in which network; puterd takes it on when it starts.
    pub ipv6: Ipv6,
    /// Whether new VMs are kept from all others.
    pub isolate: bool,
    /// Ports of the host that VMs may reach besides DHCP and DNS; puterd takes them on when it starts.
    pub host_ports: Vec<HostPort>,
    /// How long `start` waits for the agent.
    pub start_timeout: Duration,
    /// How long `stop` waits before force.
    pub stop_timeout: Duration,
    /// How long a registry may be silent.
    pub registry_timeout: Duration,
    /// Registries that may be spoken to without TLS.
    pub insecure_registries: Vec<String>,
    /// A file of certificate authorities that are believed besides the system's.
    pub registry_ca: Option<PathBuf>,
    /// What is asked before a registry, in order.
    pub registry_mirrors: Mirrors,
    /// Whether puterd is a service of the user's systemd where there is one.
    pub service: bool,
    shown: Vec<Shown>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    image: Option<String>,
    cpus: Option<u32>,
    memory: Option<String>,
    disk: Option<String>,
    hypervisor: Option<String>,
    subnet: Option<String>,
    ipv6: Option<String>,
    isolate: Option<bool>,
    host_ports: Option<Vec<String>>,
    start_timeout: Option<u64>,
    stop_timeout: Option<u64>,
    registry_timeout: Option<u64>,
    insecure_registries: Option<Vec<String>>,
    registry_ca: Option<String>,
    registry_mirrors: Option<BTreeMap<String, Vec<String>>>,
    service: Option<bool>,
}

impl Settings {
    /// Reads the settings file and the environment.
    ///
    /// # Errors
    /// When a value cannot be used; the error names the setting and where it stands.
    pub fn load() -> Result<Settings> {
        let path = config_path();
        let text = match &path {
            Some(path) => match std::fs::read_to_string(path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
                other => other.with_context(|| format!("cannot read {}", path.display()))?,
            },
            None => String::new(),
        };
        let name = path.unwrap_or_default();
        Settings::parse(&text, &name, |key| std::env::var(key).ok().filter(|v| !v.is_empty()))
    }

    /// Makes settings of a file's text and the environment.
    ///
    /// # Errors
    /// As for [`Settings::load`].
    pub fn parse(text: &str, file_name: &Path, env: impl Fn(&str) -> Option<String>) -> Result<Settings> {
        let file: File = toml::from_str(text)
            .with_context(|| format!("the settings file {} cannot be used", file_name.display()))
            .hint("correct the line or remove it; puter.toml(5) describes the settings")?;
        let mut shown = Vec::new();
        let mut pick = |name: &'static str, from_file: Option<String>, default: &str| -> (String, String) {
            let variable = format!("PUTER_{}", name.to_ascii_uppercase());
            let (value, source) = match (env(&variable), from_file) {
                (Some(value), _) => (value, Source::Environment),
                (None, Some(value)) => (value, Source::File),
                (None, None) => (default.to_string(), Source::Default),
            };
            shown.push((name, value.clone(), source));
            let place = match source {
                Source::Environment => format!("the environment's {variable}"),
                _ => format!("the setting '{name}'"),
            };
            (value, place)
        };
        let number = |(value, place): (String, String), least: u64, most: u64| -> Result<u64> {
            value
                .parse()
                .ok()
                .filter(|n| (least..=most).contains(n))
                .with_context(|| format!("{place} is '{value}'; it must be a number from {least} to {most}"))
        };
        let size = |(value, place): (String, String)| -> Result<u64> {
            parse_size(&value).map_err(|why| anyhow::anyhow!("{place}: {why}"))
        };
        let truth = |(value, place): (String, String)| match value.as_str() {
            "true" | "yes" => Ok(true),
            "false" | "no" => Ok(false),
            other => Err(anyhow::anyhow!("{place} is '{other}'; it must be true or false")),
        };
        let image = pick("image", file.image, "").0;
        let cpus = number(pick("cpus", file.cpus.map(|n| n.to_string()), "2"), 1, 254)? as u32;
        let memory = size(pick("memory", file.memory, "1G"))?;
        let disk = size(pick("disk", file.disk, "10G"))?;
        let hypervisor = match pick("hypervisor", file.hypervisor, "auto").0.as_str() {
            "auto" => HypervisorSetting::Auto,
            "emulated" => HypervisorSetting::Emulated,
            path => HypervisorSetting::Path(PathBuf::from(path)),
        };
        let (subnet, place) = pick("subnet", file.subnet, "10.0.0.1/24");
        let subnet = subnet.parse().map_err(|why| anyhow::anyhow!("{place}: {why}"))?;
        let (ipv6, place) = pick("ipv6", file.ipv6, "auto");
        let ipv6 = ipv6.parse().map_err(|why| anyhow::anyhow!("{place}: {why}"))?;
        let isolate = truth(pick("isolate", file.isolate.map(|yes| yes.to_string()), "false"))?;
        let (ports, place) = pick("host_ports", file.host_ports.map(|list| list.join(",")), "");
        let host_ports = parse_list(&ports).map_err(|why| anyhow::anyhow!("{place}: {why}"))?;
        let start_timeout = number(pick("start_timeout", file.start_timeout.map(|n| n.to_string()), "300"), 1, 86_400)?;
        let stop_timeout = number(pick("stop_timeout", file.stop_timeout.map(|n| n.to_string()), "30"), 0, 86_400)?;
        let registry = pick("registry_timeout", file.registry_timeout.map(|n| n.to_string()), "30");
        let registry_timeout = number(registry, 1, 3600)?;
        let insecure = pick("insecure_registries", file.insecure_registries.map(|l| l.join(",")), "").0;
        let (ca, place) = pick("registry_ca", file.registry_ca, "");
        anyhow::ensure!(ca.is_empty() || ca.starts_with('/'), "{place} is '{ca}'; it must be a file's absolute path");
        let mirrors = file.registry_mirrors.map(|registries| {
            let pair = |registry: &str, mirror: &String| format!("{registry}={mirror}");
            let all = registries.iter().flat_map(|(registry, list)| list.iter().map(move |one| pair(registry, one)));
            all.collect::<Vec<_>>().join(",")
        });
        let (mirrors, place) = pick("registry_mirrors", mirrors, "");
        let registry_mirrors = parse_mirrors(&mirrors).map_err(|why| anyhow::anyhow!("{place}: {why}"))?;
        let service = truth(pick("service", file.service.map(|yes| yes.to_string()), "true"))?;
        Ok(Settings {
            service,
            image: Some(image).filter(|i| !i.is_empty()),
            cpus,
            memory,
            disk,
            hypervisor,
            subnet,
            ipv6,
            isolate,
            host_ports,
            start_timeout: Duration::from_secs(start_timeout),
            stop_timeout: Duration::from_secs(stop_timeout),
            registry_timeout: Duration::from_secs(registry_timeout),
            insecure_registries: insecure.split(',').map(str::trim).filter(|s| !s.is_empty()).map(Into::into).collect(),
            registry_ca: Some(ca).filter(|ca| !ca.is_empty()).map(PathBuf::from),
            registry_mirrors,
            shown,
        })
    }

    /// Each setting with its value and where it came from.
    pub fn shown(&self) -> &[Shown] {
        &self.shown
    }
}

/// The settings file: `$XDG_CONFIG_HOME/puter/config.toml` or `~/.config/puter/config.toml`.
pub fn config_path() -> Option<PathBuf> {
    Some(config_home()?.join("puter/config.toml"))
}

/// Where the user's settings are: `$XDG_CONFIG_HOME` or `~/.config`.
pub fn config_home() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("XDG_CONFIG_HOME").or_else(|| var("HOME").map(|home| home.join(".config")))
}

/// Reads a size: a number of bytes, or one with a binary unit K, M, G or T (also KiB, MiB…).
///
/// # Errors
/// A sentence that says what a size looks like.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size; examples are 512M, 2G and 1T");
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..split].parse().map_err(|_| wrong())?;
    let shift = match text[split..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).filter(|n| *n > 0).ok_or_else(wrong)
}

/// Writes a size for people: `10G`, `1.5G`, `512M`.
pub fn show_size(bytes: u64) -> String {
    for (shift, unit) in [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')] {
        let one = 1_u64 << shift;
        if bytes >= one {
            return match bytes % one {
                0 => format!("{}{unit}", bytes / one),
                _ => format!("{:.1}{unit}", bytes as f64 / one as f64),
            };
        }
    }
    format!("{bytes}B")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, env: &[(&str, &str)]) -> Result<Settings> {
        let env: Vec<(String, String)> = env.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Settings::parse(text, Path::new("config.toml"), move |key| {
            env.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone())
        })
    }

    #[test]
    fn environment_comes_before_file_before_default() {
        let settings = load("cpus = 4\nmemory = \"3G\"", &[("PUTER_CPUS", "8")]).unwrap();
        assert_eq!((settings.cpus, settings.memory, settings.disk), (8, 3 << 30, 10 << 30));
        let source = |name| settings.shown().iter().find(|s| s.0 == name).unwrap().2;
        assert_eq!(source("cpus"), Source::Environment);
        let network = load("isolate = true\nhost_ports = [\"udp/123\", \"tcp/22\"]", &[]).unwrap();
        assert!(network.isolate && !settings.isolate);
        let shown = network.shown().iter().find(|s| s.0 == "host_ports").unwrap();
        assert_eq!((shown.1.as_str(), network.host_ports.len()), ("udp/123,tcp/22", 2));
        assert_eq!(source("memory"), Source::File);
        let text = "[registry_mirrors]\n\"docker.io\" = [\"a.io/hub\", \"b:5000\"]";
        let mirrors = load(text, &[]).unwrap();
        assert_eq!(mirrors.registry_mirrors["docker.io"], ["a.io/hub", "b:5000"]);
        let text = mirrors.shown().iter().find(|s| s.0 == "registry_mirrors").unwrap().1.clone();
        let again = load("", &[("PUTER_REGISTRY_MIRRORS", &text)]).unwrap();
        assert_eq!((again.registry_mirrors, again.registry_ca), (mirrors.registry_mirrors, None));
        assert_eq!(source("disk"), Source::Default);
    }

    #[test]
    fn a_wrong_setting_is_named_with_its_place() {
        for (text, env, expected) in [
            ("cpus = 0", vec![], "the setting 'cpus' is '0'"),
            ("", vec![("PUTER_MEMORY", "lots")], "the environment's PUTER_MEMORY: 'lots' is not a size"),
            ("subnet = \"10.0.0.9/24\"", vec![], "the setting 'subnet'"),
            ("ipv6 = \"fe80::/64\"", vec![], "the setting 'ipv6': 'fe80::/64' is"),
            ("registry_ca = \"ca.pem\"", vec![], "the setting 'registry_ca' is 'ca.pem'; it must be"),
            ("[registry_mirrors]\nx = [\"a b\"]", vec![], "the setting 'registry_mirrors': 'a b' is no mirror"),
            ("cpu = 1", vec![], "config.toml cannot be used"),
            ("", vec![("PUTER_ISOLATE", "maybe")], "PUTER_ISOLATE is 'maybe'"),
            ("host_ports = [\"tcp/22\", \"ssh\"]", vec![], "the setting 'host_ports': 'ssh' is no port"),
        ] {
            let error = format!("{:#}", load(text, &env).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in [("512M", 512 << 20), ("2G", 2 << 30), ("1TiB", 1 << 40), ("4096", 4096), ("1kb", 1024)] {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for text in ["", "G", "-1G", "1.5G", "0", "99999999T", "1X", "ä"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!(show_size(10 << 30), "10G");
        assert_eq!(show_size(3 << 29), "1.5G");
        assert_eq!(show_size(7), "7B");
    }
}
