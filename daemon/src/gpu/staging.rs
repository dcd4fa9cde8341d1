//! Copies from host memory to the device: packed into pinned buffers, uploaded in pieces as large as they come.
//!
//! Two buffers take turns: one is filled while the other is on its way, on a stream of its own, so that uploads and the
//! making of batches overlap. Copies to neighbouring places become one. Whatever is packed is on its way after
//! [`Staging::flush`], and done for a stream after [`Staging::wait`].

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::gpu::device::{Device, DeviceError, Event, Pinned, Progress, Span, StreamId};
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
    counters: Arc<TierCounters>,
}

#[derive(Debug)]
struct Buffer {
    pinned: Box<dyn Pinned>,
    /// Behind the last upload from it.
    sent: Event,
    used: u64,
    /// What is packed and not uploaded: where it starts in the buffer, and where it goes.
    pieces: Vec<(u64, Span)>,
}

impl Staging {
    pub fn new(device: &Arc<dyn Device>, stream: StreamId, counters: Arc<TierCounters>) -> Self {
        Self { device: Arc::clone(device), stream, buffers: Vec::new(), filling: 0, counters }
    }

    /// Packs `from` to be uploaded to `to`, which is as long.
    pub fn upload(&mut self, from: &[u8], to: &Span) -> Result<(), DeviceError> {
        let mut done = 0;
        while done < from.len() {
            let (at, room) = self.room(to.address().0 + done as u64)?;
            let take = (from.len() - done).min(usize::try_from(room).unwrap_or(usize::MAX));
            let buffer = &mut self.buffers[self.filling];
            buffer.pinned.write(at, &from[done..done + take]);
            buffer.pieces.push((at, to.part(done as u64..(done + take) as u64)));
            buffer.used = at + take as u64;
            done += take;
        }
        Ok(())
    }

    /// The same of a clock's stamps.
    pub fn upload_stamps(&mut self, stamps: &[i64], to: &Span) -> Result<(), DeviceError> {
        // Once for a stream of an episode; stamps are a few percent of it.
        let bytes: Vec<u8> = stamps.iter().flat_map(|stamp| stamp.to_le_bytes()).collect();
        self.upload(&bytes, to)
    }

    /// Sends what is packed on its way.
    pub fn flush(&mut self) -> Result<(), DeviceError> {
        let Some(buffer) = self.buffers.get_mut(self.filling) else { return Ok(()) };
        if buffer.pieces.is_empty() {
            return Ok(());
        }
        let mut pieces = std::mem::take(&mut buffer.pieces).into_iter().peekable();
        while let Some((at, mut to)) = pieces.next() {
            // A gap of less than a line is padding on both sides.
            while let Some((next_at, next)) = pieces.peek()
                && to.distance_to(next) == Some(next_at - at)
                && next_at - at - to.bytes() < ALIGN
            {
                to = to.through(next);
                pieces.next();
            }
            let bytes = to.bytes();
            self.device.upload(self.stream, &*buffer.pinned, at..at + bytes, &to)?;
            self.counters.uploaded_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        self.device.record(buffer.sent.id(), self.stream)?;
        self.filling = (self.filling + 1) % self.buffers.len();
        Ok(())
    }

    /// Makes `stream` wait for all that was flushed.
    pub fn wait(&self, stream: StreamId) -> Result<(), DeviceError> {
        for buffer in &self.buffers {
            if buffer.sent.query()? == Progress::Pending {
                self.device.wait(stream, buffer.sent.id())?;
            }
        }
        Ok(())
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

/// Writes a clock's stamps to pinned memory.
pub fn write_stamps(pinned: &mut dyn Pinned, offset: u64, stamps: &[i64]) {
    let bytes: Vec<u8> = stamps.iter().flat_map(|stamp| stamp.to_le_bytes()).collect();
    pinned.write(offset, &bytes);
}
