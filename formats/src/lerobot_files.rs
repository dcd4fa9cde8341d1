//! Which rows of which data file each LeRobot episode is.
//!
//! By the metadata first. In v3 that is not always right: the v2.1 to v3 converter that most datasets on the Hub went
//! through counts the first episode of each file to the file before. LeRobot never notices, since it reads all files
//! in order of their names and takes global row numbers. So where the row counts of v3 files contradict the metadata,
//! the same is done here and a warning says so; where that does not add up either, the dataset does not open.
//! Whichever way it went, reading checks the `episode_index` column of the rows.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use robocache_types::Clock;

use crate::error::{OpenError, ReadError};
use crate::lerobot_meta::{EpisodeMeta, Generation, Meta, metadata};
use crate::table::TableCache;

/// Where an episode is: rows of a file, by its position among the files.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) file: usize,
    pub(crate) rows: Range<usize>,
}

#[derive(Debug)]
pub(crate) struct DataFile {
    /// Relative to the root.
    pub(crate) path: PathBuf,
    pub(crate) size_bytes: u64,
    pub(crate) rows: usize,
    /// By first row; they fill the file.
    pub(crate) episodes: Vec<usize>,
    /// Set by the first look at the file: the clocks (in the order of `episodes`) that are the frame grid, and
    /// nothing where an episode's stamps are its own or something is wrong with it.
    pub(crate) grids: OnceLock<Vec<Option<Clock>>>,
    /// Held by who takes that look.
    pub(crate) looking: Mutex<()>,
}

type Placed = (Vec<DataFile>, Vec<Place>);

/// The files, and the place of each episode. Adds a warning where v3 metadata had to be overruled.
pub(crate) fn place(root: &Path, meta: &mut Meta, tables: &TableCache) -> Result<Placed, OpenError> {
    let files: Vec<PathBuf> = meta.episodes.iter().map(|episode| episode.file.clone()).collect();
    if meta.generation == Generation::V2 {
        return group(root, &meta.episodes, &files); // row counts are checked when a file is read: there may be 10^5
    }
    let problem = match group(root, &meta.episodes, &files) {
        Ok(placed) => match wrong_count(root, &placed.0, tables)? {
            None => return Ok(placed),
            Some(wrong) => wrong.into(),
        },
        Err(error @ OpenError::Metadata { .. }) => error,
        Err(error) => return Err(error),
    };
    let Some(files) = by_position(root, meta, tables)? else { return Err(problem) };
    let placed = group(root, &meta.episodes, &files)?;
    let moved: Vec<_> =
        meta.episodes.iter().zip(&files).filter(|(episode, file)| episode.file != **file).collect();
    if let Some((episode, file)) = moved.first() {
        meta.warnings.push(format!(
            "meta/episodes names the wrong data file for {} of {} episodes (episode {} is in {file:?}, not {:?}); \
             rows are found by their global number, as LeRobot does",
            moved.len(),
            meta.episodes.len(),
            episode.index,
            episode.file
        ));
    }
    Ok(placed)
}

/// The first file whose rows are not those of its episodes.
fn wrong_count(root: &Path, files: &[DataFile], tables: &TableCache) -> Result<Option<ReadError>, ReadError> {
    for file in files {
        let path = root.join(&file.path);
        let found = tables.open(&path)?.rows();
        if found != file.rows {
            return Ok(Some(ReadError::RowCount { path, wanted: file.rows, found }));
        }
    }
    Ok(None)
}

/// The file of each episode by its global rows, over all data files in order of their names; none where they do not
/// add up.
fn by_position(root: &Path, meta: &Meta, tables: &TableCache) -> Result<Option<Vec<PathBuf>>, ReadError> {
    let pattern = format!("{}/{}", glob::Pattern::escape(&root.to_string_lossy()), meta.paths.data.pattern());
    let Ok(found) = glob::glob(&pattern) else { return Ok(None) };
    let mut paths: Vec<PathBuf> = found.filter_map(Result::ok).collect();
    paths.sort();
    let mut ends: Vec<u64> = Vec::with_capacity(paths.len());
    for path in &paths {
        let rows = tables.open(path)?.rows() as u64;
        ends.push(ends.last().unwrap_or(&0).saturating_add(rows));
    }
    let total: u64 = meta.episodes.iter().map(|episode| episode.length as u64).sum();
    if ends.last() != Some(&total) {
        return Ok(None);
    }
    let file = |episode: &EpisodeMeta| {
        let at = ends.partition_point(|end| *end <= episode.first_frame);
        let fits = episode.first_frame + episode.length as u64 <= *ends.get(at)?;
        paths.get(at).filter(|_| fits)?.strip_prefix(root).ok().map(Path::to_owned)
    };
    Ok(meta.episodes.iter().map(file).collect())
}

/// Episodes by file, each of which they must fill without gap or overlap.
fn group(root: &Path, episodes: &[EpisodeMeta], paths: &[PathBuf]) -> Result<Placed, OpenError> {
    let mut files: Vec<DataFile> = Vec::new();
    let mut by_path: HashMap<&Path, usize> = HashMap::new();
    for (position, (episode, relative)) in episodes.iter().zip(paths).enumerate() {
        let file = *by_path.entry(relative).or_insert(files.len());
        if file == files.len() {
            let path = root.join(relative);
            let size_bytes = fs::metadata(&path)
                .map_err(|source| OpenError::MissingFile { path, episode: episode.index, source })?
                .len();
            let (path, episodes) = (relative.clone(), Vec::new());
            let (grids, looking) = (OnceLock::new(), Mutex::default());
            files.push(DataFile { path, size_bytes, rows: 0, episodes, grids, looking });
        }
        files[file].episodes.push(position);
    }
    let mut places = vec![Place { file: 0, rows: 0..0 }; episodes.len()];
    for (number, file) in files.iter_mut().enumerate() {
        file.episodes.sort_by_key(|episode| episodes[*episode].first_frame);
        let mut next = episodes[file.episodes[0]].first_frame;
        for position in &file.episodes {
            let EpisodeMeta { index, length, first_frame, .. } = episodes[*position];
            if first_frame != next {
                let what =
                    format!("episode {index} begins at frame {first_frame}, but its file goes on at {next}");
                return Err(metadata(&root.join(&file.path), what));
            }
            places[*position] = Place { file: number, rows: file.rows..file.rows + length };
            file.rows += length;
            next += length as u64;
        }
    }
    Ok((files, places))
}
