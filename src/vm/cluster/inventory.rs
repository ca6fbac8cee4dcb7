//! A cluster's machines as other programs read them.

use std::fmt::Write;

use anyhow::Result;
use serde_json::json;

use super::model::{Cluster, Member};
use super::store::machine;
use crate::protocol::address::DOMAIN;
use crate::vm::home::Home;
use crate::vm::key;
use crate::vm::state::Vm;

/// For whom the inventory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Lines of hosts(5).
    Hosts,
    /// Parts of ssh_config(5).
    Ssh,
    /// An inventory of Ansible, in its INI form: a group for each role.
    Ansible,
    Json,
}

impl std::str::FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Format, String> {
        match text {
            "hosts" => Ok(Format::Hosts),
            "ssh" => Ok(Format::Ssh),
            "ansible" => Ok(Format::Ansible),
            "json" => Ok(Format::Json),
            _ => Err(format!("'{text}' is none of hosts, ssh, ansible and json")),
        }
    }
}

/// The members that there are, in this form.
///
/// # Errors
/// When a state cannot be used.
pub fn inventory(home: &Home, cluster: &Cluster, format: Format) -> Result<String> {
    let mut all = Vec::new();
    for member in cluster.members() {
        if let Some(vm) = machine(home, &member)? {
            all.push((member, vm));
        }
    }
    Ok(match format {
        Format::Hosts => hosts(cluster, &all),
        Format::Ssh => ssh(home, cluster, &all),
        Format::Ansible => ansible(home, cluster, &all),
        Format::Json => {
            let hosts: Vec<_> = all.iter().map(|(member, vm)| as_json(home, member, vm)).collect();
            serde_json::to_string_pretty(&json!({ "cluster": cluster.name, "members": hosts }))?
        }
    })
}

fn as_json(home: &Home, member: &Member, vm: &Vm) -> serde_json::Value {
    json!({
        "member": member.member, "role": member.role, "vm": vm.name, "ip": vm.ip, "ip6": vm.ip6,
        "status": vm.state().to_string(), "names": names(member), "user": "root", "key": key::private(home),
        "known_hosts": home.known_hosts(&vm.name), "host_key_alias": vm.name, "ports": vm.ports,
    })
}

/// The names of a member, the one first that means it alone.
fn names(member: &Member) -> [String; 4] {
    let Member { member, vm, cluster, .. } = member;
    [format!("{member}.{cluster}.{}", DOMAIN), format!("{member}.{cluster}"), vm.clone(), member.clone()]
}

fn hosts(cluster: &Cluster, all: &[(Member, Vm)]) -> String {
    let mut text = format!("# the cluster {}\n", cluster.name);
    for (member, vm) in all {
        let _ = writeln!(text, "{:<15} {}", vm.ip, names(member).join(" "));
    }
    text
}

fn ssh(home: &Home, cluster: &Cluster, all: &[(Member, Vm)]) -> String {
    let mut text = String::new();
    for (member, vm) in all {
        let aliases = format!("{}.{}", member.member, cluster.name);
        text += &key::ssh_host(home, &vm.name, &format!("{} {aliases}", vm.name), vm.ip);
    }
    text
}

fn ansible(home: &Home, cluster: &Cluster, all: &[(Member, Vm)]) -> String {
    let mut text = String::new();
    for role in &cluster.roles {
        // Ansible's groups are named as Python's variables are.
        let _ = writeln!(text, "[{}]", group(&role.name));
        for (member, vm) in all.iter().filter(|(member, _)| member.role == role.name) {
            let known = home.known_hosts(&vm.name);
            let _ = writeln!(
                text,
                "{} ansible_host={} ansible_ssh_common_args=\"-F none -o IdentitiesOnly=yes -o StrictHostKeyChecking=yes -o GlobalKnownHostsFile=none -o HostKeyAlias={} -o UserKnownHostsFile='{}'\"",
                member.member,
                vm.ip,
                vm.name,
                known.display()
            );
        }
        text.push('\n');
    }
    let _ = writeln!(text, "[{}:children]", group(&cluster.name));
    for role in &cluster.roles {
        let _ = writeln!(text, "{}", group(&role.name));
    }
    let _ = write!(
        text,
        "\n[{}:vars]\nansible_user=root\nansible_ssh_private_key_file=\"{}\"\n",
        group(&cluster.name),
        key::private(home).display()
    );
    text
}

fn group(name: &str) -> String {
    let name = name.replace('-', "_");
    // No word of Ansible's own, and no digit first.
    match name.starts_with(|first: char| first.is_ascii_digit()) || ["all", "ungrouped"].contains(&name.as_str()) {
        true => format!("g_{name}"),
        false => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::cluster::model::tests::{cluster, role};
    use crate::vm::state::tests::sample;

    #[test]
    fn each_form_names_the_members_that_there_are() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        home.prepare().unwrap();
        let shop = cluster(vec![role("db", 1, &[]), role("web-app", 2, &[])]);
        for (id, member) in shop.members().iter().enumerate().take(2) {
            Vm { member: Some(member.place()), ..sample(&member.vm, id as u32 + 1) }.save(&home).unwrap();
        }
        let of = |format: &str| inventory(&home, &shop, format.parse().unwrap()).unwrap();
        assert_eq!(
            of("hosts"),
            "# the cluster shop\n\
             10.0.0.11       db1.shop.puter db1.shop shop-db1 db1\n\
             10.0.0.12       web-app1.shop.puter web-app1.shop shop-web-app1 web-app1\n"
        );
        let ssh = of("ssh");
        assert!(
            ssh.starts_with("Host shop-db1 db1.shop\n  HostName 10.0.0.11\n  User root\n  HostKeyAlias shop-db1\n"),
            "{ssh}"
        );
        assert_eq!(ssh.matches("Host ").count(), 2);
        let ansible = of("ansible");
        for part in [
            "[db]\ndb1 ansible_host=10.0.0.11 ",
            "[web_app]\nweb-app1 ansible_host=10.0.0.12 ",
            "HostKeyAlias=shop-web-app1",
            "[shop:children]\ndb\nweb_app\n",
            "[shop:vars]\nansible_user=root\n",
        ] {
            assert!(ansible.contains(part), "{part}: {ansible}");
        }
        let json: serde_json::Value = serde_json::from_str(&of("json")).unwrap();
        assert_eq!((&json["cluster"], json["members"].as_array().unwrap().len()), (&"shop".into(), 2));
        assert_eq!(json["members"][1]["names"][0], "web-app1.shop.puter");
        assert!("yaml".parse::<Format>().unwrap_err().contains("ansible"));
        assert_eq!((group("all"), group("3d-x"), group("db")), ("g_all".into(), "g_3d_x".into(), "db".into()));
    }
}
