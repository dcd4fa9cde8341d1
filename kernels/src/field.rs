//! One column of a batch: which offsets of which stream it holds, and how they are made.
//!
//! [`FieldKernel::new`] refuses what makes no sense and chooses the code once; [`FieldKernel::assemble`] runs for
//! every sample and neither allocates, fails nor logs. The rule for one target is in `bracket.rs`, the values'
//! formulas in `float.rs` and `blend.rs`; docs/resampling.md states both for readers who want no code.

use std::ops::Range;

use robocache_types::{Clock, DType, Interp};

use crate::bracket::{Axis, Finder, Pick, StampAxis, UniformAxis};
use crate::simd::{self, Level, Ops};

/// Where a column looks, from its anchor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Offsets {
    /// Rows of the stream, from the anchor's row. Clamped to the episode; outside it the mask is set.
    Rows(Box<[i64]>),
    /// Nanoseconds from the anchor's time.
    Times(Box<[i64]>),
}

/// What a column is made of. Dtypes are equal unless both are floating.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    pub offsets: Offsets,
    pub interp: Interp,
    /// A target strictly between two stamps further apart than this is padded.
    pub max_gap_ns: Option<i64>,
    /// Elements of a row.
    pub dim: usize,
    pub from: DType,
    pub to: DType,
}

/// A stream of one episode. `data` is `[clock.rows(), dim]`, contiguous.
#[derive(Debug, Clone, Copy)]
pub struct StreamView<'a> {
    pub clock: &'a Clock,
    pub data: &'a [u8],
}

/// What a sample is built around: a time, and the row of the anchor clock it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Anchor {
    pub t_ns: i64,
    pub row: i64,
}

/// A [`Field`] found possible.
#[derive(Debug, Clone)]
pub struct FieldKernel {
    field: Field,
    steps: usize,
    max_gap_ns: Option<u64>,
    /// The least offset and the greatest.
    ends: [i64; 2],
    /// Offsets are rows, each one more than the one before: the first of them.
    run_from: Option<i64>,
    values: Values,
}

/// How values get from a stream to a batch.
#[derive(Debug, Clone, Copy)]
enum Values {
    /// Bytes as they are: every pick is a row, and the dtypes are equal.
    Copied { row_bytes: usize },
    /// Picks may lie between rows, or the dtype changes.
    Made { ops: Ops, from_row_bytes: usize, same_dtype: bool },
}

/// Why a field is not possible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FieldError {
    #[error("{interp:?} needs floating elements, found {from}; use Nearest or Previous")]
    NotFloating { interp: Interp, from: DType },
    #[error("elements are cast between floating dtypes only, asked for {from} to {to}")]
    Cast { from: DType, to: DType },
    #[error("a row needs at least one element, found dim 0")]
    NoElements,
    #[error("a field needs at least one offset, found none")]
    NoOffsets,
    #[error("Slerp needs rows of 4 elements (a unit quaternion), found dim {dim}")]
    NotAQuaternion { dim: usize },
    #[error("max_gap_ns must not be negative, found {max_gap_ns} ns")]
    NegativeGap { max_gap_ns: i64 },
    #[error("{steps} offsets of {dim} elements do not fit the address space")]
    TooLarge { steps: usize, dim: usize },
}

impl FieldKernel {
    /// Checks a field and chooses its code.
    pub fn new(field: Field) -> Result<Self, FieldError> {
        Self::with_level(field, Level::best())
    }

