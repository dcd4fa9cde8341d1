//! v2.1: `data/chunk-000/episode_000000.parquet`, metadata as JSON lines, statistics by episode only.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use arrow::datatypes::SchemaRef;
use serde_json::{Map, Value, json};

use super::{Episode, Layout, tasks};
use crate::synth::features;
use crate::synth::stats::FeatureStats;
use crate::synth::table::TableWriter;
use crate::synth::{Job, SynthArgs, Written};

/// Episodes in a chunk's directory.
const CHUNK: u64 = 1000;

pub(super) struct V21<'a> {
    args: &'a SynthArgs,
    episodes: u64,
    schema: SchemaRef,
    data: Option<TableWriter>,
    episodes_jsonl: JsonLines,
    stats_jsonl: JsonLines,
    written: Written,
}

impl<'a> V21<'a> {
    pub(super) fn new(job: &Job<'a>, schema: SchemaRef) -> anyhow::Result<Self> {
        let meta = job.args.out.join("meta");
        let mut tasks_jsonl = JsonLines::create(&meta.join("tasks.jsonl"))?;
        for (index, task) in tasks(job.episodes).iter().enumerate() {
            tasks_jsonl.line(&json!({ "task_index": index, "task": task }))?;
        }
        tasks_jsonl.close()?;
        Ok(Self {
            args: job.args,
            episodes: job.episodes,
            schema,
            data: None,
            episodes_jsonl: JsonLines::create(&meta.join("episodes.jsonl"))?,
            stats_jsonl: JsonLines::create(&meta.join("episodes_stats.jsonl"))?,
            written: Written::default(),
        })
    }
}

impl Layout for V21<'_> {
    fn data(&mut self, episode: u64) -> anyhow::Result<&mut TableWriter> {
        let name = format!("data/chunk-{:03}/episode_{episode:06}.parquet", episode / CHUNK);
        let metadata = [("huggingface", features::hugging_face(self.args))];
        let table = TableWriter::create(&self.args.out.join(name), &self.schema, self.args.codec, &metadata)?;
        Ok(self.data.insert(table))
    }

    fn end_episode(&mut self, episode: &Episode<'_>) -> anyhow::Result<()> {
        if let Some(table) = self.data.take() {
            self.written.file_bytes += table.close()?;
            self.written.files += 1;
        }
        self.episodes_jsonl.line(
            &json!({ "episode_index": episode.index, "tasks": [episode.task()], "length": episode.rows }),
        )?;
        let stats: Map<String, Value> =
            episode.stats.iter().map(|(name, stats)| ((*name).to_owned(), stats.to_json(false))).collect();
        self.stats_jsonl.line(&json!({ "episode_index": episode.index, "stats": stats }))
    }

    fn end(self: Box<Self>, _stats: &[(&'static str, FeatureStats)]) -> anyhow::Result<Written> {
        self.episodes_jsonl.close()?;
        self.stats_jsonl.close()?;
        Ok(self.written)
    }

    fn info(&self) -> Map<String, Value> {
        [
            ("codebase_version", json!("v2.1")),
            ("total_videos", json!(0)),
            ("total_chunks", json!(self.episodes.div_ceil(CHUNK))),
            ("chunks_size", json!(CHUNK)),
            ("data_path", json!("data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet")),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into_iter()
        .collect()
    }
}

struct JsonLines {
    path: PathBuf,
    file: BufWriter<File>,
}

impl JsonLines {
    fn create(path: &Path) -> anyhow::Result<Self> {
        let at = || format!("cannot create {path:?}");
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).with_context(at)?;
        }
        Ok(Self { path: path.to_owned(), file: BufWriter::new(File::create(path).with_context(at)?) })
    }

    fn line(&mut self, value: &Value) -> anyhow::Result<()> {
        writeln!(self.file, "{value}").with_context(|| format!("cannot write {:?}", self.path))
    }

    fn close(mut self) -> anyhow::Result<()> {
        self.file.flush().with_context(|| format!("cannot write {:?}", self.path))
    }
}
