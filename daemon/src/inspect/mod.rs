//! `robocached inspect`: what a dataset holds and what is wrong with it, before anything is trained on it.
//!
//! Facts are gathered into a `Report` and then shown, as JSON or as text with small pictures; nothing is computed
//! while showing. One episode is looked at closely (or all, with `--all`); the rest is metadata.

mod manifest;
mod picture;
mod show;

use std::path::Path;

use anyhow::Context;
use robocache_formats::{
    Dataset, Layout, OpenError, OpenOptions, StreamKind, StreamStats, draft_manifest, stream_stats,
};
use serde::Serialize;

use crate::cli::{self, InspectArgs};
use crate::exit::{Exit, Failure};

/// Everything `inspect` knows.
#[derive(Debug, Serialize)]
struct Report {
    path: String,
    layout: String,
    fps: Option<f64>,
    fingerprint: String,
    episodes: usize,
    /// Where the metadata says.
    frames: Option<u64>,
    tasks: Vec<String>,
    warnings: Vec<String>,
    /// The dataset has no manifest and was looked at with a drafted one; what to check in it.
    drafted: Option<Vec<String>>,
    looked_at: LookedAt,
    streams: Vec<StreamReport>,
}

/// The episode that was looked at, or the first of all of them.
#[derive(Debug, Serialize)]
struct LookedAt {
    /// How many episodes `streams` is about.
    episodes: usize,
    episode_index: i64,
    name: String,
    /// Earliest first and latest last stamp of the episode.
    start_ns: Option<i64>,
    end_ns: Option<i64>,
}

#[derive(Debug, Serialize)]
struct StreamReport {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    /// `numeric`, `text`, or what it is that is not decoded.
    kind: String,
    interp: Option<robocache_types::Interp>,
    /// Streams with the same number share their clock.
    clock: usize,
    /// Rows over time, holes and repeats and all; of one episode.
    mean_rate_hz: Option<f64>,
    /// Distinct texts over all episodes.
    texts: Option<usize>,
    /// Not of opaque streams.
    stats: Option<StreamStats>,
    /// What part of the episode's time line has rows, one character a cell.
    coverage: Option<String>,
}

/// Cells of a time line.
const CELLS: usize = 60;

/// Does what `robocached inspect` was asked to.
///
/// # Errors
///
/// The dataset cannot be opened, has no such episode, or a manifest is in the way of the drafted one.
pub fn run(args: &InspectArgs) -> Result<Exit, Failure> {
    if let Some(target) = &args.write_manifest {
        manifest::write(&args.path, target.as_deref(), args.force)?;
        return Ok(Exit::Ok);
    }
    let (dataset, drafted) = open(args)?;
    let report = report(args, &dataset, drafted)?;
    let text =
        if args.json { format!("{:#}\n", serde_json::to_value(&report)?) } else { show::text(&report) };
    cli::print(&text)?;
    let refused =
        report.streams.iter().filter_map(|stream| stream.stats.as_ref()).any(|stats| stats.error.is_some());
    Ok(if refused { Exit::Failed } else { Exit::Ok })
}

/// Opens the dataset; loose tables with a manifest drafted for the occasion, and what to check in that.
fn open(args: &InspectArgs) -> anyhow::Result<(Dataset, Option<Vec<String>>)> {
    let path = &args.path;
    let manifest = match &args.manifest {
        None => None,
        Some(file) => Some(
            std::fs::read_to_string(file).with_context(|| format!("cannot read the manifest {file:?}"))?,
        ),
    };
    match Dataset::open(path, &OpenOptions { manifest }) {
        Err(error @ OpenError::NotADataset { .. }) if args.manifest.is_none() => {
            let Ok((text, notes)) = draft_manifest(path) else { return Err(error.into()) };
            let dataset = Dataset::open(path, &OpenOptions { manifest: Some(text) }).with_context(|| {
                format!(
                    "{path:?} has no manifest, and the drafted one does not open; \
                     see it with `robocached inspect {} --write-manifest -`",
                    path.display()
                )
            })?;
            Ok((dataset, Some(notes)))
        }
        outcome => Ok((outcome?, None)),
    }
}

