//! What a LeRobot dataset says of itself: `meta/info.json`, its episodes and its tasks, of v2.0, v2.1 and v3.
//!
//! Everything here is an allegation: [`Meta::load`] checks what can be checked without touching the data, so that
//! lengths and row numbers taken from it fit their types and add up.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::OpenError;
use crate::lerobot_v3;
use crate::template::{Fill, Template};

/// The checked metadata.
#[derive(Debug)]
pub(crate) struct Meta {
    /// As `info.json` has it.
    pub(crate) version: String,
    pub(crate) fps: f64,
    /// In the order of `info.json`.
    pub(crate) features: Vec<Feature>,
    /// In the order of the metadata; not empty.
    pub(crate) episodes: Vec<EpisodeMeta>,
    pub(crate) tasks: Vec<String>,
    pub(crate) generation: Generation,
    pub(crate) paths: Paths,
    pub(crate) warnings: Vec<String>,
}

#[derive(Debug, Clone)]
pub(crate) struct Feature {
    pub(crate) name: String,
    /// As `info.json` has it: a numpy name, `string`, `image`, `video`, `language`.
    pub(crate) dtype: String,
    /// Of one row; empty for a scalar, which LeRobot writes `[1]`.
    pub(crate) shape: Vec<usize>,
}

#[derive(Debug, Clone)]
pub(crate) struct EpisodeMeta {
    pub(crate) index: i64,
    /// At least 1.
    pub(crate) length: usize,
    /// Global number of the first frame.
    pub(crate) first_frame: u64,
    /// Data file relative to the root, by the metadata; see [`crate::lerobot_files`].
    pub(crate) file: PathBuf,
    /// Videos relative to the root, with their feature.
    pub(crate) videos: Vec<(String, PathBuf)>,
}

/// Fields that are read. `rest` catches the others, of which [`KNOWN`] are left alone on purpose.
#[derive(Debug, Deserialize)]
struct Info {
    codebase_version: String,
    fps: Value,
    features: Map<String, Value>,
    data_path: String,
    #[serde(default)]
    video_path: Option<String>,
    #[serde(default)]
    chunks_size: Option<u64>,
    #[serde(default)]
    total_episodes: Option<u64>,
    #[serde(default)]
    total_frames: Option<u64>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

const KNOWN: [&str; 8] = [
    "robot_type",
    "total_tasks",
    "total_videos",
    "total_chunks",
    "splits",
    "data_files_size_in_mb",
    "video_files_size_in_mb",
    "tools",
];

/// Elements of one row that a feature may have.
const LARGEST_ROW: usize = 1 << 24;
/// Format versions whose every rule is known here.
const NEWEST: (u32, u32) = (3, 0);

/// How a version lays its files out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Generation {
    /// A file per episode, metadata in JSON lines.
    V2,
    /// Episodes together in files, metadata in Parquet.
    V3,
}

/// The templates that turn an episode into paths, of either generation.
#[derive(Debug)]
pub(crate) struct Paths {
    pub(crate) info: PathBuf,
    pub(crate) data: Template,
    pub(crate) video: Option<Template>,
    pub(crate) video_keys: Vec<String>,
    /// Episodes in a chunk (v2).
    pub(crate) chunks_size: u64,
}

