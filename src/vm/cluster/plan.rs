//! What has to be done so that a cluster becomes what its file says: pure.
//!
//! What the file says is so afterwards. What it does not say, and did not say before, is left as it is; what it said before
//! and says no more is what it is of a new VM.

use std::collections::BTreeMap;

use serde::Serialize;

use super::model::{Cluster, Member, Role};
use crate::vm::lifecycle::{StartOptions, is_made_from};
use crate::vm::machine::State;
use crate::vm::port::Forward;
use crate::vm::settings::show_size;
use crate::vm::state::Vm;

/// What brings a cluster from what it is to what it is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    pub cluster: String,
    /// There is no such cluster yet.
    pub new: bool,
    /// An `apply` was broken off, after which nothing may be left to do but to note that.
    #[serde(skip)]
    pub broken_off: bool,
    /// What changes for members that are made from now on, and for the order of starts.
    pub roles: Vec<RoleChange>,
    /// Members of whom something is to be done, those that go last.
    pub members: Vec<Planned>,
}

/// A part of a role that no member there is to follow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RoleChange {
    pub role: String,
    pub setting: &'static str,
    /// Absent where there is nothing to show, or too much.
    pub from: Option<String>,
    pub to: Option<String>,
}

/// What is to be done of one member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Planned {
    #[serde(flatten)]
    pub member: Member,
    pub action: Action,
    /// The member is stopped and started for it.
    pub restart: bool,
    /// It is to run afterwards, and does not now.
    pub start: bool,
    pub changes: Vec<Change>,
    /// The changes, as they are made to a VM.
    #[serde(skip)]
    pub options: StartOptions,
    /// Ports that it publishes no more.
    #[serde(skip)]
    pub taken_back: Vec<Forward>,
    /// Ports that it does not publish yet.
    #[serde(skip)]
    pub added: Vec<Forward>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Create,
    Start,
    Change,
    /// It is deleted and made again.
    Recreate,
    Delete,
}

impl Action {
    /// Whether what is on the member's disk is lost.
    pub fn destroys(self) -> bool {
        matches!(self, Action::Recreate | Action::Delete)
    }
}

/// A setting of a member that changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    pub setting: &'static str,
    /// Absent of a port that is published for the first time.
    pub from: Option<String>,
    /// Absent of a port that is published no more.
    pub to: Option<String>,
    pub takes: Takes,
}

/// What a change takes of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Takes {
    Nothing,
    Restart,
    Recreation,
}

/// A member's VM as it was found.
pub(super) struct Found {
    pub vm: Vm,
    pub state: State,
}

/// What new VMs are where nobody says it.
pub(super) struct Defaults {
    pub image: Option<String>,
    pub cpus: u32,
    pub memory: u64,
    pub isolate: bool,
}

impl Plan {
    /// Whether everything is as it is to be.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty() && self.roles.is_empty()
    }

    /// The members whose disks are lost.
    pub fn destroyed(&self) -> impl Iterator<Item = &Planned> {
        self.members.iter().filter(|one| one.action.destroys())
    }

    pub fn count(&self, action: Action) -> usize {
        self.members.iter().filter(|one| one.action == action).count()
    }
}

/// What the role said, by the record and by what it said before an `apply` that was broken off.
pub(super) fn said(record: &Cluster, name: &str) -> Option<Role> {
    let now = record.role(name).cloned();
    let before = record.former.iter().find(|role| role.name == name).cloned();
    let (Some(now), Some(before)) = (&now, &before) else { return now.or(before) };
    let mut both = now.clone();
    both.image = both.image.or_else(|| before.image.clone());
    both.cpus = both.cpus.or(before.cpus);
    both.memory = both.memory.or(before.memory);
    both.isolate = both.isolate.or(before.isolate);
    if both.publish.is_empty() {
        both.publish.clone_from(&before.publish);
    }
    Some(both)
}

