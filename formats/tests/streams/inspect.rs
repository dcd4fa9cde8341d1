//! Drafted manifests, and reports on recordings as they are.

use std::path::Path;

use crate::data::{open, position, real};
use robocache_formats::{StreamKind, draft_manifest, stats};
use robocache_types::Interp;

#[test]
fn drafts_of_real_recordings_open_and_every_stream_can_be_read() {
    for (name, streams, slerp) in [
        ("comma2k19_seg", 20, &["camera_frame_pose.frame_orientations"][..]),
        (
            "husky_outdoor",
            26,
            &["husky_velocity_controller_odom.pose.pose.orientation", "imu_data.orientation"],
        ),
        ("px4_auavx21", 0, &["control_state_0.q", "vehicle_attitude_0.q"]),
        ("octo_bridge", 7, &[]),
    ] {
        let root = real(name);
        let (text, notes) = draft_manifest(&root).unwrap();
        let dataset = open(&root, &text).unwrap_or_else(|error| panic!("{name}: {error}\n{text}"));
        let readable: Vec<usize> = (0..dataset.streams().len())
            .filter(|at| !matches!(dataset.streams()[*at].kind, StreamKind::Opaque { .. }))
            .collect();
        let read = dataset.read(&[0], &readable).unwrap_or_else(|error| panic!("{name}: {error}\n{text}"));
        assert_eq!(read[0].len(), readable.len());
        for wanted in slerp {
            assert_eq!(dataset.streams()[position(&dataset, wanted)].interp, Some(Interp::Slerp), "{wanted}");
        }
        if streams > 0 {
            assert_eq!(dataset.streams().len(), streams, "{name}\n{text}\n{notes:?}");
        }
    }
}

#[test]
fn a_draft_says_what_it_left_out_and_what_it_guessed() {
    let (text, notes) = draft_manifest(&real("px4_auavx21")).unwrap();
    assert!(text.contains("# Left out: all 17072 stamps in \"timestamp\" are 0."), "{text}");
    assert!(text.contains("# Left out: all 678 stamps in \"timestamp\" are 2069758."), "{text}");
    assert!(text.contains("[\"q[0]\", \"q[1]\", \"q[2]\", \"q[3]\"]"), "{text}");
    assert!(
        notes.iter().any(|note| note.contains("vehicle_attitude_0") && note.contains("in us")),
        "{notes:?}"
    );

    let (text, notes) = draft_manifest(&real("husky_outdoor")).unwrap();
    assert!(!text.contains(".arrow") && text.contains("data/imu_data.parquet"), "{text}");
    assert!(notes.iter().any(|note| note.contains("there as Parquet too")), "{notes:?}");

    let (text, notes) = draft_manifest(&real("octo_bridge")).unwrap();
    assert!(text.contains("layout = \"frames\"") && text.contains("rate = 10.0 }"), "{text}");
    assert!(text.contains("# Left out: column \"observation.images.image_0\""), "{text}");
    assert!(notes.iter().any(|note| note.contains("placeholder")), "{notes:?}");

    let error = draft_manifest(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap_err().to_string();
    assert!(error.contains("no Parquet or Arrow tables"), "{error}");
}

#[test]
fn many_folders_with_the_same_tables_are_drafted_as_episodes() {
    let dir = tempfile::tempdir().unwrap();
    let fix = real("husky_outdoor").join("data/fix.parquet");
    for episode in ["runs/run_2", "runs/run_10"] {
        std::fs::create_dir_all(dir.path().join(episode)).unwrap();
        std::fs::copy(&fix, dir.path().join(episode).join("fix.parquet")).unwrap();
    }
    let (text, _) = draft_manifest(dir.path()).unwrap();
    assert!(text.contains("episodes = \"runs/*\"") && text.contains("file = \"fix.parquet\""), "{text}");
    let dataset = open(dir.path(), &text).unwrap();
    let names: Vec<&str> = dataset.episodes().iter().map(|episode| episode.name.as_str()).collect();
    assert_eq!(names, ["runs/run_2", "runs/run_10"]);
}

#[test]
fn a_report_counts_what_a_strict_read_refuses() {
    let root = real("px4_auavx21");
    let manifest = r#"
        layout = "streams"
        [streams.still]
        file = "parquet/sensor_preflight_0.parquet"
        time = { column = "timestamp", unit = "us" }
        columns = ["accel_inconsistency_m_s_s"]
        [streams.attitude]
        file = "parquet/vehicle_attitude_0.parquet"
        time = { column = "timestamp", unit = "us" }
        columns = ["q[0]", "q[1]", "q[2]", "q[3]"]
    "#;
    let report = stats(&open(&root, manifest).unwrap(), &[0]);
    let still = &report[0];
    assert_eq!((still.rows, still.duplicate_stamps, still.median_rate_hz), (17_072, 17_071, None));
    assert!(still.error.as_deref().unwrap().contains("all 17072 stamps are 0 ns"), "{still:?}");
    assert!(still.mean.is_some());
    let attitude = &report[1];
    assert_eq!((attitude.rows, attitude.first_ns, &attitude.error), (6461, Some(112_574_307_000), &None));
    assert_eq!(attitude.jitter.unwrap().iter().sum::<u64>(), 6460);
    // numpy: d = diff(t); m = sort(d)[len(d) // 2]; (d > 1.5 m).sum(), (d > 5 m).sum(), d.max()
    assert_eq!((attitude.gaps_over_1_5_periods, attitude.gaps_over_5_periods), (7, 2));
    assert_eq!(attitude.longest_gaps[0].length_ns, 76_000_000);
}

#[test]
fn a_report_on_raw_can_counts_its_duplicates() {
    let manifest = r#"
        layout = "streams"
        [streams.can]
        file = "parquet/can_raw_can.parquet"
        time = { column = "t", unit = "s" }
        columns = ["address", "src"]
        [streams.frames]
        file = "parquet/can_raw_can.parquet"
        time = { column = "t", unit = "s" }
        columns = ["data"]
    "#;
    let report = stats(&open(&real("comma2k19_seg"), manifest).unwrap(), &[0]);
    for stream in &report {
        assert_eq!((stream.rows, stream.duplicate_stamps, stream.backward_stamps), (135_468, 50_502, 0));
    }
    assert_eq!((report[0].min, report[0].nulls, report[1].min), (Some(0.0), 0, None));
}
