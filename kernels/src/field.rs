//! One column of a batch: which offsets of which stream it holds, and how they are made.

use robocache_types::{Clock, DType, Interp};

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
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FieldError {
    #[error("{interp:?} needs floating elements, found {from}")]
    NotFloating { interp: Interp, from: DType },
}

impl FieldKernel {
    pub fn new(field: Field) -> Result<Self, FieldError> {
        Ok(Self { field })
    }

    pub fn field(&self) -> &Field {
        &self.field
    }

    /// Targets of one sample.
    pub fn steps(&self) -> usize {
        match &self.field.offsets {
            Offsets::Rows(offsets) | Offsets::Times(offsets) => offsets.len(),
        }
    }

    /// Bytes of one sample: `steps * dim` elements of the target dtype.
    pub fn out_bytes(&self) -> usize {
        self.steps() * self.field.dim * self.field.to.size_bytes()
    }

    /// Writes one sample: `out` is `[steps, dim]` of the target dtype, `mask` is `[steps]` of 0 or 1.
    pub fn assemble(
        &self,
        _stream: StreamView<'_>,
        _anchor: Anchor,
        _out: &mut [u8],
        _mask: Option<&mut [u8]>,
    ) {
        unimplemented!()
    }
}
