//! Datasets described by a manifest: on real recordings, on small tables of every kind, and on broken files.
#![expect(clippy::unwrap_used, reason = "helpers of tests, too, stop at what should not be")]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    reason = "rows of small tables, and bits of random numbers"
)]

mod data;
mod inspect;
mod ipc;
mod layouts;
mod real;
