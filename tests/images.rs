//! `puter image` with a real registry, and with what stands on images: machines, snapshots, clones.

#[path = "e2e/host.rs"]
mod host;
#[path = "e2e/terminal.rs"]
mod terminal;

use std::fs;
use std::process::Command;

use host::{Host, text};
use serde_json::{Value, json};
use terminal::Terminal;
use xtask::shell::output;

fn images(host: &Host) -> Vec<Value> {
    host.json(&["image", "list", "--json"]).as_array().unwrap().clone()
}

fn inspect(host: &Host, image: &str) -> Value {
    host.json(&["image", "inspect", "--json", image])[0].clone()
}

/// Bytes that the images take on the disk.
fn stored(host: &Host) -> u64 {
    let said = output(host.world.command("du").arg("-sB1").arg(host.world.home().join("images"))).unwrap();
    said.split_whitespace().next().unwrap().parse().unwrap()
}

/// A file that takes room, however it is packed.
fn noise(length: usize) -> String {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from(b' ' + (state % 95) as u8)
    };
    (0..length).map(|_| next()).collect()
}

/// Pushes another image under the name, with the layers of the one that is there and one more.
fn push_more(host: &Host, name: &str, files: &[(&str, &str)]) {
    let layout = host.world.dir().join(format!("{name}.oci"));
    let image = format!("{}:latest", layout.display());
    let tree = host.world.dir().join(format!("{name}.more"));
    for (path, contents) in files {
        fs::create_dir_all(tree.join(path).parent().unwrap()).unwrap();
        fs::write(tree.join(path), contents).unwrap();
    }
    output(Command::new("umoci").args(["insert", "--image", &image]).arg(&tree).arg("/more")).unwrap();
    xtask::registry::push(&host.world, &layout, "latest", &format!("test/{name}")).unwrap();
}

