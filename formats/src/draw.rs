//! How a stream is drawn from the columns of a table, whatever the layout: rows are filtered, put on a clock, packed.
//!
//! ```text
//!   decoded columns --where--> kept rows --order, duplicates--> picked rows --pack--> [rows, dim]
//! ```
//!
//! [`Loaded`] is what was decoded, [`Rows`] which of it makes up the streams of one axis.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use arrow::array::{ArrayRef, BooleanArray, new_empty_array};
use arrow::buffer::{Buffer, MutableBuffer};
use arrow::compute::filter;
use arrow::datatypes::DataType;
use half::f16;
use robocache_types::{Clock, DType, UniformClock};

use crate::bound::Bound;
use crate::dataset::{Stream, Values};
use crate::error::ReadError;
use crate::filter::{Wanted, check, narrow};
use crate::manifest::Time;
use crate::stats::Raw;
use crate::table::Table;
use crate::text::{codes, distinct};
use crate::time::{Duplicates, Order, Pick, Site, settle, stamps_ns};
use crate::values::{Origin, numbers, pack};
use crate::warnings::Warned;

/// How rows become a clock. Streams of one table and one axis share their rows.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Axis {
    pub(crate) time: Time,
    pub(crate) filter: Vec<(String, Wanted)>,
    pub(crate) order: Order,
    pub(crate) duplicates: Duplicates,
}

impl Axis {
    /// The columns it is made from.
    pub(crate) fn columns(&self) -> impl Iterator<Item = &str> {
        let time = match &self.time {
            Time::Column { column, .. } => Some(column.as_str()),
            Time::Rate(_) => None,
        };
        time.into_iter().chain(self.filter.iter().map(|(column, _)| column.as_str()))
    }

    /// Refuses columns that cannot be stamps, or never equal what they are compared with.
    pub(crate) fn check(
        &self,
        path: &Path,
        type_of: &dyn Fn(&str) -> Result<DataType, ReadError>,
    ) -> Result<(), ReadError> {
        if let Time::Column { column, unit } = &self.time {
            let none = new_empty_array(&type_of(column)?);
            stamps_ns(&none, *unit, Site { path, column }, &|row| row)?;
        }
        for (column, wanted) in &self.filter {
            check(&type_of(column)?, wanted, Site { path, column })?;
        }
        Ok(())
    }
}

/// Decoded columns; all have the rows of `ranges`.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) path: PathBuf,
    pub(crate) ranges: Vec<Range<usize>>,
    pub(crate) columns: HashMap<String, Vec<ArrayRef>>,
}

impl Loaded {
    /// Decodes columns in one go, each once however often it is named.
    pub(crate) fn read<'a>(
        table: &dyn Table,
        ranges: &[Range<usize>],
        names: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, ReadError> {
        let names: BTreeSet<&str> = names.into_iter().collect();
        let positions = names.iter().map(|name| table.column(name)).collect::<Result<Vec<_>, _>>()?;
        let arrays = table.read(&positions, ranges)?;
        let columns = names.into_iter().map(str::to_owned).zip(arrays).collect();
        Ok(Self { path: table.path().to_owned(), ranges: ranges.to_vec(), columns })
    }

    /// The rows `part` of the table, which must be among those decoded. Nothing is copied.
    pub(crate) fn slice(&self, part: &Range<usize>) -> Self {
        let before = self.ranges.iter().take_while(|range| range.start < part.start);
        let start: usize = before.map(|range| range.end.min(part.start) - range.start).sum();
        let cut = |chunks: &Vec<ArrayRef>| {
            let (mut skip, mut left, mut cut) = (start, part.len(), Vec::new());
            for chunk in chunks {
                let taken = chunk.len().saturating_sub(skip).min(left);
                if taken > 0 {
                    cut.push(chunk.slice(skip, taken));
                }
                (skip, left) = (skip.saturating_sub(chunk.len()), left - taken);
            }
            cut
        };
        let columns = self.columns.iter().map(|(name, chunks)| (name.clone(), cut(chunks))).collect();
        Self { path: self.path.clone(), ranges: vec![part.clone()], columns }
    }

    pub(crate) fn rows(&self) -> usize {
        self.ranges.iter().map(Range::len).sum()
    }

    fn column(&self, name: &str) -> Result<&[ArrayRef], ReadError> {
        self.columns.get(name).map(Vec::as_slice).ok_or_else(|| ReadError::MissingColumn {
            path: self.path.clone(),
            wanted: name.to_owned(),
            found: self.columns.keys().cloned().collect(),
        })
    }

