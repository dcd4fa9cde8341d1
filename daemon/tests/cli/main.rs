//! The command line from the outside. Each test runs the built binary in a directory of its own.

#![expect(clippy::unwrap_used, reason = "helpers of tests; a test that cannot go on fails")]

mod basics;
mod common;
mod inspect;
mod serve;
mod synth;
