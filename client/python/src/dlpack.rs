//! A column of a batch as a DLPack capsule, which is how numpy, torch, JAX and CuPy read it in place.
//!
//! Owns the two managed-tensor structs of DLPack (dmlc/dlpack `include/dlpack/dlpack.h`, 1.0 and before it) and their
//! deleters. What must stay true: a capsule keeps its batch, hence the lease on the slot, until the consumer calls
//! the deleter, exactly once, from any thread, with or without Python's lock; the memory is never written by us
//! while a capsule is out (the ring sees to it) and is mapped read-only, which a versioned capsule says. Of a column on
//! a CUDA device the stream that the consumer names is made to wait, and noted, before it gets the capsule.
#![expect(unsafe_code, reason = "DLPack is a C structure passed through PyCapsule, streams are numbers")]

use std::ffi::{CStr, c_void};
use std::sync::Arc;

use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use robocache::DeviceTensor;
use robocache::gpu::Stream;
use robocache_types::DType;

use crate::errors;

/// `kDLCPU`, device 0.
const CPU: (i32, i32) = (1, 0);
/// `kDLCUDA`.
const CUDA: i32 = 2;
/// `DLPACK_FLAG_BITMASK_READ_ONLY`.
pub(crate) const READ_ONLY: u64 = 1;
/// `DLPACK_FLAG_BITMASK_IS_COPIED`.
const IS_COPIED: u64 = 1 << 1;
/// A consumer of a versioned capsule looks at `version.major` before anything else.
pub(crate) const VERSION: Version = Version { major: 1, minor: 0 };

