//! `puter completions`, and the engine that the shells' scripts ask: `puter __complete WORD…`, the words so far with the
//! one under the cursor last.
//!
//! It knows commands and options from the same declarations as the parser. A positional called `name` is a VM's name, one
//! called `place` may be in a VM, one called `image` is an image that is here, one called `cluster` is a cluster, one called
//! `part` is one or a part of one, one called `shell` is a shell, and the rest is left to the shell's own completion of
//! files. Of the VMs those are offered for which the command would do something.

use anyhow::Result;
use argh::{ArgsInfo, CommandInfoWithArgs, FlagInfo, FlagInfoKind, FromArgs, Optionality};

use super::{Puter, output};
use crate::vm::cluster::{self, Cluster};
use crate::vm::home::Home;
use crate::vm::images;
use crate::vm::machine::{Action, Command};
use crate::vm::snapshots;
use crate::vm::state::{Vm, load_all};

/// Tells the script to offer files as well.
const FILES: &str = ":files";

/// Print the completion script of a shell; each script's head says where it goes.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "completions")]
pub struct Completions {
    /// bash, zsh or fish
    #[argh(positional)]
    shell: Shell,
}

#[derive(Clone, Copy)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl std::str::FromStr for Shell {
    type Err = String;

    fn from_str(text: &str) -> Result<Shell, String> {
        match text {
            "bash" => Ok(Shell::Bash),
            "zsh" => Ok(Shell::Zsh),
            "fish" => Ok(Shell::Fish),
            _ => Err(format!("'{text}' is none of bash, zsh and fish")),
        }
    }
}

impl Completions {
    pub fn run(self) -> Result<()> {
        let script = match self.shell {
            Shell::Bash => include_str!("completions/bash"),
            Shell::Zsh => include_str!("completions/zsh"),
            Shell::Fish => include_str!("completions/fish"),
        };
        output::print(script.trim_end());
        Ok(())
    }
}

/// What the engine asks of the host. It never fails: what cannot be known is not offered.
trait Known {
    fn vms(&self) -> Vec<Vm>;
    fn images(&self) -> Vec<String>;
    fn clusters(&self) -> Vec<Cluster>;
    /// `VM@SNAPSHOT` of all that somebody asked for, with a word about it.
    fn snapshots(&self) -> Vec<(String, String)>;
}

struct Here;

impl Known for Here {
    fn clusters(&self) -> Vec<Cluster> {
        Home::from_env().and_then(|home| cluster::load_all(&home)).map_or(Vec::new(), |all| all.clusters)
    }

    fn vms(&self) -> Vec<Vm> {
        Home::from_env().and_then(|home| load_all(&home)).map_or(Vec::new(), |all| all.vms)
    }

    fn images(&self) -> Vec<String> {
        let list = || -> Result<Vec<String>> {
            let Some(store) = images::look(&Home::from_env()?) else { return Ok(Vec::new()) };
            Ok(store.kept()?.into_iter().flat_map(|kept| kept.names).map(|name| name.to_string()).collect())
        };
        list().unwrap_or_default()
    }

    fn snapshots(&self) -> Vec<(String, String)> {
        let all = Home::from_env().and_then(|home| snapshots::all(&home, None));
        let kept = all.map_or(Vec::new(), |all| all.snapshots).into_iter().filter(|snapshot| !snapshot.automatic);
        kept.map(|snapshot| {
            let what = if snapshot.memory.is_some() { "memory and disk" } else { "disk" };
            (format!("{}@{}", snapshot.origin.vm, snapshot.label()), format!("{what}, {}", snapshot.origin.id))
        })
        .collect()
    }
}

/// Prints the candidates for the last of the words.
pub fn complete(words: &[&str]) {
    let lines = candidates(words, &Here);
    if !lines.is_empty() {
        output::print(&lines.join("\n"));
    }
}

