//! What a cluster is: roles, and the members that follow from them. Pure.

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};

use super::snapshot::Cut;
use super::wrong;
use crate::protocol::address::{DOMAIN, HOST, MAX_VM_NAME, check_vm_name};
use crate::protocol::daemon::Membership;
use crate::vm::Hint;
use crate::vm::port::{self, Forward};
use crate::vm::snapshots::check_name;

/// Version of the record's layout; a newer one is never touched.
pub const SCHEMA: u32 = 1;
/// Members of one cluster: each waits for all others when all are to stand still.
pub const MOST_MEMBERS: u32 = 1000;
/// Roles of one cluster.
pub const MOST_ROLES: usize = 100;
/// Bytes of what is run at the first boot: it travels in one message, as one argument (MAX_ARG_STRLEN, execve(2)).
pub const MOST_TEXT: usize = 96 << 10;

/// A cluster's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    pub schema: u32,
    pub name: String,
    /// Seconds since 1970-01-01 UTC.
    pub created: u64,
    /// By name.
    pub roles: Vec<Role>,
    /// Snapshots of the whole, the latest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<Cut>,
    /// What roles said before an `apply` that goes on, or was broken off.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<Role>,
    /// A clone is being made, or was broken off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unfinished: bool,
}

/// Members that are alike.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Role {
    pub name: String,
    /// How many members there are.
    pub count: u32,
    /// What is absent comes from the settings, as for any VM.
    pub image: Option<String>,
    pub cpus: Option<u32>,
    /// Bytes.
    pub memory: Option<u64>,
    /// Bytes.
    pub disk: Option<u64>,
    pub publish: Vec<Forward>,
    /// Whether members are kept from all VMs that are not isolated members of this cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub isolate: Option<bool>,
    /// What each member runs once, at its first boot: a script, or a line for a shell.
    pub run: Option<String>,
    /// Roles whose members run, and have done what they do at their first boot, before one of this role starts.
    pub after: Vec<String>,
}

/// One machine of a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Member {
    /// Its name in the cluster: the role's, and a number from 1.
    pub member: String,
    pub role: String,
    #[serde(skip)]
    pub number: u32,
    /// The VM's name.
    pub vm: String,
    #[serde(skip)]
    pub cluster: String,
}

/// A member's name in its cluster.
fn member_name(role: &str, number: u32) -> String {
    format!("{role}{number}")
}

/// The name of a member's VM.
pub(super) fn vm_name(cluster: &str, member: &str) -> String {
    format!("{cluster}-{member}")
}

impl Member {
    fn new(cluster: &str, role: &str, number: u32) -> Member {
        let member = member_name(role, number);
        Member { vm: vm_name(cluster, &member), member, role: role.into(), number, cluster: cluster.into() }
    }

    /// Its place, as the VM's state and puterd know it.
    pub fn place(&self) -> Membership {
        Membership { cluster: self.cluster.clone(), member: self.member.clone() }
    }
}

impl Role {
    /// Its members' names in the cluster.
    pub fn member_names(&self) -> impl Iterator<Item = String> {
        (1..=self.count).map(|number| member_name(&self.name, number))
    }
}

impl Cluster {
    pub fn new(name: &str, roles: Vec<Role>, created: u64) -> Cluster {
        let (snapshots, former, unfinished) = (Vec::new(), Vec::new(), false);
        Cluster { schema: SCHEMA, name: name.into(), created, roles, snapshots, former, unfinished }
    }

    /// Every member, role by role.
    pub fn members(&self) -> Vec<Member> {
        let of = |role: &Role| (1..=role.count).map(|n| Member::new(&self.name, &role.name, n)).collect::<Vec<_>>();
        self.roles.iter().flat_map(of).collect()
    }

