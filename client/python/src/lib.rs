//! The Python module `robocache._robocache`: what the package `robocache` needs of the Rust client, and no more.
//!
//! Arguments arrive checked and as the wire's own JSON (`robocache/_spec.py`); errors leave as the exceptions of
//! `robocache/_errors.py`; tensors leave through DLPack (`dlpack.rs`), and arrays of
//! other libraries come in through it (`given.rs`).

mod batch;
mod cuda;
mod dlpack;
mod errors;
mod given;
mod loader;
mod resample;

use pyo3::prelude::*;

#[pymodule]
mod _robocache {
    #[pymodule_export]
    use crate::batch::Batch;
    #[pymodule_export]
    use crate::dlpack::Tensor;
    #[pymodule_export]
    use crate::loader::Loader;
    #[pymodule_export]
    use crate::resample::fuse;
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
