//! Parquet files as tables.
//!
//! The footer is parsed once, when the table is opened. A read opens the file again (no descriptor is held), decodes
//! the wanted columns of the row groups that overlap the wanted rows, and skips the other rows of those groups, by the
//! page index where the file has one. What the footer says of sizes is held against the size of the file before
//! anything is allocated, what the pages say is [`Guarded`]'s business.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use arrow::array::ArrayRef;
use arrow::datatypes::{DataType, SchemaRef};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder, RowSelection,
};
use parquet::errors::ParquetError;
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaDataReader};

use crate::contain::contain;
use crate::error::ReadError;
use crate::memory::Taken;
use crate::pages::Guarded;
use crate::table::Table;

#[derive(Debug)]
pub(crate) struct ParquetTable {
    path: PathBuf,
    size_bytes: u64,
    footer: ArrowReaderMetadata,
    /// The footer with the page index, read when part of a row group is first asked for.
    indexed: OnceLock<ArrowReaderMetadata>,
    /// Rows of the file in each row group, in order.
    groups: Vec<Range<usize>>,
}

/// Decoded bytes that any file may claim.
const ALWAYS_FINE: u128 = 512 << 20;
/// Decoded bytes for each byte of file: a page of 20,000 equal doubles takes some 60 bytes, older writers put a whole
/// row group in a page.
const HIGHEST_RATIO: u128 = 100_000;
/// Elements of the longest column in one chunk. Few enough that a chunk and its repetition and definition levels stay
/// in the cache until they are copied to their place (a whole file at a time took 15 % longer), and far below what 32-bit
/// list offsets can count.
const CHUNK_ELEMENTS: usize = 1 << 18;

impl ParquetTable {
    pub(crate) fn open(path: &Path) -> Result<Self, ReadError> {
        let file = open_file(path)?;
        let size_bytes = file.metadata().map_err(|source| io(path, source))?.len();
        let footer = contain(path, || {
            Guarded::footer(file)
                .and_then(|footer| ArrowReaderMetadata::load(&footer, ArrowReaderOptions::new()))
                .map_err(|source| ReadError::Parquet { path: path.to_owned(), source })
        })?;
        let groups = groups(path, &footer)?;
        check_rows(path, groups.last().map_or(0, |group| group.end), size_bytes)?;
        Ok(Self { path: path.to_owned(), size_bytes, footer, indexed: OnceLock::new(), groups })
    }

    /// The footer with the offset index where the file has one.
    fn indexed(&self) -> Result<&ArrowReaderMetadata, ReadError> {
        if let Some(footer) = self.indexed.get() {
            return Ok(footer);
        }
        let file = open_file(&self.path)?;
        let metadata = self.footer.metadata();
        let footer = contain(&self.path, || {
            let mut reader = ParquetMetaDataReader::new_with_metadata((**metadata).clone())
                .with_offset_index_policy(PageIndexPolicy::Optional);
            Guarded::indexes(file, metadata)
                .and_then(|indexes| {
                    reader.read_page_indexes(&indexes)?;
                    ArrowReaderMetadata::try_new(Arc::new(reader.finish()?), ArrowReaderOptions::new())
                })
                .map_err(|source| ReadError::Parquet { path: self.path.clone(), source })
        })?;
        Ok(self.indexed.get_or_init(|| footer))
    }

    /// Refuses columns that say they are larger than a file of this size can hold.
    fn check_size(&self, leaves: &[usize], groups: &[usize]) -> Result<usize, ReadError> {
        let metadata = self.footer.metadata();
        let mut bytes = 0_u128;
        let mut most = 0_usize;
        for leaf in leaves {
            let mut elements = 0_u128;
            for group in groups {
                let chunk = metadata.row_group(*group).column(*leaf);
                elements += u128::try_from(chunk.num_values()).unwrap_or(u128::MAX >> 64);
            }
            bytes += elements * 8;
            most = most.max(usize::try_from(elements).unwrap_or(usize::MAX));
        }
        self.check_bytes("the columns its footer declares", bytes)?;
        Ok(most)
    }

    fn check_bytes(&self, what: &str, bytes: u128) -> Result<(), ReadError> {
        let limit = ALWAYS_FINE.max(u128::from(self.size_bytes) * HIGHEST_RATIO);
        if bytes > limit {
            return Err(ReadError::TooLarge { path: self.path.clone(), what: what.to_owned(), bytes, limit });
        }
        Ok(())
    }

    fn wrong(&self, what: String) -> ReadError {
        ReadError::Table { path: self.path.clone(), what }
    }
}

impl Table for ParquetTable {
    fn path(&self) -> &Path {
        &self.path
    }

