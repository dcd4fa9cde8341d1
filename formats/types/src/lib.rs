//! What every RoboCache crate means by a dtype and by time.
//!
//! [`DType`] is the element type of a stored column, of a batch column and of a message about one; its code is
//! part of the wire contract. [`Clock`] says when each row of a stream was taken, in `i64` nanoseconds on the
//! episode's own time line. Neither knows of files, sockets or devices.

mod clock;
mod dtype;
mod interp;

pub use clock::{Clock, ClockError, UniformClock};
pub use dtype::{DType, UnknownDType};
pub use interp::Interp;
