//! `layout = "streams"`: an episode is a directory (or a file), with a table for each stream or for several.
//!
//! Opening looks at the footer of every table of every episode: a missing file and a column that is something else
//! than in the first episode are found then, not in the middle of an epoch.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::bound::Bound;
use crate::dataset::{EpisodeInfo, Layout};
use crate::draw::{Axis, Loaded};
use crate::error::{OpenError, ReadError};
use crate::files::{find, relative};
use crate::manifest::{Manifest, Time};
use crate::table::TableCache;
use crate::tabular::{Drawn, Opened, Places, clock_number, first_row, required, type_in};

/// Tables by episode and group; a group is a file of an episode.
#[derive(Debug)]
pub(crate) struct StreamPlaces {
    episodes: Vec<PathBuf>,
    /// Relative to the episode; absent where the episode is itself the file.
    files: Vec<Option<String>>,
}

impl StreamPlaces {
    fn path(&self, episode: usize, group: usize) -> PathBuf {
        match &self.files[group] {
            Some(file) => self.episodes[episode].join(file),
            None => self.episodes[episode].clone(),
        }
    }
}

pub(crate) fn open(root: &Path, manifest: &Manifest) -> Result<Opened<StreamPlaces>, OpenError> {
    let invalid = |key: &str, what: &str| OpenError::Metadata {
        path: manifest.origin.clone(),
        what: format!("{key}: {what}"),
    };
    let single = root.is_file();
    if let Some(odd) = manifest.streams.iter().find(|stream| stream.file.is_some() && single) {
        return Err(invalid(
            &format!("[streams.{}] file", odd.name),
            "a single table was opened; leave the file out",
        ));
    }
    if let Some(odd) = manifest.streams.iter().find(|stream| stream.file.is_none()) {
        let mixed = manifest.streams.iter().any(|stream| stream.file.is_some());
        if mixed || (manifest.episodes.is_none() && !single) {
            return Err(invalid(&format!("[streams.{}] file", odd.name), "must name the stream's table"));
        }
    }
    let of_files = manifest.streams.iter().all(|stream| stream.file.is_none());
    let mut warnings = Vec::new();
    let episodes = match &manifest.episodes {
        Some(pattern) if !single => {
            let (mut fit, odd): (Vec<_>, Vec<_>) =
                find(root, pattern)?.into_iter().partition(|path| path.is_file() == of_files);
            if fit.is_empty() {
                let wanted = if of_files { "file" } else { "directory" };
                return Err(invalid("episodes", &format!("no {wanted} matches {pattern:?}")));
            }
            if let Some(first) = odd.first() {
                let kind = if of_files { "no files" } else { "no directories" };
                warnings.push(format!(
                    "{} matches of episodes = {pattern:?} are {kind} and were left out, first {:?}",
                    odd.len(),
                    relative(root, first)
                ));
            }
            fit.shrink_to_fit();
            fit
        }
        _ => vec![root.to_owned()],
    };

    let mut groups: Vec<Option<String>> = Vec::new();
    let group_of: Vec<usize> =
        manifest.streams.iter().map(|stream| clock_number(&mut groups, stream.file.clone())).collect();
    let places = StreamPlaces { episodes, files: groups };
    let tables = TableCache::default();
    let mut streams: Vec<Drawn> = Vec::with_capacity(manifest.streams.len());
    let mut clocks: Vec<(usize, Axis)> = Vec::new();
    for (decl, &group) in manifest.streams.iter().zip(&group_of) {
        let path = places.path(0, group);
        required(root, &path, 0, &mut Vec::new())?;
        let table = tables.open(&path)?;
        let axis = Axis {
            time: decl.time.clone().unwrap_or(Time::Rate(1.0)), // `Manifest::parse` sees that there is one
            filter: decl.filter.clone(),
            order: decl.order,
            duplicates: decl.duplicates,
        };
        let type_of = |column: &str| type_in(&*table, column);
        axis.check(&path, &type_of)?;
        let clock = clock_number(&mut clocks, (group, axis.clone()));
        let bound = Bound::new(decl, clock, &path, &type_of, &|column| first_row(&*table, column))?;
        bound.check_uses(decl, &manifest.origin)?;
        streams.push(Drawn { bound, axis, group });
    }

    let mut infos = Vec::with_capacity(places.episodes.len());
    let mut files = Vec::new();
    for (episode, place) in places.episodes.iter().enumerate() {
        let index = i64::try_from(episode).unwrap_or(i64::MAX);
        for group in 0..places.files.len() {
            let path = places.path(episode, group);
            required(root, &path, index, &mut files)?;
            let table = tables.open(&path)?;
            let type_of = |column: &str| type_in(&*table, column);
            for drawn in streams.iter().filter(|drawn| drawn.group == group) {
                drawn.axis.check(&path, &type_of)?;
                drawn.bound.check_same(&path, &type_of)?;
            }
        }
        let name = relative(root, place);
        let name = if name.is_empty() { file_name(root) } else { name };
        infos.push(EpisodeInfo { index, name, frames: None, first_frame: None });
    }
    Ok(Opened {
        layout: Layout::Streams,
        places,
        streams,
        episodes: infos,
        fps: None,
        files,
        warnings,
        tables,
    })
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| ".".to_owned(), |name| name.to_string_lossy().into_owned())
}

impl Places for StreamPlaces {
    fn load(
        &self,
        tables: &TableCache,
        episodes: &[usize],
        group: usize,
        columns: &BTreeSet<&str>,
    ) -> Result<Vec<Loaded>, ReadError> {
        let load = |&episode: &usize| {
            let table = tables.open(&self.path(episode, group))?;
            Loaded::read(&*table, std::slice::from_ref(&(0..table.rows())), columns.iter().copied())
        };
        episodes.iter().map(load).collect()
    }
}
