//! What a manifest must hold to: what belongs to which layout, what must be given, and that no path leaves the root.
//!
//! A key that means nothing where it stands is refused, never ignored. Every refusal names the key, and its line
//! where it has one.

use std::path::{Component, Path};

use robocache_types::Interp;
use toml::Spanned;

use super::raw::{RawFrames, RawManifest, RawStream, RawTime};
use super::{Arrangement, FramesDecl, Manifest, ManifestError, StreamDecl, Time, line_of};
use crate::time::Duplicates;

/// Checks what `text`, which errors call `origin`, was read as.
pub(super) fn check(raw: RawManifest, text: &str, origin: &Path) -> Result<Manifest, ManifestError> {
    Checker { text, origin, layout: raw.layout }.check(raw)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Manifest, ManifestError> {
        Manifest::parse(text, Path::new("flights/robocache.toml"))
    }

    fn refusal(text: &str) -> String {
        parse(text).unwrap_err().to_string()
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
