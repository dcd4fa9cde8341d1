//! What the layouts of a manifest have in common: everything but where the rows of an episode are.
//!
//! A layout is [`Places`]: it decodes named columns of episodes. `Tabular` turns them into clocks and streams. Streams
//! that come from the same rows are one *group* and are decoded together; those that also share their time, filter
//! and rules have one *clock* and are settled together.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use arrow::array::ArrayRef;
use arrow::datatypes::DataType;
use robocache_types::Clock;

use crate::bound::Bound;
use crate::dataset::{EpisodeInfo, Layout, Stream, StreamKind, StreamSchema, TextTable};
use crate::draw::{Axis, Loaded};
use crate::error::{OpenError, ReadError};
use crate::layout::LayoutReader;
use crate::manifest::Manifest;
use crate::stats::Raw;
use crate::table::{Table, TableCache, apart};
use crate::text::TextCache;
use crate::warnings::Warned;

/// Where the rows of episodes are.
pub(crate) trait Places: Debug + Send + Sync {
    /// Decodes columns of the rows of one group, for each of `episodes` in the order asked for. What the streams of
    /// the group name exists; `columns` may be empty.
    fn load(
        &self,
        tables: &TableCache,
        episodes: &[usize],
        group: usize,
        columns: &BTreeSet<&str>,
    ) -> Result<Vec<Loaded>, ReadError>;

    /// The columns that tell the clock of a stream.
    fn clock_columns<'a>(&self, drawn: &'a Drawn) -> Vec<&'a str> {
        drawn.axis.columns().collect()
    }

    /// The table that all of an episode is in, and its rows there; none where it is in several.
    fn rows(&self, _episode: usize) -> Option<(&Path, Range<usize>)> {
        None
    }
}

/// A stream with how its rows are put on a clock, and the group whose rows they are.
#[derive(Debug)]
pub(crate) struct Drawn {
    pub(crate) bound: Bound,
    pub(crate) axis: Axis,
    pub(crate) group: usize,
}

/// What a layout has found out by opening.
#[derive(Debug)]
pub(crate) struct Opened<P> {
    pub(crate) layout: Layout,
    pub(crate) places: P,
    pub(crate) streams: Vec<Drawn>,
    pub(crate) episodes: Vec<EpisodeInfo>,
    pub(crate) fps: Option<f64>,
    /// Relative names and sizes.
    pub(crate) files: Vec<(String, u64)>,
    pub(crate) warnings: Vec<String>,
    pub(crate) tables: TableCache,
}

/// A dataset described by a manifest.
#[derive(Debug)]
pub(crate) struct Tabular<P> {
    opened: Opened<P>,
    schemas: Vec<StreamSchema>,
    spans: Vec<OnceLock<(i64, i64)>>,
    texts: TextCache,
    warned: Warned,
}

/// Opens the dataset that a manifest describes. `root` is its directory, or a single table.
pub(crate) fn open(root: &Path, origin: &Path, text: &str) -> Result<Box<dyn LayoutReader>, OpenError> {
    let manifest = Manifest::parse(text, origin)?;
    match manifest.layout {
        crate::manifest::Arrangement::Streams => {
            Tabular::boxed(crate::streams::open(root, &manifest)?, &manifest)
        }
        crate::manifest::Arrangement::Frames => {
            Tabular::boxed(crate::frames::open(root, &manifest)?, &manifest)
        }
        crate::manifest::Arrangement::Nested => {
            Tabular::boxed(crate::nested::open(root, &manifest)?, &manifest)
        }
    }
}

impl<P: Places + 'static> Tabular<P> {
    fn boxed(mut opened: Opened<P>, manifest: &Manifest) -> Result<Box<dyn LayoutReader>, OpenError> {
        opened.files.push(manifest.identity());
        let schemas = opened.streams.iter().map(|drawn| drawn.bound.schema.clone()).collect();
        let spans = opened.episodes.iter().map(|_| OnceLock::new()).collect();
        Ok(Box::new(Self { opened, schemas, spans, texts: TextCache::default(), warned: Warned::default() }))
    }

    fn load(
        &self,
        episodes: &[usize],
        group: usize,
        columns: &BTreeSet<&str>,
    ) -> Result<Vec<Loaded>, ReadError> {
        self.opened.places.load(&self.opened.tables, episodes, group, columns)
    }
}

