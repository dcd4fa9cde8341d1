//! Drafts a `robocache.toml` for tables that have none: `robocached inspect --write-manifest`.
//!
//! Looks at footers, at stamp columns, and at columns that are named like quaternions; at nothing else. What it leaves
//! out stands in the draft as a comment with the reason, and everything a person should check is also a note.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type};

use crate::error::{OpenError, ReadError};
use crate::files::{natural, relative};
use crate::guess::{
    EPISODE_NAMES, Group, TimeGuess, fields_of, groups, named_quaternion, time_of, unit_length, whole,
};
use crate::table::{Table, open_table};
use crate::time::Unit;
use crate::values::Holds;

/// Folders below a dataset's root that are looked into.
const DEEPEST: usize = 4;
/// Rows looked at to tell a quaternion.
const SAMPLE_ROWS: usize = 1000;

/// A manifest for what lies at `path` (a directory of Parquet and Arrow tables, or one table), and what a person should
/// check in it. The text parses, unless no stream could be drafted (no column of any table looks like stamps, or nothing
/// but stamps can be read): then all but its layout are comments, to be completed. It opens unless every table's clock
/// stands still.
pub fn draft_manifest(path: &Path) -> Result<(String, Vec<String>), OpenError> {
    let mut draft = Draft::default();
    if path.is_file() {
        let table = open_table(path)?;
        draft.one_kind(&*table, None)?;
        return Ok(draft.finish());
    }
    let mut found = Vec::new();
    walk(path, 0, &mut found)?;
    found.sort_by(|a, b| natural(&relative(path, a), &relative(path, b)));
    let tables = preferred(found, path, &mut draft.notes);
    if tables.is_empty() {
        return Err(OpenError::NotADataset {
            path: path.to_owned(),
            found: "no Parquet or Arrow tables".to_owned(),
        });
    }
    match episodes_of(path, &tables) {
        Some((pattern, first)) => {
            let first_tables: Vec<&PathBuf> =
                tables.iter().filter(|table| table.starts_with(&first)).collect();
            draft.streams(Some(&pattern), &first, &first_tables)?;
        }
        None => {
            let first = open_table(&tables[0])?;
            let all_alike = tables.iter().all(|table| {
                open_table(table).is_ok_and(|table| table.schema().fields() == first.schema().fields())
            });
            let nested_or_frames = looks_nested(&*first) || episode_column(&*first).is_some();
            if nested_or_frames && all_alike {
                draft.one_kind(&*first, Some(&glob_of(path, &tables)))?;
            } else {
                draft.streams(None, path, &tables.iter().collect::<Vec<_>>())?;
            }
        }
    }
    Ok(draft.finish())
}

fn walk(directory: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<(), OpenError> {
    let io = |source| OpenError::Io { path: directory.to_owned(), source };
    for entry in std::fs::read_dir(directory).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        let kind = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
        if hidden {
            continue;
        }
        if path.is_dir() {
            if depth < DEEPEST {
                walk(&path, depth + 1, found)?;
            }
        } else if matches!(kind.as_deref(), Some("parquet" | "arrow" | "feather" | "ipc")) {
            found.push(path);
        }
    }
    Ok(())
}

/// One file for each stem: Parquet where a table is there as Arrow too.
fn preferred(found: Vec<PathBuf>, root: &Path, notes: &mut Vec<String>) -> Vec<PathBuf> {
    let is_parquet = |path: &Path| path.extension().is_some_and(|extension| extension == "parquet");
    let parquet: BTreeSet<PathBuf> =
        found.iter().filter(|path| is_parquet(path)).map(|path| path.with_extension("")).collect();
    let (kept, left): (Vec<_>, Vec<_>) =
        found.into_iter().partition(|path| is_parquet(path) || !parquet.contains(&path.with_extension("")));
    if let Some(first) = left.first() {
        notes.push(format!(
            "{} tables are there as Parquet too and were left out, first {:?}",
            left.len(),
            relative(root, first)
        ));
    }
    kept
}