    fn schema(&self) -> &SchemaRef {
        self.footer.schema()
    }

    fn rows(&self) -> usize {
        self.groups.last().map_or(0, |group| group.end)
    }

    fn groups(&self) -> Vec<Range<usize>> {
        self.groups.clone()
    }

    fn read(&self, columns: &[usize], ranges: &[Range<usize>]) -> Result<Vec<Vec<ArrayRef>>, ReadError> {
        let wanted_rows = check_ranges(self, ranges)?;
        let mut order: Vec<usize> = columns.to_vec();
        order.sort_unstable();
        order.dedup();
        if wanted_rows == 0 || order.is_empty() {
            return Ok(vec![Vec::new(); columns.len()]);
        }
        let (groups, selection) = plan(&self.groups, ranges);
        let mask = ProjectionMask::roots(self.footer.parquet_schema(), order.iter().copied());
        let columns_of_file = self.footer.parquet_schema().num_columns();
        let leaves: Vec<usize> = (0..columns_of_file).filter(|leaf| mask.leaf_included(*leaf)).collect();
        let most = self.check_size(&leaves, &groups)?;
        let group_rows: usize = groups.iter().map(|group| self.groups[*group].len()).sum();
        // Lists of a fixed length have it where they are null too, which no page and no footer counts.
        let lists = order.iter().map(|column| fixed_elements(self.schema().field(*column).data_type()));
        let lists = lists.fold(0_u128, |sum, elements| sum.saturating_add(elements));
        self.check_bytes(
            "lists of the lengths that it declares",
            lists.saturating_mul(8 * group_rows as u128),
        )?;
        let batch_rows = (CHUNK_ELEMENTS / most.div_ceil(group_rows).max(1)).clamp(1, wanted_rows);
        let file = open_file(&self.path)?;
        let footer = if selection.is_some() { self.indexed()? } else { &self.footer };
        let mut taken = Taken::nothing();
        let chunks = contain(&self.path, || {
            let broken = |source| ReadError::Parquet { path: self.path.clone(), source };
            let pages = Guarded::pages(file, footer.metadata(), &groups, &leaves).map_err(broken)?;
            let mut builder = ParquetRecordBatchReaderBuilder::new_with_metadata(pages, footer.clone())
                .with_projection(mask)
                .with_row_groups(groups)
                .with_batch_size(batch_rows);
            if let Some(selection) = selection {
                builder = builder.with_row_selection(selection);
            }
            let mut chunks = vec![Vec::new(); order.len()];
            let mut bytes = 0;
            for batch in builder.build().map_err(broken)? {
                let batch = batch.map_err(|source| broken(ParquetError::ArrowError(source.to_string())))?;
                // A string of a dictionary may stand for every row: only here it shows how much text that is.
                bytes += batch.get_array_memory_size() as u128;
                self.check_bytes("what its columns unpack to", bytes)?;
                taken.hold(&self.path, u64::try_from(bytes).unwrap_or(u64::MAX))?;
                for (chunks, column) in chunks.iter_mut().zip(batch.columns()) {
                    chunks.push(column.clone());
                }
            }
            Ok(chunks)
        })?;
        let found: usize = chunks.first().map_or(0, |chunks| chunks.iter().map(|chunk| chunk.len()).sum());
        if found != wanted_rows {
            return Err(
                self.wrong(format!("{wanted_rows} rows were asked for, its pages hold {found} of them"))
            );
        }
        let at =
            |column: &usize| order.binary_search(column).map_or_else(|_| Vec::new(), |i| chunks[i].clone());
        Ok(columns.iter().map(at).collect())
    }
}

fn open_file(path: &Path) -> Result<File, ReadError> {
    File::open(path).map_err(|source| io(path, source))
}

fn io(path: &Path, source: std::io::Error) -> ReadError {
    ReadError::Io { path: path.to_owned(), source }
}

/// Elements of a row that a type alone declares; 0 where it declares none.
fn fixed_elements(data_type: &DataType) -> u128 {
    match data_type {
        DataType::FixedSizeList(element, length) => {
            let length = u128::try_from(*length).unwrap_or(0);
            length.saturating_mul(fixed_elements(element.data_type()).max(1))
        }
        DataType::List(element) | DataType::LargeList(element) | DataType::Map(element, _) => {
            fixed_elements(element.data_type())
        }
        DataType::Struct(fields) => {
            fields.iter().fold(0, |sum, field| fixed_elements(field.data_type()).saturating_add(sum))
        }
        _ => 0,
    }
}

