//! Text tables: the strings that columns of role `Text` index.

use std::ops::Range;
use std::sync::Arc;

use robocache_wire::segment::{SegmentError, Texts};
use robocache_wire::spec::TextTableInfo;

/// One sorted table of strings, in memory the daemon shares with all of the loader's batches.
#[derive(Debug, Clone)]
pub struct TextTable {
    texts: Arc<Texts>,
    offsets: Range<usize>,
    bytes: Range<usize>,
    count: u32,
}

impl TextTable {
    /// Check and open all tables of a texts memfd.
    pub(crate) fn open_all(texts: &Arc<Texts>, infos: &[TextTableInfo]) -> Result<Vec<Self>, SegmentError> {
        infos.iter().enumerate().map(|(number, info)| Self::open(texts, number, info)).collect()
    }

    fn open(texts: &Arc<Texts>, table: usize, info: &TextTableInfo) -> Result<Self, SegmentError> {
        let TextTableInfo { offset, len, count } = *info;
        let texts_bytes = texts.bytes().len() as u64;
        let outside = || SegmentError::TextTable { table, offset, count, len, texts_bytes };
        let list = (u64::from(count) + 1) * 4;
        let end = offset.checked_add(len).filter(|end| *end <= texts_bytes).ok_or_else(outside)?;
        let bytes = offset.checked_add(list).filter(|start| *start <= end).ok_or_else(outside)?;
        let at = |n: u64| usize::try_from(n).or(Err(())).map_err(|()| outside());
        let (start, middle, end) = (at(offset)?, at(bytes)?, at(end)?);
        let opened = Self { texts: Arc::clone(texts), offsets: start..middle, bytes: middle..end, count };
        for string in 0..count as usize {
            // `span` refuses offsets that run backwards or out of the table, so strings cannot overlap other tables.
            if opened.get(string).is_none() {
                return Err(SegmentError::Text { table, string });
            }
        }
        Ok(opened)
    }

    /// Strings in the table.
    pub const fn len(&self) -> usize {
        self.count as usize
    }

    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// String `i`.
    pub fn get(&self, i: usize) -> Option<&str> {
        let (from, to) = (self.offset(i)?, self.offset(i.checked_add(1)?)?);
        let bytes = self.texts.bytes().get(self.bytes.clone())?.get(from..to)?;
        std::str::from_utf8(bytes).ok()
    }

    /// All strings, in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        (0..self.len()).filter_map(|i| self.get(i))
    }

    fn offset(&self, i: usize) -> Option<usize> {
        let list = self.texts.bytes().get(self.offsets.clone())?;
        let field = list.get(i.checked_mul(4)?..)?.first_chunk::<4>()?;
        usize::try_from(u32::from_le_bytes(*field)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn opened(bytes: &[u8], infos: &[TextTableInfo]) -> Result<Vec<TextTable>, SegmentError> {
        let fd = Texts::create(bytes).expect("a memfd can be made");
        let texts = Texts::open(&fd).expect("sealed just now");
        TextTable::open_all(&Arc::new(texts), infos)
    }

    /// A table as the daemon writes it: offsets, then the strings.
    fn written(strings: &[String]) -> Vec<u8> {
        let ends = strings.iter().scan(0_u32, |end, string| {
            *end += u32::try_from(string.len()).expect("short");
            Some(*end)
        });
        let mut bytes: Vec<u8> = std::iter::once(0).chain(ends).flat_map(u32::to_le_bytes).collect();
        bytes.extend(strings.iter().flat_map(|string| string.bytes()));
        bytes
    }

    fn infos() -> impl Strategy<Value = Vec<TextTableInfo>> {
        let number = prop_oneof![0_u64..200, Just(u64::MAX), Just(u64::MAX - 3)];
        let info = (number.clone(), number, prop_oneof![0_u32..20, Just(u32::MAX)]);
        prop::collection::vec(
            info.prop_map(|(offset, len, count)| TextTableInfo { offset, len, count }),
            0..4,
        )
    }

    proptest! {
        /// What a daemon says of its tables, and what is in them, is a table or an error, never a panic.
        #[test]
        fn tables_of_any_bytes_are_tables_or_errors(
            // Mostly zeros, so that many are tables.
            bytes in prop::collection::vec(prop_oneof![9 => Just(0), 1 => any::<u8>()], 1..200),
            infos in infos(),
        ) {
            if let Ok(tables) = opened(&bytes, &infos) {
                for (table, info) in tables.iter().zip(&infos) {
                    prop_assert_eq!(table.iter().count(), info.count as usize);
                    prop_assert!(table.iter().map(str::len).sum::<usize>() as u64 <= info.len);
                    prop_assert!(table.get(table.len()).is_none() && table.get(usize::MAX).is_none());
                }
            }
        }

        /// A table changed in one byte has as many strings, or is an error.
        #[test]
        fn a_table_reads_as_it_was_written_and_a_damaged_one_stays_within_itself(
            strings in prop::collection::vec(".{0,12}", 1..6),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let mut bytes = written(&strings);
            let count = u32::try_from(strings.len()).expect("few");
            let info = TextTableInfo { offset: 0, len: bytes.len() as u64, count };
            let tables = opened(&bytes, std::slice::from_ref(&info)).expect("as the daemon writes them");
            prop_assert!(tables[0].iter().eq(strings.iter().map(String::as_str)));
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(tables) = opened(&bytes, std::slice::from_ref(&info)) {
                prop_assert_eq!(tables[0].iter().count(), strings.len());
            }
        }
    }
}
