//! Parquet tables, written a block at a time.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use arrow::array::{ArrayRef, FixedSizeListArray, Float32Array, ListArray, RecordBatch};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;

use super::{Codec, ListKind};

/// One Parquet file being written. Dropped without [`TableWriter::close`], the file has no footer and no reader.
pub(crate) struct TableWriter {
    path: PathBuf,
    writer: ArrowWriter<File>,
}

impl TableWriter {
    /// Makes the file and the directories above it. `metadata` goes into the footer twice, as itself and within
    /// Arrow's schema: readers that find the latter (pyarrow) look nowhere else.
    pub(crate) fn create(
        path: &Path,
        schema: &SchemaRef,
        codec: Codec,
        metadata: &[(&str, String)],
    ) -> anyhow::Result<Self> {
        let at = || format!("cannot create {path:?}");
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).with_context(at)?;
        }
        let file = File::create(path).with_context(at)?;
        let pairs = || metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone()));
        let schema = Arc::new(Schema::clone(schema).with_metadata(pairs().collect::<HashMap<_, _>>()));
        let metadata = pairs().map(|(key, value)| KeyValue { key, value: Some(value) }).collect();
        let properties = WriterProperties::builder()
            .set_compression(codec.compression())
            .set_created_by(concat!("robocached synth ", env!("CARGO_PKG_VERSION")).to_owned())
            .set_key_value_metadata(Some(metadata))
            .build();
        let writer = ArrowWriter::try_new(file, schema, Some(properties)).with_context(at)?;
        Ok(Self { path: path.to_owned(), writer })
    }

    /// Appends rows to the row group.
    pub(crate) fn write(&mut self, columns: Vec<ArrayRef>, schema: &SchemaRef) -> anyhow::Result<()> {
        let batch = RecordBatch::try_new(Arc::clone(schema), columns)
            .with_context(|| format!("rows for {:?}", self.path))?;
        self.writer.write(&batch).with_context(|| format!("cannot write {:?}", self.path))
    }

    /// Ends the row group.
    pub(crate) fn end_row_group(&mut self) -> anyhow::Result<()> {
        self.writer.flush().with_context(|| format!("cannot write {:?}", self.path))
    }

    /// Bytes in the file so far.
    pub(crate) fn bytes_written(&self) -> u64 {
        self.writer.bytes_written() as u64
    }

    /// Writes the footer; returns the size of the file.
    pub(crate) fn close(self) -> anyhow::Result<u64> {
        let Self { path, writer } = self;
        let at = || format!("cannot write {path:?}");
        writer.close().with_context(at)?;
        Ok(std::fs::metadata(&path).with_context(at)?.len())
    }
}

impl Codec {
    fn compression(self) -> Compression {
        match self {
            Self::None => Compression::UNCOMPRESSED,
            Self::Snappy => Compression::SNAPPY,
            Self::Zstd => Compression::ZSTD(Default::default()),
            Self::Lz4 => Compression::LZ4_RAW,
            Self::Gzip => Compression::GZIP(Default::default()),
            Self::Brotli => Compression::BROTLI(Default::default()),
        }
    }
}

impl ListKind {
    /// Arrow type of a vector of `dim` float32.
    pub(crate) fn data_type(self, dim: u32) -> DataType {
        match self {
            #[expect(clippy::cast_possible_wrap, reason = "the command line takes at most 4096")]
            Self::Fixed => DataType::FixedSizeList(element(), dim as i32),
            Self::Variable => DataType::List(element()),
        }
    }

    /// `values` cut into vectors of `dim`.
    pub(crate) fn array(self, dim: u32, values: Vec<f32>) -> anyhow::Result<ArrayRef> {
        let rows = values.len() / dim as usize;
        let child = Arc::new(Float32Array::from(values));
        Ok(match self {
            #[expect(clippy::cast_possible_wrap, reason = "the command line takes at most 4096")]
            Self::Fixed => Arc::new(FixedSizeListArray::try_new(element(), dim as i32, child, None)?),
            Self::Variable => {
                let offsets = OffsetBuffer::from_lengths(std::iter::repeat_n(dim as usize, rows));
                Arc::new(ListArray::try_new(element(), offsets, child, None)?)
            }
        })
    }
}

/// The list's element, with the name that pyarrow and LeRobot give it.
fn element() -> Arc<Field> {
    Arc::new(Field::new("element", DataType::Float32, true))
}
