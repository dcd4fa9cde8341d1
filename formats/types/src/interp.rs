//! How a value between two rows is made.

use serde::{Deserialize, Serialize};

/// How a stream is read at a time that is none of its stamps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Interp {
    /// On the line between the rows before and after. Floating streams only, and their default.
    Linear,
    /// The row nearer in time; the earlier one of two equally near.
    Nearest,
    /// The last row at or before. The default of integer, boolean and text streams.
    Previous,
    /// On the great circle between two unit quaternions, the short way round. Four floating elements a row; the
    /// formula is the same for `xyzw` and `wxyz`.
    Slerp,
}
