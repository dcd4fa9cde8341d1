//! How much memory decoding may take: a file of a megabyte can say that it is a hundred gigabytes, and be that.
//!
//! Owns the count of bytes that all reads of the process have decoded and not yet handed over, and the limit to it. What is
//! read in place from a mapping is not counted. A read gives back what it took, however it ends.

use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::ReadError;

static PROCESS: Meter = Meter::new();

/// Lets all reads of this process together hold so many bytes of columns under way, `u64::MAX` at first. A read that
/// would hold more fails with [`ReadError::NoRoom`]. Columns are copied once on their way: leave room for twice as much.
pub fn limit_decoding(bytes: u64) {
    PROCESS.counts().limit = bytes;
    PROCESS.freed.notify_all();
}

/// Waits until a read that takes `bytes` fits beside the others, or there are none, for at most `patience`: before a
/// read that found no room is repeated. Whether it is so.
pub fn wait_for_room(bytes: u64, patience: Duration) -> bool {
    PROCESS.wait_for_room(bytes, patience)
}

#[derive(Debug)]
struct Meter {
    counts: Mutex<Counts>,
    /// Something was given back.
    freed: Condvar,
}

#[derive(Debug)]
struct Counts {
    limit: u64,
    taken: u64,
}

impl Meter {
    const fn new() -> Self {
        Self { counts: Mutex::new(Counts { limit: u64::MAX, taken: 0 }), freed: Condvar::new() }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        // Each change of the numbers is whole.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_room(&self, bytes: u64, patience: Duration) -> bool {
        let full = |counts: &mut Counts| {
            counts.taken > 0 && counts.taken.checked_add(bytes).is_none_or(|all| all > counts.limit)
        };
        let waited = self.freed.wait_timeout_while(self.counts(), patience, full);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// What one read has taken.
#[derive(Debug)]
pub(crate) struct Taken<'a> {
    meter: &'a Meter,
    bytes: u64,
}

impl Taken<'static> {
    pub(crate) fn nothing() -> Self {
        Self { meter: &PROCESS, bytes: 0 }
    }
}

impl Taken<'_> {
    /// The read of `path` holds `bytes` in all, or would: if that is too much, what it held stays taken.
    pub(crate) fn hold(&mut self, path: &Path, bytes: u64) -> Result<(), ReadError> {
        let mut counts = self.meter.counts();
        let others = counts.taken - self.bytes;
        let Some(all) = others.checked_add(bytes).filter(|&all| all <= counts.limit || bytes <= self.bytes)
        else {
            return Err(ReadError::NoRoom { path: path.to_owned(), bytes, others, limit: counts.limit });
        };
        counts.taken = all;
        drop(counts);
        if bytes < self.bytes {
            self.meter.freed.notify_all();
        }
        self.bytes = bytes;
        Ok(())
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.meter.counts().taken -= self.bytes;
            self.meter.freed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_reads_hold_stays_within_the_limit_and_comes_back_when_they_end() {
        let meter = Meter::new();
        meter.counts().limit = 100;
        let read = || Taken { meter: &meter, bytes: 0 };
        let path = Path::new("data/a.parquet");
        let (mut one, mut other) = (read(), read());
        one.hold(path, 60).unwrap();
        other.hold(path, 40).unwrap();
        let error = other.hold(path, 41).unwrap_err();
        assert!(matches!(error, ReadError::NoRoom { bytes: 41, others: 60, limit: 100, .. }), "{error:?}");
        assert!(error.to_string().contains("\"data/a.parquet\" takes 41 bytes decoded"), "{error}");
        one.hold(path, 59).unwrap();
        other.hold(path, 41).unwrap();
        assert!(!meter.wait_for_room(1, Duration::from_millis(1)));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| meter.wait_for_room(59, Duration::MAX));
            drop(one);
            assert!(waits.join().unwrap());
        });
        other.hold(path, 100).unwrap();
        drop(other);
        assert_eq!(meter.counts().taken, 0);
        assert!(meter.wait_for_room(u64::MAX, Duration::ZERO), "alone it may try, and is told then");
        assert!(read().hold(path, u64::MAX).is_err());
    }
}
