//! A simulated device's memory and events, as two processes share them: what `cuIpc*` handles stand for, in memfds.
//!
//! For tests of the GPU path on hosts without a GPU. All access is by `pread` and `pwrite`, as slow as it is safe: no
//! reference to shared bytes is ever made. A handle carries a number, the place of an event or 0 for the memory.
//!
//! An event is two `u64`: how often it was recorded, and the record whose work was last done. Like CUDA's it is done
//! when the latest record is, and before the first.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use crate::segment::SegmentError;
use crate::spec::IpcHandle;

/// A memfd that is read and written by offset.
#[derive(Debug)]
pub struct Region {
    fd: OwnedFd,
    bytes: u64,
    name: &'static str,
}

impl Region {
    /// New, zeroed and of a size that cannot change.
    pub fn create(name: &'static str, bytes: u64) -> Result<Self, SegmentError> {
        let failed =
            |call| move |source| SegmentError::System { call, memfd: name, len_bytes: bytes, source };
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(failed("memfd_create"))?;
        rustix::fs::ftruncate(&fd, bytes).map_err(failed("ftruncate"))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)
            .map_err(failed("F_ADD_SEALS"))?;
        Ok(Self { fd, bytes, name })
    }

    /// What the other process sent.
    pub fn open(name: &'static str, fd: OwnedFd) -> Result<Self, SegmentError> {
        let stat = rustix::fs::fstat(&fd);
        let stat =
            stat.map_err(|source| SegmentError::System { call: "fstat", memfd: name, len_bytes: 0, source })?;
        Ok(Self { fd, bytes: u64::try_from(stat.st_size).unwrap_or(0), name })
    }

    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// To send.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Fills `to` from `offset`.
    pub fn read(&self, offset: u64, mut to: &mut [u8]) -> Result<(), SegmentError> {
        let mut at = offset;
        while !to.is_empty() {
            let read = match rustix::io::pread(&self.fd, &mut *to, at) {
                Ok(0) => return Err(self.failed("pread past the end", Errno::FAULT)),
                Ok(read) => read,
                Err(Errno::INTR) => continue,
                Err(source) => return Err(self.failed("pread", source)),
            };
            to = &mut to[read..];
            at += read as u64;
        }
        Ok(())
    }

    /// Writes `from` at `offset`.
    pub fn write(&self, offset: u64, mut from: &[u8]) -> Result<(), SegmentError> {
        if offset.checked_add(from.len() as u64).is_none_or(|end| end > self.bytes) {
            return Err(self.failed("pwrite past the end", Errno::FAULT));
        }
        let mut at = offset;
        while !from.is_empty() {
            let written = match rustix::io::pwrite(&self.fd, from, at) {
                Ok(0) => return Err(self.failed("pwrite past the end", Errno::FAULT)),
                Ok(written) => written,
                Err(Errno::INTR) => continue,
                Err(source) => return Err(self.failed("pwrite", source)),
            };
            from = &from[written..];
            at += written as u64;
        }
        Ok(())
    }

    fn failed(&self, call: &'static str, source: Errno) -> SegmentError {
        SegmentError::System { call, memfd: self.name, len_bytes: self.bytes, source }
    }
}

/// The events of one ring: first `slots` that say "ready", then `slots` that say "done".
#[derive(Debug)]
pub struct Events(Region);

const EVENT_BYTES: u64 = 16;

impl Events {
    pub fn create(count: u64) -> Result<Self, SegmentError> {
        Region::create("events", count * EVENT_BYTES).map(Self)
    }

    pub fn open(fd: OwnedFd) -> Result<Self, SegmentError> {
        Region::open("events", fd).map(Self)
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.0.bytes() / EVENT_BYTES
    }

    /// Counts a record, whose work is done once [`Events::complete`] is told its number.
    pub fn record(&self, event: u64) -> Result<u64, SegmentError> {
        let number = self.word(event, 0)? + 1;
        self.0.write(event * EVENT_BYTES, &number.to_le_bytes())?;
        Ok(number)
    }

    /// The work before record `number` is done.
    pub fn complete(&self, event: u64, number: u64) -> Result<(), SegmentError> {
        let number = number.max(self.word(event, 8)?);
        self.0.write(event * EVENT_BYTES + 8, &number.to_le_bytes())
    }

    /// The number of the latest record.
    pub fn latest(&self, event: u64) -> Result<u64, SegmentError> {
        self.word(event, 0)
    }

    /// Whether the work before record `number` is done.
    pub fn is_complete(&self, event: u64, number: u64) -> Result<bool, SegmentError> {
        Ok(self.word(event, 8)? >= number)
    }

    fn word(&self, event: u64, offset: u64) -> Result<u64, SegmentError> {
        let mut bytes = [0; 8];
        self.0.read(event.saturating_mul(EVENT_BYTES).saturating_add(offset), &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// A handle that carries `number`.
pub fn handle(number: u64) -> IpcHandle {
    let mut bytes = [0; 64];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    IpcHandle(bytes)
}

/// The number in a handle.
pub fn number(handle: &IpcHandle) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&handle.0[..8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_done_before_its_first_record_and_once_its_latest_is() {
        let ours = Events::create(3).unwrap();
        let theirs = Events::open(ours.fd().try_clone_to_owned().unwrap()).unwrap();
        assert!(theirs.is_complete(2, theirs.latest(2).unwrap()).unwrap());
        let (first, second) = (ours.record(2).unwrap(), ours.record(2).unwrap());
        ours.complete(2, first).unwrap();
        assert!(!theirs.is_complete(2, theirs.latest(2).unwrap()).unwrap());
        ours.complete(2, second).unwrap();
        ours.complete(2, first).unwrap(); // streams may finish in any order
        assert!(theirs.is_complete(2, theirs.latest(2).unwrap()).unwrap());
        theirs.latest(3).unwrap_err();
        theirs.latest(u64::MAX).unwrap_err();
    }

    #[test]
    fn a_region_keeps_its_size() {
        let region = Region::create("memory", 10).unwrap();
        region.write(8, &[1, 2]).unwrap();
        region.write(9, &[1, 2]).unwrap_err();
        let mut back = [0; 3];
        region.read(7, &mut back).unwrap();
        assert_eq!(back, [0, 1, 2]);
        region.read(8, &mut back).unwrap_err();
    }
}