/// Where several folders hold the same tables, each is an episode: a glob for them, and the first of them.
fn episodes_of(root: &Path, tables: &[PathBuf]) -> Option<(String, PathBuf)> {
    let mut by_folder: BTreeMap<&Path, BTreeSet<String>> = BTreeMap::new();
    for table in tables {
        let folder = table.parent()?;
        by_folder.entry(folder).or_default().insert(table.file_name()?.to_string_lossy().into_owned());
    }
    let mut folders: Vec<&Path> = by_folder.keys().copied().collect();
    folders.sort_by(|a, b| natural(&relative(root, a), &relative(root, b)));
    let first = *folders.first()?;
    let parent = first.parent()?;
    let alike = folders.len() > 1
        && first != root
        && folders
            .iter()
            .all(|folder| folder.parent() == Some(parent) && by_folder[folder] == by_folder[first]);
    let prefix = relative(root, parent);
    let pattern = if prefix.is_empty() { "*".to_owned() } else { format!("{prefix}/*") };
    alike.then(|| (pattern, first.to_owned()))
}

/// A glob that finds the tables, all of one folder or of several side by side.
fn glob_of(root: &Path, tables: &[PathBuf]) -> String {
    let folders: BTreeSet<String> =
        tables.iter().filter_map(|table| table.parent()).map(|folder| relative(root, folder)).collect();
    let extension =
        tables[0].extension().map_or_else(String::new, |extension| extension.to_string_lossy().into_owned());
    match folders.first().filter(|_| folders.len() == 1) {
        Some(folder) if folder.is_empty() => format!("*.{extension}"),
        Some(folder) => format!("{folder}/*.{extension}"),
        None => format!("**/*.{extension}"),
    }
}

fn episode_column(table: &dyn Table) -> Option<String> {
    let fields = table.schema().fields();
    let named =
        |name: &&str| fields.iter().any(|field| field.name() == *name && field.data_type().is_integer());
    EPISODE_NAMES.iter().find(|name| named(name)).map(|name| (*name).to_owned())
}

/// Columns of lists, with the types of their elements.
fn list_columns(table: &dyn Table) -> Vec<(String, DataType)> {
    let lists = table.schema().fields().iter().filter_map(|field| match field.data_type() {
        DataType::List(element) | DataType::LargeList(element) => {
            Some((field.name().clone(), element.data_type().clone()))
        }
        _ => None,
    });
    lists.collect()
}

/// A row is an episode where a column that is named like a clock holds lists.
fn looks_nested(table: &dyn Table) -> bool {
    let lists = list_columns(table);
    let load = |column: &str| first_cell(table, column);
    table.rows() > 0 && time_of(&lists, &load).is_ok_and(|time| time.is_some())
}

fn first_cell(table: &dyn Table, column: &str) -> Result<ArrayRef, ReadError> {
    let rows = crate::tabular::first_row(table, column)?;
    Ok(match rows.data_type() {
        DataType::List(_) => rows.as_list::<i32>().value(0),
        _ => rows.as_list::<i64>().value(0),
    })
}

#[derive(Debug, Default)]
struct Draft {
    text: String,
    notes: Vec<String>,
    names: BTreeSet<String>,
    drawn: usize,
}

