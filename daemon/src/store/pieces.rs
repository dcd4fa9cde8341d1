//! A large read in pieces, for as many readers.
//!
//! A unit is a file, and a file may hold a whole dataset: as one read it would keep one reader busy and leave the others
//! idle. It is cut where that decodes nothing twice: between row groups, and where there is only one of them, between
//! streams. What comes of it is the same, whatever the cuts.

use super::ledger::Job;

/// Bytes worth a turn of a reader: some 20 ms of decoding.
const PIECE_BYTES: u64 = 8 << 20;

impl Job {
    /// Reads that together are this one. None where it is small, or cannot be cut; a file that does not open cannot, and
    /// reading says why.
    pub(super) fn pieces(&self) -> Option<Vec<Self>> {
        if self.expected < 2 * PIECE_BYTES {
            return None;
        }
        let positions: Vec<usize> = self.episodes.iter().map(|&e| e as usize).collect();
        let apart = self.dataset.dataset().pieces(&positions).ok()?;
        let number = |e: usize| u32::try_from(e).expect("episodes are numbered in u32");
        let groups = apart.into_iter().map(|group| group.into_iter().map(number).collect());
        let groups = packed(groups, |episode| self.dataset.expected_bytes(*episode, &self.streams));
        let of = |episodes, streams: &[usize]| Self::new(&self.dataset, episodes, streams, self.urgent);
        let pieces: Vec<Self> = if groups.len() > 1 {
            groups.into_iter().map(|episodes| of(episodes, &self.streams)).collect()
        } else {
            let bytes = |stream: &usize| of(self.episodes.clone(), &[*stream]).expected;
            let streams = packed(self.streams.iter().map(|&stream| vec![stream]), bytes);
            streams.iter().map(|streams| of(self.episodes.clone(), streams)).collect()
        };
        (pieces.len() > 1).then_some(pieces)
    }
}

