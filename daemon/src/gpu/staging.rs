//! Copies from host memory to the device: packed into pinned buffers, or from where they are pinned already.
//!
//! Two buffers take turns: one is filled while the other is on its way, on a stream of its own, so that uploads and the
//! making of batches overlap. Copies to neighbouring places become one, and all are enqueued together. Whatever was
//! asked for is on its way after [`Staging::flush`], and there when [`Staging::sent`] has happened.
//!
//! A GPU makes copies one after another, whatever their streams: on an H100 one of 64 KiB waits 8.4 ms where 490 MB were
//! enqueued before it. What is to be there with something that comes this way comes this way too: [`Staging::follow`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::gpu::device::{Device, DeviceError, Event, Pinned, Progress, Span, StreamId, Upload};
use crate::gpu::tiers::TierCounters;

/// Bytes of one buffer: the bus is at its full speed from 8 MiB on. Less where less can be pinned.
const BUFFERS: [u64; 3] = [32 << 20, 4 << 20, 256 << 10];

/// Places in a buffer are what addresses on the device are, by this: blocks there begin at its multiples.
const ALIGN: u64 = 256;

/// Two buffers and the stream they are uploaded on.
#[derive(Debug)]
pub struct Staging {
    device: Arc<dyn Device>,
    stream: StreamId,
    buffers: Vec<Buffer>,
    /// Which of them is being filled.
    filling: usize,
    /// Copies of what is pinned elsewhere, not on their way yet.
    direct: Vec<Upload>,
    /// Behind all that is on its way, if something may be.
    sent: Option<Arc<Event>>,
    /// Before and behind uploads whose time is not counted yet.
    timed: VecDeque<(Event, Arc<Event>)>,
    counters: Arc<TierCounters>,
}

#[derive(Debug)]
struct Buffer {
    pinned: Box<dyn Pinned>,
    /// Behind the last upload from it.
    sent: Event,
    used: u64,
    /// What is packed and not on its way.
    pieces: Vec<Upload>,
}

impl Staging {
    pub fn new(device: &Arc<dyn Device>, stream: StreamId, counters: Arc<TierCounters>) -> Self {
        let (device, buffers, direct) = (Arc::clone(device), Vec::new(), Vec::new());
        let timed = VecDeque::new();
        Self { device, stream, buffers, filling: 0, direct, sent: None, timed, counters }
    }

    /// Packs `from` to be uploaded to `to`, which is as long.
    pub fn upload(&mut self, from: &[u8], to: &Span) -> Result<(), DeviceError> {
        let mut done = 0;
        while done < from.len() {
            let (at, room) = self.room(to.address().0 + done as u64)?;
            let take = (from.len() - done).min(usize::try_from(room).unwrap_or(usize::MAX));
            let buffer = &mut self.buffers[self.filling];
            buffer.pinned.write(at, &from[done..done + take]);
            let to = to.part(done as u64..(done + take) as u64);
            buffer.used = at + take as u64;
            buffer.pieces.push(Upload::new(&*buffer.pinned, at..buffer.used, &to));
            done += take;
        }
        Ok(())
    }

    /// Copies what is pinned already, and stays as it is until the copy is done.
    pub fn copy(&mut self, upload: Upload) {
        self.direct.push(upload);
    }

    /// Sends what was asked for on its way.
    pub fn flush(&mut self) -> Result<(), DeviceError> {
        let mut uploads = std::mem::take(&mut self.direct);
        let packed = self.buffers.get_mut(self.filling).map(|buffer| std::mem::take(&mut buffer.pieces));
        let (packed, from) = (packed.unwrap_or_default(), uploads.len());
        for piece in &packed {
            // A gap of less than a line is padding on both sides.
            match uploads[from..].last().and_then(|last| last.joined(piece, ALIGN)) {
                Some(joined) => *uploads.last_mut().expect("looked at just now") = joined,
                None => uploads.push(piece.clone()),
            }
        }
        if uploads.is_empty() {
            return Ok(());
        }
        let begin = Event::timed(&self.device)?;
        self.device.record(begin.id(), self.stream)?;
        self.device.upload_all(self.stream, &uploads)?;
        let bytes = uploads.iter().map(Upload::bytes).sum();
        self.counters.uploaded_bytes.fetch_add(bytes, Ordering::Relaxed);
        if !packed.is_empty() {
            self.device.record(self.buffers[self.filling].sent.id(), self.stream)?;
            self.filling = (self.filling + 1) % self.buffers.len();
        }
        let end = self.mark()?;
        self.timed.push_back((begin, end));
        Ok(())
    }

