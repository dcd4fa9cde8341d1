//! Resampling of multi-rate streams: one operation, its CPU twin (the definition of what is right), its kernel.

mod field;

pub use field::{Anchor, Field, FieldError, FieldKernel, Offsets, StreamView};
