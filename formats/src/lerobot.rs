//! LeRobot v2.0, v2.1 and v3 as a layout: one clock for all streams, episodes as row ranges of Parquet files.
//!
//! [`lerobot_meta`](crate::lerobot_meta) says which rows of which file an episode is; what the file says of itself
//! must agree: its number of rows when it is opened, and its `episode_index` column the first time that any of it is
//! read. That first look also decides the clock, see [`crate::lerobot_clock`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::slice;
use std::sync::{Arc, PoisonError};

use robocache_types::{Clock, DType};

use crate::dataset::{EpisodeInfo, Layout, Stream, StreamKind, StreamSchema, TextTable, Values};
use crate::error::{OpenError, ReadError};
use crate::layout::LayoutReader;
use crate::lerobot_clock::{Rows, examine};
use crate::lerobot_files::{DataFile, Place, place};
use crate::lerobot_meta::{EpisodeMeta, Feature, Meta};
use crate::table::{Table, TableCache, apart};
use crate::text::{TextCache, codes, distinct};
use crate::values::{Holds, Origin, elements, holds, numbers};
use crate::warnings::Warned;

#[derive(Debug)]
pub(crate) struct LeRobot {
    root: PathBuf,
    layout: Layout,
    fps: f64,
    streams: Vec<StreamSchema>,
    episodes: Vec<EpisodeInfo>,
    /// Where each episode is.
    places: Vec<Place>,
    files: Vec<DataFile>,
    tasks: Vec<String>,
    warnings: Vec<String>,
    tables: TableCache,
    texts: TextCache,
    warned: Warned,
}

impl LeRobot {
    pub(crate) fn open(root: &Path) -> Result<Self, OpenError> {
        let mut meta = Meta::load(root)?;
        let tables = TableCache::default();
        let (files, places) = place(root, &mut meta, &tables)?;
        let Meta { version, fps, features, episodes, tasks, mut warnings, .. } = meta;
        let first = tables.open(&root.join(&files[places[0].file].path))?;
        let streams = streams(&features, first.as_ref(), &mut warnings)?;
        missing_videos(root, &episodes, &mut warnings);
        let info = |(meta, place): (&EpisodeMeta, &Place)| EpisodeInfo {
            index: meta.index,
            name: {
                let file = files[place.file].path.display();
                format!("{file}, rows {} to {}", place.rows.start, place.rows.end)
            },
            frames: Some(meta.length),
            first_frame: Some(meta.first_frame),
        };
        Ok(Self {
            root: root.to_owned(),
            layout: Layout::LeRobot { version },
            fps,
            streams,
            episodes: episodes.iter().zip(&places).map(info).collect(),
            files,
            places,
            tasks,
            warnings,
            tables,
            texts: TextCache::default(),
            warned: Warned::default(),
        })
    }

    /// The table of a data file, with as many rows as the metadata says.
    fn table(&self, file: &DataFile) -> Result<Arc<dyn Table>, ReadError> {
        let path = self.root.join(&file.path);
        let table = self.tables.open(&path)?;
        if table.rows() != file.rows {
            return Err(ReadError::RowCount { path, wanted: file.rows, found: table.rows() });
        }
        Ok(table)
    }

    /// Clocks of episodes of one file.
    fn clocks(
        &self,
        file: &DataFile,
        table: &dyn Table,
        episodes: &[usize],
    ) -> Result<Vec<Clock>, ReadError> {
        let rows = |episode: usize| Rows {
            rows: self.places[episode].rows.clone(),
            index: self.episodes[episode].index,
        };
        let look = |rows: &[Rows]| examine(table, rows, self.fps, &self.warned);
        let seen = || file.grids.get().map(Vec::as_slice);
        let look_once = || {
            // Several threads may read pieces of the file: one looks, the others wait for it.
            let _looking = file.looking.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(grids) = seen() {
                return Ok(grids);
            }
            let all: Vec<Rows> = file.episodes.iter().map(|episode| rows(*episode)).collect();
            let clocks = look(&all)?.into_iter();
            let grids = clocks.map(|clock| clock.ok().filter(|clock| matches!(clock, Clock::Uniform(_))));
            Ok::<_, ReadError>(file.grids.get_or_init(|| grids.collect()).as_slice())
        };
        let grids = seen().map_or_else(look_once, Ok)?;
        let start = |episode: &usize| self.places[*episode].rows.start;
        let one = |episode: &usize| {
            let at = file.episodes.binary_search_by_key(&start(episode), start);
            match at.ok().and_then(|at| grids[at].clone()) {
                Some(clock) => Ok(clock),
                None => look(&[rows(*episode)])?.remove(0),
            }
        };
        episodes.iter().map(one).collect()
    }

    /// One column as a block of all rows of `ranges`.
    fn values(
        &self,
        stream: usize,
        chunks: &[arrow::array::ArrayRef],
        table: &dyn Table,
        ranges: &[Range<usize>],
    ) -> Result<Values, ReadError> {
        let schema = &self.streams[stream];
        let origin = Origin { path: table.path(), column: &schema.name, ranges, warned: &self.warned };
        match &schema.kind {
            StreamKind::Text => codes(chunks, &self.texts(stream)?, origin),
            _ => numbers(chunks, schema.dtype, &schema.shape, origin),
        }
    }

