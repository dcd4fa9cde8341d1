//! Files so large that they are read in pieces, by several readers at once.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::memory::checksums;
use crate::support::{Daemon, own};
use parquet::file::reader::{FileReader, SerializedFileReader};
use robocache::{Anchors, LoaderBuilder, Window};

const TACTILE: &str = "observation.tactile";
/// Each half a megabyte: 29 MiB in one file of v3.0, a row group each, or in as many files of v2.1.
const EPISODES: u64 = 60;

/// The same episodes whatever the layout.
fn synth(layout: &str) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(layout);
    let mut command = own();
    command.arg("synth").arg(&path).args(["--layout", layout, "--episodes", &EPISODES.to_string()]);
    command.args(["--frames", "500", "--fps", "100", "--tactile-dim", "256", "--codec", "none"]);
    let made = command.output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    (directory, path)
}

/// A daemon of four readers that says which reads it cut.
fn serve(arguments: &[&str]) -> Daemon {
    let mut runner = own();
    runner.env("ROBOCACHE_LOG", "robocached=debug");
    Daemon::start_by(runner, &[&["--threads", "4"], arguments].concat())
}

fn cut_reads(daemon: &Daemon) -> usize {
    daemon.log().matches("a large read is cut to pieces").count()
}

fn windows(daemon: &Daemon, dataset: &Path) -> LoaderBuilder {
    let builder = daemon.loader(dataset).batch_size(8).anchors(Anchors::Episodes);
    builder.window(TACTILE, Window::new(50.0, 250))
}

#[test]
fn batches_from_one_large_file_are_those_from_a_file_an_episode_and_little_memory_changes_nothing() {
    let [(_one, one), (_same, same)] = [(); 2].map(|()| synth("lerobot-v3.0"));
    let (_many, many) = synth("lerobot-v2.1");
    // Room for one of the two files and a third of the other, so that pieces and single episodes come and go.
    let (plenty, little) = (serve(&[]), serve(&["--memory", "40MiB"]));
    std::thread::scope(|scope| {
        for (seed, one) in [(None, &one), (Some(1), &same), (Some(2), &one)] {
            let (many, plenty, little) = (&many, &plenty, &little);
            scope.spawn(move || {
                let build = |daemon: &Daemon, dataset: &Path| {
                    let builder = windows(daemon, dataset);
                    builder.shuffle(seed.is_some()).seed(seed.unwrap_or(0)).connect().unwrap()
                };
                let [mut alone, mut pieces, mut tight] =
                    [build(plenty, many), build(plenty, one), build(little, one)];
                for epoch in 0..3 {
                    let wanted = checksums(&mut alone, TACTILE);
                    assert_eq!(wanted.len(), 8, "60 episodes by 8");
                    assert_eq!(checksums(&mut pieces, TACTILE), wanted, "seed {seed:?}, epoch {epoch}");
                    assert_eq!(checksums(&mut tight, TACTILE), wanted, "seed {seed:?}, epoch {epoch}, tight");
                }
            });
        }
    });
    // Loaders read on into the next epoch, which is here already.
    assert_eq!(plenty.status()["store"]["episodes_read"], 3 * EPISODES, "each was read once");
    assert_eq!(cut_reads(&plenty), 2, "of each large file one: {}", plenty.log());
    assert!(cut_reads(&little) > 0, "{}", little.log());
    assert!(little.status()["store"]["evictions"].as_u64().unwrap() > 0);
}

#[test]
fn one_broken_row_group_of_a_large_file_is_named_and_its_neighbours_are_served() {
    const BROKEN: u64 = 41;
    let (_directory, dataset) = synth("lerobot-v3.0");
    let file = dataset.join("data/chunk-000/file-000.parquet");
    let footer = SerializedFileReader::new(File::open(&file).unwrap()).unwrap();
    let group = footer.metadata().row_group(usize::try_from(BROKEN).unwrap());
    let column = group.columns().iter().find(|column| column.column_path().string().starts_with(TACTILE));
    let (at, _) = column.unwrap().byte_range();
    let mut writer = File::options().write(true).open(&file).unwrap();
    writer.seek(SeekFrom::Start(at)).unwrap();
    writer.write_all(&[0xff; 64]).unwrap(); // where the header of its first page was

    let daemon = serve(&[]);
    let mut loader = windows(&daemon, &dataset).connect().unwrap();
    for batch in 0..BROKEN / 8 {
        assert_eq!(loader.next_batch().unwrap().unwrap().index(), batch);
    }
    let error = loader.next_batch().unwrap_err().to_string();
    assert!(error.contains("episode 41") && error.contains("file-000.parquet"), "{error}");
    daemon.wait_until("all others are there", || daemon.status()["store"]["episodes_read"] == EPISODES - 1);
    assert_eq!(cut_reads(&daemon), 1, "{}", daemon.log());
}
