//! Hostile bytes against what reads them. The variable PUTER_FUZZ_TARGET names the target that runs.

#![no_main]

mod agent;
mod archive;
mod auth;
mod dhcp;
mod diff;
mod disk;
mod dns;
mod guest;
mod http;
mod hypervisor;
mod layers;
mod manifest;
mod netlink;
mod records;
mod reference;
mod scratch;
mod settings;
mod solicitation;
mod transfer;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var("PUTER_FUZZ_TARGET").unwrap_or_default();
    match name.as_str() {
        "agent" => agent::run,
        "archive" => archive::run,
        "auth" => auth::run,
        "dhcp" => dhcp::run,
        "diff" => diff::run,
        "disk" => disk::run,
        "dns" => dns::run,
        "guest" => guest::run,
        "http" => http::run,
        "hypervisor" => hypervisor::run,
        "layers" => layers::run,
        "manifest" => manifest::run,
        "netlink" => netlink::run,
        "records" => records::run,
        "reference" => reference::run,
        "settings" => settings::run,
        "solicitation" => solicitation::run,
        "transfer" => transfer::run,
        _ => panic!("there is no target '{name}': PUTER_FUZZ_TARGET must name one"),
    }
});

fuzz_target!(|input: &[u8]| TARGET(input));

/// Pieces of an input, each `length (two bytes), bytes`.
fn pieces(mut input: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (length, rest) = input.split_first_chunk::<2>()?;
        let (piece, rest) = rest.split_at(usize::from(u16::from_be_bytes(*length)).min(rest.len()));
        input = rest;
        Some(piece)
    })
}

/// Checks that an error is a text that no terminal minds, once it is printed.
fn readable(error: &anyhow::Error) {
    let text = puter::vm::files::plain(&format!("{error:#}"));
    assert!(!text.is_empty() && text.chars().count() < 8000, "{} bytes", text.len());
    assert!(!text.contains(|c: char| c.is_control() && !"\n\t".contains(c)), "{}", text.escape_debug());
}
