//! That a snapshot of a whole cluster is one consistent cut: members pass a number round in a ring, and no state that was
//! kept has a number received that was not sent.

#[path = "e2e/host.rs"]
mod host;

use std::hash::{BuildHasher, RandomState};
use std::thread::sleep;
use std::time::Duration;

use host::Host;

const LIMIT: Duration = Duration::from_secs(120);
const MEMBERS: u64 = 3;

/// What each member runs: it takes a number from the one before, adds one and hands it on to the next, and writes down
/// what it received before it goes on and what it sends before it does so, in memory and synced on its disk. There is one
/// number in the ring, so that whoever is cut a moment later than another has received what that one has not sent.
const RING: &str = r#"
mkdir -p /ring && cd /run && mkfifo idle in out && exec 3<>idle 4<>in 5<>out || exit 1
note() {
    echo "$2" >>/run/$1
    echo "$2" | dd of=/ring/$1 oflag=append conv=notrunc,fsync 2>/dev/null
}
nc -l -p 7000 <&3 >&4 &
until nc "$1" 7000 <&5; do sleep 1; done &
[ "$2" = first ] && note sent 0 && echo 0 >&5
while read -r number <&4; do
    note received $number
    number=$((number + 1))
    note sent $number
    echo $number >&5
done
"#;

/// What a member has written down.
#[derive(Debug, Default, PartialEq, Eq)]
struct Notes {
    received: Vec<u64>,
    sent: Vec<u64>,
}

fn start(host: &Host, cluster: &str) {
    let background = "/bin/busybox setsid /bin/sh -c \"$0\" ring \"$1\" \"$2\" </dev/null >/dev/null 2>&1 &";
    for member in 1..=MEMBERS {
        let next = format!("node{}", member % MEMBERS + 1);
        let first = if member == 1 { "first" } else { "" };
        host.ok(&["exec", &format!("{cluster}-node{member}"), "--", "sh", "-c", background, RING, &next, first]);
    }
}

/// What the members have written down in this directory.
fn notes(host: &Host, cluster: &str, directory: &str) -> Vec<Notes> {
    let read = |member, what| -> Vec<u64> {
        let path = format!("{directory}/{what}");
        let said = host.ok(&["exec", &format!("{cluster}-node{member}"), "--", "/bin/busybox", "cat", &path]);
        said.lines().map(|line| line.parse().unwrap_or_else(|_| panic!("node{member} noted '{line}'"))).collect()
    };
    (1..=MEMBERS).map(|member| Notes { received: read(member, "received"), sent: read(member, "sent") }).collect()
}

/// Checks that each number went its way once and none was skipped.
fn in_order(all: &[Notes]) {
    for (member, notes) in (0..).zip(all) {
        let wanted = |from: u64, list: &[u64]| (from..).step_by(3).take(list.len()).collect::<Vec<_>>();
        let before = (member + MEMBERS - 1) % MEMBERS;
        assert_eq!(notes.received, wanted(before, &notes.received), "received by node{}", member + 1);
        assert_eq!(notes.sent, wanted(member, &notes.sent), "sent by node{}", member + 1);
    }
}

/// Checks that nobody has received what the one before has not sent.
fn consistent(what: &str, all: &[Notes]) {
    in_order(all);
    for (member, notes) in all.iter().enumerate() {
        let sender = &all[(member + all.len() - 1) % all.len()];
        let (received, sent) = (notes.received.len(), sender.sent.len());
        assert!(received > 0, "{what}: nothing had begun");
        assert!(received <= sent, "{what}: node{} received {received} numbers of {sent}", member + 1);
    }
}

fn received(host: &Host, cluster: &str) -> usize {
    let said = host.ok(&["exec", &format!("{cluster}-node1"), "--", "/bin/busybox", "wc", "-l", "/run/received"]);
    said.split_whitespace().next().and_then(|count| count.parse().ok()).unwrap()
}

/// Waits until the number has come round some times more.
fn until_goes_on(host: &Host, cluster: &str) {
    let before = received(host, cluster);
    host.until(LIMIT, || received(host, cluster) > before + 5);
}

#[test]
#[ignore = "needs root"]
fn no_kept_state_of_a_cluster_has_received_what_was_not_sent() {
    let host = Host::new();
    host.ready();
    host.ok(&["cluster", "create", "red", "--count", "3", "--memory", "128M"]);
    start(&host, "red");
    host.until(LIMIT, || {
        let there = host.world.puter(&["exec", "red-node1", "--", "/bin/busybox", "test", "-s", "/run/received"]);
        there.unwrap().status.success()
    });
    for round in 1..=4 {
        until_goes_on(&host, "red");
        let moment = Duration::from_millis(RandomState::new().hash_one(round) % 500);
        sleep(moment);
        let cut = format!("cut{round}");
        let taken = host.json(&["cluster", "snapshot", "red", "--name", &cut, "--json"]);
        println!(
            "{cut} after {moment:?}: paused for {} s, {} s from first to last",
            taken["paused"], taken["pause_spread"]
        );
        // In a clone the connections are dead, so that the notes are those of the cut.
        host.ok(&["cluster", "clone", &format!("red@{cut}"), "blue"]);
        consistent(&format!("{cut}, memory"), &notes(&host, "blue", "/run"));
        consistent(&format!("{cut}, disk"), &notes(&host, "blue", "/ring"));
        // All stood still before the first went on.
        assert!(taken["pause_spread"].as_f64().unwrap() <= taken["paused"].as_f64().unwrap(), "{taken}");
        host.ok(&["cluster", "delete", "--force", "blue"]);
    }
    // The disks alone: what a loss of power at that instant would have left.
    host.ok(&["cluster", "clone", "--disk-only", "red@cut4", "blue"]);
    host.ok(&["cluster", "start", "blue"]);
    consistent("cut4, disk alone", &notes(&host, "blue", "/ring"));
    host.ok(&["cluster", "delete", "--force", "blue"]);
    // Restored, the members go on where they were: what was on its way arrives, once.
    until_goes_on(&host, "red");
    host.ok(&["cluster", "restore", "--force", "red@cut2"]);
    until_goes_on(&host, "red");
    in_order(&notes(&host, "red", "/run"));
    in_order(&notes(&host, "red", "/ring"));
    host.ok(&["cluster", "delete", "--force", "--snapshots", "red"]);
    assert_eq!(host.leftovers(), Vec::<String>::new());
}
