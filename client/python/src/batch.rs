//! One leased batch, for `robocache/_batch.py`: its columns as DLPack tensors, its texts as lists.
//!
//! The lease lives in an `Arc` that every tensor clones, so the slot goes back with the last of them.

use std::sync::Arc;

use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};
use robocache::{ColumnError, ColumnRole};

use crate::dlpack::Tensor;

#[pyclass(frozen, module = "robocache._robocache")]
pub(crate) struct Batch {
    leased: Arc<robocache::Batch>,
    /// The names of the columns, the loader's own tuple.
    keys: Py<PyTuple>,
}

impl Batch {
    pub(crate) fn new(leased: robocache::Batch, keys: Py<PyTuple>) -> Self {
        Self { leased: Arc::new(leased), keys }
    }

    fn role(&self, key: &str) -> Option<ColumnRole> {
        self.leased.columns().iter().find(|column| column.name == key).map(|column| column.role)
    }
}

#[pymethods]
impl Batch {
    #[getter]
    fn rows(&self) -> usize {
        self.leased.rows()
    }

    #[getter]
    fn epoch(&self) -> u64 {
        self.leased.epoch()
    }

    #[getter]
    fn index(&self) -> u64 {
        self.leased.index()
    }

    /// Epoch and samples consumed of it, once this batch is done.
    #[getter]
    fn position(&self) -> (u64, u64) {
        let position = self.leased.position_after();
        (position.epoch, position.consumed)
    }

    fn keys(&self, py: Python<'_>) -> Py<PyTuple> {
        self.keys.clone_ref(py)
    }

    /// Dtype and shape of a column, for people.
    fn describe(&self, key: &str) -> PyResult<String> {
        if let Some(ColumnRole::Text { .. }) = self.role(key) {
            return Ok(format!("text{:?}", self.leased.raw(key).map_err(column_error)?.shape()));
        }
        let tensor = self.leased.tensor(key).map_err(column_error)?;
        Ok(format!("{}{:?}", tensor.dtype(), tensor.shape()))
    }

    /// The column as a tensor, or as a list of strings where it is text.
    fn column<'py>(&self, py: Python<'py>, key: &str) -> PyResult<Bound<'py, PyAny>> {
        if let Some(ColumnRole::Text { .. }) = self.role(key) {
            let texts = self.leased.text(key).map_err(column_error)?;
            let steps = texts.len() / self.leased.rows().max(1);
            if self.leased.raw(key).map_err(column_error)?.shape().len() == 1 {
                return Ok(PyList::new(py, texts)?.into_any());
            }
            // A window over a text stream: a list of its steps for each sample.
            return Ok(PyList::new(py, texts.chunks(steps.max(1)))?.into_any());
        }
        let tensor = self.leased.tensor(key).map_err(column_error)?;
        let shape: Result<Vec<i64>, _> = tensor.shape().into_iter().map(i64::try_from).collect();
        let shape = shape.map_err(|error| PyValueError::new_err(format!("column {key:?}: {error}")))?;
        let dtype = tensor.dtype();
        let tensor = Tensor::over(&self.leased, dtype, shape, |leased| Ok(leased.tensor(key)?.bytes()))
            .map_err(column_error)?;
        Ok(Bound::new(py, tensor)?.into_any())
    }

    /// The samples' ids as little-endian u64.
    fn ids<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let bytes: Vec<u8> = self.leased.ids().into_iter().flat_map(u64::to_le_bytes).collect();
        PyBytes::new(py, &bytes)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the shape map_err wants")]
fn column_error(error: ColumnError) -> PyErr {
    match error {
        ColumnError::Missing { .. } => PyKeyError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
}
