//! Everything that can go wrong between a path and a column in memory.
//!
//! Errors name the file, and the column and row where there is one; rows count from 0 in the file. `Display` leaves
//! the source out: print the chain.

use std::path::PathBuf;

use robocache_types::ClockError;

/// Why a dataset does not open.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    #[error("cannot open {path:?}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error(
        "{path:?} is no dataset: looked for meta/info.json (LeRobot) and robocache.toml (any other tables), found {found}; \
         give a manifest, or draft one with `robocached inspect --write-manifest`"
    )]
    NotADataset { path: PathBuf, found: String },
    #[error("{path:?} is not the JSON it should be{}", line.map(|line| format!(" (line {line})")).unwrap_or_default())]
    Json { path: PathBuf, line: Option<usize>, source: serde_json::Error },
    #[error("{path:?}: {what}")]
    Metadata { path: PathBuf, what: String },
    #[error("{path:?}: codebase_version {found:?} cannot be read; v2.0, v2.1 and v3.x can")]
    Version { path: PathBuf, found: String },
    #[error("{path:?} holds no episodes")]
    NoEpisodes { path: PathBuf },
    #[error("episode {episode} should be in {path:?}, which is missing")]
    MissingFile { path: PathBuf, episode: i64, source: std::io::Error },
    #[error(transparent)]
    Manifest(#[from] crate::manifest::ManifestError),
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Why a table, or an episode of a dataset, cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    #[error("cannot read {path:?}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path:?} is neither Parquet nor Arrow IPC: it {}", describe_head(head))]
    NotATable { path: PathBuf, head: Vec<u8> },
    #[error("{path:?} is broken or truncated Parquet")]
    Parquet { path: PathBuf, source: parquet::errors::ParquetError },
    #[error("{path:?} is broken or truncated Arrow IPC")]
    Arrow { path: PathBuf, source: arrow::error::ArrowError },
    #[error("{path:?} made the decoder panic: {what}")]
    Panicked { path: PathBuf, what: String },
    #[error("{path:?}: {what}")]
    Table { path: PathBuf, what: String },
    #[error("{path:?} has no column {wanted:?}; it has {found:?}")]
    MissingColumn { path: PathBuf, wanted: String, found: Vec<String> },
    #[error("{path:?}: column {column:?} should hold {wanted}, found {found}")]
    ColumnType { path: PathBuf, column: String, wanted: String, found: String },
    #[error("{path:?}: column {column:?}, row {row}: wanted {wanted} elements, found {found}")]
    RowLength { path: PathBuf, column: String, row: usize, wanted: usize, found: usize },
    #[error("{path:?}: column {column:?}, row {row} is null, which {what} cannot be")]
    Null { path: PathBuf, column: String, row: usize, what: String },
    #[error("{path:?}: {what} would take {bytes} bytes, more than the {limit} that can be right for it")]
    TooLarge { path: PathBuf, what: String, bytes: u128, limit: u128 },
    #[error(
        "{path:?} takes {bytes} bytes decoded, {others} more are being read, and the memory for that is {limit}: ask for \
         fewer of its columns, or give the host or its control group more"
    )]
    NoRoom { path: PathBuf, bytes: u64, others: u64, limit: u64 },
    #[error("{path:?} has {found} rows where the metadata says {wanted}")]
    RowCount { path: PathBuf, wanted: usize, found: usize },
    #[error("{path:?}: row {row} belongs to episode {found}, the metadata says {wanted}")]
    EpisodeIndex { path: PathBuf, row: usize, wanted: i64, found: i64 },
    #[error("{path:?}: stamps must ascend: row {row} has {before_ns} ns, the next {after_ns} ns")]
    TimeRunsBackwards { path: PathBuf, row: usize, before_ns: i64, after_ns: i64 },
    #[error("{path:?}: column {column:?}, row {row}: {found} is no time: {why}")]
    BadStamp { path: PathBuf, column: String, row: usize, found: String, why: &'static str },
    #[error("{path:?} has no usable clock")]
    Clock { path: PathBuf, source: ClockError },
    #[error("there is no episode at position {position}; the dataset has {episodes}")]
    NoSuchEpisode { position: usize, episodes: usize },
    #[error("there is no stream at position {position}; the dataset has {streams}")]
    NoSuchStream { position: usize, streams: usize },
    #[error("stream {stream:?} is {what}, which is not decoded here")]
    Opaque { stream: String, what: String },
    #[error("stream {stream:?} is {found}, not text")]
    NotText { stream: String, found: String },
    #[error(transparent)]
    Time(#[from] crate::time::TimeError),
    #[error(transparent)]
    Filter(#[from] crate::filter::FilterError),
}

fn describe_head(head: &[u8]) -> String {
    match head {
        [] => "is empty".to_owned(),
        head if head.starts_with(b"FEA1") => {
            "is Feather version 1; write it again as Feather version 2 (Arrow IPC)".to_owned()
        }
        head => format!("starts with {:?}", String::from_utf8_lossy(head)),
    }
}
