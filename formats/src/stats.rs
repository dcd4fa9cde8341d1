//! What a recording is really like: `robocached inspect`.
//!
//! Reports, and never refuses: clocks that stand still or run backwards, nulls and NaN are counted here where a strict
//! read makes errors of them. What cannot be decoded at all is reported as the error it is, for its stream alone.

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type};
use robocache_types::DType;
use serde::Serialize;

use crate::dataset::{Dataset, StreamKind, Values};
use crate::error::ReadError;

/// Bins of a jitter histogram.
pub const BINS: usize = 20;
/// Gaps that are listed.
const LONGEST: usize = 5;

/// One stream, over the episodes that were looked at. Times in nanoseconds, rates in hertz.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StreamStats {
    pub stream: String,
    pub episodes: usize,
    /// As stored, after `where` and before `order` and `duplicates`.
    pub rows: usize,
    /// Of the first and of the last episode.
    pub first_ns: Option<i64>,
    pub last_ns: Option<i64>,
    /// One over the median of the steps that go forward.
    pub median_rate_hz: Option<f64>,
    /// Steps by their ratio to the median step: bin `i` is from `0.5 * 4^(i/20)` to `0.5 * 4^((i+1)/20)` of it; what is
    /// shorter or longer counts in the first or last bin.
    pub jitter: Option<[u64; BINS]>,
    pub gaps_over_1_5_periods: u64,
    pub gaps_over_5_periods: u64,
    /// The longest of those over 1.5 periods, longest first.
    pub longest_gaps: Vec<Gap>,
    /// Rows whose stamp equals that of the row before.
    pub duplicate_stamps: u64,
    /// Rows whose stamp is before that of the row before.
    pub backward_stamps: u64,
    /// Rows whose stamp is null, no number, or too large.
    pub bad_stamps: u64,
    /// Elements, of all rows.
    pub nulls: u64,
    pub nan: u64,
    pub infinite: u64,
    /// Over the finite elements of numeric and boolean streams.
    pub min: Option<f64>,
    pub max: Option<f64>,
    pub mean: Option<f64>,
    /// Why a strict read refuses the stream, or why it could not be looked at; the first reason found.
    pub error: Option<String>,
}

/// A time without rows. The row after it is `row` of the rows of `episode` (a position).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Gap {
    pub episode: usize,
    pub row: usize,
    pub after_ns: i64,
    pub length_ns: i64,
}

/// Rows of a stream before they are settled.
#[derive(Debug, Default)]
pub(crate) struct Raw {
    pub(crate) rows: usize,
    /// Of the rows that have one.
    pub(crate) stamps: Vec<i64>,
    pub(crate) elements: Elements,
}

/// Every stream of the dataset over `episodes` (positions), in the order of the streams.
pub fn stats(dataset: &Dataset, episodes: &[usize]) -> Vec<StreamStats> {
    (0..dataset.streams().len()).map(|stream| stream_stats(dataset, stream, episodes)).collect()
}

/// One stream over `episodes`.
pub fn stream_stats(dataset: &Dataset, stream: usize, episodes: &[usize]) -> StreamStats {
    let mut stats = StreamStats {
        stream: dataset.streams().get(stream).map_or_else(String::new, |schema| schema.name.clone()),
        episodes: episodes.len(),
        rows: 0,
        first_ns: None,
        last_ns: None,
        median_rate_hz: None,
        jitter: None,
        gaps_over_1_5_periods: 0,
        gaps_over_5_periods: 0,
        longest_gaps: Vec::new(),
        duplicate_stamps: 0,
        backward_stamps: 0,
        bad_stamps: 0,
        nulls: 0,
        nan: 0,
        infinite: 0,
        min: None,
        max: None,
        mean: None,
        error: None,
    };
    let mut steps: Vec<Gap> = Vec::new();
    let mut elements = Elements::default();
    for &episode in episodes {
        let raw = match dataset.raw(episode, stream) {
            Ok(raw) => raw,
            Err(error) => {
                stats.error.get_or_insert_with(|| chain(&error));
                continue;
            }
        };
        if let Err(error) = dataset.clock(episode, stream) {
            stats.error.get_or_insert_with(|| chain(&error));
        }
        stats.rows += raw.rows;
        stats.bad_stamps += (raw.rows - raw.stamps.len()) as u64;
        stats.first_ns = stats.first_ns.or_else(|| raw.stamps.first().copied());
        stats.last_ns = raw.stamps.last().copied().or(stats.last_ns);
        elements.add(&raw.elements);
        for (row, pair) in raw.stamps.windows(2).enumerate() {
            match pair[1].cmp(&pair[0]) {
                std::cmp::Ordering::Less => stats.backward_stamps += 1,
                std::cmp::Ordering::Equal => stats.duplicate_stamps += 1,
                std::cmp::Ordering::Greater => steps.push(Gap {
                    episode,
                    row: row + 1,
                    after_ns: pair[0],
                    length_ns: pair[1].saturating_sub(pair[0]),
                }),
            }
        }
    }
    stats.spread(steps);
    stats.nulls = elements.nulls;
    stats.nan = elements.nan;
    stats.infinite = elements.infinite;
    if elements.finite > 0 {
        stats.min = Some(elements.min);
        stats.max = Some(elements.max);
        #[expect(clippy::cast_precision_loss, reason = "fewer than 2^53 elements")]
        let mean = elements.sum / elements.finite as f64;
        stats.mean = Some(mean);
    }
    stats
}

