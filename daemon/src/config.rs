//! What a daemon is told: the config file, and the flags laid over it.
//!
//! A file is read whole or refused whole; unknown keys are refused with the ones there are. Paths in a file are
//! relative to the file, paths in flags to the working directory; both are absolute in a [`Config`], so that two
//! configs can be compared (`==`) and a reload can tell what changed. Keys are documented in `docs/operating.md`.

use std::collections::BTreeMap;
use std::fmt;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};

use serde::de::{self, Deserializer, MapAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Serialize};

use crate::logging::LogFormat;
use crate::size::Bytes;

/// Settings of one daemon. `None` means: the daemon's own default, worked out when it starts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Unix socket to listen on; absent: `$ROBOCACHE_SOCKET`, else the default path.
    pub socket: Option<PathBuf>,
    /// Members of this group may attach besides the daemon's own user.
    pub group: Option<String>,
    /// Budget of the episode store in host memory; absent: half of what the host or its cgroup has available.
    pub memory: Option<Bytes>,
    /// Leave after so many seconds without a client; absent: never.
    pub idle_exit: Option<u64>,
    pub threads: Threads,
    pub gpu: GpuConfig,
    pub log: Log,
    /// Datasets by the name clients use.
    pub datasets: BTreeMap<String, DatasetEntry>,
}

/// Worker threads; absent: as many as there are CPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Threads {
    /// Threads that read and decode files.
    pub readers: Option<NonZeroUsize>,
    /// Threads that assemble batches.
    pub assemblers: Option<NonZeroUsize>,
}

/// The host's GPUs; what is absent follows from each one's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GpuConfig {
    /// Whether loaders may ask for `cuda`; absent: they may.
    pub enabled: Option<bool>,
    /// GPU memory for episodes, on each GPU; absent: a quarter of what is free, an eighth of all at most.
    pub gpu_cache: Option<Bytes>,
    /// Pinned host memory for episodes that a GPU cache does not hold, for each GPU; absent: a quarter of `memory`.
    pub pinned_cache: Option<Bytes>,
    /// GPU memory of one loader's ring at most; absent: a sixteenth of all, 1 GiB at most.
    pub ring: Option<Bytes>,
    /// Batches made together, in one turn of the daemon's at the GPU; absent: 32.
    pub burst: Option<NonZeroU32>,
    /// Simulated GPUs, for tests on hosts without one.
    pub simulate: Option<u32>,
}

/// Log lines.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    pub format: LogFormat,
    /// Filter; absent: `info`. `$ROBOCACHE_LOG` wins.
    pub level: Option<String>,
}

/// One served dataset: in the file a path, or `{ path = "..", manifest = ".." }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DatasetEntry {
    pub path: PathBuf,
    /// A manifest file to use instead of the dataset's own `robocache.toml`.
    pub manifest: Option<PathBuf>,
}

/// Why a config cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    #[error("cannot read config file {path:?}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path:?}, line {line}, column {column}: {message}")]
    Parse { path: PathBuf, line: usize, column: usize, message: String },
    #[error("dataset {name:?}: {source}")]
    Dataset { name: String, source: DatasetFlagError },
    #[error("the working directory is gone, so relative paths mean nothing")]
    WorkingDirectory { source: std::io::Error },
}

/// A `--dataset` argument or a dataset name that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetFlagError {
    #[error("{found:?} is not NAME=PATH")]
    NoName { found: String },
    #[error("the name {found:?} is empty or has a '/' in it, which would make it a path")]
    BadName { found: String },
}

