//! A hypervisor's snapshot on its way back: the directory that `--restore` is given, made from a snapshot's files with
//! the machine's own disk, network and sockets in place of those that it had (cloud-hypervisor's
//! docs/snapshot_restore.md).

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// The machine's configuration.
pub const CONFIG: &str = "config.json";
/// Processors and devices; of cloud-hypervisor also where each part of the memory is.
pub const STATE: &str = "state.json";
/// The guest's memory.
pub const MEMORY: &str = "memory-ranges";
/// The files of a snapshot that a hypervisor may have written; the last one is the emulator's alone.
pub const FILES: [&str; 4] = [CONFIG, STATE, MEMORY, "vmstate"];

/// The largest configuration or state that is read, in bytes.
const MAX_JSON: u64 = 64 << 20;

/// What is the machine's own and not the snapshot's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    pub disk: PathBuf,
    pub tap: String,
    pub mac: String,
    pub vsock: PathBuf,
    pub serial: PathBuf,
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
}

/// Makes `target`, from which a hypervisor restores the snapshot in `source` as this machine. The snapshot is not
/// changed, and its memory is not copied. Where `map` is set the machine's memory is a private mapping of the
/// snapshot's memory file: pages are read when they are touched, and shared with every other machine that maps it.
///
/// # Errors
/// When a file of the snapshot is not what it must be, or `target` cannot be written.
pub fn prepare(source: &Path, target: &Path, own: &Own, map: bool) -> Result<()> {
    let mut config = read(&source.join(CONFIG))?;
    adopt(&mut config, own).with_context(|| format!("{} is not understood", source.join(CONFIG).display()))?;
    let memory = source.join(MEMORY);
    let state = match map {
        true => {
            let mut state = read(&source.join(STATE))?;
            map_memory(&mut config, &mut state, &memory)
                .with_context(|| format!("{} is not understood", source.join(STATE).display()))?;
            Some(state)
        }
        false => None,
    };
    fs::DirBuilder::new().mode(0o700).create(target).with_context(|| format!("cannot make {}", target.display()))?;
    for name in FILES {
        let (from, to) = (source.join(name), target.join(name));
        match (name, &state) {
            (CONFIG, _) => write(&to, &config)?,
            (STATE, Some(state)) => write(&to, state)?,
            _ if from.exists() => symlink(&from, &to).with_context(|| format!("cannot make {}", to.display()))?,
            _ => {}
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Value> {
    let what = || format!("cannot read {}", path.display());
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_JSON).read_to_end(&mut bytes)).with_context(what)?;
    serde_json::from_slice(&bytes).with_context(what)
}

fn write(path: &Path, value: &Value) -> Result<()> {
    let open = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let written = crate::failpoint::write().and(open).and_then(|mut file| file.write_all(value.to_string().as_bytes()));
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// Puts the machine's own things into the configuration.
fn adopt(config: &mut Value, own: &Own) -> Result<()> {
    fn only<'a>(config: &'a mut Value, list: &str) -> Result<&'a mut Value> {
        match config.get_mut(list).and_then(Value::as_array_mut).map(Vec::as_mut_slice) {
            Some([one]) if one.is_object() => Ok(one),
            _ => bail!("it does not name one of '{list}'"),
        }
    }
    only(config, "disks")?["path"] = json!(own.disk);
    let net = only(config, "net")?;
    net["tap"] = json!(own.tap);
    net["mac"] = json!(own.mac);
    ensure!(config["vsock"].is_object(), "it names no vsock");
    config["vsock"]["socket"] = json!(own.vsock);
    ensure!(config["serial"].is_object(), "it names no serial console");
    config["serial"]["socket"] = json!(own.serial);
    ensure!(config["payload"].is_object(), "it names no kernel");
    config["payload"]["kernel"] = json!(own.kernel);
    config["payload"]["initramfs"] = json!(own.initrd);
    Ok(())
}

