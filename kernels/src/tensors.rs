//! Linear resampling of plain tensors, and fusing several onto one time axis: the twin of `cuda/resample.cu`.
//!
//! Owns the rule for tensors that a caller already has, which is not that of episodes: times have no unit and are
//! compared in their own type, nothing snaps, equal times take the later row, edges are held and nothing is
//! masked. A target that is a time is that row, bit for bit; a NaN target gives a NaN row. Values follow
//! `float.rs`, so that both operations have one formula.

use robocache_types::DType;

use crate::bracket::Pick;
use crate::simd::{self, Level, Ops};

/// Values, `[B, S, D]`, row-major and contiguous; little-endian, of any alignment. The dtype is floating.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    pub dtype: DType,
    pub shape: [usize; 3],
    pub data: &'a [u8],
}

/// Times, `[B, S]` or `[B, T]`, of dtype float32, float64 or int64, in any unit.
#[derive(Debug, Clone, Copy)]
pub struct Times<'a> {
    pub dtype: DType,
    pub shape: [usize; 2],
    pub data: &'a [u8],
}

/// What tensors cannot be resampled. `stream` counts the streams of a fusion.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    #[error("nothing to resample: no streams were given")]
    NoStreams,
    #[error("values must be float16, bfloat16, float32 or float64, stream {stream} has {found}")]
    Values { stream: usize, found: DType },
    #[error("times must be float32, float64 or int64, found {found}")]
    TimeDtype { found: DType },
    #[error("all streams must have the values' dtype of the first, {wanted}; stream {stream} has {found}")]
    MixedValues { stream: usize, wanted: DType, found: DType },
    #[error("times must have the dtype of the targets, {wanted}; those of stream {stream} have {found}")]
    MixedTimes { stream: usize, wanted: DType, found: DType },
    #[error(
        "shapes do not fit: src {src:?} [B, S, D] and times {times:?} [B, S] of stream {stream}, targets {targets:?} [B, T]"
    )]
    Shapes { stream: usize, src: [usize; 3], times: [usize; 2], targets: [usize; 2] },
    #[error(
        "every dimension must be at least 1, found src {src:?} [B, S, D] in stream {stream}, targets {targets:?} [B, T]"
    )]
    Empty { stream: usize, src: [usize; 3], targets: [usize; 2] },
    #[error("{what} must be {wanted} bytes for its shape, found {found}")]
    Length { what: &'static str, wanted: u128, found: usize },
    #[error(
        "times must ascend (equal ones may follow each other): stream {stream}, batch element {batch}, row {row} has \
         {before}, the next {after}"
    )]
    NotAscending { stream: usize, batch: usize, row: usize, before: String, after: String },
}

/// `src[B, S, D]` at `times[B, S]`, resampled to `targets[B, T]`: writes `out[B, T, D]`, of the dtype of `src`.
pub fn resample(
    src: Tensor<'_>,
    times: Times<'_>,
    targets: Times<'_>,
    out: &mut [u8],
) -> Result<(), TensorError> {
    fuse(&[(src, times)], targets, out)
}

/// Every stream resampled to `targets[B, T]`, side by side: writes `out[B, T, sum of D]`.
///
/// Nothing is written unless everything fits.
pub fn fuse(
    streams: &[(Tensor<'_>, Times<'_>)],
    targets: Times<'_>,
    out: &mut [u8],
) -> Result<(), TensorError> {
    check(streams, targets, out.len())?;
    match targets.dtype {
        DType::Float32 => fuse_by::<f32>(streams, targets, out),
        DType::Float64 => fuse_by::<f64>(streams, targets, out),
        DType::Int64 => fuse_by::<i64>(streams, targets, out),
        found => Err(TensorError::TimeDtype { found }),
    }
}

fn check(streams: &[(Tensor<'_>, Times<'_>)], targets: Times<'_>, out: usize) -> Result<(), TensorError> {
    let [batch, steps] = targets.shape;
    let wanted = streams.first().ok_or(TensorError::NoStreams)?.0.dtype;
    for (stream, (src, times)) in streams.iter().enumerate() {
        if !src.dtype.is_float() {
            return Err(TensorError::Values { stream, found: src.dtype });
        }
        if src.dtype != wanted {
            return Err(TensorError::MixedValues { stream, wanted, found: src.dtype });
        }
        if times.dtype != targets.dtype {
            return Err(TensorError::MixedTimes { stream, wanted: targets.dtype, found: times.dtype });
        }
        if src.shape[..2] != times.shape || src.shape[0] != batch {
            let (src, times, targets) = (src.shape, times.shape, targets.shape);
            return Err(TensorError::Shapes { stream, src, times, targets });
        }
        if src.shape.contains(&0) || steps == 0 {
            return Err(TensorError::Empty { stream, src: src.shape, targets: targets.shape });
        }
        length("src", &src.shape, src.dtype, src.data.len())?;
        length("times", &times.shape, times.dtype, times.data.len())?;
    }
    length("targets", &targets.shape, targets.dtype, targets.data.len())?;
    // A sum of lengths of slices that exist.
    let width = streams.iter().map(|(src, _)| src.shape[2]).sum();
    length("out", &[batch, steps, width], wanted, out)
}

fn length(what: &'static str, shape: &[usize], dtype: DType, found: usize) -> Result<(), TensorError> {
    // Saturated, it fits no slice.
    let wanted = shape.iter().fold(dtype.size_bytes() as u128, |n, &dim| n.saturating_mul(dim as u128));
    if wanted == found as u128 { Ok(()) } else { Err(TensorError::Length { what, wanted, found }) }
}