impl Config {
    /// Reads a config file.
    ///
    /// # Errors
    ///
    /// The file cannot be read, is not TOML, has an unknown key, or a value out of range. The message names
    /// file, line, column and what is allowed.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Io { path: path.to_owned(), source })?;
        let base = absolute(path)?;
        Self::parse(&text, &base)
    }

    /// Reads config text as if it stood in the file `path`, which must be absolute.
    ///
    /// # Errors
    ///
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text).map_err(|error| {
            let (line, column) = position(text, error.span().map_or(0, |span| span.start));
            ConfigError::Parse { path: path.to_owned(), line, column, message: error.message().to_owned() }
        })?;
        let base = path.parent().unwrap_or_else(|| Path::new("/"));
        if let Some(socket) = &mut config.socket {
            *socket = base.join(&*socket);
        }
        for entry in config.datasets.values_mut() {
            entry.path = base.join(&entry.path);
            if let Some(manifest) = &mut entry.manifest {
                *manifest = base.join(&*manifest);
            }
        }
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        for name in self.datasets.keys() {
            check_name(name).map_err(|source| ConfigError::Dataset { name: name.clone(), source })?;
        }
        Ok(())
    }

    /// Lays `flags` over this config: what a flag says wins, datasets are added or replaced by name.
    ///
    /// # Errors
    ///
    /// A relative path in a working directory that no longer exists.
    pub fn with(mut self, flags: &Flags) -> Result<Self, ConfigError> {
        let Flags { socket, group, memory, threads, gpu, log_format, idle_exit, datasets } = flags;
        if let Some(socket) = socket {
            self.socket = Some(absolute(socket)?);
        }
        for DatasetFlag { name, path } in datasets {
            let entry = DatasetEntry { path: absolute(path)?, manifest: None };
            self.datasets.insert(name.clone(), entry);
        }
        if let Some(threads) = *threads {
            self.threads = Threads { readers: Some(threads), assemblers: Some(threads) };
        }
        self.group = group.clone().or(self.group);
        self.memory = memory.or(self.memory);
        self.idle_exit = idle_exit.or(self.idle_exit);
        self.gpu.gpu_cache = gpu.gpu_cache.or(self.gpu.gpu_cache);
        self.gpu.pinned_cache = gpu.pinned_cache.or(self.gpu.pinned_cache);
        self.gpu.simulate = gpu.simulate.or(self.gpu.simulate);
        self.log.format = log_format.unwrap_or(self.log.format);
        Ok(self)
    }

    /// The log filter to start with.
    pub fn log_level(&self) -> &str {
        self.log.level.as_deref().unwrap_or("info")
    }
}

/// What the command line of `serve` said about settings that a file may hold too.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Flags {
    pub socket: Option<PathBuf>,
    pub group: Option<String>,
    pub memory: Option<Bytes>,
    pub threads: Option<NonZeroUsize>,
    /// `gpu_cache`, `pinned_cache` and `simulate` only.
    pub gpu: GpuConfig,
    pub log_format: Option<LogFormat>,
    pub idle_exit: Option<u64>,
    pub datasets: Vec<DatasetFlag>,
}

/// `NAME=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetFlag {
    pub name: String,
    pub path: PathBuf,
}

impl std::str::FromStr for DatasetFlag {
    type Err = DatasetFlagError;

    fn from_str(text: &str) -> Result<Self, DatasetFlagError> {
        let (name, path) =
            text.split_once('=').ok_or_else(|| DatasetFlagError::NoName { found: text.to_owned() })?;
        check_name(name)?;
        if path.is_empty() {
            return Err(DatasetFlagError::NoName { found: text.to_owned() });
        }
        Ok(Self { name: name.to_owned(), path: path.into() })
    }
}

fn check_name(name: &str) -> Result<(), DatasetFlagError> {
    if name.is_empty() || name.contains('/') {
        return Err(DatasetFlagError::BadName { found: name.to_owned() });
    }
    Ok(())
}

/// All that `serve` needs: the settings, and where they came from so that SIGHUP can read them again.
#[derive(Debug, Clone, PartialEq)]
pub struct ServeOptions {
    /// The settings to start with: file and flags together.
    pub config: Config,
    /// The file, if there is one.
    pub config_path: Option<PathBuf>,
    /// The flags, laid over the file again at every reload.
    pub flags: Flags,
    /// End when standard input does: whoever started the daemon holds the other end of the pipe.
    pub exit_with_parent: bool,
}

impl ServeOptions {
    /// Reads the config file (if any) and lays `flags` over it.
    ///
    /// # Errors
    ///
    /// As [`Config::load`].
    pub fn new(
        config_path: Option<PathBuf>,
        flags: Flags,
        exit_with_parent: bool,
    ) -> Result<Self, ConfigError> {
        let config_path = config_path.as_deref().map(absolute).transpose()?;
        let mut options = Self { config: Config::default(), config_path, flags, exit_with_parent };
        options.config = options.reload()?;
        Ok(options)
    }

