//! A cluster from a TOML file that somebody wrote.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Deserializer};

use super::model::{Cluster, MOST_TEXT, Role};
use super::wrong;
use crate::vm::Hint;
use crate::vm::port::Forward;
use crate::vm::settings::parse_size;

/// Bytes of the file: a few hundred lines need a hundredth of it.
const MOST_BYTES: u64 = 1 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: Option<String>,
    /// For the roles that do not say.
    isolate: Option<bool>,
    #[serde(default)]
    roles: BTreeMap<String, WrittenRole>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenRole {
    #[serde(default = "one")]
    count: u32,
    image: Option<String>,
    cpus: Option<u32>,
    #[serde(default, deserialize_with = "size")]
    memory: Option<u64>,
    #[serde(default, deserialize_with = "size")]
    disk: Option<u64>,
    #[serde(default, deserialize_with = "ports")]
    publish: Vec<Forward>,
    isolate: Option<bool>,
    run: Option<String>,
    /// A file beside this one with what is run.
    script: Option<String>,
    #[serde(default)]
    after: Vec<String>,
}

fn one() -> u32 {
    1
}

fn size<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(from)?;
    parse_size(&text).map(Some).map_err(serde::de::Error::custom)
}

fn ports<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Forward>, D::Error> {
    let all = Vec::<String>::deserialize(from)?;
    all.iter().map(|text| text.parse().map_err(serde::de::Error::custom)).collect()
}

/// Reads the file at `path`. `name` is what the command line calls the cluster; a name in the file does as well.
///
/// # Errors
/// When the file cannot be read or is not understood, or no cluster can be so: the error says where.
pub fn read(path: &Path, name: Option<&str>) -> Result<Cluster> {
    let text = read_text(path, MOST_BYTES)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    parse(&text, name, &|script| read_text(&folder.join(script), MOST_TEXT as u64))
        .with_context(|| format!("{}", path.display()))
}

fn read_text(path: &Path, most: u64) -> Result<String> {
    let what = || format!("cannot read {}", path.display());
    let mut text = String::new();
    let file = std::fs::File::open(path).with_context(what)?;
    file.take(most + 1).read_to_string(&mut text).with_context(what)?;
    if text.len() as u64 > most {
        return Err(wrong(format!("{} is longer than {most} bytes", path.display()), "make it shorter"));
    }
    Ok(text)
}

