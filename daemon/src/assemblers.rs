//! The threads that fill slots, shared by all loaders, and the bounded queue before them.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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

impl Job {
    /// Hands a filled slot to the client; making it took `elapsed`.
    pub fn publish(self, elapsed: Duration) {
        let Self { loader, mut header, samples, filling } = self;
        header.assemble_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        match filling.publish(&header) {
            Published::Ready | Published::Stale => {}
            Published::Scribbled => {
                let (client, seq) = (loader.producer.shape().client, header.seq);
                tracing::warn!(client, seq, "a client wrote over a slot word; its ring loses the slot");
            }
        }
        loader.metrics.published(u64::from(header.rows), elapsed);
        drop(samples);
        loader.landed();
    }

    /// Gives the slot back: the batch cannot be made.
    pub fn fail(self, message: &str) {
        let Self { loader, header, samples, filling } = self;
        drop(filling); // abandoned
        loader.fail(header.seq, message);
        drop(samples);
        loader.landed();
    }
}

fn work(jobs: &Receiver<Job>) {
    for mut job in jobs {
        let started = Instant::now();
        let filled = std::panic::catch_unwind(AssertUnwindSafe(|| {
            assemble(&job.loader.plan, job.loader.dataset.dataset(), &job.samples, job.filling.bytes_mut());
            job.filling.set_ids(job.samples.iter().map(|sample| sample.anchor));
        }));
        match filled {
            Ok(()) => job.publish(started.elapsed()),
            Err(_panic) => {
                let (client, seq) = (job.loader.producer.shape().client, job.header.seq);
                tracing::error!(client, seq, "assembling a batch panicked; this is a bug");
                job.fail("assembling the batch panicked: a bug in robocached, please report it");
            }
        }
    }
}
