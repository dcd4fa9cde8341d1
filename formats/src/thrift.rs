//! Thrift's compact protocol, walked and not decoded: what a Parquet file says of itself is held against what its
//! bytes can hold, before the decoder is given them.
//!
//! The decoder recurses and allocates by numbers it finds here. A stack that overflows and an allocation that fails end
//! the process, and neither can be caught; a list of booleans that is skipped costs no bytes and can be 2^31 long. So:
//! - the schema nests at most [`DEEPEST_SCHEMA`] deep, and no element has more children than elements follow;
//! - no list says it has more elements than bytes are left;
//! - the fields that the decoder reads by number have the types it takes them for, so that both walk the same way.
//!
//! Source: `parquet.thrift` of apache/parquet-format, and Thrift's `thrift-compact-protocol.md`. Upstream:
//! apache/arrow-rs #9874 (the same in general), apache/arrow #51238 (the schema's depth, in C++).

/// Levels of groups; a list takes two. As Arrow C++ has it.
const DEEPEST_SCHEMA: usize = 100;
/// Structs in structs, where nothing is known of them. The decoder's own limit.
const DEEPEST: usize = 64;

/// Why a walk ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The bytes end before the struct does.
    Ends,
    Broken(&'static str),
}

/// What a page says of itself. Negative numbers are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageHeader {
    /// Bytes of the header.
    pub(crate) len: usize,
    pub(crate) uncompressed: u64,
    pub(crate) compressed: u64,
    /// Of a data page: values with nulls, which the chunk's number is the sum of. Of a dictionary: its entries.
    pub(crate) values: u64,
    pub(crate) kind: PageKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PageKind {
    /// `uncompressed_prefix` bytes of levels come before what is compressed.
    Data {
        uncompressed_prefix: u64,
        is_compressed: bool,
    },
    Dictionary,
    /// An index, or of a kind unknown here.
    Other,
}

const TRUE: u8 = 1;
const FALSE: u8 = 2;
const I32: u8 = 5;
const I64: u8 = 6;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// Types of the fields of `FileMetaData`, from 1.
const FILE: [u8; 9] = [I32, LIST, I64, LIST, LIST, BINARY, LIST, STRUCT, BINARY];
const SCHEMA_ELEMENT: [u8; 10] = [I32, I32, I32, BINARY, I32, I32, I32, I32, I32, STRUCT];
const PAGE: [u8; 8] = [I32, I32, I32, I32, STRUCT, STRUCT, STRUCT, STRUCT];
const DATA_PAGE: [u8; 5] = [I32, I32, I32, I32, STRUCT];
const DICTIONARY_PAGE: [u8; 3] = [I32, I32, TRUE];
const DATA_PAGE_V2: [u8; 8] = [I32, I32, I32, I32, I32, I32, TRUE, STRUCT];

/// Refuses a footer whose schema would take the decoder down.
pub(crate) fn check_footer(bytes: &[u8]) -> Result<(), Stop> {
    let mut schemas = 0;
    Walk { rest: bytes }.fields(&FILE, |walk, id, kind| {
        if id != 2 {
            return walk.skip(kind, DEEPEST);
        }
        schemas += 1;
        if schemas > 1 {
            return Err(Stop::Broken("two schemas"));
        }
        walk.schema()
    })
}

/// Refuses a struct that would keep the decoder busy for nothing.
pub(crate) fn check_struct(bytes: &[u8]) -> Result<(), Stop> {
    Walk { rest: bytes }.fields(&[], |walk, _, kind| walk.skip(kind, DEEPEST))
}

/// The page header that `bytes` begin with. They may go on behind it.
pub(crate) fn page_header(bytes: &[u8]) -> Result<PageHeader, Stop> {
    let mut header = PageHeader { len: 0, uncompressed: 0, compressed: 0, values: 0, kind: PageKind::Other };
    let mut walk = Walk { rest: bytes };
    walk.fields(&PAGE, |walk, id, kind| match id {
        2 => walk.count().map(|count| header.uncompressed = count),
        3 => walk.count().map(|count| header.compressed = count),
        5 => {
            header.kind = PageKind::Data { uncompressed_prefix: 0, is_compressed: true };
            walk.fields(&DATA_PAGE, |walk, id, kind| match id {
                1 => walk.count().map(|count| header.values = count),
                _ => walk.skip(kind, DEEPEST),
            })
        }
        7 => {
            header.kind = PageKind::Dictionary;
            walk.fields(&DICTIONARY_PAGE, |walk, id, kind| match id {
                1 => walk.count().map(|count| header.values = count),
                _ => walk.skip(kind, DEEPEST),
            })
        }
        8 => {
            let (mut uncompressed_prefix, mut is_compressed) = (0, true);
            walk.fields(&DATA_PAGE_V2, |walk, id, kind| match id {
                1 => walk.count().map(|count| header.values = count),
                5 | 6 => walk.count().map(|count| uncompressed_prefix += count),
                7 => {
                    is_compressed = kind == TRUE;
                    Ok(())
                }
                _ => walk.skip(kind, DEEPEST),
            })?;
            header.kind = PageKind::Data { uncompressed_prefix, is_compressed };
            Ok(())
        }
        _ => walk.skip(kind, DEEPEST),
    })?;
    header.len = bytes.len() - walk.rest.len();
    Ok(header)
}

