//! When the frames of a LeRobot episode were taken.
//!
//! LeRobot stores float32 seconds that mostly are `frame / fps`, rounded. Where every stamp of an episode agrees with
//! that grid within LeRobot's own tolerance (or is its nearest float32, which is coarser after half an hour), the
//! grid is the clock, exactly. Other stamps (wall clocks) are taken as stored, to the nanosecond. Rows stay rows:
//! equal and backward stamps are an error, since dropping one would shift every frame number behind it.

use std::ops::Range;

use arrow::array::ArrayRef;
use robocache_types::{Clock, DType, UniformClock};

use crate::dataset::Values;
use crate::error::ReadError;
use crate::table::Table;
use crate::time::{Unit, float_ns};
use crate::values::{Holds, Origin, holds, numbers};
use crate::warnings::Warned;

/// Seconds by which LeRobot lets a stamp be off its frame.
const TOLERANCE_S: f64 = 1e-4;
const TIMESTAMP: &str = "timestamp";
const EPISODE_INDEX: &str = "episode_index";

/// Rows of a file that should all be of one episode.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    pub(crate) rows: Range<usize>,
    /// The `episode_index` they should have.
    pub(crate) index: i64,
}

/// The clock of each episode, or what is wrong with it; the outer error is about the file as a whole. Episodes
/// ascend by row.
pub(crate) fn examine(
    table: &dyn Table,
    episodes: &[Rows],
    fps: f64,
    warned: &Warned,
) -> Result<Vec<Result<Clock, ReadError>>, ReadError> {
    let ranges: Vec<Range<usize>> = episodes.iter().map(|episode| episode.rows.clone()).collect();
    let timestamp = table.column(TIMESTAMP).ok();
    let episode_index = table.column(EPISODE_INDEX).ok();
    let columns: Vec<usize> = timestamp.into_iter().chain(episode_index).collect();
    let mut read = table.read(&columns, &ranges)?.into_iter();
    let origin = |column| Origin { path: table.path(), column, ranges: &ranges, warned };
    let stamps = timestamp.and_then(|_| read.next()).map(|chunks| seconds(&chunks, origin(TIMESTAMP)));
    let stamps = stamps.transpose()?;
    let owners =
        episode_index.and_then(|_| read.next()).map(|chunks| integers(&chunks, origin(EPISODE_INDEX)));
    let owners = owners.transpose()?;
    let mut at = 0;
    let one = |episode: &Rows| {
        let here = at..at + episode.rows.len();
        at = here.end;
        if let Some(owners) = &owners {
            let wrong = owners[here.clone()].iter().position(|owner| *owner != episode.index);
            if let Some(i) = wrong {
                return Err(ReadError::EpisodeIndex {
                    path: table.path().to_owned(),
                    row: episode.rows.start + i,
                    wanted: episode.index,
                    found: owners[here.start + i],
                });
            }
        }
        let stamps = stamps.as_ref().map(|(stamps, width)| (&stamps[here], *width));
        clock(table, &episode.rows, stamps, fps)
    };
    Ok(episodes.iter().map(one).collect())
}

/// `stamps` in seconds with the dtype they are stored as; none where the table has no such column.
fn clock(
    table: &dyn Table,
    rows: &Range<usize>,
    stamps: Option<(&[f64], DType)>,
    fps: f64,
) -> Result<Clock, ReadError> {
    let wrong = |source| ReadError::Clock { path: table.path().to_owned(), source };
    let grid = UniformClock::new(0, fps, rows.len()).map_err(wrong)?;
    let Some((stamps, dtype)) = stamps else { return Ok(Clock::Uniform(grid)) };
    if stamps.iter().enumerate().all(|(frame, stamp)| on_grid(frame, *stamp, dtype, fps)) {
        return Ok(Clock::Uniform(grid));
    }
    let mut times: Vec<i64> = Vec::with_capacity(stamps.len());
    for (i, stamp) in stamps.iter().enumerate() {
        let row = rows.start + i;
        let t_ns = float_ns(*stamp, Unit::S).ok_or_else(|| ReadError::BadStamp {
            path: table.path().to_owned(),
            column: TIMESTAMP.to_owned(),
            row,
            found: stamp.to_string(),
            why: "not a number of seconds that fits 64-bit nanoseconds",
        })?;
        if let Some(before_ns) = times.last().copied().filter(|before_ns| *before_ns >= t_ns) {
            let path = table.path().to_owned();
            return Err(ReadError::TimeRunsBackwards { path, row: row - 1, before_ns, after_ns: t_ns });
        }
        times.push(t_ns);
    }
    Clock::from_stamps(times).map_err(wrong)
}

#[expect(clippy::cast_precision_loss, reason = "frames are far below 2^52")]
#[expect(clippy::cast_possible_truncation, reason = "rounding to float32 is the point")]
fn on_grid(frame: usize, stamp: f64, dtype: DType, fps: f64) -> bool {
    let exact = frame as f64 / fps;
    (stamp - exact).abs() <= TOLERANCE_S || (dtype == DType::Float32 && stamp == f64::from(exact as f32))
}

/// Seconds as stored, widened, with the dtype they had. A null is no time.
fn seconds(chunks: &[ArrayRef], origin: Origin<'_>) -> Result<(Vec<f64>, DType), ReadError> {
    let mut before = 0;
    for chunk in chunks {
        if let Some(nulls) = chunk.nulls().filter(|nulls| nulls.null_count() > 0) {
            let first = (0..chunk.len()).find(|i| nulls.is_null(*i)).unwrap_or(0);
            return Err(origin.null(before + first, "a time"));
        }
        before += chunk.len();
    }
    let Some(first) = chunks.first() else { return Ok((Vec::new(), DType::Float64)) };
    match holds(first.data_type()) {
        Holds::Numbers { dtype: dtype @ DType::Float32, .. } => {
            let Values { buffer, .. } = numbers(chunks, dtype, &[], origin)?;
            let (elements, _) = buffer.as_chunks::<4>();
            Ok((elements.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect(), dtype))
        }
        Holds::Numbers { dtype: dtype @ DType::Float64, .. } => {
            let Values { buffer, .. } = numbers(chunks, dtype, &[], origin)?;
            let (elements, _) = buffer.as_chunks::<8>();
            Ok((elements.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect(), dtype))
        }
        _ => Err(origin.wrong_type("float32 or float64 seconds", first.data_type())),
    }
}

fn integers(chunks: &[ArrayRef], origin: Origin<'_>) -> Result<Vec<i64>, ReadError> {
    let Values { buffer, .. } = numbers(chunks, DType::Int64, &[], origin)?;
    Ok(buffer.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect())
}
