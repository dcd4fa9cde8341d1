//! `robocached`: see `cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    robocached::cli::main()
}