fn candidates(words: &[&str], known: &dyn Known) -> Vec<String> {
    let Some((current, before)) = words.split_last() else { return Vec::new() };
    let mut command = Puter::get_args_info();
    let mut name = String::new();
    let mut given: Vec<&str> = Vec::new();
    let mut value_of: Option<String> = None;
    for word in before {
        if value_of.take().is_some() {
            continue;
        }
        if *word == "--" {
            return vec![FILES.into()];
        }
        if word.starts_with('-') {
            value_of = flag(&command, word).filter(|flag| takes_value(flag)).map(|flag| flag.long.to_string());
            given.push(word);
        } else if let Some(found) = command.commands.iter().find(|sub| sub.name == *word) {
            name = found.name.to_string();
            command = found.command.clone();
            given.clear();
        } else {
            if !command.commands.is_empty() {
                return Vec::new();
            }
            // A command of the guest's has begun: its words are not puter's.
            if is_greedy(&command, &given) {
                return vec![FILES.into()];
            }
            given.push(word);
        }
    }
    let all = match value_of {
        Some(option) => values(&option, known),
        None if current.starts_with('-') => flags(&command, &given),
        None if !command.commands.is_empty() => {
            let line = |sub: &argh::SubCommandInfo| (sub.name.to_string(), first_line(sub.command.description));
            command.commands.iter().map(line).collect()
        }
        None => positional(&name, &command, &given, known),
    };
    let fits = |(word, _): &(String, String)| word == FILES || word.starts_with(current);
    let line = |(word, about): (String, String)| match about.is_empty() {
        true => word,
        false => format!("{word}\t{about}"),
    };
    all.into_iter().filter(fits).map(line).collect()
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().trim().to_string()
}

fn flag<'a>(command: &'a CommandInfoWithArgs, word: &str) -> Option<&'a FlagInfo<'static>> {
    let short = |flag: &FlagInfo| flag.short.is_some_and(|short| word == format!("-{short}"));
    command.flags.iter().find(|flag| flag.long == word || short(flag))
}

fn takes_value(flag: &FlagInfo) -> bool {
    matches!(flag.kind, FlagInfoKind::Option { .. })
}

/// Whether the next word belongs to a command that is run in the guest.
fn is_greedy(command: &CommandInfoWithArgs, given: &[&str]) -> bool {
    let place = given.iter().filter(|word| !word.starts_with('-')).count();
    command.positionals.get(place).is_some_and(|next| next.optionality == Optionality::Greedy)
}

fn flags(command: &CommandInfoWithArgs, given: &[&str]) -> Vec<(String, String)> {
    let again = |flag: &FlagInfo| flag.optionality == Optionality::Repeating || !given.contains(&flag.long);
    let shown = command.flags.iter().filter(|flag| !flag.hidden && again(flag));
    shown.map(|flag| (flag.long.to_string(), first_line(flag.description))).collect()
}

fn values(option: &str, known: &dyn Known) -> Vec<(String, String)> {
    let plain = |words: &[&str]| words.iter().map(|word| (word.to_string(), String::new())).collect();
    match option {
        "--image" => known.images().into_iter().map(|image| (image, "image".to_string())).collect(),
        "--restart" => plain(&["no", "on-failure", "always"]),
        "--autostart" | "--isolate" => plain(&["yes", "no"]),
        "--format" => plain(&["hosts", "ssh", "ansible", "json"]),
        "--for" => plain(&["agent", "ssh", "port:"]),
        "--platform" => plain(&["linux/amd64", "linux/arm64"]),
        "--kernel" | "--initrd" | "--mount" | "--file" => plain(&[FILES]),
        _ => Vec::new(),
    }
}

