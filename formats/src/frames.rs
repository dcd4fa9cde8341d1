//! `layout = "frames"`: tables with a row for each frame, in which a column tells episodes apart.
//!
//! Opening reads that column of every table: an episode is a run of equal values. A value that comes back later, in
//! the same table or in another, is an error, since frames would then be joined that were not recorded together.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use arrow::array::{Array, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Int64Type};

use crate::bound::Bound;
use crate::dataset::{EpisodeInfo, Layout};
use crate::draw::{Axis, Loaded};
use crate::error::{OpenError, ReadError};
use crate::files::relative;
use crate::manifest::{Manifest, StreamDecl, Time};
use crate::table::{Table, TableCache};
use crate::tabular::{Drawn, Opened, Places, first_row, frame_tables, required, type_in};

#[derive(Debug)]
pub(crate) struct FramePlaces {
    tables: Vec<PathBuf>,
    episodes: Vec<Place>,
}

/// The rows of an episode.
#[derive(Debug)]
struct Place {
    table: usize,
    rows: Range<usize>,
}

pub(crate) fn open(root: &Path, manifest: &Manifest) -> Result<Opened<FramePlaces>, OpenError> {
    let frames = &manifest.frames;
    let (directory, paths) = frame_tables(root, manifest)?;
    let axis = Axis {
        time: frames.time.clone().unwrap_or(Time::Rate(1.0)), // `Manifest::parse` sees that there is one
        filter: frames.filter.clone(),
        order: frames.order,
        duplicates: frames.duplicates,
    };
    let fps = match axis.time {
        Time::Rate(hz) => Some(hz),
        Time::Column { .. } => None,
    };
    let tables = TableCache::default();
    let mut streams: Vec<Drawn> = Vec::new();
    let mut files = Vec::with_capacity(paths.len());
    let mut places = FramePlaces { tables: paths, episodes: Vec::new() };
    let mut names = Vec::new();
    for (at, path) in places.tables.iter().enumerate() {
        required(&directory, path, i64::try_from(names.len()).unwrap_or(i64::MAX), &mut files)?;
        let table = tables.open(path)?;
        let type_of = |column: &str| type_in(&*table, column);
        axis.check(path, &type_of)?;
        if at == 0 {
            for decl in declared(manifest, &*table) {
                let bound = Bound::new(&decl, 0, path, &type_of, &|column| first_row(&*table, column))?;
                bound.check_uses(&decl, &manifest.origin)?;
                streams.push(Drawn { bound, axis: axis.clone(), group: 0 });
            }
        }
        streams.iter().try_for_each(|drawn| drawn.bound.check_same(path, &type_of))?;
        match &frames.episode {
            Some(column) => {
                for (name, rows) in runs(&*table, column)? {
                    places.episodes.push(Place { table: at, rows });
                    names.push(name);
                }
            }
            None if table.rows() == 0 => {}
            None => {
                places.episodes.push(Place { table: at, rows: 0..table.rows() });
                names.push(Name::Text(relative(&directory, path)));
            }
        }
    }
    distinct(&names, &places)?;
    let counted = fps.is_some() && axis.filter.is_empty();
    let mut first_frame = 0_u64;
    let mut episodes = Vec::with_capacity(names.len());
    for (at, (name, place)) in names.into_iter().zip(&places.episodes).enumerate() {
        let path = relative(&directory, &places.tables[place.table]);
        let (index, name) = match name {
            Name::Number(index) => (index, format!("{path} rows {:?}", place.rows)),
            Name::Text(name) => (i64::try_from(at).unwrap_or(i64::MAX), name),
        };
        let frames = counted.then_some(place.rows.len());
        episodes.push(EpisodeInfo { index, name, frames, first_frame: counted.then_some(first_frame) });
        first_frame += place.rows.len() as u64;
    }
    Ok(Opened { layout: Layout::Frames, places, streams, episodes, fps, files, warnings: Vec::new(), tables })
}

/// The manifest's streams; where it names none, every column under its own name.
fn declared(manifest: &Manifest, table: &dyn Table) -> Vec<StreamDecl> {
    if !manifest.streams.is_empty() {
        return manifest.streams.clone();
    }
    let every = table.schema().fields().iter().map(|field| StreamDecl {
        name: field.name().clone(),
        line: 1,
        file: None,
        time: None,
        columns: vec![field.name().clone()],
        filter: Vec::new(),
        order: manifest.frames.order,
        // What cannot be averaged is no stream that was asked for by name.
        duplicates: crate::time::Duplicates::Last,
        interp: None,
    });
    every.collect()
}