impl Paths {
    pub(crate) fn fill(
        &self,
        template: &Template,
        values: &[(&str, Fill<'_>)],
    ) -> Result<PathBuf, OpenError> {
        template.fill(values).map_err(|error| metadata(&self.info, error.to_string()))
    }
}

impl Meta {
    /// Reads and checks all metadata of the dataset at `root`.
    pub(crate) fn load(root: &Path) -> Result<Self, OpenError> {
        let path = root.join("meta/info.json");
        let info: Info = parse(&path, &read(&path)?, None)?;
        let mut warnings = Vec::new();
        let generation = check_version(&path, &info.codebase_version, &mut warnings)?;
        let unknown: Vec<&str> =
            info.rest.keys().map(String::as_str).filter(|key| !KNOWN.contains(key)).collect();
        if !unknown.is_empty() {
            warnings.push(format!("{path:?}: fields not known here are left alone: {}", unknown.join(", ")));
        }
        let fps = info.fps.as_f64().filter(|fps| *fps > 0.0 && *fps <= 1e9);
        let fps = fps.ok_or_else(|| {
            metadata(&path, format!("fps must be a positive number of at most 1e9, found {}", info.fps))
        })?;
        let features = features(&path, &info.features)?;
        let template = |text: &str| Template::parse(text).map_err(|error| metadata(&path, error.to_string()));
        let paths = Paths {
            info: path.clone(),
            data: template(&info.data_path)?,
            video: info.video_path.as_deref().map(template).transpose()?,
            video_keys: features.iter().filter(|f| f.dtype == "video").map(|f| f.name.clone()).collect(),
            chunks_size: info.chunks_size.unwrap_or(1000),
        };
        if paths.chunks_size == 0 {
            return Err(metadata(&path, "chunks_size is 0".to_owned()));
        }
        let (episodes, tasks) = match generation {
            Generation::V2 => (episodes_v2(root, &paths)?, tasks_v2(root, &mut warnings)?),
            Generation::V3 => {
                (lerobot_v3::episodes(root, &paths, &mut warnings)?, lerobot_v3::tasks(root, &mut warnings)?)
            }
        };
        check_episodes(root, &episodes)?;
        compare(&path, "total_episodes", info.total_episodes, episodes.len() as u64, &mut warnings);
        let frames = episodes.iter().map(|episode| episode.length as u64).sum();
        compare(&path, "total_frames", info.total_frames, frames, &mut warnings);
        Ok(Self {
            version: info.codebase_version,
            fps,
            features,
            episodes,
            tasks,
            generation,
            paths,
            warnings,
        })
    }
}

pub(crate) fn metadata(path: &Path, what: String) -> OpenError {
    OpenError::Metadata { path: path.to_owned(), what }
}

fn read(path: &Path) -> Result<String, OpenError> {
    fs::read_to_string(path).map_err(|source| OpenError::Io { path: path.to_owned(), source })
}

fn parse<T: DeserializeOwned>(path: &Path, text: &str, line: Option<usize>) -> Result<T, OpenError> {
    serde_json::from_str(text).map_err(|source| OpenError::Json { path: path.to_owned(), line, source })
}

fn check_version(path: &Path, found: &str, warnings: &mut Vec<String>) -> Result<Generation, OpenError> {
    let refuse = || OpenError::Version { path: path.to_owned(), found: found.to_owned() };
    let number = found.strip_prefix('v').unwrap_or(found);
    let mut parts = number.split('.').map(str::parse::<u32>);
    let (Some(Ok(major)), minor) = (parts.next(), parts.next().unwrap_or(Ok(0))) else {
        return Err(refuse());
    };
    match (major, minor) {
        (2, Ok(0 | 1)) => Ok(Generation::V2),
        (3, Ok(minor)) => {
            if (major, minor) > NEWEST {
                warnings.push(format!("{path:?}: {found} is newer than the v3.0 that is known here"));
            }
            Ok(Generation::V3)
        }
        _ => Err(refuse()),
    }
}

fn features(path: &Path, map: &Map<String, Value>) -> Result<Vec<Feature>, OpenError> {
    let one = |(name, value): (&String, &Value)| {
        let wrong = |what: String| metadata(path, format!("feature {name:?}: {what}"));
        let dtype = value.get("dtype").and_then(Value::as_str);
        let dtype = dtype.ok_or_else(|| wrong("dtype is missing or no text".to_owned()))?;
        let shape = value.get("shape").and_then(Value::as_array);
        let shape = shape.ok_or_else(|| wrong("shape is missing or no list".to_owned()))?;
        let shape: Option<Vec<usize>> =
            shape.iter().map(|length| usize::try_from(length.as_u64()?).ok().filter(|n| *n > 0)).collect();
        let shape = shape
            .filter(|shape| crate::values::elements(shape).is_some_and(|elements| elements <= LARGEST_ROW))
            .ok_or_else(|| {
                wrong(format!(
                    "shape {} is not of positive lengths with at most {LARGEST_ROW} elements",
                    value["shape"]
                ))
            })?;
        let shape = if shape == [1] { Vec::new() } else { shape };
        Ok::<_, OpenError>(Feature { name: name.clone(), dtype: dtype.to_owned(), shape })
    };
    let features = map.iter().map(one).collect::<Result<Vec<_>, _>>()?;
    if features.is_empty() {
        return Err(metadata(path, "features is empty".to_owned()));
    }
    Ok(features)
}

#[derive(Debug, Deserialize)]
struct EpisodeLine {
    episode_index: u64,
    length: u64,
}

#[derive(Debug, Deserialize)]
struct TaskLine {
    task_index: u64,
    task: String,
}

fn lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, OpenError> {
    let text = read(path)?;
    let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    numbered.map(|(i, line)| parse(path, line, Some(i + 1))).collect()
}

fn episodes_v2(root: &Path, paths: &Paths) -> Result<Vec<EpisodeMeta>, OpenError> {
    let path = root.join("meta/episodes.jsonl");
    let mut first_frame = 0_u64;
    let mut episodes = Vec::new();
    for line in lines::<EpisodeLine>(&path)? {
        let chunk = line.episode_index / paths.chunks_size;
        let key = ("episode_index", Fill::Number(line.episode_index));
        let chunk = ("episode_chunk", Fill::Number(chunk));
        let video = |name: &String| {
            let video = paths.video.as_ref()?;
            let path = paths.fill(video, &[chunk, ("video_key", Fill::Text(name)), key]);
            Some(path.map(|path| (name.clone(), path)))
        };
        let (length, next) = span(&path, line.episode_index, first_frame, line.length)?;
        episodes.push(EpisodeMeta {
            index: i64::try_from(line.episode_index).ok().ok_or_else(|| {
                metadata(&path, format!("episode_index {} is too large", line.episode_index))
            })?,
            length,
            first_frame,
            file: paths.fill(&paths.data, &[chunk, key])?,
            videos: paths.video_keys.iter().filter_map(video).collect::<Result<_, _>>()?,
        });
        first_frame = next;
    }
    Ok(episodes)
}

/// An episode's length as a number of rows, and the frame after its last.
pub(crate) fn span(path: &Path, episode: u64, first: u64, length: u64) -> Result<(usize, u64), OpenError> {
    let wrong = |what: &str| metadata(path, format!("episode {episode} has length {length}: {what}"));
    let rows = usize::try_from(length).ok().filter(|_| length < 1 << 40);
    match (rows, first.checked_add(length)) {
        (Some(0), _) => Err(wrong("an episode needs at least one frame")),
        (Some(rows), Some(next)) => Ok((rows, next)),
        _ => Err(wrong("no dataset is that long")),
    }
}

fn tasks_v2(root: &Path, warnings: &mut Vec<String>) -> Result<Vec<String>, OpenError> {
    let path = root.join("meta/tasks.jsonl");
    if !path.exists() {
        warnings.push(format!("{path:?} is missing: tasks have no text"));
        return Ok(Vec::new());
    }
    let tasks = lines::<TaskLine>(&path)?.into_iter().map(|line| (line.task_index, line.task)).collect();
    by_index(&path, tasks, warnings)
}

/// Tasks in the order of their index.
pub(crate) fn by_index(
    path: &Path,
    tasks: Vec<(u64, String)>,
    warnings: &mut Vec<String>,
) -> Result<Vec<String>, OpenError> {
    let highest = tasks.iter().map(|(index, _)| *index).max();
    let count = highest.map_or(0, |highest| highest.saturating_add(1));
    let most = tasks.len() as u64 * 1000 + 1000;
    if count > most {
        return Err(metadata(path, format!("task_index {} of {} tasks", count - 1, tasks.len())));
    }
    if count != tasks.len() as u64 {
        warnings.push(format!("{path:?}: {} tasks with task_index up to {}", tasks.len(), count.max(1) - 1));
    }
    let mut table = vec![None; usize::try_from(count).unwrap_or(0)];
    for (index, task) in tasks {
        let place = usize::try_from(index).ok().and_then(|index| table.get_mut(index));
        if place.and_then(|place: &mut Option<String>| place.replace(task)).is_some() {
            return Err(metadata(path, format!("task_index {index} twice")));
        }
    }
    Ok(table.into_iter().map(Option::unwrap_or_default).collect())
}

fn check_episodes(root: &Path, episodes: &[EpisodeMeta]) -> Result<(), OpenError> {
    if episodes.is_empty() {
        return Err(OpenError::NoEpisodes { path: root.to_owned() });
    }
    let mut seen = HashSet::with_capacity(episodes.len());
    match episodes.iter().find(|episode| !seen.insert(episode.index)) {
        Some(twice) => Err(metadata(&root.join("meta"), format!("episode_index {} twice", twice.index))),
        None => Ok(()),
    }
}

fn compare(path: &Path, field: &str, says: Option<u64>, found: u64, warnings: &mut Vec<String>) {
    if let Some(says) = says.filter(|says| *says != found) {
        warnings.push(format!("{path:?}: {field} is {says}, the episodes' own metadata has {found}"));
    }
}