/// What keeps the bytes alive: a batch with its lease, or a copy of our own.
type Keeper = Arc<dyn Send + Sync>;

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Version {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

#[repr(C)]
pub(crate) struct DlTensor {
    pub(crate) data: *mut c_void,
    pub(crate) device_type: i32,
    pub(crate) device_id: i32,
    pub(crate) ndim: i32,
    pub(crate) code: u8,
    pub(crate) bits: u8,
    pub(crate) lanes: u16,
    pub(crate) shape: *mut i64,
    pub(crate) strides: *mut i64,
    pub(crate) byte_offset: u64,
}

#[repr(C)]
pub(crate) struct Managed {
    pub(crate) tensor: DlTensor,
    pub(crate) context: *mut c_void,
    pub(crate) deleter: Option<unsafe extern "C" fn(*mut Self)>,
}

#[repr(C)]
pub(crate) struct ManagedVersioned {
    pub(crate) version: Version,
    pub(crate) context: *mut c_void,
    pub(crate) deleter: Option<unsafe extern "C" fn(*mut Self)>,
    pub(crate) flags: u64,
    pub(crate) tensor: DlTensor,
}

/// A managed tensor and all that it points to, in one allocation. `managed` comes first, so that the consumer's
/// pointer to it is the pointer to the whole.
#[repr(C)]
struct Exported<M> {
    managed: M,
    shape: Vec<i64>,
    strides: Vec<i64>,
    _keeper: Keeper,
}

/// What the two forms of a managed tensor differ in.
trait Form: Sized {
    const NAME: &'static CStr;
    fn new(tensor: DlTensor, flags: u64) -> Self;
    fn tensor_mut(&mut self) -> &mut DlTensor;
    fn deleter(&self) -> Option<unsafe extern "C" fn(*mut Self)>;
}

impl Form for Managed {
    const NAME: &'static CStr = c"dltensor";

    fn new(tensor: DlTensor, _flags: u64) -> Self {
        Self { tensor, context: std::ptr::null_mut(), deleter: Some(delete::<Self>) }
    }

    fn tensor_mut(&mut self) -> &mut DlTensor {
        &mut self.tensor
    }

    fn deleter(&self) -> Option<unsafe extern "C" fn(*mut Self)> {
        self.deleter
    }
}

impl Form for ManagedVersioned {
    const NAME: &'static CStr = c"dltensor_versioned";

    fn new(tensor: DlTensor, flags: u64) -> Self {
        let deleter: Option<unsafe extern "C" fn(*mut Self)> = Some(delete::<Self>);
        Self { version: VERSION, context: std::ptr::null_mut(), deleter, flags, tensor }
    }

    fn tensor_mut(&mut self) -> &mut DlTensor {
        &mut self.tensor
    }

    fn deleter(&self) -> Option<unsafe extern "C" fn(*mut Self)> {
        self.deleter
    }
}

/// Some bytes as a tensor: contiguous, row-major.
///
/// Made only by [`Tensor::over`] and [`Tensor::on_device`], from what the keeper has, so `data` is good for as long as
/// `keeper` lives.
#[pyclass(frozen, module = "robocache._robocache")]
pub(crate) struct Tensor {
    keeper: Keeper,
    /// In host memory, or an address of the device's.
    data: *const u8,
    len_bytes: usize,
    dtype: DType,
    shape: Vec<i64>,
    cuda: Option<Cuda>,
}

/// Where a tensor on a CUDA device is from.
#[derive(Clone)]
struct Cuda {
    /// As this process counts.
    ordinal: i32,
    batch: Arc<robocache::Batch>,
    key: String,
}

// SAFETY: `data` points into memory that `keeper`, itself Send + Sync, keeps mapped, and nobody here writes it.
unsafe impl Send for Tensor {}
// SAFETY: as above; all methods only read.
unsafe impl Sync for Tensor {}

/// Says that work on the stream of this number reads `batch` from now on: what `__dlpack__(stream=)` and the current stream
/// of torch mean. 0 is the legacy default stream, as in the runtime.
pub(crate) fn use_on(batch: &robocache::Batch, stream: u64) -> PyResult<()> {
    // SAFETY: the number of a stream, by the word of the library that has it: Python cannot prove more, and the package
    // says so where a user names one (`Batch.record_stream`). Libraries' own streams are pooled and live on.
    let stream = unsafe { Stream::from_raw(stream) };
    batch.use_on(stream).map_err(|error| errors::of_gpu(&error))
}

impl Tensor {
    /// The tensor of `shape` (rows first) over the bytes that `bytes_of` finds in `keeper`.
    ///
    /// The bytes must not move or change while `keeper` lives: those of a lease or of a [`Lines`] do not.
    pub(crate) fn over<K: Send + Sync + 'static, E>(
        keeper: &Arc<K>,
        dtype: DType,
        shape: Vec<i64>,
        bytes_of: impl FnOnce(&K) -> Result<&[u8], E>,
    ) -> Result<Self, E> {
        let bytes = bytes_of(keeper)?;
        let (data, len_bytes) = (bytes.as_ptr(), bytes.len());
        Ok(Self { keeper: Arc::<K>::clone(keeper), data, len_bytes, dtype, shape, cuda: None })
    }

    /// The column `key` of a batch on a CUDA device, where it lies.
    pub(crate) fn on_device(batch: &Arc<robocache::Batch>, key: &str) -> PyResult<Self> {
        let tensor = batch.device_tensor(key).map_err(errors::of_column)?;
        let number = |error| PyBufferError::new_err(format!("column {key:?}: {error}"));
        let address = usize::try_from(tensor.address()).map_err(number)?;
        let ordinal = i32::try_from(tensor.gpu().ordinal).map_err(number)?;
        Ok(Self {
            keeper: Arc::<robocache::Batch>::clone(batch),
            data: std::ptr::without_provenance(address),
            len_bytes: tensor.len_bytes(),
            dtype: tensor.dtype(),
            shape: signed(key, tensor.shape())?,
            cuda: Some(Cuda { ordinal, batch: Arc::clone(batch), key: key.to_owned() }),
        })
    }

    /// A copy, in host memory, of a column on a device.
    pub(crate) fn copied(key: &str, tensor: &DeviceTensor<'_>) -> PyResult<Self> {
        let bytes = tensor.to_host().map_err(|error| errors::of_gpu(&error))?;
        let lines = Arc::new(Lines::copy_of(&bytes));
        Self::over(&lines, tensor.dtype(), signed(key, tensor.shape())?, |lines| Ok(lines.bytes()))
    }

    /// The bytes of a tensor in host memory.
    fn bytes(&self) -> &[u8] {
        assert!(self.cuda.is_none(), "device memory has no bytes here");
        // SAFETY: `data` and `len_bytes` are those of a slice of `keeper`'s, which `self` keeps alive.
        unsafe { std::slice::from_raw_parts(self.data, self.len_bytes) }
    }

    const fn device(&self) -> (i32, i32) {
        match &self.cuda {
            None => CPU,
            Some(cuda) => (CUDA, cuda.ordinal),
        }
    }

    fn capsule<M: Form>(&self, py: Python<'_>, copy: bool) -> PyResult<Py<PyAny>> {
        let (keeper, data, flags): (Keeper, _, _) = if copy {
            let lines = Lines::copy_of(self.bytes());
            let data = lines.bytes().as_ptr();
            (Arc::new(lines), data, IS_COPIED)
        } else {
            (Arc::clone(&self.keeper), self.data, READ_ONLY)
        };
        let (code, bits) = type_code(self.dtype);
        let ndim = i32::try_from(self.shape.len())
            .map_err(|error| PyBufferError::new_err(format!("dimensions: {error}")))?;
        let tensor = DlTensor {
            data: data.cast_mut().cast(),
            device_type: self.device().0,
            device_id: self.device().1,
            ndim,
            code,
            bits,
            lanes: 1,
            shape: std::ptr::null_mut(),
            strides: std::ptr::null_mut(),
            byte_offset: 0,
        };
        let shape = self.shape.clone();
        let strides = contiguous(&shape);
        let mut exported =
            Box::new(Exported { managed: M::new(tensor, flags), shape, strides, _keeper: keeper });
        let exported_shape = exported.shape.as_mut_ptr();
        let exported_strides = exported.strides.as_mut_ptr();
        let tensor = exported.managed.tensor_mut();
        tensor.shape = exported_shape;
        tensor.strides = exported_strides;
        let raw = Box::into_raw(exported);
        // SAFETY: the pointer is not null, the name is a static C string that outlives the capsule, and
        // `drop_capsule::<M>` is the destructor for capsules of this name and content.
        let capsule = unsafe { ffi::PyCapsule_New(raw.cast(), M::NAME.as_ptr(), Some(drop_capsule::<M>)) };
        if capsule.is_null() {
            // SAFETY: no capsule took the allocation, which came from Box::into_raw above.
            drop(unsafe { Box::from_raw(raw) });
            return Err(PyErr::fetch(py));
        }
        // SAFETY: a new reference, not null, of which nobody else disposes.
        Ok(unsafe { Bound::from_owned_ptr(py, capsule) }.unbind())
    }
}

