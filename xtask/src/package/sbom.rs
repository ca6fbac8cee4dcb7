//! The bill of materials of the executable, in CycloneDX 1.6: the same bytes for the same source and tools.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::linked::{self, Crate, Marks};
use super::{Source, directory, put, read};
use crate::shell::{output, top};

/// Its name in packages; the ending is the one that tools look for.
pub const NAME: &str = "puter.cdx.json";

/// Makes it in `target/packages`.
///
/// # Errors
/// When cargo or the executable does not tell what is in it.
pub fn make(source: &Source) -> Result<PathBuf> {
    let path = directory()?.join(NAME);
    put(&path, &source.bill)?;
    Ok(path)
}

/// All that is linked into the executable: crates, Rust's library, and what is static of C.
///
/// # Errors
/// When cargo or the executable does not tell, or they contradict each other.
pub fn text(executable: &Path, epoch: &str) -> Result<String> {
    let executable = fs::read(executable).context("cannot read the executable")?;
    let marks = linked::marks(&executable)?;
    let tree = linked::tree()?;
    let known: BTreeSet<String> = tree.iter().map(|(_, found)| format!("{}-{}", found.name, found.version)).collect();
    let other: Vec<_> = marks.crates.difference(&known).cloned().collect();
    ensure!(
        other.is_empty(),
        "the executable holds other crates than Cargo.lock names: {}; build it anew",
        other.join(" ")
    );
    let sums = sums(&read(&top().join("Cargo.lock"))?);
    let time = output(Command::new("date").args(["--utc", "--date", &format!("@{epoch}"), "+%FT%TZ"]))?;
    let mut bill = bill(&tree, &sums, &marks, &hex(&Sha256::digest(&executable)))?;
    bill["metadata"]["timestamp"] = json!(time);
    // A number of its own for each content, as RFC 9562 has it for numbers that are made of something.
    let mut id = Sha256::digest(bill.to_string());
    id[6] = id[6] & 0x0f | 0x80;
    id[8] = id[8] & 0x3f | 0x80;
    let id = hex(&id[..16]);
    let id = [&id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..]].join("-");
    bill["serialNumber"] = json!(format!("urn:uuid:{id}"));
    Ok(serde_json::to_string_pretty(&bill)? + "\n")
}

fn bill(
    tree: &[(usize, Crate)],
    sums: &BTreeMap<(String, String), String>,
    marks: &Marks,
    executable: &str,
) -> Result<Value> {
    let reference = |found: &Crate| format!("pkg:cargo/{}@{}", found.name, encode(&found.version));
    let mut components = BTreeMap::new();
    let mut needs: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    // Who stands above, from puter down to the last one seen.
    let mut above: Vec<String> = Vec::new();
    for (depth, found) in tree {
        let purl = reference(found);
        needs.entry(purl.clone()).or_default();
        above.truncate(*depth);
        if let Some(parent) = above.last() {
            needs.entry(parent.clone()).or_default().insert(purl.clone());
            let sum = sums.get(&(found.name.clone(), found.version.clone()));
            let sum = sum.with_context(|| format!("Cargo.lock has no sum of {} {}", found.name, found.version))?;
            let mut component = library(&found.name, &found.version, &found.licence, &purl);
            component["hashes"] = json!([{ "alg": "SHA-256", "content": sum }]);
            components.insert(purl.clone(), component);
        }
        above.push(purl);
    }
    let own = &tree[0].1;
    let top = reference(own);
    for (name, version, licence, purl) in [
        ("rust-std", marks.rust.as_str(), "MIT OR Apache-2.0", format!("pkg:generic/rust-std@{}", marks.rust)),
        ("glibc", marks.glibc.1.as_str(), "LGPL-2.1-or-later", glibc(&marks.glibc)),
        ("libgcc", &marks.gcc, "GPL-3.0-or-later WITH GCC-exception-3.1", format!("pkg:generic/libgcc@{}", marks.gcc)),
    ] {
        components.insert(purl.clone(), library(name, version, licence, &purl));
        needs.entry(purl.clone()).or_default();
        needs.entry(top.clone()).or_default().insert(purl);
    }
    let mut product = library(&own.name, &own.version, &own.licence, &top);
    product["type"] = json!("application");
    product["hashes"] = json!([{ "alg": "SHA-256", "content": executable }]);
    let needs: Vec<_> = needs.into_iter().map(|(of, on)| json!({ "ref": of, "dependsOn": on })).collect();
    Ok(json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": { "lifecycles": [{ "phase": "build" }], "component": product },
        "components": components.into_values().collect::<Vec<_>>(),
        "dependencies": needs,
    }))
}