impl Draft {
    fn finish(self) -> (String, Vec<String>) {
        let mut notes = self.notes;
        if self.drawn > 0 {
            return (self.text, notes);
        }
        notes.push("no stream could be drafted: the manifest must be written by hand".to_owned());
        let mut text = String::new();
        for line in self.text.lines() {
            let stays = line.is_empty() || line.starts_with('#') || line.starts_with("layout");
            text.push_str(if stays { "" } else { "# " });
            text.push_str(line);
            text.push('\n');
        }
        (text, notes)
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    /// A table of frames or of episodes, or one stream table opened alone. `files` is absent for a single table.
    fn one_kind(&mut self, table: &dyn Table, files: Option<&str>) -> Result<(), OpenError> {
        let lists = list_columns(table);
        if looks_nested(table) {
            self.line("layout = \"nested\"\n\n[frames]");
            if let Some(files) = files {
                self.line(&format!("files = {}", quoted(files)));
            }
            if let Some(column) = episode_column(table) {
                self.line(&format!("episode = {}", quoted(&column)));
            }
            let load = |column: &str| first_cell(table, column);
            if let Some(time) = time_of(&lists, &load)? {
                self.note_unit(&time, table);
                self.line(&format!("time = {}", time_text(&time)));
                for group in groups(&without(&lists, &time.column)) {
                    self.stream(&group.name, &group, table, None, "")?;
                }
            }
            return Ok(());
        }
        let Some(episode) = episode_column(table) else {
            self.line("layout = \"streams\"");
            return self.tables_streams(table, "", None);
        };
        let fields = fields_of(table.schema().fields());
        self.line("layout = \"frames\"\n\n[frames]");
        if let Some(files) = files {
            self.line(&format!("files = {}", quoted(files)));
        }
        self.line(&format!("episode = {}", quoted(&episode)));
        let time =
            time_of(&fields, &|column| whole(table, column))?.filter(|time| time.stands_still().is_none());
        match &time {
            Some(time) => {
                self.note_unit(time, table);
                self.line(&format!("time = {}", time_text(time)));
            }
            None => {
                self.line("time = { rate = 10.0 } # no column holds stamps: put the rate of the recording here, in Hz");
                self.notes.push(
                    "no column holds stamps: rate = 10.0 is a placeholder, put the real rate".to_owned(),
                );
            }
        }
        let fields = match &time {
            Some(time) => without(&fields, &time.column),
            None => fields,
        };
        for group in groups(&fields) {
            self.stream(&group.name, &group, table, None, "")?;
        }
        Ok(())
    }

    fn streams(
        &mut self,
        episodes: Option<&str>,
        first: &Path,
        tables: &[&PathBuf],
    ) -> Result<(), OpenError> {
        self.line("layout = \"streams\"");
        if let Some(pattern) = episodes {
            self.line(&format!("episodes = {}", quoted(pattern)));
            self.notes.push(format!("each match of {pattern:?} is taken for an episode, like {first:?}"));
        }
        for path in tables {
            let table = open_table(path)?;
            let stem = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
            self.tables_streams(&*table, &stem, Some(&relative(first, path)))?;
        }
        Ok(())
    }

    /// The streams of one table with its own clock.
    fn tables_streams(&mut self, table: &dyn Table, stem: &str, file: Option<&str>) -> Result<(), OpenError> {
        let name = file.unwrap_or("the table");
        let fields = fields_of(table.schema().fields());
        let Some(time) = time_of(&fields, &|column| whole(table, column))? else {
            self.notes.push(format!("{name}: no column looks like stamps; left out"));
            let unclocked = "no column looks like stamps: declare time = { rate = .. }";
            return self.clocked(table, stem, file, &fields, None, Some(unclocked));
        };
        let rest = without(&fields, &time.column);
        if let Some(stamp) = time.stands_still() {
            let reason = format!("all {} stamps in {:?} are {stamp}", time.stamps.len(), time.column);
            self.notes.push(format!("{name}: {reason}; left out"));
            return self.clocked(table, stem, file, &rest, None, Some(&reason));
        }
        if let Some(row) = time.first_backward_row() {
            self.notes
                .push(format!("{name}: stamps go back at row {row}; if that is meant, say order = \"sort\""));
        }
        self.note_unit(&time, table);
        self.clocked(table, stem, file, &rest, Some(&time), None)
    }

    fn clocked(
        &mut self,
        table: &dyn Table,
        stem: &str,
        file: Option<&str>,
        fields: &[(String, DataType)],
        time: Option<&TimeGuess>,
        left_out: Option<&str>,
    ) -> Result<(), OpenError> {
        let comment = if left_out.is_some() { "# " } else { "" };
        if let Some(reason) = left_out {
            self.line(&format!("\n# Left out: {reason}."));
        }
        let mut common = String::new();
        if let Some(file) = file {
            writeln!(common, "{comment}file = {}", quoted(file)).unwrap_or_default();
        }
        let time = time.map_or_else(|| "{ rate = 10.0 } # put the real rate, in Hz".to_owned(), time_text);
        writeln!(common, "{comment}time = {time}").unwrap_or_default();
        let groups = groups(fields);
        for group in &groups {
            let name = match (stem, &groups[..]) {
                ("", _) => group.name.clone(),
                (stem, [_]) => stem.to_owned(),
                (stem, _) => format!("{stem}.{}", group.name),
            };
            self.stream(&name, group, table, Some(&common), comment)?;
        }
        Ok(())
    }

    fn stream(
        &mut self,
        name: &str,
        group: &Group,
        table: &dyn Table,
        common: Option<&str>,
        comment: &str,
    ) -> Result<(), OpenError> {
        if let Holds::Other(what) = &group.holds {
            self.line(&format!("\n# Left out: column {:?} is {what}, which is not decoded.", group.name));
            return Ok(());
        }
        if matches!(&group.holds, Holds::Text { lengths } if !lengths.is_empty()) {
            self.line(&format!("\n# Left out: column {:?} holds lists of text.", group.name));
            return Ok(());
        }
        let mut unique = name.to_owned();
        while !self.names.insert(unique.clone()) {
            unique.push('_');
        }
        self.line(&format!("\n{comment}[streams.{}]", key(&unique)));
        self.text.push_str(common.unwrap_or_default());
        let columns: Vec<String> = group.columns.iter().map(|column| quoted(column)).collect();
        self.line(&format!("{comment}columns = [{}]", columns.join(", ")));
        if comment.is_empty() {
            self.drawn += 1;
            if is_quaternion(table, group) {
                self.line("interp = \"slerp\"");
            }
        }
        Ok(())
    }

    fn note_unit(&mut self, time: &TimeGuess, table: &dyn Table) {
        if let (Some(unit), Some(reason)) = (time.unit, &time.reason) {
            let file = table.path().file_name().unwrap_or_default();
            self.notes.push(format!(
                "{file:?}: {:?} is taken to be in {} ({reason})",
                time.column,
                unit.name()
            ));
        }
    }
}

fn without(fields: &[(String, DataType)], time: &str) -> Vec<(String, DataType)> {
    fields.iter().filter(|(name, _)| name != time).cloned().collect()
}

/// Named like one, and of unit length in the first rows. What cannot be read here will say so when it is read.
fn is_quaternion(table: &dyn Table, group: &Group) -> bool {
    let float = matches!(&group.holds, Holds::Numbers { dtype, .. } if dtype.is_float());
    if !float || group.dim != Some(4) || !named_quaternion(&group.name, &group.columns) {
        return false;
    }
    sample(table, group).is_some_and(|rows| unit_length(&rows))
}

/// The first rows of a group of plain columns or of one list column, row by row.
fn sample(table: &dyn Table, group: &Group) -> Option<Vec<f64>> {
    let rows = table.rows().min(SAMPLE_ROWS);
    let positions =
        group.columns.iter().map(|column| table.column(column)).collect::<Result<Vec<_>, _>>().ok()?;
    let mut columns = Vec::with_capacity(positions.len());
    for chunks in table.read(&positions, std::slice::from_ref(&(0..rows))).ok()? {
        let mut values = Vec::new();
        for chunk in &chunks {
            let mut flat = ArrayRef::clone(chunk);
            loop {
                flat = match flat.data_type() {
                    DataType::FixedSizeList(..) => {
                        let list = flat.as_fixed_size_list();
                        list.values().slice(0, list.len() * usize::try_from(list.value_length()).ok()?)
                    }
                    DataType::List(_) => ArrayRef::clone(flat.as_list::<i32>().values()),
                    DataType::LargeList(_) => ArrayRef::clone(flat.as_list::<i64>().values()),
                    _ => break,
                };
            }
            let flat = cast(&flat, &DataType::Float64).ok()?;
            values.extend(flat.as_primitive::<Float64Type>().iter().map(|value| value.unwrap_or(f64::NAN)));
        }
        columns.push(values);
    }
    match &columns[..] {
        [only] => Some(only.clone()),
        several => {
            let row =
                |row: usize| several.iter().map(move |column| column.get(row).copied().unwrap_or(f64::NAN));
            Some((0..rows).flat_map(row).collect())
        }
    }
}

fn time_text(time: &TimeGuess) -> String {
    let unit = time.unit.map(Unit::name).map(|unit| format!(", unit = {unit:?}")).unwrap_or_default();
    format!("{{ column = {}{unit} }}", quoted(&time.column))
}

/// A TOML string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// A TOML key: bare where it can be.
fn key(name: &str) -> String {
    let bare = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    if bare { name.to_owned() } else { quoted(name) }
}