fn report(args: &InspectArgs, dataset: &Dataset, drafted: Option<Vec<String>>) -> anyhow::Result<Report> {
    let episodes = dataset.episodes();
    let position = match args.episode {
        None => 0,
        Some(wanted) => {
            let range = episodes.first().zip(episodes.last()).map(|(first, last)| (first.index, last.index));
            let (first, last) = range.unwrap_or_default();
            episodes.iter().position(|episode| episode.index == wanted).with_context(|| {
                format!(
                    "no episode {wanted} in {:?}; it has {} ({first} to {last})",
                    args.path,
                    episodes.len()
                )
            })?
        }
    };
    let looked_at: Vec<usize> = if args.all { (0..episodes.len()).collect() } else { vec![position] };
    let span = dataset.span(position).ok();
    let streams =
        (0..dataset.streams().len()).map(|stream| stream_report(dataset, stream, position, &looked_at, span));
    Ok(Report {
        path: path_name(&args.path),
        layout: layout_name(dataset.layout()),
        fps: dataset.fps(),
        fingerprint: dataset.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect(),
        episodes: episodes.len(),
        frames: episodes.iter().map(|episode| episode.frames.map(|frames| frames as u64)).sum(),
        tasks: dataset.tasks().to_vec(),
        warnings: dataset.warnings(),
        drafted,
        looked_at: LookedAt {
            episodes: looked_at.len(),
            episode_index: episodes[position].index,
            name: episodes[position].name.clone(),
            start_ns: span.map(|span| span.0),
            end_ns: span.map(|span| span.1),
        },
        streams: streams.collect(),
    })
}

fn path_name(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_no_working_directory| path.to_owned()).display().to_string()
}

fn layout_name(layout: &Layout) -> String {
    match layout {
        Layout::LeRobot { version } => format!("LeRobot {version}"),
        Layout::Streams => "stream tables".to_owned(),
        Layout::Frames => "frame tables".to_owned(),
        Layout::Nested => "nested episodes".to_owned(),
        other => format!("{other:?}"),
    }
}

fn stream_report(
    dataset: &Dataset,
    stream: usize,
    position: usize,
    looked_at: &[usize],
    span: Option<(i64, i64)>,
) -> StreamReport {
    let schema = &dataset.streams()[stream];
    let kind = match &schema.kind {
        StreamKind::Numeric => "numeric".to_owned(),
        StreamKind::Text => "text".to_owned(),
        StreamKind::Opaque { what } => what.clone(),
        other => format!("{other:?}"),
    };
    let opaque = matches!(schema.kind, StreamKind::Opaque { .. });
    let stats = (!opaque).then(|| stream_stats(dataset, stream, looked_at));
    let texts = (schema.kind == StreamKind::Text)
        .then(|| dataset.texts(stream).ok().map(|texts| texts.len()))
        .flatten();
    StreamReport {
        name: schema.name.clone(),
        dtype: schema.dtype.to_string(),
        shape: schema.shape.clone(),
        kind,
        interp: schema.interp,
        clock: schema.clock,
        mean_rate_hz: stats.as_ref().filter(|stats| stats.episodes == 1).and_then(mean_rate_hz),
        texts,
        coverage: span.filter(|_| !opaque).and_then(|span| coverage(dataset, stream, position, span)),
        stats,
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn mean_rate_hz(stats: &StreamStats) -> Option<f64> {
    let length_ns = stats.last_ns?.checked_sub(stats.first_ns?)?;
    (length_ns > 0).then(|| stats.rows.saturating_sub(1) as f64 * 1e9 / length_ns as f64)
}

/// The stream's part of the episode's time line. Steps of more than five median ones are holes.
fn coverage(dataset: &Dataset, stream: usize, episode: usize, span: (i64, i64)) -> Option<String> {
    let clock = dataset.clock(episode, stream).ok()?;
    let stamps: Vec<i64> = (0..clock.rows()).map(|row| clock.t_ns(row)).collect();
    let mut steps: Vec<i64> = stamps.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).collect();
    let middle = steps.len() / 2;
    let hole_ns = if steps.is_empty() { 0 } else { steps.select_nth_unstable(middle).1.saturating_mul(5) };
    Some(picture::timeline(&stamps, span, hole_ns, CELLS))
}
