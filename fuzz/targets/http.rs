//! Bytes on puterd's socket, over a real pair of them.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use puter::daemon::api::{ApiError, Backend};
use puter::daemon::server;
use puter::protocol::address::{Mac, Subnet, check_vm_name, tap_name};
use puter::protocol::daemon::{Lease, Status, Tap, TapRequest};

/// Has every TAP that it is asked for.
struct All;

impl Backend for All {
    fn ensure(&self, request: &TapRequest) -> Result<Tap, ApiError> {
        check_vm_name(&request.vm).expect("a name that was not checked");
        assert!(request.id > 0);
        let ip = Subnet::default().address(request.id).ok_or_else(|| ApiError::new(507, "subnet_full", "full"))?;
        let (name, mac) = (tap_name(&request.vm), Mac::of_id(request.id));
        Ok(Tap {
            vm: request.vm.clone(),
            id: request.id,
            name,
            mac,
            ip,
            ip6: None,
            isolated: request.isolated,
            attached: false,
        })
    }

    fn list(&self) -> Result<Vec<Tap>, ApiError> {
        Ok(Vec::new())
    }

    fn remove(&self, vm: &str) -> Result<(), ApiError> {
        check_vm_name(vm).expect("a name that was not checked");
        Ok(())
    }

    fn status(&self) -> Result<Status, ApiError> {
        Err(ApiError::new(500, "internal", "none"))
    }

    fn leases(&self) -> Result<Vec<Lease>, ApiError> {
        Ok(Vec::new())
    }
}

pub fn run(input: &[u8]) {
    let (mut ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    // All of it fits the socket's buffer.
    ours.write_all(&input[..input.len().min(64 << 10)]).expect("room");
    ours.shutdown(Shutdown::Write).expect("a socket");
    let uid = server::own_uid();
    smol::block_on(server::connection(smol::Async::new(theirs).expect("a socket"), uid, Arc::new(All)));
    let mut answer = Vec::new();
    ours.read_to_end(&mut answer).expect("an answer");
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1."), "{}", answer.escape_ascii());
}
