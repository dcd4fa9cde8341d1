//! Text streams: strings as codes into a sorted table of the dataset's distinct ones.
//!
//! The table is over all episodes, so that a code means the same in every batch; it is read once, when a text stream
//! is first asked for.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::buffer::Buffer;
use arrow::compute::cast;
use arrow::datatypes::DataType;
use robocache_types::DType;

use crate::dataset::{TextTable, Values};
use crate::error::ReadError;
use crate::values::{Holds, Origin, Place, flatten, holds};

/// Tables of the text streams that were asked for, by position of the stream.
#[derive(Debug, Default)]
pub(crate) struct TextCache(Mutex<HashMap<usize, TextTable>>);

impl TextCache {
    /// The table of a stream, collected by `read` on first use. Two threads that come first both read.
    pub(crate) fn get(
        &self,
        stream: usize,
        read: impl FnOnce(&mut BTreeSet<String>) -> Result<(), ReadError>,
    ) -> Result<TextTable, ReadError> {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = lock().get(&stream) {
            return Ok(Arc::clone(table));
        }
        let mut distinct = BTreeSet::new();
        read(&mut distinct)?;
        let table: TextTable = distinct.into_iter().collect();
        Ok(Arc::clone(lock().entry(stream).or_insert(table)))
    }
}

/// Adds the strings of a column to `into`.
pub(crate) fn distinct(
    chunks: &[ArrayRef],
    into: &mut BTreeSet<String>,
    origin: Origin<'_>,
) -> Result<(), ReadError> {
    let mut bytes: usize = into.iter().map(String::len).sum();
    each(chunks, origin, |_, text| {
        if !into.contains(text) {
            bytes += text.len();
            if bytes > TABLE_LIMIT_BYTES {
                let what = format!("a table of the distinct strings of {:?}", origin.column);
                let (bytes, limit) = (bytes as u128, TABLE_LIMIT_BYTES as u128);
                return Err(ReadError::TooLarge { path: origin.path.to_owned(), what, bytes, limit });
            }
            into.insert(text.to_owned());
        }
        Ok(())
    })
}

/// Most text one table holds: tables are sent to every client. A column of more (a transcript, a document a row)
/// is no label of a sample.
const TABLE_LIMIT_BYTES: usize = 64 << 20;

/// The strings of a column, one a row.
pub(crate) fn strings(chunks: &[ArrayRef], origin: Origin<'_>) -> Result<Vec<String>, ReadError> {
    let mut strings = Vec::new();
    each(chunks, origin, |_, text| {
        strings.push(text.to_owned());
        Ok(())
    })?;
    Ok(strings)
}

/// The strings of a column as Int32 codes into `table`.
pub(crate) fn codes(chunks: &[ArrayRef], table: &[String], origin: Origin<'_>) -> Result<Values, ReadError> {
    let by_text: HashMap<&str, usize> =
        table.iter().enumerate().map(|(i, text)| (text.as_str(), i)).collect();
    let mut codes: Vec<i32> = Vec::with_capacity(chunks.iter().map(|chunk| chunk.len()).sum());
    each(chunks, origin, |position, text| {
        let code = by_text.get(text).and_then(|code| i32::try_from(*code).ok());
        codes.push(code.ok_or_else(|| ReadError::Table {
            path: origin.path.to_owned(),
            what: format!(
                "column {:?}, row {}: {text:?} was not there when the dataset's strings were collected; \
                 the file changed, open the dataset again",
                origin.column,
                origin.row(position)
            ),
        })?);
        Ok(())
    })?;
    Ok(Values { dtype: DType::Int32, dim: 1, rows: codes.len(), buffer: Buffer::from_vec(codes) })
}

fn each(
    chunks: &[ArrayRef],
    origin: Origin<'_>,
    mut take: impl FnMut(usize, &str) -> Result<(), ReadError>,
) -> Result<(), ReadError> {
    let mut before = 0;
    for chunk in chunks {
        if !matches!(holds(chunk.data_type()), Holds::Text { .. }) {
            return Err(origin.wrong_type("text", chunk.data_type()));
        }
        let flat = flatten(chunk, &[], Place { origin, before, dtype: None })?;
        let flat = cast(&flat, &DataType::LargeUtf8).map_err(|source| origin.arrow(source))?;
        for (i, text) in flat.as_string::<i64>().iter().enumerate() {
            take(before + i, text.ok_or_else(|| origin.null(before + i, "text"))?)?;
        }
        before += chunk.len();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use arrow::array::StringArray;

    use super::*;

    #[test]
    fn a_column_that_is_no_label_is_refused_before_it_fills_memory() {
        let warned = crate::warnings::Warned::default();
        let origin = Origin {
            path: Path::new("talk.parquet"),
            column: "transcript",
            ranges: std::slice::from_ref(&(0..70)),
            warned: &warned,
        };
        let rows = (10..80).map(|row| row.to_string().repeat(1 << 20));
        let chunks: [ArrayRef; 1] = [Arc::new(StringArray::from_iter_values(rows))];
        let mut table = BTreeSet::new();
        let error = distinct(&chunks, &mut table, origin).unwrap_err().to_string();
        assert!(
            error.contains("talk.parquet") && error.contains("transcript") && error.contains("67108864"),
            "{error}"
        );
        assert!(table.len() < 70);
    }
}