    /// Episodes by file, each once, by first row.
    fn by_file(&self, episodes: &[usize]) -> BTreeMap<usize, Vec<usize>> {
        let mut by_file: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for episode in episodes {
            by_file.entry(self.places[*episode].file).or_default().push(*episode);
        }
        for members in by_file.values_mut() {
            members.sort_unstable_by_key(|episode| self.places[*episode].rows.start);
            members.dedup();
        }
        by_file
    }

    /// `[episode][stream]` of episodes of one file, each once, by first row.
    fn read_file(
        &self,
        file: &DataFile,
        episodes: &[usize],
        streams: &[usize],
    ) -> Result<Vec<Vec<Stream>>, ReadError> {
        let table = self.table(file)?;
        let table = table.as_ref();
        let clocks = self.clocks(file, table, episodes)?;
        let ranges = join(episodes.iter().map(|episode| self.places[*episode].rows.clone()));
        let mut distinct: Vec<usize> = streams.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let columns = distinct
            .iter()
            .map(|stream| table.column(&self.streams[*stream].name))
            .collect::<Result<Vec<_>, _>>()?;
        let mut blocks = HashMap::new();
        for (stream, chunks) in distinct.iter().zip(table.read(&columns, &ranges)?) {
            let values = self.values(*stream, &chunks, table, &ranges)?;
            if self.streams[*stream].name == "task_index" {
                self.check_tasks(&values, table.path(), &ranges)?;
            }
            blocks.insert(*stream, values);
        }
        let mut at = 0;
        let one = |(episode, clock): (&usize, Clock)| {
            let rows = self.places[*episode].rows.len();
            let from = at;
            at += rows;
            let stream =
                |stream: &usize| Stream { clock: clock.clone(), values: blocks[stream].rows(from, rows) };
            streams.iter().map(stream).collect()
        };
        Ok(episodes.iter().zip(clocks).map(one).collect())
    }

    /// Every frame's task must be in the table, as LeRobot demands (`tasks.iloc[task_index]`).
    fn check_tasks(&self, values: &Values, path: &Path, ranges: &[Range<usize>]) -> Result<(), ReadError> {
        if self.tasks.is_empty() || values.dtype != DType::Int64 {
            return Ok(()); // no table to look into, or a type that the batch shows as it is
        }
        let known = |task: i64| usize::try_from(task).is_ok_and(|task| task < self.tasks.len());
        let tasks =
            values.buffer.as_slice().as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes));
        match tasks.enumerate().find(|(_, task)| !known(*task)) {
            None => Ok(()),
            Some((position, task)) => Err(ReadError::Table {
                path: path.to_owned(),
                what: format!(
                    "row {} has task_index {task}, and the dataset has {} tasks; correct the column or add the task",
                    ranges.iter().cloned().flatten().nth(position).unwrap_or(position),
                    self.tasks.len()
                ),
            }),
        }
    }
}

impl Values {
    /// Some of the rows, in the same buffer.
    pub(crate) fn rows(&self, from: usize, rows: usize) -> Self {
        let row = self.dim * self.dtype.size_bytes();
        Self { rows, buffer: self.buffer.slice_with_length(from * row, rows * row), ..self.clone() }
    }
}

impl LayoutReader for LeRobot {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn streams(&self) -> &[StreamSchema] {
        &self.streams
    }

    fn episodes(&self) -> &[EpisodeInfo] {
        &self.episodes
    }

    fn tasks(&self) -> &[String] {
        &self.tasks
    }

    fn fps(&self) -> Option<f64> {
        Some(self.fps)
    }

    fn files(&self) -> Vec<(String, u64)> {
        self.files.iter().map(|file| (file.path.to_string_lossy().into_owned(), file.size_bytes)).collect()
    }

    fn warnings(&self) -> Vec<String> {
        self.warnings.clone()
    }

    fn units(&self) -> Vec<Vec<usize>> {
        self.files.iter().map(|file| file.episodes.clone()).collect()
    }

    fn pieces(&self, episodes: &[usize]) -> Result<Vec<Vec<usize>>, ReadError> {
        let mut pieces = Vec::new();
        for (file, members) in self.by_file(episodes) {
            let rows = |episode: usize| (episode, self.places[episode].rows.clone());
            pieces.extend(apart(&self.table(&self.files[file])?.groups(), members.into_iter().map(rows)));
        }
        Ok(pieces)
    }

    fn read(&self, episodes: &[usize], streams: &[usize]) -> Result<Vec<Vec<Stream>>, ReadError> {
        let mut read = HashMap::with_capacity(episodes.len());
        for (file, members) in self.by_file(episodes) {
            let found = self.read_file(&self.files[file], &members, streams)?;
            read.extend(members.into_iter().zip(found));
        }
        Ok(episodes.iter().map(|episode| read[episode].clone()).collect())
    }

