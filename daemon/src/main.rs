//! `robocached`: see `cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    robocached::allocator::keep_large_buffers();
    robocached::cli::main()
}