    fn with_level(field: Field, level: Level) -> Result<Self, FieldError> {
        let Field { interp, dim, from, to, .. } = field;
        let (Offsets::Rows(offsets) | Offsets::Times(offsets)) = &field.offsets;
        let steps = offsets.len();
        if dim == 0 {
            return Err(FieldError::NoElements);
        }
        if steps == 0 {
            return Err(FieldError::NoOffsets);
        }
        let widest = from.size_bytes().max(to.size_bytes());
        if steps
            .checked_mul(dim)
            .and_then(|n| n.checked_mul(widest))
            .is_none_or(|n| isize::try_from(n).is_err())
        {
            return Err(FieldError::TooLarge { steps, dim });
        }
        if from != to && !(from.is_float() && to.is_float()) {
            return Err(FieldError::Cast { from, to });
        }
        let between = match interp {
            Interp::Linear | Interp::Slerp if !from.is_float() => {
                return Err(FieldError::NotFloating { interp, from });
            }
            Interp::Slerp if dim != 4 => return Err(FieldError::NotAQuaternion { dim }),
            Interp::Linear | Interp::Slerp => matches!(field.offsets, Offsets::Times(_)),
            Interp::Nearest | Interp::Previous => false,
        };
        let max_gap_ns = field
            .max_gap_ns
            .map(|max_gap_ns| {
                u64::try_from(max_gap_ns).map_err(|_negative| FieldError::NegativeGap { max_gap_ns })
            })
            .transpose()?;
        let ends = offsets.iter().fold([i64::MAX, i64::MIN], |[least, greatest], &offset| {
            [least.min(offset), greatest.max(offset)]
        });
        let run_from = match &field.offsets {
            Offsets::Rows(rows) if rows.windows(2).all(|two| two[0].checked_add(1) == Some(two[1])) => {
                Some(rows[0])
            }
            _ => None,
        };
        let values = match simd::ops(from, to, level) {
            Some(ops) if between || from != to => {
                Values::Made { ops, from_row_bytes: dim * from.size_bytes(), same_dtype: from == to }
            }
            _ => Values::Copied { row_bytes: dim * from.size_bytes() },
        };
        Ok(Self { field, steps, max_gap_ns, ends, run_from, values })
    }

    /// The field as it was asked for.
    pub fn field(&self) -> &Field {
        &self.field
    }

    /// The gap above which a target is padded, as the GPU is told it.
    pub(crate) fn max_gap(&self) -> u64 {
        self.max_gap_ns.unwrap_or(u64::MAX)
    }

    /// Targets of one sample.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Bytes of one sample: `steps * dim` elements of the target dtype.
    pub fn out_bytes(&self) -> usize {
        self.steps * self.field.dim * self.field.to.size_bytes()
    }

    /// The rows of a stream that one sample is made of, and perhaps one more: no other row is read.
    pub fn rows(&self, clock: &Clock, anchor: Anchor) -> Range<usize> {
        let count = clock.rows();
        let pick = |offset: i64| match (&self.field.offsets, clock) {
            (Offsets::Rows(_), _) => {
                let row = usize::try_from(anchor.row.saturating_add(offset)).unwrap_or(0);
                Pick::exactly(row.min(count - 1))
            }
            (Offsets::Times(_), Clock::Uniform(clock)) => {
                self.finder(UniformAxis::new(*clock)).find(anchor.t_ns.saturating_add(offset)).0
            }
            (Offsets::Times(_), Clock::Stamps(stamps)) => {
                self.finder(StampAxis::new(stamps)).find(anchor.t_ns.saturating_add(offset)).0
            }
        };
        // Picks ascend with the targets.
        let [first, last] = self.ends.map(pick);
        first.row..(last.row + 2).min(count)
    }

    /// Writes one sample: `out` is `[steps, dim]` of the target dtype, `mask` is `[steps]` of 0 or 1 (padding).
    /// Both are written whole. Values are little-endian; no buffer needs to be aligned.
    ///
    /// # Panics
    ///
    /// If a buffer has not the size said here, or `stream.data` not that of its clock: a bug of the caller's.
    pub fn assemble(&self, stream: StreamView<'_>, anchor: Anchor, out: &mut [u8], mask: Option<&mut [u8]>) {
        let rows = stream.clock.rows();
        assert_eq!(out.len(), self.out_bytes(), "out holds the field's steps");
        let row_bytes = self.field.dim * self.field.from.size_bytes();
        assert_eq!(rows.checked_mul(row_bytes), Some(stream.data.len()), "a row of data for every stamp");
        assert!(mask.as_ref().is_none_or(|mask| mask.len() == self.steps), "a mask byte for every step");
        match (&self.field.offsets, stream.clock) {
            (Offsets::Rows(offsets), _) => self.take_rows(rows, stream.data, offsets, anchor.row, out, mask),
            (Offsets::Times(offsets), Clock::Uniform(clock)) => {
                self.take_times(UniformAxis::new(*clock), stream.data, offsets, anchor.t_ns, out, mask);
            }
            (Offsets::Times(offsets), Clock::Stamps(stamps)) => {
                self.take_times(StampAxis::new(stamps), stream.data, offsets, anchor.t_ns, out, mask);
            }
        }
    }

