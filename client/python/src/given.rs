//! Arrays of other libraries, read through DLPack for the length of one call.
//!
//! Owns the reading of capsules that others made: what a [`Given`] says was checked (version, dtype, row-major and
//! without holes, shape times element size a length that memory can have). What cannot be checked is taken at the
//! producer's word, as by every reader of DLPack: that the memory is there and as long as the shape says. Capsules are
//! not consumed: one lives as long as its `Given`, and its own destructor gives the memory back to the producer.
#![expect(unsafe_code, reason = "DLPack is a C structure passed through PyCapsule")]

use std::ffi::CStr;

use pyo3::exceptions::{PyAttributeError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};
use robocache_types::DType;

use crate::dlpack::{DlTensor, Managed, ManagedVersioned, READ_ONLY, VERSION, Version, type_code};
use crate::errors::RequestError;

/// Where an array lies, of the places that work is done in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    Host,
    /// The device of this number, as CUDA counts those visible to the process.
    Cuda(usize),
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Host => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl Device {
    /// From `DLDeviceType` and its number; pinned memory is the host's, managed memory a device's.
    fn of(kind: i32, number: i32) -> Option<Self> {
        const CPU: i32 = 1;
        const CUDA: i32 = 2;
        const CUDA_HOST: i32 = 3;
        const CUDA_MANAGED: i32 = 13;
        match kind {
            CPU | CUDA_HOST => Some(Self::Host),
            CUDA | CUDA_MANAGED => usize::try_from(number).ok().map(Self::Cuda),
            _ => None,
        }
    }
}

/// An array, row-major and contiguous, that a caller of Python gave us.
pub(crate) struct Given<'py> {
    what: String,
    dtype: DType,
    shape: Vec<usize>,
    device: Device,
    read_only: bool,
    data: *mut u8,
    len_bytes: usize,
    _capsule: Bound<'py, PyCapsule>,
}

impl<'py> Given<'py> {
    /// Reads `array`, which errors call `what`.
    ///
    /// The producer is told not to wait for anything: what reads or writes the memory must do so on the stream that is
    /// current for the producer's library.
    pub(crate) fn import(what: impl Into<String>, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        let what = what.into();
        let capsule = ask(&what, array)?;
        let refuse = |why: String| RequestError::new_err(format!("{what}: {why}"));
        let (tensor, flags) = describe(&capsule).map_err(refuse)?;
        // SAFETY: the capsule is alive here, and with it the shape, which has as many numbers as the tensor says.
        let shape = unsafe { numbers(tensor.shape, tensor.ndim) }
            .ok_or_else(|| refuse(format!("an array of {} dimensions has no shape", tensor.ndim)))?;
        // SAFETY: as the shape; absent strides are those of a contiguous array.
        let strides = unsafe { numbers(tensor.strides, tensor.ndim) };
        let dtype = DType::ALL
            .into_iter()
            .find(|&dtype| type_code(dtype) == (tensor.code, tensor.bits) && tensor.lanes == 1)
            .ok_or_else(|| {
                let (code, bits, lanes) = (tensor.code, tensor.bits, tensor.lanes);
                refuse(format!(
                    "elements of DLPack's type code {code}, {bits} bits, {lanes} lanes are not known"
                ))
            })?;
        let device = Device::of(tensor.device_type, tensor.device_id).ok_or_else(|| {
            let (kind, number) = (tensor.device_type, tensor.device_id);
            refuse(format!(
                "wanted memory of the host or of a CUDA device, found DLPack's device ({kind}, {number})"
            ))
        })?;
        let mut len_bytes = dtype.size_bytes() as u64;
        let mut sizes = Vec::with_capacity(shape.len());
        for &size in &shape {
            len_bytes =
                u64::try_from(size).ok().and_then(|size| len_bytes.checked_mul(size)).unwrap_or(u64::MAX);
            sizes.push(usize::try_from(size).map_err(|error| refuse(format!("a size of {size}: {error}")))?);
        }
        let len_bytes = isize::try_from(len_bytes)
            .map(isize::unsigned_abs)
            .map_err(|_too_large| refuse(format!("no memory holds an array of shape {shape:?}")))?;
        if strides.is_some_and(|strides| len_bytes > 0 && !contiguous(&shape, &strides)) {
            return Err(refuse(format!(
                "wanted a row-major array without holes, found strides in shape {shape:?}"
            )));
        }
        let offset = usize::try_from(tensor.byte_offset)
            .map_err(|error| refuse(format!("an offset of {} bytes: {error}", tensor.byte_offset)))?;
        let data = tensor.data.cast::<u8>().wrapping_add(offset);
        if data.is_null() && len_bytes > 0 {
            return Err(refuse(format!("an array of shape {shape:?} at no address")));
        }
        let read_only = flags & READ_ONLY != 0;
        Ok(Self { what, dtype, shape: sizes, device, read_only, data, len_bytes, _capsule: capsule })
    }

