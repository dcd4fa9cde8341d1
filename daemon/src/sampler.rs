//! In which order an epoch visits its anchors: a keyed permutation, in O(1) memory.
//!
//! Position `p` of epoch `e` is anchor `Order::anchor(e, p)`; the map is a bijection on `0..anchors` and a pure
//! function of `(seed, epoch, anchors)`, so any position can be asked for at any time, by any rank, after any
//! restart. Changing a constant here changes every user's order: the golden test below is there to notice.
//!
//! The permutation is a Feistel network over `2 * half_bits` bits, walked along its cycle until it lands inside
//! the domain (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The domain is at most four
//! times the anchors, so the walk takes four steps on average at most.

/// The visiting order of one loader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    anchors: u64,
    seed: u64,
    shuffle: Shuffle,
}

/// Whether an epoch is permuted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shuffle {
    /// Anchors in the order of the dataset, every epoch.
    Off,
    /// A permutation of its own for every `(seed, epoch)`.
    Keyed,
}

const ROUNDS: usize = 6;

impl Order {
    pub const fn new(anchors: u64, seed: u64, shuffle: Shuffle) -> Self {
        Self { anchors, seed, shuffle }
    }

    /// Anchors of one epoch.
    pub const fn anchors(&self) -> u64 {
        self.anchors
    }

    /// The order of one epoch.
    pub fn epoch(&self, epoch: u64) -> EpochOrder {
        let keyed = matches!(self.shuffle, Shuffle::Keyed) && self.anchors > 1;
        let permutation = keyed.then(|| Permutation::new(self.anchors, self.seed, epoch));
        EpochOrder { anchors: self.anchors, permutation }
    }
}

/// The order of one epoch.
#[derive(Debug, Clone, Copy)]
pub struct EpochOrder {
    anchors: u64,
    permutation: Option<Permutation>,
}

impl EpochOrder {
    /// The anchor at `position`, which must be below the number of anchors.
    pub fn anchor(&self, position: u64) -> u64 {
        debug_assert!(position < self.anchors, "position {position} of {} anchors", self.anchors);
        match &self.permutation {
            Some(permutation) => permutation.apply(position),
            None => position,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Permutation {
    anchors: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    fn new(anchors: u64, seed: u64, epoch: u64) -> Self {
        let bits = u64::BITS - (anchors - 1).leading_zeros();
        let half_bits = bits.div_ceil(2).max(1);
        // Epochs must not be shifted copies of each other's key schedules: mix before adding.
        let mut state = mix(seed ^ 0x526f_626f_4361_6368) ^ mix(epoch.wrapping_add(0x9e37_79b9_7f4a_7c15));
        let keys = std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(state)
        });
        Self { anchors, half_bits, keys }
    }

    fn apply(&self, position: u64) -> u64 {
        let mut x = position;
        loop {
            x = self.encrypt(x);
            if x < self.anchors {
                return x;
            }
        }
    }

    fn encrypt(&self, x: u64) -> u64 {
        let mask = (1_u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        (left << self.half_bits) | right
    }
}

/// The finaliser of splitmix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn order(anchors: u64, seed: u64, epoch: u64) -> Vec<u64> {
        let epoch = Order::new(anchors, seed, Shuffle::Keyed).epoch(epoch);
        (0..anchors).map(|position| epoch.anchor(position)).collect()
    }

    #[test]
    fn the_order_of_a_seed_never_changes_between_versions() {
        // Computed apart from this code, in Python integers.
        assert_eq!(order(10, 0, 0), GOLDEN_10);
        assert_eq!(order(35_965, 7, 3)[..5], GOLDEN_G1);
    }

    const GOLDEN_10: [u64; 10] = [5, 7, 6, 0, 4, 8, 1, 9, 2, 3];
    const GOLDEN_G1: [u64; 5] = [2314, 23915, 15036, 33966, 623];

    #[test]
    fn without_shuffle_the_order_is_the_datasets() {
        let epoch = Order::new(5, 1, Shuffle::Off).epoch(9);
        assert_eq!((0..5).map(|p| epoch.anchor(p)).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    }

    proptest! {
        #[test]
        fn every_anchor_comes_exactly_once(anchors in 1_u64..3000, seed: u64, epoch: u64) {
            let mut seen = order(anchors, seed, epoch);
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..anchors).collect::<Vec<_>>());
        }

        #[test]
        fn epochs_and_seeds_differ(seed: u64, epoch in 0_u64..1_000_000) {
            prop_assert_ne!(order(1000, seed, epoch), order(1000, seed, epoch + 1));
            prop_assert_ne!(order(1000, seed, epoch), order(1000, seed.wrapping_add(1), epoch));
        }
    }

    #[test]
    fn positions_are_uniform_over_anchors() {
        // Where anchor i of 100 lands, over 20,000 epochs: chi-squared over 100 x 100 cells has 99^2 degrees of
        // freedom; the bound is its mean plus 6 standard deviations, so a fair shuffle fails once in 10^9 runs
        // (and this one never, for it is deterministic).
        const N: usize = 100;
        const EPOCHS: u64 = 20_000;
        let mut cells = vec![0_u32; N * N];
        for epoch in 0..EPOCHS {
            for (position, anchor) in order(N as u64, 42, epoch).into_iter().enumerate() {
                cells[position * N + usize::try_from(anchor).unwrap()] += 1;
            }
        }
        let expected = EPOCHS as f64 / N as f64;
        let chi2: f64 = cells.iter().map(|&c| (f64::from(c) - expected).powi(2) / expected).sum();
        let freedom = ((N - 1) * (N - 1)) as f64;
        assert!((chi2 - freedom).abs() < 6.0 * (2.0 * freedom).sqrt(), "chi2 {chi2}, freedom {freedom}");
    }

    #[test]
    fn neighbours_do_not_stay_neighbours() {
        // In a random permutation of n, about 2 of n - 1 neighbouring positions hold neighbouring anchors.
        let near: usize = (0..50)
            .map(|e| order(10_000, 3, e).windows(2).filter(|w| w[0].abs_diff(w[1]) == 1).count())
            .sum();
        assert!((40..=170).contains(&near), "{near} of an expected 100");
    }
}
