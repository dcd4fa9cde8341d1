//! LeRobot's statistics of a feature: min, max, mean, std, count and quantiles, of an episode and of the dataset.
//!
//! As LeRobot has it, std is the population's, and a dataset's quantiles are the envelope of its episodes': the
//! least of the lower ones, the greatest of the upper ones. Quantiles of an episode come from at most
//! [`SAMPLES`] evenly spaced rows, so that memory does not grow with the episode.

use serde_json::{Map, Value, json};

/// Rows of an episode that quantiles are taken from.
const SAMPLES: u64 = 4096;

/// Quantiles by LeRobot's name.
pub(crate) const QUANTILES: [(&str, f64); 5] =
    [("q01", 0.01), ("q10", 0.10), ("q50", 0.50), ("q90", 0.90), ("q99", 0.99)];

/// The statistics of one feature so far.
#[derive(Debug, Clone)]
pub(crate) struct FeatureStats {
    pub(crate) count: u64,
    channels: Vec<Channel>,
    /// Take every so many rows into the sample.
    stride: u64,
}

#[derive(Debug, Clone)]
struct Channel {
    min: f64,
    max: f64,
    mean: f64,
    /// Sum of squared distances from the mean (Welford).
    m2: f64,
    sample: Vec<f64>,
    quantiles: [f64; QUANTILES.len()],
}

impl FeatureStats {
    /// Of nothing yet; an episode of `rows` rows is to come.
    pub(crate) fn new(dim: usize, rows: u64) -> Self {
        let quantiles = [f64::INFINITY, f64::INFINITY, f64::INFINITY, f64::NEG_INFINITY, f64::NEG_INFINITY];
        let empty = Channel {
            min: f64::INFINITY,
            max: f64::NEG_INFINITY,
            mean: 0.0,
            m2: 0.0,
            sample: Vec::new(),
            quantiles,
        };
        Self { count: 0, channels: vec![empty; dim], stride: rows.div_ceil(SAMPLES).max(1) }
    }

    /// Takes one row in.
    pub(crate) fn push(&mut self, row: impl Iterator<Item = f64>) {
        let sampled = self.count.is_multiple_of(self.stride);
        self.count += 1;
        #[expect(clippy::cast_precision_loss, reason = "exact below 2^53 rows")]
        let count = self.count as f64;
        for (channel, value) in self.channels.iter_mut().zip(row) {
            channel.min = channel.min.min(value);
            channel.max = channel.max.max(value);
            let delta = value - channel.mean;
            channel.mean += delta / count;
            channel.m2 += delta * (value - channel.mean);
            if sampled {
                channel.sample.push(value);
            }
        }
    }

    /// Ends an episode: turns the sample into quantiles.
    pub(crate) fn finish(mut self) -> Self {
        for channel in &mut self.channels {
            let mut sample = std::mem::take(&mut channel.sample);
            sample.sort_unstable_by(f64::total_cmp);
            channel.quantiles = QUANTILES.map(|(_, q)| quantile(&sample, q));
        }
        self
    }

    /// Adds a finished episode to the dataset's statistics (Chan's parallel update).
    pub(crate) fn merge(&mut self, episode: &Self) {
        #[expect(clippy::cast_precision_loss, reason = "exact below 2^53 rows")]
        let (ours, theirs) = (self.count as f64, episode.count as f64);
        let both = ours + theirs;
        self.count += episode.count;
        for (channel, other) in self.channels.iter_mut().zip(&episode.channels) {
            channel.min = channel.min.min(other.min);
            channel.max = channel.max.max(other.max);
            let delta = other.mean - channel.mean;
            channel.mean += delta * theirs / both;
            channel.m2 += other.m2 + delta * delta * ours * theirs / both;
            for (i, (_, q)) in QUANTILES.into_iter().enumerate() {
                let envelope = if q <= 0.5 { f64::min } else { f64::max };
                channel.quantiles[i] = envelope(channel.quantiles[i], other.quantiles[i]);
            }
        }
    }

    /// `(name, a value per channel)`: min, max, mean, std and, if asked for, the quantiles. `count` stands apart.
    pub(crate) fn values(&self, with_quantiles: bool) -> Vec<(&'static str, Vec<f64>)> {
        #[expect(clippy::cast_precision_loss, reason = "exact below 2^53 rows")]
        let count = self.count.max(1) as f64;
        let of = |read: &dyn Fn(&Channel) -> f64| self.channels.iter().map(read).collect::<Vec<_>>();
        let mut values = vec![
            ("min", of(&|channel| channel.min)),
            ("max", of(&|channel| channel.max)),
            ("mean", of(&|channel| channel.mean)),
            ("std", of(&|channel| (channel.m2 / count).sqrt())),
        ];
        if with_quantiles {
            for (i, (name, _)) in QUANTILES.into_iter().enumerate() {
                values.push((name, of(&|channel| channel.quantiles[i])));
            }
        }
        values
    }

    /// As `stats.json` and `episodes_stats.jsonl` have it.
    pub(crate) fn to_json(&self, with_quantiles: bool) -> Value {
        let mut object: Map<String, Value> = self
            .values(with_quantiles)
            .into_iter()
            .map(|(name, values)| (name.to_owned(), json!(values)))
            .collect();
        object.insert("count".to_owned(), json!([self.count]));
        Value::Object(object)
    }
}

/// Linear between the two nearest ranks, as `numpy.quantile`.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    #[expect(clippy::cast_precision_loss, reason = "at most SAMPLES")]
    let rank = q * last as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 <= rank <= last")]
    let below = rank as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * rank.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// numpy 2.2 of `[0.5, -1.0, 2.0, 4.0, 4.0]`: min, max, mean, std, quantiles.
    const WANTED: [f64; 9] = [-1.0, 4.0, 1.9, 1.959_591_794_226_542_6, -0.94, -0.4, 2.0, 4.0, 4.0];

    #[test]
    fn statistics_equal_numpys() {
        let mut stats = FeatureStats::new(1, 5);
        for value in [0.5, -1.0, 2.0, 4.0, 4.0] {
            stats.push(std::iter::once(value));
        }
        for ((name, values), wanted) in stats.finish().values(true).into_iter().zip(WANTED) {
            assert!((values[0] - wanted).abs() < 1e-12, "{name}: {values:?}, wanted {wanted}");
        }
    }

    #[test]
    fn merged_episodes_have_the_statistics_of_all_their_rows() {
        let episode = |values: &[f64]| {
            let mut stats = FeatureStats::new(1, 5);
            values.iter().for_each(|value| stats.push(std::iter::once(*value)));
            stats.finish()
        };
        let mut all = FeatureStats::new(1, 0);
        all.merge(&episode(&[0.5, -1.0]));
        all.merge(&episode(&[2.0, 4.0, 4.0]));
        assert_eq!(all.count, 5);
        for ((name, values), wanted) in all.values(false).into_iter().zip(WANTED) {
            assert!((values[0] - wanted).abs() < 1e-12, "{name}: {values:?}, wanted {wanted}");
        }
    }
}
