//! Where a target time falls among the rows of a stream.
//!
//! [`Finder::find`] is the normative rule (docs/resampling.md): it decides the row, the weight and the padding,
//! and knows nothing of values. A uniform clock computes its bracket by one division and a correction with the
//! exact rounded stamps, an irregular one searches; both must give the same answer for the same stamps. Each
//! remembers the row it found last, so that offsets that ascend walk forward and only the first one searches.

use robocache_types::{Clock, Interp, UniformClock};

/// A target this close to a stamp is that stamp, in nanoseconds.
pub(crate) const SNAP_NS: u64 = 1000;

/// What a target is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Pick {
    /// The row to copy, or the row before the target.
    pub row: usize,
    /// 0: `row` exactly. Else the weight, in `(0, 1)`, of row `row + 1`.
    pub weight: f64,
}

impl Pick {
    pub(crate) const fn exactly(row: usize) -> Self {
        Self { row, weight: 0.0 }
    }
}

/// Two neighbouring rows and their stamps: `before_ns <= t < after_ns`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bracket {
    row: usize,
    before_ns: i64,
    after_ns: i64,
}

/// A clock that finds the bracket of a time.
pub(crate) trait Axis {
    /// Stamps of the first and the last row.
    fn ends(&self) -> (i64, i64);
    fn rows(&self) -> usize;
    /// The bracket of `t`, which lies in `first..last`.
    fn bracket(&mut self, t: i64) -> Bracket;
}

/// The rule, for one clock, mode and gap.
#[derive(Debug)]
pub(crate) struct Finder<A> {
    axis: A,
    first_ns: i64,
    last_ns: i64,
    interp: Interp,
    /// `u64::MAX`: no gap is too long.
    max_gap_ns: u64,
}

impl<A: Axis> Finder<A> {
    pub(crate) fn new(axis: A, interp: Interp, max_gap_ns: Option<u64>) -> Self {
        let (first_ns, last_ns) = axis.ends();
        Self { axis, first_ns, last_ns, interp, max_gap_ns: max_gap_ns.unwrap_or(u64::MAX) }
    }

    /// What the target `t` is made of, and whether it is padding.
    #[inline]
    pub(crate) fn find(&mut self, t: i64) -> (Pick, bool) {
        if t <= self.first_ns {
            return (Pick::exactly(0), self.first_ns.abs_diff(t) > SNAP_NS);
        }
        if t >= self.last_ns {
            return (Pick::exactly(self.axis.rows() - 1), t.abs_diff(self.last_ns) > SNAP_NS);
        }
        let Bracket { row, before_ns, after_ns } = self.axis.bracket(t);
        let (since, until) = (t.abs_diff(before_ns), after_ns.abs_diff(t));
        let nearer = if since <= until { row } else { row + 1 };
        if since.min(until) <= SNAP_NS {
            return (Pick::exactly(nearer), false);
        }
        let gap = after_ns.abs_diff(before_ns);
        if gap > self.max_gap_ns {
            return (Pick::exactly(row), true);
        }
        let pick = match self.interp {
            Interp::Previous => Pick::exactly(row),
            Interp::Nearest => Pick::exactly(nearer),
            #[expect(clippy::cast_precision_loss, reason = "the weight is defined as a quotient of f64")]
            Interp::Linear | Interp::Slerp => Pick { row, weight: since as f64 / gap as f64 },
        };
        (pick, false)
    }
}

/// A clock of explicit stamps.
#[derive(Debug)]
pub(crate) struct StampAxis<'a> {
    stamps: &'a [i64],
    /// The row found last; `None` before the first search.
    at: Option<usize>,
}

impl<'a> StampAxis<'a> {
    /// `stamps` has at least one element, as every [`Clock`] has.
    pub(crate) const fn new(stamps: &'a [i64]) -> Self {
        Self { stamps, at: None }
    }

    /// Where `t` would be if the stamps were evenly spaced. Only a place to start from.
    fn guess(&self, t: i64) -> usize {
        let (first, last) = self.ends();
        #[expect(clippy::cast_precision_loss, reason = "a guess")]
        let share = t.abs_diff(first) as f64 / last.abs_diff(first) as f64;
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a guess; share is in 0..=1 and the cast saturates"
        )]
        let row = (share * (self.stamps.len() - 1) as f64) as usize;
        row.min(self.stamps.len() - 2)
    }
}

impl Axis for StampAxis<'_> {
    fn ends(&self) -> (i64, i64) {
        (self.stamps[0], self.stamps[self.stamps.len() - 1])
    }

    fn rows(&self) -> usize {
        self.stamps.len()
    }

    #[inline]
    fn bracket(&mut self, t: i64) -> Bracket {
        let stamps = self.stamps;
        let start = self.at.unwrap_or_else(|| self.guess(t));
        // Invariant of both searches: stamps[low] <= t < stamps[high]; t in first..last makes it attainable.
        let (mut low, mut high);
        let mut step = 1;
        if stamps[start] <= t {
            (low, high) = (start, start + 1);
            while stamps[high] <= t {
                low = high;
                high = (high + step).min(stamps.len() - 1);
                step *= 2;
            }
        } else {
            (low, high) = (start.saturating_sub(1), start);
            while stamps[low] > t {
                high = low;
                low = low.saturating_sub(step);
                step *= 2;
            }
        }
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if stamps[middle] <= t {
                low = middle;
            } else {
                high = middle;
            }
        }
        self.at = Some(low);
        Bracket { row: low, before_ns: stamps[low], after_ns: stamps[high] }
    }
}