/// Makes the memory a zone that maps the file, and takes from the state what says that it is to be read.
///
/// The file holds the ranges one after another, and a zone's regions are mapped from the offsets that
/// `guest_ram_mappings` names (cloud-hypervisor's vmm/src/memory_manager.rs).
fn map_memory(config: &mut Value, state: &mut Value, file: &Path) -> Result<()> {
    let data = state.pointer_mut("/snapshots/memory-manager/snapshot_data/state");
    let data = data.context("it tells nothing of the memory")?;
    let text = data.as_str().context("it tells nothing of the memory")?;
    let mut manager: Value = serde_json::from_str(text).context("what it tells of the memory is no JSON")?;
    let ranges = manager["memory_ranges"]["data"].as_array().cloned().context("it names no ranges of memory")?;
    let mappings = manager["guest_ram_mappings"].as_array_mut().context("it names no mappings of memory")?;
    let number = |value: &Value, field: &str| value[field].as_u64().with_context(|| format!("it has no {field}"));
    let mut offset = 0_u64;
    let mut zone = None;
    ensure!(ranges.len() == mappings.len(), "its memory has {} ranges in {} parts", ranges.len(), mappings.len());
    for (range, mapping) in ranges.iter().zip(mappings.iter_mut()) {
        let (gpa, length) = (number(range, "gpa")?, number(range, "length")?);
        let same = gpa == number(mapping, "gpa")? && length == number(mapping, "size")?;
        ensure!(same && offset.is_multiple_of(4096), "its memory's ranges are not the parts that are mapped");
        mapping["file_offset"] = json!(offset);
        let name = mapping["zone_id"].as_str().context("a part of the memory is in no zone")?.to_string();
        ensure!(zone.get_or_insert_with(|| name.clone()) == &name, "its memory is in several zones");
        offset = offset.checked_add(length).context("its memory is too large")?;
    }
    let length = fs::metadata(file).with_context(|| format!("cannot examine {}", file.display()))?.len();
    ensure!(length == offset, "the memory file has {length} bytes, {offset} are needed");
    manager["memory_ranges"]["data"] = json!([]);
    *data = json!(manager.to_string());

    let memory = config["memory"].as_object_mut().context("the configuration tells nothing of the memory")?;
    let size = memory.get("size").and_then(Value::as_u64).filter(|size| *size > 0);
    // A clone's clone has its zone already.
    let size = size.or_else(|| memory.get("zones")?.get(0)?.get("size")?.as_u64());
    ensure!(size == Some(offset), "the machine has {size:?} bytes of memory, the snapshot {offset}");
    memory.insert("size".into(), json!(0));
    memory.insert("shared".into(), json!(false));
    memory.insert("zones".into(), json!([{ "id": zone, "size": offset, "file": file, "shared": false }]));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Own {
        Own {
            disk: "/h/new.qcow2".into(),
            tap: "pt-new".into(),
            mac: "52:54:00:00:00:0c".into(),
            vsock: "/h/new.vsock".into(),
            serial: "/h/new.serial".into(),
            kernel: "/h/vmlinuz".into(),
            initrd: None,
        }
    }

    /// A snapshot as cloud-hypervisor writes it, as far as it is read.
    fn snapshot(dir: &Path) {
        let config = json!({
            "memory": { "size": 3 << 20, "shared": true, "zones": null, "thp": true },
            "payload": { "kernel": "/old", "initramfs": "/old", "cmdline": "c" },
            "disks": [{ "path": "/old.qcow2", "id": "_disk0" }],
            "net": [{ "tap": "pt-old", "mac": "x", "id": "_net1" }],
            "vsock": { "cid": 4, "socket": "/old" },
            "serial": { "mode": "Socket", "socket": "/old" },
        });
        let manager = json!({
            "memory_ranges": { "data": [{ "gpa": 0, "length": 1 << 20 }, { "gpa": 1_u64 << 32, "length": 2 << 20 }] },
            "guest_ram_mappings": [
                { "slot": 0, "gpa": 0, "size": 1 << 20, "zone_id": "mem0", "virtio_mem": false, "file_offset": 0 },
                { "slot": 1, "gpa": 1_u64 << 32, "size": 2 << 20, "zone_id": "mem0", "virtio_mem": false,
                  "file_offset": 0 },
            ],
        });
        let state = json!({ "snapshots": { "memory-manager": { "snapshots": {},
            "snapshot_data": { "state": manager.to_string() } } }, "snapshot_data": null });
        fs::write(dir.join(CONFIG), config.to_string()).unwrap();
        fs::write(dir.join(STATE), state.to_string()).unwrap();
        File::create(dir.join(MEMORY)).unwrap().set_len(3 << 20).unwrap();
    }

    #[test]
    fn the_machines_own_things_take_the_place_of_the_snapshots() {
        let dir = tempfile::tempdir().unwrap();
        snapshot(dir.path());
        let before = fs::read(dir.path().join(CONFIG)).unwrap();
        let target = dir.path().join("t");
        prepare(dir.path(), &target, &own(), false).unwrap();
        let config = read(&target.join(CONFIG)).unwrap();
        assert_eq!(config["disks"][0], json!({ "path": "/h/new.qcow2", "id": "_disk0" }));
        assert_eq!(config["net"][0]["tap"], "pt-new");
        assert_eq!(config["serial"], json!({ "mode": "Socket", "socket": "/h/new.serial" }));
        assert_eq!(config["payload"], json!({ "kernel": "/h/vmlinuz", "initramfs": null, "cmdline": "c" }));
        assert!(!config.to_string().contains("old"), "{config}");
        assert_eq!(fs::read(dir.path().join(CONFIG)).unwrap(), before);
        assert_eq!(fs::read_link(target.join(MEMORY)).unwrap(), dir.path().join(MEMORY));
    }

    #[test]
    fn mapped_memory_is_read_from_where_it_is_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        snapshot(dir.path());
        let target = dir.path().join("t");
        prepare(dir.path(), &target, &own(), true).unwrap();
        let config = read(&target.join(CONFIG)).unwrap();
        let file = dir.path().join(MEMORY);
        assert_eq!(config["memory"]["size"], 0);
        assert_eq!(
            config["memory"]["zones"],
            json!([{ "id": "mem0", "size": 3 << 20, "file": file, "shared": false }])
        );
        let state = read(&target.join(STATE)).unwrap();
        let manager = state["snapshots"]["memory-manager"]["snapshot_data"]["state"].as_str().unwrap();
        let manager: Value = serde_json::from_str(manager).unwrap();
        assert_eq!(manager["memory_ranges"]["data"], json!([]));
        let offsets: Vec<_> = (0..2).map(|n| manager["guest_ram_mappings"][n]["file_offset"].clone()).collect();
        assert_eq!(offsets, [0, 1 << 20]);
    }

    #[test]
    fn a_snapshot_that_is_something_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let wrong = |change: &dyn Fn(&Path), map: bool| {
            snapshot(dir.path());
            change(dir.path());
            let target = dir.path().join("t");
            let _ = fs::remove_dir_all(&target);
            format!("{:#}", prepare(dir.path(), &target, &own(), map).unwrap_err())
        };
        let cut = |path: &Path| File::options().write(true).open(path.join(MEMORY)).unwrap().set_len(4096).unwrap();
        assert!(wrong(&cut, true).contains("4096 bytes, 3145728 are needed"));
        let text = |name: &'static str, text: &'static str| move |dir: &Path| fs::write(dir.join(name), text).unwrap();
        assert!(wrong(&text(CONFIG, "{"), false).contains("cannot read"));
        assert!(wrong(&text(CONFIG, "[]"), false).contains("'disks'"));
        assert!(wrong(&text(CONFIG, r#"{"disks":[{},{}]}"#), false).contains("'disks'"));
        assert!(wrong(&text(CONFIG, r#"{"disks":[{}],"net":[7]}"#), false).contains("'net'"));
        for state in ["{}", "[]", "7", r#"{"snapshots":7}"#, r#"{"snapshots":{"memory-manager":[]}}"#] {
            assert!(wrong(&text(STATE, state), true).contains("nothing of the memory"));
            assert!(!dir.path().join("t").exists(), "what is refused leaves nothing");
        }
    }
}
