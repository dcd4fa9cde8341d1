//! The rules of stream, frame and nested layouts, on small tables written here.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use crate::data::{chain, f64s, open, read};
use arrow::array::{
    Array, ArrayRef, FixedSizeListArray, Float32Array, Float64Array, Int32Array, Int64Array, ListArray,
    RecordBatch, StringArray, TimestampMillisecondArray,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use robocache_formats::{ReadError, StreamKind, TimeError};
use robocache_types::Clock;

fn write(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    write_groups(path, columns, 1 << 20);
}

fn write_groups(path: &Path, columns: Vec<(&str, ArrayRef)>, rows: usize) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(rows)).build();
    let file = File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn ints(values: &[i64]) -> ArrayRef {
    Arc::new(Int64Array::from(values.to_vec()))
}

fn floats(values: &[f64]) -> ArrayRef {
    Arc::new(Float64Array::from(values.to_vec()))
}

/// Lists of the given lengths over one array of elements.
fn lists(lengths: &[usize], elements: ArrayRef) -> ArrayRef {
    let field = Arc::new(Field::new("item", elements.data_type().clone(), true));
    Arc::new(ListArray::new(field, OffsetBuffer::from_lengths(lengths.iter().copied()), elements, None))
}

const FLIGHTS: &str = r#"
    layout = "streams"
    episodes = "flights/*"
    [streams.gyro]
    file = "imu.parquet"
    time = { column = "t", unit = "ms" }
    columns = ["g.x", "g.y"]
    [streams.n]
    file = "imu.parquet"
    time = { column = "t", unit = "ms" }
"#;

fn flight(root: &Path, name: &str, stamps: &[i64]) {
    let halves: Vec<f64> = stamps.iter().map(|t| *t as f64 / 2.0).collect();
    write(
        &root.join("flights").join(name).join("imu.parquet"),
        vec![("t", ints(stamps)), ("g.x", floats(&halves)), ("g.y", floats(&halves)), ("n", ints(stamps))],
    );
}

#[test]
fn each_match_of_the_glob_is_an_episode_in_natural_order() {
    let dir = tempfile::tempdir().unwrap();
    for (name, start) in [("ep_10", 100), ("ep_9", 90), ("ep_1", 10)] {
        flight(dir.path(), name, &[start, start + 1]);
    }
    std::fs::write(dir.path().join("flights/notes.txt"), "windy").unwrap();
    std::fs::write(dir.path().join("robocache.toml"), FLIGHTS).unwrap();
    let dataset = robocache_formats::Dataset::open(dir.path(), &Default::default()).unwrap();
    let names: Vec<&str> = dataset.episodes().iter().map(|episode| episode.name.as_str()).collect();
    assert_eq!(names, ["flights/ep_1", "flights/ep_9", "flights/ep_10"]);
    assert_eq!(dataset.span(2).unwrap(), (100_000_000, 101_000_000));
    assert_eq!(f64s(&read(&dataset, 1, "gyro").unwrap().values), [45.0, 45.0, 45.5, 45.5]);
    assert_eq!(dataset.streams()[0].clock, dataset.streams()[1].clock);
    assert!(dataset.warnings()[0].contains("notes.txt"), "{:?}", dataset.warnings());
    // The same content elsewhere is the same dataset; another rule, or one more episode, is another.
    let print = dataset.fingerprint();
    let copy = tempfile::tempdir().unwrap();
    for (name, start) in [("ep_10", 100), ("ep_9", 90), ("ep_1", 10)] {
        flight(copy.path(), name, &[start, start + 1]);
    }
    assert_eq!(open(copy.path(), FLIGHTS).unwrap().fingerprint(), print);
    assert_ne!(open(copy.path(), &FLIGHTS.replace("\"ms\"", "\"us\"")).unwrap().fingerprint(), print);
    flight(copy.path(), "ep_11", &[1, 2]);
    assert_ne!(open(copy.path(), FLIGHTS).unwrap().fingerprint(), print);
}

