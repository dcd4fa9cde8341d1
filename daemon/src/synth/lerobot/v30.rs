//! v3.0: `data/chunk-000/file-000.parquet` with many episodes, metadata as Parquet, statistics by episode and whole.

use std::sync::Arc;

use arrow::array::builder::{Float64Builder, Int64Builder, ListBuilder, StringBuilder};
use arrow::array::{ArrayRef, Int64Array, StringArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use serde_json::{Map, Value, json};

use super::{Episode, Layout, new_stats, tasks, write_text};
use crate::synth::stats::FeatureStats;
use crate::synth::table::TableWriter;
use crate::synth::{Codec, Job, SynthArgs, Written, features, int64};

/// Data files in a chunk's directory.
const CHUNK: u64 = 1000;
/// A data file is followed by the next once it is so large, as LeRobot does.
const DATA_FILE_MB: u64 = 100;
/// Episodes whose metadata is kept until it is written.
const EPISODES_KEPT: usize = 1000;

pub(super) struct V30<'a> {
    args: &'a SynthArgs,
    episodes: u64,
    schema: SchemaRef,
    /// The data file being written, and its number.
    data: Option<TableWriter>,
    file: u64,
    episodes_table: TableWriter,
    episodes_rows: EpisodeRows,
    written: Written,
}

impl<'a> V30<'a> {
    pub(super) fn new(job: &Job<'a>, schema: SchemaRef) -> anyhow::Result<Self> {
        let episodes_rows = EpisodeRows::new(job.args);
        let path = job.args.out.join("meta/episodes/chunk-000/file-000.parquet");
        let episodes_table = TableWriter::create(&path, &episodes_rows.schema, Codec::Snappy, &[])?;
        Ok(Self {
            args: job.args,
            episodes: job.episodes,
            schema,
            data: None,
            file: 0,
            episodes_table,
            episodes_rows,
            written: Written::default(),
        })
    }

    fn close_data(&mut self) -> anyhow::Result<()> {
        if let Some(table) = self.data.take() {
            self.written.file_bytes += table.close()?;
            self.written.files += 1;
        }
        Ok(())
    }
}

