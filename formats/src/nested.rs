//! `layout = "nested"`: tables with a row for each episode, whose cells are lists of frames.
//!
//! A stream takes its time from a list column and its values from others; in one row they have the same length. Several
//! streams of a row may have clocks of their own.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::DataType;

use crate::bound::Bound;
use crate::dataset::{EpisodeInfo, Layout};
use crate::draw::{Axis, Loaded};
use crate::error::{OpenError, ReadError};
use crate::files::relative;
use crate::filter::{check, narrow};
use crate::frames::{Name, names};
use crate::manifest::{Manifest, Time};
use crate::table::{Table, TableCache};
use crate::tabular::{Drawn, Opened, Places, clock_number, first_row, frame_tables, required, type_in};
use crate::time::Site;

/// A group is the streams of one clock: their lists have the same length.
#[derive(Debug)]
pub(crate) struct NestedPlaces {
    tables: Vec<PathBuf>,
    /// Table and row of each episode.
    episodes: Vec<(usize, usize)>,
}

pub(crate) fn open(root: &Path, manifest: &Manifest) -> Result<Opened<NestedPlaces>, OpenError> {
    let (directory, paths) = frame_tables(root, manifest)?;
    let tables = TableCache::default();
    let mut streams: Vec<Drawn> = Vec::new();
    let mut files = Vec::with_capacity(paths.len());
    let mut places = NestedPlaces { tables: paths, episodes: Vec::new() };
    let mut found: Vec<Option<Name>> = Vec::new();
    for (at, path) in places.tables.iter().enumerate() {
        required(&directory, path, i64::try_from(found.len()).unwrap_or(i64::MAX), &mut files)?;
        let table = tables.open(path)?;
        let type_of = |column: &str| element_type(&*table, column);
        for (column, wanted) in &manifest.frames.filter {
            check(&type_in(&*table, column)?, wanted, Site { path, column }).map_err(ReadError::from)?;
        }
        if at == 0 {
            streams = bind(manifest, path, &*table)?;
        }
        for drawn in &streams {
            drawn.axis.check(path, &type_of)?;
            drawn.bound.check_same(path, &type_of)?;
        }
        let kept = kept_rows(manifest, &*table)?;
        let of_rows = match &manifest.frames.episode {
            Some(column) => names(&*table, column)?.into_iter().map(Some).collect(),
            None => vec![None; table.rows()],
        };
        for (row, name) in of_rows.into_iter().enumerate().filter(|(row, _)| kept[*row]) {
            places.episodes.push((at, row));
            found.push(name);
        }
    }
    let mut seen: HashMap<&Name, usize> = HashMap::new();
    for (episode, name) in found.iter().enumerate() {
        let Some(before) = name.as_ref().and_then(|name| seen.insert(name, episode)) else { continue };
        let ((table, row), (first_table, first_row)) = (places.episodes[episode], places.episodes[before]);
        return Err(OpenError::Read(ReadError::Table {
            path: places.tables[table].clone(),
            what: format!(
                "row {row} is the same episode as row {first_row} of {:?}",
                places.tables[first_table]
            ),
        }));
    }
    let mut episodes = Vec::with_capacity(found.len());
    for (at, (name, (table, row))) in found.into_iter().zip(&places.episodes).enumerate() {
        let place = format!("{} row {row}", relative(&directory, &places.tables[*table]));
        let (index, name) = match name {
            Some(Name::Number(index)) => (index, place),
            Some(Name::Text(name)) => (i64::try_from(at).unwrap_or(i64::MAX), name),
            None => (i64::try_from(at).unwrap_or(i64::MAX), place),
        };
        episodes.push(EpisodeInfo { index, name, frames: None, first_frame: None });
    }
    Ok(Opened {
        layout: Layout::Nested,
        places,
        streams,
        episodes,
        fps: None,
        files,
        warnings: Vec::new(),
        tables,
    })
}

fn bind(manifest: &Manifest, path: &Path, table: &dyn Table) -> Result<Vec<Drawn>, OpenError> {
    let mut clocks: Vec<(Option<usize>, Axis)> = Vec::new();
    let mut streams = Vec::with_capacity(manifest.streams.len());
    for (at, decl) in manifest.streams.iter().enumerate() {
        let axis = Axis {
            time: decl.time.clone().unwrap_or(Time::Rate(1.0)), // `Manifest::parse` sees that there is one
            filter: Vec::new(), // of rows, that is of episodes: they were filtered when the dataset was opened
            order: decl.order,
            duplicates: decl.duplicates,
        };
        // Lists without stamps may each have their own length, so each is a clock of its own.
        let alone = matches!(axis.time, Time::Rate(_)).then_some(at);
        let clock = clock_number(&mut clocks, (alone, axis.clone()));
        let peek =
            |column: &str| first_row(table, column).and_then(|rows| elements_of(&rows, path, column, 0));
        let bound = Bound::new(decl, clock, path, &|column| element_type(table, column), &peek)?;
        bound.check_uses(decl, &manifest.origin)?;
        streams.push(Drawn { bound, axis, group: clock });
    }
    Ok(streams)
}