#[test]
fn an_episode_with_a_table_missing_or_of_another_kind_does_not_open() {
    let dir = tempfile::tempdir().unwrap();
    flight(dir.path(), "a", &[1, 2]);
    std::fs::create_dir_all(dir.path().join("flights/b")).unwrap();
    let text = chain(&open(dir.path(), FLIGHTS).unwrap_err());
    assert!(text.contains("flights/b/imu.parquet") && text.contains("missing"), "{text}");
    let narrow: ArrayRef = Arc::new(Float32Array::from(vec![1.0_f32, 2.0]));
    write(
        &dir.path().join("flights/b/imu.parquet"),
        vec![("t", ints(&[1, 2])), ("g.x", floats(&[1.0, 2.0])), ("g.y", narrow), ("n", ints(&[1, 2]))],
    );
    let text = chain(&open(dir.path(), FLIGHTS).unwrap_err());
    let wanted = ["flights/b/imu.parquet", "\"g.y\"", "float64", "Float32"];
    assert!(wanted.iter().all(|part| text.contains(part)), "{text}");
    write(
        &dir.path().join("flights/b/imu.parquet"),
        vec![("t", ints(&[1, 2])), ("g.x", floats(&[1.0, 2.0]))],
    );
    let text = chain(&open(dir.path(), FLIGHTS).unwrap_err());
    assert!(text.contains("no column \"g.y\"") && text.contains("\"g.x\""), "{text}");
    std::fs::write(dir.path().join("flights/b/imu.parquet"), b"0123456789").unwrap();
    let text = chain(&open(dir.path(), FLIGHTS).unwrap_err());
    assert!(text.contains("flights/b/imu.parquet"), "{text}");
}

/// One stream `x` over stamps in milliseconds, with further lines for the manifest.
fn one(stamps: &[i64], values: ArrayRef, more: &str) -> Result<(Vec<i64>, Vec<f64>), ReadError> {
    let dir = tempfile::tempdir().unwrap();
    let rows: Vec<i64> = (0..values.len() as i64).map(|row| row % 2).collect();
    write(&dir.path().join("x.parquet"), vec![("t", ints(stamps)), ("I", ints(&rows)), ("x", values)]);
    let manifest = format!(
        "layout = \"streams\"\n[streams.x]\nfile = \"x.parquet\"\ntime = {{ column = \"t\", unit = \"ms\" }}\n{more}"
    );
    let stream = read(&open(dir.path(), &manifest).unwrap(), 0, "x")?;
    let stamps = (0..stream.clock.rows()).map(|row| stream.clock.t_ns(row) / 1_000_000).collect();
    Ok((stamps, f64s(&stream.values)))
}

#[test]
fn order_and_duplicates_do_what_the_manifest_says() {
    let x = || floats(&[1.0, 2.0, 4.0, 8.0]);
    let equal = [10, 20, 20, 30];
    assert_eq!(one(&equal, x(), "").unwrap(), (vec![10, 20, 30], vec![1.0, 4.0, 8.0]));
    let first = one(&equal, x(), "duplicates = \"first\"").unwrap();
    assert_eq!(first, (vec![10, 20, 30], vec![1.0, 2.0, 8.0]));
    let mean = one(&equal, x(), "duplicates = \"mean\"").unwrap();
    assert_eq!(mean, (vec![10, 20, 30], vec![1.0, 3.0, 8.0]));
    let error = one(&equal, x(), "duplicates = \"error\"").unwrap_err();
    assert!(matches!(error, ReadError::Time(TimeError::Duplicate { first: 1, second: 2, .. })), "{error}");

    let back = [10, 30, 20, 40];
    let error = one(&back, x(), "").unwrap_err();
    let text = error.to_string();
    assert!(text.contains("x.parquet") && text.contains("row 2: 30000000 ns, then 20000000 ns"), "{text}");
    let sorted = one(&back, x(), "order = \"sort\"").unwrap();
    assert_eq!(sorted, (vec![10, 20, 30, 40], vec![1.0, 4.0, 2.0, 8.0]));
    let both = one(&[30, 10, 30, 10], x(), "order = \"sort\"\nduplicates = \"mean\"").unwrap();
    assert_eq!(both, (vec![10, 30], vec![5.0, 2.5]));
}