/// Makes a cluster of such a file's text; `script` gives what is in a script beside it.
///
/// # Errors
/// As for [`read`].
pub fn parse(text: &str, name: Option<&str>, script: &dyn Fn(&str) -> Result<String>) -> Result<Cluster> {
    let written: Written =
        toml::from_str(text).map_err(|error| anyhow::anyhow!("{}", error.to_string().trim_end())).hint(
            "a role is a part such as [roles.web], with count, image, cpus, memory, disk, publish, isolate, run, script, \
             after",
        )?;
    let name = match (name, written.name) {
        (Some(name), Some(written)) if name != written => {
            let what = format!("the file calls the cluster '{}', the command '{name}'", written.escape_debug());
            return Err(wrong(what, "leave one of them out"));
        }
        (Some(name), _) => name.to_string(),
        (None, Some(written)) => written,
        (None, None) => return Err(wrong("the cluster has no name", "write name = \"NAME\" at its top, or give one")),
    };
    let (mut roles, isolate) = (Vec::new(), written.isolate);
    for (role, written) in written.roles {
        let run = match (written.run, written.script) {
            (Some(_), Some(_)) => {
                return Err(wrong(format!("the role '{role}' has both run and script"), "choose one of them"));
            }
            (None, Some(file)) => Some(script(&file).with_context(|| format!("the role '{role}'"))?),
            (run, None) => run,
        };
        let WrittenRole { count, image, cpus, memory, disk, publish, after, .. } = written;
        let isolate = written.isolate.or(isolate);
        roles.push(Role { name: role, count, image, cpus, memory, disk, publish, isolate, run, after });
    }
    let cluster = Cluster::new(&name, roles, 0);
    cluster.check()?;
    Ok(cluster)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, name: Option<&str>) -> Result<Cluster> {
        parse(text, name, &|script| match script {
            "setup.sh" => Ok("#!/bin/sh\necho ready\n".into()),
            other => anyhow::bail!("cannot read {other}"),
        })
    }

    #[test]
    fn a_file_says_all_that_there_is_to_say() {
        let text = r#"
            name = "shop"
            isolate = true
            [roles.db]
            isolate = false
            image = "localhost:5000/db"
            cpus = 4
            memory = "2G"
            disk = "20G"
            publish = ["5432:5432"]
            run = "echo hello"
            [roles.web]
            count = 3
            after = ["db"]
            isolate = true
            script = "setup.sh"
            publish = ["80"]
        "#;
        let shop = read(text, None).unwrap();
        let [db, web] = shop.roles.as_slice() else { panic!("{shop:?}") };
        assert_eq!(
            (shop.name.as_str(), db.count, db.cpus, db.memory, db.disk),
            ("shop", 1, Some(4), Some(2 << 30), Some(20 << 30))
        );
        assert_eq!((db.image.as_deref(), db.run.as_deref()), (Some("localhost:5000/db"), Some("echo hello")));
        assert_eq!((db.publish[0].to_string().as_str(), web.publish[0].any), ("127.0.0.1:5432:5432/tcp", true));
        assert_eq!(
            (web.count, web.after.as_slice(), web.run.as_deref()),
            (3, &["db".to_string()][..], Some("#!/bin/sh\necho ready\n"))
        );
        assert_eq!((db.isolate, web.isolate), (Some(false), Some(true)), "a role's own word comes first");
        assert_eq!(read(text, Some("shop")).unwrap(), shop);
        assert_eq!(read("[roles.node]", Some("x")).unwrap().members().len(), 1);
    }

    #[test]
    fn a_file_that_is_wrong_says_where_and_how_to_mend_it() {
        for (text, why, hint) in [
            ("", "no name", "name ="),
            ("name = 'x'", "no role", "[roles.node]"),
            ("name = 'y'\n[roles.node]", "the file calls the cluster 'y', the command 'x'", "leave one"),
            ("name = 'x'\n[role.node]", "unknown field `role`", "[roles.web]"),
            ("name = 'x'\n[roles.node]\ncpu = 1", "unknown field `cpu`", "cpus"),
            ("name = 'x'\n[roles.node]\ncpu = 1", "line 3", ""),
            ("name = 'x'\n[roles.node]\ncpus = -1", "line 3", ""),
            ("name = 'x'\n[roles.node]\nmemory = 'lots'", "'lots' is not a size", ""),
            ("name = 'x'\n[roles.node]\nmemory = 5", "expected a string", ""),
            ("name = 'x'\n[roles.node]\npublish = ['99999:1']", "99999", ""),
            ("name = 'x'\n[roles.node]\n[roles.node]", "duplicate key", ""),
            ("name = 'x'\n[roles.node]\nrun = 'a'\nscript = 'setup.sh'", "both run and script", "choose"),
            ("name = 'x'\n[roles.node]\nscript = 'none.sh'", "the role 'node': cannot read none.sh", ""),
            ("name = 'x'\n[roles.a]\nafter = ['b']\n[roles.b]\nafter = ['a']", "a after b after a", "come first"),
            ("name = 'x'\n[roles.node]\ncount = 2000", "2000 members", "up to 1000"),
            ("name = 'x'\n[roles.node", "line 2", ""),
        ] {
            let name = (!text.is_empty() && !text.starts_with("name = 'x'")).then_some("x");
            let error = read(text, name).expect_err(why);
            assert!(format!("{error:#}").contains(why), "{why}: {error:#}");
            let told = error.downcast_ref::<crate::vm::Hinted>().map_or("", |hinted| hinted.hint());
            assert!(told.contains(hint), "{why}: {told}");
        }
    }

    #[test]
    fn files_and_scripts_are_bounded_and_found_beside_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.toml");
        std::fs::write(&path, "[roles.node]\nscript = 'setup.sh'").unwrap();
        assert!(format!("{:#}", super::read(&path, Some("x")).unwrap_err()).contains("setup.sh"));
        std::fs::write(dir.path().join("setup.sh"), "true").unwrap();
        assert_eq!(super::read(&path, Some("x")).unwrap().roles[0].run.as_deref(), Some("true"));
        std::fs::write(dir.path().join("setup.sh"), "x".repeat(MOST_TEXT + 1)).unwrap();
        assert!(format!("{:#}", super::read(&path, Some("x")).unwrap_err()).contains("longer than"));
        std::fs::write(dir.path().join("setup.sh"), [0xff]).unwrap();
        assert!(super::read(&path, Some("x")).is_err());
    }
}
