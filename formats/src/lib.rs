//! Robot episodes from Parquet and Arrow files, as columns in host memory. No GPU, no IPC.

mod dataset;
mod error;
mod fingerprint;
mod layout;
mod lerobot;
mod parquet;
mod table;
mod values;

pub use dataset::*;
pub use error::{OpenError, ReadError};