impl<P: Places + 'static> LayoutReader for Tabular<P> {
    fn layout(&self) -> &Layout {
        &self.opened.layout
    }

    fn streams(&self) -> &[StreamSchema] {
        &self.schemas
    }

    fn episodes(&self) -> &[EpisodeInfo] {
        &self.opened.episodes
    }

    fn fps(&self) -> Option<f64> {
        self.opened.fps
    }

    fn files(&self) -> Vec<(String, u64)> {
        self.opened.files.clone()
    }

    fn warnings(&self) -> Vec<String> {
        self.opened.warnings.clone()
    }

    /// Neighbours in one table.
    fn units(&self) -> Vec<Vec<usize>> {
        let table = |&episode: &usize| self.opened.places.rows(episode).map(|(table, _)| table);
        let all: Vec<usize> = (0..self.opened.episodes.len()).collect();
        all.chunk_by(|a, b| table(a).is_some() && table(a) == table(b)).map(<[usize]>::to_vec).collect()
    }

    fn pieces(&self, episodes: &[usize]) -> Result<Vec<Vec<usize>>, ReadError> {
        let mut by_table: BTreeMap<&Path, Vec<(usize, Range<usize>)>> = BTreeMap::new();
        for &episode in episodes {
            let Some((table, rows)) = self.opened.places.rows(episode) else {
                return Ok(vec![episodes.to_vec()]);
            };
            by_table.entry(table).or_default().push((episode, rows));
        }
        let mut pieces = Vec::new();
        for (table, mut members) in by_table {
            members.sort_unstable_by_key(|(_, rows)| rows.start);
            pieces.extend(apart(&self.opened.tables.open(table)?.groups(), members));
        }
        Ok(pieces)
    }

    fn read(&self, episodes: &[usize], streams: &[usize]) -> Result<Vec<Vec<Stream>>, ReadError> {
        let tables = streams
            .iter()
            .map(|&stream| match self.schemas[stream].kind {
                StreamKind::Text => self.texts(stream).map(Some),
                _ => Ok(None),
            })
            .collect::<Result<Vec<Option<TextTable>>, _>>()?;
        let groups: BTreeSet<usize> =
            streams.iter().map(|&stream| self.opened.streams[stream].group).collect();
        let mut read: Vec<Vec<Option<Stream>>> = vec![vec![None; streams.len()]; episodes.len()];
        for group in groups {
            let of_group = || {
                let drawn = streams.iter().map(|&stream| &self.opened.streams[stream]);
                drawn.zip(&tables).enumerate().filter(|(_, (drawn, _))| drawn.group == group)
            };
            let mut columns = BTreeSet::new();
            for (_, (drawn, _)) in of_group() {
                columns.extend(self.opened.places.clock_columns(drawn));
                columns.extend(drawn.bound.columns.iter().map(|(column, _)| column.as_str()));
            }
            for (loaded, read) in self.load(episodes, group, &columns)?.into_iter().zip(&mut read) {
                let mut settled = HashMap::new();
                for (at, (drawn, texts)) in of_group() {
                    let clock = drawn.bound.schema.clock;
                    let rows = match settled.entry(clock) {
                        Entry::Occupied(rows) => rows.into_mut(),
                        Entry::Vacant(place) => place.insert(loaded.settle(&drawn.axis)?),
                    };
                    read[at] = Some(loaded.stream(&drawn.bound, rows, texts.as_deref(), &self.warned)?);
                }
            }
        }
        Ok(read.into_iter().map(|episode| episode.into_iter().flatten().collect()).collect())
    }

    fn clock(&self, episode: usize, stream: usize) -> Result<Clock, ReadError> {
        let drawn = &self.opened.streams[stream];
        let columns = self.opened.places.clock_columns(drawn).into_iter().collect();
        let loaded = self.load(&[episode], drawn.group, &columns)?;
        let loaded = loaded
            .first()
            .ok_or(ReadError::NoSuchEpisode { position: episode, episodes: self.opened.episodes.len() })?;
        Ok(loaded.settle(&drawn.axis)?.clock)
    }

    fn span(&self, episode: usize) -> Result<(i64, i64), ReadError> {
        if let Some(span) = self.spans[episode].get() {
            return Ok(*span);
        }
        let mut seen = BTreeSet::new();
        let mut span: Option<(i64, i64)> = None;
        for (stream, schema) in self.schemas.iter().enumerate() {
            if seen.insert(schema.clock) {
                let clock = self.clock(episode, stream)?;
                let (first, last) = span.unwrap_or((i64::MAX, i64::MIN));
                span = Some((first.min(clock.first_ns()), last.max(clock.last_ns())));
            }
        }
        // A manifest without streams does not open.
        let span = span.ok_or(ReadError::NoSuchStream { position: 0, streams: 0 })?;
        Ok(*self.spans[episode].get_or_init(|| span))
    }

    fn raw(&self, episode: usize, stream: usize) -> Result<Raw, ReadError> {
        let drawn = &self.opened.streams[stream];
        let mut columns: BTreeSet<&str> = self.opened.places.clock_columns(drawn).into_iter().collect();
        if !matches!(self.schemas[stream].kind, StreamKind::Opaque { .. }) {
            columns.extend(drawn.bound.columns.iter().map(|(column, _)| column.as_str()));
        }
        let mut loaded = self.load(&[episode], drawn.group, &columns)?;
        let loaded = loaded
            .pop()
            .ok_or(ReadError::NoSuchEpisode { position: episode, episodes: self.opened.episodes.len() })?;
        let mut raw = Raw::default();
        let chunks = loaded.raw_stamps(&drawn.axis, &mut raw)?;
        if !matches!(self.schemas[stream].kind, StreamKind::Opaque { .. }) {
            for (column, _) in &drawn.bound.columns {
                loaded.kept_chunks(column, &chunks)?.iter().for_each(|chunk| raw.elements.count(chunk));
            }
        }
        Ok(raw)
    }

    fn texts(&self, stream: usize) -> Result<TextTable, ReadError> {
        let drawn = &self.opened.streams[stream];
        self.texts.get(stream, |distinct| {
            let mut columns: BTreeSet<&str> = self.opened.places.clock_columns(drawn).into_iter().collect();
            columns.extend(drawn.bound.columns.iter().map(|(column, _)| column.as_str()));
            for unit in self.units() {
                for loaded in self.load(&unit, drawn.group, &columns)? {
                    loaded.strings(&drawn.bound, &loaded.settle(&drawn.axis)?, distinct, &self.warned)?;
                }
            }
            Ok(())
        })
    }
}