struct Walk<'a> {
    rest: &'a [u8],
}

impl Walk<'_> {
    fn byte(&mut self) -> Result<u8, Stop> {
        let (first, rest) = self.rest.split_first().ok_or(Stop::Ends)?;
        self.rest = rest;
        Ok(*first)
    }

    fn bytes(&mut self, count: u64) -> Result<(), Stop> {
        self.rest = usize::try_from(count).ok().and_then(|count| self.rest.get(count..)).ok_or(Stop::Ends)?;
        Ok(())
    }

    fn varint(&mut self) -> Result<u64, Stop> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Stop::Broken("a number of more than 64 bits"))
    }

    /// An i32 that counts something.
    fn count(&mut self) -> Result<u64, Stop> {
        let zigzag = self.varint()?;
        match zigzag {
            odd if odd & 1 == 1 => Err(Stop::Broken("a negative count")),
            even if even >> 1 > i32::MAX as u64 => Err(Stop::Broken("a count of more than 31 bits")),
            even => Ok(even >> 1),
        }
    }

    /// The fields of a struct. Those that `kinds` names, from 1, must have its types, and `each` must walk over them.
    fn fields(
        &mut self,
        kinds: &[u8],
        mut each: impl FnMut(&mut Self, u64, u8) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        let mut id = 0;
        loop {
            let head = self.byte()?;
            let kind = head & 0xf;
            if kind == 0 {
                return Ok(());
            }
            id = match head >> 4 {
                0 => self.count()?,
                delta => id + u64::from(delta),
            };
            let wanted = id.checked_sub(1).and_then(|at| kinds.get(usize::try_from(at).ok()?));
            // A boolean's value is its type.
            if wanted.is_some_and(|wanted| *wanted != kind && (*wanted, kind) != (TRUE, FALSE)) {
                return Err(Stop::Broken("a field of another type than it has"));
            }
            each(self, id, kind)?;
        }
    }

    /// The type of a list's elements and their number.
    fn list(&mut self) -> Result<(u8, u64), Stop> {
        let head = self.byte()?;
        let len = match head >> 4 {
            15 => self.varint()?,
            len => u64::from(len),
        };
        if len > self.rest.len() as u64 {
            return Err(Stop::Broken("a list longer than what is left"));
        }
        match head & 0xf {
            // No footer or page has one, and the decoder takes an element that it skips for nothing at all.
            TRUE | FALSE if len > 0 => Err(Stop::Broken("a list of booleans")),
            kind => Ok((kind, len)),
        }
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Result<(), Stop> {
        let deeper = depth.checked_sub(1).ok_or(Stop::Broken("structs too deep in each other"))?;
        match kind {
            TRUE | FALSE => Ok(()),
            3 => self.bytes(1),
            4..=I64 => self.varint().map(|_| ()),
            7 => self.bytes(8),
            BINARY => self.varint().and_then(|len| self.bytes(len)),
            LIST | 10 => {
                let (kind, len) = self.list()?;
                (0..len).try_for_each(|_| self.skip(kind, deeper))
            }
            STRUCT => self.fields(&[], |walk, _, kind| walk.skip(kind, deeper)),
            13 => self.bytes(16),
            11 => Err(Stop::Broken("a map")), // the format has none
            _ => Err(Stop::Broken("a type that Thrift has not")),
        }
    }

    /// The tree of columns, flattened depth first: each element says how many of those that follow are its children.
    fn schema(&mut self) -> Result<(), Stop> {
        let (kind, len) = self.list()?;
        if kind != STRUCT {
            return Err(Stop::Broken("a schema that is no list of columns"));
        }
        // Children that each open group still waits for, outermost first.
        let mut open: Vec<u64> = Vec::new();
        for left in (0..len).rev() {
            let mut children = 0;
            self.fields(&SCHEMA_ELEMENT, |walk, id, kind| match id {
                5 => walk.count().map(|count| children = count),
                _ => walk.skip(kind, DEEPEST),
            })?;
            if children > left {
                return Err(Stop::Broken("a column with more children than columns follow"));
            }
            if children > 0 {
                open.push(children);
            } else {
                while let Some(waiting) = open.last_mut() {
                    *waiting -= 1;
                    if *waiting > 0 {
                        break;
                    }
                    open.pop();
                }
            }
            if open.len() > DEEPEST_SCHEMA {
                return Err(Stop::Broken("columns too deep in each other"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A footer with these columns, each by the number of its children.
    fn footer(children: impl IntoIterator<Item = u32>) -> Vec<u8> {
        let mut columns = Vec::new();
        let mut count: u32 = 0;
        for children in children {
            columns.extend([0x35, 0x02, 0x18, 0x01, b'a', 0x15]); // optional, "a", and how many children
            varint(&mut columns, u64::from(children) * 2);
            columns.push(0);
            count += 1;
        }
        let mut footer = vec![0x15, 0x02, 0x19, 0xfc]; // version 1, a list of structs
        varint(&mut footer, u64::from(count));
        footer.extend(columns);
        footer.extend([0x16, 0x00, 0x19, 0x0c, 0x00]); // no rows, no row groups
        footer
    }

    fn varint(bytes: &mut Vec<u8>, mut value: u64) {
        while value > 0x7f {
            bytes.push(u8::try_from(value & 0x7f | 0x80).unwrap());
            value >>= 7;
        }
        bytes.push(u8::try_from(value).unwrap());
    }

    fn open(footer: &[u8]) -> String {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let len = u32::try_from(footer.len()).unwrap().to_le_bytes();
        std::io::Write::write_all(&mut file, &[b"PAR1", footer, &len, b"PAR1"].concat()).unwrap();
        match crate::parquet::ParquetTable::open(file.path()) {
            Ok(_) => "opened".to_owned(),
            Err(error) => std::error::Error::source(&error).unwrap().to_string(),
        }
    }

    /// Seen: a file of 2 MB ends the process. Cause: the decoder recurses over groups in groups. Harm: a daemon serves
    /// nobody any more. Cure: `DEEPEST_SCHEMA`.
    #[test]
    fn columns_a_hundred_thousand_deep_are_an_error_and_no_overflow_of_the_stack() {
        let nested = |groups: usize| footer(std::iter::repeat_n(1, groups).chain([0]));
        assert_eq!(open(&nested(DEEPEST_SCHEMA)), "opened");
        for groups in [DEEPEST_SCHEMA + 1, 200_000] {
            let error = open(&nested(groups));
            assert!(error.contains("columns too deep in each other"), "{groups}: {error}");
        }
    }

    /// Seen: 60 bytes ask for 16 GiB, which ends the process where that much cannot be had.
    #[test]
    fn a_column_of_two_billion_children_is_refused_before_there_is_room_for_them() {
        let error = open(&footer([2_147_483_647, 0, 0]));
        assert!(error.contains("more children than columns follow"), "{error}");
        assert_eq!(open(&footer([2, 1, 0, 0])), "opened");
    }

    /// Seen: a field that nobody knows, of lists of 2^31 booleans, which take no bytes and are counted one by one.
    #[test]
    fn two_billion_booleans_in_no_bytes_are_refused() {
        let mut unknown = footer([0]);
        unknown.pop();
        unknown.extend([0x09, 0x3c, 0x19]); // field 30: one list
        unknown.extend([0xf1, 0xff, 0xff, 0xff, 0xff, 0x07, 0x00]); // of 2^31 - 1 booleans
        let error = open(&unknown);
        assert!(error.contains("a list longer than what is left"), "{error}");
        assert_eq!(check_struct(&unknown), Err(Stop::Broken("a list longer than what is left")));
    }

    #[test]
    fn footers_cut_off_or_of_other_types_are_stopped() {
        let whole = footer([2, 1, 0, 0]);
        assert_eq!(check_footer(&whole), Ok(()));
        for len in 0..whole.len() {
            let cut = check_footer(&whole[..len]);
            assert!(cut == Err(Stop::Ends) || matches!(cut, Err(Stop::Broken(_))), "{len}: {cut:?}");
        }
        let twice = [&whole[..whole.len() - 1], &[0x09, 0x04, 0x1c, 0x00, 0x00]].concat();
        assert_eq!(check_footer(&twice), Err(Stop::Broken("two schemas")));
        assert_eq!(check_footer(&[0x18, 0]), Err(Stop::Broken("a field of another type than it has")));
        let structs = vec![0x1c; 1000];
        assert_eq!(check_struct(&structs), Err(Stop::Broken("structs too deep in each other")));
    }
}
