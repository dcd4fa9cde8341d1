//! Real processes: `robocached` as it is built, clients of crate `robocache`, recordings of real robots.
//!
//! One binary, so that it is linked once.

#![expect(clippy::unwrap_used, reason = "test code outside of #[test] functions too")]

mod broken;
mod deaths;
mod epochs;
mod gpu;
mod large;
mod memory;
mod support;
mod trainer;
