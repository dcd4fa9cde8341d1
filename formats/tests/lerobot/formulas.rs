//! LeRobot datasets of every make, against the formulas they were made by.

use std::sync::Arc;

use crate::made::{Lists, Made, action, chain, grid, note, state, with_column, write_json};
use arrow::array::{ArrayRef, Float32Array, Int64Array};
use parquet::basic::{BrotliLevel, Compression, GzipLevel, ZstdLevel};
use robocache_formats::{Dataset, OpenOptions, Stream, StreamKind};
use robocache_types::{Clock, DType};

fn open(root: &std::path::Path) -> Dataset {
    Dataset::open(root, &OpenOptions::default()).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

fn bytes<const N: usize, T>(values: &[T], to: impl Fn(&T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(to).collect()
}

/// Every stream of one episode, against the formulas.
fn check(dataset: &Dataset, made: &Made, episode: usize, streams: &[Stream]) {
    let start = made.starts()[episode];
    let frames: Vec<usize> = (start..start + made.lengths[episode]).collect();
    for (schema, stream) in dataset.streams().iter().zip(streams) {
        let ints = |f: &dyn Fn(usize) -> i64| bytes(&frames, |g| f(*g).to_le_bytes());
        let wanted: Vec<u8> = match schema.name.as_str() {
            "observation.state" => {
                frames.iter().flat_map(|g| bytes(&state(*g), |x| x.to_le_bytes())).collect()
            }
            "action" => frames.iter().flat_map(|g| bytes(&action(*g), |x| x.to_le_bytes())).collect(),
            "grid" => frames.iter().flat_map(|g| bytes(&grid(*g), |x| x.to_le_bytes())).collect(),
            "flag" => frames.iter().map(|g| u8::from(g % 3 == 0)).collect(),
            "count" => frames.iter().map(|g| *g as u8).collect(),
            "note" => {
                let table = ["", "grasp", "lift \u{e9}", "reach"]; // sorted
                let code = |g: &usize| table.iter().position(|text| *text == note(*g)).unwrap() as i32;
                bytes(&frames, |g| code(g).to_le_bytes())
            }
            "timestamp" => bytes(&frames, |g| (made.stamp)(g - start).to_le_bytes()),
            "frame_index" => ints(&|g| (g - start) as i64),
            "episode_index" => ints(&|_| episode as i64),
            "index" => ints(&|g| g as i64),
            "task_index" => ints(&|_| episode as i64 % 2),
            other => panic!("stream {other}"),
        };
        let what = format!("{} of episode {episode} of {made:?}", schema.name);
        assert_eq!(stream.values.dtype, schema.dtype, "{what}");
        assert_eq!((stream.values.dim, stream.values.rows), (schema.dim(), frames.len()), "{what}");
        assert_eq!(stream.values.buffer.as_slice(), wanted, "{what}");
        assert_eq!(stream.clock.rows(), frames.len(), "{what}");
    }
}

/// All units, their pieces, then each episode by itself, then all at once and backwards.
fn check_all(made: &Made) {
    let dir = made.write();
    let dataset = open(dir.path());
    assert_eq!(dataset.warnings(), Vec::<String>::new());
    let streams: Vec<usize> = (0..dataset.streams().len()).collect();
    let backwards: Vec<usize> = (0..made.lengths.len()).rev().collect();
    let alone = (0..made.lengths.len()).map(|episode| vec![episode]);
    let pieces = dataset.units().into_iter().flat_map(|unit| dataset.pieces(&unit).unwrap());
    for episodes in dataset.units().into_iter().chain(pieces).chain(alone).chain([backwards, vec![1, 1]]) {
        let read = dataset.read(&episodes, &streams).unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert_eq!(read.len(), episodes.len());
        for (episode, streams) in episodes.iter().zip(&read) {
            check(&dataset, made, *episode, streams);
        }
    }
}

#[test]
fn every_codec_and_kind_of_list_gives_the_same_numbers() {
    for compression in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::ZSTD(ZstdLevel::default()),
        Compression::BROTLI(BrotliLevel::default()),
        Compression::LZ4,
        Compression::LZ4_RAW,
    ] {
        for lists in [Lists::Open, Lists::Large, Lists::Fixed] {
            check_all(&Made { compression, lists, ..Made::default() });
        }
    }
}

#[test]
fn row_groups_and_pages_of_any_size_give_the_same_numbers() {
    for (row_group, page_rows) in [(1, 1), (4, 1 << 20), (5, 2), (1 << 20, 1), (1 << 20, 3), (7, 7)] {
        for lists in [Lists::Open, Lists::Fixed] {
            check_all(&Made { row_group, page_rows, lists, ..Made::default() });
        }
    }
}

#[test]
fn episodes_of_different_row_groups_are_pieces_and_a_group_across_episodes_keeps_them_together() {
    let pieces = |row_group| {
        let dir = Made { row_group, ..Made::default() }.write();
        let dataset = open(dir.path());
        let units = dataset.units().into_iter();
        units.map(|unit| dataset.pieces(&unit).unwrap()).collect::<Vec<_>>()
    };
    // Rows of the first file: 5 1 7; of the second: 4 9 3.
    assert_eq!(pieces(1), [[vec![0], vec![1], vec![2]], [vec![3], vec![4], vec![5]]]);
    assert_eq!(pieces(6), [vec![vec![0, 1], vec![2]], vec![vec![3, 4, 5]]]);
    assert_eq!(pieces(1 << 20), [[[0, 1, 2]], [[3, 4, 5]]]);
}

/// Readers of pieces meet at the clocks, which the first of them looks up for the whole file.
#[test]
fn pieces_read_by_many_threads_at_once_give_the_same_numbers() {
    let made = Made { lengths: (1..40).collect(), per_file: 39, row_group: 7, ..Made::default() };
    let dir = made.write();
    let dataset = open(dir.path());
    let streams: Vec<usize> = (0..dataset.streams().len()).collect();
    let pieces = dataset.pieces(&dataset.units()[0]).unwrap();
    assert!(pieces.len() > 3, "{pieces:?}");
    std::thread::scope(|scope| {
        for piece in &pieces {
            scope.spawn(|| {
                for (episode, read) in piece.iter().zip(dataset.read(piece, &streams).unwrap()) {
                    check(&dataset, &made, *episode, &read);
                }
            });
        }
    });
}

#[test]
fn every_version_and_split_into_files_gives_the_same_numbers() {
    for version in ["v2.0", "v2.1", "v3.0"] {
        for per_file in [1, 2, 6] {
            check_all(&Made { version, per_file, ..Made::default() });
        }
    }
}

#[test]
fn scalars_stored_as_lists_of_one_are_scalars() {
    for lists in [Lists::Open, Lists::Fixed] {
        check_all(&Made { wrapped_scalars: true, lists, ..Made::default() });
    }
}

#[test]
fn streams_are_what_info_json_declares() {
    let made = Made::default();
    let dir = made.write();
    let dataset = open(dir.path());
    let got: Vec<_> =
        dataset.streams().iter().take(6).map(|s| (s.name.as_str(), s.dtype, s.shape.clone())).collect();
    let wanted = [
        ("observation.state", DType::Float32, vec![3]),
        ("action", DType::Float64, vec![2]),
        ("grid", DType::Int16, vec![2, 2]),
        ("flag", DType::Bool, vec![]),
        ("count", DType::UInt8, vec![]),
        ("note", DType::Int32, vec![]),
    ];
    assert_eq!(got, wanted);
    assert_eq!(dataset.streams()[5].kind, StreamKind::Text);
    assert_eq!(&*dataset.texts(5).unwrap(), ["", "grasp", "lift \u{e9}", "reach"].map(str::to_owned));
    assert_eq!(dataset.tasks(), ["pick", "place"]);
}

#[test]
fn columns_nobody_asks_for_are_not_decoded() {
    let made = Made { compression: Compression::ZSTD(ZstdLevel::default()), ..Made::default() };
    let dir = made.write();
    let path = dir.path().join(&made.files()[0].0);
    let file = std::fs::File::open(&path).unwrap();
    let footer = parquet::file::metadata::ParquetMetaDataReader::new().parse_and_finish(&file).unwrap();
    let (start, len) = footer.row_group(0).column(0).byte_range(); // observation.state
    let mut content = std::fs::read(&path).unwrap();
    content[start as usize..(start + len) as usize].fill(0xff);
    std::fs::write(&path, content).unwrap();
    let dataset = open(dir.path());
    let others: Vec<usize> = (1..dataset.streams().len()).collect();
    assert_eq!(dataset.read(&[0], &others).unwrap()[0].len(), others.len());
    let error = chain(&dataset.read(&[0], &[0]).unwrap_err());
    assert!(error.contains("file-000.parquet"), "{error}");
}

#[test]
fn stamps_off_the_grid_are_taken_as_stored() {
    let made = Made { stamp: |frame| 1000.0 + frame as f32 * 0.25, ..Made::default() };
    let dir = made.write();
    let dataset = open(dir.path());
    let Clock::Stamps(stamps) = dataset.clock(0, 0).unwrap() else { panic!("a grid") };
    assert_eq!(&*stamps, [0_i64, 250, 500, 750, 1000].map(|ms| 1_000_000_000_000 + ms * 1_000_000));
    assert_eq!(dataset.span(0).unwrap(), (1_000_000_000_000, 1_001_000_000_000));
    assert_eq!(dataset.read(&[0], &[0]).unwrap()[0][0].clock, Clock::Stamps(stamps));
}

#[test]
fn long_episodes_stay_on_the_grid_where_float32_is_coarse() {
    // After 2048 s half a step of float32 exceeds LeRobot's tolerance.
    let made = Made { lengths: vec![30_000], ..Made::default() };
    let dir = made.write();
    assert!(matches!(open(dir.path()).clock(0, 0).unwrap(), Clock::Uniform(_)));
}

#[test]
fn equal_and_backward_stamps_name_row_and_both_stamps() {
    for (stamp, before, after) in [
        (
            (|frame| if frame == 3 { 2.0 } else { frame as f32 }) as fn(usize) -> f32,
            2_000_000_000_i64,
            2_000_000_000_i64,
        ),
        (|frame| if frame == 3 { 0.5 } else { frame as f32 }, 2_000_000_000, 500_000_000),
    ] {
        let made = Made { stamp, ..Made::default() };
        let dir = made.write();
        let error = chain(&open(dir.path()).read(&[2], &[0]).unwrap_err()); // rows 6 to 13 of the first file
        assert!(error.contains("file-000.parquet") && error.contains("row 8"), "{error}");
        assert!(error.contains(&before.to_string()) && error.contains(&after.to_string()), "{error}");
        assert!(open(dir.path()).read(&[1], &[0]).is_ok(), "an episode of one frame has no order");
    }
}

#[test]
fn nulls_are_nan_in_floats_and_errors_elsewhere() {
    let made = Made { lists: Lists::Fixed, ..Made::default() };
    let dir = made.write();
    let mut info = made.info();
    info["features"]["action"] = serde_json::json!({"dtype": "float32", "shape": [1]});
    write_json(dir.path(), &info);
    for (path, episodes) in made.files() {
        let batch = made.batch(episodes);
        let n = batch.num_rows();
        let floats: ArrayRef =
            Arc::new((0..n).map(|i| (i != 2).then_some(i as f32)).collect::<Float32Array>());
        let ints: ArrayRef = Arc::new((0..n as i64).map(|i| (i != 7).then_some(i)).collect::<Int64Array>());
        let batch = with_column(&with_column(&batch, "action", floats), "task_index", ints);
        made.write_parquet(&dir.path().join(path), &batch);
    }
    let dataset = open(dir.path());
    let read = dataset.read(&[0], &[1]).unwrap();
    let (elements, _) = read[0][0].values.buffer.as_chunks::<4>();
    let values: Vec<f32> = elements.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    assert!(values[2].is_nan() && values[..2] == [0.0, 1.0] && values[3..] == [3.0, 4.0], "{values:?}");
    let error = dataset.read(&[2], &[10]).unwrap_err().to_string();
    assert!(error.contains("\"task_index\", row 7 is null") && error.contains("file-000"), "{error}");
}

#[test]
fn several_threads_read_one_dataset() {
    let made = Made { row_group: 4, ..Made::default() };
    let dir = made.write();
    let dataset = open(dir.path());
    let streams: Vec<usize> = (0..dataset.streams().len()).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for episode in 0..made.lengths.len() {
                    check(&dataset, &made, episode, &dataset.read(&[episode], &streams).unwrap()[0]);
                }
            });
        }
    });
}
