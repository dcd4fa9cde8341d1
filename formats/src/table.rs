//! A file of rows and columns, whichever format holds it.
//!
//! A table is opened from its footer alone and reads only the columns and rows that are asked for. It may be read
//! from several threads at once.

use std::collections::{HashMap, VecDeque};
use std::fmt::Debug;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use arrow::array::ArrayRef;
use arrow::datatypes::SchemaRef;

use crate::arrow_ipc::{ArrowTable, FILE_MAGIC, STREAM_MAGIC};
use crate::error::ReadError;

/// Row ranges are half open, ascend, and do not overlap.
pub(crate) trait Table: Debug + Send + Sync {
    fn path(&self) -> &Path;
    /// Root columns as Arrow types.
    fn schema(&self) -> &SchemaRef;
    fn rows(&self) -> usize;
    /// The rows of each row group (of a record batch, in Arrow), in order. Parts of one may cost what the whole costs.
    fn groups(&self) -> Vec<Range<usize>>;
    /// Reads the root columns at positions `columns` of the schema (each at most once, any order), as
    /// `[column][chunk]` in the order asked for. The chunks of every column add up to the rows of `ranges`; where
    /// one chunk ends and the next begins may differ from call to call.
    fn read(&self, columns: &[usize], ranges: &[Range<usize>]) -> Result<Vec<Vec<ArrayRef>>, ReadError>;

    /// Position of a root column.
    fn column(&self, name: &str) -> Result<usize, ReadError> {
        self.schema().column_with_name(name).map(|(at, _)| at).ok_or_else(|| ReadError::MissingColumn {
            path: self.path().to_owned(),
            wanted: name.to_owned(),
            found: self.schema().fields().iter().map(|field| field.name().clone()).collect(),
        })
    }
}

/// Opens a table by what the file begins with, not by its name.
pub(crate) fn open_table(path: &Path) -> Result<Arc<dyn Table>, ReadError> {
    let io = |source| ReadError::Io { path: path.to_owned(), source };
    let mut head = Vec::with_capacity(8);
    File::open(path).map_err(io)?.take(8).read_to_end(&mut head).map_err(io)?;
    if head.starts_with(b"PAR1") || head.starts_with(b"PARE") {
        return Ok(Arc::new(crate::parquet::ParquetTable::open(path)?));
    }
    if head.starts_with(FILE_MAGIC) || head.starts_with(STREAM_MAGIC) {
        return Ok(Arc::new(ArrowTable::open(path)?));
    }
    Err(ReadError::NotATable { path: path.to_owned(), head })
}

/// Items with their rows, by first row, as runs of which no two have rows of one row group: as many as there can be.
pub(crate) fn apart<T>(
    groups: &[Range<usize>],
    items: impl IntoIterator<Item = (T, Range<usize>)>,
) -> Vec<Vec<T>> {
    let mut runs: Vec<Vec<T>> = Vec::new();
    let mut end = 0; // of the last row group that the last run has rows of
    for (item, rows) in items {
        match runs.last_mut() {
            Some(run) if rows.is_empty() || rows.start < end => run.push(item),
            _ => runs.push(vec![item]),
        }
        if !rows.is_empty() {
            let last = groups.partition_point(|group| group.end < rows.end);
            end = groups.get(last).map_or(rows.end, |group| group.end);
        }
    }
    runs
}

/// Footers of the files that were opened last, so that a dataset of many small files does not parse one per read.
#[derive(Debug, Default)]
pub(crate) struct TableCache(Mutex<Footers>);

#[derive(Debug, Default)]
struct Footers {
    tables: HashMap<PathBuf, (Identity, Arc<dyn Table>)>,
    /// By time of opening.
    order: VecDeque<PathBuf>,
}

/// Footers kept at most.
const KEPT: usize = 512;

/// A file that was written anew has another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    len: u64,
    modified: Option<SystemTime>,
}

impl TableCache {
    /// The table at `path`, opened again if the file changed.
    pub(crate) fn open(&self, path: &Path) -> Result<Arc<dyn Table>, ReadError> {
        let found =
            std::fs::metadata(path).map_err(|source| ReadError::Io { path: path.to_owned(), source })?;
        let identity = Identity { len: found.len(), modified: found.modified().ok() };
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, table)) = lock().tables.get(path).filter(|(known, _)| *known == identity) {
            return Ok(Arc::clone(table));
        }
        let table = open_table(path)?; // without the lock: several files open at once
        let mut footers = lock();
        if footers.tables.insert(path.to_owned(), (identity, Arc::clone(&table))).is_none() {
            footers.order.push_back(path.to_owned());
        }
        while footers.order.len() > KEPT {
            if let Some(oldest) = footers.order.pop_front() {
                footers.tables.remove(&oldest);
            }
        }
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Lengths of row groups, and of items with gaps before them, all of any length with nothing too.
        #[test]
        fn no_two_runs_share_a_row_group_and_none_could_be_cut(
            groups in proptest::collection::vec(0_usize..9, 1..9),
            items in proptest::collection::vec((0_usize..4, 0_usize..9), 0..12),
        ) {
            let mut at = 0;
            let groups: Vec<Range<usize>> = groups.iter().map(|rows| { at += rows; at - rows..at }).collect();
            let total = at;
            at = 0;
            let items: Vec<Range<usize>> = items.iter().map(|(gap, rows)| { at += gap + rows; at - rows..at }).collect();
            let items: Vec<Range<usize>> = items.into_iter().filter(|rows| rows.end <= total).collect();
            let runs = apart(&groups, items.iter().map(|rows| (rows.clone(), rows.clone())));
            prop_assert_eq!(&runs.concat(), &items, "all of them, in order");
            let overlap = |a: &Range<usize>, b: &Range<usize>| a.start.max(b.start) < a.end.min(b.end);
            let of = |rows: &[Range<usize>]| -> Vec<usize> {
                (0..groups.len()).filter(|group| rows.iter().any(|rows| overlap(rows, &groups[*group]))).collect()
            };
            let share = |a: &[Range<usize>], b: &[Range<usize>]| of(a).iter().any(|group| of(b).contains(group));
            for (i, run) in runs.iter().enumerate() {
                prop_assert!(runs[i + 1..].iter().all(|other| !share(run, other)));
                let full: Vec<Range<usize>> = run.iter().filter(|rows| !rows.is_empty()).cloned().collect();
                prop_assert!((1..full.len()).all(|cut| share(&full[..cut], &full[cut..])));
            }
        }
    }
}
