//! Proves and times the CUDA kernels on device 0: `cargo run --release -p robocache-kernels --example gpu_check`.
//!
//! First the kernels against the CPU twin, on fresh random data, with poisoned outputs; any difference ends the
//! program with exit code 1. Then their times, as graph replays over more memory than the L2 cache holds, beside a
//! thread-per-element kernel and the device's own copy. `SEED=n` repeats a run, `ONLY=agree` or `ONLY=speed` runs a half,
//! `ONLY=assemble`, `large` or `fuse` a part of the former (for compute-sanitizer, which takes its time).

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "sizes and values of the program's own choosing"
)]

mod agree;
mod gpu;
mod random;
mod speed;

use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gpu_check: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let gpu = gpu::Gpu::open()?;
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut random = random::Random::from_environment()?;
    let wanted = |half: &str, part: &str| only.is_empty() || only == half || only == part;
    if wanted("agree", "assemble") {
        agree::assemble(&gpu, &mut random)?;
    }
    if wanted("agree", "large") {
        agree::large(&gpu, &mut random)?;
    }
    if wanted("agree", "fuse") {
        agree::fuse(&gpu, &mut random)?;
    }
    if wanted("speed", "speed") {
        speed::measure(&gpu, &mut random)?;
    }
    Ok(())
}
