//! LeRobot datasets made up for tests: every value is a formula of its global frame number, so that a test knows
//! what must come out without having read it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BooleanArray, FixedSizeListArray, Float32Array, Float64Array, Int16Array, Int64Array,
    LargeListArray, ListArray, RecordBatch, StringArray, UInt8Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use tempfile::TempDir;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lists {
    Open,
    Large,
    Fixed,
}

#[derive(Debug, Clone)]
pub(crate) struct Made {
    pub(crate) version: &'static str,
    pub(crate) lengths: Vec<usize>,
    /// Episodes in a file (v3).
    pub(crate) per_file: usize,
    pub(crate) lists: Lists,
    pub(crate) compression: Compression,
    pub(crate) row_group: usize,
    pub(crate) page_rows: usize,
    /// Scalars as lists of one.
    pub(crate) wrapped_scalars: bool,
    pub(crate) stamp: fn(usize) -> f32,
}

impl Default for Made {
    fn default() -> Self {
        Self {
            version: "v3.0",
            lengths: vec![5, 1, 7, 4, 9, 3],
            per_file: 3,
            lists: Lists::Open,
            compression: Compression::SNAPPY,
            row_group: 1 << 20,
            page_rows: 1 << 20,
            wrapped_scalars: false,
            stamp: |frame| (frame as f64 / 10.0) as f32,
        }
    }
}

pub(crate) fn state(global: usize) -> [f32; 3] {
    [global as f32, global as f32 * 0.1, -1.0 / (global as f32 + 1.0)]
}

pub(crate) fn action(global: usize) -> [f64; 2] {
    [global as f64 / 3.0, f64::from_bits(0x3ff0_0000_0000_0000 + global as u64)]
}

pub(crate) fn grid(global: usize) -> [i16; 4] {
    let g = global as i16;
    [g, g.wrapping_neg(), g.wrapping_mul(2), g.wrapping_sub(100)]
}

pub(crate) fn note(global: usize) -> &'static str {
    ["reach", "grasp", "", "lift \u{e9}"][global / 2 % 4]
}

fn lists(kind: Lists, length: usize, rows: usize, values: ArrayRef) -> ArrayRef {
    let field = Arc::new(Field::new("element", values.data_type().clone(), true));
    match kind {
        Lists::Fixed => Arc::new(FixedSizeListArray::new(field, length as i32, values, None)),
        Lists::Open => Arc::new(ListArray::new(
            field,
            OffsetBuffer::from_lengths(std::iter::repeat_n(length, rows)),
            values,
            None,
        )),
        Lists::Large => Arc::new(LargeListArray::new(
            field,
            OffsetBuffer::from_lengths(std::iter::repeat_n(length, rows)),
            values,
            None,
        )),
    }
}

impl Made {
    /// Global number of each episode's first frame, and the total.
    pub(crate) fn starts(&self) -> Vec<usize> {
        let mut starts = vec![0];
        for length in &self.lengths {
            starts.push(starts[starts.len() - 1] + length);
        }
        starts
    }