    /// Which of the rows decoded pass the filter.
    fn keep(&self, axis: &Axis) -> Result<Vec<bool>, ReadError> {
        let mut keep = vec![true; self.rows()];
        for (column, wanted) in &axis.filter {
            let mut at = 0;
            for chunk in self.column(column)? {
                let part = keep.get_mut(at..at + chunk.len()).unwrap_or_default();
                narrow(chunk, wanted, Site { path: &self.path, column }, part)?;
                at += chunk.len();
            }
        }
        Ok(keep)
    }

    /// Rows and stamps as they are stored, of the rows that pass the filter; says which those are. Stamps that are none
    /// are left out.
    pub(crate) fn raw_stamps(&self, axis: &Axis, raw: &mut Raw) -> Result<Vec<bool>, ReadError> {
        let keep = self.keep(axis)?;
        raw.rows = keep.iter().filter(|keep| **keep).count();
        match &axis.time {
            Time::Rate(hz) => {
                if let Ok(clock) = UniformClock::new(0, *hz, raw.rows) {
                    let clock = Clock::Uniform(clock);
                    raw.stamps = (0..raw.rows).map(|row| clock.t_ns(row)).collect();
                }
            }
            Time::Column { column, unit } => {
                let site = Site { path: &self.path, column };
                for chunk in narrowed(self.column(column)?, &keep, axis.filter.is_empty(), &self.path)? {
                    match stamps_ns(&chunk, *unit, site, &|row| row) {
                        Ok(stamps) => raw.stamps.extend(stamps),
                        Err(_one_is_bad) => {
                            let each = (0..chunk.len()).map(|row| chunk.slice(row, 1));
                            let good = each.filter_map(|one| stamps_ns(&one, *unit, site, &|row| row).ok());
                            raw.stamps.extend(good.flatten());
                        }
                    }
                }
            }
        }
        Ok(keep)
    }

    /// A column without the rows that a filter leaves out.
    pub(crate) fn kept_chunks(&self, column: &str, keep: &[bool]) -> Result<Vec<ArrayRef>, ReadError> {
        narrowed(self.column(column)?, keep, keep.iter().all(|keep| *keep), &self.path)
    }

    /// Settles which rows make up the streams of an axis, and when each was taken.
    pub(crate) fn settle(&self, axis: &Axis) -> Result<Rows, ReadError> {
        let keep = self.keep(axis)?;
        let every_row = axis.filter.is_empty();
        let kept = keep.iter().filter(|keep| **keep).count();
        if kept == 0 {
            let terms: Vec<String> =
                axis.filter.iter().map(|(column, wanted)| format!("{column:?} = {wanted}")).collect();
            let what = match keep.len() {
                0 => "holds no rows".to_owned(),
                rows => format!("none of {rows} rows has {}", terms.join(" and ")),
            };
            return Err(ReadError::Table { path: self.path.clone(), what });
        }
        let file_rows = self.kept_ranges(&keep);
        let row_of = |position: usize| nth(&file_rows, position);
        let clock = |source| ReadError::Clock { path: self.path.clone(), source };
        let (clock, pick) = match &axis.time {
            Time::Rate(hz) => (Clock::Uniform(UniformClock::new(0, *hz, kept).map_err(clock)?), Pick::All),
            Time::Column { column, unit } => {
                let site = Site { path: &self.path, column };
                let mut stamps = Vec::with_capacity(kept);
                for chunk in narrowed(self.column(column)?, &keep, every_row, &self.path)? {
                    let before = stamps.len();
                    stamps.extend(stamps_ns(&chunk, *unit, site, &|row| row_of(before + row))?);
                }
                let (stamps, pick) = settle(stamps, axis.order, axis.duplicates, site, &row_of)?;
                (Clock::from_stamps(stamps).map_err(clock)?, pick)
            }
        };
        Ok(Rows { clock, keep: (!every_row).then_some(keep), file_rows, pick })
    }

    /// One numeric or text stream of the rows that were settled. `texts` is the table of a text stream.
    pub(crate) fn stream(
        &self,
        bound: &Bound,
        rows: &Rows,
        texts: Option<&[String]>,
        warned: &Warned,
    ) -> Result<Stream, ReadError> {
        let mut parts = Vec::with_capacity(bound.columns.len());
        for (column, shape) in &bound.columns {
            let chunks = self.kept(column, rows)?;
            let origin = Origin { path: &self.path, column, ranges: &rows.file_rows, warned };
            parts.push(match texts {
                Some(texts) => codes(&chunks, texts, origin)?,
                None => numbers(&chunks, bound.schema.dtype, shape, origin)?,
            });
        }
        Ok(Stream { clock: rows.clock.clone(), values: picked(pack(&parts), &rows.pick) })
    }

    /// Adds the strings of a text stream to `into`.
    pub(crate) fn strings(
        &self,
        bound: &Bound,
        rows: &Rows,
        into: &mut BTreeSet<String>,
        warned: &Warned,
    ) -> Result<(), ReadError> {
        for (column, _) in &bound.columns {
            let origin = Origin { path: &self.path, column, ranges: &rows.file_rows, warned };
            distinct(&self.kept(column, rows)?, into, origin)?;
        }
        Ok(())
    }

