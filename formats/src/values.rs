//! Arrow arrays as blocks of rows.
//!
//! A stream is `[rows, dim]` of one dtype without holes. Where an Arrow child buffer is that already, it is used as
//! it is and nothing is copied. Lists are checked row by row first, since in a file they may have any length.
//!
//! Nulls: floating elements (and whole lists of them) become NaN and are warned of; anything else is an error.

use std::ops::Range;
use std::path::Path;

use arrow::array::{Array, ArrayRef, AsArray, OffsetSizeTrait, UInt64Array};
use arrow::buffer::{Buffer, MutableBuffer};
use arrow::compute::take;
use arrow::datatypes::DataType;
use robocache_types::DType;

use crate::dataset::Values;
use crate::error::ReadError;
use crate::warnings::Warned;

/// Where arrays came from, for errors and warnings: `ranges` are the rows of the file they hold, in order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin<'a> {
    pub(crate) path: &'a Path,
    pub(crate) column: &'a str,
    pub(crate) ranges: &'a [Range<usize>],
    pub(crate) warned: &'a Warned,
}

impl Origin<'_> {
    /// The row of the file that is at `position` among the rows of `ranges`.
    pub(crate) fn row(&self, position: usize) -> usize {
        let mut left = position;
        for range in self.ranges {
            if left < range.len() {
                return range.start + left;
            }
            left -= range.len();
        }
        position
    }

    pub(crate) fn wrong_type(&self, wanted: impl ToString, found: &DataType) -> ReadError {
        ReadError::ColumnType {
            path: self.path.to_owned(),
            column: self.column.to_owned(),
            wanted: wanted.to_string(),
            found: found.to_string(),
        }
    }

    pub(crate) fn null(&self, position: usize, what: impl ToString) -> ReadError {
        ReadError::Null {
            path: self.path.to_owned(),
            column: self.column.to_owned(),
            row: self.row(position),
            what: what.to_string(),
        }
    }

    pub(crate) fn arrow(&self, source: arrow::error::ArrowError) -> ReadError {
        ReadError::Arrow { path: self.path.to_owned(), source }
    }
}

/// What an Arrow type holds in each row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Holds {
    /// Numbers or booleans in as many nested lists as there are `lengths`, outermost first; `None` where the type
    /// leaves the length open.
    Numbers { dtype: DType, lengths: Vec<Option<usize>> },
    /// Strings in as many nested lists.
    Text { lengths: Vec<Option<usize>> },
    /// Neither; says what.
    Other(String),
}

/// What a column of this type holds.
pub(crate) fn holds(data_type: &DataType) -> Holds {
    let mut lengths = Vec::new();
    let mut leaf = data_type;
    loop {
        match leaf {
            DataType::List(field) | DataType::LargeList(field) => {
                lengths.push(None);
                leaf = field.data_type();
            }
            DataType::FixedSizeList(field, length) => {
                lengths.push(usize::try_from(*length).ok());
                leaf = field.data_type();
            }
            _ => break,
        }
    }
    if is_text(leaf) {
        return Holds::Text { lengths };
    }
    match dtype_of(leaf) {
        Some(dtype) => Holds::Numbers { dtype, lengths },
        None => Holds::Other(data_type.to_string()),
    }
}

fn is_text(data_type: &DataType) -> bool {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Dictionary(_, value) => is_text(value),
        _ => false,
    }
}

/// The dtype of a flat Arrow type.
pub(crate) const fn dtype_of(data_type: &DataType) -> Option<DType> {
    Some(match data_type {
        DataType::Boolean => DType::Bool,
        DataType::UInt8 => DType::UInt8,
        DataType::Int8 => DType::Int8,
        DataType::UInt16 => DType::UInt16,
        DataType::Int16 => DType::Int16,
        DataType::UInt32 => DType::UInt32,
        DataType::Int32 => DType::Int32,
        DataType::UInt64 => DType::UInt64,
        DataType::Int64 => DType::Int64,
        DataType::Float16 => DType::Float16,
        DataType::Float32 => DType::Float32,
        DataType::Float64 => DType::Float64,
        _ => return None,
    })
}