/// The rows of each row group; refuses footers whose counts contradict each other.
fn groups(path: &Path, footer: &ArrowReaderMetadata) -> Result<Vec<Range<usize>>, ReadError> {
    let mut start = 0_usize;
    let mut groups = Vec::new();
    let wrong = |what: String| ReadError::Table { path: path.to_owned(), what };
    for (i, group) in footer.metadata().row_groups().iter().enumerate() {
        let rows = usize::try_from(group.num_rows()).ok().and_then(|rows| start.checked_add(rows));
        let end =
            rows.ok_or_else(|| wrong(format!("row group {i} says it has {} rows", group.num_rows())))?;
        groups.push(start..end);
        start = end;
    }
    let total = footer.metadata().file_metadata().num_rows();
    if usize::try_from(total) != Ok(start) {
        return Err(wrong(format!("the footer says {total} rows, its row groups add up to {start}")));
    }
    Ok(groups)
}

/// Refuses a table that says it has more rows than a file of this size can hold. A row may cost nothing to decode, where
/// only a declared rate is asked for, and still costs memory.
pub(crate) fn check_rows(path: &Path, rows: usize, size_bytes: u64) -> Result<(), ReadError> {
    let limit = ALWAYS_FINE.max(u128::from(size_bytes) * HIGHEST_RATIO);
    let bytes = rows as u128 * 8;
    if bytes > limit {
        let what = format!("the {rows} rows it declares, of 8 bytes");
        return Err(ReadError::TooLarge { path: path.to_owned(), what, bytes, limit });
    }
    Ok(())
}

/// Rows in ascending, disjoint ranges inside the table.
pub(crate) fn check_ranges(table: &dyn Table, ranges: &[Range<usize>]) -> Result<usize, ReadError> {
    let mut end = 0;
    let mut rows = 0;
    for range in ranges {
        if range.start < end || range.end < range.start || range.end > table.rows() {
            return Err(ReadError::Table {
                path: table.path().to_owned(),
                what: format!("rows {range:?} were asked for, after row {end}; it has {}", table.rows()),
            });
        }
        end = range.end;
        rows += range.len();
    }
    Ok(rows)
}

/// The row groups that overlap `ranges`, and the rows to take from them, unless that is all of them.
fn plan(groups: &[Range<usize>], ranges: &[Range<usize>]) -> (Vec<usize>, Option<RowSelection>) {
    let mut chosen = Vec::new();
    let mut rows_chosen = 0;
    let mut selected: Vec<Range<usize>> = Vec::new(); // in rows of the chosen groups
    for (i, group) in groups.iter().enumerate() {
        let before = selected.len();
        for range in ranges {
            let (start, end) = (range.start.max(group.start), range.end.min(group.end));
            if start < end {
                let shifted = |row: usize| row - group.start + rows_chosen;
                selected.push(shifted(start)..shifted(end));
            }
        }
        if selected.len() > before {
            chosen.push(i);
            rows_chosen += group.len();
        }
    }
    let all = selected.iter().map(Range::len).sum::<usize>() == rows_chosen;
    let selection = (!all).then(|| RowSelection::from_consecutive_ranges(selected.into_iter(), rows_chosen));
    (chosen, selection)
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "row ranges, of which one is a case too")]
mod tests {
    use arrow::array::{AsArray, BooleanArray, FixedSizeListArray, Int64Array, RecordBatch};
    use arrow::buffer::{BooleanBuffer, NullBuffer};
    use arrow::datatypes::Int64Type;
    use parquet::arrow::ArrowWriter;
    use parquet::file::metadata::{
        FileMetaData, ParquetMetaDataBuilder, ParquetMetaDataReader, ParquetMetaDataWriter,
    };
    use parquet::file::properties::WriterProperties;
    use std::io::Write;

    use super::*;

    /// Rows 0 to 20 in row groups of 6.
    fn file(dir: &Path) -> PathBuf {
        let path = dir.join("numbers.parquet");
        let numbers: ArrayRef = Arc::new((0..20).collect::<Int64Array>());
        let batch = RecordBatch::try_from_iter([("n", numbers)]).unwrap();
        let properties = WriterProperties::builder().set_max_row_group_row_count(Some(6)).build();
        let mut writer =
            ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        path
    }

    fn rows(chunks: &[ArrayRef]) -> Vec<i64> {
        chunks.iter().flat_map(|chunk| chunk.as_primitive::<Int64Type>().values().to_vec()).collect()
    }

