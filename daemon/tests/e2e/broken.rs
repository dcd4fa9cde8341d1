//! Bad input, end to end: what a client is told, and that the daemon lives on.

use std::path::{Path, PathBuf};

use crate::support::{Daemon, copy, data};
use robocache::{Anchors, DType, LoaderBuilder, Window};

/// What goes wrong with a loader, at attach or while it reads.
fn error(builder: &LoaderBuilder) -> String {
    let chain = |error: &dyn std::error::Error| {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    };
    match builder.connect() {
        Err(error) => chain(&error),
        Ok(mut loader) => loop {
            match loader.next_batch() {
                Ok(Some(_)) => {}
                Ok(None) => return "an epoch without an error".to_owned(),
                Err(error) => return chain(&error),
            }
        },
    }
}

/// Says all of these, about this dataset; and the daemon still serves another.
fn assert_says(daemon: &Daemon, builder: &LoaderBuilder, wanted: &[&str]) {
    let said = error(builder);
    for wanted in wanted {
        assert!(said.contains(wanted), "wanted {wanted:?} in: {said}");
    }
    let mut other = daemon.loader(data("g1_v21")).features(["action"]).connect().unwrap();
    other.next_batch().unwrap().unwrap();
}

/// A copy of `g1_v21`, without its video, to break.
fn scratch() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    for part in ["meta", "data"] {
        let to = directory.path().join(part);
        std::fs::create_dir(&to).unwrap();
        copy(&data("g1_v21").join(part), &to);
    }
    let path = directory.path().to_owned();
    (directory, path)
}

fn episode(dataset: &Path, n: u32) -> PathBuf {
    dataset.join(format!("data/chunk-000/episode_{n:06}.parquet"))
}

#[test]
fn a_broken_episode_is_named_and_the_batches_before_it_arrive() {
    let daemon = Daemon::start(&[]);
    type Break = fn(&Path);
    let cases: [(Break, &[&str]); 4] = [
        (|path| std::fs::write(path, b"0123456789").unwrap(), &["episode 3", "episode_000003.parquet"]),
        (|path| std::fs::write(path, b"").unwrap(), &["episode 3", "episode_000003.parquet"]),
        (
            |path| {
                let bytes = std::fs::read(path).unwrap();
                std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
            },
            &["episode 3", "episode_000003.parquet"],
        ),
        (
            |path| {
                std::fs::copy(path.with_file_name("episode_000000.parquet"), path).unwrap();
            },
            &["episode 3", "episode_000003.parquet", "479", "459"],
        ),
    ];
    for (break_it, wanted) in cases {
        let (_directory, dataset) = scratch();
        break_it(&episode(&dataset, 3));
        let builder = daemon.loader(&dataset).features(["action"]).batch_size(10);
        assert_says(&daemon, &builder, wanted);
        let mut loader = builder.connect().unwrap();
        let mut rows = 0;
        let failed = loop {
            match loader.next_batch() {
                Ok(batch) => rows += batch.unwrap().rows(),
                Err(error) => break error,
            }
        };
        // Episodes 0, 1 and 2 have 479, 393 and 343 frames; the batch that needs episode 3 cannot be made.
        assert_eq!(rows, (479 + 393 + 343) / 10 * 10, "{failed}");
        // The others can still be had.
        let builder = daemon.loader(&dataset).features(["action"]).episodes([0, 1, 2, 4]);
        let rows: u64 =
            builder.connect().unwrap().map(|batch| u64::try_from(batch.unwrap().rows()).unwrap()).sum();
        assert_eq!(rows, 479 + 393 + 343 + 357);
    }
}

#[test]
fn a_missing_episode_file_is_named_before_anything_is_read() {
    let daemon = Daemon::start(&[]);
    let (_directory, dataset) = scratch();
    std::fs::remove_file(episode(&dataset, 3)).unwrap();
    let builder = daemon.loader(&dataset).features(["action"]);
    assert!(builder.connect().is_err());
    assert_says(&daemon, &builder, &["episode 3", "episode_000003.parquet", "missing"]);
}

#[test]
fn a_file_whose_schema_differs_from_its_siblings_is_named() {
    let daemon = Daemon::start(&[]);
    let (_directory, dataset) = scratch();
    std::fs::copy(data("octo_bridge/parquet/train.parquet"), episode(&dataset, 3)).unwrap();
    let builder = daemon.loader(&dataset).features(["action"]);
    assert_says(&daemon, &builder, &["episode_000003.parquet"]);
}