    fn kept(&self, column: &str, rows: &Rows) -> Result<Vec<ArrayRef>, ReadError> {
        let chunks = self.column(column)?;
        let found: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        if found != self.rows() {
            return Err(ReadError::Table {
                path: self.path.clone(),
                what: format!("column {column:?} has {found} rows where its clock has {}", self.rows()),
            });
        }
        match &rows.keep {
            None => Ok(chunks.to_vec()),
            Some(keep) => narrowed(chunks, keep, false, &self.path),
        }
    }

    fn kept_ranges(&self, keep: &[bool]) -> Vec<Range<usize>> {
        let mut kept: Vec<Range<usize>> = Vec::new();
        for (row, _) in self.ranges.iter().cloned().flatten().zip(keep).filter(|(_, keep)| **keep) {
            match kept.last_mut() {
                Some(last) if last.end == row => last.end += 1,
                _ => kept.push(row..row + 1),
            }
        }
        kept
    }
}

/// The rows of one axis.
#[derive(Debug)]
pub(crate) struct Rows {
    pub(crate) clock: Clock,
    /// Of the rows decoded; absent where all are kept.
    keep: Option<Vec<bool>>,
    /// Rows of the file that were kept, for errors.
    file_rows: Vec<Range<usize>>,
    /// Of the rows kept.
    pick: Pick,
}

fn nth(ranges: &[Range<usize>], position: usize) -> usize {
    let mut left = position;
    for range in ranges {
        if left < range.len() {
            return range.start + left;
        }
        left -= range.len();
    }
    position
}

fn narrowed(
    chunks: &[ArrayRef],
    keep: &[bool],
    every_row: bool,
    path: &Path,
) -> Result<Vec<ArrayRef>, ReadError> {
    if every_row {
        return Ok(chunks.to_vec());
    }
    let mut at = 0;
    let mut narrowed = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let mask = BooleanArray::from(keep.get(at..at + chunk.len()).unwrap_or_default().to_vec());
        at += chunk.len();
        let kept =
            filter(chunk, &mask).map_err(|source| ReadError::Arrow { path: path.to_owned(), source })?;
        narrowed.push(kept);
    }
    Ok(narrowed)
}

/// The rows of a block that were picked, in the order of the pick.
fn picked(values: Values, pick: &Pick) -> Values {
    let row_bytes = values.dim * values.dtype.size_bytes();
    match pick {
        Pick::All => values,
        Pick::Rows(rows) => {
            let mut buffer = MutableBuffer::with_capacity(rows.len() * row_bytes);
            for row in rows {
                buffer.extend_from_slice(&values.buffer[row * row_bytes..(row + 1) * row_bytes]);
            }
            Values { rows: rows.len(), buffer: buffer.into(), ..values }
        }
        Pick::Runs { order, starts } => {
            let runs = starts.windows(2).map(|run| &order[run[0]..run[1]]);
            let buffer = match values.dtype {
                DType::Float16 => means::<2>(
                    &values,
                    runs,
                    |b| f16::from_le_bytes(b).to_f64(),
                    |mean| f16::from_f64(mean).to_le_bytes(),
                ),
                #[expect(clippy::cast_possible_truncation, reason = "rounds to the stream's own precision")]
                DType::Float32 => means::<4>(
                    &values,
                    runs,
                    |b| f32::from_le_bytes(b).into(),
                    |mean| (mean as f32).to_le_bytes(),
                ),
                // `Bound::check_uses` lets only floats through.
                _ => means::<8>(&values, runs, f64::from_le_bytes, f64::to_le_bytes),
            };
            Values { rows: starts.len() - 1, buffer, ..values }
        }
    }
}

/// The mean of each run, element by element, in f64. A run of one row is that row, bit for bit.
fn means<'a, const N: usize>(
    values: &Values,
    runs: impl Iterator<Item = &'a [usize]>,
    decode: impl Fn([u8; N]) -> f64,
    encode: impl Fn(f64) -> [u8; N],
) -> Buffer {
    let (elements, _) = values.buffer.as_chunks::<N>();
    let mut means = MutableBuffer::with_capacity(elements.len() * N);
    for run in runs {
        for k in 0..values.dim {
            if let [row] = run {
                means.extend_from_slice(&elements[row * values.dim + k]);
                continue;
            }
            let sum: f64 = run.iter().map(|row| decode(elements[row * values.dim + k])).sum();
            #[expect(clippy::cast_precision_loss, reason = "a run is shorter than 2^53")]
            means.extend_from_slice(&encode(sum / run.len() as f64));
        }
    }
    means.into()
}
