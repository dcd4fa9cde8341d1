//! What the columns of an unknown table probably are: which one is its clock, which belong together.
//!
//! Guesses go by name first, then by the numbers themselves. They are only ever used to draft a manifest for a person to
//! read, never to read data: each comes with the reason for it where there is room for doubt.

use std::collections::HashMap;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Fields, Float64Type};

use crate::error::ReadError;
use crate::table::Table;
use crate::time::{Site, Unit, can_be_stamps, stamps_ns};
use crate::values::{Holds, holds};

/// Names of stamp columns, likeliest first.
const TIME_NAMES: [&str; 22] = [
    "header.stamp_ns",
    "header.stamp",
    "stamp_ns",
    "stamp",
    "timestamp_ns",
    "timestamp_us",
    "timestamp_ms",
    "timestamp_s",
    "timestamp",
    "time_ns",
    "time_us",
    "time_ms",
    "time_s",
    "time",
    "t_ns",
    "t_us",
    "t_ms",
    "t",
    "ts",
    "recv_ns",
    "recv_time",
    "log_time",
];

/// Names of columns that number the episodes of a frame table.
pub(crate) const EPISODE_NAMES: [&str; 4] = ["episode_index", "episode_id", "episode", "traj_index"];

/// A column that is probably a clock.
#[derive(Debug)]
pub(crate) struct TimeGuess {
    pub(crate) column: String,
    /// Absent for an Arrow timestamp.
    pub(crate) unit: Option<Unit>,
    /// Why the unit, where the column's name does not say it.
    pub(crate) reason: Option<String>,
    /// The stamps it gives; none where they cannot be read.
    pub(crate) stamps: Vec<i64>,
}

impl TimeGuess {
    /// The one stamp that all rows have, as stored, where there is more than one row.
    pub(crate) fn stands_still(&self) -> Option<i64> {
        let first = *self.stamps.first()?;
        let still = self.stamps.len() > 1 && self.stamps.iter().all(|stamp| *stamp == first);
        still.then_some(first / self.unit.map_or(1, Unit::ns))
    }

    pub(crate) fn first_backward_row(&self) -> Option<usize> {
        self.stamps.windows(2).position(|pair| pair[0] > pair[1]).map(|row| row + 1)
    }
}

/// The clock of a table; `frame_type` sees through lists where a row is an episode. The first candidate that moves
/// wins; where none does, the first.
pub(crate) fn time_of(
    fields: &[(String, DataType)],
    load: &dyn Fn(&str) -> Result<ArrayRef, ReadError>,
) -> Result<Option<TimeGuess>, ReadError> {
    let mut candidates: Vec<&str> = TIME_NAMES.to_vec();
    let likely = |name: &str| {
        let leaf = name.rsplit('.').next().unwrap_or(name).to_ascii_lowercase();
        leaf.ends_with("stamp_ns")
            || leaf.ends_with("stamp")
            || leaf.ends_with("_ns")
            || leaf.ends_with("_us")
    };
    for (name, data_type) in fields {
        if matches!(data_type, DataType::Timestamp(..)) || likely(name) {
            candidates.push(name);
        }
    }
    let mut still = None;
    for candidate in candidates {
        let Some((name, data_type)) = fields.iter().find(|(name, _)| name == candidate) else { continue };
        if !can_be_stamps(data_type) {
            continue;
        }
        let array = load(name)?;
        let (unit, reason) = unit_of(name, &array);
        let site = Site { path: std::path::Path::new(""), column: name };
        let stamps = stamps_ns(&array, unit, site, &|row| row).unwrap_or_default();
        let guess = TimeGuess { column: name.clone(), unit, reason, stamps };
        if guess.stamps.len() > 1 && guess.stands_still().is_none() {
            return Ok(Some(guess));
        }
        still = still.or(Some(guess));
    }
    Ok(still)
}