#[test]
fn a_directory_that_is_no_dataset_says_what_was_looked_for() {
    let daemon = Daemon::start(&[]);
    let empty = tempfile::tempdir().unwrap();
    let say = |path: &Path, wanted: &[&str]| assert_says(&daemon, &daemon.loader(path), wanted);
    say(empty.path(), &["info.json", "robocache.toml"]);
    say(&empty.path().join("nowhere"), &["nowhere"]);
    say(&data("README.md"), &["README.md"]);
    let (_directory, dataset) = scratch();
    std::fs::write(dataset.join("meta/episodes.jsonl"), "").unwrap();
    say(&dataset, &["episode"]);
    std::fs::write(dataset.join("meta/info.json"), "{").unwrap();
    say(&dataset, &["info.json"]);
    assert_says(&daemon, &daemon.loader("unknown_name"), &["unknown_name", "no dataset is served"]);
}

#[test]
fn impossible_requests_are_refused_with_what_would_be_possible() {
    let daemon = Daemon::start(&[]);
    let g1 = || daemon.loader(data("g1_v30_conv"));
    let window = |window| g1().window("action", window);
    let cases: [(LoaderBuilder, &[&str]); 20] = [
        (window(Window::new(30.0, 0)), &["steps", "at least 1"]),
        (window(Window::at([])), &["at", "at least one"]),
        (window(Window::new(30.0, 1_000_000_000)), &["1000000000 steps", "1048576"]),
        (window(Window::new(0.0, 5)), &["hz", "positive"]),
        (window(Window::new(1e-9, 1_000_000)), &["292 years"]),
        (window(Window::at([0.0]).max_gap(-1.0)), &["max_gap", "positive"]),
        (g1().delta_timestamps("action", [0.01]), &["0.01 s", "1/30", "windows="]),
        (g1().delta_timestamps("action", []), &["delta_timestamps", "at least one"]),
        (window(Window::new(30.0, 2)).delta_timestamps("action", [0.0]), &["both"]),
        (g1().features(["acton"]), &["acton", "observation.state"]),
        (daemon.loader(data("g1_v21")).features(["observation.images.cam_high"]), &["cam_high", "video"]),
        (g1().batch_size(0), &["batch_size", "at least 1"]),
        (g1().slots(1), &["slots", "at least 2"]),
        (g1().slots(5000), &["slots", "2 to 256", "5000"]),
        (g1().rank(3, 3), &["rank", "world_size", "3"]),
        (g1().episodes([5, 100]), &["episode 100", "last 99"]),
        (g1().episodes([]), &["chooses none"]),
        (g1().device("cuda"), &["cuda", "cpu"]),
        (
            g1().features(["action"]).dtype_of("acton", DType::Float16),
            &["dtype of \"acton\"", "it has action"],
        ),
        (g1().features(["action"]).dtype_of("index", DType::Float32), &["\"index\"", "it has action"]),
    ];
    for (builder, wanted) in cases {
        assert_says(&daemon, &builder, wanted);
    }
    let huge = g1().window("action", Window::new(30.0, 1 << 20)).batch_size(4096);
    assert_says(&daemon, &huge, &["the ring would take", "batch_size"]);
    let every = g1().anchors(Anchors::Every(f64::NAN));
    assert_says(&daemon, &every, &["NaN"]);
}

#[test]
fn clocks_that_stand_still_are_refused_and_leave_the_other_streams_alone() {
    let daemon = Daemon::start(&[]);
    let stream = |name: &str, columns: &str| {
        format!(
            "[streams.{name}]\nfile = \"parquet/{name}_0.parquet\"\ntime = {{ column = \"timestamp\", unit = \"us\" }}\ncolumns = [{columns}]\n"
        )
    };
    let attitude = stream("vehicle_attitude", r#""q[0]", "q[1]", "q[2]", "q[3]""#) + "interp = \"slerp\"\n";
    let mut refused = 0;
    for (name, column) in
        [("sensor_preflight", r#""accel_inconsistency_m_s_s""#), ("telemetry_status", r#""rssi""#)]
    {
        let manifest = format!("layout = \"streams\"\n{attitude}{}", stream(name, column));
        let builder = daemon.loader(data("px4_auavx21")).manifest(manifest).anchor_stream("vehicle_attitude");
        let mut good = builder.clone().window("vehicle_attitude", Window::new(50.0, 4)).connect().unwrap();
        good.next_batch().unwrap().unwrap();
        let said = error(&builder.clone().window(name, Window::new(50.0, 4)));
        if said != "an epoch without an error" {
            assert!(said.contains("stamps") && said.contains("rate"), "{said}");
            refused += 1;
        }
    }
    assert!(refused > 0, "the recording has streams whose stamps are all 0");
}