#[test]
#[ignore = "needs root"]
fn images_are_pulled_listed_examined_and_removed() {
    let host = Host::new();
    let boot = [
        ("sbin/init", "init"),
        ("usr/bin/puter-agent", "agent"),
        ("boot/vmlinuz-6.1", "kernel"),
        ("boot/initrd.img-6.1", "initrd"),
    ];
    let large = noise(2 << 20);
    let app = host.push_small("app", &[&boot[..], &[("large", &large)]].concat());
    let odd = host.push_small("odd", &[("etc/only", "this")]);
    assert_eq!(
        host.ok(&["image", "list"]),
        "no images yet; `puter init --image IMAGE` or `puter image pull IMAGE` gets one"
    );
    assert!(!host.world.home().join("images").exists(), "to look is not to make");

    let pulled = host.ok(&["image", "pull", &app, &odd]);
    let lines: Vec<&str> = pulled.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with(&format!("{app}:latest pulled (")), "{pulled}");
    let again = host.world.puter(&["image", "pull", &app, &odd]).unwrap();
    assert!(text(&again.stdout).lines().all(|line| line.contains(" is up to date (")), "{}", text(&again.stdout));
    assert!(text(&again.stderr).contains("no VM can be made of it: it lacks an init and puter-agent"));

    // Both forms of the list.
    let all = images(&host);
    assert_eq!(
        all.iter().map(|image| &image["reference"]).collect::<Vec<_>>(),
        [&json!(format!("{app}:latest")), &json!(format!("{odd}:latest"))]
    );
    let digest = all[0]["digest"].as_str().unwrap().to_string();
    let (size, used) = (all[0]["size"].as_u64().unwrap(), all[0]["used"].as_u64().unwrap());
    assert!(size > used && used > 2 << 20, "{all:#?}");
    let shown = host.ok(&["image", "list"]);
    let row: Vec<&str> = shown.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(
        (row[0], row[1], row[2], *row.last().unwrap()),
        (format!("{app}:latest").as_str(), &digest[7..19], "amd64", "-")
    );

    // By each of its names it is the same image.
    let about = inspect(&host, &app);
    for name in [&format!("{app}:latest"), &format!("{app}@{digest}"), &digest, &digest[7..19], &digest[..15]] {
        assert_eq!(inspect(&host, name), about, "{name}");
    }
    assert_eq!(
        (&about["bootable"], &about["kernel"], &about["init"]),
        (&json!(true), &json!("/boot/vmlinuz-6.1"), &json!("/sbin/init"))
    );
    assert_eq!(about["config"]["architecture"], "amd64");
    assert_eq!((&about["layers"][0]["cached"], about["layers"].as_array().unwrap().len()), (&json!(true), 1));
    let odd_about = inspect(&host, &odd);
    assert_eq!(
        (&odd_about["bootable"], &odd_about["why_not"]),
        (&json!(false), &json!("it lacks an init and puter-agent"))
    );
    host.fails(&["image", "inspect", "app"], "there is no image 'app' here", "puter image list");
    host.fails(
        &["image", "inspect", "sha256:00000000"],
        "there is no image 'sha256:00000000' here",
        "puter image list",
    );
    let two = host.world.puter(&["image", "inspect", &app, "absent"]).unwrap();
    assert!(text(&two.stdout).contains("/boot/vmlinuz-6.1") && two.status.code() == Some(1), "{}", text(&two.stdout));

    // The name moves on: the former image has none any more, and what both have is not fetched twice.
    push_more(&host, "app", &[("new", "file")]);
    let pulled = host.json(&["image", "pull", "--json", &app]);
    assert_eq!((&pulled[0]["changed"], &pulled[0]["former"]), (&json!(true), &json!(digest)));
    let new = inspect(&host, &app);
    assert_eq!((new["layers"].as_array().unwrap().len(), &new["layers"][0]), (2, &about["layers"][0]));
    let nameless = images(&host).into_iter().find(|image| image["digest"] == digest.as_str()).unwrap();
    assert_eq!(nameless["reference"], Value::Null);
    assert!(host.ok(&["image", "list"]).lines().last().unwrap().starts_with("-  "));

    // A dry run tells what then happens, and does nothing.
    host.ok(&["image", "pull", &format!("{app}@{digest}")]);
    host.ok(&["image", "delete", &format!("{app}@{digest}")]);
    assert_eq!(images(&host).len(), 2, "its only name was the digest's: {:#?}", images(&host));
    assert!(
        host.world.home().join("images/blobs/sha256").read_dir().unwrap().count() == 3,
        "the other still has the layer"
    );
    let before = stored(&host);
    let dry = host.json(&["image", "prune", "--dry-run", "--json"]);
    assert_eq!(stored(&host), before);
    assert_eq!((dry["images"].as_array().unwrap().len(), &dry["layers"], images(&host).len()), (2, &json!(3), 2));
    let told = host.ok(&["image", "prune", "--dry-run"]);
    assert!(told.contains(&app) && told.ends_with(" would be free again"), "{told}");
    assert_eq!(host.json(&["df", "--json"])["unused"], dry["bytes"]);

    // A deletion gives back the layers that no other image has.
    let deleted = host.json(&["image", "delete", "--json", &app]);
    assert_eq!((&deleted[0]["layers"], &deleted[0]["images"][0]["digest"]), (&json!(2), &new["digest"]));
    let freed = deleted[0]["layer_bytes"].as_u64().unwrap() + deleted[0]["images"][0]["bytes"].as_u64().unwrap();
    let after = stored(&host);
    assert!(
        freed > 2 << 20 && before - after >= freed - 4096 && before - after <= freed + 65536,
        "{before} {after} {freed}"
    );
    let pruned = host.json(&["image", "prune", "--json"]);
    assert_eq!(
        (pruned["images"].as_array().unwrap().len(), &pruned["layers"], &pruned["dry_run"]),
        (1, &json!(1), &json!(false))
    );
    assert_eq!(images(&host), [Value::Null; 0]);
    assert_eq!(host.ok(&["image", "prune"]), "nothing to delete: everything is needed");
    let left: Vec<_> = host.files().into_iter().filter(|file| file.starts_with("./images/")).collect();
    assert_eq!(left, [""; 0]);
}

