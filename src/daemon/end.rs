//! Servers on the bridge end with it: their sockets are bound to an interface that is no more.

use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use smol::channel::{Receiver, RecvError, Sender, unbounded};

/// Who serves on the bridge, and who starts them anew.
pub(super) struct End {
    /// Dropping these ends the servers.
    serving: Mutex<Vec<Sender<()>>>,
    sender: Sender<()>,
    receiver: Receiver<()>,
}

impl Default for End {
    fn default() -> End {
        let (sender, receiver) = unbounded();
        End { serving: Mutex::default(), sender, receiver }
    }
}

/// What a server waits for besides its work.
pub(super) struct Waiter(Receiver<()>);

impl Waiter {
    /// Returns when the bridge is no more the one that the server was made for.
    pub(super) async fn wait(self) {
        let _ = self.0.recv().await;
    }

    /// The same, as a server's success.
    pub(super) async fn map_ok(self) -> Result<()> {
        self.wait().await;
        Ok(())
    }
}

impl End {
    /// For one more server.
    pub(super) fn add(&self) -> Waiter {
        let (sender, receiver) = unbounded();
        self.serving.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        Waiter(receiver)
    }

    /// Ends all servers, and has them started again.
    pub(super) fn renew(&self) {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let _ = self.sender.try_send(());
    }

    /// Waits until all servers were ended.
    pub(super) fn remade(&self) -> Result<(), RecvError> {
        self.receiver.recv_blocking()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_servers_end_when_the_bridge_is_made_anew_and_later_ones_do_not() {
        let end = End::default();
        let (one, other) = (end.add(), end.add());
        end.renew();
        end.remade().unwrap();
        smol::block_on(one.wait());
        smol::block_on(other.map_ok()).unwrap();
        let later = end.add();
        assert!(later.0.try_recv().is_err_and(|error| error.is_empty()), "it goes on");
    }
}
