//! Snapshots and machines as a tree: which came from which.

use std::collections::BTreeMap;

use super::{Snapshot, Vm};
use crate::vm::state::Origin;

/// What is drawn.
#[derive(Clone, Copy, Debug)]
pub enum Leaf<'a> {
    Snapshot(&'a Snapshot),
    Machine(&'a Vm),
}

/// Each leaf with the lines that lead to it, from the roots on. What came from a snapshot that is gone is a root.
pub fn lines<'a>(snapshots: &'a [Snapshot], machines: &'a [Vm]) -> Vec<(String, Leaf<'a>)> {
    let known = |origin: &&Origin| snapshots.iter().any(|snapshot| snapshot.origin == **origin);
    let mut children: BTreeMap<Option<&Origin>, Vec<Leaf>> = BTreeMap::new();
    for snapshot in snapshots {
        let parent = snapshot.parent.as_ref().filter(known).filter(|parent| **parent != snapshot.origin);
        children.entry(parent).or_default().push(Leaf::Snapshot(snapshot));
    }
    for machine in machines {
        children.entry(machine.head.as_ref().filter(known)).or_default().push(Leaf::Machine(machine));
    }
    let mut lines = Vec::new();
    grow(&mut children, None, "", &mut lines);
    lines
}

/// Takes the children out of the map: a circle, which only a damaged file can make, is never walked twice.
fn grow<'a>(
    children: &mut BTreeMap<Option<&'a Origin>, Vec<Leaf<'a>>>,
    of: Option<&'a Origin>,
    before: &str,
    lines: &mut Vec<(String, Leaf<'a>)>,
) {
    let all = children.remove(&of).unwrap_or_default();
    let count = all.len();
    for (index, leaf) in all.into_iter().enumerate() {
        let last = index + 1 == count;
        let (branch, below) = match (of, last) {
            (None, _) => ("", ""),
            (_, true) => ("└─ ", "   "),
            (_, false) => ("├─ ", "│  "),
        };
        lines.push((format!("{before}{branch}"), leaf));
        if let Leaf::Snapshot(snapshot) = leaf {
            grow(children, Some(&snapshot.origin), &format!("{before}{below}"), lines);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::state::tests::sample;

    #[test]
    fn each_is_below_what_it_came_from() {
        let origin = |vm: &str, id: &str| Origin { vm: vm.into(), id: id.into() };
        let snapshot = |vm: &str, id: &str, parent: Option<Origin>| Snapshot {
            schema: super::super::SCHEMA,
            origin: origin(vm, id),
            name: None,
            created: 0,
            automatic: false,
            maker: None,
            machine: sample(vm, 1),
            memory: None,
            paused: None,
            shared: 0,
            parent,
            files: BTreeMap::new(),
        };
        let machine = |name: &str, head: Option<Origin>| Vm { head, ..sample(name, 1) };
        let snapshots = [
            snapshot("web", "1", Some(origin("gone", "0"))),
            snapshot("web", "2", Some(origin("web", "1"))),
            snapshot("new", "3", Some(origin("web", "1"))),
            snapshot("circle", "4", Some(origin("circle", "4"))),
        ];
        let machines = [
            machine("web", Some(origin("web", "2"))),
            machine("new", Some(origin("new", "3"))),
            machine("alone", None),
        ];
        let drawn: Vec<String> = lines(&snapshots, &machines)
            .into_iter()
            .map(|(line, leaf)| match leaf {
                Leaf::Snapshot(snapshot) => format!("{line}{}", snapshot.origin),
                Leaf::Machine(vm) => format!("{line}{}", vm.name),
            })
            .collect();
        assert_eq!(drawn, ["web@1", "├─ web@2", "│  └─ web", "└─ new@3", "   └─ new", "circle@4", "alone"]);
    }
}