#[pymethods]
impl Tensor {
    /// A tensor of its own copy of `data`: what a test, or a loader of another making, exports through.
    #[staticmethod]
    fn from_bytes(data: &[u8], dtype: &str, shape: Vec<i64>) -> PyResult<Self> {
        let dtype: DType = dtype.parse().map_err(|error| PyValueError::new_err(format!("{error}")))?;
        let elements =
            shape.iter().try_fold(1_usize, |product, &dim| product.checked_mul(usize::try_from(dim).ok()?));
        let wanted = elements.and_then(|elements| elements.checked_mul(dtype.size_bytes()));
        if wanted != Some(data.len()) {
            return Err(PyValueError::new_err(match wanted {
                Some(wanted) => format!("wanted {wanted} bytes for {dtype}{shape:?}, found {}", data.len()),
                None => format!("no tensor has the shape {shape:?}"),
            }));
        }
        Self::over(&Arc::new(Lines::copy_of(data)), dtype, shape, |lines| Ok(lines.bytes()))
    }

    /// numpy's name of the element type.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype.name()
    }

    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.len_bytes
    }

    /// The same memory as unsigned integers of the same width, for a reader that does not know the dtype.
    fn bits(&self) -> Self {
        let dtype = match self.dtype.size_bytes() {
            1 => DType::UInt8,
            2 => DType::UInt16,
            4 => DType::UInt32,
            _ => DType::UInt64,
        };
        Self {
            keeper: Arc::clone(&self.keeper),
            data: self.data,
            len_bytes: self.len_bytes,
            dtype,
            shape: self.shape.clone(),
            cuda: self.cuda.clone(),
        }
    }

    /// The same values in host memory: itself, or a copy made now.
    fn to_host(slf: &Bound<'_, Self>) -> PyResult<Py<Self>> {
        let Some(Cuda { batch, key, .. }) = &slf.get().cuda else { return Ok(slf.clone().unbind()) };
        let copied = slf.py().detach(|| {
            let tensor = batch.device_tensor(key).map_err(errors::of_column)?;
            Self::copied(key, &tensor)
        })?;
        Py::new(slf.py(), copied)
    }

    /// Whoever reads it does so on streams that nobody names: the slot goes back once the device has done all it was given.
    fn read_anywhere(&self) -> PyResult<()> {
        match &self.cuda {
            Some(cuda) => cuda.batch.use_anywhere().map_err(|error| errors::of_gpu(&error)),
            None => Ok(()),
        }
    }

    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__(
        &self,
        py: Python<'_>,
        stream: Option<&Bound<'_, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        if let Some(cuda) = &self.cuda {
            let elsewhere = dl_device.is_some_and(|wanted| wanted != self.device());
            if elsewhere || copy == Some(true) {
                return Err(PyBufferError::new_err(format!(
                    "this tensor is exported where it lies, on cuda:{}: copy or move it after importing it (clone(), \
                     .to())",
                    cuda.ordinal
                )));
            }
            // What the array API says the numbers mean; 0, which it leaves out, is what CuPy calls the default stream.
            match stream.map(|stream| stream.extract::<i64>()).transpose()? {
                None => use_on(&cuda.batch, Stream::LEGACY.raw())?,
                Some(-1) => self.read_anywhere()?,
                Some(number) => use_on(
                    &cuda.batch,
                    u64::try_from(number).map_err(|_negative| {
                        PyBufferError::new_err(format!("stream={number} is no stream"))
                    })?,
                )?,
            }
        } else if stream.is_some() {
            return Err(PyBufferError::new_err(
                "this tensor is in host memory, which has no streams: stream=None",
            ));
        } else if dl_device.is_some_and(|wanted| wanted != CPU) {
            return Err(PyBufferError::new_err(
                "this tensor is in host memory (dl_device (1, 0)); move it after importing it",
            ));
        }
        let copy = copy.unwrap_or(false);
        match max_version {
            Some((major, _)) if major >= 1 => self.capsule::<ManagedVersioned>(py, copy),
            _ => self.capsule::<Managed>(py, copy),
        }
    }

    const fn __dlpack_device__(&self) -> (i32, i32) {
        self.device()
    }

    fn __repr__(&self) -> String {
        format!("<robocache column {}{:?}>", self.dtype, self.shape)
    }
}

