//! Robot episodes from Parquet and Arrow files, as columns in host memory. No GPU, no IPC.
//!
//! A [`Dataset`] is opened from metadata alone and read an episode, or some of one file, at a time. How it lies on
//! disk is the business of one reader per layout; what a file is, of one table per format.

mod arrow_ipc;
mod bound;
mod contain;
mod dataset;
mod draft;
mod draw;
mod error;
mod files;
mod filter;
mod fingerprint;
mod frames;
mod guess;
mod layout;
mod lerobot;
mod lerobot_clock;
mod lerobot_files;
mod lerobot_meta;
mod lerobot_v3;
mod manifest;
mod map;
mod memory;
mod nested;
mod pages;
mod parquet;
mod stats;
mod streams;
mod table;
mod tabular;
mod template;
mod text;
mod thrift;
mod time;
mod values;
mod warnings;

pub use dataset::*;
pub use draft::draft_manifest;
pub use error::{OpenError, ReadError};
pub use filter::{FilterError, Wanted};
pub use manifest::{Arrangement, FILE_NAME, FramesDecl, Manifest, ManifestError, StreamDecl, Time};
pub use memory::{limit_decoding, wait_for_room};
pub use stats::{BINS, Gap, StreamStats, stats, stream_stats};
pub use time::{Duplicates, Order, TimeError, Unit};

// Columns are handed on as they lie in Arrow buffers, which are in the host's order.
const _: () = assert!(cfg!(target_endian = "little"), "columns are little-endian here and on the wire");
