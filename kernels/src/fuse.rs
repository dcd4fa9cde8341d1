//! What `resample_*` on a GPU are told: streams, targets and tiles, in the one parameter that `cuda/resample.cu` declares.
//!
//! Owns its byte layout (`gpu_check` proves that the two agree) and the checks that make a launch's sizes possible.
//! Addresses are numbers here: nothing is read, `launch.rs` takes the risk.

use robocache_types::DType;

use crate::device::{DevicePtr, PlanError, THREADS, block_count, reciprocal, tile, u32_of};

/// One stream of a fusion: `src` `[B, rows, dim]` and `times` `[B, rows]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FuseStream {
    pub src: DevicePtr,
    pub times: DevicePtr,
    pub rows: usize,
    pub dim: usize,
}

/// What a fusion makes: `out` `[batch, steps, sum of dim]` of dtype `values`, at `targets` `[batch, steps]` of dtype
/// `times`. All streams have these dtypes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FuseTargets {
    pub out: DevicePtr,
    pub targets: DevicePtr,
    pub batch: usize,
    pub steps: usize,
    pub values: DType,
    pub times: DType,
}

/// `out[batch, steps, sum of dim]` from streams, at `targets[batch, steps]`: the parameter of `resample_*`.
#[derive(Debug, Clone)]
pub struct FusePlan {
    /// The parameter, in words of its alignment.
    pub(crate) words: Vec<u64>,
    pub(crate) blocks: u32,
    /// Where the kernel stands: by value dtype, time dtype, and few or many streams.
    pub(crate) kernel: [usize; 3],
}

/// Streams that one launch takes, by kernel: parameters of a launch end at 4 KiB.
pub const FUSE_STREAMS: [usize; 2] = [8, 80];
pub(crate) const VALUES: [(DType, &str); 4] =
    [(DType::Float16, "f16"), (DType::BFloat16, "bf16"), (DType::Float32, "f32"), (DType::Float64, "f64")];
pub(crate) const TIMES: [(DType, &str); 3] =
    [(DType::Float32, "f32"), (DType::Float64, "f64"), (DType::Int64, "i64")];

impl FusePlan {
    /// Cuts the work into blocks for a GPU of so many multiprocessors. One stream is `resample`.
    pub fn new(streams: &[FuseStream], onto: FuseTargets, multiprocessors: u32) -> Result<Self, PlanError> {
        let FuseTargets { out, targets, batch, steps, values, times } = onto;
        let value = VALUES.iter().position(|&(dtype, _)| dtype == values);
        let value = value.ok_or(PlanError::Values { found: values })?;
        let time = TIMES.iter().position(|&(dtype, _)| dtype == times);
        let time = time.ok_or(PlanError::Times { found: times })?;
        let many = FUSE_STREAMS.iter().position(|&most| streams.len() <= most);
        let many = many.ok_or(PlanError::TooManyStreams { found: streams.len(), most: FUSE_STREAMS[1] })?;
        for (what, found) in
            [("the list of streams", streams.len()), ("the batch", batch), ("targets", steps)]
        {
            if found == 0 {
                return Err(PlanError::Empty { what });
            }
        }
        let size = values.size_bytes();
        // Blocks that a multiprocessor holds at once: the launch bounds, and what 56 registers a thread leave.
        let places = if size == 2 { 6 } else { 4 } * multiprocessors as usize;
        let width: usize = streams.iter().map(|stream| stream.dim).sum();
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        // mirrors Plan and Stream in cuda/resample.cu
        let n_streams = u32_of("streams", streams.len())?;
        let mut words = vec![
            out.0,
            targets.0,
            pair(u32_of("targets", steps)?, u32_of("width", width)?),
            pair(n_streams, 0),
        ];
        let (mut blocks, mut column) = (0_u64, 0_usize);
        for stream in streams {
            if stream.rows == 0 || stream.dim == 0 {
                return Err(PlanError::Empty {
                    what: if stream.rows == 0 { "a stream" } else { "a stream's row" },
                });
            }
            let rows_per_tile = tile(steps, batch, stream.dim * size, places);
            let tiles = u32_of("targets", steps)?.div_ceil(u32_of("targets", rows_per_tile)?);
            let fits = |bytes: usize| {
                let all = [stream.dim * size, column * size, width * size].iter().all(|n| n % bytes == 0);
                all && bytes > size && (out.0 | stream.src.0).is_multiple_of(bytes as u64)
            };
            let pack = [16, 8].into_iter().find(|&bytes| fits(bytes)).map_or(1, |bytes| bytes / size);
            words.extend([
                stream.src.0,
                stream.times.0,
                pair(u32_of("rows", stream.rows)?, u32_of("dim", stream.dim)?),
                pair(u32_of("targets", rows_per_tile)?, tiles),
                pair(block_count(blocks)?, u32_of("width", column)?),
                // pack and rows_a_turn are halves of a word; both are at most THREADS.
                pair(
                    u32_of("pack", pack | (THREADS as usize / (stream.dim / pack)) << 16)?,
                    reciprocal(tiles),
                ),
            ]);
            column += stream.dim;
            blocks = blocks.saturating_add(u64::from(tiles).saturating_mul(batch as u64));
        }
        words.resize(4 + 6 * FUSE_STREAMS[many], 0);
        Ok(Self { words, blocks: block_count(blocks)?, kernel: [value, time, many] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_that_no_launch_could_hold_are_refused() {
        let stream = FuseStream { src: DevicePtr(16), times: DevicePtr(16), rows: 1, dim: 1 };
        let plan = |streams: &[FuseStream], batch, values, times| {
            let at = DevicePtr(16);
            FusePlan::new(streams, FuseTargets { out: at, targets: at, batch, steps: 5, values, times }, 132)
        };
        let (f32s, i64s) = (DType::Float32, DType::Int64);
        assert!(matches!(plan(&[], 1, f32s, i64s), Err(PlanError::Empty { .. })));
        assert!(matches!(plan(&[stream], 0, f32s, i64s), Err(PlanError::Empty { .. })));
        assert!(matches!(
            plan(&[stream; 81], 1, f32s, i64s),
            Err(PlanError::TooManyStreams { found: 81, most: 80 })
        ));
        assert!(matches!(plan(&[stream], 1, i64s, i64s), Err(PlanError::Values { .. })));
        assert!(matches!(plan(&[stream], 1, f32s, DType::Int32), Err(PlanError::Times { .. })));
        assert!(matches!(plan(&[stream], 1 << 31, f32s, i64s), Err(PlanError::TooManyBlocks { .. })));
        assert!(matches!(
            plan(&[FuseStream { rows: 1 << 32, ..stream }], 1, f32s, i64s),
            Err(PlanError::TooLarge { what: "rows", .. })
        ));
        assert_eq!(
            plan(&[stream; 9], 1, f32s, i64s).map(|plan| plan.words.len() * 8).ok(),
            Some(32 + 80 * 48)
        );
    }
}
