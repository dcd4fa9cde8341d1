//! Text streams: strings as codes into a sorted table of the dataset's distinct ones.
//!
//! The table is over all episodes, so that a code means the same in every batch; it is read once, when a text stream
//! is first asked for.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::buffer::Buffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, UInt64Type};
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
            check_bytes(bytes, "a table of the distinct strings", origin)?;
            into.insert(text.to_owned());
        }
        Ok(())
    })
}

fn check_bytes(bytes: usize, what: &str, origin: Origin<'_>) -> Result<(), ReadError> {
    if bytes > TABLE_LIMIT_BYTES {
        let what = format!("{what} of {:?}", origin.column);
        let (bytes, limit) = (bytes as u128, TABLE_LIMIT_BYTES as u128);
        return Err(ReadError::TooLarge { path: origin.path.to_owned(), what, bytes, limit });
    }
    Ok(())
}

/// Most text one table holds: tables are sent to every client. A column of more (a transcript, a document a row)
/// is no label of a sample.
const TABLE_LIMIT_BYTES: usize = 64 << 20;

/// The strings of a column, one a row; of a table of tasks, which is sent to clients too.
pub(crate) fn strings(chunks: &[ArrayRef], origin: Origin<'_>) -> Result<Vec<String>, ReadError> {
    let mut strings = Vec::new();
    let mut bytes = 0;
    each(chunks, origin, |_, text| {
        bytes += text.len();
        check_bytes(bytes, "the strings", origin)?;
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
        let mut row = before;
        let mut next = |text: Option<&str>| -> Result<(), ReadError> {
            take(row, text.ok_or_else(|| origin.null(row, "text"))?)?;
            row += 1;
            Ok(())
        };
        // Never as one array of whole strings: rows of a dictionary, or views, may share one that is long.
        match flat.data_type() {
            DataType::Utf8 => flat.as_string::<i32>().iter().try_for_each(&mut next)?,
            DataType::LargeUtf8 => flat.as_string::<i64>().iter().try_for_each(&mut next)?,
            DataType::Utf8View => flat.as_string_view().iter().try_for_each(&mut next)?,
            _ => {
                let broken = |source| origin.arrow(source);
                let dictionary = flat.as_any_dictionary_opt();
                let dictionary = dictionary.ok_or_else(|| origin.wrong_type("text", flat.data_type()))?;
                let keys = cast(dictionary.keys(), &DataType::UInt64).map_err(broken)?;
                let words = cast(dictionary.values(), &DataType::LargeUtf8).map_err(broken)?;
                let words = words.as_string::<i64>();
                for key in keys.as_primitive::<UInt64Type>() {
                    let word = key.and_then(|key| usize::try_from(key).ok());
                    let word = word.filter(|word| *word < words.len() && words.is_valid(*word));
                    next(word.map(|word| words.value(word)))?;
                }
            }
        }
        before += chunk.len();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use arrow::array::{DictionaryArray, Int32Array, StringArray, StringViewArray};
    use arrow::datatypes::Int32Type;

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
    /// Seen: a column of 16 MB that stands for 4 TB. Cause: its dictionary was unpacked, a string a row, and an
    /// allocation that fails ends the process.
    #[test]
    fn rows_that_share_a_long_string_are_not_each_given_it() {
        let rows: usize = 1 << 20;
        let long = "x".repeat(4 << 20);
        let keys = Int32Array::from_iter_values(std::iter::repeat_n(1, rows));
        let words = Arc::new(StringArray::from(vec!["short", long.as_str()]));
        let dictionary: ArrayRef = Arc::new(DictionaryArray::<Int32Type>::new(keys, words));
        let one: ArrayRef = Arc::new(StringViewArray::from(vec!["short", long.as_str()]));
        let views = arrow::compute::take(&one, &Int32Array::from(vec![1; rows]), None).unwrap();
        let warned = crate::warnings::Warned::default();
        let origin = Origin { path: Path::new("shared.arrow"), column: "task", ranges: &[], warned: &warned };
        for shared in [dictionary, views] {
            let mut seen = 0;
            each(std::slice::from_ref(&shared), origin, |_, text| {
                seen += 1;
                assert_eq!(text.len(), long.len());
                Ok(())
            })
            .unwrap();
            assert_eq!(seen, rows);
            let error = strings(&[shared], origin).unwrap_err().to_string();
            assert!(error.contains("the strings of \"task\" would take"), "{error}");
        }
    }

    #[test]
    fn nulls_of_a_dictionary_are_named_by_their_row_whether_the_key_or_its_string_is_null() {
        let warned = crate::warnings::Warned::default();
        let ranges = std::slice::from_ref(&(10..12));
        let origin = Origin { path: Path::new("a.arrow"), column: "task", ranges, warned: &warned };
        let words = || Arc::new(StringArray::from(vec![Some("a"), None]));
        for keys in [vec![Some(0), None], vec![Some(0), Some(1)]] {
            let column: ArrayRef = Arc::new(DictionaryArray::new(Int32Array::from(keys), words()));
            let error = strings(&[column], origin).unwrap_err().to_string();
            assert!(error.contains("row 11 is null"), "{error}");
        }
    }
}