    pub(crate) fn batch(&self, episodes: std::ops::Range<usize>) -> RecordBatch {
        let starts = self.starts();
        let rows: Vec<(usize, usize, usize)> = episodes
            .flat_map(|e| (0..self.lengths[e]).map(move |f| (e, f)))
            .map(|(e, f)| (e, f, starts[e] + f))
            .collect();
        let n = rows.len();
        let scalar =
            |values: ArrayRef| if self.wrapped_scalars { lists(self.lists, 1, n, values) } else { values };
        let ints = |f: fn(&(usize, usize, usize)) -> i64| -> ArrayRef {
            scalar(Arc::new(rows.iter().map(f).collect::<Int64Array>()))
        };
        let f32s: Float32Array = rows.iter().flat_map(|r| state(r.2)).collect();
        let f64s: Float64Array = rows.iter().flat_map(|r| action(r.2)).collect();
        let i16s: Int16Array = rows.iter().flat_map(|r| grid(r.2)).collect();
        let inner = lists(self.lists, 2, n * 2, Arc::new(i16s));
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("observation.state", lists(self.lists, 3, n, Arc::new(f32s))),
            ("action", lists(self.lists, 2, n, Arc::new(f64s))),
            ("grid", lists(self.lists, 2, n, inner)),
            ("flag", scalar(Arc::new(rows.iter().map(|r| Some(r.2 % 3 == 0)).collect::<BooleanArray>()))),
            ("count", scalar(Arc::new(rows.iter().map(|r| r.2 as u8).collect::<UInt8Array>()))),
            ("note", Arc::new(rows.iter().map(|r| Some(note(r.2))).collect::<StringArray>())),
            ("timestamp", scalar(Arc::new(rows.iter().map(|r| (self.stamp)(r.1)).collect::<Float32Array>()))),
            ("frame_index", ints(|r| r.1 as i64)),
            ("episode_index", ints(|r| r.0 as i64)),
            ("index", ints(|r| r.2 as i64)),
            ("task_index", ints(|r| r.0 as i64 % 2)),
        ];
        RecordBatch::try_from_iter(columns).unwrap()
    }

    pub(crate) fn write_parquet(&self, path: &Path, batch: &RecordBatch) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let properties = WriterProperties::builder()
            .set_compression(self.compression)
            .set_max_row_group_row_count(Some(self.row_group))
            .set_data_page_row_count_limit(self.page_rows)
            .set_write_batch_size(self.page_rows.min(1024))
            .set_statistics_enabled(EnabledStatistics::Page)
            .build();
        let mut writer =
            ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
        writer.write(batch).unwrap();
        writer.close().unwrap();
    }

    /// Data files relative to the root, with the episodes of each.
    pub(crate) fn files(&self) -> Vec<(PathBuf, std::ops::Range<usize>)> {
        let count = self.lengths.len();
        if self.version.starts_with("v2") {
            return (0..count)
                .map(|e| (format!("data/chunk-{:03}/episode_{e:06}.parquet", e / 4).into(), e..e + 1))
                .collect();
        }
        (0..count.div_ceil(self.per_file))
            .map(|f| {
                let end = ((f + 1) * self.per_file).min(count);
                (format!("data/chunk-{:03}/file-{:03}.parquet", f / 4, f % 4).into(), f * self.per_file..end)
            })
            .collect()
    }

    pub(crate) fn info(&self) -> serde_json::Value {
        let feature =
            |dtype: &str, shape: &[usize]| serde_json::json!({"dtype": dtype, "shape": shape, "names": null});
        let data_path = if self.version.starts_with("v2") {
            "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        } else {
            "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        };
        serde_json::json!({
            "codebase_version": self.version, "fps": 10, "chunks_size": 4, "robot_type": null,
            "total_episodes": self.lengths.len(), "total_frames": self.lengths.iter().sum::<usize>(),
            "total_tasks": 2, "splits": {}, "data_path": data_path, "video_path": null,
            "features": {
                "observation.state": feature("float32", &[3]), "action": feature("float64", &[2]),
                "grid": feature("int16", &[2, 2]), "flag": feature("bool", &[1]),
                "count": feature("uint8", &[1]), "note": feature("string", &[1]),
                "timestamp": feature("float32", &[1]), "frame_index": feature("int64", &[1]),
                "episode_index": feature("int64", &[1]), "index": feature("int64", &[1]),
                "task_index": feature("int64", &[1]),
            }
        })
    }

    pub(crate) fn episodes_table(&self) -> RecordBatch {
        let starts = self.starts();
        let column = |f: &dyn Fn(usize) -> usize| -> ArrayRef {
            Arc::new((0..self.lengths.len()).map(|e| f(e) as i64).collect::<Int64Array>())
        };
        RecordBatch::try_from_iter([
            ("episode_index", column(&|e| e)),
            ("length", column(&|e| self.lengths[e])),
            ("data/chunk_index", column(&|e| e / self.per_file / 4)),
            ("data/file_index", column(&|e| e / self.per_file % 4)),
            ("dataset_from_index", column(&|e| starts[e])),
            ("dataset_to_index", column(&|e| starts[e + 1])),
        ])
        .unwrap()
    }

    /// Writes all of it to a new directory.
    pub(crate) fn write(&self) -> TempDir {
        let dir = TempDir::new().unwrap();
        let root = dir.path();
        for (path, episodes) in self.files() {
            self.write_parquet(&root.join(path), &self.batch(episodes));
        }
        fs::create_dir_all(root.join("meta")).unwrap();
        write_json(root, &self.info());
        if self.version.starts_with("v2") {
            let episodes: Vec<String> = (0..self.lengths.len())
                .map(|e| {
                    format!("{{\"episode_index\": {e}, \"tasks\": [\"a\"], \"length\": {}}}", self.lengths[e])
                })
                .collect();
            fs::write(root.join("meta/episodes.jsonl"), episodes.join("\n")).unwrap();
            let tasks = "{\"task_index\": 0, \"task\": \"pick\"}\n{\"task_index\": 1, \"task\": \"place\"}\n";
            fs::write(root.join("meta/tasks.jsonl"), tasks).unwrap();
        } else {
            let plain = Self::default();
            plain.write_parquet(
                &root.join("meta/episodes/chunk-000/file-000.parquet"),
                &self.episodes_table(),
            );
            let index: ArrayRef = Arc::new(Int64Array::from(vec![0, 1]));
            let task: ArrayRef = Arc::new(StringArray::from(vec!["pick", "place"]));
            let tasks = RecordBatch::try_from_iter([("task_index", index), ("task", task)]).unwrap();
            plain.write_parquet(&root.join("meta/tasks.parquet"), &tasks);
        }
        dir
    }
}

pub(crate) fn write_json(root: &Path, info: &serde_json::Value) {
    fs::write(root.join("meta/info.json"), info.to_string()).unwrap();
}

/// The batch with one column replaced.
pub(crate) fn with_column(batch: &RecordBatch, name: &str, column: ArrayRef) -> RecordBatch {
    let schema = batch.schema();
    let at = schema.index_of(name).unwrap();
    let mut fields: Vec<Field> = schema.fields().iter().map(|field| field.as_ref().clone()).collect();
    fields[at] = Field::new(name, column.data_type().clone(), true);
    let mut columns = batch.columns().to_vec();
    columns[at] = column;
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
}

/// An error with its whole chain, as a person would see it.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