    /// What errors call it.
    pub(crate) fn what(&self) -> &str {
        &self.what
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// The same memory, whose 16-bit unsigned integers are the bits of `dtype`, which the library could not name.
    pub(crate) fn taken_as(mut self, dtype: DType) -> PyResult<Self> {
        if self.dtype != DType::UInt16 || dtype.size_bytes() != 2 {
            let (what, found) = (&self.what, self.dtype);
            return Err(RequestError::new_err(format!("{what}: wanted the bits of {dtype}, found {found}")));
        }
        self.dtype = dtype;
        Ok(self)
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The shape, of as many dimensions as `wanted` spells out.
    pub(crate) fn shape_of<const N: usize>(&self, wanted: &str) -> PyResult<[usize; N]> {
        <[usize; N]>::try_from(self.shape.as_slice()).map_err(|_other_count| {
            RequestError::new_err(format!("{}: wanted shape {wanted}, found {:?}", self.what, self.shape))
        })
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// Where it begins, in the address space of its device.
    pub(crate) fn address(&self) -> u64 {
        self.data.addr() as u64
    }

    /// The bytes of an array of the host's.
    ///
    /// Python lets a thread write an array while another reads it. Whoever does so has a race, here as in numpy:
    /// callers document it.
    pub(crate) fn bytes(&self) -> PyResult<&[u8]> {
        self.on_host()?;
        if self.len_bytes == 0 {
            return Ok(&[]);
        }
        // SAFETY: not null, `len_bytes` long by the producer's shape, which fits an isize; alive while the capsule is,
        // which `self` holds. That nobody writes it meanwhile is the caller's duty, as said above.
        Ok(unsafe { std::slice::from_raw_parts(self.data, self.len_bytes) })
    }

    /// The bytes of an array of the host's that was just allocated to be written.
    pub(crate) fn bytes_mut(&mut self) -> PyResult<&mut [u8]> {
        self.on_host()?;
        if self.read_only {
            return Err(RequestError::new_err(format!(
                "{}: wanted memory to write, found it read-only",
                self.what
            )));
        }
        if self.len_bytes == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as in `bytes`; and it was allocated for this call, so that nobody else knows of it.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.data, self.len_bytes) })
    }

    fn on_host(&self) -> PyResult<()> {
        if self.device == Device::Host {
            return Ok(());
        }
        Err(RequestError::new_err(format!("{}: wanted memory of the host, found {}", self.what, self.device)))
    }
}

/// The array's capsule, versioned where its library knows versions.
fn ask<'py>(what: &str, array: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyCapsule>> {
    let py = array.py();
    // A library's own refusal (strides, dtype, a tensor that requires grad) is about the argument.
    let refuse = |error: PyErr| {
        let text = format!("{what}: {} cannot be read through DLPack: {}", kind(array), error.value(py));
        let refused = RequestError::new_err(text);
        refused.set_cause(py, Some(error));
        refused
    };
    let device = array.call_method0("__dlpack_device__").map_err(|error| {
        if error.is_instance_of::<PyAttributeError>(py) {
            let text = format!("{what}: wanted an array that speaks DLPack, found {}", kind(array));
            return RequestError::new_err(text);
        }
        refuse(error)
    })?;
    let arguments = PyDict::new(py);
    let (device, _number): (i32, i32) = device.extract()?;
    if Device::of(device, 0).is_some_and(|device| device != Device::Host) {
        // "The producer must not perform any synchronization": we use the stream it is current on.
        arguments.set_item("stream", -1)?;
    }
    arguments.set_item("max_version", (VERSION.major, VERSION.minor))?;
    let capsule = array.call_method("__dlpack__", (), Some(&arguments)).or_else(|error| {
        // Producers from before DLPack 1.0 do not know the argument.
        if !error.is_instance_of::<PyTypeError>(py) {
            return Err(error);
        }
        arguments.del_item("max_version")?;
        array.call_method("__dlpack__", (), Some(&arguments))
    });
    Ok(capsule.map_err(refuse)?.cast_into::<PyCapsule>()?)
}