/// Compares. `found` are the VMs of the wanted members by their names in the cluster, `surplus` the members that are to go.
pub(super) fn plan(
    record: Option<&Cluster>,
    wanted: &Cluster,
    found: &BTreeMap<String, Found>,
    surplus: Vec<Member>,
    defaults: &Defaults,
) -> Plan {
    let mut members = Vec::new();
    for role in &wanted.roles {
        let said = record.and_then(|record| said(record, &role.name));
        for member in wanted.members().into_iter().filter(|member| member.role == role.name) {
            let found = found.get(&member.member);
            members.extend(of_member(member, role, said.as_ref(), found, defaults));
        }
    }
    members.extend(surplus.into_iter().map(|member| bare(member, Action::Delete)));
    let roles = record.map_or(Vec::new(), |record| of_roles(record, wanted, &members));
    let broken_off = record.is_some_and(|record| !record.former.is_empty());
    Plan { cluster: wanted.name.clone(), new: record.is_none(), broken_off, roles, members }
}

fn bare(member: Member, action: Action) -> Planned {
    let start = matches!(action, Action::Create | Action::Start | Action::Recreate);
    let (changes, options, taken_back, added) = (Vec::new(), StartOptions::default(), Vec::new(), Vec::new());
    Planned { member, action, restart: false, start, changes, options, taken_back, added }
}

fn of_member(
    member: Member,
    role: &Role,
    said: Option<&Role>,
    found: Option<&Found>,
    defaults: &Defaults,
) -> Option<Planned> {
    // Of what is half made nothing is kept.
    let there = found.filter(|found| !matches!(found.state, State::Creating | State::Deleting | State::Absent));
    let Some(Found { vm, state }) = there else { return Some(bare(member, Action::Create)) };
    let mut planned = Planned { start: *state != State::Running, ..bare(member, Action::Change) };
    settings(&mut planned, vm, role, said, defaults);
    ports(&mut planned, vm, role, said);
    let most = planned.changes.iter().map(|change| change.takes).max();
    // What a member has not done at its first boot it still does; what its role did not ask for then it does not.
    let due = role.run.is_some() && !vm.prepared && said.is_none_or(|said| said.run.is_some());
    planned.restart = most == Some(Takes::Restart) && state.is_active();
    match most {
        Some(Takes::Recreation) => planned.action = Action::Recreate,
        Some(_) => {}
        None if planned.start || due => {
            planned.action = Action::Start;
            planned.start = true;
        }
        None => return None,
    }
    Some(planned)
}

/// What a setting is to be, where anybody says it: the file, or else that it was said before.
fn wish<T: Clone>(wanted: &Option<T>, said: Option<&Option<T>>, default: impl FnOnce() -> Option<T>) -> Option<T> {
    match (wanted, said) {
        (Some(wanted), _) => Some(wanted.clone()),
        (None, Some(Some(_))) => default(),
        _ => None,
    }
}

fn settings(planned: &mut Planned, vm: &Vm, role: &Role, said: Option<&Role>, defaults: &Defaults) {
    let mut note = |setting, from: String, to: String, takes| {
        planned.changes.push(Change { setting, from: Some(from), to: Some(to), takes });
    };
    let image = wish(&role.image, said.map(|said| &said.image), || defaults.image.clone());
    if let Some(image) = image.filter(|image| !is_made_from(vm, image)) {
        note("image", vm.image.reference.clone(), image, Takes::Recreation);
    }
    let cpus = wish(&role.cpus, said.map(|said| &said.cpus), || Some(defaults.cpus));
    planned.options.cpus = cpus.filter(|cpus| *cpus != vm.cpus);
    if let Some(cpus) = planned.options.cpus {
        note("cpus", vm.cpus.to_string(), cpus.to_string(), Takes::Restart);
    }
    let memory = wish(&role.memory, said.map(|said| &said.memory), || Some(defaults.memory));
    planned.options.memory = memory.filter(|memory| *memory != vm.memory);
    if let Some(memory) = planned.options.memory {
        note("memory", exact(vm.memory, memory), exact(memory, vm.memory), Takes::Restart);
    }
    // A disk that is larger than anybody asks for does no harm.
    let disk = role.disk.map(|disk| disk.next_multiple_of(4096)).filter(|disk| *disk != vm.disk);
    if let Some(disk) = disk {
        let takes = if disk < vm.disk { Takes::Recreation } else { Takes::Restart };
        planned.options.disk = Some(disk).filter(|disk| *disk > vm.disk);
        note("disk", exact(vm.disk, disk), exact(disk, vm.disk), takes);
    }
    let isolate = wish(&role.isolate, said.map(|said| &said.isolate), || Some(defaults.isolate));
    planned.options.isolate = isolate.filter(|isolate| *isolate != vm.isolate);
    if let Some(isolate) = planned.options.isolate {
        note("isolate", yes_or_no(vm.isolate), yes_or_no(isolate), Takes::Nothing);
    }
}