/// Bytes of our own at the alignment that DLPack asks for and the ring's columns have.
struct Lines {
    lines: Box<[Line]>,
    len_bytes: usize,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl Lines {
    fn copy_of(bytes: &[u8]) -> Self {
        let mut lines = vec![Line([0; 64]); bytes.len().div_ceil(64)];
        for (line, chunk) in lines.iter_mut().zip(bytes.chunks(64)) {
            line.0[..chunk.len()].copy_from_slice(chunk);
        }
        Self { lines: lines.into(), len_bytes: bytes.len() }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `lines` is a slice of lines of 64 bytes without padding, at least `len_bytes` in all.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len_bytes) }
    }
}

/// A shape as DLPack has it.
pub(crate) fn signed(key: &str, shape: Vec<usize>) -> PyResult<Vec<i64>> {
    let shape: Result<_, _> = shape.into_iter().map(i64::try_from).collect();
    shape.map_err(|error| PyValueError::new_err(format!("column {key:?}: {error}")))
}

/// DLPack's type code and bits of a dtype.
pub(crate) const fn type_code(dtype: DType) -> (u8, u8) {
    match dtype {
        DType::Int8 => (0, 8),
        DType::Int16 => (0, 16),
        DType::Int32 => (0, 32),
        DType::Int64 => (0, 64),
        DType::UInt8 => (1, 8),
        DType::UInt16 => (1, 16),
        DType::UInt32 => (1, 32),
        DType::UInt64 => (1, 64),
        DType::Float16 => (2, 16),
        DType::Float32 => (2, 32),
        DType::Float64 => (2, 64),
        DType::BFloat16 => (4, 16),
        DType::Bool => (6, 8),
    }
}

/// Row-major strides in elements.
fn contiguous(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i].max(1);
    }
    strides
}

/// The managed tensor's deleter: the consumer is done with it.
///
/// # Safety
/// - `managed` came from [`Tensor::capsule`] with the same `M`, and is not used again.
unsafe extern "C" fn delete<M>(managed: *mut M) {
    // SAFETY: `managed` is the first field of an `Exported<M>` (repr(C)) made by Box::into_raw, and the caller gives
    // it up. Dropping it needs no Python: it holds two vectors and a keeper of plain Rust.
    drop(unsafe { Box::from_raw(managed.cast::<Exported<M>>()) });
}

/// The capsule's destructor: nobody took the tensor, so it is deleted here. One who takes it renames the capsule.
///
/// # Safety
/// - `capsule` is a capsule, being destroyed, with Python's lock held.
unsafe extern "C" fn drop_capsule<M: Form>(capsule: *mut ffi::PyObject) {
    // SAFETY: a capsule, by the caller's word; the name is a C string.
    if unsafe { ffi::PyCapsule_IsValid(capsule, M::NAME.as_ptr()) } == 0 {
        return;
    }
    // SAFETY: valid under this name, as just asked.
    let managed: *mut M = unsafe { ffi::PyCapsule_GetPointer(capsule, M::NAME.as_ptr()) }.cast();
    // SAFETY: a capsule still under its first name holds the `M` that `Tensor::capsule` put there.
    if let Some(deleter) = unsafe { &*managed }.deleter() {
        // SAFETY: ours, called once: the capsule that held it is going.
        unsafe { deleter(managed) };
    }
}
