//! What a manifest's stream turns out to be once a table's schema is known.
//!
//! The first table of a dataset settles it; every other one is held against it. What the manifest asks of a stream
//! (its interpolation, what to do with duplicates) must be possible with what it is.

use std::path::Path;

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::DataType;
use robocache_types::{DType, Interp};

use crate::dataset::{StreamKind, StreamSchema};
use crate::error::{OpenError, ReadError};
use crate::manifest::{ManifestError, StreamDecl};
use crate::time::Duplicates;
use crate::values::{Holds, elements, holds};

/// A declared stream with the types of its columns.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Bound {
    pub(crate) schema: StreamSchema,
    /// With the shape of a row of each.
    pub(crate) columns: Vec<(String, Vec<usize>)>,
}

impl Bound {
    /// What the stream is in a table. `type_of` is the type of a frame of a column, `peek` gives at least one frame of
    /// it, for lists whose length the type leaves open.
    pub(crate) fn new(
        decl: &StreamDecl,
        clock: usize,
        path: &Path,
        type_of: &dyn Fn(&str) -> Result<DataType, ReadError>,
        peek: &dyn Fn(&str) -> Result<ArrayRef, ReadError>,
    ) -> Result<Self, ReadError> {
        let mut columns = Vec::with_capacity(decl.columns.len());
        let mut first: Option<DType> = None;
        for column in &decl.columns {
            let data_type = type_of(column)?;
            let wrong = |wanted: &str| ReadError::ColumnType {
                path: path.to_owned(),
                column: column.clone(),
                wanted: wanted.to_owned(),
                found: data_type.to_string(),
            };
            let alone = decl.columns.len() == 1;
            match holds(&data_type) {
                Holds::Numbers { dtype, lengths } => {
                    if let Some(wanted) = first.filter(|first| *first != dtype) {
                        return Err(wrong(&format!("{wanted} like the columns before it")));
                    }
                    first = Some(dtype);
                    let shape = match lengths.iter().copied().collect::<Option<Vec<usize>>>() {
                        Some(shape) => shape,
                        None => lengths_of(&peek(column)?, column, path)?,
                    };
                    if elements(&shape).is_none_or(|dim| dim == 0) {
                        return Err(wrong("at least one element a row"));
                    }
                    columns.push((column.clone(), shape));
                }
                Holds::Text { lengths } if alone && lengths.is_empty() => {
                    return Ok(Self::single(decl, clock, column, DType::Int32, StreamKind::Text));
                }
                _ if alone => {
                    let kind = StreamKind::Opaque { what: data_type.to_string() };
                    return Ok(Self::single(decl, clock, column, DType::UInt8, kind));
                }
                _ => return Err(wrong("numbers or booleans, to be packed into a vector")),
            }
        }
        let shape = match &columns[..] {
            [(_, shape)] => shape.clone(),
            several => vec![several.iter().filter_map(|(_, shape)| elements(shape)).sum()],
        };
        Ok(Self {
            schema: StreamSchema {
                name: decl.name.clone(),
                dtype: first.unwrap_or(DType::UInt8),
                shape,
                kind: StreamKind::Numeric,
                interp: decl.interp,
                clock,
            },
            columns,
        })
    }

    fn single(decl: &StreamDecl, clock: usize, column: &str, dtype: DType, kind: StreamKind) -> Self {
        Self {
            schema: StreamSchema {
                name: decl.name.clone(),
                dtype,
                shape: Vec::new(),
                kind,
                interp: decl.interp,
                clock,
            },
            columns: vec![(column.to_owned(), Vec::new())],
        }
    }

    /// Whether what the manifest asks of the stream can be done with what it is.
    pub(crate) fn check_uses(&self, decl: &StreamDecl, origin: &Path) -> Result<(), OpenError> {
        let StreamSchema { name, dtype, shape, kind, .. } = &self.schema;
        let numeric_float = *kind == StreamKind::Numeric && dtype.is_float();
        let what = match kind {
            StreamKind::Numeric => format!("{dtype} {shape:?}"),
            StreamKind::Text => "text".to_owned(),
            StreamKind::Opaque { what } => what.clone(),
        };
        let refuse = |key: &str, wanted: &str| {
            Err(OpenError::Manifest(ManifestError::Invalid {
                path: origin.to_owned(),
                line: Some(decl.line),
                key: format!("[streams.{name}] {key}"),
                what: format!("{wanted}, and the stream is {what}"),
            }))
        };
        if decl.duplicates == Duplicates::Mean && !numeric_float {
            return refuse("duplicates", "\"mean\" needs floating elements");
        }
        match decl.interp {
            Some(Interp::Linear) if !numeric_float => {
                refuse("interp", "\"linear\" needs floating elements; use \"previous\" or \"nearest\"")
            }
            Some(Interp::Slerp) if !numeric_float || elements(shape) != Some(4) => {
                refuse("interp", "\"slerp\" needs four floating elements a row")
            }
            _ => Ok(()),
        }
    }

    /// Refuses a table in which the stream is something else than in the first one. Lists whose length the type leaves
    /// open are held against it when they are read.
    pub(crate) fn check_same(
        &self,
        path: &Path,
        type_of: &dyn Fn(&str) -> Result<DataType, ReadError>,
    ) -> Result<(), ReadError> {
        for (column, shape) in &self.columns {
            let data_type = type_of(column)?;
            let (same, wanted) = match (&self.schema.kind, holds(&data_type)) {
                (StreamKind::Numeric, Holds::Numbers { dtype, lengths }) => {
                    let fits =
                        lengths.iter().zip(shape).all(|(length, wanted)| length.is_none_or(|l| l == *wanted));
                    let same = dtype == self.schema.dtype && lengths.len() == shape.len() && fits;
                    (same, self.describe(shape))
                }
                (StreamKind::Numeric, _) => (false, self.describe(shape)),
                (StreamKind::Text, found) => {
                    (found == Holds::Text { lengths: Vec::new() }, "text".to_owned())
                }
                (StreamKind::Opaque { what }, _) => (*what == data_type.to_string(), what.clone()),
            };
            if !same {
                return Err(ReadError::ColumnType {
                    path: path.to_owned(),
                    column: column.clone(),
                    wanted: format!("{wanted}, as in the dataset's first table"),
                    found: data_type.to_string(),
                });
            }
        }
        Ok(())
    }

    fn describe(&self, shape: &[usize]) -> String {
        match shape {
            [] => self.schema.dtype.to_string(),
            shape => format!("{} of shape {shape:?}", self.schema.dtype),
        }
    }
}

/// The lengths of the lists in the first frame, outermost first.
fn lengths_of(frames: &ArrayRef, column: &str, path: &Path) -> Result<Vec<usize>, ReadError> {
    let mut lengths = Vec::new();
    let mut level = ArrayRef::clone(frames);
    loop {
        if level.is_empty() || level.is_null(0) {
            let what =
                format!("column {column:?}: its first row says nothing of the length of the lists in it");
            return Err(ReadError::Table { path: path.to_owned(), what });
        }
        level = match level.data_type() {
            DataType::List(_) => level.as_list::<i32>().value(0),
            DataType::LargeList(_) => level.as_list::<i64>().value(0),
            DataType::FixedSizeList(..) => level.as_fixed_size_list().value(0),
            _ => return Ok(lengths),
        };
        lengths.push(level.len());
    }
}
