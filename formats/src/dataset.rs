//! A dataset as the daemon sees it, whatever its layout on disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::buffer::Buffer;
use robocache_types::{Clock, DType, Interp};

/// How a dataset lies on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// LeRobot; the version as `info.json` has it.
    LeRobot { version: String },
    /// A table per stream, each with its own clock.
    Streams,
    /// A row per frame.
    Frames,
    /// A row per episode.
    Nested,
}

/// What is known of a stream before any of it is read.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamSchema {
    pub name: String,
    /// Element type as stored; text streams are Int32 codes into [`Dataset::texts`].
    pub dtype: DType,
    /// Of one row; empty for a scalar.
    pub shape: Vec<usize>,
    pub kind: StreamKind,
    /// The manifest's default.
    pub interp: Option<Interp>,
    /// Streams of one clock have equal numbers here: the frames of one are the frames of the other.
    pub clock: usize,
}

impl StreamSchema {
    /// Elements of one row.
    pub fn dim(&self) -> usize {
        self.shape.iter().product()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StreamKind {
    Numeric,
    Text,
    /// Declared, but not something this library decodes (video, images, blobs); says what it is.
    Opaque {
        what: String,
    },
}

/// One episode, before any of it is read.
#[derive(Debug, Clone, PartialEq)]
pub struct EpisodeInfo {
    /// The dataset's own number for it (`episode_index`); unique.
    pub index: i64,
    /// For people: a directory or file and row.
    pub name: String,
    /// Frames, where the metadata says (LeRobot always does).
    pub frames: Option<usize>,
    /// Global number of its first frame, as LeRobot's `dataset_from_index`, where frames are known.
    pub first_frame: Option<u64>,
}

/// One stream of one episode, in memory: `values` has a row for each of the clock's.
#[derive(Debug, Clone)]
pub struct Stream {
    pub clock: Clock,
    pub values: Values,
}

/// A contiguous `[rows, dim]` block of one dtype. The buffer may be a mapped file.
#[derive(Debug, Clone)]
pub struct Values {
    pub dtype: DType,
    pub dim: usize,
    pub rows: usize,
    pub buffer: Buffer,
}

#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// TOML text of a manifest to use instead of the dataset's own `robocache.toml`.
    pub manifest: Option<String>,
}

/// Distinct strings of a text stream, in the order of their codes.
pub type TextTable = Arc<[String]>;

#[derive(Debug)]
pub struct Dataset {
    pub(crate) root: PathBuf,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    #[error("cannot open {path:?}")]
    Io { path: PathBuf, source: std::io::Error },
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    #[error("cannot read {path:?}")]
    Io { path: PathBuf, source: std::io::Error },
}

#[expect(unused_variables, reason = "outline")]
impl Dataset {
    /// Reads metadata and schema only. `path` is a directory (LeRobot, or one with `robocache.toml`), a manifest
    /// file, or a single Parquet / Arrow table with `options.manifest`.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, OpenError> {
        unimplemented!()
    }
    pub fn root(&self) -> &Path {
        &self.root
    }
    pub fn layout(&self) -> &Layout {
        unimplemented!()
    }
    /// Streams in a stable order (LeRobot: of info.json; manifests: of the manifest).
    pub fn streams(&self) -> &[StreamSchema] {
        unimplemented!()
    }
    /// Episodes in a stable order.
    pub fn episodes(&self) -> &[EpisodeInfo] {
        unimplemented!()
    }
    /// Tasks by `task_index`; empty where the layout has none.
    pub fn tasks(&self) -> &[String] {
        unimplemented!()
    }
    /// LeRobot's global rate.
    pub fn fps(&self) -> Option<f64> {
        unimplemented!()
    }
    /// Identity of the content as far as metadata tells: layout, schema, episodes and lengths, relative file names
    /// and sizes. No absolute paths or times: a copy on another machine has the same one.
    pub fn fingerprint(&self) -> [u8; 16] {
        unimplemented!()
    }
    /// What a user should be told once (video files missing, unknown info.json fields, newer minor version, ...).
    pub fn warnings(&self) -> Vec<String> {
        unimplemented!()
    }
    /// Episodes (positions in `episodes()`) that are cheapest read together, e.g. those of one file. A partition.
    pub fn units(&self) -> Vec<Vec<usize>> {
        unimplemented!()
    }
    /// Reads `streams` (positions in `streams()`) of `episodes` (positions; of one unit), as `[episode][stream]`.
    /// Only those columns, the clock's, and those that filters name are decoded.
    pub fn read(&self, episodes: &[usize], streams: &[usize]) -> Result<Vec<Vec<Stream>>, ReadError> {
        unimplemented!()
    }
    /// The clock of one stream of one episode, decoding nothing else.
    pub fn clock(&self, episode: usize, stream: usize) -> Result<Clock, ReadError> {
        unimplemented!()
    }
    /// Earliest first and latest last stamp over all streams the dataset declares.
    pub fn span(&self, episode: usize) -> Result<(i64, i64), ReadError> {
        unimplemented!()
    }
    /// The distinct strings of a text stream over all episodes, sorted; read once and kept.
    pub fn texts(&self, stream: usize) -> Result<TextTable, ReadError> {
        unimplemented!()
    }
}