    /// What happens when all that was flushed is there; `None` where it is.
    pub fn sent(&mut self) -> Result<Option<Arc<Event>>, DeviceError> {
        if let Some(sent) = &self.sent
            && sent.query()? == Progress::Done
        {
            self.sent = None;
        }
        Ok(self.sent.clone())
    }

    /// Sends one more copy, behind all that was flushed. What happens when that and all before it is there.
    pub fn follow(&mut self, upload: Upload) -> Result<Arc<Event>, DeviceError> {
        let followed = self.device.upload_all(self.stream, &[upload]).and_then(|()| self.mark());
        if followed.is_err() {
            // It may be under way, and whoever asked for it takes it for not.
            self.device.finish(self.stream)?;
        }
        followed
    }

    /// Counts how long uploads took that are done. What came of them, whoever waits for them is told.
    pub fn count_time(&mut self) {
        while let Some((begin, end)) = self.timed.front() {
            let took = match end.query() {
                Ok(Progress::Pending) => return,
                Ok(Progress::Done) => end.since(begin),
                Err(error) => Err(error),
            };
            match took {
                Ok(took) => {
                    let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
                    self.counters.upload_ns.fetch_add(ns, Ordering::Relaxed);
                }
                Err(error) => tracing::debug!(%error, "the time of an upload is not known"),
            }
            self.timed.pop_front();
        }
    }

    /// Marks all that is on its way.
    fn mark(&mut self) -> Result<Arc<Event>, DeviceError> {
        let sent = Arc::new(Event::timed(&self.device)?);
        self.device.record(sent.id(), self.stream)?;
        self.sent = Some(Arc::clone(&sent));
        Ok(sent)
    }

    /// Forgets what is not on its way.
    pub fn discard(&mut self) {
        self.direct.clear();
        self.buffers.iter_mut().for_each(|buffer| buffer.pieces.clear());
    }

    /// Where the next bytes go, and how many fit there. Bytes for neighbouring lines of the device become neighbours.
    fn room(&mut self, address: u64) -> Result<(u64, u64), DeviceError> {
        while self.buffers.len() < 2 {
            let (pinned, sent) = (self.pin()?, Event::new(&self.device)?);
            self.buffers.push(Buffer { pinned, sent, used: 0, pieces: Vec::new() });
        }
        let whole = self.buffers[self.filling].pinned.bytes();
        if self.buffers[self.filling].used >= whole {
            self.flush()?;
        }
        let whole = self.buffers[self.filling].pinned.bytes();
        let buffer = &mut self.buffers[self.filling];
        if buffer.pieces.is_empty() {
            // What it held is on its way, or there.
            while buffer.sent.query()? == Progress::Pending {
                std::thread::sleep(Duration::from_micros(20));
            }
            buffer.used = 0;
        }
        let at = buffer.used + (address.wrapping_sub(buffer.used) % ALIGN);
        if at >= whole {
            buffer.used = whole;
            return self.room(address);
        }
        Ok((at, whole - at))
    }

    /// A buffer, as large as one can be had.
    fn pin(&self) -> Result<Box<dyn Pinned>, DeviceError> {
        let mut sizes = BUFFERS.into_iter().peekable();
        loop {
            let bytes = sizes.next().expect("there is a smallest size");
            match (self.device.pin(bytes), sizes.peek()) {
                (Err(error), Some(&smaller)) if !matches!(error, DeviceError::Lost { .. }) => {
                    tracing::warn!(bytes, smaller, %error, "uploads go through smaller buffers");
                }
                (pinned, _) => return pinned,
            }
        }
    }
}
