//! Real recordings, read in place: the v2.1 original and its v3.0 conversion hold the same numbers.

use std::path::PathBuf;

use robocache_formats::{Dataset, Layout, OpenOptions, StreamKind};
use robocache_types::{Clock, DType};

/// The folder of real data, which these tests do not do without.
fn data(name: &str) -> PathBuf {
    let base = std::env::var_os("ROBOCACHE_TEST_DATA")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    let path = base.join(name);
    assert!(path.is_dir(), "{path:?} is missing: set ROBOCACHE_TEST_DATA to the folder of real data");
    path
}

fn open(name: &str) -> Dataset {
    Dataset::open(&data(name), &OpenOptions::default()).unwrap()
}

fn stream(dataset: &Dataset, name: &str) -> usize {
    dataset.streams().iter().position(|stream| stream.name == name).unwrap()
}

#[test]
fn v21_and_v30_of_the_same_episodes_are_equal_bit_for_bit() {
    let (old, new) = (open("g1_v21"), open("g1_v30_conv"));
    assert_eq!((old.episodes().len(), new.episodes().len()), (100, 100));
    let names: Vec<&str> = new.streams().iter().map(|stream| stream.name.as_str()).collect();
    assert_eq!(names.len(), 7);
    let new_streams: Vec<usize> = (0..names.len()).collect();
    let old_streams: Vec<usize> = names.iter().map(|name| stream(&old, name)).collect();
    let mut frames = 0;
    for unit in new.units() {
        let read = new.read(&unit, &new_streams).unwrap();
        for (episode, new_episode) in unit.iter().zip(read) {
            let old_episode = old.read(&[*episode], &old_streams).unwrap().remove(0);
            for (name, (a, b)) in names.iter().zip(old_episode.iter().zip(&new_episode)) {
                assert_eq!(a.clock, b.clock, "{name} of episode {episode}");
                assert_eq!(
                    (a.values.dtype, a.values.dim, a.values.rows),
                    (b.values.dtype, b.values.dim, b.values.rows)
                );
                assert_eq!(
                    a.values.buffer.as_slice(),
                    b.values.buffer.as_slice(),
                    "{name} of episode {episode}"
                );
            }
            frames += new_episode[0].values.rows;
        }
    }
    assert_eq!(frames, 35_965);
}

#[test]
fn metadata_is_what_info_json_says() {
    let old = open("g1_v21");
    assert_eq!(*old.layout(), Layout::LeRobot { version: "v2.1".to_owned() });
    assert_eq!(old.fps(), Some(30.0));
    assert_eq!(old.tasks(), ["Pick up the yellow bottle on the table."]);
    assert_eq!(old.streams()[0].name, "observation.state");
    assert_eq!((old.streams()[0].dtype, old.streams()[0].shape.as_slice()), (DType::Float32, &[26][..]));
    let camera = &old.streams()[stream(&old, "observation.images.cam_high")];
    assert!(matches!(&camera.kind, StreamKind::Opaque { what } if what == "video"));
    let task = &old.streams()[stream(&old, "task_index")];
    assert_eq!((task.dtype, task.shape.len(), task.dim()), (DType::Int64, 0, 1));
    assert_eq!(old.units().len(), 100);
    // The lengths of the first episodes as episodes.jsonl has them: 479, 393, 343.
    let firsts: Vec<_> = old.episodes()[..3].iter().map(|e| (e.index, e.frames, e.first_frame)).collect();
    assert_eq!(firsts, [(0, Some(479), Some(0)), (1, Some(393), Some(479)), (2, Some(343), Some(872))]);
    let warnings = old.warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("99 of 100 files are missing"), "{warnings:?}");
    let new = open("g1_v30_conv");
    // LeRobot's converter counts the first episode of each later file to the file before.
    let warnings = new.warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("wrong data file for 4 of 100 episodes"), "{warnings:?}");
    assert_eq!(new.units().len(), 5);
    assert_eq!(new.tasks(), old.tasks());
    assert_ne!(new.fingerprint(), old.fingerprint());
    assert_eq!(new.fingerprint(), open("g1_v30_conv").fingerprint());
}

#[test]
fn stamps_on_the_frame_grid_become_the_grid() {
    let new = open("g1_v30_conv");
    for episode in 0..new.episodes().len() {
        let clock = new.clock(episode, 0).unwrap();
        let Clock::Uniform(uniform) = &clock else { panic!("episode {episode} is off the grid") };
        assert_eq!(uniform.period_ns(), (100_000_000, 3));
        assert_eq!(Some(clock.rows()), new.episodes()[episode].frames);
        assert_eq!(new.span(episode).unwrap(), (0, clock.last_ns()));
    }
}
