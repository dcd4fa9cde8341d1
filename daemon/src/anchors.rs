//! What the samples of a loader are built around: a numbered list of times, episode after episode.
//!
//! Anchors are numbered from 0 over the chosen episodes, in the dataset's order; nothing here depends on shuffle
//! or rank. The list is prefix sums, so it takes a few words an episode, however many frames there are.

use robocache_kernels::Anchor;
use robocache_types::Clock;

/// The anchors of one loader.
#[derive(Debug, Clone)]
pub struct Anchors {
    /// Position in `Dataset::episodes` of each chosen episode that has anchors.
    episodes: Vec<u32>,
    /// First anchor of each chosen episode, and, last, the number of anchors.
    starts: Vec<u64>,
    times: Times,
}

/// How an anchor's time comes from its number within the episode.
#[derive(Debug, Clone)]
enum Times {
    /// The time of that row of the episode's own clock, which whoever assembles holds anyway.
    OfRows,
    /// The time of that row of a clock kept here, by chosen episode.
    OfClocks(Vec<Clock>),
    /// The start of the episode, by chosen episode.
    Starts(Vec<i64>),
    /// A grid from the start of the episode: row `k` at `first + floor((k * num + den / 2) / den)`.
    Grid(Vec<robocache_types::UniformClock>),
}

/// One anchor, found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Position among the chosen episodes.
    pub chosen: u32,
    /// Position in `Dataset::episodes`.
    pub episode: u32,
    /// Number within the episode.
    pub nth: u64,
}

impl Anchors {
    /// Every frame of the episodes, whose clock comes with their streams.
    pub fn frames(lengths: impl IntoIterator<Item = (u32, u64)>) -> Self {
        Self::build(lengths, Times::OfRows)
    }

    /// Every row of these clocks.
    pub fn clocks(clocks: impl IntoIterator<Item = (u32, Clock)>) -> Self {
        let (episodes, clocks): (Vec<_>, Vec<_>) = clocks.into_iter().unzip();
        let lengths: Vec<_> =
            episodes.into_iter().zip(clocks.iter().map(|clock| clock.rows() as u64)).collect();
        Self::build(lengths, Times::OfClocks(clocks))
    }

    /// The start of every episode.
    pub fn starts(starts: impl IntoIterator<Item = (u32, i64)>) -> Self {
        let (episodes, starts): (Vec<_>, Vec<_>) = starts.into_iter().unzip();
        Self::build(episodes.into_iter().map(|episode| (episode, 1)), Times::Starts(starts))
    }

    /// A grid over every episode.
    pub fn grid(grids: impl IntoIterator<Item = (u32, robocache_types::UniformClock)>) -> Self {
        let (episodes, grids): (Vec<_>, Vec<_>) = grids.into_iter().unzip();
        let lengths: Vec<_> = episodes.into_iter().zip(grids.iter().map(|grid| grid.rows() as u64)).collect();
        Self::build(lengths, Times::Grid(grids))
    }

    fn build(lengths: impl IntoIterator<Item = (u32, u64)>, times: Times) -> Self {
        let (mut episodes, mut starts) = (Vec::new(), vec![0]);
        let mut total = 0;
        for (episode, length) in lengths {
            total += length;
            episodes.push(episode);
            starts.push(total);
        }
        Self { episodes, starts, times }
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The episodes anchors come from, as positions in `Dataset::episodes`.
    pub fn episodes(&self) -> &[u32] {
        &self.episodes
    }

    /// Where anchor `anchor` is; it must be below [`Anchors::len`].
    pub fn place(&self, anchor: u64) -> Place {
        // The last start at or before the anchor; empty episodes share a start and are passed over.
        let chosen = self.starts.partition_point(|&start| start <= anchor) - 1;
        Place {
            chosen: u32::try_from(chosen).expect("episodes are numbered in u32"),
            episode: self.episodes[chosen],
            nth: anchor - self.starts[chosen],
        }
    }

    /// Time and row of an anchor; `clock` is the clock of the episode's frames, where the dataset has one.
    pub fn anchor(&self, place: Place, clock: Option<&Clock>) -> Anchor {
        let chosen = place.chosen as usize;
        let row = i64::try_from(place.nth).expect("rows fit i64");
        let row_usize = usize::try_from(place.nth).expect("rows fit usize");
        let t_ns = match &self.times {
            Times::OfRows => clock.expect("frame anchors load a stream of the frame clock").t_ns(row_usize),
            Times::OfClocks(clocks) => clocks[chosen].t_ns(row_usize),
            Times::Starts(starts) => starts[chosen],
            Times::Grid(grids) => grids[chosen].t_ns(row),
        };
        Anchor { t_ns, row }
    }

    /// Start of the time line that `timestamp` counts from: the first anchor's own time for frames.
    pub fn origin_ns(&self, place: Place, clock: Option<&Clock>) -> i64 {
        self.anchor(Place { nth: 0, ..place }, clock).t_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use robocache_types::UniformClock;

    #[test]
    fn anchors_are_numbered_over_the_chosen_episodes_and_pass_over_empty_ones() {
        let anchors = Anchors::frames([(4, 2), (5, 0), (9, 3)]);
        assert_eq!(anchors.len(), 5);
        let places: Vec<_> = (0..5).map(|a| anchors.place(a)).map(|p| (p.episode, p.nth)).collect();
        assert_eq!(places, [(4, 0), (4, 1), (9, 0), (9, 1), (9, 2)]);
    }

    #[test]
    fn each_kind_of_anchor_has_its_time() {
        let clock = Clock::Uniform(UniformClock::new(100, 1e9, 3).unwrap());
        let frames = Anchors::frames([(0, 3)]);
        assert_eq!(frames.anchor(frames.place(2), Some(&clock)), Anchor { t_ns: 102, row: 2 });
        let clocks = Anchors::clocks([(0, Clock::from_stamps(vec![5, 8]).unwrap())]);
        assert_eq!(clocks.anchor(clocks.place(1), None), Anchor { t_ns: 8, row: 1 });
        let starts = Anchors::starts([(0, 7), (1, 70)]);
        assert_eq!(starts.anchor(starts.place(1), None), Anchor { t_ns: 70, row: 0 });
        let grid = Anchors::grid([(0, UniformClock::new(1000, 10.0, 2).unwrap())]);
        assert_eq!(grid.anchor(grid.place(1), None), Anchor { t_ns: 100_001_000, row: 1 });
    }
}
