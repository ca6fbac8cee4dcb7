//! Lines of the host to an agent, one after the other: requests, and what is typed into a program that runs. What asks
//! to configure is done to a directory; no program is ever run.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use puter::agent::configure::configure;
use puter::agent::files::Guest;
use puter::agent::request::{self, Typed};
use puter::protocol::agent::{
    BAD_REQUEST, Call, Configure, Input, Request, UNKNOWN_METHOD, UNSUPPORTED_VERSION, VERSION,
};

use crate::scratch;

pub fn run(input: &[u8]) {
    for line in input.split_inclusive(|&byte| byte == b'\n') {
        match request::read(line) {
            Ok((id, call)) => {
                let again = Request { id, version: VERSION, call: call.clone() };
                let text = serde_json::to_vec(&again).expect("a request");
                assert_eq!(request::read(&text), Ok((id, call.clone())));
                if let Call::Configure(wanted) = call {
                    configured(&wanted);
                }
            }
            Err(refused) => {
                assert!(refused.result.is_none());
                let error = refused.error.as_ref().expect("a reason");
                assert!([BAD_REQUEST, UNKNOWN_METHOD, UNSUPPORTED_VERSION].contains(&error.code.as_str()));
                let text = serde_json::to_vec(&refused).expect("an answer");
                assert_eq!(serde_json::from_slice(&text).ok(), Some(*refused));
            }
        }
        if let Some(typed) = request::typed(line) {
            let again = match &typed {
                Typed::Bytes(bytes) => Input::Stdin(STANDARD.encode(bytes)),
                Typed::End => Input::StdinEnd,
                Typed::Resize(window) => Input::Resize(*window),
            };
            assert_eq!(request::typed(&serde_json::to_vec(&again).expect("a line")), Some(typed));
        }
    }
}

/// What has worked once changes nothing the second time, and nothing is written elsewhere.
fn configured(wanted: &Configure) {
    let top = scratch::empty();
    let guest = Guest::at(&top.join("guest"));
    guest.write("/etc/passwd", b"root:x:0:0::/root:/bin/sh\nann:x:1:1::/home/ann:/bin/sh\n", 0o644).expect("a file");
    for directory in ["/root", "/home/ann", "/usr/sbin"] {
        std::fs::create_dir_all(guest.path(directory)).expect("a directory");
    }
    std::fs::write(guest.path("/usr/sbin/netplan"), "").expect("a file");
    let done = configure(&guest, wanted);
    let after = scratch::listing(&top);
    let beside = std::fs::read_dir(&top).expect("a directory").count();
    assert_eq!(beside, 1, "something is beside the guest's own root");
    if let Ok(done) = done {
        assert_eq!(done.hostname, wanted.hostname);
        let mut again = configure(&guest, wanted).expect("the same again");
        again.warnings.clone_from(&done.warnings);
        assert_eq!(again, done);
        let mut now = scratch::listing(&top);
        // It counts restores.
        let generation = guest.path("/run/puter/generation");
        assert_eq!(now.remove(&generation).is_some(), after.contains_key(&generation));
        assert_eq!(now.len() + usize::from(after.contains_key(&generation)), after.len());
        assert!(now.iter().all(|(path, file)| after.get(path) == Some(file)));
    }
}