#[test]
#[ignore = "needs root"]
fn one_image_with_two_names_goes_with_the_last_or_by_its_digest() {
    let host = Host::new();
    let one = host.push_small("app", &[("a", "a")]);
    let layout = host.world.dir().join("app.oci");
    let two = xtask::registry::push(&host.world, &layout, "latest", "test/alias").unwrap();
    host.ok(&["image", "pull", "-q", &one, &two]);
    let all = images(&host);
    assert_eq!((all.len(), &all[0]["digest"]), (2, &all[1]["digest"]));
    let digest = all[0]["digest"].as_str().unwrap().to_string();
    assert_eq!(inspect(&host, &digest)["references"].as_array().unwrap().len(), 2);
    let said = host.ok(&["image", "delete", &one]);
    assert_eq!(said, format!("{one} forgotten; the image is still there as {two}:latest"));
    host.fails(&["image", "inspect", &one], "there is no image", "puter image list");
    assert_eq!(images(&host).len(), 1);
    host.ok(&["image", "pull", "-q", &one]);
    let said = host.ok(&["image", "delete", &digest[..20]]);
    assert!(said.starts_with(&format!("{} deleted (", &digest[..20])), "{said}");
    assert_eq!(images(&host).len(), 0);
}

#[test]
#[ignore = "needs root"]
fn an_image_for_another_architecture_is_had_by_its_platform() {
    let host = Host::new();
    host.push_small("app", &[("a", "a")]);
    let layout = host.world.dir().join("app.oci");
    // The same for another machine, and an index of both.
    let other = format!("{}:other", layout.display());
    output(Command::new("umoci").args(["tag", "--image", &format!("{}:latest", layout.display()), "other"])).unwrap();
    output(Command::new("umoci").args(["config", "--image", &other, "--architecture", "arm64"])).unwrap();
    let image = xtask::registry::push(&host.world, &layout, "other", "test/other").unwrap();
    let pulled = host.world.puter(&["image", "pull", "--platform", "linux/arm64", &image]).unwrap();
    assert!(text(&pulled.stderr).contains("made for arm64"), "{}", text(&pulled.stderr));
    let about = inspect(&host, &image);
    assert_eq!((&about["architecture"], &about["bootable"]), (&json!("arm64"), &json!(false)));
    assert!(about["why_not"].as_str().unwrap().contains("it is made for arm64"), "{about}");
    host.fails(&["image", "pull", "--platform", "linux/s390x", &image], "s390x", "");
    assert_eq!(inspect(&host, &image), about, "what was there stays");
}

#[test]
#[ignore = "needs root"]
fn what_a_machine_a_snapshot_or_a_clone_stands_on_stays() {
    let host = Host::new();
    host.ready();
    let image = host.push_small_guest();
    let own = host.push_small("own", &[("a", "a")]);
    host.ok(&["image", "pull", &own]);
    let digest = inspect(&host, &image)["digest"].as_str().unwrap().to_string();
    let users = || -> Vec<String> {
        let used_by = inspect(&host, &digest)["used_by"].clone();
        used_by.as_array().unwrap().iter().map(|user| user.as_str().unwrap().to_string()).collect()
    };
    let kept = || images(&host).iter().any(|image| image["digest"] == digest.as_str());
    assert_eq!((users(), &inspect(&host, &image)["default"]), (vec![], &json!(true)));
    assert!(host.ok(&["image", "list"]).contains(&format!("{image}:latest *")));

    host.ok(&["start", "web", "--memory", "256M"]);
    host.fails(&["image", "delete", &image], "is needed by the VM web", "delete those first");
    host.ok(&["stop", "--force", "web"]);
    host.ok(&["snapshot", "web", "--name", "kept"]);
    host.ok(&["clone", "web@kept", "new"]);
    let snapshot = host.json(&["snapshots", "--json"])[0]["id"].as_str().unwrap().to_string();
    let all = ["new".to_string(), "web".to_string(), format!("web@{snapshot}")];
    assert_eq!(users(), all);
    let why = format!("is needed by the VM new, the VM web, the snapshot web@{snapshot}");
    host.fails(&["image", "delete", &image], &why, "delete those first");
    host.fails(&["image", "delete", &digest], &why, "delete those first");
    let row = format!("new web web@{snapshot}");
    assert!(host.ok(&["df"]).lines().any(|line| line.starts_with("image ") && line.ends_with(&row)));

    // What nobody can read the state of still has its disk, down to the image.
    let states = ["state/new.json", "state/web.json"].map(|state| host.world.home().join(state));
    let whole = states.clone().map(|state| fs::read(state).unwrap());
    for state in &states {
        fs::write(state, "{").unwrap();
    }
    assert_eq!(users(), all);
    assert_eq!(host.json(&["image", "prune", "--all", "--json"])["images"].as_array().unwrap().len(), 1);
    assert!(kept() && images(&host).len() == 1, "{:#?}", images(&host));
    for (state, whole) in states.iter().zip(whole) {
        fs::write(state, whole).unwrap();
    }
    host.ok(&["start", "new", "--memory", "256M"]);
    assert_eq!(host.ok(&["exec", "new", "--", "/bin/busybox", "hostname"]), "new");
    host.ok(&["delete", "--force", "new"]);
    assert_eq!(users(), all[1..]);
    host.ok(&["delete", "--snapshots", "web"]);
    assert_eq!(users(), [""; 0]);

    // The image for new machines stays, until that is asked for as well; the next machine pulls it again.
    assert_eq!(host.ok(&["image", "prune"]), "nothing to delete: everything is needed");
    assert!(kept());
    assert!(host.ok(&["image", "prune", "--all"]).contains(&format!("{image}:latest")));
    assert!(!kept());
    let started = host.world.puter(&["start", "web", "--memory", "256M"]).unwrap();
    assert!(
        text(&started.stderr).contains(&format!("{image}:latest: downloading 1 layer, ")),
        "{}",
        text(&started.stderr)
    );
    assert!(kept());
    // A machine can be made of an image by its digest as well.
    host.ok(&["start", "two", "--memory", "256M", "--image", &digest]);
    assert_eq!(host.json(&["info", "two", "--json"])[0]["image"]["reference"], format!("{image}:latest"));
}

