//! The GPU side of the daemon: devices, what of the episodes lies in their memory, and the thread that makes batches.
//!
//! - [`device`]: what the pipeline needs of a device, with guards.

pub mod device;
