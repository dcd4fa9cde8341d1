//! When each row of a stream was taken.
//!
//! Stamps ascend strictly (duplicates were resolved when the stream was read); a clock has at least one row.
//! A uniform clock keeps its period as a fraction, so that frame 10^6 of a 30 Hz stream is where it belongs.

use std::sync::Arc;

/// The time of every row of a stream, in nanoseconds on the episode's own time line, strictly ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Clock {
    /// Rows a fixed period apart.
    Uniform(UniformClock),
    /// A stamp for each row.
    Stamps(Arc<[i64]>),
}

/// Row `k` was taken at `first_ns + floor((k * num + den / 2) / den)`: the exact time `k * num / den`, rounded
/// to a nanosecond.
///
/// Sums and products over all rows (and the half that rounds) stay below 2^62; [`UniformClock::new`] sees to it,
/// so that CPU and GPU can compute in `i64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UniformClock {
    first_ns: i64,
    num: i64,
    den: i64,
    rows: usize,
}

/// What no clock can be.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ClockError {
    #[error("a clock needs at least one row")]
    Empty,
    #[error("a rate must be a positive number of hertz no higher than 1e9, found {hz}")]
    Rate { hz: f64 },
    #[error("{rows} rows at {hz} Hz from {first_ns} ns do not fit 64-bit nanoseconds")]
    TooLong { rows: usize, hz: f64, first_ns: i64 },
    #[error("stamps must ascend strictly: row {row} has {before_ns} ns, the next {after_ns} ns")]
    NotAscending { row: usize, before_ns: i64, after_ns: i64 },
}

const LIMIT: i128 = 1 << 62;

impl UniformClock {
    /// A clock of `rows` rows at `hz`, whose row 0 is at `first_ns`.
    ///
    /// `hz` is taken to a nanohertz, so whole rates and rates like 29.97 are exact.
    pub fn new(first_ns: i64, hz: f64, rows: usize) -> Result<Self, ClockError> {
        if rows == 0 {
            return Err(ClockError::Empty);
        }
        if !(hz.is_finite() && (1e-9..=1e9).contains(&hz)) {
            return Err(ClockError::Rate { hz });
        }
        #[expect(clippy::cast_possible_truncation, reason = "1e-9..=1e9 Hz is 1..=1e18 nanohertz")]
        let nanohertz = (hz * 1e9).round() as i128;
        let second: i128 = 1_000_000_000_000_000_000; // nanoseconds in a second, times 1e9 for the nanohertz
        let common = gcd(second, nanohertz);
        let (num, den) = (second / common, nanohertz / common);
        let too_long = || ClockError::TooLong { rows, hz, first_ns };
        let span = i128::try_from(rows).ok().and_then(|rows| rows.checked_mul(num)).ok_or_else(too_long)?;
        if span + den >= LIMIT || i128::from(first_ns).abs() + span / den >= LIMIT {
            return Err(too_long());
        }
        match (i64::try_from(num), i64::try_from(den)) {
            (Ok(num), Ok(den)) => Ok(Self { first_ns, num, den, rows }),
            _ => Err(too_long()),
        }
    }

    /// The time of row `row`. Rows outside `0..rows` continue the grid.
    pub const fn t_ns(&self, row: i64) -> i64 {
        self.first_ns + (row * self.num + self.den / 2).div_euclid(self.den)
    }

    /// Time of row 0.
    pub const fn first_ns(&self) -> i64 {
        self.first_ns
    }

    /// The period as a fraction of nanoseconds, in lowest terms: `(num, den)`.
    pub const fn period_ns(&self) -> (i64, i64) {
        (self.num, self.den)
    }

    pub const fn rows(&self) -> usize {
        self.rows
    }
}

const fn gcd(mut a: i128, mut b: i128) -> i128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

impl Clock {
    /// A clock of explicit stamps; refuses none at all, and any that do not ascend strictly.
    pub fn from_stamps(stamps: impl Into<Arc<[i64]>>) -> Result<Self, ClockError> {
        let stamps: Arc<[i64]> = stamps.into();
        if stamps.is_empty() {
            return Err(ClockError::Empty);
        }
        match stamps.windows(2).position(|pair| pair[0] >= pair[1]) {
            None => Ok(Self::Stamps(stamps)),
            Some(row) => {
                Err(ClockError::NotAscending { row, before_ns: stamps[row], after_ns: stamps[row + 1] })
            }
        }
    }

    /// Rows of the stream; never 0.
    pub fn rows(&self) -> usize {
        match self {
            Self::Uniform(uniform) => uniform.rows,
            Self::Stamps(stamps) => stamps.len(),
        }
    }

    /// The time of row `row`, which must be one of the clock's rows.
    pub fn t_ns(&self, row: usize) -> i64 {
        match self {
            #[expect(clippy::cast_possible_wrap, reason = "rows * num fits 62 bits, so rows does")]
            Self::Uniform(uniform) => uniform.t_ns(row as i64),
            Self::Stamps(stamps) => stamps[row],
        }
    }

    /// Time of the first row.
    pub fn first_ns(&self) -> i64 {
        self.t_ns(0)
    }

    /// Time of the last row.
    pub fn last_ns(&self) -> i64 {
        self.t_ns(self.rows() - 1)
    }

    /// Bytes of host memory the stamps take.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Uniform(_) => 0,
            Self::Stamps(stamps) => size_of_val::<[i64]>(stamps),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_uniform_clock_rounds_each_row_and_never_drifts() {
        let clock = UniformClock::new(5, 30.0, 1_000_001).unwrap();
        assert_eq!(clock.period_ns(), (100_000_000, 3));
        assert_eq!(
            [clock.t_ns(0), clock.t_ns(1), clock.t_ns(2), clock.t_ns(3)],
            [5, 5 + 33_333_333, 5 + 66_666_667, 5 + 100_000_000]
        );
        assert_eq!(clock.t_ns(1_000_000), 5 + 33_333_333_333_333);
        assert_eq!(clock.t_ns(-1), 5 - 33_333_333);
    }

    #[test]
    fn impossible_clocks_are_refused() {
        assert_eq!(UniformClock::new(0, 30.0, 0), Err(ClockError::Empty));
        for hz in [0.0, -1.0, f64::NAN, f64::INFINITY, 2e9] {
            assert!(matches!(UniformClock::new(0, hz, 1), Err(ClockError::Rate { .. })), "{hz}");
        }
        assert!(matches!(UniformClock::new(0, 1.0, usize::MAX), Err(ClockError::TooLong { .. })));
        assert!(matches!(UniformClock::new(i64::MAX, 1.0, 2), Err(ClockError::TooLong { .. })));
        assert_eq!(Clock::from_stamps(vec![]), Err(ClockError::Empty));
        assert_eq!(
            Clock::from_stamps(vec![1, 2, 2]),
            Err(ClockError::NotAscending { row: 1, before_ns: 2, after_ns: 2 })
        );
    }

    proptest! {
        #[test]
        fn every_row_is_within_half_a_nanosecond_of_its_exact_time(
            millihertz in 1_u32..10_000_000, row in 0_u32..1_000_000
        ) {
            let hz = f64::from(millihertz) / 1000.0;
            let clock = UniformClock::new(0, hz, row as usize + 1).unwrap();
            let exact_num = i128::from(row) * 1_000_000_000_000; // ns * 1000 / millihertz
            let got = i128::from(clock.t_ns(i64::from(row))) * i128::from(millihertz);
            prop_assert!((2 * (got - exact_num)).abs() <= i128::from(millihertz));
        }
    }
}
