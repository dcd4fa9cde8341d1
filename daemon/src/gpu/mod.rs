//! The GPU side of the daemon: devices, what of the episodes lies in their memory, and the threads that make batches.
//!
//! - [`device`]: what the pipeline needs of a device, with guards; [`cuda`] and [`sim`] are devices.
//! - [`host`]: the devices of this host, opened when a loader first asks for one.
//! - [`tiers`], `caches`, `passing`, [`staging`], [`arena`]: episodes in GPU memory and pinned memory, or parts of them.
//! - [`ring`]: the part of a ring on a GPU. [`feed`]: a loader's way there. [`describe`], `descriptors`: what launches are told.
//! - [`worker`]: the thread of a device.

pub mod arena;
mod caches;
pub mod cuda;
pub mod describe;
mod descriptors;
pub mod device;
pub mod feed;
pub mod host;
mod passing;
mod resident;
pub mod ring;
pub mod sim;
pub mod staging;
pub mod tiers;
pub mod worker;
