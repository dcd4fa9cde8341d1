//! `inspect` on recorded data, against facts found with pyarrow and numpy.

use serde_json::Value;

use super::common::{json, private_directory, real, robocached, text};

fn inspect(name: &str, further: &[&str]) -> Value {
    let directory = private_directory();
    let path = real(name);
    json(directory.path(), &[&["inspect", path.to_str().unwrap(), "--json"], further].concat())
}

fn stream<'a>(facts: &'a Value, name: &str) -> &'a Value {
    let streams = facts["streams"].as_array().unwrap();
    streams.iter().find(|stream| stream["name"] == name).unwrap_or_else(|| panic!("no {name} in {streams:?}"))
}

#[test]
fn lerobot_v21_and_its_v30_conversion_show_the_same_streams() {
    let (old, new) = (inspect("g1_v21", &[]), inspect("g1_v30_conv", &[]));
    assert_eq!((&old["layout"], &new["layout"]), (&"LeRobot v2.1".into(), &"LeRobot v3.0".into()));
    for facts in [&old, &new] {
        assert_eq!(facts["episodes"], 100);
        assert_eq!(facts["frames"], 35_965);
        assert_eq!(facts["fps"], 30.0);
        assert_eq!(facts["tasks"].as_array().unwrap().len(), 1);
        let state = stream(facts, "observation.state");
        assert_eq!((&state["dtype"], &state["shape"]), (&"float32".into(), &serde_json::json!([26])));
        // Episode 0: 479 frames, and the least and greatest of its statistics in meta/episodes_stats.jsonl.
        assert_eq!(state["stats"]["rows"], 479);
        assert_eq!(state["stats"]["max"], 1.343_644_499_778_747_6);
        assert_eq!(state["stats"]["nan"], 0);
        assert_eq!(state["coverage"], "█".repeat(60));
    }
    for name in ["observation.state", "action", "timestamp", "frame_index", "index"] {
        assert_eq!(stream(&old, name)["stats"], stream(&new, name)["stats"], "{name}");
    }
    let warnings = old["warnings"].to_string();
    assert!(warnings.contains("observation.images.cam_high"), "missing videos are not mentioned: {warnings}");
}

#[test]
fn another_episode_is_looked_at_when_asked_for_and_one_that_is_not_there_is_refused() {
    let facts = inspect("g1_v21", &["--episode", "3"]);
    assert_eq!(facts["looked_at"]["episode_index"], 3);
    assert_eq!(stream(&facts, "action")["stats"]["rows"], 459);
    let directory = private_directory();
    let path = real("g1_v21");
    let output = robocached(directory.path(), &["inspect", path.to_str().unwrap(), "--episode", "100"]);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("no episode 100") && error.contains("0 to 99"), "{error}");
}

#[test]
fn all_episodes_together_have_the_rows_of_the_dataset() {
    let facts = inspect("g1_v30_conv", &["--all"]);
    assert_eq!(stream(&facts, "action")["stats"]["rows"], 35_965);
    assert_eq!(stream(&facts, "action")["stats"]["episodes"], 100);
}

#[test]
fn loose_tables_are_shown_through_a_drafted_manifest_that_says_so() {
    let facts = inspect("comma2k19_seg", &[]);
    assert_eq!(facts["layout"], "stream tables");
    assert!(facts["drafted"].is_array(), "nothing says that the manifest is a draft");
    let streams = facts["streams"].as_array().unwrap();
    let duplicates: u64 =
        streams.iter().filter_map(|stream| stream["stats"]["duplicate_stamps"].as_u64()).max().unwrap();
    assert_eq!(duplicates, 50_502, "raw CAN repeats so many stamps, by its README");
}

#[test]
fn a_drafted_manifest_is_one_that_inspect_reads_and_is_never_overwritten_unasked() {
    let directory = private_directory();
    let (path, target) = (real("husky_outdoor"), directory.path().join("robocache.toml"));
    let (path, target) = (path.to_str().unwrap(), target.to_str().unwrap());
    let write = ["inspect", path, "--write-manifest", target];
    assert_eq!(robocached(directory.path(), &write).status.code(), Some(0));
    let written = std::fs::read_to_string(target).unwrap();
    let facts = json(directory.path(), &["inspect", path, "--json", "--manifest", target]);
    assert_eq!(facts["drafted"], Value::Null);
    assert!(!facts["streams"].as_array().unwrap().is_empty());

    std::fs::write(target, "# mine\n").unwrap();
    let refused = robocached(directory.path(), &write);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("--force"));
    assert_eq!(std::fs::read_to_string(target).unwrap(), "# mine\n");
    assert_eq!(robocached(directory.path(), &[&write[..], &["--force"]].concat()).status.code(), Some(0));
    assert_eq!(std::fs::read_to_string(target).unwrap(), written);

    let shown = robocached(directory.path(), &["inspect", path, "--write-manifest", "-"]);
    assert_eq!(text(&shown.stdout), written);
}

#[test]
fn the_text_for_people_has_every_stream_and_a_time_line() {
    let directory = private_directory();
    let output = robocached(directory.path(), &["inspect", real("g1_v30_conv").to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0));
    let shown = text(&output.stdout);
    for wanted in [
        "LeRobot v3.0",
        "35965 frames",
        "observation.state",
        "float32[26]",
        "task_index",
        "time line",
        "████",
    ] {
        assert!(shown.contains(wanted), "no {wanted:?} in:\n{shown}");
    }
}

#[test]
fn a_directory_that_is_no_dataset_is_an_error_that_says_what_was_looked_for() {
    let directory = private_directory();
    let output = robocached(directory.path(), &["inspect", directory.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("meta/info.json") && error.contains("robocache.toml"), "{error}");
    let output = robocached(directory.path(), &["inspect", "/nowhere/at/all"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("/nowhere/at/all"));
}
