//! `robocache.toml`: how tables that are not LeRobot's become a dataset. `docs/manifest.md` is its reference.
//!
//! Parsing checks everything that can be known without opening a table: keys, values, what belongs to which layout,
//! and that no path leaves the dataset's root. Every error names the manifest and the line. The order of streams is
//! the order of the file.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use robocache_types::Interp;
use serde::Deserialize;
use toml::Spanned;

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
        let raw: RawManifest = toml::from_str(text).map_err(|error| {
            let at = error.span().map(|span| span.start);
            ManifestError::Syntax {
                path: origin.to_owned(),
                line: at.map(|at| line_of(text, at)),
                message: error.message().to_owned(),
                text: at.map(|at| line_at(text, at).to_owned()).unwrap_or_default(),
            }
        })?;
        Checker { text, origin, layout: raw.layout }.check(raw)
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawManifest {
    layout: Arrangement,
    episodes: Option<Spanned<String>>,
    #[serde(default)]
    streams: RawStreams,
    frames: Option<Spanned<RawFrames>>,
}

/// A table in the order of the file, with where each entry stands in it.
#[derive(Default)]
struct RawStreams(Vec<(String, Spanned<RawStream>)>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStream {
    file: Option<String>,
    time: Option<RawTime>,
    rate: Option<f64>,
    columns: Option<Vec<String>>,
    r#where: Option<BTreeMap<String, Wanted>>,
    order: Option<Order>,
    duplicates: Option<Duplicates>,
    interp: Option<Interp>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFrames {
    files: Option<String>,
    episode: Option<String>,
    time: Option<RawTime>,
    r#where: Option<BTreeMap<String, Wanted>>,
    order: Option<Order>,
    duplicates: Option<Duplicates>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTime {
    column: Option<String>,
    unit: Option<Unit>,
    rate: Option<f64>,
}

impl<'de> Deserialize<'de> for RawStreams {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> serde::de::Visitor<'de> for InOrder {
            type Value = RawStreams;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a table of streams, each [streams.NAME]")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<RawStreams, A::Error> {
                let mut streams = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    streams.push(entry);
                }
                Ok(RawStreams(streams))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// What the rules of a manifest need to know to report that one is broken.
struct Checker<'a> {
    text: &'a str,
    origin: &'a Path,
    layout: Arrangement,
}

impl Checker<'_> {
    fn refuse(&self, at: Option<usize>, key: &str, what: impl Into<String>) -> ManifestError {
        ManifestError::Invalid {
            path: self.origin.to_owned(),
            line: at.map(|at| line_of(self.text, at)),
            key: key.to_owned(),
            what: what.into(),
        }
    }

    fn check(&self, raw: RawManifest) -> Result<Manifest, ManifestError> {
        let name = self.layout.name();
        if let Some(episodes) = &raw.episodes {
            let at = Some(episodes.span().start);
            if self.layout != Arrangement::Streams {
                return Err(self.refuse(
                    at,
                    "episodes",
                    format!("belongs to layout = \"streams\"; with {name:?} say [frames] files and episode"),
                ));
            }
            self.glob(at, "episodes", episodes.get_ref())?;
        }
        let frames = match (raw.frames, self.layout) {
            (Some(frames), Arrangement::Streams) => {
                return Err(self.refuse(
                    Some(frames.span().start),
                    "[frames]",
                    "belongs to layout = \"frames\" and \"nested\"; with \"streams\" each [streams.NAME] has its file",
                ));
            }
            (Some(frames), _) => self.frames(frames)?,
            (None, Arrangement::Frames) => {
                return Err(self.refuse(
                    None,
                    "[frames]",
                    "is missing: layout = \"frames\" needs at least its time, e.g. time = { rate = 10.0 }",
                ));
            }
            (None, _) => FramesDecl::default(),
        };
        if raw.streams.0.is_empty() && self.layout != Arrangement::Frames {
            return Err(self.refuse(
                None,
                "[streams]",
                format!(
                    "layout = {name:?} needs a [streams.NAME] for each stream, with {}time and columns; \
                     `robocached inspect --write-manifest` drafts them",
                    if self.layout == Arrangement::Streams { "file, " } else { "" }
                ),
            ));
        }
        let streams = raw.streams.0.into_iter().map(|(name, stream)| self.stream(name, stream, &frames));
        Ok(Manifest {
            layout: self.layout,
            episodes: raw.episodes.map(Spanned::into_inner),
            streams: streams.collect::<Result<_, _>>()?,
            frames,
            origin: self.origin.to_owned(),
        })
    }

    fn frames(&self, raw: Spanned<RawFrames>) -> Result<FramesDecl, ManifestError> {
        let at = Some(raw.span().start);
        let raw = raw.into_inner();
        if let Some(files) = &raw.files {
            self.glob(at, "[frames] files", files)?;
        }
        let time = self.time(at, "[frames]", raw.time, None)?;
        if time.is_none() && self.layout == Arrangement::Frames {
            return Err(self.refuse(at, "[frames] time", NO_TIME));
        }
        Ok(FramesDecl {
            files: raw.files,
            episode: raw.episode,
            time,
            filter: raw.r#where.unwrap_or_default().into_iter().collect(),
            order: raw.order.unwrap_or_default(),
            duplicates: raw.duplicates.unwrap_or_default(),
        })
    }

    fn stream(
        &self,
        name: String,
        raw: Spanned<RawStream>,
        frames: &FramesDecl,
    ) -> Result<StreamDecl, ManifestError> {
        let at = Some(raw.span().start);
        let raw = raw.into_inner();
        let heading = format!("[streams.{name}]");
        if name.is_empty() {
            return Err(self.refuse(at, &heading, "a stream needs a name"));
        }
        self.belongs(at, &heading, &raw)?;
        if let Some(file) = &raw.file {
            self.inside(at, &format!("{heading} file"), file)?;
        }
        let mut time = self.time(at, &heading, raw.time, raw.rate)?;
        if time.is_none() && self.layout == Arrangement::Nested {
            time.clone_from(&frames.time);
        }
        if time.is_none() && self.layout != Arrangement::Frames {
            return Err(self.refuse(at, &format!("{heading} time"), NO_TIME));
        }
        let columns = raw.columns.unwrap_or_else(|| vec![name.clone()]);
        if columns.is_empty() {
            return Err(self.refuse(at, &format!("{heading} columns"), "names no column"));
        }
        if let Some(twice) = columns.iter().enumerate().find(|(i, column)| columns[..*i].contains(column)) {
            return Err(self.refuse(at, &format!("{heading} columns"), format!("names {:?} twice", twice.1)));
        }
        let duplicates = raw.duplicates.unwrap_or(frames.duplicates);
        if duplicates == Duplicates::Mean && raw.interp == Some(Interp::Slerp) {
            return Err(self.refuse(
                at,
                &format!("{heading} duplicates"),
                "the mean of quaternions is none; with interp = \"slerp\" say \"last\", \"first\" or \"error\"",
            ));
        }
        Ok(StreamDecl {
            name,
            line: at.map_or(0, |at| line_of(self.text, at)),
            file: raw.file,
            time,
            columns,
            filter: raw.r#where.unwrap_or_default().into_iter().collect(),
            order: raw.order.unwrap_or(frames.order),
            duplicates,
            interp: raw.interp,
        })
    }

    /// Refuses keys that mean nothing in this layout, rather than ignore them.
    fn belongs(&self, at: Option<usize>, heading: &str, raw: &RawStream) -> Result<(), ManifestError> {
        let clocked = raw.time.is_some() || raw.rate.is_some();
        let foreign: &[(&str, bool)] = match self.layout {
            Arrangement::Streams => &[],
            Arrangement::Frames => &[
                ("file", raw.file.is_some()),
                ("time", clocked),
                ("where", raw.r#where.is_some()),
                ("order", raw.order.is_some()),
                ("duplicates", raw.duplicates.is_some()),
            ],
            Arrangement::Nested => &[("file", raw.file.is_some()), ("where", raw.r#where.is_some())],
        };
        match foreign.iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((key, _)) => Err(self.refuse(
                at,
                &format!("{heading} {key}"),
                format!("belongs under [frames] with layout = {:?}", self.layout.name()),
            )),
        }
    }

    fn time(
        &self,
        at: Option<usize>,
        heading: &str,
        raw: Option<RawTime>,
        rate: Option<f64>,
    ) -> Result<Option<Time>, ManifestError> {
        let key = format!("{heading} time");
        let time = match (raw, rate) {
            (None, None) => return Ok(None),
            (None, Some(rate)) => Time::Rate(rate),
            (Some(_), Some(_)) => {
                return Err(self.refuse(
                    at,
                    &key,
                    "stands beside rate; rate = R is short for time = { rate = R }",
                ));
            }
            (Some(RawTime { column: Some(column), unit, rate: None }), None) => Time::Column { column, unit },
            (Some(RawTime { column: None, unit: None, rate: Some(rate) }), None) => Time::Rate(rate),
            (Some(_), None) => return Err(self.refuse(at, &key, NO_TIME)),
        };
        match time {
            Time::Rate(hz) if !(1e-9..=1e9).contains(&hz) => Err(self.refuse(
                at,
                &key,
                format!("a rate is a number of hertz from 1e-9 to 1e9, found {hz}"),
            )),
            time => Ok(Some(time)),
        }
    }

    /// A path or glob that names nothing outside the dataset.
    fn inside(&self, at: Option<usize>, key: &str, path: &str) -> Result<(), ManifestError> {
        let leaves = |part| !matches!(part, Component::Normal(_) | Component::CurDir);
        if path.is_empty() {
            return Err(self.refuse(at, key, "is empty"));
        }
        if Path::new(path).components().any(leaves) {
            return Err(self.refuse(
                at,
                key,
                format!("{path:?} must be relative and may not leave the dataset's root"),
            ));
        }
        Ok(())
    }

    /// A glob, which likewise names nothing outside the dataset.
    fn glob(&self, at: Option<usize>, key: &str, pattern: &str) -> Result<(), ManifestError> {
        self.inside(at, key, pattern)?;
        glob::Pattern::new(pattern)
            .map(drop)
            .map_err(|error| self.refuse(at, key, format!("{pattern:?} is no glob: {}", error.msg)))
    }
}

const NO_TIME: &str = "must be { column = \"..\", unit = \"s\" | \"ms\" | \"us\" | \"ns\" } \
     (no unit for an Arrow timestamp), or { rate = HERTZ } where no stamps are stored";

fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1
}

fn line_at(text: &str, at: usize) -> &str {
    text.lines().nth(line_of(text, at) - 1).unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Manifest, ManifestError> {
        Manifest::parse(text, Path::new("flights/robocache.toml"))
    }

    fn refusal(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

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
        let manifest = parse(GYRO).unwrap();
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

    #[test]
    fn what_toml_refuses_names_file_line_and_the_values_allowed() {
        for (text, wanted) in [
            (
                "layout = \"stream\"",
                &["line 1", "flights/robocache.toml", "`streams`, `frames`, `nested`", "layout ="][..],
            ),
            ("layout = \"streams\"\nlayuot = 1", &["line 2", "`layuot`", "`episodes`"][..]),
            (
                "layout = \"streams\"\n[streams.a]\ntime = { column = \"t\", unit = \"min\" }",
                &["line 3", "`s`, `ms`, `us`, `ns`", "unit = \"min\""][..],
            ),
            ("layout = \"streams\"\n[streams.a]\norder = \"up\"", &["line 3", "`error` or `sort`"][..]),
            ("layout = \"streams\"\n[streams.a]\nfiel = \"x\"", &["line 3", "`fiel`", "`file`"][..]),
            (
                "layout = \"streams\"\n[streams.a]\nwhere = { I = [1] }",
                &["line 3", "a boolean, an integer"][..],
            ),
            ("layout = [", &["line 1"][..]),
        ] {
            let error = refusal(text);
            assert!(wanted.iter().all(|part| error.contains(part)), "{text}\n-> {error}");
        }
    }

    #[test]
    fn what_a_layout_cannot_use_is_refused_not_ignored() {
        let stream = "\n[streams.a]\nfile = \"a.parquet\"\ntime = { column = \"t\", unit = \"s\" }\n";
        let streams = format!("layout = \"streams\"{stream}");
        assert!(parse(&streams).is_ok());
        for (text, wanted) in [
            ("layout = \"streams\"".to_owned(), "[streams]: layout = \"streams\" needs a [streams.NAME]"),
            (format!("{streams}rate = 3.0"), "line 2: [streams.a] time: stands beside rate"),
            (format!("{streams}columns = []"), "columns: names no column"),
            (format!("{streams}columns = [\"x\", \"x\"]"), "names \"x\" twice"),
            (format!("{streams}[frames]\ntime = {{ rate = 1.0 }}"), "line 5: [frames]: belongs to"),
            (format!("{streams}duplicates = \"mean\"\ninterp = \"slerp\""), "mean of quaternions"),
            (
                "layout = \"streams\"\n[streams.a]\nfile = \"a\"\ntime = { rate = 1.0, unit = \"s\" }"
                    .to_owned(),
                "[streams.a] time: must be",
            ),
            ("layout = \"streams\"\n[streams.a]\nfile = \"a\"\nrate = 0.0".to_owned(), "found 0"),
            ("layout = \"streams\"\n[streams.a]\nfile = \"a\"".to_owned(), "[streams.a] time: must be"),
            ("layout = \"frames\"".to_owned(), "[frames]: is missing"),
            (
                "layout = \"frames\"\nepisodes = \"*\"\n[frames]\ntime = { rate = 1.0 }".to_owned(),
                "line 2: episodes",
            ),
            (
                format!("layout = \"frames\"\n[frames]\ntime = {{ rate = 1.0 }}{stream}"),
                "[streams.a] file: belongs under [frames]",
            ),
            (
                "layout = \"nested\"\n[frames]\nfiles = \"*\"".to_owned(),
                "[streams]: layout = \"nested\" needs",
            ),
        ] {
            let error = refusal(&text);
            assert!(error.contains(wanted), "{text}\n-> {error}");
        }
    }

    #[test]
    fn no_path_leaves_the_root() {
        for path in ["../x", "/etc/passwd", "a/../../b", ""] {
            let error = refusal(&format!("layout = \"streams\"\nepisodes = {path:?}"));
            assert!(error.contains("line 2: episodes"), "{error}");
            let error = refusal(&format!("layout = \"streams\"\n[streams.a]\nfile = {path:?}\nrate = 1.0"));
            assert!(error.contains("[streams.a] file"), "{error}");
            let error =
                refusal(&format!("layout = \"frames\"\n[frames]\nfiles = {path:?}\ntime = {{ rate = 1.0 }}"));
            assert!(error.contains("[frames] files"), "{error}");
        }
    }
}
