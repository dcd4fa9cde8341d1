//! Resampling of multi-rate streams: one operation, its CPU twin (the definition of what is right), its kernel.

mod blend;
mod bracket;
mod device;
mod field;
mod float;
mod fuse;
mod images;
mod launch;
mod simd;
mod tensors;

pub use device::{ANCHOR_BYTES, AssemblePlan, Column, DevicePtr, DeviceStream, PlanError, SOURCE_BYTES};
pub use field::{Anchor, Field, FieldError, FieldKernel, Offsets, StreamView};
pub use fuse::{FUSE_STREAMS, FusePlan, FuseStream, FuseTargets};
pub use launch::{Kernels, LaunchError};
pub use tensors::{Tensor, TensorError, Times, fuse, resample};
