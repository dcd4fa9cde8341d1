//! The command line from the outside. Each test runs the built binary in a directory of its own.

mod basics;
mod common;
mod inspect;
mod serve;
mod synth;
