//! A dataset as the daemon sees it, whatever its layout on disk.
//!
//! [`Dataset`] checks what a caller asks for and hands it to the reader of the layout; nothing here reads data.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::buffer::Buffer;
use robocache_types::{Clock, DType, Interp};

use crate::error::{OpenError, ReadError};
use crate::fingerprint::fingerprint;
use crate::layout::LayoutReader;
use crate::lerobot::LeRobot;
use crate::stats::Raw;

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

/// How a dataset is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// TOML text of a manifest to use instead of the dataset's own `robocache.toml`.
    pub manifest: Option<String>,
}

/// Distinct strings of a text stream, in the order of their codes.
pub type TextTable = Arc<[String]>;

/// Episodes of streams, opened by their metadata and read on demand. May be read from several threads at once.
#[derive(Debug)]
pub struct Dataset {
    root: PathBuf,
    reader: Box<dyn LayoutReader>,
    fingerprint: [u8; 16],
}

impl Dataset {
    /// Reads metadata and schema only. `path` is a directory (LeRobot, or one with `robocache.toml`), a manifest
    /// file, or a single Parquet / Arrow table with `options.manifest`.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, OpenError> {
        let kind =
            std::fs::metadata(path).map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
        let (root, reader) = match &options.manifest {
            Some(text) => (path.to_owned(), open_manifest(path, None, text)?),
            None if kind.is_dir() => (path.to_owned(), open_directory(path)?),
            None if path.extension().is_some_and(|extension| extension == "toml") => {
                let root = path.parent().unwrap_or_else(|| Path::new("."));
                (root.to_owned(), open_manifest(root, Some(path), &read_text(path)?)?)
            }
            None => {
                return Err(OpenError::NotADataset { path: path.to_owned(), found: "a file".to_owned() });
            }
        };
        if reader.episodes().is_empty() {
            return Err(OpenError::NoEpisodes { path: path.to_owned() });
        }
        let fingerprint = fingerprint(reader.as_ref());
        Ok(Self { root, reader, fingerprint })
    }

    /// The directory (or table) that was opened.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn layout(&self) -> &Layout {
        self.reader.layout()
    }

    /// Streams in a stable order (LeRobot: of info.json; manifests: of the manifest).
    pub fn streams(&self) -> &[StreamSchema] {
        self.reader.streams()
    }

    /// Episodes in a stable order.
    pub fn episodes(&self) -> &[EpisodeInfo] {
        self.reader.episodes()
    }

    /// Tasks by `task_index`; empty where the layout has none.
    pub fn tasks(&self) -> &[String] {
        self.reader.tasks()
    }

    /// LeRobot's global rate.
    pub fn fps(&self) -> Option<f64> {
        self.reader.fps()
    }

    /// Identity of the content as far as metadata tells: layout, schema, episodes and lengths, relative file names
    /// and sizes. No absolute paths or times: a copy on another machine has the same one.
    pub fn fingerprint(&self) -> [u8; 16] {
        self.fingerprint
    }

    /// What a user should be told once (video files missing, unknown info.json fields, newer minor version, ...).
    pub fn warnings(&self) -> Vec<String> {
        self.reader.warnings()
    }

    /// Episodes (positions in `episodes()`) that are cheapest read together, e.g. those of one file. A partition.
    pub fn units(&self) -> Vec<Vec<usize>> {
        self.reader.units()
    }

    /// `episodes` (positions, of one unit) in pieces that may as well be read apart, by several threads: no two have rows
    /// of one row group, or of one record batch of an Arrow file. Opens the unit's file.
    pub fn pieces(&self, episodes: &[usize]) -> Result<Vec<Vec<usize>>, ReadError> {
        episodes.iter().try_for_each(|episode| self.check_episode(*episode))?;
        self.reader.pieces(episodes)
    }

    /// Reads `streams` (positions in `streams()`) of `episodes` (positions; best of one unit), as
    /// `[episode][stream]`. Only those columns, the clock's, and those that filters name are decoded.
    ///
    /// Values of episodes that were read together may share one buffer.
    pub fn read(&self, episodes: &[usize], streams: &[usize]) -> Result<Vec<Vec<Stream>>, ReadError> {
        episodes.iter().try_for_each(|episode| self.check_episode(*episode))?;
        for stream in streams {
            let schema = self.check_stream(*stream)?;
            if let StreamKind::Opaque { what } = &schema.kind {
                return Err(ReadError::Opaque { stream: schema.name.clone(), what: what.clone() });
            }
        }
        self.reader.read(episodes, streams)
    }

    /// The clock of one stream of one episode, decoding nothing else.
    pub fn clock(&self, episode: usize, stream: usize) -> Result<Clock, ReadError> {
        self.check_episode(episode)?;
        self.check_stream(stream)?;
        self.reader.clock(episode, stream)
    }

    /// Earliest first and latest last stamp over all streams the dataset declares.
    pub fn span(&self, episode: usize) -> Result<(i64, i64), ReadError> {
        self.check_episode(episode)?;
        self.reader.span(episode)
    }

    /// The distinct strings of a text stream over all episodes, sorted; read once and kept.
    pub fn texts(&self, stream: usize) -> Result<TextTable, ReadError> {
        let schema = self.check_stream(stream)?;
        if schema.kind != StreamKind::Text {
            let found = match &schema.kind {
                StreamKind::Opaque { what } => what.clone(),
                _ => schema.dtype.to_string(),
            };
            return Err(ReadError::NotText { stream: schema.name.clone(), found });
        }
        self.reader.texts(stream)
    }

    /// The rows of a stream as stored, for reports.
    pub(crate) fn raw(&self, episode: usize, stream: usize) -> Result<Raw, ReadError> {
        self.check_episode(episode)?;
        self.check_stream(stream)?;
        self.reader.raw(episode, stream)
    }

    fn check_episode(&self, position: usize) -> Result<(), ReadError> {
        let episodes = self.reader.episodes().len();
        if position < episodes { Ok(()) } else { Err(ReadError::NoSuchEpisode { position, episodes }) }
    }

    fn check_stream(&self, position: usize) -> Result<&StreamSchema, ReadError> {
        let streams = self.reader.streams();
        streams.get(position).ok_or(ReadError::NoSuchStream { position, streams: streams.len() })
    }
}