impl StreamStats {
    #[expect(clippy::cast_precision_loss, reason = "steps in nanoseconds, for a report")]
    fn spread(&mut self, mut steps: Vec<Gap>) {
        if steps.is_empty() {
            return;
        }
        let middle = steps.len() / 2;
        let (_, median, _) = steps.select_nth_unstable_by_key(middle, |step| step.length_ns);
        let period = median.length_ns as f64;
        self.median_rate_hz = Some(1e9 / period);
        let mut bins = [0; BINS];
        for step in &steps {
            let ratio = step.length_ns as f64 / period;
            let place = (ratio / 0.5).log2() * 0.5 * BINS as f64; // 0.5 periods is 0, 2 periods is BINS
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..BINS")]
            let bin = place.clamp(0.0, BINS as f64 - 1.0) as usize;
            bins[bin] += 1;
        }
        self.jitter = Some(bins);
        self.gaps_over_5_periods =
            steps.iter().filter(|step| step.length_ns as f64 > 5.0 * period).count() as u64;
        steps.retain(|step| step.length_ns as f64 > 1.5 * period);
        self.gaps_over_1_5_periods = steps.len() as u64;
        steps.sort_by_key(|step| (std::cmp::Reverse(step.length_ns), step.episode, step.row));
        steps.truncate(LONGEST);
        self.longest_gaps = steps;
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Counts over the elements of a stream.
#[derive(Debug)]
pub(crate) struct Elements {
    nulls: u64,
    nan: u64,
    infinite: u64,
    finite: u64,
    min: f64,
    max: f64,
    sum: f64,
}

impl Default for Elements {
    fn default() -> Self {
        Self {
            nulls: 0,
            nan: 0,
            infinite: 0,
            finite: 0,
            min: f64::INFINITY,
            max: f64::NEG_INFINITY,
            sum: 0.0,
        }
    }
}

impl Elements {
    fn add(&mut self, other: &Self) {
        self.nulls += other.nulls;
        self.nan += other.nan;
        self.infinite += other.infinite;
        self.finite += other.finite;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.sum += other.sum;
    }

    /// Counts a column of numbers, booleans, text, or lists of them. A null list is one null.
    pub(crate) fn count(&mut self, column: &ArrayRef) {
        let mut flat = ArrayRef::clone(column);
        loop {
            self.nulls += flat.null_count() as u64;
            flat = match flat.data_type() {
                DataType::List(_) => {
                    let list = flat.as_list::<i32>();
                    let (start, end) = ends(list.value_offsets());
                    list.values().slice(start, end - start)
                }
                DataType::LargeList(_) => {
                    let list = flat.as_list::<i64>();
                    let (start, end) = ends(list.value_offsets());
                    list.values().slice(start, end - start)
                }
                DataType::FixedSizeList(..) => ArrayRef::clone(flat.as_fixed_size_list().values()),
                _ => break,
            };
        }
        let numeric = flat.data_type().is_numeric() || *flat.data_type() == DataType::Boolean;
        let Some(numbers) = numeric.then(|| cast(&flat, &DataType::Float64).ok()).flatten() else { return };
        for value in numbers.as_primitive::<Float64Type>().iter().flatten() {
            if value.is_finite() {
                self.finite += 1;
                self.min = self.min.min(value);
                self.max = self.max.max(value);
                self.sum += value;
            } else if value.is_nan() {
                self.nan += 1;
            } else {
                self.infinite += 1;
            }
        }
    }

    /// Counts values that were read already. Nulls among floats have become NaN by then.
    pub(crate) fn count_values(&mut self, values: &Values) -> Result<(), arrow::error::ArrowError> {
        let data_type = match values.dtype {
            DType::Bool | DType::UInt8 => DataType::UInt8,
            DType::Int8 => DataType::Int8,
            DType::UInt16 => DataType::UInt16,
            DType::Int16 => DataType::Int16,
            DType::UInt32 => DataType::UInt32,
            DType::Int32 => DataType::Int32,
            DType::UInt64 => DataType::UInt64,
            DType::Int64 => DataType::Int64,
            DType::Float16 => DataType::Float16,
            DType::Float32 => DataType::Float32,
            DType::Float64 => DataType::Float64,
            DType::BFloat16 => return Ok(()), // no file holds them
        };
        let data = arrow::array::ArrayData::builder(data_type)
            .len(values.rows * values.dim)
            .add_buffer(values.buffer.clone())
            .align_buffers(true)
            .build()?;
        self.count(&arrow::array::make_array(data));
        Ok(())
    }
}

/// First and last offset of a list array, which may be a slice.
fn ends<O: arrow::array::OffsetSizeTrait>(offsets: &[O]) -> (usize, usize) {
    let first = offsets.first().map_or(0, |offset| offset.as_usize());
    (first, offsets.last().map_or(first, |offset| offset.as_usize()))
}

/// What a reader that can only read strictly knows of a stream.
pub(crate) fn strict(
    reader: &(impl crate::layout::LayoutReader + ?Sized),
    episode: usize,
    stream: usize,
) -> Result<Raw, ReadError> {
    let clock = reader.clock(episode, stream)?;
    let stamps: Vec<i64> = (0..clock.rows()).map(|row| clock.t_ns(row)).collect();
    let mut raw = Raw { rows: stamps.len(), stamps, ..Raw::default() };
    if reader.streams()[stream].kind == StreamKind::Numeric {
        for read in reader.read(&[episode], &[stream])?.iter().flatten() {
            raw.elements.count_values(&read.values).map_err(|source| ReadError::Arrow {
                path: reader.episodes()[episode].name.clone().into(),
                source,
            })?;
        }
    }
    Ok(raw)
}