    #[test]
    fn rows_are_those_asked_for_within_and_across_row_groups() {
        let dir = tempfile::tempdir().unwrap();
        let table = ParquetTable::open(&file(dir.path())).unwrap();
        let asked: [&[Range<usize>]; 6] =
            [&[0..20], &[2..4], &[5..7, 9..10, 19..20], &[6..12], &[0..6, 12..18], &[3..3, 4..5]];
        for ranges in asked {
            let chunks = table.read(&[0], ranges).unwrap().remove(0);
            let wanted: Vec<i64> =
                ranges.iter().cloned().flatten().map(|row| i64::try_from(row).unwrap()).collect();
            assert_eq!(rows(&chunks), wanted, "{ranges:?}");
        }
        assert_eq!(
            plan(&table.groups, &[6..12, 18..20]),
            (vec![1, 3], None),
            "whole groups need no selection"
        );
        let outside: [&[Range<usize>]; 3] = [&[19..21], &[4..6, 5..7], &[7..8, 2..3]];
        for ranges in outside {
            assert!(matches!(table.read(&[0], ranges), Err(ReadError::Table { .. })), "{ranges:?}");
        }
    }

    /// The file with another footer, of its four row groups: `num_values` for each column chunk, `num_rows` for each row group.
    fn forge(path: &Path, num_values: i64, num_rows: i64) {
        let true_footer = ParquetMetaDataReader::new().parse_and_finish(&File::open(path).unwrap()).unwrap();
        let old = true_footer.file_metadata();
        let groups: Vec<_> = true_footer
            .row_groups()
            .iter()
            .map(|group| {
                let column =
                    group.column(0).clone().into_builder().set_num_values(num_values).build().unwrap();
                let group = group.clone().into_builder().set_num_rows(num_rows);
                group.set_column_metadata(vec![column]).build().unwrap()
            })
            .collect();
        let file_metadata = FileMetaData::new(
            old.version(),
            num_rows.wrapping_mul(4),
            None,
            None,
            old.schema_descr_ptr(),
            None,
        );
        let forged = ParquetMetaDataBuilder::new(file_metadata).set_row_groups(groups).build();
        let mut content = std::fs::read(path).unwrap();
        ParquetMetaDataWriter::new(&mut content, &forged).finish().unwrap();
        File::create(path).unwrap().write_all(&content).unwrap();
    }

    #[test]
    fn a_footer_that_declares_more_than_its_file_can_hold_is_refused_before_decoding() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path());
        forge(&path, 1 << 50, 1 << 20);
        let table = ParquetTable::open(&path).unwrap();
        assert_eq!(table.rows(), 4 << 20);
        let whole = 0..table.rows();
        let error = table.read(&[0], std::slice::from_ref(&whole)).unwrap_err();
        assert!(matches!(error, ReadError::TooLarge { .. }), "{error}");
    }

    /// Seen: a footer of 400 bytes that declares 2^50 rows, read as a table at a declared rate, which needs no column.
    /// Cause: only columns were held against the size of the file. Harm: a byte for every row was allocated, and the
    /// daemon aborted. Cure: so are rows, when the table is opened.
    #[test]
    fn a_footer_that_declares_more_rows_than_its_file_can_hold_does_not_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path());
        forge(&path, 6, 1 << 50);
        let error = ParquetTable::open(&path).unwrap_err();
        assert!(matches!(error, ReadError::TooLarge { .. }), "{error}");
    }

    #[test]
    fn a_footer_that_declares_more_rows_than_its_pages_hold_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path());
        forge(&path, 6, 1 << 20);
        let table = ParquetTable::open(&path).unwrap();
        let whole = 0..table.rows();
        let error = table.read(&[0], std::slice::from_ref(&whole)).unwrap_err();
        assert!(matches!(error, ReadError::Table { .. } | ReadError::Parquet { .. }), "{error}");
    }

    #[test]
    fn a_negative_row_count_does_not_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path());
        forge(&path, 6, -6);
        assert!(ParquetTable::open(&path).is_err());
    }
    /// 65 rows of nothing, a bit each, that the decoder would fill up to 2^20 elements each.
    #[test]
    fn null_lists_of_a_length_that_fills_memory_are_refused_before_decoding() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lists.parquet");
        let item = Arc::new(arrow::datatypes::Field::new("item", DataType::Boolean, true));
        let elements = BooleanArray::new(BooleanBuffer::new_unset(65 << 20), None);
        let nulls = NullBuffer::new_null(65);
        let lists: ArrayRef =
            Arc::new(FixedSizeListArray::new(item, 1 << 20, Arc::new(elements), Some(nulls)));
        let batch = RecordBatch::try_from_iter([("lists", lists)]).unwrap();
        let mut writer = ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let table = ParquetTable::open(&path).unwrap();
        assert!(table.size_bytes < 5000);
        let error = table.read(&[0], &[0..65]).unwrap_err().to_string();
        assert!(
            error.contains("lists of the lengths that it declares would take 545259520 bytes"),
            "{error}"
        );
        assert_eq!(table.read(&[0], &[]).unwrap(), vec![Vec::<ArrayRef>::new()]);
    }
}
