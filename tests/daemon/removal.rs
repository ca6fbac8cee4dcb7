//! TAPs that are removed: they are nobody's at once, and go from the kernel shortly after, many together.

use puter::protocol::address::Mac;
use puter::protocol::daemon::{Status, Tap};
use rustix::process::Signal;

use crate::lab::{Lab, UID, wait};
use crate::{attached, hold_tap};

const MANY: u32 = 70;

fn make(lab: &Lab, vm: &str, id: u32) -> Tap {
    lab.json("POST", "/v1/taps", &format!(r#"{{"vm":"{vm}","id":{id}}}"#))
}

fn remove(lab: &Lab, vm: &str) {
    assert_eq!(lab.request("DELETE", &format!("/v1/taps/{vm}"), "").0, 204);
}

fn exists(lab: &Lab, tap: &str) -> bool {
    lab.attempt(lab.host_holder(), &format!("ip link show {tap}")).1
}

/// The rules of the chain of this TAP, and in how many tables there is one.
fn filter(lab: &Lab, tap: &str) -> (String, usize) {
    let rules = lab.host("nft list ruleset");
    let mark = format!("chain {tap} {{");
    let body = rules.split(&mark).nth(1).map(|rest| rest.split('}').next().unwrap().to_owned());
    (body.unwrap_or_default(), rules.matches(&mark).count())
}

#[test]
#[ignore = "needs root"]
fn what_is_removed_is_nobodys_at_once_and_goes_with_its_filter() {
    let lab = Lab::new();
    let daemon = lab.start(&[]);
    let before = lab.host("ip -o link | wc -l");
    let of = |n: u32| format!("t{n}");
    // More than go at once.
    (1..=MANY).for_each(|n| drop(make(&lab, &of(n), n)));
    let keeper = lab.host("ip -o link show pt-t70");
    (1..MANY).for_each(|n| remove(&lab, &of(n)));
    let left: Vec<Tap> = lab.json("GET", "/v1/taps", "");
    assert_eq!(left.iter().map(|tap| tap.vm.as_str()).collect::<Vec<_>>(), ["t70"]);
    assert_eq!(lab.json::<Status>("GET", "/v1/status", "").taps, 1);
    assert_eq!(lab.request("DELETE", "/v1/taps/t1", "").0, 404);
    // Its number is free for another.
    assert_eq!(make(&lab, "next", 1).mac, Mac::of_id(1));
    let names = ["pt-next", "pt-t70"];
    let all = || lab.host("ls /sys/class/net | grep ^pt- | sort");
    wait("the TAPs go", || all().lines().eq(names));
    wait("their filters go", || lab.host("nft list ruleset").matches("chain pt-").count() == names.len());
    assert_eq!(lab.host("ip -o link show pt-t70"), keeper);
    assert_eq!((filter(&lab, "pt-t70").1, filter(&lab, "pt-next").1), (1, 1));
    ["t70", "next"].iter().for_each(|vm| remove(&lab, vm));
    // A clean stop leaves none of them behind.
    daemon.stop(Signal::TERM);
    assert_eq!(lab.host("ip -o link | wc -l"), before);
    drop(lab.start(&[]));
    assert!(!lab.host("nft list ruleset").contains("chain pt-"));
}

#[test]
#[ignore = "needs root"]
fn a_tap_that_is_held_is_cut_off_before_the_answer() {
    let lab = Lab::new();
    let _daemon = lab.start(&[]);
    make(&lab, "web", 1);
    let _owner = hold_tap(&lab, UID, "pt-web");
    wait("the owner opens it", || attached(&lab, "web"));
    remove(&lab, "web");
    assert!(!exists(&lab, "pt-web"));
    assert_eq!(make(&lab, "web", 1).name, "pt-web");
}

#[test]
#[ignore = "needs root"]
fn a_vm_that_comes_back_has_its_tap_again_with_the_filter_of_now() {
    let lab = Lab::new();
    let daemon = lab.start(&[]);
    make(&lab, "web", 1);
    let index = lab.index("pt-web");
    for (id, alone) in [(1, false), (2, true), (100, false), (1, false)] {
        remove(&lab, "web");
        let body = format!(r#"{{"vm":"web","id":{id},"isolated":{alone}}}"#);
        let tap: Tap = lab.json("POST", "/v1/taps", &body);
        assert_eq!((tap.id, tap.isolated, tap.mac), (id, alone, Mac::of_id(id)));
        let shown = lab.host("ip -d -o link show pt-web");
        assert!(shown.contains(&format!("alias puter:web:{id}:{}", u8::from(alone))), "{shown}");
        assert!(shown.contains(if alone { "isolated on" } else { "isolated off" }), "{shown}");
        let (rules, tables) = filter(&lab, "pt-web");
        assert!(rules.contains(&format!("ether saddr != {} drop", Mac::of_id(id))), "{rules}");
        assert_eq!(tables, 1, "{id}");
    }
    // On a very busy host it may have gone meanwhile: then it is a new one, as good as the old.
    println!("the TAP was {index} and is {}", lab.index("pt-web"));
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert_eq!((lab.json::<Vec<Tap>>("GET", "/v1/taps", "").len(), filter(&lab, "pt-web").1), (1, 1));
    drop(daemon);
}

#[test]
#[ignore = "needs root"]
fn one_that_somebody_opened_meanwhile_is_made_anew() {
    let lab = Lab::new();
    let daemon = lab.start(&[]);
    make(&lab, "web", 1);
    // As it is between the answer and the end.
    lab.host("ip link set dev pt-web alias removed:puter:web:1:0");
    assert_eq!(lab.json::<Vec<Tap>>("GET", "/v1/taps", ""), []);
    let index = lab.index("pt-web");
    let mut owner = hold_tap(&lab, UID, "pt-web");
    wait("the owner opens it", || lab.host("ip link show pt-web").contains("LOWER_UP"));
    assert_eq!(make(&lab, "web", 1).id, 1);
    assert_ne!(lab.index("pt-web"), index);
    assert!(!attached(&lab, "web"), "whoever held the old one does not have the new one");
    owner.0.kill().unwrap();
    // What the marks say of other users' TAPs and of names that do not fit is nothing.
    lab.host("ip tuntap add pt-b mode tap user 1; ip link set pt-b alias removed:puter:b:2:0");
    lab.host("ip tuntap add pt-c mode tap user 64123; ip link set pt-c alias removed:puter:d:3:0");
    daemon.stop(Signal::TERM);
    let _daemon = lab.start(&[]);
    assert!(exists(&lab, "pt-b") && exists(&lab, "pt-c"));
}

#[test]
#[ignore = "needs root"]
fn what_a_killed_run_had_no_time_to_remove_goes_with_the_next_start() {
    let lab = Lab::new();
    let few = ["--bridge-ports", "4"];
    let daemon = lab.start(&few);
    let all = lab.host("ip -o link | wc -l");
    daemon.stop(Signal::TERM);
    let mut command = lab.puterd();
    command.args(few).env("PUTER_FAIL_POINT", "daemon.taps.leaving");
    let mut daemon = crate::Daemon::start(&mut command);
    // The third is on a further bridge.
    (1..=3).for_each(|n| drop(make(&lab, &format!("t{n}"), n)));
    assert!(exists(&lab, "puter0-1"));
    (1..=3).for_each(|n| remove(&lab, &format!("t{n}")));
    daemon.ended();
    assert!(exists(&lab, "pt-t1") && exists(&lab, "pt-t3"), "or the test proves nothing");
    let daemon = lab.start(&few);
    assert_eq!(lab.host("ip -o link | wc -l"), all);
    assert!(!daemon.log.contains("adopted"), "{}", daemon.log);
    assert_eq!(filter(&lab, "pt-t1").1 + filter(&lab, "pt-t3").1, 0);
}

#[test]
#[ignore = "needs root"]
fn one_that_is_about_to_go_makes_room_on_a_full_bridge() {
    let lab = Lab::new();
    let _daemon = lab.start(&["--bridge-ports", "4"]);
    (1..=2).for_each(|n| drop(make(&lab, &format!("t{n}"), n)));
    for n in 3..=9 {
        remove(&lab, &format!("t{}", n - 1));
        make(&lab, &format!("t{n}"), n);
        assert!(!exists(&lab, "puter0-1"), "{n}");
    }
}