fn positional(name: &str, command: &CommandInfoWithArgs, given: &[&str], known: &dyn Known) -> Vec<(String, String)> {
    let given: Vec<&str> = given.iter().copied().filter(|word| !word.starts_with('-')).collect();
    let Some(last) = command.positionals.last() else { return Vec::new() };
    // A command of its own, of which the parser does not know.
    if (name, last.name, given.first()) == ("snapshot", "cluster", Some(&"delete")) {
        let all = known.clusters().into_iter().flat_map(|cluster| cuts(&cluster));
        return all.filter(|(word, _)| !given.contains(&word.as_str())).collect();
    }
    let many = last.optionality == Optionality::Repeating;
    let Some(wanted) = command.positionals.get(given.len()).or(many.then_some(last)) else { return Vec::new() };
    let vms = |suffix: &str| -> Vec<(String, String)> {
        let useful = known.vms().into_iter().filter(|vm| is_useful(name, vm) && !given.contains(&vm.name.as_str()));
        useful.map(|vm| (format!("{}{suffix}", vm.name), format!("{} at {}", vm.state(), vm.ip))).collect()
    };
    match wanted.name {
        "name" if name == "snapshot" && given.first() == Some(&"delete") => {
            known.snapshots().into_iter().filter(|(word, _)| !given.contains(&word.as_str())).collect()
        }
        "name" if name == "restore" => known.snapshots(),
        "name" if name == "diff" || name == "clone" => known.snapshots().into_iter().chain(vms("")).collect(),
        "snapshot" => {
            let of = given.first().copied().unwrap_or_default();
            let own = known.snapshots().into_iter();
            own.filter_map(|(word, about)| Some((word.strip_prefix(of)?.strip_prefix('@')?.to_string(), about)))
                .collect()
        }
        "spec" if name == "remove" => {
            let of = known.vms().into_iter().filter(|vm| given.first() == Some(&vm.name.as_str()));
            let specs = of.flat_map(|vm| vm.ports).map(|port| (port.to_string(), String::new()));
            specs.filter(|(word, _)| !given.contains(&word.as_str())).collect()
        }
        "image" => {
            let images = known.images().into_iter().filter(|image| !given.contains(&image.as_str()));
            images.map(|image| (image, "image".to_string())).collect()
        }
        "spec" if name == "scale" => {
            let of = known.clusters().into_iter().filter(|cluster| given.first() == Some(&cluster.name.as_str()));
            of.flat_map(|cluster| cluster.roles)
                .map(|role| (format!("{}=", role.name), format!("{} now", role.count)))
                .collect()
        }
        "new" | "spec" => Vec::new(),
        "cluster" | "part" => {
            let mut all = Vec::new();
            for cluster in known.clusters() {
                let members = cluster.members();
                all.push((cluster.name.clone(), format!("{} members", members.len())));
                if ["restore", "clone"].contains(&name) {
                    all.extend(cuts(&cluster));
                }
                if wanted.name == "part" {
                    let roles = cluster
                        .roles
                        .iter()
                        .map(|role| (format!("{}:{}", cluster.name, role.name), "role".to_string()));
                    all.extend(roles);
                    let one =
                        |member: cluster::Member| (format!("{}:{}", cluster.name, member.member), "member".to_string());
                    all.extend(members.into_iter().map(one));
                }
            }
            all
        }
        "name" | "names" => vms(""),
        "place" | "places" => {
            let mut all = vms(":");
            all.push((FILES.into(), String::new()));
            all
        }
        "shell" => ["bash", "zsh", "fish"].map(|shell| (shell.to_string(), String::new())).into(),
        _ => vec![(FILES.into(), String::new())],
    }
}

/// The snapshots of a whole cluster.
fn cuts(cluster: &Cluster) -> Vec<(String, String)> {
    let names = cluster.snapshots.iter().map(|cut| format!("{}@{}", cluster.name, cut.name));
    names.map(|word| (word, "snapshot".to_string())).collect()
}

