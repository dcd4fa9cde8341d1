//! Client of `robocached`: attach, lease batches, release them.
//!
//! ```no_run
//! use robocache::{Loader, Window};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut loader = Loader::builder("/data/my_robot")
//!     .batch_size(64)
//!     .window("action", Window::new(50.0, 50))
//!     .window("gripper", Window::at([0.0]))
//!     .shuffle(true)
//!     .connect()?;
//! for batch in &mut loader {
//!     let batch = batch?;
//!     let action = batch.tensor("action")?; // [64, 50, dim], in the ring: no copy was made
//!     println!("{:?} {:?}", action.shape(), &action.as_slice::<f32>()?[..4]);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A [`Batch`] is a view of memory that the daemon wrote; dropping it gives the slot back. Where no daemon runs, one
//! is started for this process (see [`LoaderBuilder::embedded`]).
//!
//! With [`.device("cuda")`](LoaderBuilder::device) columns lie in the GPU's memory, text apart: they are
//! [`DeviceTensor`]s, with an address for kernels. Say on which streams they are read ([`Batch::use_on`]), and the slot goes
//! back behind those:
//!
//! ```no_run
//! # use robocache::{Batch, gpu::Stream};
//! # fn launch(stream: u64, address: u64, shape: &[usize]) {}
//! # fn step(batch: Batch, my_stream: u64) -> Result<(), Box<dyn std::error::Error>> {
//! # #[expect(unsafe_code, reason = "an example")]
//! // SAFETY: a stream of the device's primary context, which outlives the batch.
//! let stream = unsafe { Stream::from_raw(my_stream) };
//! batch.use_on(stream)?;
//! let action = batch.device_tensor("action")?;
//! launch(stream.raw(), action.address(), &action.shape());
//! drop(batch); // at once: the daemon writes there when the kernel has read it
//! # Ok(())
//! # }
//! ```

pub mod admin;
mod batch;
mod builder;
mod connect;
mod cure;
mod device;
mod device_sim;
mod drain;
mod embedded;
mod error;
pub mod gpu;
mod loader;
mod text;

pub use batch::{Batch, DeviceTensor, Element, Tensor};
pub use builder::{Anchors, LoaderBuilder, Window};
#[doc(hidden)]
pub use device_sim::LateReads;
pub use error::{ColumnError, ConnectError, EmbeddedError, GpuError, LoaderError, Named};
pub use loader::{Loader, Next};
pub use robocache_types::{DType, Interp};
pub use robocache_wire::fds::default_socket_path;
pub use robocache_wire::message::RefusalCode;
pub use robocache_wire::ring::Occupancy;
pub use robocache_wire::spec::{ColumnInfo, ColumnRole, LoaderInfo, Place, Position, TextTableInfo};
pub use text::TextTable;
