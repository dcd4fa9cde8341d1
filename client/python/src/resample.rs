//! `rc.resample` and `rc.fuse` on arrays that the caller has: checks, allocation, and who does the work.
//!
//! Called by `robocache/_resample.py`, which knows the libraries. Everything is checked before anything is allocated,
//! and nothing is written unless all fits. Arrays of the host take the twin, with Python's lock released; those of a
//! CUDA device one launch on the caller's stream. Whatever is wrong with an argument is a RequestError.

use pyo3::prelude::*;
use robocache_kernels::{DevicePtr, FuseStream, FuseTargets, Tensor, TensorError, Times};
use robocache_types::DType;

use crate::cuda;
use crate::errors::{RequestError, RoboCacheError, chain};
use crate::given::{Device, Given};

/// Streams side by side at `targets`: the array that `empty` made for it.
///
/// A stream is its values, their times, and the dtype that the values' 16-bit unsigned integers are the bits of, absent
/// where they are themselves. `empty(shape)` allocates an array like the first stream's values; `stream(device)` is the
/// number of the CUDA stream that their library currently uses on that device, absent where it has none.
#[pyfunction]
#[pyo3(signature = (streams, targets, *, empty, stream = None))]
pub(crate) fn fuse<'py>(
    py: Python<'py>,
    streams: Vec<(Bound<'py, PyAny>, Bound<'py, PyAny>, Option<String>)>,
    targets: Bound<'py, PyAny>,
    empty: Bound<'py, PyAny>,
    stream: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let mut inputs = Vec::with_capacity(streams.len());
    for (number, (src, times, bits)) in streams.iter().enumerate() {
        let src = values(format!("src of stream {number}"), src, bits.as_deref())?;
        let times = Given::import(format!("times of stream {number}"), times)?;
        let shapes = (src.shape_of("[B, S, D]")?, times.shape_of("[B, S]")?);
        inputs.push(Stream { src, times, shapes });
    }
    let targets = Given::import("times_tgt", &targets)?;
    let steps = targets.shape_of("[B, T]")?;
    let work = Work { streams: inputs, targets, steps };
    let (device, wanted) = work.check()?;

    let made = empty.call1((wanted,))?;
    let mut out = values("the array for the result".into(), &made, streams[0].2.as_deref())?;
    let first = &work.streams[0].src;
    if (out.shape(), out.dtype(), out.device()) != (wanted.as_slice(), first.dtype(), device) {
        return Err(RequestError::new_err(format!(
            "{}: wanted {} {wanted:?} on {device}, found {} {:?} on {}",
            out.what(),
            first.dtype(),
            out.dtype(),
            out.shape(),
            out.device()
        )));
    }
    match device {
        Device::Host => work.on_host(py, &mut out)?,
        Device::Cuda(number) => {
            let stream = stream.ok_or_else(|| {
                RequestError::new_err(format!(
                    "on {device} the arrays must be torch's or CuPy's, whose current stream can be asked for"
                ))
            })?;
            work.on_cuda(py, number, stream.call1((number,))?.extract()?, &out)?;
        }
    }
    Ok(made)
}

fn values<'py>(what: String, array: &Bound<'py, PyAny>, bits: Option<&str>) -> PyResult<Given<'py>> {
    let given = Given::import(what, array)?;
    let Some(bits) = bits else { return Ok(given) };
    let dtype: DType = bits.parse().map_err(|error| RequestError::new_err(format!("{error}")))?;
    given.taken_as(dtype)
}

struct Stream<'py> {
    src: Given<'py>,
    times: Given<'py>,
    /// `[B, S, D]`, and `[B, S]`.
    shapes: ([usize; 3], [usize; 2]),
}

struct Work<'py> {
    streams: Vec<Stream<'py>>,
    targets: Given<'py>,
    steps: [usize; 2],
}

