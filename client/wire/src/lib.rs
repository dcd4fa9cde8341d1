//! The contract between `robocached` and its clients. No CUDA, no logging, no threads.

pub mod epoch;
pub mod spec;
