//! Arrow IPC: read in place where it can be, decoded where it must be, and never trusted.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::data::{chain, f64s, open, read, real};
use arrow::array::{
    ArrayRef, BooleanArray, DictionaryArray, FixedSizeListArray, Float32Array, Float64Array, Int8Array,
    Int64Array, RecordBatch, StringArray,
};
use arrow::datatypes::{DataType, Field};
use arrow::ipc::CompressionType;
use arrow::ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use robocache_formats::ReadError;

const ROWS: usize = 700;

/// Rows `from..to`: stamps, a scalar, a vector, a flag and a word.
fn batch(from: usize, to: usize) -> RecordBatch {
    let rows = || from..to;
    let flat =
        Float32Array::from_iter_values(rows().flat_map(|row| (0..3).map(move |k| (row * 3 + k) as f32)));
    let element = Arc::new(Field::new("item", DataType::Float32, false));
    let keys = Int8Array::from_iter_values(rows().map(|row| i8::from(row % 2 == 1)));
    let words = DictionaryArray::new(keys, Arc::new(StringArray::from(vec!["even", "odd"])));
    RecordBatch::try_from_iter([
        ("t", Arc::new(Int64Array::from_iter_values(rows().map(|row| row as i64 * 10))) as ArrayRef),
        ("scalar", Arc::new(Float64Array::from_iter_values(rows().map(|row| row as f64 / 7.0)))),
        ("vector", Arc::new(FixedSizeListArray::new(element, 3, Arc::new(flat), None))),
        ("flag", Arc::new(rows().map(|row| Some(row % 3 == 0)).collect::<BooleanArray>())),
        ("word", Arc::new(words)),
        ("unread", Arc::new(StringArray::from_iter_values(rows().map(|row| format!("text {row}"))))),
    ])
    .unwrap()
}

fn write(path: &Path, compression: Option<CompressionType>, batch_rows: usize) {
    let options = IpcWriteOptions::default().try_with_compression(compression).unwrap();
    let mut writer =
        FileWriter::try_new_with_options(File::create(path).unwrap(), &batch(0, 1).schema(), options)
            .unwrap();
    for from in (0..ROWS).step_by(batch_rows) {
        writer.write(&batch(from, (from + batch_rows).min(ROWS))).unwrap();
    }
    writer.finish().unwrap();
}

const MANIFEST: &str = r#"
    layout = "streams"
    [streams.scalar]
    time = { column = "t", unit = "us" }
    [streams.vector]
    time = { column = "t", unit = "us" }
    [streams.flag]
    time = { column = "t", unit = "us" }
    [streams.word]
    time = { column = "t", unit = "us" }
    [streams.part]
    time = { column = "t", unit = "us" }
    columns = ["scalar"]
    where = { flag = true }
"#;

/// The addresses at which a file is mapped into this process, as the kernel tells.
fn mapped(path: &Path) -> Vec<std::ops::Range<usize>> {
    let name = path.canonicalize().unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let of_file = maps.lines().filter(|line| line.ends_with(name.to_str().unwrap()));
    let range = |line: &str| {
        let (start, end) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
        usize::from_str_radix(start, 16).unwrap()..usize::from_str_radix(end, 16).unwrap()
    };
    of_file.map(range).collect()
}

#[test]
fn an_uncompressed_column_of_one_batch_is_read_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in_place.arrow");
    write(&path, None, ROWS);
    let dataset = open(&path, MANIFEST).unwrap();
    for (stream, in_place) in [("scalar", true), ("vector", true), ("flag", false), ("part", false)] {
        let values = read(&dataset, 0, stream).unwrap().values;
        let start = values.buffer.as_ptr() as usize;
        let inside = mapped(&path)
            .iter()
            .any(|range| range.start <= start && start + values.buffer.len() <= range.end);
        assert_eq!(inside, in_place, "{stream}");
    }
    // The values outlive the dataset, and the file's name.
    let values = read(&dataset, 0, "scalar").unwrap().values;
    drop(dataset);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(f64s(&values), (0..ROWS).map(|row| row as f64 / 7.0).collect::<Vec<_>>());
}

