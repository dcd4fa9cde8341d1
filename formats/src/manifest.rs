//! `robocache.toml`: how tables that are not LeRobot's become a dataset. `docs/manifest.md` is its reference.
//!
//! Parsing checks everything that can be known without opening a table: keys and values (`raw`), what belongs to
//! which layout, and that no path leaves the dataset's root (`check`). Only a [`Manifest`] that passed leaves this
//! module. Every error names the manifest and the line. The order of streams is the order of the file.

mod check;
mod raw;

use std::path::{Path, PathBuf};

use robocache_types::Interp;
use serde::Deserialize;

use crate::filter::Wanted;
use crate::time::{Duplicates, Order, Unit};

/// The file's name in a dataset's root.
pub const FILE_NAME: &str = "robocache.toml";

/// How the tables lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arrangement {
    /// A table for each stream of an episode.
    Streams,
    /// A row for each frame.
    Frames,
    /// A row for each episode, with lists in it.
    Nested,
}

impl Arrangement {
    const fn name(self) -> &'static str {
        match self {
            Self::Streams => "streams",
            Self::Frames => "frames",
            Self::Nested => "nested",
        }
    }
}

/// A manifest that has been checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    pub layout: Arrangement,
    /// `streams`: each match is one episode; absent: the dataset is one.
    pub episodes: Option<String>,
    /// In the order of the file. Empty only for `frames`, where it means every column.
    pub streams: Vec<StreamDecl>,
    /// `frames` and `nested`.
    pub frames: FramesDecl,
    /// The manifest itself, for errors.
    pub origin: PathBuf,
}

/// Where the time of a stream comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum Time {
    /// Stamps; without a unit where the column is an Arrow timestamp.
    Column { column: String, unit: Option<Unit> },
    /// None are stored: row `k` of the episode is at `k / rate` seconds. Hertz.
    Rate(f64),
}

/// One `[streams.NAME]`.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamDecl {
    pub name: String,
    /// Line of the manifest, from 1.
    pub line: usize,
    /// Relative to the episode; absent: the episode is itself a file.
    pub file: Option<String>,
    pub time: Option<Time>,
    /// Never empty.
    pub columns: Vec<String>,
    pub filter: Vec<(String, Wanted)>,
    pub order: Order,
    pub duplicates: Duplicates,
    pub interp: Option<Interp>,
}

/// `[frames]`: the tables of `layout = "frames"` and `"nested"`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FramesDecl {
    /// A glob; absent where the dataset was opened as a single table.
    pub files: Option<String>,
    pub episode: Option<String>,
    pub time: Option<Time>,
    pub filter: Vec<(String, Wanted)>,
    pub order: Order,
    pub duplicates: Duplicates,
}

/// Why a manifest is refused. Lines count from 1.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    #[error("{}: {message}{}", place(path, *line), excerpt(text))]
    Syntax { path: PathBuf, line: Option<usize>, message: String, text: String },
    #[error("{}: {key}: {what}", place(path, *line))]
    Invalid { path: PathBuf, line: Option<usize>, key: String, what: String },
}

fn place(path: &Path, line: Option<usize>) -> String {
    match line {
        Some(line) => format!("{path:?}, line {line}"),
        None => format!("{path:?}"),
    }
}

fn excerpt(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(", at `{text}`") }
}

impl Manifest {
    /// Checks the text of a manifest; `origin` is what errors call it.
    pub fn parse(text: &str, origin: &Path) -> Result<Self, ManifestError> {
        let raw: raw::RawManifest = toml::from_str(text).map_err(|error| {
            let at = error.span().map(|span| span.start);
            ManifestError::Syntax {
                path: origin.to_owned(),
                line: at.map(|at| line_of(text, at)),
                message: error.message().to_owned(),
                text: at.map(|at| line_at(text, at).to_owned()).unwrap_or_default(),
            }
        })?;
        check::check(raw, text, origin)
    }

    /// What it says, as a name and a size for a dataset's fingerprint: equal for texts that differ in comments and
    /// spacing alone.
    pub(crate) fn identity(&self) -> (String, u64) {
        let mut said = format!("{:?} {:?} {:?}\n", self.layout, self.episodes, self.frames);
        for stream in &self.streams {
            said.push_str(&format!("{:?}\n", StreamDecl { line: 0, ..stream.clone() }));
        }
        let hash = twox_hash::XxHash3_128::oneshot(said.as_bytes());
        (format!("{FILE_NAME} {hash:032x}"), said.len() as u64)
    }
}

/// The line, from 1, of a place in the text.
fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1
}

fn line_at(text: &str, at: usize) -> &str {
    text.lines().nth(line_of(text, at) - 1).unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GYRO: &str = r#"
layout = "streams"
episodes = "flights/*"
[streams.zgyro]
file = "imu_data.parquet"
time = { column = "header.stamp_ns", unit = "ns" }
columns = ["angular_velocity.x", "angular_velocity.y"]
where = { I = 0, ok = true, name = "left", gain = 1.5 }
order = "sort"
duplicates = "mean"
interp = "linear"
[streams.accel]
file = "imu_data.parquet"
rate = 10
"#;

    #[test]
    fn a_manifest_says_what_the_file_says_in_its_order() {
        let manifest = Manifest::parse(GYRO, Path::new("flights/robocache.toml")).unwrap();
        assert_eq!(manifest.episodes.as_deref(), Some("flights/*"));
        let [gyro, accel] = &manifest.streams[..] else { panic!("{manifest:?}") };
        assert_eq!((gyro.name.as_str(), gyro.line), ("zgyro", 4));
        assert_eq!(
            gyro.time,
            Some(Time::Column { column: "header.stamp_ns".to_owned(), unit: Some(Unit::Ns) })
        );
        assert_eq!(gyro.columns, ["angular_velocity.x", "angular_velocity.y"]);
        assert_eq!(
            gyro.filter,
            [
                ("I".to_owned(), Wanted::Int(0)),
                ("gain".to_owned(), Wanted::Float(1.5)),
                ("name".to_owned(), Wanted::Text("left".to_owned())),
                ("ok".to_owned(), Wanted::Bool(true)),
            ]
        );
        assert_eq!(
            (gyro.order, gyro.duplicates, gyro.interp),
            (Order::Sort, Duplicates::Mean, Some(Interp::Linear))
        );
        assert_eq!(
            (accel.time.clone(), accel.columns.as_slice()),
            (Some(Time::Rate(10.0)), &["accel".to_owned()][..])
        );
        assert_eq!((accel.order, accel.duplicates), (Order::Error, Duplicates::Last));
    }
}
