//! puterd's network against its peers, in namespaces: DHCP and DNS against dnsmasq and kea-dhcp4, TAPs against the commands
//! that do the same, memory, and how it does with thousands of VMs.
//!
//! `cargo xtask bench net` runs it, as root.

#[path = "net/driver.rs"]
mod driver;
#[allow(dead_code)]
#[path = "../tests/daemon/frames.rs"]
mod frames;
#[allow(dead_code)]
#[path = "../tests/daemon/lab.rs"]
mod lab;

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::time::Instant;

use puter::net::{Socket, link, tap};
use puter::protocol::address::{Mac, Subnet};
use xtask::report::{self, Figure, median};

use lab::{Daemon, Lab, Process, UID, wait};

const ROUNDS: usize = 5;
const MACHINES: u32 = 250;
/// DHCP exchanges, DNS questions and TAPs of one round.
const EXCHANGES: usize = 2000;
const QUESTIONS: usize = 20_000;
const TAPS: usize = 50;
/// VMs of one puterd at scale, and how many TAPs are measured at the beginning and at the end.
const MANY: u32 = 4000;
const SAMPLE: u32 = 25;
const SUBNET: &str = "10.0.0.1/16";
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

/// One server on a bridge of its own, with a TAP for DHCP's clients and a namespace for those of DNS.
struct Server {
    name: &'static str,
    lab: Lab,
    pid: u32,
    tap: File,
    guest: Process,
    /// Ends with this.
    _process: Result<Daemon, Process>,
    dhcp: Vec<driver::Run>,
    dns: Vec<f64>,
}

impl Server {
    fn new(name: &'static str, lab: Lab, process: Result<Daemon, Process>) -> Server {
        let tap = frames::inside(lab.host_holder(), || tap::open("clients")).unwrap();
        lab.host("ip link set dev clients master puter0; ip link set dev clients up");
        let guest = lab.guest("guest", "10.0.0.9");
        let pid = process.as_ref().map_or_else(Process::pid, Daemon::pid);
        Server { name, lab, pid, tap, guest, _process: process, dhcp: Vec::new(), dns: Vec::new() }
    }

    fn memory(&self) -> f64 {
        resident(self.pid)
    }

    fn rate(&self) -> f64 {
        median(self.dhcp.iter().map(|run| run.per_second))
    }

    fn answers(&self) -> f64 {
        median(self.dns.iter().copied())
    }
}

/// The machines: name, MAC and address.
fn machines() -> impl Iterator<Item = (String, Mac, Ipv4Addr)> {
    let subnet: Subnet = SUBNET.parse().unwrap();
    (1..=MACHINES).map(move |id| (format!("vm-{id}"), Mac::of_id(id), subnet.address(id).unwrap()))
}