/// A size as people read it, in bytes where that would look like the other: equal only where both are the same.
fn exact(size: u64, other: u64) -> String {
    let rounded = !size.is_multiple_of(1 << 20) || show_size(size) == show_size(other);
    if rounded { size.to_string() } else { show_size(size) }
}

fn yes_or_no(answer: bool) -> String {
    if answer { "yes" } else { "no" }.into()
}

fn ports(planned: &mut Planned, vm: &Vm, role: &Role, said: Option<&Role>) {
    if role.publish.is_empty() && said.is_none_or(|said| said.publish.is_empty()) {
        return;
    }
    let added = role.publish.iter().filter(|wanted| !vm.ports.iter().any(|port| port.is_meant_by(wanted)));
    planned.added = added.copied().collect();
    let gone = |port: &&Forward| !role.publish.iter().any(|wanted| port.is_meant_by(wanted));
    planned.taken_back = vm.ports.iter().filter(gone).copied().collect();
    if planned.added.is_empty() && planned.taken_back.is_empty() {
        return;
    }
    planned.options.ports = Some(role.publish.clone());
    let change = |from, to| Change { setting: "publish", from, to, takes: Takes::Nothing };
    let gone = planned.taken_back.iter().map(|port| change(Some(port.to_string()), None));
    planned.changes.extend(gone);
    planned.changes.extend(planned.added.iter().map(|port| change(None, Some(port.to_string()))));
}

