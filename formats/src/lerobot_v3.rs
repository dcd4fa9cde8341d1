//! The metadata that LeRobot v3 keeps in Parquet: episodes and tasks.

use std::fs;
use std::path::{Path, PathBuf};
use std::slice;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Int64Type};

use crate::error::{OpenError, ReadError};
use crate::lerobot_meta::{EpisodeMeta, Paths, by_index, metadata, span};
use crate::table::{Table, open_table};
use crate::template::Fill;
use crate::text::strings;
use crate::values::{Holds, Origin, holds};
use crate::warnings::Warned;

/// Episodes by `meta/episodes/*/*.parquet`, in lexicographic order of the files; their rows are the positions.
pub(crate) fn episodes(
    root: &Path,
    paths: &Paths,
    warnings: &mut Vec<String>,
) -> Result<Vec<EpisodeMeta>, OpenError> {
    let directory = root.join("meta/episodes");
    let mut episodes = Vec::new();
    for path in parquet_files(&directory)? {
        let table = open_table(&path)?;
        let column = |name: &str| numbers(table.as_ref(), name);
        let index = column("episode_index")?;
        let length = column("length")?;
        let chunk = column("data/chunk_index")?;
        let file = column("data/file_index")?;
        let from = column("dataset_from_index")?;
        let to = column("dataset_to_index")?;
        let mut videos = Vec::new();
        for key in paths.video_keys.iter().filter(|_| paths.video.is_some()) {
            let names = [format!("videos/{key}/chunk_index"), format!("videos/{key}/file_index")];
            if names.iter().any(|name| table.schema().index_of(name).is_err()) {
                warnings.push(format!("{path:?} has no column {:?}: its videos are not known", names[0]));
                continue;
            }
            videos.push((key, column(&names[0])?, column(&names[1])?));
        }
        for row in 0..table.rows() {
            let (rows, next) = span(&path, index[row], from[row], length[row])?;
            if next != to[row] {
                return Err(metadata(
                    &path,
                    format!(
                        "row {row}: episode {} has length {}, but frames {} to {}",
                        index[row], length[row], from[row], to[row]
                    ),
                ));
            }
            let place = |chunk: u64, file: u64| {
                [("chunk_index", Fill::Number(chunk)), ("file_index", Fill::Number(file))]
            };
            let video = |(key, chunk, file): &(&String, Vec<u64>, Vec<u64>)| {
                let video = paths.video.as_ref()?;
                let [chunk, file] = place(chunk[row], file[row]);
                let path = paths.fill(video, &[("video_key", Fill::Text(key)), chunk, file]);
                Some(path.map(|path| ((*key).clone(), path)))
            };
            episodes.push(EpisodeMeta {
                index: i64::try_from(index[row])
                    .ok()
                    .ok_or_else(|| metadata(&path, format!("episode_index {} is too large", index[row])))?,
                length: rows,
                first_frame: from[row],
                file: paths.fill(&paths.data, &place(chunk[row], file[row]))?,
                videos: videos.iter().filter_map(video).collect::<Result<_, _>>()?,
            });
        }
    }
    Ok(episodes)
}

/// Tasks of `meta/tasks.parquet`; the text is the pandas index, which has the name `task`, or none.
pub(crate) fn tasks(root: &Path, warnings: &mut Vec<String>) -> Result<Vec<String>, OpenError> {
    const NAMES: [&str; 2] = ["task", "__index_level_0__"];
    let path = root.join("meta/tasks.parquet");
    if !path.exists() {
        warnings.push(format!("{path:?} is missing: tasks have no text"));
        return Ok(Vec::new());
    }
    let table = open_table(&path)?;
    let index = numbers(table.as_ref(), "task_index")?;
    let known = NAMES.into_iter().find(|name| table.schema().index_of(name).is_ok());
    let mut texts =
        table.schema().fields().iter().filter(|f| matches!(holds(f.data_type()), Holds::Text { .. }));
    let name = match (known, texts.next(), texts.next()) {
        (Some(name), _, _) => name.to_owned(),
        (None, Some(only), None) => only.name().clone(),
        _ => {
            return Err(table.column("task").map(|_| ()).map_or_else(OpenError::from, |()| {
                metadata(&path, "has no column of task texts".to_owned())
            }));
        }
    };
    let chunks = read_one(table.as_ref(), &name)?;
    let warned = Warned::default();
    let whole = 0..table.rows();
    let origin = Origin { path: &path, column: &name, ranges: slice::from_ref(&whole), warned: &warned };
    let texts = strings(&chunks, origin)?;
    by_index(&path, index.into_iter().zip(texts).collect(), warnings)
}

/// Files below the directory's subdirectories, in lexicographic order.
fn parquet_files(directory: &Path) -> Result<Vec<PathBuf>, OpenError> {
    let mut files = Vec::new();
    for chunk in children(directory)? {
        if chunk.is_dir() {
            files.extend(
                children(&chunk)?.into_iter().filter(|path| path.extension() == Some("parquet".as_ref())),
            );
        }
    }
    files.sort();
    Ok(files)
}

fn children(directory: &Path) -> Result<Vec<PathBuf>, OpenError> {
    let io = |source| OpenError::Io { path: directory.to_owned(), source };
    fs::read_dir(directory).map_err(io)?.map(|entry| entry.map(|entry| entry.path()).map_err(io)).collect()
}

fn read_one(table: &dyn Table, name: &str) -> Result<Vec<ArrayRef>, ReadError> {
    let column = table.column(name)?;
    let whole = 0..table.rows();
    Ok(table.read(&[column], slice::from_ref(&whole))?.pop().unwrap_or_default())
}

/// A column of whole numbers of any width, none negative or null.
fn numbers(table: &dyn Table, name: &str) -> Result<Vec<u64>, ReadError> {
    let warned = Warned::default();
    let whole = 0..table.rows();
    let origin =
        Origin { path: table.path(), column: name, ranges: slice::from_ref(&whole), warned: &warned };
    let mut numbers = Vec::with_capacity(table.rows());
    for chunk in read_one(table, name)? {
        if !chunk.data_type().is_integer() {
            return Err(origin.wrong_type("whole numbers", chunk.data_type()));
        }
        let chunk = cast(&chunk, &DataType::Int64).map_err(|source| origin.arrow(source))?;
        for value in chunk.as_primitive::<Int64Type>() {
            let row = numbers.len();
            let value = value.ok_or_else(|| origin.null(row, "a number of the metadata"))?;
            numbers.push(u64::try_from(value).ok().ok_or_else(|| ReadError::Table {
                path: table.path().to_owned(),
                what: format!("column {name:?}, row {row}: {value} is negative"),
            })?);
        }
    }
    Ok(numbers)
}
