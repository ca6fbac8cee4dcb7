//! The records: `cluster/<name>.json`, each written whole or not at all.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};

use super::model::{Cluster, Member, SCHEMA};
use crate::protocol::address::check_vm_name;
use crate::vm::Hint;
use crate::vm::files::{self, Lock, write_atomic};
use crate::vm::home::Home;
use crate::vm::records;
use crate::vm::state::{self, Vm};

/// How long a command waits for another on the same cluster.
const LOCK_LIMIT: Duration = Duration::from_secs(20);

impl Cluster {
    /// Reads a record; `None` where there is no such cluster.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged, or was written by a newer puter.
    pub fn load(home: &Home, name: &str) -> Result<Option<Cluster>> {
        check_vm_name(name).map_err(anyhow::Error::msg)?;
        let path = home.cluster(name);
        let Some(bytes) = records::read(&path)? else { return Ok(None) };
        let parse = || -> Result<Cluster> {
            let cluster: Cluster = records::parse(&bytes, SCHEMA)?;
            if cluster.name != name {
                bail!("it describes the cluster '{}'", cluster.name.escape_default());
            }
            cluster.check().map_err(|error| anyhow!("{error:#}"))?;
            Ok(cluster)
        };
        let what = || format!("the record {} cannot be used", path.display());
        let hint = format!("mend it, or remove it with the cluster's VMs: puter cluster delete --force {name}");
        parse().map(Some).with_context(what).hint(hint)
    }

    /// Writes the record.
    ///
    /// # Errors
    /// When the file cannot be written; the former one stays.
    pub fn save(&self, home: &Home) -> Result<()> {
        write_atomic(&home.cluster(&self.name), &serde_json::to_vec_pretty(self)?)
    }
}

/// The cluster of this name.
///
/// # Errors
/// When there is none, or its record cannot be used.
pub fn existing(home: &Home, name: &str) -> Result<Cluster> {
    let found = Cluster::load(home, name)?;
    found.ok_or_else(|| anyhow!("there is no cluster named '{name}'")).hint("`puter cluster list` shows the clusters")
}

/// As [`existing`], of one that is whole.
///
/// # Errors
/// As for [`existing`], and of a clone that was broken off.
pub(super) fn whole(home: &Home, name: &str) -> Result<Cluster> {
    let cluster = existing(home, name)?;
    match cluster.unfinished {
        true => Err(anyhow!("'{name}' is a clone that is being made, or was broken off"))
            .hint(format!("make it again with the same command, or remove it: puter cluster delete --force {name}")),
        false => Ok(cluster),
    }
}

/// The clusters by name, and beside them the records that cannot be used.
#[derive(Debug, Default)]
pub struct All {
    pub clusters: Vec<Cluster>,
    pub damaged: Vec<(String, anyhow::Error)>,
}

/// Reads every record; a damaged one hides no other.
///
/// # Errors
/// When the directory cannot be read.
pub fn load_all(home: &Home) -> Result<All> {
    let (mut clusters, damaged) = records::load_each(&home.clusters(), |name| Cluster::load(home, name))?;
    clusters.sort_by(|a: &Cluster, b| a.name.cmp(&b.name));
    Ok(All { clusters, damaged })
}

/// The member's VM; `None` where it is not there. A VM that only has its name is not it.
///
/// # Errors
/// When its state cannot be used.
pub fn machine(home: &Home, member: &Member) -> Result<Option<Vm>> {
    Ok(Vm::load(home, &member.vm)?.filter(|vm| vm.member == Some(member.place())))
}

/// VMs that say they are the cluster's and are none of its members: a command that was killed left them.
pub(super) fn strays(home: &Home, name: &str, members: &[Member]) -> Result<Vec<String>> {
    let all = state::load_all(home)?.vms.into_iter();
    let own = all.filter(|vm| vm.member.as_ref().is_some_and(|place| place.cluster == name));
    Ok(own.map(|vm| vm.name).filter(|vm| members.iter().all(|member| member.vm != *vm)).collect())
}

