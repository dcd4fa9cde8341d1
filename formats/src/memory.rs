//! How much memory decoding may take: a file of a megabyte can say that it is a hundred gigabytes, and be that.
//!
//! Owns the count of bytes that all reads of the process have decoded and not yet handed over, and the limit to it. What is
//! read in place from a mapping is not counted. A read gives back what it took, however it ends.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::ReadError;

static PROCESS: Meter = Meter::new();

/// Lets all reads of this process together hold so many bytes of columns under way, `u64::MAX` at first. A read that
/// would hold more fails with [`ReadError::NoRoom`]. Columns are copied once on their way: leave room for twice as much.
pub fn limit_decoding(bytes: u64) {
    PROCESS.limit.store(bytes, Ordering::Relaxed);
}

/// What is taken, and what may be. Relaxed: nothing else is read by these numbers.
#[derive(Debug)]
struct Meter {
    limit: AtomicU64,
    taken: AtomicU64,
}

impl Meter {
    const fn new() -> Self {
        Self { limit: AtomicU64::new(u64::MAX), taken: AtomicU64::new(0) }
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
        let Some(more) = bytes.checked_sub(self.bytes) else {
            self.meter.taken.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
            self.bytes = bytes;
            return Ok(());
        };
        let limit = self.meter.limit.load(Ordering::Relaxed);
        let taken = self.meter.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
            taken.checked_add(more).filter(|&all| all <= limit)
        });
        match taken {
            Ok(_before) => {
                self.bytes = bytes;
                Ok(())
            }
            Err(taken) => {
                let others = taken.saturating_sub(self.bytes);
                Err(ReadError::NoRoom { path: path.to_owned(), bytes, others, limit })
            }
        }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.meter.taken.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_reads_hold_stays_within_the_limit_and_comes_back_when_they_end() {
        let meter = Meter::new();
        meter.limit.store(100, Ordering::Relaxed);
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
        drop(one);
        other.hold(path, 100).unwrap();
        drop(other);
        assert_eq!(meter.taken.load(Ordering::Relaxed), 0);
        assert!(read().hold(path, u64::MAX).is_err());
    }
}