fn open_directory(path: &Path) -> Result<Box<dyn LayoutReader>, OpenError> {
    let manifest = path.join("robocache.toml");
    if manifest.is_file() {
        return open_manifest(path, Some(&manifest), &read_text(&manifest)?);
    }
    if path.join("meta/info.json").is_file() {
        return Ok(Box::new(LeRobot::open(path)?));
    }
    Err(OpenError::NotADataset { path: path.to_owned(), found: list(path)? })
}

/// `source` is the file the text came from, for errors; none where the caller gave it.
fn open_manifest(root: &Path, source: Option<&Path>, text: &str) -> Result<Box<dyn LayoutReader>, OpenError> {
    crate::tabular::open(root, source.unwrap_or_else(|| Path::new("the manifest given")), text)
}

fn read_text(path: &Path) -> Result<String, OpenError> {
    std::fs::read_to_string(path).map_err(|source| OpenError::Io { path: path.to_owned(), source })
}

/// What a directory holds, in a few words.
fn list(path: &Path) -> Result<String, OpenError> {
    const SHOWN: usize = 8;
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let mut names = std::fs::read_dir(path)
        .map_err(io)?
        .map(|entry| entry.map(|entry| format!("{:?}", entry.file_name())))
        .collect::<Result<Vec<_>, _>>()
        .map_err(io)?;
    names.sort();
    Ok(match names.len() {
        0 => "an empty directory".to_owned(),
        count if count <= SHOWN => names.join(", "),
        count => format!("{}, and {} more", names[..SHOWN].join(", "), count - SHOWN),
    })
}