#[test]
fn a_filter_comes_before_order_and_errors_still_name_the_row_of_the_file() {
    let x = || floats(&[1.0, 2.0, 4.0, 8.0]);
    // Rows of instance 1 run backwards; those of instance 0 do not.
    let stamps = [10, 9, 20, 3];
    assert_eq!(one(&stamps, x(), "where = { I = 0 }").unwrap(), (vec![10, 20], vec![1.0, 4.0]));
    let error = one(&stamps, x(), "where = { I = 1 }").unwrap_err();
    assert!(matches!(error, ReadError::Time(TimeError::Backwards { row: 3, .. })), "{error}");
    // A null of another instance is nobody's business; one of our own is.
    let holey: ArrayRef = Arc::new(Int64Array::from(vec![Some(1), None, Some(3), Some(4)]));
    assert!(one(&[1, 2, 3, 4], Arc::clone(&holey), "where = { I = 0 }").is_ok());
    let error = one(&[1, 2, 3, 4], holey, "where = { I = 1 }").unwrap_err();
    assert!(matches!(&error, ReadError::Null { row: 1, column, .. } if column == "x"), "{error}");
}

#[test]
fn arrow_timestamps_need_no_unit() {
    let dir = tempfile::tempdir().unwrap();
    let stamps: ArrayRef =
        Arc::new(TimestampMillisecondArray::from(vec![1_432_235_498_039, 1_432_235_498_040]));
    write(&dir.path().join("x.parquet"), vec![("t", stamps), ("x", floats(&[1.0, 2.0]))]);
    let manifest = "layout = \"streams\"\n[streams.x]\nfile = \"x.parquet\"\ntime = { column = \"t\" }";
    let stream = read(&open(dir.path(), manifest).unwrap(), 0, "x").unwrap();
    assert_eq!(stream.clock.first_ns(), 1_432_235_498_039_000_000);
}

const FRAMES: &str = r#"
    layout = "frames"
    [frames]
    files = "data/*.parquet"
    episode = "ep"
    time = { column = "t", unit = "s" }
    [streams.state]
    columns = ["a", "b"]
    [streams.label]
"#;

fn frames(path: &Path, episodes: &[i64], t: &[f64]) {
    let doubled: Vec<f64> = t.iter().map(|t| t * 2.0).collect();
    let labels: ArrayRef =
        Arc::new(StringArray::from_iter_values(episodes.iter().map(|ep| format!("task {ep}"))));
    write(
        path,
        vec![
            ("ep", ints(episodes)),
            ("t", floats(t)),
            ("a", floats(t)),
            ("b", floats(&doubled)),
            ("label", labels),
        ],
    );
}

#[test]
fn frame_tables_split_into_episodes_with_their_own_time() {
    let dir = tempfile::tempdir().unwrap();
    frames(&dir.path().join("data/f_2.parquet"), &[7, 7, 3, 3, 3], &[0.0, 0.5, 10.0, 10.25, 10.5]);
    frames(&dir.path().join("data/f_10.parquet"), &[1], &[4.0]);
    let dataset = open(dir.path(), FRAMES).unwrap();
    let indices: Vec<i64> = dataset.episodes().iter().map(|episode| episode.index).collect();
    assert_eq!((indices, dataset.units()), (vec![7, 3, 1], vec![vec![0, 1], vec![2]]));
    assert_eq!(dataset.span(1).unwrap(), (10_000_000_000, 10_500_000_000));
    let read = dataset.read(&[2, 1], &[0, 1]).unwrap();
    assert_eq!(f64s(&read[0][0].values), [4.0, 8.0]);
    assert_eq!(f64s(&read[1][0].values), [10.0, 20.0, 10.25, 20.5, 10.5, 21.0]);
    assert_eq!(dataset.streams()[1].kind, StreamKind::Text);
    assert_eq!(dataset.texts(1).unwrap().to_vec(), ["task 1", "task 3", "task 7"]);
    assert_eq!(read[1][1].values.buffer.as_slice(), [1_i32; 3].map(i32::to_le_bytes).concat());

    frames(&dir.path().join("data/f_11.parquet"), &[7], &[4.0]);
    let text = chain(&open(dir.path(), FRAMES).unwrap_err());
    assert!(text.contains("f_11.parquet") && text.contains("episode 7 comes back at row 0"), "{text}");
}