#[test]
fn every_compression_and_any_number_of_batches_give_the_same_values() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("one.arrow");
    for compression in [None, Some(CompressionType::LZ4_FRAME), Some(CompressionType::ZSTD)] {
        for batch_rows in [ROWS, 100, 33, 1] {
            std::fs::remove_file(&path).ok();
            write(&path, compression, batch_rows);
            let dataset = open(&path, MANIFEST).unwrap();
            let case = format!("{compression:?}, batches of {batch_rows}");
            let scalar = read(&dataset, 0, "scalar").unwrap();
            assert_eq!(
                f64s(&scalar.values),
                (0..ROWS).map(|row| row as f64 / 7.0).collect::<Vec<_>>(),
                "{case}"
            );
            assert_eq!((scalar.clock.t_ns(1), scalar.clock.last_ns()), (10_000, 699 * 10_000), "{case}");
            let vector = read(&dataset, 0, "vector").unwrap().values;
            let vector: Vec<f32> =
                vector.buffer.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            assert_eq!(vector, (0..ROWS * 3).map(|k| k as f32).collect::<Vec<_>>(), "{case}");
            let flag = read(&dataset, 0, "flag").unwrap().values;
            assert_eq!(
                flag.buffer.as_slice(),
                (0..ROWS).map(|row| u8::from(row % 3 == 0)).collect::<Vec<_>>(),
                "{case}"
            );
            let part = read(&dataset, 0, "part").unwrap();
            assert_eq!(
                f64s(&part.values),
                (0..ROWS).step_by(3).map(|row| row as f64 / 7.0).collect::<Vec<_>>()
            );
            assert_eq!(part.clock.t_ns(1), 30_000);
            assert_eq!(dataset.texts(3).unwrap().to_vec(), ["even", "odd"], "{case}");
            let word = read(&dataset, 0, "word").unwrap().values;
            let word: Vec<i32> =
                word.buffer.as_chunks::<4>().0.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect();
            assert_eq!(word, (0..ROWS).map(|row| (row % 2) as i32).collect::<Vec<_>>(), "{case}");
        }
    }
}

#[test]
fn a_file_that_holds_the_stream_format_is_read_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream.arrow");
    let mut writer = StreamWriter::try_new(File::create(&path).unwrap(), &batch(0, 1).schema()).unwrap();
    for from in [0, 300, 600] {
        writer.write(&batch(from, (from + 300).min(ROWS))).unwrap();
    }
    writer.finish().unwrap();
    let dataset = open(&path, MANIFEST).unwrap();
    let scalar = read(&dataset, 0, "scalar").unwrap();
    assert_eq!(f64s(&scalar.values), (0..ROWS).map(|row| row as f64 / 7.0).collect::<Vec<_>>());

    // Without the end-of-stream mark, which is optional; and cut in the middle of a message.
    let bytes = std::fs::read(&path).unwrap();
    let cut = dir.path().join("cut.arrow");
    std::fs::write(&cut, &bytes[..bytes.len() - 8]).unwrap();
    assert_eq!(read(&open(&cut, MANIFEST).unwrap(), 0, "scalar").unwrap().values.rows, ROWS);
    std::fs::write(&cut, &bytes[..bytes.len() - 100]).unwrap();
    let text = chain(&open(&cut, MANIFEST).unwrap_err());
    assert!(text.contains("cut.arrow") && text.contains("broken or truncated"), "{text}");
}

