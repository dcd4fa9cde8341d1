//! The limit to what decoding takes is the process's, so that its test is a process of its own.

#![expect(clippy::unwrap_used, reason = "test code outside of #[test] functions too")]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch};
use arrow::ipc::CompressionType;
use arrow::ipc::writer::{FileWriter, IpcWriteOptions};
use parquet::arrow::ArrowWriter;
use robocache_formats::{Dataset, OpenOptions, ReadError, Stream, limit_decoding};

const ROWS: usize = 1 << 20;
const LAST_NS: i64 = (1 << 20) - 1;

fn rows() -> RecordBatch {
    RecordBatch::try_from_iter([
        ("t", Arc::new(Int64Array::from_iter_values(0..=LAST_NS)) as ArrayRef),
        ("x", Arc::new(Float64Array::from_iter_values((0..ROWS).map(|_row| 0.25)))),
    ])
    .unwrap()
}

fn arrow(path: &Path, compression: Option<CompressionType>) {
    let options = IpcWriteOptions::default().try_with_compression(compression).unwrap();
    let rows = rows();
    let file = File::create(path).unwrap();
    let mut writer = FileWriter::try_new_with_options(file, &rows.schema(), options).unwrap();
    writer.write(&rows).unwrap();
    writer.finish().unwrap();
}

fn read(file: &Path) -> Result<Stream, ReadError> {
    let name = file.file_name().unwrap().to_str().unwrap();
    let manifest = format!(
        "layout = \"streams\"\n[streams.x]\nfile = \"{name}\"\ntime = {{ column = \"t\", unit = \"ns\" }}\n"
    );
    let root = file.parent().unwrap();
    let dataset = Dataset::open(root, &OpenOptions { manifest: Some(manifest) }).unwrap();
    dataset.read(&[0], &[0]).map(|mut read| read.remove(0).remove(0))
}

#[test]
fn a_small_file_takes_no_more_memory_than_there_is_and_what_is_read_in_place_takes_none() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (parquet, packed, plain) = (path("small.parquet"), path("packed.arrow"), path("plain.arrow"));
    let mut writer = ArrowWriter::try_new(File::create(&parquet).unwrap(), rows().schema(), None).unwrap();
    writer.write(&rows()).unwrap();
    writer.close().unwrap();
    arrow(&packed, Some(CompressionType::ZSTD));
    arrow(&plain, None);
    let limit = 12 << 20; // of the 16 MiB that the two columns are
    limit_decoding(limit);
    for path in [&parquet, &packed] {
        let error = read(path).unwrap_err();
        let told = matches!(&error, ReadError::NoRoom { path: of, bytes, others: 0, limit: told }
            if of == path && *bytes > limit && *told == limit);
        assert!(told, "{error:?}");
    }
    assert_eq!(read(&plain).unwrap().clock.rows(), ROWS);
    // What a failed read held is given back, and so is what a whole one held.
    limit_decoding(20 << 20);
    for path in [&parquet, &packed, &parquet, &packed] {
        let stream = read(path).unwrap();
        assert!(stream.values.buffer.as_slice().chunks_exact(8).all(|value| value == 0.25_f64.to_le_bytes()));
    }
}
