//! What `assemble` on a GPU is told: descriptors in the layout that its source declares, and how work is cut in tiles.
//!
//! Owns the byte layout (each `encode` names the struct it mirrors; `gpu_check` proves they agree) and the checks
//! that make a launch's sizes possible. Addresses here are numbers: nothing is read, `launch.rs` takes the risk.

use robocache_types::{Clock, DType, Interp};

use crate::field::{Anchor, FieldKernel, Offsets};

/// An address in a GPU's address space: device memory, or host memory mapped there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DevicePtr(pub u64);

/// Why a launch is not possible.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    #[error("nothing to launch: {what} is empty")]
    Empty { what: &'static str },
    #[error("{what} must be less than 2^32, found {found}")]
    TooLarge { what: &'static str, found: usize },
    #[error("the launch needs {blocks} blocks, a grid holds 2^31 - 1: make fewer samples at once")]
    TooManyBlocks { blocks: u64 },
    #[error("one launch fuses at most {most} streams, found {found}")]
    TooManyStreams { found: usize, most: usize },
    #[error("values must be float16, bfloat16, float32 or float64, found {found}")]
    Values { found: DType },
    #[error("times must be float32, float64 or int64, found {found}")]
    Times { found: DType },
}

/// One column of a batch on the GPU.
#[derive(Debug, Clone, Copy)]
pub struct Column<'a> {
    pub kernel: &'a FieldKernel,
    /// The field's offsets, `[steps]` of `i64`, in the GPU's memory.
    pub offsets: DevicePtr,
    /// `[batch, steps, dim]` of the target dtype, aligned to an element; to 16 bytes for speed.
    pub out: DevicePtr,
    /// `[batch, steps]` of bytes, 1 where padded.
    pub mask: Option<DevicePtr>,
}

/// The stream one sample of one column reads, in the GPU's memory.
#[derive(Debug, Clone, Copy)]
pub struct DeviceStream<'a> {
    /// `[rows, dim]`, aligned to an element. Rows that the column does not read ([`FieldKernel::rows`]) need not be there.
    pub data: DevicePtr,
    /// Its clock. Only a uniform one's numbers and the count of rows are taken from here.
    pub clock: &'a Clock,
    /// Where the clock has stamps: `[rows]` of `i64`.
    pub stamps: Option<DevicePtr>,
}

/// The columns of a batch, cut into blocks: the `fields` argument of `assemble`. Made once for each slot.
#[derive(Debug, Clone)]
pub struct AssemblePlan {
    pub(crate) fields: Vec<u8>,
    pub(crate) n_fields: u32,
    pub(crate) batch: u32,
    pub(crate) blocks: u32,
}

/// Threads of a block, in both kernels.
pub(crate) const THREADS: u32 = 256;
/// Targets of a tile, at most: `MAX_TILE` in both kernels.
const MAX_TILE: usize = 128;
/// 16-byte accesses of a thread that a tile is cut for. More spread a block's search over more work, fewer fill
/// the chip with a small batch.
const PACKS_PER_THREAD: usize = 4;
/// Blocks of `assemble` that a multiprocessor holds at once: its launch bounds.
const PLACES: usize = 4;

/// Targets of a tile, for rows of `row_bytes` and a chip with so many `places` for blocks. All blocks of a small batch
/// have a place at once, since a second round would take as long as the first; each block reads and searches the times
/// anew, so there are no more than that needs.
pub(crate) fn tile(steps: usize, samples: usize, row_bytes: usize, places: usize) -> usize {
    let packs = row_bytes.div_ceil(16);
    let by_work = (PACKS_PER_THREAD * THREADS as usize / packs).clamp(1, MAX_TILE);
    // At least one pack for each thread, even where that leaves few blocks.
    let least = (THREADS as usize / packs).clamp(1, MAX_TILE);
    let by_places = steps.div_ceil((places / samples).max(1)).max(least);
    by_work.min(by_places).min(steps)
}

/// 2^32 / `tiles`, as far as it fits: with it a block finds its sample by multiplying.
pub(crate) fn reciprocal(tiles: u32) -> u32 {
    u32::try_from((1_u64 << 32) / u64::from(tiles)).unwrap_or(u32::MAX)
}

pub(crate) fn u32_of(what: &'static str, found: usize) -> Result<u32, PlanError> {
    u32::try_from(found).map_err(|_too_large| PlanError::TooLarge { what, found })
}

pub(crate) fn block_count(blocks: u64) -> Result<u32, PlanError> {
    u32::try_from(blocks)
        .ok()
        .filter(|&blocks| blocks <= i32::MAX.unsigned_abs())
        .ok_or(PlanError::TooManyBlocks { blocks })
}