#[test]
fn broken_and_foreign_files_are_named_with_the_cure() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("table.arrow");
    write(&path, None, 100);
    let good = std::fs::read(&path).unwrap();
    let mut no_footer = good.clone();
    let end = no_footer.len();
    no_footer[end - 10..end - 6].copy_from_slice(&i32::MAX.to_le_bytes());
    for (bytes, wanted) in [
        (&b""[..], "is empty"),
        (b"0123456789", "neither Parquet nor Arrow"),
        (b"FEA1\0\0\0\0rest of a feather file", "Feather version 1; write it again as Feather version 2"),
        (b"ARROW1", "too short to have a footer"),
        (&good[..good.len() - 1], "the end of the file is missing"),
        (&good[..good.len() / 2], "the end of the file is missing"),
        (&no_footer, "a footer longer than the file"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let text = chain(&open(&path, MANIFEST).unwrap_err());
        assert!(text.contains(wanted) && text.contains("table.arrow"), "{text}");
    }
}

#[test]
fn a_file_that_shrinks_while_it_is_open_is_an_error_not_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shrinking.arrow");
    write(&path, None, 100);
    let dataset = open(&path, MANIFEST).unwrap();
    read(&dataset, 0, "scalar").unwrap();
    File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
    let error = dataset.read(&[0], &[0]).unwrap_err();
    assert!(
        matches!(error, ReadError::Io { .. } | ReadError::Arrow { .. } | ReadError::NotATable { .. }),
        "{error}"
    );
}

/// A small generator, so that the damage is the same in every run (Steele and others, SplitMix64).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[test]
fn no_damage_to_a_file_makes_reading_it_panic() {
    let dir = tempfile::tempdir().unwrap();
    let mut files: Vec<PathBuf> = Vec::new();
    for (name, compression) in
        [("plain", None), ("lz4", Some(CompressionType::LZ4_FRAME)), ("zstd", Some(CompressionType::ZSTD))]
    {
        files.push(dir.path().join(name));
        write(&files[files.len() - 1], compression, 300);
    }
    files.push(real("husky_outdoor").join("data/fix.arrow"));
    let (mut state, mut refused, mut read_well) = (7, 0, 0);
    for file in &files {
        let good = std::fs::read(file).unwrap();
        let footer = good.len() - good.len().min(6_000);
        let manifest = if file.ends_with("fix.arrow") {
            "layout = \"streams\"\n[streams.latitude]\ntime = { column = \"recv_ns\", unit = \"ns\" }"
        } else {
            MANIFEST
        };
        for round in 0..200 {
            let mut bytes = good.clone();
            match round % 4 {
                0 => bytes.truncate(split_mix(&mut state) as usize % good.len()),
                1 => {
                    let at = footer + split_mix(&mut state) as usize % (good.len() - footer);
                    bytes[at] = split_mix(&mut state) as u8;
                }
                2 => {
                    let at = split_mix(&mut state) as usize % good.len();
                    bytes[at] ^= 1 << (split_mix(&mut state) % 8);
                }
                _ => {
                    let at = split_mix(&mut state) as usize % (good.len() - 8);
                    bytes[at..at + 8].copy_from_slice(&(split_mix(&mut state) >> (round % 60)).to_le_bytes());
                }
            }
            let damaged = dir.path().join(format!("damaged_{round}.arrow"));
            std::fs::write(&damaged, &bytes).unwrap();
            let outcome = match open(&damaged, manifest) {
                Ok(dataset) => (0..dataset.streams().len()).try_for_each(|at| {
                    // Text is checked before its codes are asked for.
                    dataset.read(&[0], &[at]).map(drop)
                }),
                Err(_) => {
                    refused += 1;
                    std::fs::remove_file(&damaged).unwrap();
                    continue;
                }
            };
            *(if outcome.is_ok() { &mut read_well } else { &mut refused }) += 1;
            std::fs::remove_file(&damaged).unwrap();
        }
    }
    assert_eq!(refused + read_well, files.len() * 200);
    assert!(
        refused > 200 && read_well > 50,
        "{refused} refused, {read_well} read: the damage is of one kind only"
    );
}
