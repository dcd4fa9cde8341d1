//! The datasets a daemon has open: by name from its config, or by path for whoever may name one.
//!
//! A dataset is opened once for all its loaders. It is opened anew when its metadata changed on disk since: the
//! files that define it (`meta/info.json`, `robocache.toml`, ..) are stat'ed at every attach, and loaders that
//! run go on with what they have. Datasets nobody uses stay open, as do their decoded columns, until memory is
//! wanted or more than a few dozen others came after them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use robocache_formats::{Dataset, OpenError, OpenOptions};
use robocache_wire::spec::DatasetRef;

use crate::config::DatasetEntry;
use crate::store::{DatasetStore, Store};

/// Datasets kept open that no loader uses.
const KEPT: usize = 64;

/// Files whose change makes a dataset another one. Those that are missing are looked for all the same.
const DEFINING: [&str; 5] =
    ["meta/info.json", "meta/episodes.jsonl", "meta/tasks.jsonl", "meta/tasks.parquet", "robocache.toml"];

/// The open datasets.
#[derive(Debug)]
pub struct Catalog {
    store: Arc<Store>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    named: BTreeMap<String, DatasetEntry>,
    /// Least recently used first.
    open: Vec<Open>,
}

#[derive(Debug, Clone)]
struct Open {
    key: Key,
    stamp: Stamp,
    dataset: Arc<DatasetStore>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    path: PathBuf,
    manifest: Option<String>,
}

/// Modification times and sizes of what defines a dataset.
type Stamp = Vec<Option<(SystemTime, u64)>>;

/// Whether a client may name any path, or only datasets of the config.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// The daemon's own user: may read by path whatever the daemon may.
    Owner,
    /// A member of the configured group: named datasets only.
    Group,
}

/// Why a dataset could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogError {
    #[error("no dataset is served as {wanted:?}; served are [{}]. A path needs a '/' in it", .served.join(", "))]
    NoName { wanted: String, served: Vec<String> },
    #[error("{path:?} by path is for the daemon's own user; ask for a dataset it serves by name: [{}]", .served.join(", "))]
    NotAllowed { path: PathBuf, served: Vec<String> },
    #[error("{path:?} is not absolute, and the daemon does not know the client's directory")]
    Relative { path: PathBuf },
    #[error("manifest {path:?} of dataset {name:?}")]
    Manifest { name: String, path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl Catalog {
    pub fn new(store: Arc<Store>, named: BTreeMap<String, DatasetEntry>) -> Self {
        Self { store, state: Mutex::new(State { named, open: Vec::new() }) }
    }

    /// Serves these names from now on; loaders of others go on.
    pub fn rename(&self, named: BTreeMap<String, DatasetEntry>) {
        self.state.lock().named = named;
    }

    pub fn names(&self) -> Vec<String> {
        self.state.lock().named.keys().cloned().collect()
    }

    /// The open datasets, for `status`.
    pub fn open_datasets(&self) -> Vec<(PathBuf, Arc<DatasetStore>)> {
        let state = self.state.lock();
        state.open.iter().map(|open| (open.key.path.clone(), Arc::clone(&open.dataset))).collect()
    }

    /// A dataset, opened if it is not.
    pub fn get(
        &self,
        wanted: &DatasetRef,
        manifest: Option<&str>,
        trust: Trust,
    ) -> Result<Arc<DatasetStore>, CatalogError> {
        let key = self.resolve(wanted, manifest, trust)?;
        let stamp = stamp(&key.path);
        if let Some(dataset) = self.find(&key, &stamp) {
            return Ok(dataset);
        }
        // Outside the lock: a large dataset takes a while, and others must not wait for it.
        let dataset = Arc::new(Dataset::open(&key.path, &OpenOptions { manifest: key.manifest.clone() })?);
        tracing::info!(
            path = ?key.path,
            layout = ?dataset.layout(),
            episodes = dataset.episodes().len(),
            streams = dataset.streams().len(),
            "opened dataset"
        );
        for warning in dataset.warnings() {
            tracing::warn!(path = ?key.path, "{warning}");
        }
        let mut state = self.state.lock();
        // Somebody else may have been faster: theirs is in use, ours is not.
        if let Some(open) = state.open.iter().find(|open| open.key == key && open.stamp == stamp) {
            return Ok(Arc::clone(&open.dataset));
        }
        let dataset = self.store.add(dataset);
        state.open.retain(|open| open.key != key);
        state.open.push(Open { key, stamp, dataset: Arc::clone(&dataset) });
        if state.open.len() > KEPT
            && let Some(unused) = state.open.iter().position(|open| Arc::strong_count(&open.dataset) == 1)
        {
            state.open.remove(unused);
        }
        Ok(dataset)
    }

    fn find(&self, key: &Key, stamp: &Stamp) -> Option<Arc<DatasetStore>> {
        let mut state = self.state.lock();
        let position = state.open.iter().position(|open| open.key == *key && open.stamp == *stamp)?;
        let open = state.open.remove(position);
        let dataset = Arc::clone(&open.dataset);
        state.open.push(open);
        Some(dataset)
    }

    fn resolve(
        &self,
        wanted: &DatasetRef,
        manifest: Option<&str>,
        trust: Trust,
    ) -> Result<Key, CatalogError> {
        match wanted {
            DatasetRef::Path(path) if !path.is_absolute() => {
                Err(CatalogError::Relative { path: path.clone() })
            }
            DatasetRef::Path(path) if trust == Trust::Group => {
                Err(CatalogError::NotAllowed { path: path.clone(), served: self.names() })
            }
            DatasetRef::Path(path) => {
                Ok(Key { path: canonical(path), manifest: manifest.map(str::to_owned) })
            }
            DatasetRef::Name(name) => {
                let entry = self.state.lock().named.get(name).cloned();
                let entry = entry
                    .ok_or_else(|| CatalogError::NoName { wanted: name.clone(), served: self.names() })?;
                let text = match (&entry.manifest, manifest) {
                    (_, Some(text)) => Some(text.to_owned()),
                    (Some(path), None) => Some(std::fs::read_to_string(path).map_err(|source| {
                        CatalogError::Manifest { name: name.clone(), path: path.clone(), source }
                    })?),
                    (None, None) => None,
                };
                Ok(Key { path: canonical(&entry.path), manifest: text })
            }
        }
    }
}

/// One name for a path however it was written. What does not exist keeps its name, for `Dataset::open` to report.
fn canonical(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_missing| path.to_owned())
}

fn stamp(path: &Path) -> Stamp {
    let stat = |path: PathBuf| {
        let meta = std::fs::metadata(path).ok()?;
        Some((meta.modified().ok()?, meta.len()))
    };
    std::iter::once(path.to_owned()).chain(DEFINING.iter().map(|file| path.join(file))).map(stat).collect()
}