impl Layout for V30<'_> {
    fn data(&mut self, _episode: u64) -> anyhow::Result<&mut TableWriter> {
        let full = |table: &TableWriter| table.bytes_written() >= DATA_FILE_MB << 20;
        if self.data.as_ref().is_some_and(full) {
            self.close_data()?;
            self.file += 1;
        }
        let table = match self.data.take() {
            Some(table) => table,
            None => {
                let name =
                    format!("data/chunk-{:03}/file-{:03}.parquet", self.file / CHUNK, self.file % CHUNK);
                let metadata = [("huggingface", features::hugging_face(self.args))];
                TableWriter::create(&self.args.out.join(name), &self.schema, self.args.codec, &metadata)?
            }
        };
        Ok(self.data.insert(table))
    }

    fn end_episode(&mut self, episode: &Episode<'_>) -> anyhow::Result<()> {
        if let Some(table) = &mut self.data {
            table.end_row_group()?;
        }
        self.episodes_rows.push(episode, self.file)?;
        if self.episodes_rows.len == EPISODES_KEPT {
            self.episodes_rows.write(&mut self.episodes_table)?;
        }
        Ok(())
    }

    fn end(mut self: Box<Self>, stats: &[(&'static str, FeatureStats)]) -> anyhow::Result<Written> {
        self.close_data()?;
        self.episodes_rows.write(&mut self.episodes_table)?;
        self.episodes_table.close()?;
        write_tasks(self.args, self.episodes)?;
        let stats: Map<String, Value> =
            stats.iter().map(|(name, stats)| ((*name).to_owned(), stats.to_json(true))).collect();
        write_text(&self.args.out.join("meta/stats.json"), &format!("{:#}", Value::Object(stats)))?;
        Ok(self.written)
    }

    fn info(&self) -> Map<String, Value> {
        [
            ("codebase_version", json!("v3.0")),
            ("chunks_size", json!(CHUNK)),
            ("data_files_size_in_mb", json!(DATA_FILE_MB)),
            ("video_files_size_in_mb", json!(200)),
            ("data_path", json!("data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet")),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into_iter()
        .collect()
    }
}

/// `tasks.parquet`: LeRobot finds the text in the pandas index, which only the `pandas` footer entry makes one.
fn write_tasks(args: &SynthArgs, episodes: u64) -> anyhow::Result<()> {
    let column = |name: &str, pandas: &str, numpy: &str| json!({ "name": name, "field_name": name, "pandas_type": pandas, "numpy_type": numpy, "metadata": null });
    let pandas = json!({
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "attributes": {},
        "creator": { "library": "robocached", "version": env!("CARGO_PKG_VERSION") },
        "pandas_version": "2.0.0",
    });
    let schema: SchemaRef = Arc::new(Schema::new(vec![
        Field::new("task_index", DataType::Int64, true),
        Field::new("task", DataType::Utf8, true),
    ]));
    let path = args.out.join("meta/tasks.parquet");
    let mut table = TableWriter::create(&path, &schema, Codec::Snappy, &[("pandas", pandas.to_string())])?;
    let tasks = tasks(episodes);
    let indices: Int64Array = (0_i64..).take(tasks.len()).collect();
    table.write(vec![Arc::new(indices), Arc::new(StringArray::from(tasks.to_vec()))], &schema)?;
    table.close()?;
    Ok(())
}

/// Rows of `meta/episodes` not yet written, column by column.
struct EpisodeRows {
    schema: SchemaRef,
    numbers: [Int64Builder; 8],
    tasks: ListBuilder<StringBuilder>,
    /// By feature and statistic, in the order of the schema.
    stats: Vec<ListBuilder<Float64Builder>>,
    counts: Vec<ListBuilder<Int64Builder>>,
    len: usize,
}

/// The scalar columns of `meta/episodes`.
const NUMBERS: [&str; 8] = [
    "episode_index",
    "length",
    "data/chunk_index",
    "data/file_index",
    "dataset_from_index",
    "dataset_to_index",
    "meta/episodes/chunk_index",
    "meta/episodes/file_index",
];

fn list(name: &str, element: DataType) -> Field {
    Field::new(name, DataType::List(Arc::new(Field::new("element", element, true))), true)
}

impl EpisodeRows {
    fn new(args: &SynthArgs) -> Self {
        let empty = new_stats(args, 0);
        let mut fields: Vec<Field> =
            NUMBERS.into_iter().map(|name| Field::new(name, DataType::Int64, true)).collect();
        fields.push(list("tasks", DataType::Utf8));
        let element = |data_type| Field::new("element", data_type, true);
        let (mut stats, mut counts) = (Vec::new(), Vec::new());
        for (feature, empty) in &empty {
            for (name, _) in empty.values(true) {
                fields.push(list(&format!("stats/{feature}/{name}"), DataType::Float64));
                stats.push(ListBuilder::new(Float64Builder::new()).with_field(element(DataType::Float64)));
            }
        }
        for (feature, _) in &empty {
            fields.push(list(&format!("stats/{feature}/count"), DataType::Int64));
            counts.push(ListBuilder::new(Int64Builder::new()).with_field(element(DataType::Int64)));
        }
        let tasks = ListBuilder::new(StringBuilder::new()).with_field(element(DataType::Utf8));
        let numbers = std::array::from_fn(|_column| Int64Builder::new());
        Self { schema: Arc::new(Schema::new(fields)), numbers, tasks, stats, counts, len: 0 }
    }

    fn push(&mut self, episode: &Episode<'_>, file: u64) -> anyhow::Result<()> {
        let end = episode.first + episode.rows;
        let numbers = [episode.index, episode.rows, file / CHUNK, file % CHUNK, episode.first, end, 0, 0];
        for (builder, number) in self.numbers.iter_mut().zip(numbers) {
            builder.append_value(int64(number)?);
        }
        self.tasks.append_value([Some(episode.task())]);
        let values = episode.stats.iter().flat_map(|(_, stats)| stats.values(true));
        for (builder, (_, values)) in self.stats.iter_mut().zip(values) {
            builder.append_value(values.into_iter().map(Some));
        }
        for (builder, (_, stats)) in self.counts.iter_mut().zip(episode.stats) {
            builder.append_value([Some(int64(stats.count)?)]);
        }
        self.len += 1;
        Ok(())
    }

    /// Writes the rows kept and forgets them.
    fn write(&mut self, table: &mut TableWriter) -> anyhow::Result<()> {
        if self.len == 0 {
            return Ok(());
        }
        let mut columns: Vec<ArrayRef> =
            self.numbers.iter_mut().map(|builder| Arc::new(builder.finish()) as ArrayRef).collect();
        columns.push(Arc::new(self.tasks.finish()));
        columns.extend(self.stats.iter_mut().map(|builder| Arc::new(builder.finish()) as ArrayRef));
        columns.extend(self.counts.iter_mut().map(|builder| Arc::new(builder.finish()) as ArrayRef));
        self.len = 0;
        table.write(columns, &self.schema)?;
        table.end_row_group()
    }
}