/// Whether the command would do something with this VM.
fn is_useful(command: &str, vm: &Vm) -> bool {
    let command = match command {
        "start" => Command::Start,
        "stop" => Command::Stop,
        "restart" => Command::Restart,
        "ssh" | "exec" | "cp" => Command::Enter,
        "console" => Command::Console,
        "snapshot" => Command::Snapshot,
        _ => return true,
    };
    !matches!(vm.state().decide(command), Action::Refuse(_) | Action::Nothing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::process;
    use crate::vm::state::{ProcessId, tests::sample};

    struct Fixed;

    impl Known for Fixed {
        fn vms(&self) -> Vec<Vm> {
            let pid = std::process::id();
            let start_time = process::start_time(pid).unwrap();
            let mut web = sample("web", 1);
            web.ports = ["8080:80", "53:53/udp"].map(|spec| spec.parse().unwrap()).into();
            web.process = Some(ProcessId { pid, start_time });
            vec![web, sample("db", 2), sample("dev", 3)]
        }

        fn images(&self) -> Vec<String> {
            vec!["localhost:5000/puter/debian".into()]
        }

        fn clusters(&self) -> Vec<Cluster> {
            let role = |name: &str, count| cluster::Role { name: name.into(), count, ..Default::default() };
            let roles = vec![role("db", 1), role("web", 2)];
            let members = [("web1".to_string(), "1".to_string())].into();
            let cut = cluster::Cut { name: "before".into(), created: 0, roles: Vec::new(), members };
            vec![Cluster { snapshots: vec![cut], ..Cluster::new("shop", roles, 0) }]
        }

        fn snapshots(&self) -> Vec<(String, String)> {
            ["web@before", "web@20261123-234838", "db@1"].map(|word| (word.to_string(), "disk".into())).into()
        }
    }

    fn words(line: &str) -> Vec<String> {
        let typed: Vec<&str> = line.split(' ').collect();
        let found = candidates(&typed, &Fixed);
        found.iter().map(|line| line.split('\t').next().unwrap().to_string()).collect()
    }

    #[test]
    fn each_place_offers_what_fits_there() {
        for (line, expected) in [
            ("sto", &["stop"][..]),
            ("start ", &["db", "dev"]),
            ("start d", &["db", "dev"]),
            ("start db ", &["dev"]),
            ("stop ", &["web"]),
            ("ssh ", &["web"]),
            ("exec ", &["web"]),
            ("exec web ", &[FILES]),
            ("exec web -- l", &[FILES]),
            ("exec web ls -", &[FILES]),
            ("restart ", &["web", "db", "dev"]),
            ("info ", &["web", "db", "dev"]),
            ("logs -f ", &["web", "db", "dev"]),
            ("logs web ", &[]),
            ("cp w", &["web:", FILES]),
            ("start --image ", &["localhost:5000/puter/debian"]),
            ("start --memory ", &[]),
            ("start --memory 1G db ", &["dev"]),
            ("set db --restart o", &["on-failure"]),
            ("init --kernel ", &[FILES]),
            ("daemon sta", &["start", "status"]),
            ("completions ", &["bash", "zsh", "fish"]),
            ("snapshot d", &["db", "dev"]),
            ("snapshot delete ", &["web@before", "web@20261123-234838", "db@1"]),
            ("snapshot delete web@before w", &["web@20261123-234838"]),
            ("restore w", &["web@before", "web@20261123-234838"]),
            ("restore web ", &["before", "20261123-234838"]),
            ("clone web", &["web@before", "web@20261123-234838", "web"]),
            ("clone web ", &[]),
            ("diff web@before d", &["db@1", "db", "dev"]),
            ("port ", &["add", "list", "remove"]),
            ("port add ", &["web", "db", "dev"]),
            ("port add web ", &[]),
            ("port list d", &["db", "dev"]),
            ("port list web ", &[]),
            ("port remove web ", &["127.0.0.1:8080:80/tcp", "127.0.0.1:53:53/udp"]),
            ("port remove web 127.0.0.1:8080:80/tcp ", &["127.0.0.1:53:53/udp"]),
            ("port remove db ", &[]),
            ("start web --publish ", &[]),
            ("set db --pub", &["--publish"]),
            ("image p", &["pull", "prune"]),
            ("image delete ", &["localhost:5000/puter/debian"]),
            ("image inspect local", &["localhost:5000/puter/debian"]),
            ("image inspect localhost:5000/puter/debian ", &[]),
            ("image pull --platform linux/ar", &["linux/arm64"]),
            ("image prune --d", &["--dry-run"]),
            ("image prune ", &[]),
            ("cluster st", &["start", "stop", "status"]),
            ("cluster delete ", &["shop"]),
            ("cluster start ", &["shop", "shop:db", "shop:web", "shop:db1", "shop:web1", "shop:web2"]),
            ("cluster exec shop:w", &["shop:web", "shop:web1", "shop:web2"]),
            ("cluster exec shop -- l", &[FILES]),
            ("cluster scale shop w", &["web="]),
            ("cluster restore s", &["shop", "shop@before"]),
            ("cluster snapshot ", &["shop"]),
            ("cluster snapshot delete ", &["shop@before"]),
            ("cluster snapshot delete shop@before ", &[]),
            ("cluster clone shop@", &["shop@before"]),
            ("cluster clone shop ", &[]),
            ("cluster inventory shop --format a", &["ansible"]),
            ("cluster wait --for ", &["agent", "ssh", "port:"]),
            ("cluster create ", &[]),
            ("cluster create -f ", &[FILES]),
            ("cluster apply ", &["shop"]),
            ("cluster apply -f ", &[FILES]),
            ("cluster apply -f x --d", &["--dry-run"]),
            ("list --", &["--help", "--json"]),
            ("list --json --", &["--help"]),
            ("nonsense ", &[]),
        ] {
            assert_eq!(words(line), expected, "puter {line}");
        }
        assert!(words("start --").contains(&"--no-wait".to_string()));
        assert!(words("").len() > 15, "all commands");
        assert!(candidates(&["start", "d"], &Fixed)[0].ends_with("\tstopped at 10.0.0.12"));
        assert!(candidates(&["sto"], &Fixed)[0].contains("\tStop VMs"));
        assert!(candidates(&[], &Fixed).is_empty());
    }
}
