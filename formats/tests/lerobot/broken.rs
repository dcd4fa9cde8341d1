//! Broken and contradictory LeRobot datasets: each a clear error that names the file, never a panic.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::made::{Lists, Made, chain, with_column, write_json};
use arrow::array::{ArrayRef, Int64Array, ListArray};
use arrow::datatypes::Float32Type;
use robocache_formats::{Dataset, OpenError, OpenOptions, ReadError};

fn open(root: &Path) -> Result<Dataset, OpenError> {
    Dataset::open(root, &OpenOptions::default())
}

/// The error of opening, or of reading everything.
fn error(root: &Path) -> String {
    let dataset = match open(root) {
        Ok(dataset) => dataset,
        Err(error) => return chain(&error),
    };
    let streams: Vec<usize> = (0..dataset.streams().len()).collect();
    let wrong = dataset.units().iter().find_map(|unit| dataset.read(unit, &streams).err());
    chain(&wrong.expect("a broken dataset opens and reads"))
}

fn v2() -> Made {
    Made { version: "v2.1", ..Made::default() }
}

#[test]
fn files_cut_short_are_errors_that_name_them() {
    for made in [v2(), Made::default()] {
        let last = made.files().last().unwrap().0.clone();
        for keep in [0, 3, 4, 10, 11, 12, 100] {
            let dir = made.write();
            let path = dir.path().join(&last);
            let content = fs::read(&path).unwrap();
            fs::write(&path, &content[..keep]).unwrap();
            let error = error(dir.path());
            assert!(error.contains(last.to_str().unwrap()), "{keep} bytes: {error}");
        }
        let dir = made.write();
        let path = dir.path().join(&last);
        let content = fs::read(&path).unwrap();
        fs::write(&path, &content[..content.len() - 1]).unwrap();
        assert!(error(dir.path()).contains("broken or truncated Parquet"));
    }
}

#[test]
fn an_empty_file_and_a_foreign_one_say_what_they_are() {
    let made = v2();
    for (content, says) in [(&b""[..], "is empty"), (b"hello world", "starts with \"hello wo\"")] {
        let dir = made.write();
        fs::write(dir.path().join(&made.files()[3].0), content).unwrap();
        let error = error(dir.path());
        assert!(error.contains(says) && error.contains("episode_000003"), "{error}");
    }
}