fn unit_of(name: &str, array: &ArrayRef) -> (Option<Unit>, Option<String>) {
    if matches!(array.data_type(), DataType::Timestamp(..)) {
        return (None, None);
    }
    for (suffix, unit) in [("_ns", Unit::Ns), ("_us", Unit::Us), ("_ms", Unit::Ms), ("_s", Unit::S)] {
        if name.ends_with(suffix) {
            return (Some(unit), None);
        }
    }
    let numbers: Option<Float64Array> =
        cast(array, &DataType::Float64).ok().map(|array| array.as_primitive::<Float64Type>().clone());
    let numbers: Vec<f64> = numbers.iter().flat_map(|array| array.iter().flatten()).collect();
    let largest = numbers.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
    // Seconds since 1970 are some 1.7e9: stamps that large tell their unit.
    for (least, unit) in [(1e17, Unit::Ns), (1e14, Unit::Us), (1e11, Unit::Ms)] {
        if largest >= least {
            return (Some(unit), Some(format!("stamps reach {largest:.3e}")));
        }
    }
    if array.data_type().is_floating() {
        return (Some(Unit::S), Some("fractions of a second".to_owned()));
    }
    let mut steps: Vec<f64> =
        numbers.windows(2).map(|pair| pair[1] - pair[0]).filter(|step| *step > 0.0).collect();
    steps.sort_by(f64::total_cmp);
    if let Some(step) = steps.get(steps.len() / 2) {
        for (unit, second) in [(Unit::Us, 1e6), (Unit::Ns, 1e9), (Unit::Ms, 1e3), (Unit::S, 1.0)] {
            let rate = second / step;
            if (0.2..=20_000.0).contains(&rate) {
                return (Some(unit), Some(format!("the median step of {step} is then {rate:.1} Hz")));
            }
        }
    }
    (Some(Unit::S), Some("nothing tells".to_owned()))
}

/// Columns that make one stream.
#[derive(Debug, PartialEq)]
pub(crate) struct Group {
    pub(crate) name: String,
    pub(crate) columns: Vec<String>,
    pub(crate) holds: Holds,
    /// Elements a row, where the types tell.
    pub(crate) dim: Option<usize>,
}

/// Columns in the order of the table; `a.x a.y a.z` and `q[0] .. q[3]` together where they have one type.
pub(crate) fn groups(fields: &[(String, DataType)]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut by_stem: HashMap<String, usize> = HashMap::new();
    for (column, data_type) in fields {
        let found = holds(data_type);
        let dim = match &found {
            Holds::Numbers { lengths, .. } => lengths.iter().copied().product::<Option<usize>>(),
            _ => None,
        };
        let part = part_of(column)
            .filter(|_| matches!(&found, Holds::Numbers { lengths, .. } if lengths.is_empty()));
        if let Some((stem, at)) = part {
            // The next of a vector that was begun, and only then: a part that is missing leaves each column alone.
            match by_stem.get(stem).map(|group| &mut groups[*group]) {
                Some(group) if group.columns.len() == at && group.holds == found => {
                    group.columns.push(column.clone());
                    group.dim = Some(group.columns.len());
                    continue;
                }
                None if at == 0 => {
                    by_stem.insert(stem.to_owned(), groups.len());
                    groups.push(Group {
                        name: stem.to_owned(),
                        columns: vec![column.clone()],
                        holds: found,
                        dim: Some(1),
                    });
                    continue;
                }
                _ => {}
            }
        }
        groups.push(Group { name: column.clone(), columns: vec![column.clone()], holds: found, dim });
    }
    for group in &mut groups {
        if let [only] = &group.columns[..] {
            group.name.clone_from(only); // `x` alone is no vector
        }
    }
    groups
}

/// The vector a column is a part of, and which part.
fn part_of(column: &str) -> Option<(&str, usize)> {
    if let Some((stem, number)) = column.strip_suffix(']').and_then(|column| column.rsplit_once('[')) {
        return number.parse().ok().map(|at| (stem, at));
    }
    let (stem, axis) = column.rsplit_once('.')?;
    ["x", "y", "z", "w"].iter().position(|name| *name == axis).map(|at| (stem, at))
}

/// Whether four numbers a row are named like a quaternion.
pub(crate) fn named_quaternion(name: &str, columns: &[String]) -> bool {
    let leaf = name.rsplit('.').next().unwrap_or(name).to_ascii_lowercase();
    columns.last().is_some_and(|column| column.ends_with(".w"))
        || ["q", "q_d", "quat", "quaternion", "orientation", "orientations", "rotation"]
            .contains(&leaf.as_str())
        || ["_q", "_quat", "_quaternion", "orientation", "orientations"].iter().any(|end| leaf.ends_with(end))
}

