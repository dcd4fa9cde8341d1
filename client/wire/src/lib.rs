//! The contract between `robocached` and its clients. No CUDA, no logging, no threads.
//!
//! - [`spec`], [`epoch`], [`message`], [`fds`]: what is said over the socket (`docs/protocol.md`).
//! - [`segment`], [`shape`], [`words`], [`slot`], [`batch`]: what lies in shared memory (`docs/segment.md`).
//! - [`ring`]: how both sides use it; [`producer`] and [`consumer`] are its ends, with guards.
//! - [`sim`]: what a simulated GPU shares instead of CUDA's handles.
//! - [`sync`]: the only door to atomics.
//!
//! Under `--cfg loom` only the parts without system calls exist, so that loom can run every interleaving of them.

pub mod batch;
pub mod epoch;
pub mod message;
pub mod ring;
pub mod slot;
pub mod spec;
pub mod sync;
pub mod words;

#[cfg(not(loom))]
pub mod consumer;
#[cfg(not(loom))]
pub mod fds;
#[cfg(not(loom))]
mod listener;
#[cfg(not(loom))]
pub mod producer;
#[cfg(not(loom))]
pub mod segment;
#[cfg(not(loom))]
pub mod shape;
#[cfg(not(loom))]
pub mod sim;
