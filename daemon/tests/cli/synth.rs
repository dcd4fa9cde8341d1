//! What `synth` writes, read back by `inspect`; the readers of `formats` are held against recorded data elsewhere.

use std::path::Path;

use serde_json::{Value, json as value};

use super::common::{json, private_directory, robocached, text};

fn synth_then_inspect(directory: &Path, args: &[&str]) -> (Value, Value) {
    let out = directory.join("dataset");
    let out = out.to_str().unwrap();
    let written = json(directory, &[&["synth", out, "--json"], args].concat());
    (written, json(directory, &["inspect", out, "--json", "--all"]))
}

fn stream<'a>(facts: &'a Value, name: &str) -> &'a Value {
    facts["streams"].as_array().unwrap().iter().find(|stream| stream["name"] == name).unwrap()
}

#[test]
fn lerobot_datasets_of_both_versions_hold_what_was_asked_for() {
    for (layout, list, codec) in [
        ("lerobot-v2.1", "fixed", "snappy"),
        ("lerobot-v3.0", "fixed", "zstd"),
        ("lerobot-v3.0", "variable", "gzip"),
        ("lerobot-v2.1", "variable", "lz4"),
        ("lerobot-v3.0", "fixed", "brotli"),
        ("lerobot-v3.0", "variable", "none"),
    ] {
        let directory = private_directory();
        let args = [
            "--layout",
            layout,
            "--list",
            list,
            "--codec",
            codec,
            "--episodes",
            "5",
            "--frames",
            "70",
            "--fps",
            "50",
            "--state-dim",
            "7",
            "--action-dim",
            "1",
            "--tactile-dim",
            "16",
        ];
        let (written, facts) = synth_then_inspect(directory.path(), &args);
        assert_eq!((&written["episodes"], &written["frames"]), (&value!(5), &value!(350)));
        assert_eq!(
            (&facts["episodes"], &facts["frames"], &facts["fps"]),
            (&value!(5), &value!(350), &value!(50.0))
        );
        assert_eq!(facts["tasks"].as_array().unwrap().len(), 3);
        assert_eq!(facts["warnings"], value!([]), "{layout} {list}");
        for (name, dim) in [("observation.state", 7), ("observation.tactile", 16)] {
            assert_eq!(stream(&facts, name)["shape"], value!([dim]), "{layout} {list} {name}");
        }
        for stream in facts["streams"].as_array().unwrap() {
            let stats = &stream["stats"];
            assert_eq!(
                (&stats["rows"], &stats["nulls"], &stats["nan"]),
                (&value!(350), &value!(0), &value!(0))
            );
            assert_eq!(stats["error"], Value::Null, "{stream}");
        }
        assert_eq!(stream(&facts, "index")["stats"]["max"], 349.0);
        assert_eq!(stream(&facts, "frame_index")["stats"]["max"], 69.0);
    }
}

#[test]
fn stream_tables_have_the_rates_repeats_and_holes_of_a_recording() {
    let directory = private_directory();
    let args = ["--layout", "streams", "--episodes", "2", "--frames", "300", "--tactile-dim", "3"];
    let (written, facts) = synth_then_inspect(directory.path(), &args);
    assert_eq!((&written["episodes"], &facts["episodes"]), (&value!(2), &value!(2)));
    for (name, hz) in [
        ("imu", 200.0),
        ("wheel", 50.0),
        ("camera_position", 20.0),
        ("joints", 100.0),
        ("command", 30.0),
        ("tactile", 150.0),
    ] {
        let rate = stream(&facts, name)["stats"]["median_rate_hz"].as_f64().unwrap();
        assert!((rate / hz - 1.0).abs() < 0.05, "{name}: {rate} Hz, wanted {hz}");
    }
    // 10 s at 200 Hz: rows 500, 1000 and 1500 of each episode repeat the stamp before.
    assert_eq!(stream(&facts, "imu")["stats"]["duplicate_stamps"], 6);
    let wheel = &stream(&facts, "wheel")["stats"];
    assert_eq!(wheel["gaps_over_5_periods"], 2);
    let coverage = stream(&facts, "wheel")["coverage"].as_str().unwrap();
    assert!(coverage.contains("█··█") || coverage.contains("█···█"), "no hole in {coverage}");
    assert_eq!(stream(&facts, "camera_orientation")["interp"], "slerp");
    assert_eq!(stream(&facts, "camera_orientation")["shape"], value!([4]));
}

#[test]
fn size_decides_how_many_episodes_there_are() {
    let directory = private_directory();
    let args = ["--size", "1MiB", "--frames", "100", "--state-dim", "8", "--action-dim", "8"];
    let (written, facts) = synth_then_inspect(directory.path(), &args);
    // (8 + 8) float32, a float32 and four int64: 100 bytes a frame, 10,000 an episode.
    assert_eq!(written["episodes"], 105);
    assert_eq!(facts["episodes"], 105);
    assert!(written["data_bytes"].as_u64().unwrap() >= 1 << 20);
}

#[test]
fn equal_seeds_write_equal_bytes_and_others_do_not() {
    let directory = private_directory();
    let bytes = |name: &str, seed: &str| {
        let out = directory.path().join(name);
        let args = ["synth", out.to_str().unwrap(), "--episodes", "1", "--frames", "50", "--seed", seed];
        assert!(robocached(directory.path(), &args).status.success());
        std::fs::read(out.join("data/chunk-000/file-000.parquet")).unwrap()
    };
    assert_eq!(bytes("a", "1"), bytes("b", "1"));
    assert_ne!(bytes("c", "1"), bytes("d", "2"));
}

#[test]
fn a_directory_that_is_not_empty_is_left_alone() {
    let directory = private_directory();
    std::fs::write(directory.path().join("mine"), "kept").unwrap();
    let output = robocached(directory.path(), &["synth", directory.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("not empty"));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}