/// Elements of a row of this shape; `None` where that does not fit.
pub(crate) fn elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |product, length| product.checked_mul(*length))
}

/// Numbers or booleans as one block. `shape` is that of a row, empty for a scalar; a scalar may be stored as a list
/// of one, and any shape as one flat list. Booleans become bytes of 0 and 1.
pub(crate) fn numbers(
    chunks: &[ArrayRef],
    dtype: DType,
    shape: &[usize],
    origin: Origin<'_>,
) -> Result<Values, ReadError> {
    let dim = elements(shape).unwrap_or(0);
    let mut blocks = Vec::with_capacity(chunks.len());
    let mut rows = 0;
    for chunk in chunks {
        let place = Place { origin, before: rows, dtype: Some(dtype) };
        let flat = flatten(chunk, shape, place)?;
        blocks.push(block(&flat, dtype, dim, place)?);
        rows += chunk.len();
    }
    let buffer = match <[Buffer; 1]>::try_from(blocks) {
        Ok([only]) => only,
        Err(blocks) => {
            let mut joined = MutableBuffer::with_capacity(blocks.iter().map(Buffer::len).sum());
            blocks.iter().for_each(|block| joined.extend_from_slice(block.as_slice()));
            joined.into()
        }
    };
    Ok(Values { dtype, dim, rows, buffer })
}

/// A chunk within a column: `before` rows of the column come before it. No `dtype` for text.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) origin: Origin<'a>,
    pub(crate) before: usize,
    pub(crate) dtype: Option<DType>,
}

/// The innermost array of a column whose rows are lists (of lists ...) of exactly `shape`.
pub(crate) fn flatten(array: &ArrayRef, shape: &[usize], place: Place<'_>) -> Result<ArrayRef, ReadError> {
    let depth = depth(array.data_type());
    let scalar = [1];
    let flat = [elements(shape).unwrap_or(0)];
    let lengths: &[usize] = match (depth, shape) {
        (depth, shape) if depth == shape.len() => shape,
        (1, []) => &scalar,
        (0, shape) if elements(shape) == Some(1) => &[],
        (1, _) => &flat,
        _ => {
            let wanted = place.dtype.map_or_else(|| "text".to_owned(), |dtype| dtype.to_string());
            return Err(place.origin.wrong_type(format!("{wanted} of shape {shape:?}"), array.data_type()));
        }
    };
    let mut array = array.clone();
    let mut per_row = 1; // elements of `array` in each row of the column
    for length in lengths {
        array = unlist(&array, *length, per_row, place)?;
        per_row *= length;
    }
    Ok(array)
}

fn depth(mut data_type: &DataType) -> usize {
    let mut depth = 0;
    while let DataType::List(field) | DataType::LargeList(field) | DataType::FixedSizeList(field, _) =
        data_type
    {
        data_type = field.data_type();
        depth += 1;
    }
    depth
}

/// The elements of lists that all have `length` of them.
fn unlist(array: &ArrayRef, length: usize, per_row: usize, place: Place<'_>) -> Result<ArrayRef, ReadError> {
    let nullable = place.dtype.is_some_and(DType::is_float);
    if let Some(nulls) = array.nulls().filter(|nulls| nulls.null_count() > 0 && !nullable) {
        let first = (0..array.len()).find(|i| nulls.is_null(*i)).unwrap_or(0);
        let what = place.dtype.map_or_else(|| "text".to_owned(), |dtype| dtype.to_string());
        return Err(place.origin.null(place.before + first / per_row, what));
    }
    match array.data_type() {
        DataType::List(_) => open_lists::<i32>(array, length, per_row, place),
        DataType::LargeList(_) => open_lists::<i64>(array, length, per_row, place),
        DataType::FixedSizeList(_, found) => {
            let list = array.as_fixed_size_list();
            if usize::try_from(*found) != Ok(length) {
                let found = usize::try_from(*found).unwrap_or(0);
                return Err(wrong_length(length, found, 0, per_row, place));
            }
            if list.null_count() == 0 {
                return Ok(list.values().clone());
            }
            let starts = (0..list.len()).map(|i| list.is_valid(i).then_some((i * length) as u64));
            spread(list.values(), list.len(), starts, length, place)
        }
        other => Err(place.origin.wrong_type("a list", other)),
    }
}