fn puterd() -> Server {
    let lab = Lab::new();
    let daemon = lab.start(&["--subnet", SUBNET]);
    for id in 1..=MACHINES {
        let (status, body) = lab.request("POST", "/v1/taps", &format!(r#"{{"vm":"vm-{id}","id":{id}}}"#));
        assert_eq!(status, 200, "{body}");
    }
    Server::new("puterd", lab, Ok(daemon))
}

/// A peer's lab, with the bridge that it serves.
fn peer() -> Lab {
    let lab = Lab::new();
    lab.host(&format!(
        "ip link add puter0 type bridge forward_delay 0; ip addr add {SUBNET} dev puter0; ip link set puter0 up"
    ));
    lab
}

/// Runs a peer's own process: nsenter becomes it.
fn spawn(command: &mut Command) -> Process {
    Process(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
}

fn dnsmasq() -> Server {
    let lab = peer();
    let dir = lab.dir.path().to_owned();
    let hosts: String = machines().map(|(name, mac, ip)| format!("{mac},{ip},{name}\n")).collect();
    let names: String = machines().map(|(name, _, ip)| format!("{ip} {name} {name}.puter\n")).collect();
    fs::write(dir.join("dhcp-hosts"), hosts).unwrap();
    fs::write(dir.join("names"), names).unwrap();
    let mut command = lab.enter(lab.host_holder());
    // No ping of an address before it is offered, which would slow it down, and no log.
    command.args(["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--pid-file="]);
    command.args(["--interface=puter0", "--bind-interfaces", "--except-interface=lo", "--no-resolv", "--no-hosts"]);
    command.args(["--no-ping", "--quiet-dhcp", "--log-facility=/dev/null", "--dhcp-authoritative", "--domain=puter"]);
    command.args(["--dhcp-range=10.0.0.11,10.0.9.255,255.255.0.0,1h", "--dhcp-lease-max=5000"]);
    for (option, file) in [("dhcp-hostsfile", "dhcp-hosts"), ("addn-hosts", "names"), ("dhcp-leasefile", "leases")] {
        command.arg(format!("--{option}={}", dir.join(file).display()));
    }
    let process = spawn(&mut command);
    wait("dnsmasq listens", || lab.host("ss -Hlun").contains(":67 "));
    Server::new("dnsmasq", lab, Err(process))
}

fn kea() -> Server {
    let lab = peer();
    let dir = lab.dir.path().display().to_string();
    let hosts: Vec<String> = machines()
        .map(|(name, mac, ip)| format!(r#"{{"hw-address":"{mac}","ip-address":"{ip}","hostname":"{name}"}}"#))
        .collect();
    let config = format!(
        r#"{{"Dhcp4":{{"interfaces-config":{{"interfaces":["puter0"]}},"valid-lifetime":3600,
        "lease-database":{{"type":"memfile","persist":true,"name":"{dir}/leases.csv"}},
        "subnet4":[{{"subnet":"10.0.0.0/16","pools":[{{"pool":"10.0.4.0 - 10.0.9.255"}}],
        "option-data":[{{"name":"routers","data":"{GATEWAY}"}}],"reservations":[{}]}}],
        "loggers":[{{"name":"kea-dhcp4","severity":"ERROR","output_options":[{{"output":"/dev/null"}}]}}]}}}}"#,
        hosts.join(",")
    );
    fs::write(lab.dir.path().join("kea.json"), config).unwrap();
    let mut command = lab.enter(lab.host_holder());
    command.env("KEA_LOCKFILE_DIR", &dir).env("KEA_PIDFILE_DIR", &dir);
    let process = spawn(command.args(["kea-dhcp4", "-c", &format!("{dir}/kea.json")]));
    wait("kea listens", || lab.host("ss -Hlun").contains(":67 "));
    Server::new("kea-dhcp4", lab, Err(process))
}

/// Milliseconds for a TAP made and removed, each after the other.
struct Taps {
    /// Through puterd, until the kernel has none of them left.
    ours: f64,
    /// As long as who asks for it waits.
    asked: f64,
    /// By the commands that do the same.
    commands: f64,
}

fn taps(lab: &Lab) -> Taps {
    let began = Instant::now();
    for n in 0..TAPS {
        let id = 900 + n;
        assert_eq!(lab.request("POST", "/v1/taps", &format!(r#"{{"vm":"bench-{n}","id":{id}}}"#)).0, 200);
        assert_eq!(lab.request("DELETE", &format!("/v1/taps/bench-{n}"), "").0, 204);
    }
    let asked = began.elapsed();
    wait("they go", || {
        frames::inside(lab.host_holder(), || link_names().iter().all(|name| !name.starts_with("pt-bench")))
    });
    let ours = began.elapsed();
    // The same interface, marks and rules, as puterd's own are printed.
    let (tap, mac, ip) = ("pt-peer", Mac::of_id(901), "10.0.3.143");
    let rules = format!(
        "table netdev peer {{\nchain {tap} {{\ntype filter hook ingress device \"{tap}\" priority 0;\n\
         ether saddr != {mac} drop\narp saddr ether != {mac} drop\narp saddr ip {ip} accept\narp saddr ip 0.0.0.0 accept\n\
         udp sport 67 drop\nudp dport 67 @th,288,48 != 0x{} drop\nip saddr {ip} accept\n\
         ip saddr 0.0.0.0 udp dport 67 accept\ndrop\n}}\n}}\n",
        mac.to_string().replace(':', "")
    );
    let file = lab.dir.path().join("rules");
    fs::write(&file, rules).unwrap();
    let script = format!(
        "for n in $(seq {TAPS}); do ip tuntap add dev {tap} mode tap user {UID} vnet_hdr; nft -f {}; \
         ip link set dev {tap} alias puter:peer:901:0; ip link set dev {tap} master puter0; ip link set dev {tap} up; \
         ip link delete {tap}; nft delete chain netdev peer {tap} 2>/dev/null || :; done",
        file.display()
    );
    let began = Instant::now();
    lab.host(&script);
    let each = |time: std::time::Duration| time.as_secs_f64() * 1e3 / TAPS as f64;
    Taps { ours: each(ours), asked: each(asked), commands: each(began.elapsed()) }
}

fn link_names() -> Vec<String> {
    let links = link::list(&mut Socket::route().unwrap()).unwrap();
    links.into_iter().map(|link| link.name).collect()
}

/// How puterd does with thousands of VMs.
struct Scale {
    /// Milliseconds for a TAP, as the median of some: the first ones, and those after all others.
    first: f64,
    last: f64,
    /// Seconds and processor seconds of a start that adopts all; then resident MiB.
    start: f64,
    worked: f64,
    memory: f64,
    /// Seconds from a start to a whole network's end.
    teardown: f64,
    bridges: usize,
}

fn scale() -> Scale {
    let lab = Lab::new();
    let args = ["--subnet", SUBNET, "--teardown"];
    let daemon = lab.start(&args);
    let make = |ids: std::ops::RangeInclusive<u32>| {
        let one = |id: u32| {
            let began = Instant::now();
            let (status, body) = lab.request("POST", "/v1/taps", &format!(r#"{{"vm":"vm-{id}","id":{id}}}"#));
            assert_eq!(status, 200, "{body}");
            began.elapsed().as_secs_f64() * 1e3
        };
        median(ids.map(one).collect::<Vec<f64>>())
    };
    let first = make(1..=SAMPLE);
    make(SAMPLE + 1..=MANY);
    let last = make(MANY + 1..=MANY + SAMPLE);
    drop(daemon);
    let began = Instant::now();
    let daemon = lab.start(&args);
    let start = began.elapsed().as_secs_f64();
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
    // utime and stime in ticks of 10 ms (proc(5)).
    let ticks: f64 =
        stat.rsplit(')').next().unwrap().split(' ').skip(12).take(2).map(|t| t.parse::<f64>().unwrap()).sum();
    let bridges = lab.host("ip -o link show type bridge").lines().count();
    // With the first look after all of it.
    std::thread::sleep(std::time::Duration::from_secs(5));
    let memory = resident(daemon.pid());
    let began = Instant::now();
    assert!(daemon.stop(rustix::process::Signal::TERM).success());
    Scale { first, last, start, worked: ticks / 100.0, memory, teardown: began.elapsed().as_secs_f64(), bridges }
}

/// A process's resident memory in MiB (proc(5)).
fn resident(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    report::resident(&status).unwrap()
}

fn main() {
    let scale = scale();
    println!(
        "{MANY} VMs on {} bridges: started with all of them in {:.1} s ({:.2} s of a processor), {:.1} MiB, removed in \
         {:.1} s",
        scale.bridges, scale.start, scale.worked, scale.memory, scale.teardown
    );
    let grown = scale.last / scale.first;
    println!("a TAP: {:.1} ms at first, {:.1} ms after {MANY} ({grown:.2} times)\n", scale.first, scale.last);
    let mut servers = [puterd(), dnsmasq(), kea()];
    let mut made = Vec::new();
    for _ in 0..ROUNDS {
        for server in &mut servers {
            server.dhcp.push(driver::dhcp(&server.tap, MACHINES, EXCHANGES));
        }
        for server in &mut servers[..2] {
            let asked = || driver::dns(GATEWAY, "vm-7.puter", QUESTIONS);
            server.dns.push(frames::inside(&server.guest, asked));
        }
        made.push(taps(&servers[0].lab));
    }
    // What a server keeps when it is quiet again.
    std::thread::sleep(std::time::Duration::from_secs(10));
    let of = |time: fn(&Taps) -> f64| median(made.iter().map(time));
    let (ours, asked, theirs) = (of(|taps| taps.ours), of(|taps| taps.asked), of(|taps| taps.commands));
    let [puterd, dnsmasq, kea] = &servers;
    println!(
        "{ROUNDS} rounds of {EXCHANGES} DHCP exchanges of {MACHINES} machines, {QUESTIONS} DNS questions, {TAPS} TAPs; medians"
    );
    println!("{:<10} {:>14} {:>9} {:>7} {:>14} {:>8}", "", "DHCP/s", "p99 ms", "lost", "DNS/s", "MiB");
    for server in &servers {
        let p99 = median(server.dhcp.iter().map(|run| run.p99));
        let again: usize = server.dhcp.iter().map(|run| run.again).sum();
        let dns = if server.dns.is_empty() { "-".to_owned() } else { format!("{:.0}", server.answers()) };
        let (name, rate, memory) = (server.name, server.rate(), server.memory());
        println!("{name:<10} {rate:>14.0} {p99:>9.2} {again:>7} {dns:>14} {memory:>8.1}");
    }
    println!(
        "a TAP made and removed: {ours:.1} ms through puterd until it has gone, of which {asked:.1} ms until the answers; \
         {theirs:.1} ms by ip and nft\n"
    );
    println!("DHCP, puterd / the faster peer:   {:.2} (goal: above 2)", puterd.rate() / dnsmasq.rate().max(kea.rate()));
    println!("DNS, puterd / dnsmasq:            {:.2}", puterd.answers() / dnsmasq.answers());
    println!("TAP, puterd / commands:           {:.2} (goal: below 0.25)", ours / theirs);
    println!(
        "memory, puterd / dnsmasq:         {:.2} (goal: below 1, and below 6 MiB)",
        puterd.memory() / dnsmasq.memory()
    );
    let figure = |what: &str, value, unit: &str| Figure::new("net", what, value, unit);
    for figure in [
        figure("DHCP exchanges", puterd.rate(), "/s").more().against("dnsmasq", dnsmasq.rate()).goal(2.0),
        figure("DHCP exchanges", puterd.rate(), "/s").more().against("Kea", kea.rate()).goal(2.0),
        figure("DNS answers", puterd.answers(), "/s").more().against("dnsmasq", dnsmasq.answers()),
        figure("a TAP made and removed", ours, "ms").against("ip and nft", theirs).goal(0.25),
        figure(&format!("resident with {MACHINES} leases"), puterd.memory(), "MiB")
            .against("dnsmasq", dnsmasq.memory())
            .goal(1.0),
        figure(&format!("a TAP beside {MANY} others"), scale.last, "ms").against("the first", scale.first),
    ] {
        figure.tell();
    }
}
