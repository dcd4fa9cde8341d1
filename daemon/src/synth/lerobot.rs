//! LeRobot v2.1 and v3.0, as LeRobot's own readers want them.
//!
//! One loop makes the episodes; a [`Layout`] puts each into files and keeps the metadata. v2.1: one data file an
//! episode, metadata as JSON lines. v3.0: data files of about 100 MB with a row group for each episode, metadata as
//! Parquet. The formats are those of LeRobot 0.3.3 (v2.1) and 0.4.4 (v3.0).

mod v21;
mod v30;

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use arrow::array::{ArrayRef, Float32Array, Int64Array};
use arrow::datatypes::SchemaRef;
use serde_json::{Map, Value, json};

use super::features::{self, INDEX_COLUMNS, TASKS, Vector};
use super::signal::Signals;
use super::stats::FeatureStats;
use super::table::TableWriter;
use super::{Job, SynthArgs, SynthLayout, Written, blocks, int64};

/// Bytes one frame takes in memory.
pub(crate) fn row_bytes(args: &SynthArgs) -> u64 {
    let floats: u64 = features::vectors(args).iter().map(|vector| u64::from(vector.dim)).sum();
    floats * 4 + 4 + 4 * 8
}

/// One episode's metadata.
pub(crate) struct Episode<'a> {
    pub(crate) index: u64,
    pub(crate) rows: u64,
    /// Global number of its first frame.
    pub(crate) first: u64,
    /// By feature, in the order of `info.json`.
    pub(crate) stats: &'a [(&'static str, FeatureStats)],
}

impl Episode<'_> {
    pub(crate) fn task_index(&self) -> u64 {
        self.index % TASKS.len() as u64
    }

    pub(crate) fn task(&self) -> &'static str {
        usize::try_from(self.task_index()).ok().and_then(|task| TASKS.get(task)).copied().unwrap_or_default()
    }
}

