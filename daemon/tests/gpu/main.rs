//! What every device does: one suite, for the simulated device and for CUDA.
//!
//! On a simulated device, or with `ROBOCACHE_TEST_DEVICE=cuda:0` on a real one: then every test of [`streams`], [`batches`]
//! and [`processes`] fails where there is no such GPU. [`simulated`] is about what only the simulation catches.

#![expect(clippy::cast_possible_truncation, reason = "sizes of a test's own; values are meant to be rounded")]
#![expect(clippy::unwrap_used, reason = "test code outside of #[test] functions too")]

mod batches;
mod bench;
mod client;
mod processes;
#[path = "../../../kernels/examples/gpu_check/random.rs"]
mod random;
mod simulated;
mod streams;
mod tiers;
