//! `puter-agent pack` and `unpack`: the guest's end of `puter cp`, which the host starts by `exec`.

use std::path::PathBuf;

use anyhow::Result;
use argh::FromArgs;

use crate::transfer::{Target, pack, unpack};

/// The guest's end of `puter cp`.
#[derive(FromArgs, Debug)]
pub struct Transfer {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs, Debug)]
#[argh(subcommand)]
enum Command {
    Pack(Pack),
    Unpack(Unpack),
}

/// Write a file or tree to standard output.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "pack")]
struct Pack {
    /// what links lead to, in place of the links
    #[argh(switch)]
    follow: bool,
    /// file or directory
    #[argh(positional)]
    path: PathBuf,
}

/// Take a file or tree from standard input.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "unpack")]
struct Unpack {
    /// the source's own name
    #[argh(option)]
    name: String,
    /// the source's contents go into the directory
    #[argh(switch)]
    contents: bool,
    /// the destination must be a directory
    #[argh(switch)]
    directory: bool,
    /// where it goes
    #[argh(positional)]
    path: PathBuf,
}

impl Transfer {
    /// # Errors
    /// When a file cannot be read or written, or the stream is not whole.
    pub fn run(self) -> Result<()> {
        let mut note = |text: String| eprintln!("{text}");
        match self.command {
            Command::Pack(Pack { follow, path }) => {
                pack(&path, follow, std::io::BufWriter::with_capacity(128 << 10, std::io::stdout()), &mut note)?;
            }
            Command::Unpack(Unpack { name, contents, directory, path }) => {
                let target = Target { path, name: name.into_bytes(), contents, directory };
                unpack(std::io::BufReader::with_capacity(128 << 10, std::io::stdin()), &target, &mut note)?;
            }
        }
        Ok(())
    }
}