fn open_lists<O: OffsetSizeTrait>(
    array: &ArrayRef,
    length: usize,
    per_row: usize,
    place: Place<'_>,
) -> Result<ArrayRef, ReadError> {
    let list = array.as_list::<O>();
    let offsets = list.value_offsets();
    let holey = list.null_count() > 0;
    let wrong = offsets.windows(2).enumerate().find(|(i, pair)| {
        let found = pair[1].as_usize() - pair[0].as_usize();
        found != length && !(holey && list.is_null(*i))
    });
    if let Some((i, pair)) = wrong {
        return Err(wrong_length(length, pair[1].as_usize() - pair[0].as_usize(), i, per_row, place));
    }
    if !holey {
        let start = offsets.first().map_or(0, |offset| offset.as_usize());
        return Ok(list.values().slice(start, list.len() * length));
    }
    let starts = (0..list.len()).map(|i| list.is_valid(i).then(|| offsets[i].as_usize() as u64));
    spread(list.values(), list.len(), starts, length, place)
}

/// Elements that any column may have where lists are null, and how many rows there may be for one that is not.
const NULLS_ALWAYS_FINE: u128 = 1 << 26;
const MOST_ROWS_OF_ONE: u128 = 64;

/// Elements from each start, nulls where there is none.
fn spread(
    values: &ArrayRef,
    rows: usize,
    starts: impl Iterator<Item = Option<u64>>,
    length: usize,
    place: Place<'_>,
) -> Result<ArrayRef, ReadError> {
    // A null list takes a bit in the file and a row of NaN here.
    let wanted = (rows as u128).saturating_mul(length as u128);
    let limit = NULLS_ALWAYS_FINE.max(values.len() as u128 * MOST_ROWS_OF_ONE);
    if wanted > limit {
        let what = format!("column {:?} with NaN for its lists that are null", place.origin.column);
        let path = place.origin.path.to_owned();
        return Err(ReadError::TooLarge { path, what, bytes: wanted * 8, limit: limit * 8 });
    }
    let indices: UInt64Array =
        starts.flat_map(|start| (0..length as u64).map(move |k| start.map(|start| start + k))).collect();
    take(values, &indices, None).map_err(|source| place.origin.arrow(source))
}

fn wrong_length(wanted: usize, found: usize, at: usize, per_row: usize, place: Place<'_>) -> ReadError {
    ReadError::RowLength {
        path: place.origin.path.to_owned(),
        column: place.origin.column.to_owned(),
        row: place.origin.row(place.before + at / per_row),
        wanted,
        found,
    }
}