    /// The roles' names, as they are shown.
    pub(super) fn role_names(&self) -> String {
        self.roles.iter().map(|role| role.name.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// The role of this name.
    pub fn role(&self, name: &str) -> Option<&Role> {
        self.roles.iter().find(|role| role.name == name)
    }

    /// Checks everything that can be checked without looking at the host.
    ///
    /// # Errors
    /// What is wrong, with the way out.
    pub fn check(&self) -> Result<()> {
        check_vm_name(&self.name).map_err(anyhow::Error::msg)?;
        if [DOMAIN, HOST, "localhost"].contains(&self.name.as_str()) {
            return Err(wrong(
                format!("a cluster cannot be called '{}'", self.name),
                "that name has a meaning of its own in the network: choose another",
            ));
        }
        if self.roles.is_empty() {
            return Err(wrong(
                format!("the cluster '{}' has no role", self.name),
                "give it a part such as [roles.node]",
            ));
        }
        if self.roles.len() > MOST_ROLES {
            return Err(wrong(
                format!("{} roles are too many", self.roles.len()),
                format!("a cluster may have up to {MOST_ROLES}"),
            ));
        }
        for (at, role) in self.roles.iter().enumerate() {
            if self.roles[..at].iter().any(|other| other.name == role.name) {
                return Err(wrong(format!("there are two roles '{}'", role.name), "give each role its own name"));
            }
            self.check_role(role).map_err(|error| in_role(role, error))?;
        }
        let all: u64 = self.roles.iter().map(|role| u64::from(role.count)).sum();
        if all > MOST_MEMBERS.into() {
            return Err(wrong(
                format!("{all} members are too many for one cluster"),
                format!("a cluster may have up to {MOST_MEMBERS}"),
            ));
        }
        let ports: Vec<Forward> = self.roles.iter().flat_map(|role| role.publish.iter().copied()).collect();
        let taken =
            ports.iter().enumerate().find_map(|(at, one)| Some((one, ports[..at].iter().find(|o| o.overlaps(one))?)));
        if let Some((one, other)) = taken {
            let (what, port) = (format!("{one} and {other}"), one.host_port);
            return Err(wrong(format!("{what} cannot both have port {port} of the host"), "give each its own"));
        }
        // They become names of directories.
        for cut in &self.snapshots {
            check_name(&cut.name).map_err(anyhow::Error::msg)?;
            for (member, id) in &cut.members {
                let names = check_vm_name(&vm_name(&self.name, member)).and_then(|()| check_name(id));
                names.map_err(|why| anyhow!("the snapshot '{}': {why}", cut.name))?;
            }
        }
        self.waves().map(drop)
    }

    fn check_role(&self, role: &Role) -> Result<()> {
        check_vm_name(&role.name).map_err(anyhow::Error::msg)?;
        if role.name.ends_with(|last: char| last.is_ascii_digit()) {
            // Else the first of 'node1' and the eleventh of 'node' would be one.
            return Err(wrong(
                "its name ends in a digit",
                format!(
                    "members are numbered: its first one is to be called '{}1'",
                    role.name.trim_end_matches(|c: char| c.is_ascii_digit())
                ),
            ));
        }
        let longest = Member::new(&self.name, &role.name, role.count.max(1)).vm;
        if longest.len() > MAX_VM_NAME {
            return Err(wrong(
                format!("the name '{longest}' of its last member has {} characters", longest.len()),
                format!("a name of a VM may have {MAX_VM_NAME}: choose a shorter one for the cluster or the role"),
            ));
        }
        if let Some(run) =
            role.run.as_ref().filter(|run| run.len() > MOST_TEXT || run.contains('\0') || run.trim().is_empty())
        {
            let what = match run.len() {
                length if length > MOST_TEXT => format!("what it runs has {length} bytes; {MOST_TEXT} are allowed"),
                _ if run.trim().is_empty() => "what it runs is empty".into(),
                _ => "what it runs is no text".into(),
            };
            return Err(wrong(what, "put larger things into the image, or fetch them in the script"));
        }
        port::check(&role.publish).map_err(|(what, hint)| wrong(what, hint))?;
        let names: Vec<String> = (1..=role.count.min(2)).map(|n| Member::new(&self.name, &role.name, n).vm).collect();
        port::check_for(&names, &role.publish).map_err(|(what, hint)| wrong(what, hint))?;
        for (at, name) in role.after.iter().enumerate() {
            if self.role(name).is_none() {
                return Err(wrong(
                    format!("there is no role '{name}' that it could come after"),
                    format!("there are: {}", self.role_names()),
                ));
            }
            if role.after[..at].contains(name) {
                return Err(wrong(format!("it names '{name}' twice"), "name each role once"));
            }
        }
        Ok(())
    }

    /// The roles in the order of their starts, those that may start at the same time together.
    ///
    /// # Errors
    /// When some wait for each other; they are named.
    pub fn waves(&self) -> Result<Vec<Vec<&Role>>> {
        let mut waves: Vec<Vec<&Role>> = Vec::new();
        let mut left: Vec<&Role> = self.roles.iter().collect();
        while !left.is_empty() {
            let ready = |role: &&Role| !role.after.iter().any(|name| left.iter().any(|other| other.name == *name));
            let (wave, rest): (Vec<_>, Vec<_>) = left.iter().copied().partition(ready);
            if wave.is_empty() {
                return Err(circle(&left));
            }
            waves.push(wave);
            left = rest;
        }
        Ok(waves)
    }
}

/// The error with the role that it is about.
pub(super) fn in_role(role: &Role, error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<crate::vm::Hinted>() {
        Ok(hinted) => wrong(format!("the role '{}': {hinted}", role.name), hinted.hint()),
        Err(error) => error.context(format!("the role '{}'", role.name)),
    }
}

/// Names roles that wait for each other. Each of them waits for one of them.
fn circle(left: &[&Role]) -> anyhow::Error {
    let next = |role: &Role| left.iter().find(|other| role.after.contains(&other.name)).copied();
    let mut path: Vec<&str> = Vec::new();
    let mut at = left.first().copied();
    while let Some(role) = at {
        if let Some(start) = path.iter().position(|name| *name == role.name) {
            path.drain(..start);
            path.push(&role.name);
            break;
        }
        path.push(&role.name);
        at = next(role);
    }
    wrong(
        format!("roles wait for each other: {}", path.join(" after ")),
        "take one of these out of its 'after': something has to come first",
    )
}

/// A cluster, or a part of it: `NAME`, `NAME:ROLE` or `NAME:MEMBER`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub cluster: String,
    pub part: Option<String>,
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        let (cluster, part) = match text.split_once(':') {
            Some((cluster, part)) => (cluster, Some(part)),
            None => (text, None),
        };
        check_vm_name(cluster)?;
        part.map_or(Ok(()), check_vm_name)?;
        Ok(Target { cluster: cluster.into(), part: part.map(String::from) })
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.part {
            Some(part) => write!(f, "{}:{part}", self.cluster),
            None => f.write_str(&self.cluster),
        }
    }
}

