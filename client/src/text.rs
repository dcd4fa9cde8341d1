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