/// What changes of the roles, but for what is told of members already.
fn of_roles(record: &Cluster, wanted: &Cluster, members: &[Planned]) -> Vec<RoleChange> {
    let mut all = Vec::new();
    let change = |role: &str, setting, from, to| RoleChange { role: role.into(), setting, from, to };
    for role in &wanted.roles {
        let of_it = || members.iter().filter(|one| one.member.role == role.name);
        let Some(former) = record.role(&role.name) else {
            if of_it().next().is_none() {
                all.push(change(&role.name, "role", None, Some("added".into())));
            }
            continue;
        };
        let told = |setting: &str| of_it().any(|one| one.changes.iter().any(|change| change.setting == setting));
        let mut note = |setting: &'static str, from: Option<String>, to: Option<String>| {
            if from != to && !told(setting) {
                all.push(change(&role.name, setting, from, to));
            }
        };
        let number = |number: Option<u32>| number.map(|number| number.to_string());
        let list = |words: Vec<String>| Some(words.join(", ")).filter(|words| !words.is_empty());
        let ports = |role: &Role| list(role.publish.iter().map(Forward::to_string).collect());
        if !of_it().any(|one| matches!(one.action, Action::Create | Action::Delete)) {
            note("count", number(Some(former.count)), number(Some(role.count)));
        }
        note("image", former.image.clone(), role.image.clone());
        note("cpus", number(former.cpus), number(role.cpus));
        for (setting, from, to) in [("memory", former.memory, role.memory), ("disk", former.disk, role.disk)] {
            let of = |size: Option<u64>, other: Option<u64>| Some(exact(size?, other.unwrap_or(0)));
            note(setting, of(from, to), of(to, from));
        }
        note("publish", ports(former), ports(role));
        note("isolate", former.isolate.map(yes_or_no), role.isolate.map(yes_or_no));
        note("after", list(former.after.clone()), list(role.after.clone()));
        if former.run != role.run {
            all.push(change(&role.name, "run", None, None));
        }
    }
    for former in record.roles.iter().filter(|former| wanted.role(&former.name).is_none()) {
        if !members.iter().any(|one| one.member.role == former.name) {
            all.push(change(&former.name, "role", None, Some("removed".into())));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::cluster::model::tests::{cluster, role};
    use crate::vm::state::tests::sample;

    const DEFAULTS: fn() -> Defaults =
        || Defaults { image: Some("default".into()), cpus: 2, memory: 1 << 30, isolate: false };

    fn web(change: &dyn Fn(&mut Role)) -> Cluster {
        let mut web = role("web", 1, &[]);
        change(&mut web);
        cluster(vec![web])
    }

    /// The plan for `web1`, which runs and is as `change` makes it.
    fn compare(record: &Cluster, wanted: &Cluster, state: State, change: &dyn Fn(&mut Vm)) -> Plan {
        let mut vm = Vm { prepared: true, ..sample("shop-web1", 1) };
        change(&mut vm);
        let found = [("web1".to_string(), Found { vm, state })].into();
        plan(Some(record), wanted, &found, Vec::new(), &DEFAULTS())
    }

    fn told(plan: &Plan) -> Vec<String> {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
        let one = |planned: &Planned| {
            let changes = planned.changes.iter().map(|change| {
                format!(" {} {}>{} {:?}", change.setting, or_none(&change.from), or_none(&change.to), change.takes)
            });
            let (restart, start) = (planned.restart, planned.start);
            let signs = format!("{}{}", if restart { " restart" } else { "" }, if start { " start" } else { "" });
            format!("{} {:?}{signs}{}", planned.member.member, planned.action, changes.collect::<String>())
        };
        let role = |change: &RoleChange| {
            format!("role {} {} {}>{}", change.role, change.setting, or_none(&change.from), or_none(&change.to))
        };
        plan.roles.iter().map(role).chain(plan.members.iter().map(one)).collect()
    }

    #[test]
    fn what_the_file_says_is_compared_with_what_is_there() {
        let none = web(&|_| {});
        let port = |text: &str| text.parse::<Forward>().unwrap();
        let chosen = Forward { host_port: 40123, ..port("80") };
        type Make<'a> = &'a dyn Fn(&mut Role);
        type Set<'a> = &'a dyn Fn(&mut Vm);
        let cases: [(Make, State, Set, &[&str]); 21] = [
            (&|_| {}, State::Running, &|_| {}, &[]),
            (&|_| {}, State::Running, &|vm| (vm.cpus, vm.ports) = (7, vec![chosen]), &[]),
            (&|_| {}, State::Stopped, &|_| {}, &["web1 Start start"]),
            (&|_| {}, State::Starting, &|_| {}, &["web1 Start start"]),
            (&|_| {}, State::Creating, &|_| {}, &["web1 Create start"]),
            (&|_| {}, State::Deleting, &|_| {}, &["web1 Create start"]),
            (&|web| web.cpus = Some(4), State::Running, &|_| {}, &["web1 Change restart cpus 1>4 Restart"]),
            (&|web| web.cpus = Some(4), State::Stopped, &|_| {}, &["web1 Change start cpus 1>4 Restart"]),
            (&|web| web.memory = Some(2 << 30), State::Running, &|_| {}, &["web1 Change restart memory 1G>2G Restart"]),
            (
                &|web| web.memory = Some((1 << 30) + 4096),
                State::Running,
                &|_| {},
                &["web1 Change restart memory 1G>1073745920 Restart"],
            ),
            (&|web| web.disk = Some(2 << 30), State::Running, &|_| {}, &["web1 Change restart disk 1G>2G Restart"]),
            (&|web| web.disk = Some(1 << 29), State::Running, &|_| {}, &["web1 Recreate disk 1G>512M Recreation"]),
            (&|web| web.image = Some("r".into()), State::Running, &|_| {}, &["role web image ->r"]),
            (&|web| web.image = Some("new".into()), State::Running, &|_| {}, &["web1 Recreate image r>new Recreation"]),
            (&|web| web.memory = Some(1 << 30), State::Running, &|_| {}, &["role web memory ->1G"]),
            (&|web| web.isolate = Some(true), State::Running, &|_| {}, &["web1 Change isolate no>yes Nothing"]),
            (
                &|web| web.publish = vec![port("80")],
                State::Running,
                &|_| {},
                &["web1 Change publish ->127.0.0.1:0:80/tcp Nothing"],
            ),
            (
                &|web| web.publish = vec![port("80")],
                State::Running,
                &|vm| vm.ports = vec![chosen],
                &["role web publish ->127.0.0.1:0:80/tcp"],
            ),
            (
                &|web| web.publish = vec![port("8080:80")],
                State::Running,
                &|vm| vm.ports = vec![chosen],
                &["web1 Change publish 127.0.0.1:40123:80/tcp>- Nothing publish ->127.0.0.1:8080:80/tcp Nothing"],
            ),
            (&|web| web.run = Some("x".into()), State::Running, &|vm| vm.prepared = false, &["role web run ->-"]),
            (
                &|web| (web.cpus, web.isolate) = (Some(2), Some(true)),
                State::Running,
                &|_| {},
                &["web1 Change restart cpus 1>2 Restart isolate no>yes Nothing"],
            ),
        ];
        for (at, (wanted, state, set, expected)) in cases.into_iter().enumerate() {
            let plan = compare(&none, &web(wanted), state, set);
            assert_eq!(told(&plan), expected, "case {at}");
            assert_eq!(plan.is_empty(), expected.is_empty());
        }
    }

    #[test]
    fn what_was_said_before_and_is_said_no_more_is_as_of_a_new_vm() {
        let full = web(&|web| {
            (web.cpus, web.memory, web.isolate) = (Some(4), Some(2 << 30), Some(true));
            (web.image, web.disk) = (Some("r".into()), Some(1 << 30));
            web.publish = vec!["80".parse().unwrap()];
        });
        let set = |vm: &mut Vm| {
            (vm.cpus, vm.memory, vm.isolate) = (4, 2 << 30, true);
            vm.ports = vec!["8080:80".parse().unwrap()];
        };
        let expected = "web1 Recreate image r>default Recreation cpus 4>2 Restart memory 2G>1G Restart \
                        isolate yes>no Nothing publish 127.0.0.1:8080:80/tcp>- Nothing";
        let roles = |plan: &Plan| plan.roles.len();
        let plan = compare(&full, &web(&|_| {}), State::Running, &set);
        assert_eq!(told(&plan).last().unwrap(), expected);
        assert_eq!(roles(&plan), 1, "the disk stays as it is: {plan:?}");
        // Also where the record says it no more, since an apply was broken off.
        let broken_off = Cluster { former: full.roles.clone(), ..web(&|_| {}) };
        let plan = compare(&broken_off, &web(&|_| {}), State::Running, &set);
        assert_eq!(told(&plan), [expected]);
        let merged = said(&Cluster { former: full.roles, ..web(&|web| web.cpus = Some(9)) }, "web").unwrap();
        assert_eq!((merged.cpus, merged.memory), (Some(9), Some(2 << 30)));
    }

    #[test]
    fn a_first_boot_that_failed_is_done_again_and_none_is_made_up() {
        let before = web(&|web| web.run = Some("old".into()));
        let after = web(&|web| web.run = Some("new".into()));
        let plan = compare(&before, &after, State::Running, &|vm| vm.prepared = false);
        assert_eq!(told(&plan), ["role web run ->-", "web1 Start start"]);
        assert_eq!(told(&compare(&before, &before, State::Running, &|_| {})), [""; 0]);
        assert_eq!(told(&compare(&before, &web(&|_| {}), State::Running, &|vm| vm.prepared = false)).len(), 1);
    }

    #[test]
    fn members_come_and_go_with_counts_and_roles() {
        let record = cluster(vec![role("db", 1, &[]), role("none", 0, &[]), role("web", 3, &["db"])]);
        let wanted = cluster(vec![role("cache", 1, &[]), role("empty", 0, &[]), role("web", 2, &[])]);
        let vm = |n: u32| Found { vm: Vm { prepared: true, ..sample("x", n) }, state: State::Running };
        let found = [("web1".to_string(), vm(1)), ("web2".to_string(), vm(2))].into();
        let gone = |member: &Member| ["db1", "web3"].contains(&member.member.as_str());
        let surplus = record.members().into_iter().filter(gone).collect();
        let plan = plan(Some(&record), &wanted, &found, surplus, &DEFAULTS());
        let expected = [
            "role empty role ->added",
            "role web after db>-",
            "role none role ->removed",
            "cache1 Create start",
            "db1 Delete",
            "web3 Delete",
        ];
        assert_eq!(told(&plan), expected);
        assert_eq!(plan.destroyed().count(), 2);
        let first = super::plan(None, &wanted, &BTreeMap::new(), Vec::new(), &DEFAULTS());
        assert!(first.new && first.count(Action::Create) == 3 && first.roles.is_empty(), "{first:?}");
    }
}