impl Target {
    /// The members that are meant.
    ///
    /// # Errors
    /// When the cluster has no such part.
    pub fn select(&self, cluster: &Cluster) -> Result<Vec<Member>> {
        let mut members = cluster.members();
        if let Some(part) = &self.part {
            members.retain(|member| member.role == *part || member.member == *part);
        }
        if members.is_empty() && self.part.as_ref().is_none_or(|part| cluster.role(part).is_none()) {
            let part = self.part.as_deref().unwrap_or_default();
            return Err(anyhow!("'{}' has neither a role nor a member '{part}'", cluster.name)).hint(format!(
                "its roles are {}; `puter cluster status {}` shows its members",
                cluster.role_names(),
                cluster.name
            ));
        }
        Ok(members)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn role(name: &str, count: u32, after: &[&str]) -> Role {
        let after = after.iter().map(|name| name.to_string()).collect();
        Role { name: name.into(), count, after, ..Role::default() }
    }

    pub fn cluster(roles: Vec<Role>) -> Cluster {
        Cluster::new("shop", roles, 0)
    }

    #[test]
    fn members_follow_from_roles_and_no_two_are_one() {
        let shop = cluster(vec![role("db", 1, &[]), role("web", 2, &["db"])]);
        shop.check().unwrap();
        let members = shop.members();
        let names: Vec<_> = members.iter().map(|m| (m.member.as_str(), m.role.as_str(), m.vm.as_str())).collect();
        assert_eq!(names, [("db1", "db", "shop-db1"), ("web1", "web", "shop-web1"), ("web2", "web", "shop-web2")]);
        assert_eq!(members[2].place(), Membership { cluster: "shop".into(), member: "web2".into() });
    }

    #[test]
    fn what_cannot_be_is_explained_with_a_way_out() {
        let with = |change: &dyn Fn(&mut Role)| {
            let mut node = role("node", 2, &[]);
            change(&mut node);
            cluster(vec![node, role("db", 1, &[])])
        };
        let named = |name: &str| Cluster { name: name.into(), ..cluster(vec![role("node", 1, &[])]) };
        let roles = cluster;
        let port = |text: &str| text.parse::<Forward>().unwrap();
        for (cluster, why, hint) in [
            (named("Shop"), "Shop", ""),
            (named("puter"), "cannot be called 'puter'", "choose another"),
            (named("host"), "cannot be called 'host'", "choose another"),
            (roles(vec![]), "no role", "[roles.node]"),
            (roles(vec![role("a", 1, &[]), role("a", 1, &[])]), "two roles 'a'", "its own name"),
            (roles((0..101).map(|n| role(&format!("r{n}x"), 1, &[])).collect()), "101 roles", "up to 100"),
            (with(&|node| node.name = "node1".into()), "'node1': its name ends in a digit", "'node1'"),
            (with(&|node| node.name = "no_de".into()), "the role 'no_de'", ""),
            (with(&|node| node.name = "x".repeat(58)), "has 64 characters", "shorter"),
            (with(&|node| node.count = 1000), "1001 members are too many", "up to 1000"),
            (with(&|node| node.count = u32::MAX), "4294967296 members", "up to 1000"),
            (with(&|node| node.run = Some("x".repeat(MOST_TEXT + 1))), "bytes", "image"),
            (with(&|node| node.run = Some(" \n".into())), "is empty", ""),
            (with(&|node| node.run = Some("a\0b".into())), "no text", ""),
            (
                with(&|node| node.publish = vec![port("8080:80")]),
                "cannot lead to both 'shop-node1' and 'shop-node2'",
                "any that is free",
            ),
            (with(&|node| node.publish = vec![port("80"), port("80")]), "named twice", "once"),
            (with(&|node| node.after = vec!["nobody".into()]), "no role 'nobody'", "node, db"),
            (with(&|node| node.after = vec!["db".into(), "db".into()]), "names 'db' twice", "once"),
            (with(&|node| node.after = vec!["node".into()]), "each other: node after node", "come first"),
            (
                roles(vec![role("x", 1, &["a"]), role("a", 1, &["b"]), role("b", 1, &["c"]), role("c", 1, &["a"])]),
                "each other: a after b after c after a",
                "come first",
            ),
        ] {
            let error = cluster.check().expect_err(why);
            assert!(format!("{error:#}").contains(why), "{error:#} is not about {why}");
            let told = error.downcast_ref::<crate::vm::Hinted>().map_or("", |hinted| hinted.hint());
            assert!(told.contains(hint), "{why}: {told}");
        }
        let mut both = cluster(vec![role("a", 1, &[]), role("b", 1, &[])]);
        both.roles[0].publish = vec![port("8080:80")];
        both.roles[1].publish = vec![port("0.0.0.0:8080:90")];
        assert!(both.check().unwrap_err().to_string().contains("cannot both have port 8080"));
        both.roles[1].publish = vec![port("8081:90")];
        both.check().unwrap();
        assert!(with(&|node| node.publish = vec![port("80")]).check().is_ok(), "any free port will do for many");
        assert!(with(&|node| node.name = "x".repeat(57)).check().is_ok());
        assert!(with(&|node| node.count = 0).check().is_ok(), "a role may wait for its first member");
    }

    #[test]
    fn roles_start_in_waves() {
        let shop = cluster(vec![
            role("web", 2, &["db", "cache"]),
            role("db", 1, &[]),
            role("cache", 1, &[]),
            role("lb", 1, &["web"]),
        ]);
        let waves = shop.waves().unwrap();
        let names: Vec<Vec<&str>> =
            waves.iter().map(|wave| wave.iter().map(|role| role.name.as_str()).collect()).collect();
        assert_eq!(names, [vec!["db", "cache"], vec!["web"], vec!["lb"]]);
    }

    #[test]
    fn a_target_is_all_a_role_or_one() {
        let shop = cluster(vec![role("db", 1, &[]), role("web", 2, &[]), role("none", 0, &[])]);
        let select = |text: &str| -> Result<Vec<String>> {
            let target: Target = text.parse().map_err(anyhow::Error::msg)?;
            Ok(target.select(&shop)?.into_iter().map(|member| member.member).collect())
        };
        assert_eq!(select("shop").unwrap(), ["db1", "web1", "web2"]);
        assert_eq!(select("shop:web").unwrap(), ["web1", "web2"]);
        assert_eq!(select("shop:web2").unwrap(), ["web2"]);
        assert!(select("shop:none").unwrap().is_empty());
        for bad in ["shop:web3", "shop:nobody", "shop:", ":web", "Shop", "shop:web:1", ""] {
            assert!(select(bad).is_err(), "{bad}");
        }
        assert!(select("shop:web3").unwrap_err().to_string().contains("neither a role nor a member 'web3'"));
    }
}
