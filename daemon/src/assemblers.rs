//! The threads that fill slots, shared by all loaders, and the bounded queue before them.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender, bounded};
use robocache_wire::batch::BatchHeader;
use robocache_wire::producer::Filling;
use robocache_wire::ring::Published;

use crate::assemble::{Sample, assemble};
use crate::loader::Loader;

/// One batch to be put into one slot.
#[derive(Debug)]
pub struct Job {
    pub loader: Arc<Loader>,
    pub header: BatchHeader,
    pub samples: Vec<Sample>,
    pub filling: Filling,
}

/// The assembler threads of a daemon.
#[derive(Debug)]
pub struct Assemblers {
    queue: Sender<Job>,
    threads: Vec<JoinHandle<()>>,
}

impl Assemblers {
    /// Starts `count` threads.
    pub fn start(count: usize) -> std::io::Result<Self> {
        // Deep enough that a thread finds its next batch when it is done with one; a loader that is ahead waits.
        let (queue, jobs) = bounded::<Job>(2 * count);
        let start = |number: usize| {
            let jobs = jobs.clone();
            std::thread::Builder::new().name(format!("assemble-{number}")).spawn(move || work(&jobs))
        };
        let threads = (0..count).map(start).collect::<Result<_, _>>()?;
        Ok(Self { queue, threads })
    }

    /// Queues a batch; waits while the queue is full.
    pub fn submit(&self, job: Job) {
        self.queue.send(job).expect("the threads outlive the loaders");
    }

    /// Finishes what is queued and ends the threads.
    pub fn finish(self) {
        drop(self.queue);
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("an assembler thread panicked outside a batch; this is a bug");
            }
        }
    }
}

fn work(jobs: &Receiver<Job>) {
    for Job { loader, mut header, samples, mut filling } in jobs {
        let started = Instant::now();
        let filled = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let slot = filling.bytes_mut();
            assemble(&loader.plan, loader.dataset.dataset(), &samples, slot);
        }));
        match filled {
            Ok(()) => {
                let elapsed = started.elapsed();
                header.assemble_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
                let ids: Vec<u64> = samples.iter().map(|sample| sample.anchor).collect();
                filling.set_ids(&ids);
                match filling.publish(&header) {
                    Published::Ready | Published::Stale => {}
                    Published::Scribbled => {
                        let client = loader.producer.shape().client;
                        tracing::warn!(
                            client,
                            seq = header.seq,
                            "a client wrote over a slot word; its ring loses the slot"
                        );
                    }
                }
                loader.metrics.published(u64::from(header.rows), elapsed);
            }
            Err(_panic) => {
                drop(filling);
                tracing::error!(
                    client = loader.producer.shape().client,
                    seq = header.seq,
                    "assembling a batch panicked; this is a bug"
                );
                loader
                    .fail(header.seq, "assembling the batch panicked: a bug in robocached, please report it");
            }
        }
        drop(samples);
        loader.landed();
    }
}
