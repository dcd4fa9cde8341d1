//! What the made-up robot does: slow sines with a little noise, the same for the same seed.

use std::f64::consts::TAU;

/// Steps in a unit: sensors are quantised, and columns of theirs compress as recorded ones do.
const RESOLUTION: f64 = 8192.0;

/// SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014): a stream of 64-bit
/// numbers that depends on its seed alone and will stay so.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    /// A generator for one thing of one dataset: equal arguments, equal numbers.
    pub(crate) fn new(seed: u64, thing: &str, nth: u64) -> Self {
        let mut rng = Self(seed);
        for byte in thing.bytes() {
            rng.0 ^= u64::from(byte);
            rng.next();
        }
        rng.0 ^= nth.wrapping_mul(0xd6e8_feb8_6659_fd93);
        rng.next();
        rng
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, 1)`.
    pub(crate) fn unit(&mut self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit an f64")]
        let bits = (self.next() >> 11) as f64;
        bits / 9_007_199_254_740_992.0
    }

    /// In `(-1, 1)`, triangular: noise.
    pub(crate) fn noise(&mut self) -> f64 {
        self.unit() - self.unit()
    }
}

/// `dim` channels, each two sines around an offset. Frequencies and amplitudes belong to the stream, phases to the
/// episode.
#[derive(Debug)]
pub(crate) struct Signals {
    channels: Vec<Channel>,
    noise: f64,
    rng: Rng,
}

#[derive(Debug)]
struct Channel {
    offset: f64,
    waves: [Wave; 2],
}

#[derive(Debug)]
struct Wave {
    amplitude: f64,
    /// Radians a second.
    omega: f64,
    phase: f64,
}

impl Signals {
    pub(crate) fn new(seed: u64, stream: &str, episode: u64, dim: u32, noise: f64) -> Self {
        let mut of_stream = Rng::new(seed, stream, u64::MAX);
        let mut rng = Rng::new(seed, stream, episode);
        let channels = (0..dim)
            .map(|_channel| Channel {
                offset: of_stream.noise() * 0.5,
                waves: [0.15, 1.1].map(|hz: f64| Wave {
                    amplitude: (0.2 + 0.5 * of_stream.unit()) * (0.15 / hz).sqrt(),
                    omega: TAU * hz * (0.5 + of_stream.unit()),
                    phase: TAU * rng.unit(),
                }),
            })
            .collect();
        Self { channels, noise, rng }
    }

    /// All channels at `t` seconds, noise included.
    pub(crate) fn at(&mut self, t: f64) -> impl Iterator<Item = f64> {
        let Self { channels, noise, rng } = self;
        let exact = channels.iter().map(move |channel| channel.at(t) + *noise * rng.noise());
        exact.map(|value| (value * RESOLUTION).round() / RESOLUTION)
    }

    /// Appends a row for each of `times`.
    pub(crate) fn fill(&mut self, times: impl Iterator<Item = f64>, rows: &mut Vec<f32>) {
        for t in times {
            #[expect(clippy::cast_possible_truncation, reason = "rounded to the stored dtype")]
            rows.extend(self.at(t).map(|value| value as f32));
        }
    }
}

impl Channel {
    fn at(&self, t: f64) -> f64 {
        let sum: f64 =
            self.waves.iter().map(|wave| wave.amplitude * (wave.omega * t + wave.phase).sin()).sum();
        self.offset + sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_splitmix64() {
        // The first outputs for seed 1234567, as published with the reference implementation.
        let mut rng = Rng(1_234_567);
        assert_eq!(
            [rng.next(), rng.next(), rng.next()],
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }

    #[test]
    fn equal_seeds_give_equal_rows_and_others_do_not() {
        let rows = |seed, episode| {
            let mut rows = Vec::new();
            Signals::new(seed, "state", episode, 3, 0.01).fill((0..50).map(f64::from), &mut rows);
            rows
        };
        assert_eq!(rows(1, 2), rows(1, 2));
        assert_ne!(rows(1, 2), rows(2, 2));
        assert_ne!(rows(1, 2), rows(1, 3));
    }

    #[test]
    fn neighbouring_rows_are_close_and_all_are_bounded() {
        let mut rows = Vec::new();
        Signals::new(0, "state", 0, 1, 0.0).fill((0..1000).map(|k| f64::from(k) / 100.0), &mut rows);
        assert!(rows.windows(2).all(|pair| (pair[0] - pair[1]).abs() < 0.1));
        assert!(rows.iter().all(|value| value.abs() < 2.0));
    }
}
