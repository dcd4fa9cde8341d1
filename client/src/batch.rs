//! A batch in its slot, and typed views of it. Nothing is copied; the slot goes back when the batch is dropped.
//!
//! On a GPU only text is in host memory; the other columns are [`DeviceTensor`]s, and the slot goes back behind the
//! streams that the batch was used on.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::CheckedBitPattern;
use half::{bf16, f16};
use robocache_types::DType;
use robocache_wire::batch::BatchHeader;
use robocache_wire::consumer::Lease;
use robocache_wire::spec::{ColumnInfo, ColumnRole, LoaderInfo, Place, Position};

use crate::error::{ColumnError, GpuError};
use crate::gpu::{Gpu, Readers, Ring, Stream};
use crate::text::TextTable;

/// What all batches of a loader have in common. Checked when the loader was connected.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) info: LoaderInfo,
    /// Place of each column in `info.columns`.
    pub(crate) columns: HashMap<String, usize>,
    pub(crate) texts: Vec<TextTable>,
    /// Where the loader is for a GPU. The last batch, or the loader, closes it.
    pub(crate) ring: Option<Ring>,
}

/// One batch, in memory shared with the daemon. It outlives its loader; dropping it gives the slot back, once, and
/// only in the process that leased it.
pub struct Batch {
    /// `None` only while it is dropped.
    lease: Option<Lease>,
    shared: Arc<Shared>,
    /// Of its device columns.
    readers: Mutex<Readers>,
    header: BatchHeader,
    after: Position,
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BatchHeader { epoch, batch, rows, .. } = self.header;
        write!(f, "Batch {{ epoch: {epoch}, index: {batch}, rows: {rows}, columns: [")?;
        for (i, column) in self.columns().iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{}: {} {:?}", column.name, column.dtype, column.shape)?;
        }
        f.write_str("] }")
    }
}

impl Batch {
    pub(crate) fn new(lease: Lease, shared: Arc<Shared>, header: BatchHeader, after: Position) -> Self {
        Self { lease: Some(lease), shared, readers: Mutex::default(), header, after }
    }

    const fn lease(&self) -> &Lease {
        self.lease.as_ref().expect("only drop takes it")
    }

    /// Samples in this batch: the loader's batch size, or less at the end of an epoch.
    pub const fn rows(&self) -> usize {
        self.header.rows as usize
    }

    pub const fn epoch(&self) -> u64 {
        self.header.epoch
    }

    /// Number of the batch within this rank's part of the epoch, counted from where the loader entered it.
    pub const fn index(&self) -> u64 {
        self.header.batch
    }

    /// Whether it is the last of this rank's epoch.
    pub const fn is_last_of_epoch(&self) -> bool {
        self.header.last_of_epoch
    }

    /// Ids of the samples: positions of their anchors in the dataset's own order.
    pub fn ids(&self) -> Vec<u64> {
        self.lease().ids(self.header.rows).collect()
    }

    /// Where to go on after this batch.
    pub const fn position_after(&self) -> Position {
        self.after
    }

    /// Time the daemon took to assemble it, in nanoseconds.
    pub const fn assemble_ns(&self) -> u64 {
        self.header.assemble_ns
    }

    /// Which slot of the ring it lies in.
    pub fn slot(&self) -> usize {
        self.lease().slot()
    }

    /// The columns, in order.
    pub fn columns(&self) -> &[ColumnInfo] {
        &self.shared.info.columns
    }

