//! Clusters: named groups of VMs as one thing. A cluster is a record of its roles in the home; its members are VMs like
//! any other, which know their place in it, and the members that there are follow from the record.

mod apply;
mod delete;
mod file;
mod first_boot;
mod inventory;
mod model;
mod plan;
mod run;
mod snapshot;
mod store;
mod wait;

pub use apply::{Applied, apply, check_plan, compare};
pub use delete::{delete, scale};
pub use file::{parse, read};
pub use inventory::{Format, inventory};
pub use model::{Cluster, MOST_MEMBERS, Member, Role, SCHEMA, Target};
pub use plan::{Action, Change, Plan, Planned, RoleChange, Takes};
pub use run::{Began, Outputs, create, exec, start, stop};
pub use snapshot::{Cut, CutName, TakenCut, clone, cuts, delete_cut, restore, snapshot};
use store::whole;
pub use store::{All, existing, load_all, machine};
pub use wait::{Sign, wait};

use anyhow::{Result, anyhow};

use super::lifecycle::Observer;
use super::parallel::side_by_side;
use super::{Hint, cancel};

/// Members that are started or stopped at the same time: each takes a processor of the host for a while.
const AT_ONCE: usize = 16;
/// Members that are asked something at the same time.
const ASKED_AT_ONCE: usize = 64;

/// What came of one member.
#[derive(Debug)]
pub struct Outcome<T> {
    pub member: Member,
    pub result: Result<T>,
}

/// Tells that these are worked on together.
fn announce(observer: &dyn Observer, members: &[Member]) {
    let rows: Vec<(&str, &str)> = members.iter().map(|one| (one.vm.as_str(), one.member.as_str())).collect();
    observer.together(&rows);
}

/// Does `work` for each member, so many at the same time, and tells each result as it comes.
fn for_each<T: Send>(
    observer: &dyn Observer,
    members: &[Member],
    most: usize,
    work: impl Fn(&Member) -> Result<T> + Sync,
    tell: &(dyn Fn(&Member, &Result<T>) + Sync),
) -> Vec<Outcome<T>> {
    announce(observer, members);
    let results = side_by_side(members, most, |member| {
        let result = cancel::check().map_err(anyhow::Error::from).and_then(|()| work(member));
        observer.ended(&member.vm, result.as_ref().err());
        tell(member, &result);
        result
    });
    let outcomes = members.iter().cloned().zip(results);
    outcomes
        .map(|(member, result)| Outcome {
            member,
            result: result.unwrap_or_else(|| Err(anyhow!("the thread of a member panicked"))),
        })
        .collect()
}

/// An error with its way out.
fn wrong(what: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Err::<(), _>(anyhow!(what.into())).hint(hint).expect_err("it is an error")
}
