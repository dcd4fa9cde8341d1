//! The limit to what decoding takes is the process's, so that its test is a process of its own.

use std::fs::File;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, RecordBatch};
use parquet::arrow::ArrowWriter;
use robocache_formats::{Dataset, OpenOptions, limit_decoding};
use robocached::store::{Need, Store, WaitError};

/// So many that they come in pieces, which are held until the last.
const ROWS: usize = 1 << 22;
const EPISODES: u32 = 8;

#[test]
fn reads_that_do_not_fit_memory_together_come_one_after_another_and_one_that_never_fits_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    for episode in 0..EPISODES {
        let folder = directory.path().join(format!("episode-{episode:02}"));
        std::fs::create_dir(&folder).unwrap();
        let x = Float64Array::from_iter_values((0..ROWS).map(|_row| f64::from(episode)));
        let rows = RecordBatch::try_from_iter([("x", Arc::new(x) as ArrayRef)]).unwrap();
        let mut writer =
            ArrowWriter::try_new(File::create(folder.join("x.parquet")).unwrap(), rows.schema(), None)
                .unwrap();
        writer.write(&rows).unwrap();
        writer.close().unwrap();
    }
    let manifest = "layout = \"streams\"
episodes = \"episode-*\"
[streams.x]
file = \"x.parquet\"
time = { rate = 10.0 }
";
    let options = OpenOptions { manifest: Some(manifest.to_owned()) };
    let store = Store::new(1 << 30);
    let dataset = store.add(Arc::new(Dataset::open(directory.path(), &options).unwrap()));
    let readers = ["one", "two", "three", "four"].map(|name| {
        let store = Arc::clone(&store);
        let reader = std::thread::Builder::new().name(name.to_owned());
        reader.spawn(move || store.read_until_closed()).unwrap()
    });
    // Of the 32 MiB that an episode is, four readers would hold 128.
    limit_decoding(40 << 20);
    let all: Vec<u32> = (0..EPISODES).collect();
    dataset.want(&all, &[0], Need::Now);
    for episode in all {
        let columns = dataset.wait(episode, &[0], &|| false).unwrap();
        let values = columns.stream(0).values.buffer.as_slice();
        assert!(values.chunks_exact(8).all(|value| value == f64::from(episode).to_le_bytes()), "{episode}");
    }
    limit_decoding(30 << 20);
    store.set_budget(0); // what is here goes
    let error = dataset.wait(0, &[0], &|| false).unwrap_err();
    let WaitError::Read(error) = error else { panic!("{error:?}") };
    assert!(
        error.to_string().contains("decoded, 0 more are being read, and the memory for that is 31457280"),
        "{error}"
    );
    store.close();
    readers.into_iter().for_each(|reader| reader.join().unwrap());
}