/// Whether every row of four numbers has length 1, to a thousandth.
pub(crate) fn unit_length(rows: &[f64]) -> bool {
    let (rows, _) = rows.as_chunks::<4>();
    !rows.is_empty()
        && rows.iter().all(|q| (q.iter().map(|part| part * part).sum::<f64>().sqrt() - 1.0).abs() < 1e-3)
}

/// Name and type of every column.
pub(crate) fn fields_of(fields: &Fields) -> Vec<(String, DataType)> {
    fields.iter().map(|field| (field.name().clone(), field.data_type().clone())).collect()
}

/// A column of a table, whole.
pub(crate) fn whole(table: &dyn Table, column: &str) -> Result<ArrayRef, ReadError> {
    let at = table.column(column)?;
    let chunks = table.read(&[at], std::slice::from_ref(&(0..table.rows())))?.pop().unwrap_or_default();
    let arrays: Vec<&dyn Array> = chunks.iter().map(|chunk| &**chunk).collect();
    if arrays.is_empty() {
        return Ok(arrow::array::new_empty_array(table.schema().field(at).data_type()));
    }
    arrow::compute::concat(&arrays)
        .map_err(|source| ReadError::Arrow { path: table.path().to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Int64Array, UInt64Array};

    use super::*;

    #[test]
    fn parts_of_a_vector_are_found_and_others_left_alone() {
        let field = |name: &str, data_type: &DataType| (name.to_owned(), data_type.clone());
        let float = DataType::Float32;
        let fields = [
            field("a.x", &float),
            field("a.y", &float),
            field("a.z", &float),
            field("q[0]", &float),
            field("q[1]", &float),
            field("lone.x", &float),
            field("b[1]", &float),
            field("c.x", &float),
            field("c.y", &DataType::Int8),
            field("roll", &float),
        ];
        let found = groups(&fields);
        let named: Vec<(&str, usize)> =
            found.iter().map(|group| (group.name.as_str(), group.columns.len())).collect();
        let wanted = [("a", 3), ("q", 2), ("lone.x", 1), ("b[1]", 1), ("c.x", 1), ("c.y", 1), ("roll", 1)];
        assert_eq!(named, wanted);
    }

    #[test]
    fn the_unit_of_stamps_is_told_by_name_then_by_size_then_by_rate() {
        let ints = |values: Vec<i64>| -> ArrayRef { Arc::new(Int64Array::from(values)) };
        assert_eq!(unit_of("recv_ns", &ints(vec![1, 2])).0, Some(Unit::Ns));
        assert_eq!(unit_of("t", &ints(vec![1_432_235_498_039_089_918])).0, Some(Unit::Ns));
        assert_eq!(unit_of("t", &ints(vec![1_432_235_498_039])).0, Some(Unit::Ms));
        let boot: ArrayRef = Arc::new(UInt64Array::from(vec![112_574_774_u64, 112_594_774, 112_614_774]));
        let (unit, reason) = unit_of("timestamp", &boot);
        assert_eq!(unit, Some(Unit::Us));
        assert!(reason.unwrap().contains("50.0 Hz"));
    }

    #[test]
    fn a_clock_that_stands_still_gives_way_to_one_that_moves() {
        let fields = [("timestamp".to_owned(), DataType::Int64), ("recv_ns".to_owned(), DataType::Int64)];
        let load = |name: &str| -> Result<ArrayRef, ReadError> {
            Ok(Arc::new(Int64Array::from(if name == "timestamp" { vec![0, 0, 0] } else { vec![1, 2, 3] })))
        };
        assert_eq!(time_of(&fields, &load).unwrap().unwrap().column, "recv_ns");
        assert_eq!(time_of(&fields[..1], &load).unwrap().unwrap().stands_still(), Some(0));
        assert!(time_of(&[("value".to_owned(), DataType::Float64)], &load).unwrap().is_none());
    }
}