const NESTED: &str = r#"
    layout = "nested"
    [frames]
    files = "*.parquet"
    episode = "id"
    where = { ok = 1 }
    [streams.pose]
    time = { column = "pose_t", unit = "us" }
    columns = ["pose"]
    [streams.force]
    time = { column = "force_t", unit = "s" }
    columns = ["fx", "fy"]
    duplicates = "mean"
    [streams.grip]
    rate = 2
"#;

fn nested(path: &Path, force_lengths: &[usize]) {
    let pose_field = Arc::new(Field::new("item", DataType::Float64, true));
    let pose =
        FixedSizeListArray::new(pose_field, 2, floats(&(0..12).map(f64::from).collect::<Vec<_>>()), None);
    let force: Vec<f64> = (0..force_lengths.iter().sum::<usize>()).map(|k| k as f64).collect();
    write(
        path,
        vec![
            ("id", ints(&[40, 41, 42])),
            ("ok", Arc::new(Int32Array::from(vec![1, 0, 1]))),
            ("pose_t", lists(&[2, 1, 3], ints(&[100, 200, 0, 5, 6, 7]))),
            ("pose", lists(&[2, 1, 3], Arc::new(pose))),
            ("force_t", lists(&[4, 0, 1], floats(&[0.5, 1.0, 1.0, 1.5, 9.0]))),
            ("fx", lists(force_lengths, floats(&force))),
            ("fy", lists(force_lengths, floats(&force))),
            ("grip", lists(&[3, 0, 2], lists(&[1; 5], floats(&[1.0, 2.0, 3.0, 4.0, 5.0])))),
        ],
    );
}

