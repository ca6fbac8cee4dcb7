//! Commands on images that are killed at any step: what is there then is whole, and the next command goes on from it.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;

use serde_json::Value;

use super::host::{Host, text};
use super::{host, run, steps};

/// Every file of the images, with its length.
fn files(host: &Host) -> Vec<String> {
    let script = "cd \"$0\" && find images -type f ! -name '*lock' -printf '%p %s\\n' | sort";
    let all = xtask::shell::output(host.world.root("sh").args(["-c", script]).arg(host.world.home())).unwrap();
    all.lines().map(String::from).collect()
}

fn images(host: &Host) -> Vec<Value> {
    host.json(&["image", "list", "--json"]).as_array().unwrap().clone()
}

fn has(host: &Host, image: &str) -> bool {
    images(host).iter().any(|one| one["reference"].as_str().is_some_and(|name| name.starts_with(image)))
}

/// Runs the command, killed at each of its steps in turn, and then `next`, after which there must be just `after`.
fn kill_at_each_step(
    host: &Host,
    words: &[&str],
    prepare: &dyn Fn(),
    next: &dyn Fn(&str),
    after: &[String],
) -> BTreeSet<String> {
    prepare();
    let points = BTreeSet::from_iter(steps(host, words));
    assert_eq!(files(host), after, "{words:?}");
    for point in &points {
        let what = format!("{words:?} killed at '{point}'");
        eprintln!("{what}");
        prepare();
        let output = run(host, &[("PUTER_FAIL_POINT", point)], words);
        assert_eq!(output.status.signal(), Some(9), "{what}: {}", text(&output.stderr));
        // What is listed can be used, at once.
        for image in images(host) {
            assert_eq!(image["whole"], true, "{what}: {image}");
            let about = host.json(&["image", "inspect", "--json", image["digest"].as_str().unwrap()]);
            let size = std::fs::metadata(about[0]["disk"].as_str().unwrap()).unwrap().len();
            assert_eq!(about[0]["size"], size, "{what}: {about}");
            assert_eq!(about[0]["config"]["os"], "linux", "{what}: {about}");
        }
        assert!(files(host).iter().all(|file| !file.contains("/tmp/")), "{what}: {:?}", files(host));
        next(&what);
        assert_eq!(files(host), after, "{what}");
    }
    points
}

#[test]
#[ignore = "needs root"]
fn a_command_on_images_that_is_killed_at_any_step_is_mended_by_the_next() {
    let host = host();
    let image = host.push_small("app", &[("large", &"text ".repeat(100_000))]);
    let bare = || {
        host.ok(&["image", "prune"]);
        assert!(!has(&host, &image) && images(&host).len() == 1, "the image of new machines stays");
    };
    let pulled = || drop(host.ok(&["image", "pull", &image]));
    bare();
    let without = files(&host);
    pulled();
    let with = files(&host);

    let points = kill_at_each_step(&host, &["image", "pull", &image], &bare, &|_| pulled(), &with);
    let least = ["layer fetched", "layer here", "disk made", "disk here", "named"];
    assert!(least.iter().all(|point| points.contains(&format!("image pull: {point}"))), "{points:?}");

    // As a whole or not at all, and a second time nothing stands in its way.
    let gone = |what: &str| {
        let there = has(&host, &image);
        let output = run(&host, &[], &["image", "delete", &image]);
        assert_eq!(output.status.success(), there, "{what}: {}", text(&output.stderr));
    };
    let points = kill_at_each_step(&host, &["image", "delete", &image], &pulled, &gone, &without);
    let least = [
        "delete: begins",
        "delete: out of sight",
        "delete: disk removed",
        "delete: name forgotten",
        "prune: layer removed",
    ];
    assert!(least.iter().all(|point| points.contains(&format!("image {point}"))), "{points:?}");

    let points =
        kill_at_each_step(&host, &["image", "prune"], &pulled, &|_| drop(host.ok(&["image", "prune"])), &without);
    let least = ["delete: out of sight", "prune: name forgotten", "prune: layer removed"];
    assert!(least.iter().all(|point| points.contains(&format!("image {point}"))), "{points:?}");
}
