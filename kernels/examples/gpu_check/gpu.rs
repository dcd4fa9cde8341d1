//! The driver calls of `gpu_check`: buffers that live as long as the program, launches on them, graphs and times.

#![expect(unsafe_code, reason = "the CUDA driver's interface, as in kernels/src/launch.rs")]

use std::ffi::c_void;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use cudarc::driver::{CudaContext, CudaStream, result, sys};
use robocache_kernels::{AssemblePlan, DevicePtr, FusePlan, Kernels};

/// A device, its stream and its kernels.
pub(crate) struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    kernels: Kernels,
    naive: sys::CUfunction,
}

/// Device memory that is given back with it.
pub(crate) struct Buffer {
    at: u64,
    len: usize,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: `Gpu::buffer` allocated it, and the program waits for its work before it lets go of buffers.
        let freed = unsafe { result::free_sync(self.at) };
        assert!(freed.is_ok(), "cuMemFree: {freed:?}");
    }
}

impl Buffer {
    /// The address `offset` bytes in.
    pub(crate) fn at(&self, offset: usize) -> DevicePtr {
        assert!(offset <= self.len, "inside the buffer");
        DevicePtr(self.at + offset as u64)
    }
}

impl Gpu {
    pub(crate) fn open() -> Result<Self> {
        anyhow::ensure!(Kernels::driver_present(), "no CUDA driver was found (libcuda.so.1)");
        let context = CudaContext::new(0).context("cuDevicePrimaryCtxRetain, device 0")?;
        let stream = context.new_stream()?;
        let kernels = Kernels::load(&context)?;
        let ptx = concat!(include_str!("naive.ptx"), "\0");
        // SAFETY: whole PTX that ends in a zero.
        let module = unsafe { result::module::load_data(ptx.as_ptr().cast()) }.context("naive.ptx")?;
        // SAFETY: the module was just loaded, and is never unloaded.
        let naive = unsafe { result::module::get_function(module, c"naive_bf16_f32".to_owned()) }?;
        println!("{}, image {}", context.name()?, kernels.image());
        Ok(Self { context, stream, kernels, naive })
    }

    pub(crate) fn multiprocessors(&self) -> u32 {
        self.kernels.multiprocessors()
    }

    /// `len` bytes of `poison`.
    pub(crate) fn buffer(&self, len: usize, poison: u8) -> Result<Buffer> {
        self.context.bind_to_thread()?;
        // SAFETY: the memory is written below, before anything reads it.
        let at = unsafe { result::malloc_sync(len.max(16)) }
            .with_context(|| format!("cuMemAlloc of {len} bytes"))?;
        // SAFETY: `at` is that long.
        unsafe { result::memset_d8_sync(at, poison, len.max(16)) }?;
        Ok(Buffer { at, len })
    }

    pub(crate) fn upload(&self, bytes: &[u8]) -> Result<Buffer> {
        let buffer = self.buffer(bytes.len(), 0xee)?;
        // SAFETY: the buffer was made that long.
        unsafe { result::memcpy_htod_sync(buffer.at, bytes) }?;
        Ok(buffer)
    }

    /// Waits for the stream, then reads `len` bytes from `offset`.
    pub(crate) fn download(&self, buffer: &Buffer, offset: usize, len: usize) -> Result<Vec<u8>> {
        self.stream.synchronize()?;
        assert!(offset + len <= buffer.len, "inside the buffer");
        let mut bytes = vec![0; len];
        // SAFETY: the line above; the stream is idle.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, buffer.at + offset as u64) }?;
        Ok(bytes)
    }

    pub(crate) fn assemble(
        &self,
        plan: &AssemblePlan,
        fields: &Buffer,
        sources: &Buffer,
        anchors: &Buffer,
    ) -> Result<()> {
        let stream = self.stream.cu_stream();
        // SAFETY: this program's plans are made of addresses in its own buffers, of the lengths their shapes say,
        // which outlive the work.
        unsafe { self.kernels.assemble(stream, plan, fields.at(0), sources.at(0), anchors.at(0)) }?;
        Ok(())
    }

    pub(crate) fn fuse(&self, plan: &FusePlan) -> Result<()> {
        // SAFETY: as for `assemble`.
        unsafe { self.kernels.fuse(self.stream.cu_stream(), plan) }?;
        Ok(())
    }

    /// The thread-per-element kernel: `shape` is batch, rows, dim, steps; `at` out, src, times and targets.
    pub(crate) fn naive(&self, shape: [u32; 4], at: [DevicePtr; 4]) -> Result<()> {
        let (mut shape, mut at) = (shape, at.map(|at| at.0));
        let items = u64::from(shape[0]) * u64::from(shape[2]) * u64::from(shape[3]);
        let blocks = u32::try_from(items.div_ceil(256))?;
        let addresses = at.iter_mut().map(|at| std::ptr::from_mut(at).cast::<c_void>());
        let mut arguments: Vec<_> = addresses.collect();
        arguments.extend(shape.iter_mut().map(|n| std::ptr::from_mut(n).cast::<c_void>()));
        let stream = self.stream.cu_stream();
        // SAFETY: four addresses and four counts, as naive.cu declares; the buffers are this program's own.
        unsafe { result::launch_kernel(self.naive, (blocks, 1, 1), (256, 1, 1), 0, stream, &mut arguments) }?;
        Ok(())
    }

    pub(crate) fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: usize) -> Result<()> {
        // SAFETY: both ranges lie in this program's own buffers.
        unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.stream.cu_stream()) }?;
        Ok(())
    }

    /// Median microseconds of one of the `n` pieces of work that `enqueue` puts into a graph.
    pub(crate) fn time(&self, n: usize, enqueue: impl Fn(usize) -> Result<()>) -> Result<f64> {
        for i in 0..n {
            enqueue(i)?;
        }
        self.stream.synchronize()?;
        self.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        for i in 0..n {
            enqueue(i)?;
        }
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.stream.end_capture(flags)?.context("the capture was empty")?;
        let timing = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let (begin, end) = (self.context.new_event(timing)?, self.context.new_event(timing)?);
        let mut times = Vec::new();
        for round in 0..25 {
            begin.record(&self.stream)?;
            graph.launch()?;
            end.record(&self.stream)?;
            let ms = begin.elapsed_ms(&end)?;
            if round >= 4 {
                times.push(f64::from(ms) * 1000.0 / n as f64);
            }
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}
