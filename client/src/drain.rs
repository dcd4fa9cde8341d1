//! Batches whose readers nobody named: given back once the device has done all that it was given before.
//!
//! For libraries with streams of their own that they tell nobody (JAX). One thread a ring waits for the whole device, and so
//! for more than the batch needs, but nobody else waits for it. It ends with its sender; what cannot be waited for by then
//! is forfeited.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use robocache_wire::consumer::Lease;

use crate::gpu::{DeviceRing, Recorded};

/// How long until a device that cannot be waited for, since something is being captured, is tried again.
const AGAIN: Duration = Duration::from_millis(1);

#[derive(Debug)]
pub(crate) struct Drain {
    leases: SyncSender<Lease>,
    thread: JoinHandle<Forfeited>,
}

/// Whether leases were given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forfeited {
    None,
    Some,
}

impl Drain {
    /// `slots` bounds the queue: each slot is leased once at a time.
    pub(crate) fn start(device: &Arc<dyn DeviceRing>, slots: usize) -> std::io::Result<Self> {
        let (leases, received) = sync_channel(slots);
        let device = Arc::clone(device);
        let thread = std::thread::Builder::new().name("robocache-drain".to_owned());
        let thread = thread.spawn(move || drain(&*device, &received))?;
        Ok(Self { leases, thread })
    }

    pub(crate) fn put(&self, lease: Lease) {
        if let Err(unsent) = self.leases.send(lease) {
            // The thread ends with this sender, or by a panic: nobody would wait.
            unsent.0.forfeit();
        }
    }

    /// Waits for what was put.
    pub(crate) fn end(self) -> Forfeited {
        let Self { leases, thread } = self;
        drop(leases);
        thread.join().unwrap_or(Forfeited::Some)
    }
}

fn drain(device: &dyn DeviceRing, received: &Receiver<Lease>) -> Forfeited {
    let mut forfeited = Forfeited::None;
    while let Ok(first) = received.recv() {
        let mut leases = vec![first];
        loop {
            // Those that came meanwhile may have work behind what was waited for.
            leases.extend(received.try_iter());
            let more = match device.finish() {
                Recorded::Done => break,
                Recorded::NotNow => received.recv_timeout(AGAIN),
                Recorded::Lost => Err(RecvTimeoutError::Disconnected),
            };
            match more {
                Ok(lease) => leases.push(lease),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    forfeited = Forfeited::Some;
                    leases.drain(..).for_each(Lease::forfeit);
                    break;
                }
            }
        }
    }
    forfeited
}