/// Where episodes go.
pub(crate) trait Layout {
    /// The data file that the next episode's rows go into.
    fn data(&mut self, episode: u64) -> anyhow::Result<&mut TableWriter>;
    /// The episode's rows are written.
    fn end_episode(&mut self, episode: &Episode<'_>) -> anyhow::Result<()>;
    /// All episodes are written; writes what remains but `info.json`.
    fn end(self: Box<Self>, stats: &[(&'static str, FeatureStats)]) -> anyhow::Result<Written>;
    /// The fields of `info.json` that are the version's own.
    fn info(&self) -> Map<String, Value>;
}

/// Writes the dataset that `job` asks for.
pub(crate) fn write(job: &Job<'_>) -> anyhow::Result<Written> {
    let args = job.args;
    let schema = features::schema(args);
    let mut layout: Box<dyn Layout> = match args.layout {
        SynthLayout::LerobotV21 => Box::new(v21::V21::new(job, Arc::clone(&schema))?),
        SynthLayout::LerobotV30 | SynthLayout::Streams => Box::new(v30::V30::new(job, Arc::clone(&schema))?),
    };
    let mut total = new_stats(args, 0);
    for index in 0..job.episodes {
        let stats = write_rows(job, index, layout.data(index)?, &schema)?;
        for ((_, total), (_, episode)) in total.iter_mut().zip(&stats) {
            total.merge(episode);
        }
        layout.end_episode(&Episode {
            index,
            rows: args.frames,
            first: index * args.frames,
            stats: &stats,
        })?;
    }
    let info = info(job, layout.info());
    let written = layout.end(&total)?;
    write_text(&args.out.join("meta/info.json"), &format!("{info:#}"))?;
    Ok(Written { frames: job.episodes * args.frames, ..written })
}

fn new_stats(args: &SynthArgs, rows: u64) -> Vec<(&'static str, FeatureStats)> {
    let vectors = features::vectors(args).into_iter().map(|vector| (vector.name, vector.dim as usize));
    let index = INDEX_COLUMNS.into_iter().map(|(name, _)| (name, 1));
    vectors.chain(index).map(|(name, dim)| (name, FeatureStats::new(dim, rows))).collect()
}

fn write_rows(
    job: &Job<'_>,
    episode: u64,
    table: &mut TableWriter,
    schema: &SchemaRef,
) -> anyhow::Result<Vec<(&'static str, FeatureStats)>> {
    let args = job.args;
    let vectors = features::vectors(args);
    let mut signals: Vec<Signals> = vectors.iter().map(|vector| vector.signals(args.seed, episode)).collect();
    let mut stats = new_stats(args, args.frames);
    let first = episode * args.frames;
    let task = episode % TASKS.len() as u64;
    for block in blocks(args.frames) {
        let frames = block.end - block.start;
        #[expect(clippy::cast_precision_loss, reason = "frames are below 2^53")]
        let seconds = |frame: u64| frame as f64 / f64::from(args.fps);
        let mut columns: Vec<ArrayRef> = Vec::with_capacity(stats.len());
        for (nth, (Vector { dim, lead_s, .. }, signals)) in vectors.iter().zip(&mut signals).enumerate() {
            let mut values = Vec::new();
            signals.fill(block.clone().map(|frame| seconds(frame) + lead_s), &mut values);
            for row in values.chunks_exact(*dim as usize) {
                stats[nth].1.push(row.iter().copied().map(f64::from));
            }
            columns.push(match dim {
                1 => Arc::new(Float32Array::from(values)),
                _ => args.list.array(*dim, values)?,
            });
        }
        #[expect(clippy::cast_possible_truncation, reason = "LeRobot's timestamp is float32")]
        let timestamps: Float32Array = block.clone().map(|frame| seconds(frame) as f32).collect();
        let mut index = stats[vectors.len()..].iter_mut();
        if let Some((_, stats)) = index.next() {
            timestamps.values().iter().for_each(|t| stats.push(std::iter::once(f64::from(*t))));
        }
        columns.push(Arc::new(timestamps));
        let (from, to) = (int64(block.start)?, int64(block.end)?);
        let (episode, first, task) = (int64(episode)?, int64(first)?, int64(task)?);
        let rows = usize::try_from(frames)?;
        for values in [
            (from..to).collect::<Int64Array>(),
            std::iter::repeat_n(episode, rows).collect(),
            (first + from..first + to).collect(),
            std::iter::repeat_n(task, rows).collect(),
        ] {
            if let Some((_, stats)) = index.next() {
                #[expect(clippy::cast_precision_loss, reason = "frames are below 2^53")]
                values.values().iter().for_each(|value| stats.push(std::iter::once(*value as f64)));
            }
            columns.push(Arc::new(values));
        }
        table.write(columns, schema)?;
        job.progress.inc(frames * row_bytes(args));
    }
    Ok(stats.into_iter().map(|(name, stats)| (name, stats.finish())).collect())
}

fn info(job: &Job<'_>, version: Map<String, Value>) -> Value {
    let mut info = version;
    let Value::Object(common) = json!({
        "robot_type": "synthetic",
        "total_episodes": job.episodes,
        "total_frames": job.episodes * job.args.frames,
        "total_tasks": TASKS.len().min(usize::try_from(job.episodes).unwrap_or(usize::MAX)),
        "fps": job.args.fps,
        "splits": { "train": format!("0:{}", job.episodes) },
        "video_path": null,
        "features": features::info(job.args),
    }) else {
        return Value::Null;
    };
    info.extend(common);
    Value::Object(info)
}

/// The tasks that `episodes` episodes use.
pub(crate) fn tasks(episodes: u64) -> &'static [&'static str] {
    &TASKS[..TASKS.len().min(usize::try_from(episodes).unwrap_or(usize::MAX))]
}

pub(crate) fn write_text(path: &Path, text: &str) -> anyhow::Result<()> {
    let at = || format!("cannot write {path:?}");
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(at)?;
    }
    std::fs::write(path, text).with_context(at)
}