fn kept_rows(manifest: &Manifest, table: &dyn Table) -> Result<Vec<bool>, ReadError> {
    let mut keep = vec![true; table.rows()];
    let every = 0..table.rows();
    for (column, wanted) in &manifest.frames.filter {
        let mut at = 0;
        for chunk in table.read(&[table.column(column)?], std::slice::from_ref(&every))?.iter().flatten() {
            let part = keep.get_mut(at..at + chunk.len()).unwrap_or_default();
            narrow(chunk, wanted, Site { path: table.path(), column }, part)?;
            at += chunk.len();
        }
    }
    Ok(keep)
}

/// The type of a frame in a column of lists.
fn element_type(table: &dyn Table, column: &str) -> Result<DataType, ReadError> {
    match type_in(table, column)? {
        DataType::List(field) | DataType::LargeList(field) | DataType::FixedSizeList(field, _) => {
            Ok(field.data_type().clone())
        }
        found => Err(ReadError::ColumnType {
            path: table.path().to_owned(),
            column: column.to_owned(),
            wanted: "a list with an element for each frame".to_owned(),
            found: found.to_string(),
        }),
    }
}

/// The frames of one cell. `row` is its row in the file; `cell` has that row alone.
fn elements_of(cell: &ArrayRef, path: &Path, column: &str, row: usize) -> Result<ArrayRef, ReadError> {
    if cell.is_empty() || cell.is_null(0) {
        return Err(ReadError::Null {
            path: path.to_owned(),
            column: column.to_owned(),
            row,
            what: "a list of frames".to_owned(),
        });
    }
    Ok(match cell.data_type() {
        DataType::List(_) => cell.as_list::<i32>().value(0),
        DataType::LargeList(_) => cell.as_list::<i64>().value(0),
        _ => cell.as_fixed_size_list().value(0),
    })
}

impl Places for NestedPlaces {
    fn load(
        &self,
        tables: &TableCache,
        episodes: &[usize],
        _group: usize,
        columns: &BTreeSet<&str>,
    ) -> Result<Vec<Loaded>, ReadError> {
        let mut rows: HashMap<usize, BTreeSet<usize>> = HashMap::new();
        for &(table, row) in episodes.iter().map(|&episode| &self.episodes[episode]) {
            rows.entry(table).or_default().insert(row);
        }
        let mut decoded: HashMap<usize, Loaded> = HashMap::new();
        for (at, rows) in rows {
            let table = tables.open(&self.tables[at])?;
            let ranges: Vec<Range<usize>> = rows.into_iter().map(|row| row..row + 1).collect();
            decoded.insert(at, Loaded::read(&*table, &ranges, columns.iter().copied())?);
        }
        let cell = |&episode: &usize| {
            let (table, row) = self.episodes[episode];
            frames_of(&decoded[&table].slice(&(row..row + 1)), row)
        };
        episodes.iter().map(cell).collect()
    }

    /// Without stamps the values tell how many frames there are.
    fn clock_columns<'a>(&self, drawn: &'a Drawn) -> Vec<&'a str> {
        match &drawn.axis.time {
            Time::Column { column, .. } => vec![column.as_str()],
            Time::Rate(_) => drawn.bound.columns.iter().map(|(column, _)| column.as_str()).collect(),
        }
    }

    fn rows(&self, episode: usize) -> Option<(&Path, Range<usize>)> {
        let (table, row) = self.episodes[episode];
        Some((&self.tables[table], row..row + 1))
    }
}

/// The cells of one row as columns of frames. Errors count frames from 0 and name the row with the path.
fn frames_of(row_of_cells: &Loaded, row: usize) -> Result<Loaded, ReadError> {
    let path = &row_of_cells.path;
    let mut columns: HashMap<String, Vec<ArrayRef>> = HashMap::new();
    let mut length: Option<(usize, String)> = None;
    let mut names: Vec<&String> = row_of_cells.columns.keys().collect();
    names.sort();
    for name in names {
        let cell = row_of_cells.columns[name].first().ok_or_else(|| ReadError::Table {
            path: path.clone(),
            what: format!("column {name:?} has no row {row}"),
        })?;
        let frames = elements_of(cell, path, name, row)?;
        match &length {
            Some((wanted, first)) if *wanted != frames.len() => {
                return Err(ReadError::Table {
                    path: path.clone(),
                    what: format!(
                        "row {row}: the list in column {name:?} has {} elements, that in {first:?} has {wanted}",
                        frames.len()
                    ),
                });
            }
            _ => length = Some((frames.len(), name.clone())),
        }
        columns.insert(name.clone(), vec![frames]);
    }
    let length = length.map_or(0, |(length, _)| length);
    // Rows of these columns are frames of one cell: the path says of which, since errors count within it.
    let path = PathBuf::from(format!("{} (row {row})", path.display()));
    Ok(Loaded { path, ranges: std::iter::once(0..length).collect(), columns })
}
