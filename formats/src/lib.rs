//! Robot episodes from Parquet and Arrow files, as columns in host memory. No GPU, no IPC.

mod dataset;

pub use dataset::*;