fn kind(array: &Bound<'_, PyAny>) -> String {
    array.get_type().fully_qualified_name().map_or_else(|_error| "an object".into(), |name| name.to_string())
}

/// The tensor of a capsule of either form, and its flags.
fn describe<'a>(capsule: &'a Bound<'_, PyCapsule>) -> Result<(&'a DlTensor, u64), String> {
    const PLAIN: &CStr = c"dltensor";
    const VERSIONED: &CStr = c"dltensor_versioned";
    if let Ok(managed) = capsule.pointer_checked(Some(VERSIONED)) {
        let version: Version = {
            // SAFETY: a capsule of this name holds a managed tensor that begins with its version, whatever it is.
            unsafe { managed.cast::<Version>().read() }
        };
        if version.major != VERSION.major {
            return Err(format!(
                "wanted DLPack {}.x, found {}.{}",
                VERSION.major, version.major, version.minor
            ));
        }
        // SAFETY: of this major version, so it has this layout; the capsule keeps it while it is borrowed.
        let managed = unsafe { managed.cast::<ManagedVersioned>().as_ref() };
        return Ok((&managed.tensor, managed.flags));
    }
    match capsule.pointer_checked(Some(PLAIN)) {
        // SAFETY: a capsule of this name holds the managed tensor of before 1.0; the capsule keeps it while borrowed.
        Ok(managed) => Ok((&unsafe { managed.cast::<Managed>().as_ref() }.tensor, 0)),
        Err(_other_name) => Err("wanted a DLPack capsule that nobody used yet, found another".into()),
    }
}

/// The `count` numbers at `at`, if there are any.
///
/// # Safety
/// - `at` is null, or there are `count` numbers there.
unsafe fn numbers(at: *const i64, count: i32) -> Option<Vec<i64>> {
    let count = usize::try_from(count).ok()?;
    if count == 0 {
        return Some(Vec::new());
    }
    if at.is_null() {
        return None;
    }
    // SAFETY: not null, and the caller's word for the rest.
    Some(unsafe { std::slice::from_raw_parts(at, count) }.to_vec())
}

/// Whether rows follow each other without holes. The stride of a dimension of one is any number.
fn contiguous(shape: &[i64], strides: &[i64]) -> bool {
    let mut wanted = 1;
    shape.iter().zip(strides).rev().all(|(&size, &stride)| {
        let fits = size == 1 || stride == wanted;
        wanted *= size;
        fits
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_of_dimensions_of_one_do_not_matter() {
        assert!(contiguous(&[2, 3, 4], &[12, 4, 1]));
        assert!(contiguous(&[1, 3, 1], &[7, 1, 99]));
        assert!(contiguous(&[], &[]));
        assert!(!contiguous(&[2, 3], &[1, 2]), "columns first");
        assert!(!contiguous(&[2, 3], &[6, 2]), "every other column");
        assert!(!contiguous(&[2, 3], &[3, -1]), "backwards");
        assert!(!contiguous(&[2, 3], &[0, 1]), "one row, repeated");
    }

    #[test]
    fn devices_other_than_host_and_cuda_are_none() {
        assert_eq!(Device::of(1, 0), Some(Device::Host));
        assert_eq!(Device::of(3, 0), Some(Device::Host));
        assert_eq!(Device::of(2, 1), Some(Device::Cuda(1)));
        assert_eq!(Device::of(13, 0), Some(Device::Cuda(0)));
        assert_eq!(Device::of(10, 0), None, "ROCm");
        assert_eq!(Device::of(2, -1), None);
    }
}
