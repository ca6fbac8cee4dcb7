//! puterd: holds the three network capabilities, keeps the bridge, its filter and its TAPs, and answers the CLI's
//! requests for them on a Unix socket. It stores nothing: the interfaces are its only record, so that a restart adopts
//! what is there.

/// Writes a line to standard error, and nothing where no one reads it any more: eprintln! would end the process.
macro_rules! log {
    ($($arg:tt)*) => {{
        use std::io::Write;
        let _ = std::io::stderr().write_all(format!("puterd: {}\n", format_args!($($arg)*)).as_bytes());
    }};
}

pub mod api;
mod branch;
mod branches;
mod bridge;
mod bridge6;
mod capabilities;
mod end;
mod filter;
mod known;
mod memory;
mod neighbours;
mod network;
mod network6;
mod removal;
mod resolvers;
pub mod server;
mod socket;
mod taps;
mod upkeep;
mod watch;

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use argh::FromArgs;
use async_signal::{Signal, Signals};
use smol::stream::StreamExt;

use self::bridge::Settings;
use self::network::Network;
use self::socket::Listener;
use crate::protocol::address::Subnet;
use crate::protocol::ipv6::Ipv6;
use crate::protocol::ports::{HostPort, MOST_PORTS};

/// Network service of puter: bridge, TAPs, DHCP and NAT for one user's virtual machines.
#[derive(FromArgs, Debug)]
struct Options {
    /// directory of puter's data (default: $PUTER_HOME, or puter in $XDG_DATA_HOME or ~/.local/share)
    #[argh(option, arg_name = "dir")]
    home: Option<PathBuf>,
    /// socket to listen on (default: run/daemon.sock in the home)
    #[argh(option, arg_name = "path")]
    socket: Option<PathBuf>,
    /// interface name of the bridge (default: puter0)
    #[argh(option, arg_name = "name", default = "String::from(\"puter0\")")]
    bridge: String,
    /// the bridge's address and prefix (default: 10.0.0.1/24)
    #[argh(option, arg_name = "cidr", default = "Subnet::default()")]
    subnet: Subnet,
    /// a port of the host that guests may reach besides DHCP and DNS, such as tcp/22; can be given several times
    #[argh(option, arg_name = "port")]
    host_port: Vec<HostPort>,
    /// IPv6 for guests: auto, on, off, or a network such as fd12:3456:789a::/64 (default: auto)
    #[argh(option, arg_name = "ipv6", default = "Ipv6::Auto")]
    ipv6: Ipv6,
    /// on a clean stop remove the TAPs, the bridge and the nftables tables
    #[argh(switch)]
    teardown: bool,
    /// how many ports a bridge may have: for tests, with numbers far below the kernel's
    #[argh(option, arg_name = "count", default = "branch::MAX_PORTS", hidden_help)]
    bridge_ports: usize,
    /// print the version and exit
    #[argh(switch)]
    version: bool,
}

/// Entry point; `args` is the command line without the program's name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let options = match parse(&args) {
        Ok(options) => options,
        Err(code) => return code,
    };
    if options.version {
        println!("puterd {}", crate::VERSION);
        return ExitCode::SUCCESS;
    }
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(args: &[OsString]) -> Result<Options, ExitCode> {
    let usage = |text: &str| {
        log!("{}", text.trim_end());
        ExitCode::from(crate::USAGE)
    };
    let texts: Option<Vec<&str>> = args.iter().map(|a| a.to_str()).collect();
    let Some(texts) = texts else { return Err(usage("an argument is not valid UTF-8")) };
    let options = Options::from_args(&["puterd"], &texts).map_err(|exit| match exit.status {
        Ok(()) => {
            println!("{}", exit.output.trim_end());
            ExitCode::SUCCESS
        }
        Err(()) => usage(&exit.output),
    })?;
    bridge::check_name(&options.bridge).map_err(|e| usage(&e))?;
    if options.host_port.len() > MOST_PORTS {
        return Err(usage(&format!("--host-port can be given up to {MOST_PORTS} times")));
    }
    Ok(options)
}