impl AssemblePlan {
    /// Cuts `batch` samples of `columns` into blocks for a GPU of so many multiprocessors.
    pub fn new(columns: &[Column<'_>], batch: usize, multiprocessors: u32) -> Result<Self, PlanError> {
        if columns.is_empty() || batch == 0 {
            return Err(PlanError::Empty {
                what: if batch == 0 { "the batch" } else { "the list of columns" },
            });
        }
        let places = PLACES * multiprocessors as usize;
        let mut fields = Vec::with_capacity(columns.len() * 64);
        let mut blocks = 0_u64;
        for column in columns {
            let field = column.kernel.field();
            let steps = column.kernel.steps();
            let rows_per_tile = tile(steps, batch, field.dim * field.to.size_bytes(), places);
            let tiles = u32_of("steps", steps)?.div_ceil(u32_of("steps", rows_per_tile)?);
            // mirrors Field in cuda/assemble.cu
            for word in
                [column.out.0, column.mask.unwrap_or_default().0, column.offsets.0, column.kernel.max_gap()]
            {
                fields.extend(word.to_le_bytes());
            }
            for word in [
                u32_of("steps", steps)?,
                u32_of("dim", field.dim)?,
                u32_of("steps", rows_per_tile)?,
                tiles,
                block_count(blocks)?,
                u32_of("element", field.from.size_bytes())?,
            ] {
                fields.extend(word.to_le_bytes());
            }
            let interp = match field.interp {
                Interp::Linear => 0,
                Interp::Nearest => 1,
                Interp::Previous => 2,
                Interp::Slerp => 3,
            };
            let by_rows = u8::from(matches!(field.offsets, Offsets::Rows(_)));
            fields.extend([field.from.code(), field.to.code(), interp, by_rows]);
            fields.extend(reciprocal(tiles).to_le_bytes());
            blocks = blocks.saturating_add(u64::from(tiles).saturating_mul(batch as u64));
        }
        let n_fields = u32_of("columns", columns.len())?;
        Ok(Self { fields, n_fields, batch: u32_of("batch", batch)?, blocks: block_count(blocks)? })
    }

    /// The `fields` argument: copy it to the GPU, aligned to 8 bytes.
    pub fn fields(&self) -> &[u8] {
        &self.fields
    }

    /// Columns of the plan.
    pub fn columns(&self) -> usize {
        self.n_fields as usize
    }

    /// Samples of the plan.
    pub fn batch(&self) -> usize {
        self.batch as usize
    }
}

/// Bytes of an encoded [`DeviceStream`].
pub const SOURCE_BYTES: usize = 48;
/// Bytes of an encoded [`Anchor`].
pub const ANCHOR_BYTES: usize = 16;

impl DeviceStream<'_> {
    /// Appends the source as `assemble` reads it: `sources` is `[columns][batch]` of these.
    pub fn encode(&self, to: &mut Vec<u8>) -> Result<(), PlanError> {
        let rows = u64::from(u32_of("rows", self.clock.rows())?);
        // mirrors Source in cuda/assemble.cu
        let (first_ns, num, den) = match self.clock {
            Clock::Uniform(clock) => (clock.first_ns(), clock.period_ns().0, clock.period_ns().1),
            Clock::Stamps(_) => (self.clock.first_ns(), 0, 0),
        };
        let stamps = match (self.clock, self.stamps) {
            (Clock::Uniform(_), _) => 0,
            (Clock::Stamps(_), Some(stamps)) if stamps.0 != 0 => stamps.0,
            (Clock::Stamps(_), _) => {
                return Err(PlanError::Empty { what: "the address of a clock's stamps" });
            }
        };
        let mut bytes = [0; SOURCE_BYTES];
        let words =
            [self.data.0, stamps, first_ns.cast_unsigned(), num.cast_unsigned(), den.cast_unsigned(), rows];
        for (bytes, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        to.extend_from_slice(&bytes);
        Ok(())
    }
}

impl Anchor {
    /// Appends the anchor as `assemble` reads it: `anchors` is `[batch]` of these.
    pub fn encode(&self, to: &mut Vec<u8>) {
        // mirrors Anchor in cuda/assemble.cu
        to.extend(self.t_ns.to_le_bytes());
        to.extend(self.row.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_fill_the_chip_before_they_fill_a_block() {
        // An H100's 132 multiprocessors, 6 places each.
        assert_eq!(
            tile(250, 32, 512, 792),
            11,
            "23 tiles of a sample, 736 in all, and not 25, which are 800"
        );
        assert_eq!(tile(512, 64, 1024, 792), 16, "four accesses for each thread where there is work enough");
        assert_eq!(tile(100, 8, 64, 792), 64, "at least an access for each thread");
        assert_eq!(tile(50, 4, 24, 792), 50, "never more than a sample's targets");
        assert_eq!(tile(1_000_000, 64, 4, 792), MAX_TILE);
        assert_eq!(tile(8, 8, 1 << 20, 792), 1);
        assert_eq!(tile(8, 1000, 512, 792), 8, "more samples than places");
    }
}