    /// The column `name` as a tensor in host memory.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, ColumnError> {
        let column = self.column(name)?;
        match column.role {
            ColumnRole::Text { .. } => Err(ColumnError::IsText { name: name.to_owned() }),
            _ => self.view(column),
        }
    }

    /// The column `name` as it lies in host memory: of a text column the int32 codes.
    pub fn raw(&self, name: &str) -> Result<Tensor<'_>, ColumnError> {
        self.view(self.column(name)?)
    }

    /// The device that the columns are on, texts apart; `None` where they are in host memory.
    pub fn gpu(&self) -> Option<&Gpu> {
        self.shared.ring.as_ref().map(Ring::gpu)
    }

    /// The column `name` as a tensor in the device's memory.
    ///
    /// It may be read by work enqueued on a stream that [`Self::use_on`] was told, and as long as the batch lives.
    pub fn device_tensor(&self, name: &str) -> Result<DeviceTensor<'_>, ColumnError> {
        let column = self.column(name)?;
        match (&self.shared.ring, column.place, column.role) {
            (_, _, ColumnRole::Text { .. }) => Err(ColumnError::IsText { name: name.to_owned() }),
            (Some(ring), Place::Device, _) => Ok(DeviceTensor { batch: self, ring, column }),
            _ => Err(ColumnError::OnHost { name: name.to_owned() }),
        }
    }

    /// What is enqueued on `stream` from now on may read the batch: it comes behind the making of the batch, and the
    /// slot, once the batch is dropped, goes back behind it. To be said of each stream that reads the batch, in any order
    /// and as often as one likes, before the work is enqueued. Nothing waits here. A batch in host memory needs none.
    pub fn use_on(&self, stream: Stream) -> Result<(), GpuError> {
        let Some(ring) = &self.shared.ring else { return Ok(()) };
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        ring.use_on(self.slot(), stream, &mut readers)
    }

    /// As [`Self::use_on`], for readers whose streams cannot be named: once the batch is dropped, the slot goes back when the
    /// device has done all that this process had given it by then, which a thread of the loader's waits for.
    pub fn use_anywhere(&self) -> Result<(), GpuError> {
        let Some(ring) = &self.shared.ring else { return Ok(()) };
        ring.use_anywhere(&mut self.readers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The strings of text column `name`, row by row.
    pub fn text(&self, name: &str) -> Result<Vec<&str>, ColumnError> {
        let column = self.column(name)?;
        let ColumnRole::Text { table } = column.role else {
            return Err(ColumnError::NotText { name: name.to_owned(), found: column.dtype });
        };
        let table = usize::try_from(table).ok().and_then(|table| self.shared.texts.get(table));
        let codes = self.view(column)?.as_slice::<i32>()?;
        codes
            .iter()
            .enumerate()
            .map(|(row, code)| match (*code, table) {
                (-1, _) => Ok(""),
                (code, table) => usize::try_from(code).ok().and_then(|i| table?.get(i)).ok_or_else(|| {
                    let count = table.map_or(0, |table| u32::try_from(table.len()).unwrap_or(u32::MAX));
                    ColumnError::TextCode { name: name.to_owned(), row, code, count }
                }),
            })
            .collect()
    }

    fn column(&self, name: &str) -> Result<&ColumnInfo, ColumnError> {
        self.shared.columns.get(name).and_then(|i| self.columns().get(*i)).ok_or_else(|| {
            let found = self.columns().iter().map(|column| column.name.clone()).collect();
            ColumnError::Missing { wanted: name.to_owned(), found }
        })
    }

    fn view<'a>(&'a self, column: &'a ColumnInfo) -> Result<Tensor<'a>, ColumnError> {
        if let (Some(ring), Place::Device) = (&self.shared.ring, column.place) {
            let device = ring.gpu().to_string();
            return Err(ColumnError::OnDevice { name: column.name.clone(), device });
        }
        // Connecting proved `offset + batch_size * elements * size` to lie inside a slot, and `rows <= batch_size`.
        let span = usize::try_from(column.offset).ok().zip(len_bytes(column, self.rows()));
        let bytes = span.and_then(|(offset, len)| self.lease().bytes().get(offset..)?.get(..len));
        let bytes = bytes.expect("columns were checked when connecting");
        Ok(Tensor { column, rows: self.rows(), bytes })
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        // Without a ring on a GPU the lease ends here by itself.
        if let (Some(lease), Some(ring)) = (self.lease.take(), &self.shared.ring) {
            let readers = self.readers.get_mut().unwrap_or_else(PoisonError::into_inner);
            ring.release(lease, std::mem::take(readers));
        }
    }
}

/// Bytes of `rows` rows of a column.
fn len_bytes(column: &ColumnInfo, rows: usize) -> Option<usize> {
    let row = column.shape.iter().product::<u64>() * column.dtype.size_bytes() as u64;
    usize::try_from(row).ok()?.checked_mul(rows)
}

/// Rows first: `[rows, ...]`.
fn shape(column: &ColumnInfo, rows: usize) -> Vec<usize> {
    let inner = column.shape.iter().map(|dim| usize::try_from(*dim).unwrap_or(usize::MAX));
    std::iter::once(rows).chain(inner).collect()
}

/// A column of a batch in a GPU's memory.
#[derive(Clone, Copy)]
pub struct DeviceTensor<'a> {
    batch: &'a Batch,
    ring: &'a Ring,
    column: &'a ColumnInfo,
}

