//! The shape of a segment and its header: the first bytes of `control`, and every check of them. Layout: `docs/segment.md`.
//!
//! A header is a peer's word: [`Shape::decode_header`] refuses whatever does not add up, so that what comes out can be
//! used to map and to index.

use rustix::fs::SealFlags;
use rustix::io::Errno;

use crate::message::VERSION;
use crate::slot::Owner;
use crate::words::{LINE_BYTES, LINES_OFFSET};

/// First eight bytes of `control`.
pub const MAGIC: [u8; 8] = *b"ROBOCACH";
/// Bytes of the header that are written once.
pub const HEADER_BYTES: usize = 68;
/// A ring has at least 2 slots: one to fill while the other is read.
pub const SLOTS_MIN: u32 = 2;
pub const SLOTS_MAX: u32 = 4096;
/// Pages that memfds are rounded up to.
pub(crate) const PAGE: u64 = 4096;

/// What a ring is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// [`SLOTS_MIN`] to [`SLOTS_MAX`].
    pub slots: u32,
    /// A multiple of 4096.
    pub slot_bytes: u64,
    /// Rows of a batch at most.
    pub batch_size: u32,
    /// Owner number of the client in slot words.
    pub client: u32,
    /// Process id of the daemon.
    pub daemon_pid: u32,
}

/// A segment that cannot be made or is not what it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SegmentError {
    #[error("{call} failed for the {memfd} memfd of {len_bytes} bytes: {source}")]
    System { call: &'static str, memfd: &'static str, len_bytes: u64, source: Errno },
    #[error("a ring has {SLOTS_MIN} to {SLOTS_MAX} slots, {found} were asked for")]
    Slots { found: u32 },
    #[error("slots of {slot_bytes} bytes are not a multiple of {PAGE} that holds a batch of {batch_size}")]
    SlotBytes { slot_bytes: u64, batch_size: u32 },
    #[error("{slots} slots of {slot_bytes} bytes are more than this machine can address")]
    TooLarge { slots: u32, slot_bytes: u64 },
    #[error("client numbers are 1 to 16777215, found {found}")]
    Client { found: u32 },
    #[error("the {memfd} descriptor is no memfd: {source}")]
    NoMemfd { memfd: &'static str, source: Errno },
    #[error("the {memfd} memfd must be sealed with {wanted:?}, it has {found:?}")]
    Seals { memfd: &'static str, wanted: SealFlags, found: SealFlags },
    #[error("the {memfd} memfd has {found} bytes, {wanted} are needed")]
    Size { memfd: &'static str, wanted: u64, found: u64 },
    #[error("the control memfd does not begin with the magic of a RoboCache segment: {found:02x?}")]
    Magic { found: [u8; 8] },
    #[error("the daemon's segment has layout version {found}, this program reads version {VERSION}: {}", upgrade(*found))]
    Version { found: u32 },
    #[error("the segment's header says {field} is {found}, it must be {wanted}")]
    Field { field: &'static str, wanted: u64, found: u64 },
    #[error(
        "text table {table} at {offset} with {count} strings and {len} bytes does not lie in the texts memfd of {texts_bytes} bytes"
    )]
    TextTable { table: usize, offset: u64, count: u32, len: u64, texts_bytes: u64 },
    #[error("string {string} of text table {table} is no UTF-8 text inside its table")]
    Text { table: usize, string: usize },
}

fn upgrade(found: u32) -> &'static str {
    if found < u32::from(VERSION) { "upgrade robocached, then restart it" } else { "upgrade this program" }
}

impl Shape {
    /// Bytes of `control`.
    pub fn control_bytes(&self) -> u64 {
        (LINES_OFFSET as u64 + LINE_BYTES as u64 * u64::from(self.slots)).next_multiple_of(PAGE)
    }

    /// Bytes of `data`.
    pub fn data_bytes(&self) -> Result<u64, SegmentError> {
        u64::from(self.slots)
            .checked_mul(self.slot_bytes)
            .filter(|bytes| isize::try_from(*bytes).is_ok())
            .ok_or(SegmentError::TooLarge { slots: self.slots, slot_bytes: self.slot_bytes })
    }

    pub(crate) fn check(&self) -> Result<Owner, SegmentError> {
        if !(SLOTS_MIN..=SLOTS_MAX).contains(&self.slots) {
            return Err(SegmentError::Slots { found: self.slots });
        }
        let (slot_bytes, batch_size) = (self.slot_bytes, self.batch_size);
        if slot_bytes % PAGE != 0
            || batch_size == 0
            || slot_bytes < crate::batch::first_column_offset(batch_size)
        {
            return Err(SegmentError::SlotBytes { slot_bytes, batch_size });
        }
        self.data_bytes()?;
        Owner::client(self.client).ok_or(SegmentError::Client { found: self.client })
    }

    /// The header's bytes, from 0 of `control`.
    pub fn encode_header(&self) -> Result<[u8; HEADER_BYTES], SegmentError> {
        let mut bytes = [0; HEADER_BYTES];
        let data_bytes = self.data_bytes()?;
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(8, &u32::from(VERSION).to_le_bytes());
        put(12, &4096_u32.to_le_bytes());
        put(16, &self.slots.to_le_bytes());
        put(20, &self.client.to_le_bytes());
        put(24, &self.slot_bytes.to_le_bytes());
        put(32, &self.control_bytes().to_le_bytes());
        put(40, &data_bytes.to_le_bytes());
        put(48, &(LINES_OFFSET as u64).to_le_bytes());
        put(56, &64_u32.to_le_bytes());
        put(60, &self.batch_size.to_le_bytes());
        put(64, &self.daemon_pid.to_le_bytes());
        Ok(bytes)
    }

    /// Read a header and check every field of it, as far as it can be without the memfds.
    pub fn decode_header(bytes: &[u8; HEADER_BYTES]) -> Result<Self, SegmentError> {
        let u32_at = |at: usize| {
            let mut field = [0; 4];
            field.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(field)
        };
        let u64_at = |at: usize| {
            let mut field = [0; 8];
            field.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(field)
        };
        let mut magic = [0; 8];
        magic.copy_from_slice(&bytes[..8]);
        if magic != MAGIC {
            return Err(SegmentError::Magic { found: magic });
        }
        let version = u32_at(8);
        if version != u32::from(VERSION) {
            return Err(SegmentError::Version { found: version });
        }
        let shape = Self {
            slots: u32_at(16),
            slot_bytes: u64_at(24),
            batch_size: u32_at(60),
            client: u32_at(20),
            daemon_pid: u32_at(64),
        };
        shape.check()?;
        let same = |field, wanted, found| {
            if wanted == found { Ok(()) } else { Err(SegmentError::Field { field, wanted, found }) }
        };
        same("header_bytes", 4096, u64::from(u32_at(12)))?;
        same("control_bytes", shape.control_bytes(), u64_at(32))?;
        same("data_bytes", shape.data_bytes()?, u64_at(40))?;
        same("lines_offset", LINES_OFFSET as u64, u64_at(48))?;
        same("line_bytes", LINE_BYTES as u64, u64::from(u32_at(56)))?;
        Ok(shape)
    }
}