#[test]
fn a_missing_file_is_named_with_its_episode() {
    for (made, name) in [(v2(), "episode 3"), (Made::default(), "episode 3")] {
        let dir = made.write();
        let path = made.files().iter().find(|(_, episodes)| episodes.contains(&3)).unwrap().0.clone();
        fs::remove_file(dir.path().join(&path)).unwrap();
        let error = chain(&open(dir.path()).unwrap_err());
        assert!(error.contains(name) && error.contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn a_file_whose_schema_differs_from_its_siblings_is_named_with_the_column() {
    let made = v2();
    let rows = made.lengths[4];
    let doubles: ArrayRef = Arc::new(Int64Array::from(vec![1; rows]));
    let longer: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(
        (0..rows).map(|i| Some(vec![Some(0.0); if i == 2 { 4 } else { 3 }])),
    ));
    for (column, says) in [
        (doubles, "column \"observation.state\" should hold float32 of shape [3], found Int64"),
        (longer, "column \"observation.state\", row 2: wanted 3 elements, found 4"),
    ] {
        let dir = made.write();
        let batch = with_column(&made.batch(4..5), "observation.state", column);
        made.write_parquet(&dir.path().join(&made.files()[4].0), &batch);
        let error = error(dir.path());
        assert!(error.contains(says) && error.contains("episode_000004"), "{error}");
    }
    let dir = made.write();
    let batch = made.batch(4..5);
    let narrow = batch.project(&(1..batch.num_columns()).collect::<Vec<_>>()).unwrap();
    made.write_parquet(&dir.path().join(&made.files()[4].0), &narrow);
    let error = error(dir.path());
    assert!(
        error.contains("has no column \"observation.state\"") && error.contains("episode_000004"),
        "{error}"
    );
}

#[test]
fn a_row_count_that_contradicts_the_metadata_is_named() {
    for made in [v2(), Made::default()] {
        let dir = made.write();
        let (path, episodes) = made.files().last().unwrap().clone();
        let batch = made.batch(episodes);
        made.write_parquet(&dir.path().join(&path), &batch.slice(0, batch.num_rows() - 1));
        let error = error(dir.path());
        let says = format!("has {} rows where the metadata says {}", batch.num_rows() - 1, batch.num_rows());
        assert!(error.contains(&says) && error.contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn an_episode_index_that_contradicts_the_metadata_is_named_and_spares_the_others() {
    let made = Made::default();
    let dir = made.write();
    let (path, episodes) = made.files()[0].clone();
    let batch = made.batch(episodes);
    let mut owners: Vec<i64> = (0..3).flat_map(|e| vec![e; made.lengths[e as usize]]).collect();
    owners[6] = 9; // the first row of episode 2
    let batch = with_column(&batch, "episode_index", Arc::new(Int64Array::from(owners)));
    made.write_parquet(&dir.path().join(&path), &batch);
    let dataset = open(dir.path()).unwrap();
    let error = dataset.read(&[2], &[0]).unwrap_err();
    assert!(matches!(error, ReadError::EpisodeIndex { row: 6, wanted: 2, found: 9, .. }), "{error}");
    assert!(dataset.read(&[0, 1, 3], &[0]).is_ok());
}

#[test]
fn a_task_that_is_not_in_the_table_is_named_where_it_is_asked_for() {
    let made = Made::default();
    let dir = made.write();
    let (path, episodes) = made.files()[0].clone();
    let batch = made.batch(episodes);
    let mut tasks = vec![0_i64; batch.num_rows()];
    tasks[6] = 77; // the first row of episode 2
    made.write_parquet(
        &dir.path().join(&path),
        &with_column(&batch, "task_index", Arc::new(Int64Array::from(tasks))),
    );
    let dataset = open(dir.path()).unwrap();
    let task = dataset.streams().iter().position(|stream| stream.name == "task_index").unwrap();
    let error = chain(&dataset.read(&[2], &[task]).unwrap_err());
    assert!(error.contains("row 6 has task_index 77") && error.contains("tasks"), "{error}");
    assert!(dataset.read(&[0, 1, 3], &[task]).is_ok());
    assert!(dataset.read(&[2], &[0]).is_ok());
}

#[test]
fn v3_rows_are_found_by_their_global_number_where_the_metadata_names_the_wrong_file() {
    let made = Made::default();
    let dir = made.write();
    let wrong = Made { per_file: 4, ..Made::default() }.episodes_table(); // episode 3 counted to the first file
    made.write_parquet(&dir.path().join("meta/episodes/chunk-000/file-000.parquet"), &wrong);
    let dataset = open(dir.path()).unwrap();
    assert_eq!(dataset.units(), [vec![0, 1, 2], vec![3, 4, 5]]);
    let warnings = dataset.warnings();
    assert!(warnings.len() == 1 && warnings[0].contains("1 of 6 episodes (episode 3 "), "{warnings:?}");
    let index = dataset.streams().iter().position(|stream| stream.name == "index").unwrap();
    let read = dataset.read(&[3], &[index]).unwrap();
    assert_eq!(read[0][0].values.buffer.as_slice()[..8], 13_i64.to_le_bytes());
}

#[test]
fn a_dataset_of_no_episodes_does_not_open() {
    for version in ["v2.0", "v3.0"] {
        let dir = Made { version, lengths: vec![], ..Made::default() }.write();
        let error = open(dir.path()).unwrap_err();
        assert!(matches!(error, OpenError::NoEpisodes { .. }), "{error}");
    }
}

#[test]
fn a_directory_that_is_no_dataset_says_what_was_looked_for_and_found() {
    let dir = tempfile::tempdir().unwrap();
    let error = open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("meta/info.json") && error.contains("robocache.toml"), "{error}");
    assert!(error.contains("an empty directory"), "{error}");
    fs::write(dir.path().join("table.csv"), "").unwrap();
    assert!(open(dir.path()).unwrap_err().to_string().contains("\"table.csv\""));
    let missing = open(&dir.path().join("nowhere")).unwrap_err();
    assert!(matches!(&missing, OpenError::Io { path, .. } if path.ends_with("nowhere")), "{missing}");
}

#[test]
fn a_wrong_info_json_says_what_is_wrong() {
    type Edit = fn(&mut serde_json::Value);
    let edits: [(Edit, &str); 13] = [
        (|info| info["codebase_version"] = "v1.6".into(), "codebase_version \"v1.6\""),
        (|info| info["codebase_version"] = "v4.0".into(), "codebase_version \"v4.0\""),
        (|info| info["codebase_version"] = "latest".into(), "codebase_version \"latest\""),
        (|info| info["fps"] = 0.into(), "fps must be"),
        (|info| info["fps"] = "10".into(), "fps must be"),
        (|info| info["data_path"] = "../{chunk_index}.parquet".into(), "does not stay inside"),
        (|info| info["data_path"] = "/etc/{chunk_index}".into(), "does not stay inside"),
        (|info| info["data_path"] = "data/{nobody}".into(), "\"nobody\" is not known here"),
        (|info| info["features"] = serde_json::json!({}), "features is empty"),
        (
            |info| info["features"]["action"]["shape"] = serde_json::json!([1_u64 << 40]),
            "shape [1099511627776]",
        ),
        (
            |info| info["features"]["action"]["shape"] = serde_json::json!([u64::MAX, 2]),
            "at most 16777216 elements",
        ),
        (|info| info["features"]["action"]["shape"] = serde_json::json!([0]), "positive lengths"),
        (|info| info["features"]["action"]["shape"] = serde_json::json!([2, 7]), "float64 of shape [2, 7]"),
    ];
    let made = Made { lists: Lists::Fixed, ..Made::default() };
    let dir = made.write();
    for (edit, says) in edits {
        let mut info = made.info();
        edit(&mut info);
        write_json(dir.path(), &info);
        let error = chain(&open(dir.path()).expect_err(says));
        assert!(error.contains(says), "{says}: {error}");
    }
    fs::write(dir.path().join("meta/info.json"), "{\"fps\": 1").unwrap();
    let error = chain(&open(dir.path()).unwrap_err());
    assert!(error.contains("info.json") && error.contains("EOF"), "{error}");
}

#[test]
fn broken_lines_of_v2_metadata_are_named() {
    let made = v2();
    let dir = made.write();
    let path = dir.path().join("meta/episodes.jsonl");
    let whole = fs::read_to_string(&path).unwrap();
    for (line, says) in [
        ("{\"episode_index\": 9}", "line 7"),
        ("{\"episode_index\": 1, \"length\": 3}", "episode_index 1 twice"),
        ("{\"episode_index\": 9, \"length\": 0}", "at least one frame"),
        ("{\"episode_index\": 9, \"length\": 18446744073709551615}", "no dataset is that long"),
    ] {
        fs::write(&path, format!("{whole}\n{line}\n")).unwrap();
        fs::create_dir_all(dir.path().join("data/chunk-002")).unwrap();
        fs::write(dir.path().join("data/chunk-002/episode_000009.parquet"), "").unwrap();
        let error = chain(&open(dir.path()).expect_err(says));
        assert!(error.contains(says) && error.contains("meta"), "{says}: {error}");
    }
}

#[test]
fn what_is_only_odd_warns() {
    let made = Made::default();
    let dir = made.write();
    let mut info = made.info();
    info["codebase_version"] = "v3.7".into();
    info["surprise"] = 1.into();
    info["total_frames"] = 5.into();
    info["features"]["count"]["dtype"] = "int64".into();
    info["features"].as_object_mut().unwrap().remove("flag");
    write_json(dir.path(), &info);
    let warnings = open(dir.path()).unwrap().warnings();
    for says in [
        "v3.7 is newer",
        "surprise",
        "total_frames is 5, the episodes' own metadata has 29",
        "\"count\" is declared int64 and stored as uint8",
        "left alone: flag",
    ] {
        assert!(warnings.iter().any(|warning| warning.contains(says)), "{says}: {warnings:?}");
    }
    assert_eq!(warnings.len(), 5, "{warnings:?}");
}

#[test]
fn positions_that_do_not_exist_and_opaque_streams_are_refused() {
    let made = Made::default();
    let dir = made.write();
    let mut info = made.info();
    info["features"]["cam"] = serde_json::json!({"dtype": "video", "shape": [4, 4, 3]});
    write_json(dir.path(), &info);
    let dataset = open(dir.path()).unwrap();
    let camera = dataset.streams().len() - 1;
    assert!(matches!(dataset.read(&[6], &[0]), Err(ReadError::NoSuchEpisode { position: 6, episodes: 6 })));
    assert!(matches!(dataset.read(&[0], &[99]), Err(ReadError::NoSuchStream { position: 99, .. })));
    assert!(matches!(dataset.read(&[0], &[camera]), Err(ReadError::Opaque { .. })));
    assert!(matches!(dataset.texts(0), Err(ReadError::NotText { .. })));
    assert!(dataset.read(&[0], &[]).unwrap()[0].is_empty());
}

/// A small step of xorshift64*, so that every run damages the same places.
fn next(seed: &mut u64) -> u64 {
    *seed ^= *seed >> 12;
    *seed ^= *seed << 25;
    *seed ^= *seed >> 27;
    seed.wrapping_mul(0x2545_f491_4f6c_dd1d)
}

/// Most memory this process ever had, in KiB.
fn peak_rss_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn damaged_files_are_values_or_errors_and_never_panics_or_gigabytes() {
    let mut seed = 0x5eed;
    let (mut values, mut errors) = (0, 0);
    for made in [
        Made { lengths: vec![20], page_rows: 5, row_group: 8, ..Made::default() },
        Made {
            lengths: vec![20],
            compression: parquet::basic::Compression::UNCOMPRESSED,
            lists: Lists::Fixed,
            ..Made::default()
        },
    ] {
        let dir = made.write();
        let path = dir.path().join(&made.files()[0].0);
        let content = fs::read(&path).unwrap();
        for round in 0..500 {
            let mut damaged = content.clone();
            // Half of them in the footer, where sizes and offsets are.
            let footer = content.len() * 3 / 4;
            let from = if round % 2 == 0 { 0 } else { footer };
            match round % 5 {
                0 => damaged.truncate((next(&mut seed) as usize) % content.len()),
                1 => damaged[from + next(&mut seed) as usize % (content.len() - from)] = 0xff,
                _ => {
                    let at = from + next(&mut seed) as usize % (content.len() - from);
                    damaged[at] ^= 1 << (next(&mut seed) % 8);
                }
            }
            fs::write(&path, damaged).unwrap();
            let read = open(dir.path()).map_err(|error| chain(&error)).and_then(|dataset| {
                let streams: Vec<usize> = (0..dataset.streams().len()).collect();
                dataset.read(&[0], &streams).map_err(|error| chain(&error))
            });
            match read {
                Ok(_) => values += 1,
                Err(_) => errors += 1,
            }
        }
    }
    assert!(
        values > 50 && errors > 200,
        "{values} read, {errors} did not: the damage is not what it was meant to be"
    );
    assert!(peak_rss_kib() < 1 << 20, "{} KiB", peak_rss_kib());
}