impl fmt::Debug for DeviceTensor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (dtype, gpu) = (self.column.dtype, self.gpu());
        write!(f, "DeviceTensor({:?}: {dtype} {:?} on {gpu})", self.column.name, self.shape())
    }
}

impl<'a> DeviceTensor<'a> {
    pub const fn dtype(&self) -> DType {
        self.column.dtype
    }

    /// Rows first: `[rows, ...]`. The elements are contiguous in this order.
    pub fn shape(&self) -> Vec<usize> {
        shape(self.column, self.batch.rows())
    }

    /// Where element 0 lies, as this process's kernels call it; aligned to 64. Of a simulated device a number of no use.
    pub fn address(&self) -> u64 {
        self.ring.address(self.batch.slot(), self.column.offset)
    }

    pub fn gpu(&self) -> &'a Gpu {
        self.ring.gpu()
    }

    /// Bytes of all elements.
    pub fn len_bytes(&self) -> usize {
        len_bytes(self.column, self.batch.rows()).expect("columns were checked when connecting")
    }

    /// The elements' bytes, little-endian, copied to the host. Waits for the copy, and for no other work.
    pub fn to_host(&self) -> Result<Vec<u8>, GpuError> {
        let mut bytes = vec![0; self.len_bytes()];
        self.ring.read(self.batch.slot(), self.column.offset, &mut bytes)?;
        Ok(bytes)
    }
}

/// A column of a batch, where it lies.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    column: &'a ColumnInfo,
    rows: usize,
    bytes: &'a [u8],
}

impl fmt::Debug for Tensor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({:?}: {} {:?})", self.column.name, self.column.dtype, self.shape())
    }
}

impl<'a> Tensor<'a> {
    pub const fn dtype(&self) -> DType {
        self.column.dtype
    }

    /// Rows first: `[rows, ...]`. The elements are contiguous in this order.
    pub fn shape(&self) -> Vec<usize> {
        shape(self.column, self.rows)
    }

    /// The elements' bytes, little-endian, aligned to 64.
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The elements, if they are of type `T`.
    pub fn as_slice<T: Element>(&self) -> Result<&'a [T], ColumnError> {
        let name = || self.column.name.clone();
        if T::DTYPE != self.column.dtype {
            return Err(ColumnError::DType { name: name(), wanted: T::DTYPE, found: self.column.dtype });
        }
        bytemuck::checked::try_cast_slice(self.bytes)
            .or(Err(()))
            .map_err(|()| ColumnError::Bits { name: name(), dtype: T::DTYPE })
    }
}

/// A Rust type that elements of a column may have.
pub trait Element: CheckedBitPattern + bytemuck::NoUninit + sealed::Sealed {
    const DTYPE: DType;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elements {
    ($($ty:ty => $dtype:ident),* $(,)?) => {$(
        impl sealed::Sealed for $ty {}
        impl Element for $ty {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}

elements! {
    bool => Bool, u8 => UInt8, i8 => Int8, u16 => UInt16, i16 => Int16, u32 => UInt32, i32 => Int32,
    u64 => UInt64, i64 => Int64, f16 => Float16, bf16 => BFloat16, f32 => Float32, f64 => Float64,
}
