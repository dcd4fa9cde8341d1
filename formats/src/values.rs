//! Arrow arrays as blocks of rows.
//!
//! A stream is `[rows, dim]` of one dtype without holes. Where an Arrow child buffer is that already, it is used as
//! it is; nothing is copied. Everything else is checked row by row, since lists in a file may have any length.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use arrow::array::ArrayRef;
use arrow::datatypes::DataType;
use robocache_types::DType;

use crate::dataset::{TextTable, Values};
use crate::error::ReadError;

/// Where arrays came from, for errors and warnings: `ranges` are the rows of the file they hold, in order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin<'a> {
    pub(crate) path: &'a Path,
    pub(crate) column: &'a str,
    pub(crate) ranges: &'a [Range<usize>],
}

/// What an Arrow type holds in each row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Holds {
    /// Numbers or booleans; as many lists deep as `depth`, whose fixed sizes (where the type fixes them) are
    /// `lengths`, outermost first.
    Numbers { dtype: DType, lengths: Vec<Option<usize>> },
    Text,
    /// Neither; says what.
    Other(String),
}