#[test]
fn a_row_of_lists_is_an_episode_of_several_clocks() {
    let dir = tempfile::tempdir().unwrap();
    nested(&dir.path().join("rows.parquet"), &[4, 0, 1]);
    let dataset = open(dir.path(), NESTED).unwrap();
    let indices: Vec<i64> = dataset.episodes().iter().map(|episode| episode.index).collect();
    assert_eq!(indices, [40, 42]);
    let read = dataset.read(&[1, 0], &[0, 1, 2]).unwrap();
    assert_eq!(f64s(&read[0][0].values), [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]);
    assert_eq!(read[0][0].clock, Clock::from_stamps(vec![5_000, 6_000, 7_000]).unwrap());
    assert_eq!(f64s(&read[1][0].values), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(f64s(&read[1][1].values), [0.0, 0.0, 1.5, 1.5, 3.0, 3.0]);
    assert_eq!(read[1][1].clock.t_ns(1), 1_000_000_000);
    assert_eq!((f64s(&read[1][2].values), read[1][2].clock.last_ns()), (vec![1.0, 2.0, 3.0], 1_000_000_000));
    assert_eq!(dataset.streams()[2].shape, [1]);
    assert_eq!(dataset.span(0).unwrap(), (0, 1_500_000_000));
}

#[test]
fn pieces_of_a_table_are_episodes_that_share_no_row_group() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = "layout = \"frames\"\n[frames]\nfiles = \"data/*\"\nepisode = \"ep\"\ntime = { rate = 1 }\n[streams.x]";
    for (name, ep) in [("a", [0_i64, 0, 1, 1, 2, 2, 2, 2, 3]), ("b", [4, 5, 5, 5, 5, 5, 6, 6, 7])] {
        let x: Vec<f64> = ep.iter().map(|ep| *ep as f64).collect();
        write_groups(&dir.path().join("data").join(name), vec![("ep", ints(&ep)), ("x", floats(&x))], 4);
    }
    let dataset = open(dir.path(), manifest).unwrap();
    assert_eq!(dataset.units(), [[0, 1, 2, 3], [4, 5, 6, 7]]);
    let pieces = dataset.pieces(&[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
    assert_eq!(pieces, [vec![0, 1], vec![2], vec![3], vec![4, 5, 6], vec![7]]);
    assert_eq!(dataset.pieces(&[6, 4, 7]).unwrap(), [[4], [6], [7]], "what lies between was not asked for");

    let rows: ArrayRef = ints(&[8, 9, 10, 11, 12]);
    let x = lists(&[1; 5], floats(&[8.0, 9.0, 10.0, 11.0, 12.0]));
    write_groups(&dir.path().join("rows.parquet"), vec![("id", rows), ("x", x)], 2);
    let manifest =
        "layout = \"nested\"\n[frames]\nfiles = \"*.parquet\"\nepisode = \"id\"\n[streams.x]\nrate = 2";
    let dataset = open(dir.path(), manifest).unwrap();
    assert_eq!(dataset.pieces(&[0, 1, 2, 3, 4]).unwrap(), [vec![0, 1], vec![2, 3], vec![4]]);
}

#[test]
fn rows_of_lists_are_drafted_as_nested() {
    let dir = tempfile::tempdir().unwrap();
    write(
        &dir.path().join("rows.parquet"),
        vec![
            ("episode_id", ints(&[40, 41])),
            ("timestamp", lists(&[2, 3], floats(&[0.0, 0.1, 0.0, 0.1, 0.2]))),
            ("state", lists(&[2, 3], lists(&[2; 5], floats(&[0.0; 10])))),
        ],
    );
    let (text, notes) = robocache_formats::draft_manifest(dir.path()).unwrap();
    let dataset = open(dir.path(), &text).unwrap_or_else(|error| panic!("{error}\n{text}\n{notes:?}"));
    assert_eq!((dataset.episodes()[1].index, dataset.span(1).unwrap()), (41, (0, 200_000_000)));
    assert_eq!(
        (dataset.streams()[0].name.as_str(), dataset.streams()[0].shape.as_slice()),
        ("state", &[2][..])
    );
}

/// Seen, by fuzzing: a draft with a `[frames]` and no stream, which does not parse.
#[test]
fn a_draft_without_streams_is_all_comments_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let stamps = lists(&[2, 1], floats(&[0.0, 0.1, 0.0]));
    write(&dir.path().join("rows.parquet"), vec![("episode_id", ints(&[40, 41])), ("timestamp", stamps)]);
    let (text, notes) = robocache_formats::draft_manifest(dir.path()).unwrap();
    assert!(text.starts_with("layout = \"nested\"\n"), "{text}");
    assert!(text.contains("\n# [frames]\n") && text.contains("\n# time = "), "{text}");
    assert!(text.lines().skip(1).all(|line| line.is_empty() || line.starts_with('#')), "{text}");
    assert!(notes.iter().any(|note| note.contains("must be written by hand")), "{notes:?}");
}

#[test]
fn lists_of_one_row_that_differ_in_length_are_refused_with_both() {
    let dir = tempfile::tempdir().unwrap();
    nested(&dir.path().join("rows.parquet"), &[3, 1, 1]);
    let text = chain(&open(dir.path(), NESTED).unwrap().read(&[0], &[1]).unwrap_err());
    let wanted = ["row 0", "\"fx\" has 3 elements", "\"force_t\" has 4", "rows.parquet"];
    assert!(wanted.iter().all(|part| text.contains(part)), "{text}");
}

#[test]
fn what_is_no_list_cannot_be_a_stream_of_nested_rows() {
    let dir = tempfile::tempdir().unwrap();
    nested(&dir.path().join("rows.parquet"), &[4, 0, 1]);
    let manifest = NESTED.replace("columns = [\"pose\"]", "columns = [\"id\"]");
    let text = chain(&open(dir.path(), &manifest).unwrap_err());
    assert!(text.contains("\"id\" should hold a list") && text.contains("Int64"), "{text}");
}