/// The bytes of a flat array of `dim` elements a row.
fn block(array: &ArrayRef, dtype: DType, dim: usize, place: Place<'_>) -> Result<Buffer, ReadError> {
    if dtype_of(array.data_type()) != Some(dtype) {
        return Err(place.origin.wrong_type(dtype, array.data_type()));
    }
    let nulls = array.nulls().filter(|nulls| nulls.null_count() > 0);
    if let Some(nulls) = nulls.filter(|_| !dtype.is_float()) {
        let first = (0..array.len()).find(|i| nulls.is_null(*i)).unwrap_or(0);
        return Err(place.origin.null(place.before + first / dim.max(1), dtype));
    }
    if let Some(bits) = array.as_boolean_opt() {
        return Ok(bits.values().iter().map(u8::from).collect::<Vec<_>>().into());
    }
    let data = array.to_data();
    let size = dtype.size_bytes();
    let buffer = data.buffers().first().ok_or_else(|| place.origin.wrong_type(dtype, array.data_type()))?;
    let buffer = buffer.slice_with_length(data.offset() * size, data.len() * size);
    let Some(nulls) = nulls else { return Ok(buffer) };
    place.origin.warned.nulls(place.origin.path, place.origin.column, nulls.null_count());
    let nan: &[u8] = match dtype {
        DType::Float16 => &half::f16::NAN.to_le_bytes(),
        DType::Float32 => &f32::NAN.to_le_bytes(),
        _ => &f64::NAN.to_le_bytes(),
    };
    let mut bytes = buffer.to_vec();
    for (element, valid) in bytes.chunks_exact_mut(size).zip(nulls.iter()) {
        if !valid {
            element.copy_from_slice(nan);
        }
    }
    Ok(bytes.into())
}

/// Columns of one dtype and length side by side: row `i` is row `i` of each, in order.
pub(crate) fn pack(columns: &[Values]) -> Values {
    let Some(first) = columns.first() else {
        return Values { dtype: DType::Float32, dim: 0, rows: 0, buffer: Buffer::from_vec(Vec::<u8>::new()) };
    };
    if columns.len() == 1 {
        return first.clone();
    }
    debug_assert!(columns.iter().all(|column| column.dtype == first.dtype && column.rows == first.rows));
    let size = first.dtype.size_bytes();
    let dim = columns.iter().map(|column| column.dim).sum::<usize>();
    let mut out = MutableBuffer::from_len_zeroed(first.rows * dim * size);
    let mut at = 0;
    for column in columns {
        let bytes = column.dim * size;
        match bytes {
            0 => {}
            1 => place_column::<1>(out.as_slice_mut(), &column.buffer, at, dim * size),
            2 => place_column::<2>(out.as_slice_mut(), &column.buffer, at, dim * size),
            4 => place_column::<4>(out.as_slice_mut(), &column.buffer, at, dim * size),
            8 => place_column::<8>(out.as_slice_mut(), &column.buffer, at, dim * size),
            _ => {
                let rows = out.as_slice_mut().chunks_exact_mut(dim * size);
                for (row, from) in rows.zip(column.buffer.chunks_exact(bytes)) {
                    row[at..at + bytes].copy_from_slice(from);
                }
            }
        }
        at += bytes;
    }
    Values { dtype: first.dtype, dim, rows: first.rows, buffer: out.into() }
}

