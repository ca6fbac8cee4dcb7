//! Files that users write: settings, and a cluster's.

use std::collections::BTreeMap;
use std::path::Path;

use puter::vm::cluster;
use puter::vm::settings::{Settings, Source};

use crate::readable;

pub fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    match Settings::parse(text, Path::new("config.toml"), |_| None) {
        Ok(settings) => {
            assert!((1..=254).contains(&settings.cpus) && settings.memory > 0 && settings.disk > 0);
            // What is shown, given by the environment, is the same again.
            let shown: BTreeMap<String, String> = settings
                .shown()
                .iter()
                .map(|(name, value, _)| (format!("PUTER_{}", name.to_ascii_uppercase()), value.clone()))
                .collect();
            let given = |name: &str| shown.get(name).filter(|value| !value.is_empty()).cloned();
            let again = Settings::parse("", Path::new("config.toml"), given).expect("what was shown");
            for (one, other) in settings.shown().iter().zip(again.shown()) {
                assert_eq!((one.0, &one.1), (other.0, &other.1));
                assert!(other.2 == Source::Environment || one.1.is_empty());
            }
            assert_eq!(settings.registry_mirrors, again.registry_mirrors);
            assert_eq!((settings.subnet, settings.memory), (again.subnet, again.memory));
        }
        Err(error) => readable(&error),
    }
    let script = |name: &str| if name == "setup.sh" { Ok("true\n".into()) } else { anyhow::bail!("there is none") };
    for name in [None, Some("shop")] {
        match cluster::parse(text, name, &script) {
            Ok(cluster) => {
                cluster.check().expect("a cluster that was checked");
                assert!(name.is_none_or(|name| name == cluster.name));
                let text = serde_json::to_string(&cluster).expect("a record");
                assert_eq!(serde_json::from_str::<cluster::Cluster>(&text).expect("what was written"), cluster);
                let members = cluster.members();
                assert!(members.len() <= cluster::MOST_MEMBERS as usize);
                for (at, member) in members.iter().enumerate() {
                    puter::protocol::address::check_vm_name(&member.vm).expect("a name");
                    assert!(members[..at].iter().rev().take(20).all(|other| other.vm != member.vm));
                }
            }
            Err(error) => readable(&error),
        }
    }
}