#[test]
#[ignore = "needs root"]
fn what_one_machine_says_on_a_terminal_is_not_wiped_by_the_progress_of_another() {
    let host = Host::new();
    host.ready();
    host.ok(&["image", "prune", "--all"]);
    let mut command = host.world.command_with(&[("TERM", "xterm")], "puter");
    command.args(["start", "one", "two", "three", "--memory", "256M"]).stdin(std::process::Stdio::null());
    let (status, lines, _) = Terminal::run(command, 24, 80).end();
    assert!(status.success(), "{lines:#?}");
    for (name, ip) in [("one", "10.0.0."), ("two", "10.0.0."), ("three", "10.0.0.")] {
        let says = |text: &str| lines.iter().filter(|line| line.starts_with(&format!("{name}{text}"))).count();
        assert_eq!((says(&format!(" runs at {ip}")), says(": boot "), says(": network ")), (1, 1, 1), "{lines:#?}");
    }
    // Nothing of what moved is left, and of one image there is one download.
    assert!(lines.iter().all(|line| !line.ends_with(['|', '/', '-', '\\']) && !line.contains(" [")), "{lines:#?}");
    assert_eq!(lines.iter().filter(|line| line.contains(": downloading 1 layer, ")).count(), 1, "{lines:#?}");
}

#[test]
#[ignore = "needs root"]
fn commands_at_once_leave_whole_images() {
    let host = Host::new();
    let large = noise(300_000);
    let names: Vec<String> = (0..3)
        .map(|n| host.push_small(&format!("app{n}"), &[("large", large.as_str()), ("own", &format!("{n}"))]))
        .collect();
    // What may come between is told and harms nobody.
    let fine = ["another command is using the images", "there is no image", "was deleted while it was pulled"];
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            let (host, names) = (&host, &names);
            scope.spawn(move || {
                for round in 0..12_usize {
                    let name = names[(thread + round) % 3].as_str();
                    let words: &[&str] = match (thread * 5 + round * 3) % 7 {
                        0 => &["image", "prune", "--json"],
                        1 => &["image", "delete", name],
                        2 => &["image", "list", "--json"],
                        _ => &["image", "pull", "-q", name],
                    };
                    let output = host.world.puter(words).unwrap();
                    let said = text(&output.stderr);
                    assert!(
                        output.status.success() || fine.iter().any(|fine| said.contains(fine)),
                        "{words:?}: {said}"
                    );
                    if words[1] == "list" {
                        let all: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
                        assert!(all.iter().all(|image| image["whole"] == true), "{all:#?}");
                    }
                }
            });
        }
    });
    for name in &names {
        host.ok(&["image", "pull", "-q", name]);
        let disk = inspect(&host, name)["disk"].as_str().unwrap().to_string();
        output(Command::new("e2fsck").args(["-fn", &disk])).unwrap();
    }
    assert_eq!(images(&host).len(), 3);
    host.ok(&["image", "prune"]);
    let left: Vec<_> = host.files().into_iter().filter(|file| file.starts_with("./images/")).collect();
    assert_eq!(left, [""; 0]);
}