/// Elements of `N` bytes to byte `at` of rows of `stride` bytes. A constant width makes each copy one move.
fn place_column<const N: usize>(out: &mut [u8], column: &[u8], at: usize, stride: usize) {
    for (row, from) in out.chunks_exact_mut(stride).zip(column.as_chunks::<N>().0) {
        row[at..at + N].copy_from_slice(from);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{
        BooleanArray, FixedSizeListArray, Float16Array, Float32Array, Float64Array, Int32Array, ListArray,
        StringArray, UInt16Array,
    };
    use arrow::buffer::{NullBuffer, OffsetBuffer};
    use arrow::datatypes::{Field, Float32Type};

    use super::*;

    fn read(chunks: &[ArrayRef], dtype: DType, shape: &[usize]) -> Result<Values, ReadError> {
        let rows: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        let origin = Origin {
            path: Path::new("file"),
            column: "x",
            ranges: &[10..11, 20..20 + rows.max(1) - 1], // row 0 is row 10 of the file, row 1 is row 20
            warned: &Warned::default(),
        };
        numbers(chunks, dtype, shape, origin)
    }

    fn list(rows: &[Option<&[f32]>]) -> ArrayRef {
        let rows = rows.iter().map(|row| row.map(|row| row.iter().copied().map(Some).collect::<Vec<_>>()));
        Arc::new(ListArray::from_iter_primitive::<Float32Type, _, _>(rows))
    }

    fn f32s(values: &Values) -> Vec<f32> {
        values.buffer.typed_data::<f32>().to_vec()
    }

    #[test]
    fn lists_of_one_length_are_taken_where_they_lie() {
        let rows = list(&[Some(&[1.0, 2.0]), Some(&[3.0, 4.0]), Some(&[5.0, 6.0])]);
        let child = rows.as_list::<i32>().values().to_data().buffers()[0].as_ptr();
        let values = read(&[rows.slice(1, 2)], DType::Float32, &[2]).unwrap();
        assert_eq!((values.dim, values.rows, f32s(&values)), (2, 2, vec![3.0, 4.0, 5.0, 6.0]));
        assert_eq!(values.buffer.as_ptr().addr(), child.addr() + 8, "a copy was made");
        let fixed = FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(
            [Some([Some(1.0), Some(2.0)]), Some([Some(3.0), Some(4.0)])],
            2,
        );
        let values = read(&[Arc::new(fixed.slice(1, 1))], DType::Float32, &[2]).unwrap();
        assert_eq!(f32s(&values), [3.0, 4.0]);
    }

    #[test]
    fn a_list_of_another_length_is_named_by_its_row_in_the_file() {
        let error = read(&[list(&[Some(&[1.0])]), list(&[Some(&[2.0, 3.0])])], DType::Float32, &[1]);
        let error = error.unwrap_err().to_string();
        assert_eq!(error, "\"file\": column \"x\", row 20: wanted 1 elements, found 2");
    }

    /// Cause of an allocation that ends the process: one list of a million, and a million rows that are null.
    #[test]
    fn null_lists_that_would_fill_memory_with_nan_are_refused() {
        let rows = 1 << 20;
        let offsets = std::iter::once(0).chain(std::iter::repeat_n(1 << 20, rows)).collect::<Vec<i32>>();
        let item = Arc::new(Field::new("item", DataType::Float64, true));
        let valid = NullBuffer::from_iter((0..rows).map(|row| row == 0));
        let elements: ArrayRef = Arc::new(Float64Array::from(vec![0.5; 1 << 20]));
        let offsets = OffsetBuffer::new(offsets.into());
        let lists: ArrayRef = Arc::new(ListArray::new(item, offsets, elements, Some(valid)));
        let error = read(&[lists], DType::Float64, &[1 << 20]).unwrap_err().to_string();
        assert!(error.contains("NaN for its lists that are null would take 8796093022208 bytes"), "{error}");
    }

    #[test]
    fn a_null_list_of_floats_is_nan_all_over() {
        let values = read(&[list(&[None, Some(&[1.0, 2.0])])], DType::Float32, &[2]).unwrap();
        let got = f32s(&values);
        assert!(got[0].is_nan() && got[1].is_nan() && got[2..] == [1.0, 2.0], "{got:?}");
        let field = Arc::new(Field::new("element", DataType::Int32, true));
        let nulls = NullBuffer::from(vec![true, false]);
        let ints = FixedSizeListArray::new(field, 1, Arc::new(Int32Array::from(vec![1, 2])), Some(nulls));
        let error = read(&[Arc::new(ints)], DType::Int32, &[1]).unwrap_err().to_string();
        assert_eq!(error, "\"file\": column \"x\", row 20 is null, which int32 cannot be");
    }

    #[test]
    fn nested_lists_fill_their_shape_and_flat_ones_may() {
        let flat: ArrayRef = Arc::new((0..12).map(|i| i as f32).collect::<Float32Array>());
        let field = |of: &ArrayRef| Arc::new(Field::new("element", of.data_type().clone(), true));
        let lists = |of: &ArrayRef, length: usize| -> ArrayRef {
            let rows = std::iter::repeat_n(length, of.len() / length);
            Arc::new(ListArray::new(field(of), OffsetBuffer::from_lengths(rows), of.clone(), None))
        };
        let cube = lists(&lists(&flat, 3), 2);
        for (array, shape) in [(&cube, vec![2, 3]), (&lists(&flat, 6), vec![2, 3]), (&flat, vec![])] {
            let values = read(std::slice::from_ref(array), DType::Float32, &shape).unwrap();
            assert_eq!(values.rows * values.dim, 12);
            assert_eq!(f32s(&values), (0..12).map(|i| i as f32).collect::<Vec<_>>());
        }
        let error = read(&[cube.slice(0, 2)], DType::Float32, &[2, 2]).unwrap_err().to_string();
        assert_eq!(error, "\"file\": column \"x\", row 10: wanted 2 elements, found 3");
        assert!(read(&[cube], DType::Float32, &[2, 3, 1]).unwrap_err().to_string().contains("[2, 3, 1]"));
    }

    #[test]
    fn booleans_become_bytes_and_narrow_types_stay_narrow() {
        let bools: ArrayRef = Arc::new(BooleanArray::from(vec![true, false, true, true]).slice(1, 3));
        let values = read(&[bools], DType::Bool, &[]).unwrap();
        assert_eq!(values.buffer.as_slice(), [0, 1, 1]);
        let words: ArrayRef = Arc::new(UInt16Array::from(vec![1, 0x1234]).slice(1, 1));
        assert_eq!(read(&[words], DType::UInt16, &[]).unwrap().buffer.as_slice(), [0x34, 0x12]);
        let halves = Float16Array::from(vec![Some(half::f16::ONE), None]);
        let values = read(&[Arc::new(halves)], DType::Float16, &[]).unwrap();
        let got: Vec<half::f16> = values.buffer.typed_data().to_vec();
        assert!(got[0] == half::f16::ONE && got[1].is_nan(), "{got:?}");
    }

    #[test]
    fn types_say_what_they_hold() {
        let item = |of: DataType| Arc::new(Field::new("item", of, true));
        let nested = DataType::FixedSizeList(item(DataType::LargeList(item(DataType::Float64))), 3);
        let lengths = vec![Some(3), None];
        assert_eq!(holds(&nested), Holds::Numbers { dtype: DType::Float64, lengths });
        let words = DataType::Dictionary(Box::new(DataType::Int8), Box::new(DataType::LargeUtf8));
        assert_eq!(holds(&words), Holds::Text { lengths: vec![] });
        assert!(matches!(holds(&DataType::Binary), Holds::Other(_)));
        let wrong = read(&[Arc::new(StringArray::from(vec!["1"]))], DType::Int32, &[]);
        assert!(wrong.unwrap_err().to_string().contains("should hold int32, found Utf8"));
    }

    #[test]
    fn packed_columns_lie_side_by_side_whatever_their_width() {
        let column = |dtype: DType, dim: usize, bytes: &[u8]| {
            let buffer = Buffer::from(bytes.to_vec());
            Values { dtype, dim, rows: bytes.len() / dim / dtype.size_bytes(), buffer }
        };
        let packed = pack(&[column(DType::UInt8, 1, &[1, 2]), column(DType::UInt8, 3, &[3, 4, 5, 6, 7, 8])]);
        assert_eq!((packed.dim, packed.rows), (4, 2));
        assert_eq!(packed.buffer.as_slice(), [1, 3, 4, 5, 2, 6, 7, 8]);
        for dtype in [DType::Int16, DType::Int32, DType::Int64] {
            let size = dtype.size_bytes();
            let a: Vec<u8> = (0..).take(size * 2).collect();
            let b: Vec<u8> = (100..).take(size * 2).collect();
            let wanted = [&a[..size], &b[..size], &a[size..], &b[size..]].concat();
            let packed = pack(&[column(dtype, 1, &a), column(dtype, 1, &b)]);
            assert_eq!(packed.buffer.as_slice(), wanted, "{dtype}");
        }
    }
}