    fn take_rows(
        &self,
        rows: usize,
        data: &[u8],
        offsets: &[i64],
        anchor: i64,
        out: &mut [u8],
        mask: Option<&mut [u8]>,
    ) {
        if let Some(first) = self.run_from
            && let Some(first) = anchor.checked_add(first).and_then(|first| usize::try_from(first).ok())
            && first.checked_add(self.steps).is_some_and(|end| end <= rows)
        {
            self.copy_run(data, first, self.steps, out);
            if let Some(mask) = mask {
                mask.fill(0);
            }
            return;
        }
        let last = i64::try_from(rows - 1).unwrap_or(i64::MAX);
        self.fill(data, offsets, out, mask, |offset| {
            let wanted = anchor.saturating_add(offset);
            let row = wanted.clamp(0, last);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "0 <= row < rows: usize"
            )]
            let pick = Pick::exactly(row as usize);
            (pick, row != wanted)
        });
    }

    fn finder<A: Axis>(&self, axis: A) -> Finder<A> {
        Finder::new(axis, self.field.interp, self.max_gap_ns)
    }

    fn take_times(
        &self,
        axis: impl Axis,
        data: &[u8],
        offsets: &[i64],
        anchor_ns: i64,
        out: &mut [u8],
        mask: Option<&mut [u8]>,
    ) {
        let mut finder = self.finder(axis);
        self.fill(data, offsets, out, mask, |offset| finder.find(anchor_ns.saturating_add(offset)));
    }

    /// Finds what each target is made of, some at a time, and makes it.
    #[inline(always)]
    fn fill(
        &self,
        data: &[u8],
        offsets: &[i64],
        out: &mut [u8],
        mut mask: Option<&mut [u8]>,
        mut find: impl FnMut(i64) -> (Pick, bool),
    ) {
        let mut picks = [Pick::exactly(0); PICKS];
        let step_bytes = self.out_bytes() / self.steps;
        let outs = out.chunks_mut(PICKS * step_bytes);
        for (chunk, (offsets, out)) in offsets.chunks(PICKS).zip(outs).enumerate() {
            let picks = &mut picks[..offsets.len()];
            let mut pads = [0; PICKS];
            for ((pick, pad), &offset) in picks.iter_mut().zip(&mut pads).zip(offsets) {
                let (found, padded) = find(offset);
                (*pick, *pad) = (found, u8::from(padded));
            }
            if let Some(mask) = &mut mask {
                mask[chunk * PICKS..][..offsets.len()].copy_from_slice(&pads[..offsets.len()]);
            }
            self.make(data, picks, out);
        }
    }

    fn make(&self, data: &[u8], picks: &[Pick], out: &mut [u8]) {
        match self.values {
            Values::Made { ops, same_dtype: false, .. } if self.field.interp == Interp::Slerp => {
                (ops.slerp)(data, self.field.dim, picks, out);
            }
            Values::Made { ops, same_dtype: false, .. } => (ops.linear)(data, self.field.dim, picks, out),
            Values::Made { .. } | Values::Copied { .. } => self.make_runs(data, picks, out),
        }
    }

    /// Groups picks: rows that follow one another are copied at once, as bytes; what lies between rows is blended.
    fn make_runs(&self, data: &[u8], picks: &[Pick], mut out: &mut [u8]) {
        let row_bytes = self.field.dim * self.field.to.size_bytes();
        let mut rest = picks;
        while let Some(first) = rest.first() {
            let exact = first.weight == 0.0;
            let len = 1 + rest
                .windows(2)
                .take_while(|two| {
                    if exact {
                        two[1].weight == 0.0 && two[1].row == two[0].row + 1
                    } else {
                        two[1].weight != 0.0
                    }
                })
                .count();
            let (run, others) = rest.split_at(len);
            let (made, unmade) = out.split_at_mut(len * row_bytes);
            match self.values {
                Values::Made { ops, .. } if !exact => {
                    let blend = if self.field.interp == Interp::Slerp { ops.slerp } else { ops.linear };
                    blend(data, self.field.dim, run, made);
                }
                _ => made.copy_from_slice(&data[first.row * row_bytes..][..len * row_bytes]),
            }
            (rest, out) = (others, unmade);
        }
    }

    /// Rows `first..first + len`, as they are or cast.
    fn copy_run(&self, data: &[u8], first: usize, len: usize, out: &mut [u8]) {
        match self.values {
            Values::Copied { row_bytes } => {
                out.copy_from_slice(&data[first * row_bytes..][..len * row_bytes])
            }
            Values::Made { ops, from_row_bytes, .. } => {
                (ops.cast)(&data[first * from_row_bytes..][..len * from_row_bytes], out);
            }
        }
    }
}

/// Targets found before their values are made: few enough for the stack, enough to spread a call's cost.
const PICKS: usize = 32;