/// What an episode column calls an episode.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Name {
    Number(i64),
    Text(String),
}

/// The values of a column that tells episodes apart, one a row.
pub(crate) fn names(table: &dyn Table, column: &str) -> Result<Vec<Name>, ReadError> {
    let at = table.column(column)?;
    let found = table.schema().field(at).data_type();
    let text =
        matches!(found, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Dictionary(..));
    if !(found.is_integer() || text) {
        return Err(ReadError::ColumnType {
            path: table.path().to_owned(),
            column: column.to_owned(),
            wanted: "integers or text that tell episodes apart".to_owned(),
            found: found.to_string(),
        });
    }
    let arrow = |source| ReadError::Arrow { path: table.path().to_owned(), source };
    let chunks = table.read(&[at], std::slice::from_ref(&(0..table.rows())))?;
    let mut names = Vec::with_capacity(table.rows());
    for chunk in chunks.iter().flatten() {
        if let Some(row) = (0..chunk.len()).find(|row| chunk.is_null(*row)) {
            return Err(ReadError::Null {
                path: table.path().to_owned(),
                column: column.to_owned(),
                row: names.len() + row,
                what: "the number of an episode".to_owned(),
            });
        }
        if text {
            let chunk = cast(chunk, &DataType::LargeUtf8).map_err(arrow)?;
            names.extend(chunk.as_string::<i64>().iter().flatten().map(|name| Name::Text(name.to_owned())));
        } else {
            let options = arrow::compute::CastOptions { safe: false, ..Default::default() };
            let chunk =
                arrow::compute::cast_with_options(chunk, &DataType::Int64, &options).map_err(arrow)?;
            names.extend(chunk.as_primitive::<Int64Type>().values().iter().map(|&index| Name::Number(index)));
        }
    }
    Ok(names)
}

fn runs(table: &dyn Table, column: &str) -> Result<Vec<(Name, Range<usize>)>, ReadError> {
    let mut runs: Vec<(Name, Range<usize>)> = Vec::new();
    for (row, name) in names(table, column)?.into_iter().enumerate() {
        match runs.last_mut() {
            Some((last, rows)) if *last == name => rows.end = row + 1,
            _ => runs.push((name, row..row + 1)),
        }
    }
    Ok(runs)
}

fn distinct(names: &[Name], places: &FramePlaces) -> Result<(), ReadError> {
    let mut seen: HashMap<&Name, &Place> = HashMap::new();
    for (name, place) in names.iter().zip(&places.episodes) {
        if let Some(before) = seen.insert(name, place) {
            let name = match name {
                Name::Number(index) => index.to_string(),
                Name::Text(name) => format!("{name:?}"),
            };
            return Err(ReadError::Table {
                path: places.tables[place.table].clone(),
                what: format!(
                    "episode {name} comes back at row {} after rows {:?} of {:?}; the rows of an episode must be together",
                    place.rows.start, before.rows, places.tables[before.table]
                ),
            });
        }
    }
    Ok(())
}

impl Places for FramePlaces {
    /// Episodes of one table are decoded in one go, and share what was decoded.
    fn load(
        &self,
        tables: &TableCache,
        episodes: &[usize],
        _group: usize,
        columns: &BTreeSet<&str>,
    ) -> Result<Vec<Loaded>, ReadError> {
        let wanted: BTreeSet<usize> = episodes.iter().map(|&episode| self.episodes[episode].table).collect();
        let mut loaded: Vec<Option<Loaded>> = episodes.iter().map(|_| None).collect();
        for at in wanted {
            let table = tables.open(&self.tables[at])?;
            let of_table = || episodes.iter().map(|&episode| &self.episodes[episode]).enumerate();
            let mut ranges: Vec<Range<usize>> = of_table()
                .filter(|(_, place)| place.table == at)
                .map(|(_, place)| place.rows.clone())
                .collect();
            ranges.sort_by_key(|range| range.start);
            ranges.dedup();
            let all = Loaded::read(&*table, &joined(ranges), columns.iter().copied())?;
            for (position, place) in of_table().filter(|(_, place)| place.table == at) {
                loaded[position] = Some(all.slice(&place.rows));
            }
        }
        Ok(loaded.into_iter().flatten().collect())
    }

    fn rows(&self, episode: usize) -> Option<(&Path, Range<usize>)> {
        let place = &self.episodes[episode];
        Some((&self.tables[place.table], place.rows.clone()))
    }
}

/// Neighbouring ranges made one; they ascend and do not overlap.
fn joined(ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    let mut joined: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}
