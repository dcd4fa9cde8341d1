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
    /// The period is the simplest fraction within a part in 10^12 of the rate, so whole rates and rates like 29.97 or
    /// 30000/1001 are what they say. Where that fraction is too long for as many rows (a measured rate such as
    /// 195.99845 Hz over hours), it is the closest one that is not, if that is within a part in 10^8.
    pub fn new(first_ns: i64, hz: f64, rows: usize) -> Result<Self, ClockError> {
        if rows == 0 {
            return Err(ClockError::Empty);
        }
        if !(hz.is_finite() && (1e-9..=1e9).contains(&hz)) {
            return Err(ClockError::Rate { hz });
        }
        let mut best = None;
        for (p, q) in convergents(hz) {
            #[expect(clippy::cast_precision_loss, reason = "a relative error needs no more")]
            let error = ((p as f64 / q as f64) / hz - 1.0).abs();
            if error > 1e-8 {
                continue;
            }
            best = Self::of_fraction(first_ns, p, q, rows).or(best);
            if error <= 1e-12 {
                break;
            }
        }
        best.ok_or(ClockError::TooLong { rows, hz, first_ns })
    }

    /// A clock whose period is `num / den` nanoseconds, as [`UniformClock::period_ns`] has it.
    pub fn from_period(first_ns: i64, (num, den): (i64, i64), rows: usize) -> Result<Self, ClockError> {
        if rows == 0 {
            return Err(ClockError::Empty);
        }
        #[expect(clippy::cast_precision_loss, reason = "for people to read")]
        let hz = 1e9 * den as f64 / num as f64;
        if num < 1 || den < 1 {
            return Err(ClockError::Rate { hz });
        }
        let (second, p) = (i128::from(num), i128::from(den));
        Self::of_period(first_ns, second, p, rows).ok_or(ClockError::TooLong { rows, hz, first_ns })
    }

    /// `p / q` hertz, if everything fits.
    fn of_fraction(first_ns: i64, p: i128, q: i128, rows: usize) -> Option<Self> {
        Self::of_period(first_ns, q.checked_mul(1_000_000_000)?, p, rows)
    }

    /// A period of `num / den` nanoseconds, if everything fits.
    fn of_period(first_ns: i64, num: i128, den: i128, rows: usize) -> Option<Self> {
        let common = gcd(num, den);
        let (num, den) = (num / common, den / common);
        let span = i128::try_from(rows).ok()?.checked_mul(num)?;
        if span + den >= LIMIT || i128::from(first_ns).abs() + span / den >= LIMIT {
            return None;
        }
        Some(Self { first_ns, num: i64::try_from(num).ok()?, den: i64::try_from(den).ok()?, rows })
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

/// The convergents of the continued fraction of a float between 1e-9 and 1e9, from the simplest to itself.
fn convergents(value: f64) -> impl Iterator<Item = (i128, i128)> {
    // The float, exactly: an odd integer times a power of two. Its parts fit, since it is no smaller than 2^-30.
    let mut scaled = value;
    let mut n_den: i128 = 1;
    while scaled.fract() != 0.0 {
        scaled *= 2.0;
        n_den *= 2;
    }
    #[expect(clippy::cast_possible_truncation, reason = "whole, and at most 2^53 where it was scaled")]
    let mut state = Some((scaled as i128, n_den));
    let (mut last, mut before) = ((1_i128, 0_i128), (0_i128, 1_i128));
    std::iter::from_fn(move || {
        let (numerator, denominator) = state?;
        let whole = numerator / denominator;
        let rest = numerator % denominator;
        state = (rest != 0).then_some((denominator, rest));
        let next = (whole * last.0 + before.0, whole * last.1 + before.1);
        (last, before) = (next, last);
        Some(next)
    })
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
    fn a_clock_is_made_again_from_its_numbers() {
        for hz in [30.0, 29.97, 997.0, 0.5] {
            let clock = UniformClock::new(-7, hz, 12_345).unwrap();
            assert_eq!(UniformClock::from_period(-7, clock.period_ns(), 12_345), Ok(clock));
        }
        UniformClock::from_period(0, (0, 1), 1).unwrap_err();
        UniformClock::from_period(0, (1, -1), 1).unwrap_err();
        UniformClock::from_period(0, (i64::MAX, 1), 2).unwrap_err();
        UniformClock::from_period(0, (1, 1), 0).unwrap_err();
    }

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

    #[test]
    fn rates_are_the_fractions_that_people_mean() {
        let period = |hz: f64| UniformClock::new(0, hz, 1000).unwrap().period_ns();
        assert_eq!(period(29.97), (100_000_000_000, 2997));
        assert_eq!(period(30_000.0 / 1001.0), (100_100_000, 3));
        assert_eq!(period(0.1), (10_000_000_000, 1));
        assert_eq!(period(50.0), (20_000_000, 1));
    }

    #[test]
    fn measured_rates_last_for_hours_and_stay_within_a_part_in_a_hundred_million() {
        let rates = [(195.998_45, 3_500_000), (59.940_059_940, 1_000_000), (104.266_666_667, 2_000_000)];
        for (hz, rows) in rates.into_iter().chain([(2258.137, 9_000_000), (std::f64::consts::PI, 100_000)]) {
            let clock = UniformClock::new(0, hz, rows).unwrap();
            let exact = (rows - 1) as f64 / hz * 1e9;
            let found = Clock::Uniform(clock).last_ns() as f64;
            assert!((found / exact - 1.0).abs() < 1.1e-8, "{hz} Hz: {found} for {exact}");
        }
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