/// A clock whose stamps are computed.
#[derive(Debug)]
pub(crate) struct UniformAxis {
    clock: UniformClock,
    num: i64,
    den: i64,
    /// `num / den` and `num % den`: a step to the next row needs no division.
    period: (i64, i64),
    /// The row found last, or -1.
    row: i64,
    /// `(row * num + den / 2)` divided by `den`: the stamp since row 0, and the remainder.
    at: (i64, i64),
}

/// Steps forward that are cheaper than a division.
const STEPS: u32 = 4;

impl UniformAxis {
    pub(crate) const fn new(clock: UniformClock) -> Self {
        let (num, den) = clock.period_ns();
        let period = if den == 1 { (num, 0) } else { (num / den, num % den) };
        Self { clock, num, den, period, row: -1, at: (-1, 0) }
    }

    /// The stamp (and remainder) of the row after the one at `at`.
    #[inline]
    const fn after(&self, at: (i64, i64)) -> (i64, i64) {
        let (stamp, rest) = (at.0 + self.period.0, at.1 + self.period.1);
        if rest >= self.den { (stamp + 1, rest - self.den) } else { (stamp, rest) }
    }
}

impl Axis for UniformAxis {
    fn ends(&self) -> (i64, i64) {
        let clock = Clock::Uniform(self.clock);
        (clock.first_ns(), clock.last_ns())
    }

    fn rows(&self) -> usize {
        self.clock.rows()
    }

    #[inline]
    fn bracket(&mut self, t: i64) -> Bracket {
        let first_ns = self.clock.first_ns();
        // No overflow: t lies in first..last, and last - first < 2^62 (UniformClock::new sees to it).
        let since = t - first_ns;
        let (mut row, mut at, mut next);
        let mut steps = 0;
        if self.row >= 0 && self.at.0 <= since {
            (row, at) = (self.row, self.at);
            next = self.after(at);
            while next.0 <= since && steps < STEPS {
                (row, at) = (row + 1, next);
                next = self.after(at);
                steps += 1;
            }
        } else {
            (row, at, next) = (0, (0, 0), (0, 0));
        }
        if next.0 <= since {
            // since <= rows * num / den, so since * den < 2^62. The quotient's row is never after `since`,
            // and rounding can put the next one at `since` exactly.
            row = if self.den == 1 { since / self.num } else { since * self.den / self.num };
            let halves = row * self.num + self.den / 2;
            at = if self.den == 1 { (halves, 0) } else { (halves / self.den, halves % self.den) };
            next = self.after(at);
            while next.0 <= since {
                (row, at) = (row + 1, next);
                next = self.after(at);
            }
        }
        (self.row, self.at) = (row, at);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 <= row < rows: usize")]
        Bracket { row: row as usize, before_ns: first_ns + at.0, after_ns: first_ns + next.0 }
    }
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    clippy::cast_possible_wrap,
    reason = "small numbers of the tests' own"
)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plain(stamps: &[i64], t: i64) -> Bracket {
        let row = (0..stamps.len() - 1).find(|&row| stamps[row] <= t && t < stamps[row + 1]).unwrap();
        Bracket { row, before_ns: stamps[row], after_ns: stamps[row + 1] }
    }

    proptest! {
        #[test]
        fn stamps_and_the_uniform_clock_they_came_from_give_the_same_brackets(
            millihertz in prop_oneof![1_u32..2_000_000, Just(30_000), Just(29_970), Just(50_000)],
            rows in 2_usize..300, first in -10_000_000_000_i64..10_000_000_000,
            shares in prop::collection::vec((0.0..1.0_f64, -2_i64..3), 1..50), sorted: bool,
        ) {
            let uniform = UniformClock::new(first, f64::from(millihertz) / 1000.0, rows).unwrap();
            let stamps: Vec<i64> = (0..rows as i64).map(|row| uniform.t_ns(row)).collect();
            let (low, high) = (stamps[0], stamps[rows - 1]);
            let mut targets: Vec<i64> = shares
                .iter()
                .map(|&(share, off)| {
                    let row = (share * rows as f64) as usize;
                    // Half of the targets sit on or next to a stamp.
                    let t = if off == 2 { low + (share * (high - low) as f64) as i64 } else { stamps[row] + off };
                    t.clamp(low, high - 1)
                })
                .collect();
            if sorted {
                targets.sort_unstable();
            }
            let mut by_stamps = StampAxis::new(&stamps);
            let mut by_period = UniformAxis::new(uniform);
            for t in targets {
                let wanted = plain(&stamps, t);
                prop_assert_eq!(by_stamps.bracket(t), wanted);
                prop_assert_eq!(by_period.bracket(t), wanted);
            }
        }

        #[test]
        fn an_irregular_clock_is_searched_right_in_any_order(
            mut stamps in prop::collection::btree_set(any::<i64>(), 2..200).prop_map(Vec::from_iter),
            targets in prop::collection::vec((any::<prop::sample::Index>(), any::<i64>()), 1..50),
            near: bool,
        ) {
            if near {
                stamps = stamps.iter().scan(0, |t, gap| { *t += 1 + (gap & 0xffff); Some(*t) }).collect();
            }
            let mut axis = StampAxis::new(&stamps);
            for (index, any_t) in targets {
                let t = if near { stamps[index.index(stamps.len())] + (any_t & 0xff) } else { any_t };
                let t = t.clamp(stamps[0], stamps[stamps.len() - 1] - 1);
                prop_assert_eq!(axis.bracket(t), plain(&stamps, t));
            }
        }
    }
}