fn fuse_by<T: Time>(
    streams: &[(Tensor<'_>, Times<'_>)],
    targets: Times<'_>,
    out: &mut [u8],
) -> Result<(), TensorError> {
    let [batch, steps] = targets.shape;
    for (stream, (_, times)) in streams.iter().enumerate() {
        check_ascending::<T>(stream, *times)?;
    }
    let width: usize = streams.iter().map(|(src, _)| src.shape[2] * src.dtype.size_bytes()).sum();
    let mut column = 0;
    for (src, times) in streams {
        let [_, rows, dim] = src.shape;
        let row_bytes = dim * src.dtype.size_bytes();
        let Some(ops) = simd::ops(src.dtype, src.dtype, Level::best()) else {
            return Err(TensorError::Values { stream: 0, found: src.dtype });
        };
        for element in 0..batch {
            let data = &src.data[element * rows * row_bytes..][..rows * row_bytes];
            let times = &T::split(times.data)[element * rows..][..rows];
            let targets = &T::split(targets.data)[element * steps..][..steps];
            let out = &mut out[element * steps * width..][..steps * width];
            let mut at = 0;
            for (out, &target) in out.chunks_exact_mut(width).zip(targets) {
                let pick = find(times, T::load(target), &mut at);
                write_row(src.dtype, dim, &ops, data, pick, &mut out[column..column + row_bytes]);
            }
        }
        column += row_bytes;
    }
    Ok(())
}

fn write_row(dtype: DType, dim: usize, ops: &Ops, data: &[u8], pick: Pick, out: &mut [u8]) {
    if pick.weight == 0.0 {
        out.copy_from_slice(&data[pick.row * out.len()..][..out.len()]);
    } else if pick.weight.is_nan() {
        let nan = match dtype {
            DType::Float16 => &[0x00, 0x7e][..],
            DType::BFloat16 => &[0xc0, 0x7f],
            DType::Float32 => &[0, 0, 0xc0, 0x7f],
            _ => &[0, 0, 0, 0, 0, 0, 0xf8, 0x7f],
        };
        out.chunks_exact_mut(nan.len()).for_each(|out| out.copy_from_slice(nan));
    } else {
        (ops.linear)(data, dim, &[pick], out);
    }
}

/// What `target` is made of. `at` is where the last target was found; targets that ascend walk on from there.
fn find<T: Time>(times: &[T::Raw], target: T, at: &mut usize) -> Pick {
    if target.is_nan() {
        return Pick { row: 0, weight: f64::NAN };
    }
    // `low` times are at or before the target, for certain; then gallop, then halve.
    let before = |row: usize| T::load(times[row]) <= target;
    let (mut low, mut step) = (if before(*at) { *at } else { 0 }, 1);
    let mut high = low;
    while high < times.len() && before(high) {
        low = high + 1;
        high = low + step;
        step *= 2;
    }
    high = high.min(times.len());
    let after = low + times[low..high].partition_point(|&time| T::load(time) <= target);
    *at = after.saturating_sub(1);
    if after == 0 {
        Pick::exactly(0)
    } else if after == times.len() {
        Pick::exactly(after - 1)
    } else {
        Pick { row: after - 1, weight: target.weight(T::load(times[after - 1]), T::load(times[after])) }
    }
}

fn check_ascending<T: Time>(stream: usize, times: Times<'_>) -> Result<(), TensorError> {
    let rows = times.shape[1];
    for (batch, times) in T::split(times.data).chunks_exact(rows).enumerate() {
        for (row, two) in times.windows(2).enumerate() {
            let (before, after) = (T::load(two[0]), T::load(two[1]));
            // NaN is not at or before anything.
            if before.partial_cmp(&after).is_none_or(std::cmp::Ordering::is_gt) {
                let (before, after) = (before.to_string(), after.to_string());
                return Err(TensorError::NotAscending { stream, batch, row, before, after });
            }
        }
    }
    Ok(())
}

/// A type of times.
trait Time: Copy + PartialOrd + std::fmt::Display {
    type Raw: Copy;
    fn split(bytes: &[u8]) -> &[Self::Raw];
    fn load(raw: Self::Raw) -> Self;
    fn is_nan(self) -> bool;
    /// Where `self` is between `before` and `after`, in `[0, 1)`: an `f64` quotient of differences.
    fn weight(self, before: Self, after: Self) -> f64;
}

macro_rules! time {
    ($time:ty, |$t:ident| $nan:expr, |$self:ident, $before:ident, $after:ident| $weight:expr) => {
        impl Time for $time {
            type Raw = [u8; size_of::<$time>()];

            fn split(bytes: &[u8]) -> &[Self::Raw] {
                bytes.as_chunks().0
            }

            fn load(raw: Self::Raw) -> Self {
                Self::from_le_bytes(raw)
            }

            fn is_nan(self) -> bool {
                let $t = self;
                $nan
            }

            fn weight(self, $before: Self, $after: Self) -> f64 {
                let $self = self;
                $weight
            }
        }
    };
}

time!(f32, |t| t.is_nan(), |t, before, after| {
    (f64::from(t) - f64::from(before)) / (f64::from(after) - f64::from(before))
});
time!(f64, |t| t.is_nan(), |t, before, after| (t - before) / (after - before));
#[expect(clippy::cast_precision_loss, reason = "the weight is defined as a quotient of f64")]
const _: () = {
    time!(i64, |_t| false, |t, before, after| t.abs_diff(before) as f64 / after.abs_diff(before) as f64);
};
