//! The door to atomics: `core`'s in a build, loom's under `--cfg loom`. Nothing else in this crate names either.
//!
//! [`Futex`] is an atomic word that threads of several processes sleep on. loom has no futex, so under it the word
//! carries a mutex and a condition variable of loom's that behave as the kernel's queue does: `wait` compares and
//! falls asleep in one step, `wake_all` finds who sleeps. Time limits do not exist under loom, so that a lost wake-up is
//! a deadlock, which loom reports.

#[cfg(not(loom))]
use core::sync::atomic as imp;
use std::time::Duration;

#[cfg(loom)]
use loom::sync::atomic as imp;

pub use core::sync::atomic::Ordering;

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// The word changed, somebody woke us, or a signal came: look again.
    Woken,
    TimedOut,
}

macro_rules! atomic {
    ($name:ident, $inner:ident, $value:ty) => {
        #[doc = concat!("An atomic `", stringify!($value), "` that processes may share.")]
        #[derive(Debug)]
        #[repr(transparent)]
        pub struct $name(imp::$inner);

        impl $name {
            pub fn new(value: $value) -> Self {
                Self(imp::$inner::new(value))
            }

            #[inline]
            pub fn load(&self, ordering: Ordering) -> $value {
                self.0.load(ordering)
            }

            #[inline]
            pub fn store(&self, value: $value, ordering: Ordering) {
                self.0.store(value, ordering);
            }

            #[inline]
            pub fn fetch_add(&self, value: $value, ordering: Ordering) -> $value {
                self.0.fetch_add(value, ordering)
            }

            #[inline]
            pub fn fetch_sub(&self, value: $value, ordering: Ordering) -> $value {
                self.0.fetch_sub(value, ordering)
            }

            /// `Err` holds what was found instead of `current`.
            #[inline]
            pub fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.0.compare_exchange(current, new, success, failure)
            }
        }
    };
}

atomic!(AtomicU32, AtomicU32, u32);
atomic!(AtomicU64, AtomicU64, u64);

#[inline]
pub fn fence(ordering: Ordering) {
    imp::fence(ordering);
}

/// Tell the processor that this is a spin loop; under loom, let another thread run.
#[inline]
pub fn spin_hint() {
    #[cfg(not(loom))]
    core::hint::spin_loop();
    #[cfg(loom)]
    loom::thread::yield_now();
}

/// A word to sleep on, shared between processes: never the PRIVATE flag.
#[cfg(not(loom))]
#[derive(Debug)]
#[repr(transparent)]
pub struct Futex(imp::AtomicU32);

#[cfg(not(loom))]
impl Futex {
    pub fn new(value: u32) -> Self {
        Self(imp::AtomicU32::new(value))
    }

    /// Sleep as long as the word is `expected`, `limit` at most.
    pub fn wait(&self, expected: u32, limit: Duration) -> Waited {
        let limit = rustix::thread::futex::Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(limit.subsec_nanos()),
        };
        match rustix::thread::futex::wait(
            &self.0,
            rustix::thread::futex::Flags::empty(),
            expected,
            Some(&limit),
        ) {
            Err(rustix::io::Errno::TIMEDOUT) => Waited::TimedOut,
            // AGAIN: it is not `expected` any more. INTR: a signal. Nothing else can come of a valid address.
            Ok(()) | Err(_) => Waited::Woken,
        }
    }

    /// Wake everybody who sleeps on this word.
    pub fn wake_all(&self) {
        // It fails for invalid addresses and flags only, and a reference is a valid address.
        rustix::thread::futex::wake(&self.0, rustix::thread::futex::Flags::empty(), i32::MAX as u32).ok();
    }
}

#[cfg(loom)]
#[derive(Debug)]
pub struct Futex(imp::AtomicU32, loom::sync::Mutex<()>, loom::sync::Condvar);

#[cfg(loom)]
impl Futex {
    pub fn new(value: u32) -> Self {
        Self(imp::AtomicU32::new(value), loom::sync::Mutex::new(()), loom::sync::Condvar::new())
    }

    pub fn wait(&self, expected: u32, _limit: Duration) -> Waited {
        let guard = self.1.lock().unwrap();
        if self.0.load(Ordering::Relaxed) == expected {
            drop(self.2.wait(guard).unwrap());
        }
        Waited::Woken
    }

    pub fn wake_all(&self) {
        let guard = self.1.lock().unwrap();
        self.2.notify_all();
        drop(guard);
    }
}

impl Futex {
    #[inline]
    pub fn load(&self, ordering: Ordering) -> u32 {
        self.0.load(ordering)
    }

    #[inline]
    pub fn fetch_add(&self, value: u32, ordering: Ordering) -> u32 {
        self.0.fetch_add(value, ordering)
    }
}