impl Work<'_> {
    /// Where it is done, and the shape of the result. The rules are the twin's, which no array of a device meets.
    fn check(&self) -> PyResult<(Device, [usize; 3])> {
        let first = self.streams.first().ok_or_else(|| of_tensors(&TensorError::NoStreams))?;
        let device = first.src.device();
        let all = self.streams.iter().flat_map(|stream| [&stream.src, &stream.times]).chain([&self.targets]);
        for given in all {
            if given.device() != device {
                return Err(RequestError::new_err(format!(
                    "{}: wanted it on {device} as the first src, found {}",
                    given.what(),
                    given.device()
                )));
            }
            if device != Device::Host && !given.address().is_multiple_of(given.dtype().size_bytes() as u64) {
                return Err(RequestError::new_err(format!(
                    "{}: wanted an address that is a multiple of its element's {} bytes, found {:#x}",
                    given.what(),
                    given.dtype().size_bytes(),
                    given.address()
                )));
            }
        }
        let times = self.targets.dtype();
        if !matches!(times, DType::Float32 | DType::Float64 | DType::Int64) {
            return Err(of_tensors(&TensorError::TimeDtype { found: times }));
        }
        let mut width = 0_usize;
        for (number, stream) in self.streams.iter().enumerate() {
            stream.check(number, first.src.dtype(), times, self.steps).map_err(|error| of_tensors(&error))?;
            // A sum of sizes of arrays that exist.
            width += stream.shapes.0[2];
        }
        Ok((device, [self.steps[0], self.steps[1], width]))
    }

    fn on_host(&self, py: Python<'_>, out: &mut Given<'_>) -> PyResult<()> {
        let mut streams = Vec::with_capacity(self.streams.len());
        for Stream { src, times, shapes } in &self.streams {
            let src = Tensor { dtype: src.dtype(), shape: shapes.0, data: src.bytes()? };
            streams.push((src, Times { dtype: times.dtype(), shape: shapes.1, data: times.bytes()? }));
        }
        let targets = Times { dtype: self.targets.dtype(), shape: self.steps, data: self.targets.bytes()? };
        let out = out.bytes_mut()?;
        py.detach(|| robocache_kernels::fuse(&streams, targets, out)).map_err(|error| of_tensors(&error))
    }

    fn on_cuda(&self, py: Python<'_>, device: usize, stream: u64, out: &Given<'_>) -> PyResult<()> {
        let address = |given: &Given<'_>| DevicePtr(given.address());
        let streams: Vec<FuseStream> = self
            .streams
            .iter()
            .map(|Stream { src, times, shapes: ([_, rows, dim], _) }| FuseStream {
                src: address(src),
                times: address(times),
                rows: *rows,
                dim: *dim,
            })
            .collect();
        let [batch, steps] = self.steps;
        let (values, times) = (out.dtype(), self.targets.dtype());
        let (out, targets) = (address(out), address(&self.targets));
        let onto = FuseTargets { out, targets, batch, steps, values, times };
        py.detach(|| cuda::fuse(device, stream, &streams, onto)).map_err(|error| match error {
            cuda::CudaError::Plan(error) => RequestError::new_err(chain(&error)),
            error => RoboCacheError::new_err(chain(&error)),
        })
    }
}

impl Stream<'_> {
    fn check(
        &self,
        stream: usize,
        values: DType,
        times: DType,
        targets: [usize; 2],
    ) -> Result<(), TensorError> {
        let (src, stamps) = self.shapes;
        let found = self.src.dtype();
        if !found.is_float() {
            return Err(TensorError::Values { stream, found });
        }
        if found != values {
            return Err(TensorError::MixedValues { stream, wanted: values, found });
        }
        if self.times.dtype() != times {
            return Err(TensorError::MixedTimes { stream, wanted: times, found: self.times.dtype() });
        }
        if src[..2] != stamps || src[0] != targets[0] {
            return Err(TensorError::Shapes { stream, src, times: stamps, targets });
        }
        if src.contains(&0) || targets[1] == 0 {
            return Err(TensorError::Empty { stream, src, targets });
        }
        Ok(())
    }
}

fn of_tensors(error: &TensorError) -> PyErr {
    RequestError::new_err(chain(error))
}