fn library(name: &str, version: &str, licence: &str, purl: &str) -> Value {
    // As crates wrote it before there were expressions.
    let licence = licence.split('/').map(str::trim).collect::<Vec<_>>().join(" OR ");
    json!({
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "licenses": [{ "expression": licence }],
        "purl": purl,
    })
}

/// The package of the distribution that it was linked from, where it is one that is known by such a name.
fn glibc((called, version): &(String, String)) -> String {
    match called.split_once(" GLIBC ") {
        Some((system @ ("Debian" | "Ubuntu"), package)) => {
            format!("pkg:deb/{}/glibc@{}?arch=source", system.to_lowercase(), encode(package))
        }
        _ => format!("pkg:generic/glibc@{}", encode(version)),
    }
}

/// As a package URL wants it.
fn encode(version: &str) -> String {
    version.replace('%', "%25").replace('+', "%2B")
}

/// The sums in Cargo.lock, by name and version.
fn sums(lock: &str) -> BTreeMap<(String, String), String> {
    let blocks = lock.split("[[package]]").skip(1);
    let sums = blocks.filter_map(|block| {
        let field = |key: &str| {
            let mut lines = block.lines();
            lines
                .find_map(|line| Some(line.strip_prefix(key)?.strip_prefix(" = \"")?.trim_end_matches('"').to_string()))
        };
        Some(((field("name")?, field("version")?), field("checksum")?))
    });
    sums.collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build;
    use crate::shell::run;

    fn found(name: &str, version: &str) -> Crate {
        Crate { name: name.into(), version: version.into(), licence: "MIT/Apache-2.0".into() }
    }

    #[test]
    fn each_crate_is_there_once_with_what_it_needs() {
        let tree = [
            (0, found("puter", "1.0.0")),
            (1, found("one", "1.0.0")),
            (2, found("two", "2.0.0+x")),
            (1, found("two", "2.0.0+x")),
        ];
        let lock = "[[package]]\nname = \"one\"\nversion = \"1.0.0\"\nchecksum = \"aa\"\n\n\
                    [[package]]\nname = \"two\"\nversion = \"2.0.0+x\"\nchecksum = \"bb\"\ndependencies = [\n \"one\",\n]\n";
        let glibc = ("Debian GLIBC 2.36-9+deb12u14".to_string(), "2.36".to_string());
        let marks = Marks { glibc, rust: "1.95.0".into(), gcc: "12.2.0".into(), crates: BTreeSet::new() };
        let bill = bill(&tree, &sums(lock), &marks, "cc").unwrap();
        let names: Vec<_> = bill["components"].as_array().unwrap().iter().map(|one| one["purl"].as_str()).collect();
        let expected = [
            "pkg:cargo/one@1.0.0",
            "pkg:cargo/two@2.0.0%2Bx",
            "pkg:deb/debian/glibc@2.36-9%2Bdeb12u14?arch=source",
            "pkg:generic/libgcc@12.2.0",
            "pkg:generic/rust-std@1.95.0",
        ];
        assert_eq!(names, expected.map(Some));
        assert_eq!(bill["components"][1]["hashes"][0]["content"], "bb");
        assert_eq!(bill["components"][1]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        let of = |name: &str| {
            let mut all = bill["dependencies"].as_array().unwrap().iter();
            all.find(|one| one["ref"] == name).unwrap()["dependsOn"].clone()
        };
        assert_eq!(of("pkg:cargo/one@1.0.0"), json!(["pkg:cargo/two@2.0.0%2Bx"]));
        assert_eq!(of("pkg:cargo/puter@1.0.0"), json!(expected));
        assert!(super::bill(&tree, &sums(""), &marks, "").unwrap_err().to_string().contains("no sum of one"));
    }

    #[test]
    #[ignore = "needs PUTER_TEST_BIN and a validator from PyPI"]
    fn the_bill_is_what_the_schema_of_cyclonedx_wants() {
        let dir = std::env::var_os("PUTER_TEST_BIN").expect("PUTER_TEST_BIN names the directory of puter-multi");
        let executable = Path::new(&dir).join("puter-multi");
        let bill = text(&executable, "1700000000").unwrap();
        assert_eq!(bill, text(&executable, "1700000000").unwrap());
        assert!(bill.contains("pkg:cargo/rustls@") && bill.contains("/glibc@"), "{bill}");
        assert!(!["tempfile@", "xtask@", "serde_derive@", "syn@"].iter().any(|name| bill.contains(name)), "{bill}");
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), &bill).unwrap();
        let validate = "import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read())
sys.exit(str(wrong) if wrong else 0)";
        let python = build::cyclonedx().unwrap();
        run(Command::new(&python).args(["-c", validate]).arg(file.path())).unwrap();
        fs::write(file.path(), bill.replace("\"library\"", "\"book\"")).unwrap();
        assert!(run(Command::new(&python).args(["-c", validate]).arg(file.path())).is_err());
    }
}
