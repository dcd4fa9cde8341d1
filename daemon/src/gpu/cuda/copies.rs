//! Copies to the device, many by one call where the driver can.
//!
//! On an H100, pieces of 16 / 64 / 500 KiB arrive at 5.1 / 15.8 / 42.0 GB/s one call each, at 23.0 / 51.7 / 54.7 GB/s by calls
//! of 64, which also take a third of the host's time; one piece of 64 MiB at 54.6.

#![expect(unsafe_code, reason = "the CUDA driver's interface")]

use cudarc::driver::{DriverError, sys};

/// The driver's version that has `cuMemcpyBatchAsync`: CUDA 12.8.
pub(super) const BATCHES: i32 = 12_080;
/// Copies of one call: the driver keeps them on the stack of the thread, and tens of thousands overflow it. Small ones are
/// slower from some hundred on.
const MOST: usize = 64;
/// From here on a copy's own time is small beside its bytes': 1 of 1.3 us on the bus, and 4 of 9.
pub(super) const LEAST_BATCHED: u64 = 16 << 10;
pub(super) const LEAST_SINGLE: u64 = 256 << 10;

/// The version of CUDA that the driver is of, as 12080.
pub(super) fn driver_version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: it writes the one number.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    Ok(version)
}

/// Copies that are enqueued together, in any order.
#[derive(Debug, Default)]
pub(super) struct Copies {
    to: Vec<u64>,
    from: Vec<u64>,
    sizes: Vec<usize>,
}

impl Copies {
    pub(super) fn push(&mut self, to: u64, from: u64, bytes: u64) {
        self.to.push(to);
        self.from.push(from);
        self.sizes.push(usize::try_from(bytes).expect("an allocation's size was a usize"));
    }

    /// For messages.
    pub(super) fn about(&self) -> String {
        format!("{} bytes to the device in {} copies", self.sizes.iter().sum::<usize>(), self.sizes.len())
    }

    /// # Safety
    ///
    /// All ranges are mapped in the current context, of which `stream` is, and stay so until the copies are done.
    pub(super) unsafe fn enqueue(
        &mut self,
        stream: sys::CUstream,
        batched: bool,
    ) -> Result<(), (&'static str, DriverError)> {
        if batched && self.sizes.len() > 1 {
            let (to, from) = (self.to.chunks_mut(MOST), self.from.chunks_mut(MOST));
            for ((to, from), sizes) in to.zip(from).zip(self.sizes.chunks_mut(MOST)) {
                // SAFETY: as the caller says.
                unsafe { enqueue_batch(to, from, sizes, stream) }
                    .map_err(|error| ("cuMemcpyBatchAsync", error))?;
            }
            return Ok(());
        }
        for ((&to, &from), &size) in self.to.iter().zip(&self.from).zip(&self.sizes) {
            // SAFETY: as the caller says.
            unsafe { sys::cuMemcpyAsync(to, from, size, stream) }
                .result()
                .map_err(|error| ("cuMemcpyAsync", error))?;
        }
        Ok(())
    }
}

/// # Safety
///
/// As for `Copies::enqueue`.
unsafe fn enqueue_batch(
    to: &mut [u64],
    from: &mut [u64],
    sizes: &mut [usize],
    stream: sys::CUstream,
) -> Result<(), DriverError> {
    assert!(to.len() == sizes.len() && from.len() == sizes.len(), "a place and a size for each copy");
    // No hints: addresses say where they are.
    let nowhere = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    let mut attributes = sys::CUmemcpyAttributes {
        srcAccessOrder: sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        srcLocHint: nowhere,
        dstLocHint: nowhere,
        flags: 0,
    };
    let (mut from_first, mut failed) = (0, 0);
    // SAFETY: the arrays are as long as `count`; one set of attributes, for all copies from the first on; the call reads
    // them all before it returns. For the ranges the caller answers.
    unsafe {
        sys::cuMemcpyBatchAsync(
            to.as_mut_ptr(),
            from.as_mut_ptr(),
            sizes.as_mut_ptr(),
            sizes.len(),
            &raw mut attributes,
            &raw mut from_first,
            1,
            &raw mut failed,
            stream,
        )
    }
    .result()
}
