//! SIGTERM, SIGINT and SIGHUP, as something to poll.
//!
//! All threads of the daemon's leave them blocked, and the poll loop lets them in while it waits, so that no other call
//! is ever interrupted. They have handlers, and are not left to a signalfd, because a thread that is not ours may take
//! them: one that a profiler, a sanitizer or an agent started before `main`. There the default action would end the
//! daemon with all that its clients have not collected.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::poll::{PollFd, ppoll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

const TAKEN: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// From when it is made, these signals are what [`Signals::pending`] says, whichever thread they reach.
#[derive(Debug)]
pub(super) struct Signals {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
    /// What is blocked while the poll loop waits.
    waiting: SigSet,
}

impl Signals {
    /// Takes them, and blocks them in this thread and those that it starts from now on.
    pub(super) fn take() -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        let numbers = TAKEN.map(|signal| signal as i32);
        let delivery = SignalDelivery::with_pipe(read, write, SignalOnly, numbers)?;
        let mut waiting = SigSet::from_iter(TAKEN).thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        // Whoever started the daemon may have had them blocked.
        TAKEN.into_iter().for_each(|signal| waiting.remove(signal));
        Ok(Self { delivery, waiting })
    }

    /// Polls as `poll` does; a signal meanwhile interrupts it.
    pub(super) fn poll(&self, fds: &mut [PollFd<'_>], limit: Duration) -> nix::Result<()> {
        match ppoll(fds, Some(limit.into()), Some(self.waiting)) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Which came since this was last asked.
    pub(super) fn pending(&mut self) -> Vec<Signal> {
        self.delivery.pending().filter_map(|number| Signal::try_from(number).ok()).collect()
    }
}

impl AsFd for Signals {
    /// Readable when there are some.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.delivery.get_read().as_fd()
    }
}
