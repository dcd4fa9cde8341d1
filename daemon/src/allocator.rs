//! How this process's C allocator treats large buffers, where it is glibc's.
//!
//! Decoding takes and frees buffers of megabytes for every column. Left alone glibc maps and unmaps most of them, and half
//! of a reader's time goes into page faults; kept for the next buffer they are touched once. Why, and what it costs:
//! `docs/adr/0009-large-buffers.md`. With another C library nothing happens.

#![expect(unsafe_code, reason = "mallopt and malloc_trim are C functions")]

/// Buffers up to this size come from the heap, not from a mapping of their own; glibc allows no more.
#[cfg(target_env = "gnu")]
const MAPPED_FROM: i32 = 32 << 20;
/// How much may lie free at the top of the heap before it goes back to the system.
#[cfg(target_env = "gnu")]
const KEPT: i32 = 64 << 20;

/// Keeps freed buffers for the next ones. To be called before the first thread starts.
pub fn keep_large_buffers() {
    #[cfg(target_env = "gnu")]
    for (parameter, bytes) in [(libc::M_MMAP_THRESHOLD, MAPPED_FROM), (libc::M_TRIM_THRESHOLD, KEPT)] {
        // SAFETY: it takes two integers, checks both, and changes the allocator's own settings under its own lock.
        let taken = unsafe { libc::mallopt(parameter, bytes) };
        debug_assert_eq!(taken, 1, "mallopt({parameter}, {bytes})");
    }
}

/// Gives what lies free back to the system: after something large was let go for good.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number of bytes to leave and touches only what is free, under the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
