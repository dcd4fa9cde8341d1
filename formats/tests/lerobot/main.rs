//! LeRobot datasets: real ones, made ones and broken ones.

#![expect(clippy::unwrap_used, reason = "helpers of tests, which clippy does not count as tests")]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "numbers small enough by construction"
)]

mod broken;
mod formulas;
mod made;
mod real;