/// Neighbours put together until they are worth a turn.
fn packed<T>(groups: impl Iterator<Item = Vec<T>>, bytes: impl Fn(&T) -> u64) -> Vec<Vec<T>> {
    let mut packed: Vec<Vec<T>> = Vec::new();
    let mut filled = PIECE_BYTES;
    for group in groups {
        if filled >= PIECE_BYTES {
            packed.push(Vec::new());
            filled = 0;
        }
        filled += group.iter().map(&bytes).sum::<u64>();
        packed.last_mut().expect("one was begun").extend(group);
    }
    packed
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch};
    use parquet::arrow::ArrowWriter;
    use parquet::file::properties::WriterProperties;
    use robocache_formats::{Dataset, OpenOptions};

    use super::super::{Admission, DatasetStore, Need, Store};
    use super::*;

    const EPISODES: u32 = 40;
    /// Of 8 bytes, in each of two streams: 1 MiB an episode together.
    const FRAMES: u32 = 1 << 16;

    /// One table of 40 episodes, each a number throughout, in a store that no reader works for; with how many episodes
    /// each row group has.
    fn one_file(directory: &Path, groups: &[u32]) -> (Arc<Store>, Arc<DatasetStore>) {
        let of_frames = || (0..EPISODES).flat_map(|episode| std::iter::repeat_n(episode, FRAMES as usize));
        let number: ArrayRef = Arc::new(of_frames().map(i64::from).collect::<Int64Array>());
        let value = |times| Arc::new(of_frames().map(|e| f64::from(e) * times).collect::<Float64Array>());
        let rows =
            RecordBatch::try_from_iter([("ep", number), ("x", value(1.0) as ArrayRef), ("y", value(2.0))])
                .unwrap();
        let properties = WriterProperties::builder().set_max_row_group_row_count(None).build();
        let file = File::create(directory.join("all.parquet")).unwrap();
        let mut writer = ArrowWriter::try_new(file, rows.schema(), Some(properties)).unwrap();
        let mut at = 0;
        for group in groups.iter().map(|episodes| (episodes * FRAMES) as usize) {
            writer.write(&rows.slice(at, group)).unwrap();
            writer.flush().unwrap();
            at += group;
        }
        assert_eq!(at, rows.num_rows());
        writer.close().unwrap();
        let manifest = "layout = \"frames\"
[frames]
files = \"all.parquet\"
episode = \"ep\"
time = { rate = 10.0 }
[streams.x]
[streams.y]
";
        let options = OpenOptions { manifest: Some(manifest.to_owned()) };
        let store = Store::new(1 << 30);
        let dataset = store.add(Arc::new(Dataset::open(directory, &options).unwrap()));
        (store, dataset)
    }

    fn next(store: &Store) -> Job {
        store.ledger.lock().next_job().expect("there is something to read")
    }

    fn holds(dataset: &DatasetStore, episodes: impl Iterator<Item = u32>, streams: &[usize]) {
        for episode in episodes {
            let columns = dataset.get(episode, streams).unwrap_or_else(|| panic!("{episode} is not there"));
            for &stream in streams {
                let wanted = f64::from(episode) * [1.0, 2.0][stream];
                let values = columns.stream(stream).values.buffer.as_slice();
                assert_eq!(values.len(), FRAMES as usize * 8);
                assert!(values.chunks_exact(8).all(|value| value == wanted.to_le_bytes()), "{episode}");
            }
        }
    }

    #[test]
    fn a_large_file_is_read_in_pieces_of_row_groups_and_one_that_is_waited_for_comes_first() {
        let directory = tempfile::tempdir().unwrap();
        let (store, dataset) = one_file(directory.path(), &[2; 20]);
        dataset.want(&[0], &[0, 1], Need::In(3));
        let whole = next(&store);
        assert_eq!(whole.episodes.len(), EPISODES as usize, "the unit");
        let spoken_for = store.ledger.lock().spoken_for();
        store.run(&whole);
        assert_eq!(store.ledger.lock().spoken_for(), spoken_for, "all of it is still to come");
        assert_eq!(dataset.want(&(0..EPISODES).collect::<Vec<_>>(), &[0, 1], Need::In(3)), Admission::Taken);
        let first = next(&store);
        assert_eq!(first.episodes, (0..8).collect::<Vec<_>>());
        store.run(&first);
        holds(&dataset, 0..8, &[0, 1]);
        assert!(dataset.get(8, &[0]).is_none());
        store.promote(&mut store.ledger.lock(), dataset.id(), 30);
        let waited_for = next(&store);
        assert_eq!(waited_for.episodes, (24..32).collect::<Vec<_>>());
        store.run(&waited_for);
        holds(&dataset, 24..32, &[0, 1]);
        (0..3).for_each(|_| store.run(&next(&store)));
        holds(&dataset, 0..EPISODES, &[0, 1]);
        let ledger = store.ledger.lock();
        assert_eq!(ledger.spoken_for(), ledger.used(), "nothing is under way");
    }

    #[test]
    fn a_large_row_group_is_read_by_streams_also_behind_one_that_is_worth_no_turn() {
        for groups in [&[40][..], &[1, 39]] {
            let directory = tempfile::tempdir().unwrap();
            let (store, dataset) = one_file(directory.path(), groups);
            dataset.want(&[0], &[0, 1], Need::In(3));
            store.run(&next(&store));
            let (x, y) = (next(&store), next(&store));
            assert_eq!((&*x.streams, &*y.streams), (&[0][..], &[1][..]), "{groups:?}");
            store.run(&y);
            holds(&dataset, 0..EPISODES, &[1]);
            assert!(dataset.get(0, &[0]).is_none());
            store.run(&x);
            holds(&dataset, 0..EPISODES, &[0, 1]);
            assert!(store.ledger.lock().next_job().is_none());
        }
    }

    #[test]
    fn a_piece_that_is_a_large_row_group_is_cut_again_and_small_ones_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let (store, dataset) = one_file(directory.path(), &[32, 8]);
        dataset.want(&[0], &[0, 1], Need::In(3));
        let mut jobs = Vec::new();
        while let Some(job) = { store.ledger.lock().next_job() } {
            jobs.push((job.episodes.len(), job.streams.clone()));
            store.run(&job);
        }
        let both = || vec![0, 1];
        assert_eq!(jobs, [(40, both()), (32, both()), (32, vec![0]), (32, vec![1]), (8, both())]);
        holds(&dataset, 0..EPISODES, &[0, 1]);
    }

    #[test]
    fn what_is_packed_is_worth_a_turn_but_for_the_last() {
        let packs = |sizes: &[u64]| packed(sizes.iter().map(|&size| vec![size]), |size| size << 20);
        assert_eq!(packs(&[3, 3, 3, 3]), [vec![3, 3, 3], vec![3]]);
        assert_eq!(packs(&[20, 1, 8]), [vec![20], vec![1, 8]]);
        assert_eq!(packs(&[]), Vec::<Vec<u64>>::new());
    }
}