    fn clock(&self, episode: usize, _: usize) -> Result<Clock, ReadError> {
        let file = &self.files[self.places[episode].file];
        let table = self.table(file)?;
        Ok(self.clocks(file, table.as_ref(), &[episode])?.remove(0))
    }

    fn span(&self, episode: usize) -> Result<(i64, i64), ReadError> {
        let clock = self.clock(episode, 0)?;
        Ok((clock.first_ns(), clock.last_ns()))
    }

    fn texts(&self, stream: usize) -> Result<TextTable, ReadError> {
        let name = &self.streams[stream].name;
        self.texts.get(stream, |into| {
            for file in &self.files {
                let table = self.table(file)?;
                let whole = 0..file.rows;
                let ranges = slice::from_ref(&whole);
                let chunks = table.read(&[table.column(name)?], ranges)?.pop().unwrap_or_default();
                let origin = Origin { path: table.path(), column: name, ranges, warned: &self.warned };
                distinct(&chunks, into, origin)?;
            }
            Ok(())
        })
    }
}

/// What each feature is, by `info.json` and by the columns of the first data file.
fn streams(
    features: &[Feature],
    table: &dyn Table,
    warnings: &mut Vec<String>,
) -> Result<Vec<StreamSchema>, OpenError> {
    let declared: HashSet<&str> = features.iter().map(|feature| feature.name.as_str()).collect();
    let fields = table.schema().fields().iter().map(|field| field.name().as_str());
    let extra: Vec<&str> = fields.filter(|name| !declared.contains(name)).collect();
    if !extra.is_empty() {
        warnings.push(format!(
            "{:?}: columns that info.json does not declare are left alone: {}",
            table.path(),
            extra.join(", ")
        ));
    }
    features.iter().map(|feature| stream(feature, table, warnings)).collect()
}

fn stream(
    feature: &Feature,
    table: &dyn Table,
    warnings: &mut Vec<String>,
) -> Result<StreamSchema, OpenError> {
    let schema = |dtype, shape: &[usize], kind| StreamSchema {
        name: feature.name.clone(),
        dtype,
        shape: shape.to_vec(),
        kind,
        interp: None,
        clock: 0,
    };
    let opaque = |what: String| schema(DType::UInt8, &feature.shape, StreamKind::Opaque { what });
    let declared = match feature.dtype.as_str() {
        "string" => None,
        name => match name.parse::<DType>() {
            Ok(dtype) => Some(dtype),
            Err(_) => return Ok(opaque(name.to_owned())),
        },
    };
    let data_type = table.schema().field(table.column(&feature.name)?).data_type().clone();
    let wrong = || ReadError::ColumnType {
        path: table.path().to_owned(),
        column: feature.name.clone(),
        wanted: format!("{} of shape {:?}", feature.dtype, feature.shape),
        found: data_type.to_string(),
    };
    match (declared, holds(&data_type)) {
        (Some(declared), Holds::Numbers { dtype, lengths }) => {
            if !fits(&lengths, &feature.shape) {
                return Err(wrong().into());
            }
            if dtype != declared {
                warnings.push(format!(
                    "feature {:?} is declared {declared} and stored as {dtype}, which is what is read",
                    feature.name
                ));
            }
            Ok(schema(dtype, &feature.shape, StreamKind::Numeric))
        }
        (None, Holds::Text { lengths })
            if fits(&lengths, &feature.shape) && elements(&feature.shape) == Some(1) =>
        {
            Ok(schema(DType::Int32, &[], StreamKind::Text))
        }
        (None, Holds::Text { .. }) => Ok(opaque(format!("text of shape {:?}", feature.shape))),
        _ => Err(wrong().into()),
    }
}

/// Whether lists of these lengths can hold rows of `shape`; see [`numbers`].
fn fits(lengths: &[Option<usize>], shape: &[usize]) -> bool {
    let agree = |wanted: &[usize]| {
        lengths.len() == wanted.len()
            && lengths.iter().zip(wanted).all(|(found, wanted)| found.is_none_or(|found| found == *wanted))
    };
    let all = elements(shape).unwrap_or(0);
    agree(shape) || agree(&[all]) || (all == 1 && lengths.is_empty())
}

/// One warning per video feature whose files are not all there.
fn missing_videos(root: &Path, episodes: &[EpisodeMeta], warnings: &mut Vec<String>) {
    let mut by_key: BTreeMap<&str, HashSet<&Path>> = BTreeMap::new();
    for (key, path) in episodes.iter().flat_map(|episode| &episode.videos) {
        by_key.entry(key).or_default().insert(path);
    }
    for (key, paths) in by_key {
        let missing = paths.iter().filter(|path| !root.join(path).is_file());
        let (count, first) = missing.fold((0, None), |(count, first): (usize, Option<&Path>), path| {
            (count + 1, Some(first.map_or(*path, |first| first.min(path))))
        });
        if let Some(first) = first {
            warnings.push(format!(
                "video feature {key:?}: {count} of {} files are missing, the first is {first:?}",
                paths.len()
            ));
        }
    }
}

/// Ascending ranges with neighbours made one.
fn join(ranges: impl Iterator<Item = Range<usize>>) -> Vec<Range<usize>> {
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}
