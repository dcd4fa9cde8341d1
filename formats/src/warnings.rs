//! Things that reading copes with, told once for each file and column.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// What has been told already. One per dataset.
#[derive(Debug, Default)]
pub(crate) struct Warned(Mutex<HashSet<(PathBuf, String)>>);

impl Warned {
    /// Nulls of a floating column became NaN.
    pub(crate) fn nulls(&self, path: &Path, column: &str, count: usize) {
        if self.first(path, column) {
            tracing::warn!(file = %path.display(), column, count, "nulls are read as NaN");
        }
    }

    /// Whether nothing has been told of this column of this file yet.
    fn first(&self, path: &Path, column: &str) -> bool {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        told.insert((path.to_owned(), column.to_owned()))
    }
}
