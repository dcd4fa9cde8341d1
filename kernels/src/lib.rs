//! Resampling of multi-rate streams: one operation, its CPU twin (the definition of what is right), its kernel.

mod blend;
mod bracket;
mod field;
mod float;
mod simd;
mod tensors;

pub use field::{Anchor, Field, FieldError, FieldKernel, Offsets, StreamView};
pub use tensors::{Tensor, TensorError, Times, fuse, resample};