/// The home by the CLI's rule: PUTER_HOME, else `puter` in XDG_DATA_HOME, else in ~/.local/share. Empty variables
/// count as unset, and a relative XDG_DATA_HOME is ignored (XDG Base Directory Specification).
fn home(given: Option<PathBuf>, variable: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf> {
    let path = |name| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    given
        .or_else(|| path("PUTER_HOME"))
        .or_else(|| path("XDG_DATA_HOME").filter(|p| p.is_absolute()).map(|p| p.join("puter")))
        .or_else(|| path("HOME").map(|p| p.join(".local/share/puter")))
        .context("no home directory: set HOME or PUTER_HOME, or give --home")
}

fn run(options: Options) -> Result<()> {
    capabilities::keep_needed()?;
    let uid = rustix::process::geteuid().as_raw();
    let home = home(options.home, |name| env::var_os(name))?;
    let home = std::path::absolute(&home).with_context(|| format!("cannot find {}", home.display()))?;
    let run = socket::make_run(&home, uid)?;
    // Held, by its open file, until the process ends.
    let _lock = socket::lock(&run)?;
    let path = options.socket.unwrap_or_else(|| run.join("daemon.sock"));
    let listener = Listener::open(&path)?;
    let mut host_ports = options.host_port;
    host_ports.sort_unstable();
    host_ports.dedup();
    let settings = Settings {
        bridge: options.bridge,
        subnet: options.subnet,
        uid,
        host_ports,
        ipv6: options.ipv6,
        bridge_ports: options.bridge_ports.clamp(2, branch::MAX_PORTS),
    };
    let served = Network::start(settings).and_then(|network| {
        let network = Arc::new(network);
        network.serve_names()?;
        network.serve_dhcp()?;
        network.remove_marked()?;
        watch::start(network.clone())?;
        smol::block_on(serve(&listener, &network, &path))?;
        Ok(network)
    });
    listener.remove();
    let network = served?;
    if options.teardown {
        network.tear_down()?;
        log!("removed the bridge and all that was on it");
    } else if let Err(error) = network.clear_now() {
        log!("{error:#}");
    }
    Ok(())
}

/// Serves until SIGTERM or SIGINT.
async fn serve(listener: &Listener, network: &Arc<Network>, path: &std::path::Path) -> Result<()> {
    let mut signals = Signals::new([Signal::Term, Signal::Int]).context("cannot wait for signals")?;
    let stop = async {
        let _ = signals.next().await;
        log!("stops");
        socket::notify("STOPPING=1");
    };
    let Settings { bridge, subnet, uid, .. } = network.settings();
    log!("ready on {}: bridge {bridge}, {subnet}", path.display());
    memory::give_back();
    socket::notify(&format!("READY=1\nSTATUS=bridge {bridge}, {subnet}"));
    server::serve(&listener.socket, *uid, network.clone(), stop).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_home_follows_the_order_of_precedence() {
        let find = |given: Option<&str>, set: &[(&str, &str)]| {
            let variable = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v));
            home(given.map(PathBuf::from), variable).ok()
        };
        let all = [("PUTER_HOME", "/p"), ("XDG_DATA_HOME", "/x"), ("HOME", "/h")];
        assert_eq!(find(Some("/g"), &all), Some("/g".into()));
        assert_eq!(find(None, &all), Some("/p".into()));
        assert_eq!(find(None, &all[1..]), Some("/x/puter".into()));
        assert_eq!(
            find(None, &[("PUTER_HOME", ""), ("XDG_DATA_HOME", "rel"), all[2]]),
            Some("/h/.local/share/puter".into())
        );
        assert_eq!(find(None, &[]), None);
    }

    #[test]
    fn options_are_read_and_bad_ones_are_a_usage_error() {
        let parse = |args: &[&str]| parse(&args.iter().map(OsString::from).collect::<Vec<_>>());
        let options = parse(&["--bridge", "lab0", "--subnet", "10.7.0.0/16", "--teardown"]).unwrap();
        assert_eq!(
            (options.bridge.as_str(), options.subnet.to_string(), options.teardown),
            ("lab0", "10.7.0.1/16".to_owned(), true)
        );
        for bad in [
            &["--subnet", "10.0.0.9/24"][..],
            &["--bridge", "a/b"],
            &["--host-port", "22"],
            &["--ipv6", "maybe"],
            &["extra"],
        ] {
            assert_eq!(
                format!("{:?}", parse(bad).unwrap_err()),
                format!("{:?}", ExitCode::from(crate::USAGE)),
                "{bad:?}"
            );
        }
    }
}
