//! Where the real data is, and a checksum that numpy can compute as well.

use std::path::{Path, PathBuf};

use robocache_formats::{Dataset, OpenError, OpenOptions, ReadError, Stream, Values};

/// A folder of the real data. Fails, rather than skips, where it is missing.
pub(crate) fn real(name: &str) -> PathBuf {
    let root = std::env::var_os("ROBOCACHE_TEST_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    let path = root.join(name);
    assert!(
        path.is_dir(),
        "{} is missing: these tests read real recordings; set ROBOCACHE_TEST_DATA to their folder",
        path.display()
    );
    path
}

pub(crate) fn open(path: &Path, manifest: &str) -> Result<Dataset, OpenError> {
    Dataset::open(path, &OpenOptions { manifest: Some(manifest.to_owned()) })
}

pub(crate) fn position(dataset: &Dataset, stream: &str) -> usize {
    dataset.streams().iter().position(|schema| schema.name == stream).unwrap()
}

/// One stream of one episode.
pub(crate) fn read(dataset: &Dataset, episode: usize, stream: &str) -> Result<Stream, ReadError> {
    let mut read = dataset.read(&[episode], &[position(dataset, stream)])?;
    Ok(read.remove(0).remove(0))
}

/// An error and its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// The sum of every 8 bytes, little-endian and padded with zeros, each times its odd number 1, 3, 5, .. (wrapping):
/// `(w * (2 * numpy.arange(len(w), dtype="u8") + 1)).sum()`.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    words.zip((1_u64..).step_by(2)).fold(0, |sum, (word, odd)| sum.wrapping_add(word.wrapping_mul(odd)))
}

pub(crate) fn clock_checksum(stream: &Stream) -> u64 {
    let bytes: Vec<u8> =
        (0..stream.clock.rows()).flat_map(|row| stream.clock.t_ns(row).to_le_bytes()).collect();
    checksum(&bytes)
}

pub(crate) fn f64s(values: &Values) -> Vec<f64> {
    values.buffer.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect()
}
