//! What [`crate::Dataset`] asks of a way to lay episodes out on disk. One implementation per layout.
//!
//! A reader is opened from metadata and schema alone. Everything it offers is the same for its whole life, and
//! every method may be called from several threads at once. Positions are checked by `Dataset` before they get
//! here: an implementation may index with them.

use std::fmt::Debug;

use robocache_types::Clock;

use crate::dataset::{EpisodeInfo, Layout, Stream, StreamSchema, TextTable};
use crate::error::ReadError;
use crate::stats::{Raw, strict};

pub(crate) trait LayoutReader: Debug + Send + Sync {
    fn layout(&self) -> &Layout;
    fn streams(&self) -> &[StreamSchema];
    /// Never empty: a dataset of no episodes does not open.
    fn episodes(&self) -> &[EpisodeInfo];
    /// Tasks by `task_index`.
    fn tasks(&self) -> &[String] {
        &[]
    }
    /// The one rate of the dataset, where there is one.
    fn fps(&self) -> Option<f64> {
        None
    }
    /// Data files relative to the root with their sizes in bytes, in a stable order, for the fingerprint.
    fn files(&self) -> Vec<(String, u64)>;
    /// What opening found that a user should know. What reading finds is logged once where it is found.
    fn warnings(&self) -> Vec<String>;
    /// Episodes cheapest read together: a partition of all of them.
    fn units(&self) -> Vec<Vec<usize>>;
    /// `episodes`, of one unit, in pieces that cost no more to read apart than together.
    fn pieces(&self, episodes: &[usize]) -> Result<Vec<Vec<usize>>, ReadError> {
        Ok(vec![episodes.to_vec()])
    }
    /// `[episode][stream]`, in the order asked for. No stream is opaque.
    fn read(&self, episodes: &[usize], streams: &[usize]) -> Result<Vec<Vec<Stream>>, ReadError>;
    fn clock(&self, episode: usize, stream: usize) -> Result<Clock, ReadError>;
    /// Earliest first and latest last stamp over all declared streams of the episode, in nanoseconds.
    fn span(&self, episode: usize) -> Result<(i64, i64), ReadError>;
    /// Distinct strings of a text stream over all episodes, sorted; kept by the reader (see `values::TextCache`).
    fn texts(&self, stream: usize) -> Result<TextTable, ReadError>;
    /// Rows of a stream as stored, for reports on data that a strict read refuses. Layouts that have no other way
    /// read strictly.
    fn raw(&self, episode: usize, stream: usize) -> Result<Raw, ReadError> {
        strict(self, episode, stream)
    }
}