    /// The settings as file and flags now say; `self` is unchanged.
    ///
    /// # Errors
    ///
    /// As [`Config::load`]; the caller goes on with the settings it has.
    pub fn reload(&self) -> Result<Config, ConfigError> {
        match &self.config_path {
            Some(path) => Config::load(path)?,
            None => Config::default(),
        }
        .with(&self.flags)
    }
}

fn absolute(path: &Path) -> Result<PathBuf, ConfigError> {
    std::path::absolute(path).map_err(|source| ConfigError::WorkingDirectory { source })
}

/// Line and column, from 1, of a byte offset.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

impl<'de> Deserialize<'de> for DatasetEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            path: PathBuf,
            manifest: Option<PathBuf>,
        }
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = DatasetEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a path, or a table { path = \"..\", manifest = \"..\" }")
            }

            fn visit_str<E: de::Error>(self, path: &str) -> Result<DatasetEntry, E> {
                Ok(DatasetEntry { path: path.into(), manifest: None })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<DatasetEntry, A::Error> {
                let Table { path, manifest } = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(DatasetEntry { path, manifest })
            }
        }
        deserializer.deserialize_any(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/etc/robocache/config.toml"))
    }

    #[test]
    fn every_documented_key_is_read_and_paths_are_relative_to_the_file() {
        let config = parse(
            r#"
            socket = "run/daemon.sock"
            group = "robots"
            memory = "8GiB"
            idle_exit = 60
            [threads]
            readers = 2
            assemblers = 3
            [log]
            format = "json"
            level = "debug"
            [datasets]
            pick = "data/pick"
            drive = { path = "/data/drive", manifest = "drive.toml" }
            "#,
        )
        .unwrap();
        assert_eq!(config.socket.as_deref(), Some(Path::new("/etc/robocache/run/daemon.sock")));
        assert_eq!(config.memory, Some(Bytes(8 << 30)));
        assert_eq!(config.idle_exit, Some(60));
        assert_eq!(config.threads.assemblers, NonZeroUsize::new(3));
        assert_eq!((config.log.format, config.log_level()), (LogFormat::Json, "debug"));
        assert_eq!(config.datasets["pick"].path, Path::new("/etc/robocache/data/pick"));
        assert_eq!(
            config.datasets["drive"],
            DatasetEntry { path: "/data/drive".into(), manifest: Some("/etc/robocache/drive.toml".into()) }
        );
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line_and_the_keys_there_are() {
        let error = parse("group = \"robots\"\nmemroy = \"8GiB\"\n").unwrap_err().to_string();
        assert!(error.contains("config.toml\", line 2, column 1"), "{error}");
        assert!(error.contains("memroy") && error.contains("memory"), "{error}");
        let error = parse("[datasets]\na = { path = \"x\", manifets = \"y\" }").unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("manifets"), "{error}");
    }

    #[test]
    fn a_bad_value_is_refused_with_what_is_allowed() {
        for (text, wanted) in [
            ("memory = \"8 apples\"", "GiB"),
            ("memory = -1", "size"),
            ("[threads]\nreaders = 0", "nonzero"),
            ("[log]\nformat = \"xml\"", "json"),
            ("[datasets]\n\"a/b\" = \"x\"", "a/b"),
            ("socket = ", "line 1"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }

    #[test]
    fn flags_win_over_the_file_and_keep_what_they_do_not_name() {
        let file =
            parse("group = \"robots\"\nmemory = \"8GiB\"\n[datasets]\na = \"/a\"\nb = \"/b\"").unwrap();
        let flags = Flags {
            memory: Some(Bytes(1)),
            datasets: vec!["b=/elsewhere".parse().unwrap()],
            ..Flags::default()
        };
        let config = file.clone().with(&flags).unwrap();
        assert_eq!((config.group.as_deref(), config.memory), (Some("robots"), Some(Bytes(1))));
        assert_eq!(config.datasets["a"].path, Path::new("/a"));
        assert_eq!(config.datasets["b"].path, Path::new("/elsewhere"));
        assert_eq!(file.clone().with(&Flags::default()).unwrap(), file);
    }

    #[test]
    fn a_dataset_flag_without_a_name_is_refused() {
        for text in ["path/only", "=x", "a/b=x", "name="] {
            text.parse::<DatasetFlag>().unwrap_err();
        }
    }
}
