//! `puter image`, a file for each of its commands.

mod delete;
mod inspect;
mod list;
mod prune;
mod pull;

use anyhow::{Result, anyhow};
use argh::{ArgsInfo, FromArgs};

use super::{misused, show_error};
use crate::vm::cancel;
use crate::vm::snapshots::User;

/// List, pull, examine and remove the images that VMs are made of.
///
/// An image is named as docker does it ([REGISTRY/]NAME[:TAG][@DIGEST]), as oci:DIR[:TAG] or docker-archive:FILE[:TAG];
/// one that is here also by its digest, or as much of that as no other has.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "image")]
pub struct Image {
    #[argh(subcommand)]
    command: Command,
}

#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand)]
enum Command {
    List(list::List),
    Pull(pull::Pull),
    Inspect(inspect::Inspect),
    Delete(delete::Delete),
    Prune(prune::Prune),
}

impl Image {
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::List(command) => command.run(),
            Command::Pull(command) => command.run(),
            Command::Inspect(command) => command.run(),
            Command::Delete(command) => command.run(),
            Command::Prune(command) => command.run(),
        }
    }
}

/// Does `work` for each image, one after the other. All are tried; the errors are told one by one.
fn each<T>(images: &[String], mut work: impl FnMut(&str) -> Result<T>) -> Result<(Vec<T>, usize)> {
    match images {
        [] => {
            return Err(misused("no image is named", "`puter image list` shows the images"));
        }
        [one] => return work(one).map(|done| (vec![done], 0)),
        _ => {}
    }
    let (mut done, mut failed) = (Vec::new(), 0);
    for image in images {
        match work(image) {
            Ok(value) => done.push(value),
            Err(error) => {
                cancel::check()?;
                show_error(&error);
                failed += 1;
            }
        }
    }
    Ok((done, failed))
}

/// What the command ends with when some of its images failed.
fn verdict(images: &[String], failed: usize) -> Result<()> {
    match failed {
        0 => Ok(()),
        _ => Err(anyhow!("{failed} of {} failed", images.len())),
    }
}

/// Who needs an image, in a table's cell.
fn shown_users(users: &[User]) -> String {
    match users {
        [] => "-".into(),
        _ => users.iter().map(User::name).collect::<Vec<_>>().join(" "),
    }
}