/// Does `work` under the cluster's lock: two commands on one cluster take turns.
pub(super) fn locked<T>(home: &Home, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    check_vm_name(name).map_err(anyhow::Error::msg)?;
    let _lock = lock(home, name)?;
    let result = work();
    // The lock of a cluster that is not, or not any more, would be litter.
    if !home.cluster(name).exists() {
        let _ = files::remove(&home.cluster_lock(name));
    }
    result
}

fn lock(home: &Home, name: &str) -> Result<Lock> {
    let busy = format!("another command has been working on the cluster '{name}' for {} seconds", LOCK_LIMIT.as_secs());
    let lock = files::lock(&home.cluster_lock(name), LOCK_LIMIT, &busy)?;
    files::remove_temporaries(&home.cluster(name))?;
    Ok(lock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::cluster::Cut;
    use crate::vm::cluster::model::tests::{cluster, role};
    use crate::vm::state::tests::sample;

    #[test]
    fn a_record_reads_back_and_a_damaged_one_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.prepare().unwrap();
        let shop = cluster(vec![role("db", 1, &[]), role("web", 2, &["db"])]);
        locked(&home, "shop", || shop.save(&home)).unwrap();
        assert_eq!(Cluster::load(&home, "shop").unwrap(), Some(shop.clone()));
        assert_eq!(Cluster::load(&home, "absent").unwrap(), None);
        let text = std::fs::read_to_string(home.cluster("shop")).unwrap();
        let away = Cut {
            name: "v1".into(),
            created: 0,
            roles: shop.roles.clone(),
            members: [("web1".to_string(), "../../..".to_string())].into(),
        };
        let lost = Cluster { name: "lost".into(), snapshots: vec![away], ..shop.clone() };
        let lost = serde_json::to_string(&lost).unwrap();
        for (name, text) in [
            ("cut", &text[..text.len() / 2]),
            ("newer", "{\"schema\":2}"),
            ("other", text.as_str()),
            ("circle", &text.replace("\"shop\"", "\"circle\"").replace("[\n        \"db\"\n", "[\n        \"web\"\n")),
            ("lost", &lost),
            ("many", &text.replace("\"shop\"", "\"many\"").replace("\"count\": 2", "\"count\": 4000000000")),
        ] {
            std::fs::write(home.cluster(name), text).unwrap();
        }
        let all = load_all(&home).unwrap();
        assert_eq!(all.clusters, [shop]);
        let why: Vec<String> = all.damaged.iter().map(|(name, error)| format!("{name}: {error:#}")).collect();
        let told = [
            ("circle", "wait for each other"),
            ("cut", "EOF"),
            ("lost", "the snapshot 'v1': '../../..' is no name of a snapshot"),
            ("many", "too many"),
            ("newer", "schema 2"),
            ("other", "'shop'"),
        ];
        assert_eq!(why.len(), told.len(), "{why:?}");
        for (line, (name, part)) in why.iter().zip(told) {
            assert!(line.starts_with(name) && line.contains(part), "{line}");
        }
        assert!(existing(&home, "none").unwrap_err().to_string().contains("no cluster named 'none'"));
        assert!(locked(&home, "none", || Ok(())).is_ok() && !home.cluster_lock("none").exists());
        assert!(home.cluster_lock("shop").exists());
    }

    #[test]
    fn a_vm_is_a_member_by_what_it_says_and_not_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.prepare().unwrap();
        let members = cluster(vec![role("web", 2, &[])]).members();
        let [one, two] = members.as_slice() else { panic!() };
        sample("shop-web1", 1).save(&home).unwrap();
        assert_eq!(machine(&home, one).unwrap(), None);
        let own = Vm { member: Some(two.place()), ..sample("shop-web2", 2) };
        own.save(&home).unwrap();
        assert_eq!(machine(&home, two).unwrap(), Some(own.clone()));
        assert_eq!(strays(&home, "shop", &members).unwrap(), [""; 0]);
        assert_eq!(strays(&home, "shop", &members[..1]).unwrap(), ["shop-web2"]);
        assert_eq!(strays(&home, "other", &[]).unwrap(), [""; 0]);
    }
}
