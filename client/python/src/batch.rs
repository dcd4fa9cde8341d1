//! One leased batch, for `robocache/_batch.py`: its columns as DLPack tensors, its texts as lists.
//!
//! The lease lives in an `Arc` that every tensor clones, so the slot goes back with the last of them. Columns on a CUDA device
//! are exported where they lie; those on a simulated one are copied to the host.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};
use robocache::gpu::{GpuKind, Stream};
use robocache::{ColumnRole, Place};

use crate::dlpack::{self, Tensor};
use crate::errors::{self, of_column};

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

    /// What a column is and where it lies; a key that there is not is refused by whoever asks for its tensor.
    fn kind(&self, key: &str) -> Option<(ColumnRole, Place)> {
        let column = self.leased.columns().iter().find(|column| column.name == key)?;
        Some((column.role, column.place))
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
        if let Some((ColumnRole::Text { .. }, _)) = self.kind(key) {
            return Ok(format!("text{:?}", self.leased.raw(key).map_err(of_column)?.shape()));
        }
        if let Ok(tensor) = self.leased.device_tensor(key) {
            return Ok(format!("{}{:?}", tensor.dtype(), tensor.shape()));
        }
        let tensor = self.leased.tensor(key).map_err(of_column)?;
        Ok(format!("{}{:?}", tensor.dtype(), tensor.shape()))
    }

    /// The number of the CUDA device that the columns are on, in this process; None if they are in host memory.
    #[getter]
    fn cuda(&self) -> Option<u32> {
        self.leased.gpu().filter(|gpu| gpu.kind == GpuKind::Cuda).map(|gpu| gpu.ordinal)
    }

    /// Work that is put on the CUDA stream of this number from now on reads the batch.
    fn use_on(&self, stream: u64) -> PyResult<()> {
        dlpack::use_on(&self.leased, stream)
    }

    /// The column as a tensor, or as a list of strings where it is text.
    fn column<'py>(&self, py: Python<'py>, key: &str) -> PyResult<Bound<'py, PyAny>> {
        let kind = self.kind(key);
        if let Some((ColumnRole::Text { .. }, _)) = kind {
            let texts = self.leased.text(key).map_err(of_column)?;
            let steps = texts.len() / self.leased.rows().max(1);
            if self.leased.raw(key).map_err(of_column)?.shape().len() == 1 {
                return Ok(PyList::new(py, texts)?.into_any());
            }
            // A window over a text stream: a list of its steps for each sample.
            return Ok(PyList::new(py, texts.chunks(steps.max(1)))?.into_any());
        }
        let on_device = matches!(kind, Some((_, Place::Device)));
        let tensor = match self.leased.gpu().map(|gpu| gpu.kind) {
            Some(GpuKind::Cuda) if on_device => Tensor::on_device(&self.leased, key)?,
            Some(GpuKind::Sim) if on_device => {
                self.leased.use_on(Stream::LEGACY).map_err(|error| errors::of_gpu(&error))?;
                let tensor = self.leased.device_tensor(key).map_err(of_column)?;
                Tensor::copied(key, &tensor)?
            }
            _ => {
                let tensor = self.leased.tensor(key).map_err(of_column)?;
                let (dtype, shape) = (tensor.dtype(), dlpack::signed(key, tensor.shape())?);
                Tensor::over(&self.leased, dtype, shape, |leased| Ok(leased.tensor(key)?.bytes()))
                    .map_err(of_column)?
            }
        };
        Ok(Bound::new(py, tensor)?.into_any())
    }

    /// The samples' ids as little-endian u64.
    fn ids<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let bytes: Vec<u8> = self.leased.ids().into_iter().flat_map(u64::to_le_bytes).collect();
        PyBytes::new(py, &bytes)
    }
}
