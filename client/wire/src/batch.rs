//! The batch header at the start of every slot, and where its columns may lie. Layout: `docs/segment.md`.
//!
//! Written by the daemon into bytes that only it can write, read by clients from a leased slot. A header that was
//! read is checked against the loader's shape before anything is computed from it.

/// Bytes of the header, before the sample ids.
pub const HEADER_BYTES: usize = 64;
/// Every column starts at a multiple of this.
pub const COLUMN_ALIGN: u64 = 64;
/// A slot's size is a multiple of this.
pub const SLOT_ALIGN: u64 = 4096;

/// What the daemon says of a batch. `seq` and `run` are those of the slot's line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct BatchHeader {
    /// Number of the batch within its run.
    pub seq: u64,
    pub epoch: u64,
    /// Number of the batch within this rank's part of the epoch, counted from where the run entered it.
    pub batch: u64,
    pub rows: u32,
    pub last_of_epoch: bool,
    pub run: u32,
    /// `Position.consumed` before this batch.
    pub consumed_before: u64,
    /// Time the daemon took to fill the slot, in nanoseconds.
    pub assemble_ns: u64,
}

const LAST_OF_EPOCH: u32 = 1;

/// A batch header that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BatchHeaderError {
    #[error("a slot of {found} bytes is too short for a batch header of {wanted}")]
    Short { wanted: usize, found: usize },
    #[error("batch {seq} says it has {rows} rows; the loader's batches have 1 to {batch_size}")]
    Rows { seq: u64, rows: u32, batch_size: u32 },
    #[error("batch {seq} has flags {flags:#x}, of which this version knows {LAST_OF_EPOCH:#x}")]
    Flags { seq: u64, flags: u32 },
    #[error("batch {seq} says its sample ids lie at {found}, not at {HEADER_BYTES}")]
    IdsOffset { seq: u64, found: u64 },
}

impl BatchHeader {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let flags = if self.last_of_epoch { LAST_OF_EPOCH } else { 0 };
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &self.seq.to_le_bytes());
        put(8, &self.epoch.to_le_bytes());
        put(16, &self.batch.to_le_bytes());
        put(24, &self.rows.to_le_bytes());
        put(28, &flags.to_le_bytes());
        put(32, &self.run.to_le_bytes());
        put(40, &self.consumed_before.to_le_bytes());
        put(48, &self.assemble_ns.to_le_bytes());
        put(56, &(HEADER_BYTES as u64).to_le_bytes());
        bytes
    }

    /// Read and check the header at the start of `slot`, of a loader whose batches have up to `batch_size` rows.
    pub fn decode(slot: &[u8], batch_size: u32) -> Result<Self, BatchHeaderError> {
        let Some(bytes) = slot.first_chunk::<HEADER_BYTES>() else {
            return Err(BatchHeaderError::Short { wanted: HEADER_BYTES, found: slot.len() });
        };
        let u64_at = |at: usize| {
            let mut field = [0; 8];
            field.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(field)
        };
        let u32_at = |at: usize| {
            let mut field = [0; 4];
            field.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(field)
        };
        let (seq, rows, flags, ids) = (u64_at(0), u32_at(24), u32_at(28), u64_at(56));
        if rows == 0 || rows > batch_size {
            return Err(BatchHeaderError::Rows { seq, rows, batch_size });
        }
        if flags & !LAST_OF_EPOCH != 0 {
            return Err(BatchHeaderError::Flags { seq, flags });
        }
        if ids != HEADER_BYTES as u64 {
            return Err(BatchHeaderError::IdsOffset { seq, found: ids });
        }
        Ok(Self {
            seq,
            epoch: u64_at(8),
            batch: u64_at(16),
            rows,
            last_of_epoch: flags & LAST_OF_EPOCH != 0,
            run: u32_at(32),
            consumed_before: u64_at(40),
            assemble_ns: u64_at(48),
        })
    }
}

/// Where the first column of a slot may start: behind header and sample ids.
pub const fn first_column_offset(batch_size: u32) -> u64 {
    (HEADER_BYTES as u64 + 8 * batch_size as u64).next_multiple_of(COLUMN_ALIGN)
}

/// Lays columns out one behind the other, in bytes from the start of a slot.
///
/// ```
/// let mut layout = robocache_wire::batch::SlotLayout::new(64);
/// let first = layout.column(64 * 50 * 4).unwrap();
/// assert_eq!(first % 64, 0);
/// assert_eq!(layout.slot_bytes().unwrap() % 4096, 0);
/// ```
#[derive(Debug, Clone, Copy)]
pub struct SlotLayout {
    end: u64,
}

impl SlotLayout {
    pub const fn new(batch_size: u32) -> Self {
        Self { end: first_column_offset(batch_size) }
    }

    /// The offset of the next column, of `len_bytes` for a whole batch; `None` where the sum overflows.
    pub fn column(&mut self, len_bytes: u64) -> Option<u64> {
        let offset = self.end.checked_next_multiple_of(COLUMN_ALIGN)?;
        self.end = offset.checked_add(len_bytes)?;
        Some(offset)
    }

    /// The size of a slot that holds all columns so far; `None` where it overflows.
    pub fn slot_bytes(&self) -> Option<u64> {
        self.end.checked_next_multiple_of(SLOT_ALIGN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_survives_the_slot(
            seq in any::<u64>(), epoch in any::<u64>(), batch in any::<u64>(), rows in 1_u32..=64,
            last_of_epoch in any::<bool>(), run in any::<u32>(), consumed_before in any::<u64>(), assemble_ns in any::<u64>()
        ) {
            let header =
                BatchHeader { seq, epoch, batch, rows, last_of_epoch, run, consumed_before, assemble_ns };
            prop_assert_eq!(BatchHeader::decode(&header.encode(), 64), Ok(header));
        }

        #[test]
        fn arbitrary_bytes_never_give_more_rows_than_a_batch_has(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(header) = BatchHeader::decode(&bytes, 7) {
                prop_assert!((1..=7).contains(&header.rows));
            }
        }
    }

    #[test]
    fn columns_do_not_overlap_and_overflow_is_none() {
        let mut layout = SlotLayout::new(3);
        assert_eq!(layout.column(1), Some(128));
        assert_eq!(layout.column(64), Some(192));
        assert_eq!(layout.column(0), Some(256));
        assert_eq!(layout.slot_bytes(), Some(4096));
        assert_eq!(layout.column(u64::MAX), None);
    }
}