/// The type of a column of a table.
pub(crate) fn type_in(table: &dyn Table, column: &str) -> Result<DataType, ReadError> {
    Ok(table.schema().field(table.column(column)?).data_type().clone())
}

/// The first row of a column.
pub(crate) fn first_row(table: &dyn Table, column: &str) -> Result<ArrayRef, ReadError> {
    let at = table.column(column)?;
    let empty = || ReadError::Table { path: table.path().to_owned(), what: "holds no rows".to_owned() };
    if table.rows() == 0 {
        return Err(empty());
    }
    table
        .read(&[at], std::slice::from_ref(&(0..1)))?
        .pop()
        .and_then(|mut chunks| chunks.pop())
        .ok_or_else(empty)
}

/// The number of an axis among those seen so far: equal axes of equal rows are one clock.
pub(crate) fn clock_number<K: PartialEq>(seen: &mut Vec<K>, key: K) -> usize {
    seen.iter().position(|known| *known == key).unwrap_or_else(|| {
        seen.push(key);
        seen.len() - 1
    })
}

/// A table that a dataset needs, with its size; `episode` is whose it is.
pub(crate) fn required(
    root: &Path,
    path: &Path,
    episode: i64,
    files: &mut Vec<(String, u64)>,
) -> Result<(), OpenError> {
    let size = crate::files::size_of_file(path).map_err(|source| OpenError::MissingFile {
        path: path.to_owned(),
        episode,
        source,
    })?;
    files.push((crate::files::relative(root, path), size));
    Ok(())
}

/// The tables that a glob of `[frames]` names, or the single table that was opened; and the directory they are in.
pub(crate) fn frame_tables(root: &Path, manifest: &Manifest) -> Result<(PathBuf, Vec<PathBuf>), OpenError> {
    if root.is_file() {
        let directory = root.parent().unwrap_or_else(|| Path::new("")).to_owned();
        return Ok((directory, vec![root.to_owned()]));
    }
    let files = manifest.frames.files.as_deref().ok_or_else(|| OpenError::Metadata {
        path: manifest.origin.clone(),
        what: "[frames] files: must say where the tables are, e.g. files = \"data/*.parquet\"".to_owned(),
    })?;
    let found: Vec<PathBuf> =
        crate::files::find(root, files)?.into_iter().filter(|path| !path.is_dir()).collect();
    if found.is_empty() {
        return Err(OpenError::Metadata {
            path: root.to_owned(),
            what: format!("{files:?} matches no file"),
        });
    }
    Ok((root.to_owned(), found))
}
