//! From what a client asks for to what is built for every batch, or to the reason why not.
//!
//! A [`Plan`] is immutable and complete: which anchors in which order, which streams must be in memory, and for
//! every column of the batch where it lies in a slot and how it is made. Everything a request can get wrong about
//! the dataset is found here, before a slot is allocated; what only data can get wrong is found when it is read.
//! Its parts: the anchors (`plan_anchors`), the columns asked for (`plan_columns`), their places (`plan_layout`).

use robocache_formats::{Dataset, Layout, ReadError, TextTable};
use robocache_kernels::FieldKernel;
use robocache_types::{ClockError, DType, Interp};
use robocache_wire::spec::{ColumnInfo, LoaderSpec, Place};

use crate::anchors::Anchors;
use crate::plan_anchors::{self, FRAME_CLOCK};
use crate::sampler::{Order, Shuffle};
use crate::{plan_columns, plan_layout};

/// What a loader will do.
#[derive(Debug)]
pub struct Plan {
    pub anchors: Anchors,
    pub order: Order,
    /// Streams that must be in memory, as positions in `Dataset::streams`, ascending.
    pub streams: Vec<usize>,
    /// Which of `streams` carries the frame clock, where anchors are frames of the dataset itself.
    pub frame_clock: Option<usize>,
    pub columns: Vec<Column>,
    /// The same columns, and their masks, as clients are told of them.
    pub infos: Vec<ColumnInfo>,
    pub texts: Vec<TextTable>,
    /// Bytes of the columns of one slot, from `columns_offset` on.
    pub slot_end: u64,
    /// Bytes of the columns of one slot on a GPU; 0 where none lie there.
    pub device_end: u64,
    pub fingerprint: [u8; 16],
    pub warnings: Vec<String>,
}

/// A column of the batch, or of the batch and its mask.
#[derive(Debug)]
pub struct Column {
    pub source: Source,
    pub place: Place,
    /// Of sample 0, from the start of the slot in that place.
    pub offset: usize,
    /// Of one sample.
    pub bytes: usize,
    /// Offset and bytes of one sample of the mask.
    pub mask: Option<(usize, usize)>,
}

/// Where a column's values come from.
#[derive(Debug)]
pub enum Source {
    /// A stream: which of the plan's, and how.
    Stream { nth: usize, kernel: FieldKernel },
    /// The frame's task as an i32 text code, from the int64 stream `nth`.
    TaskText { nth: usize, tasks: usize },
    /// Computed from the anchor.
    Index(Index),
}

/// Index columns of datasets that store none, and `t_ns`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Index {
    /// Number of the anchor, i64.
    Anchor,
    /// The dataset's number of the episode, i64.
    Episode,
    /// Number of the anchor within its episode, i64.
    Frame,
    /// No task is known: 0, i64.
    Task,
    /// Seconds since the episode's first anchor, f32.
    Timestamp,
    /// The anchor on the dataset's own clock, i64.
    TimeNs,
}

/// Most steps a window may have, and most bytes a ring may.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub steps: u64,
    pub ring_bytes: u64,
    /// Where the columns are to lie on a GPU: the most of its memory.
    pub gpu_ring_bytes: Option<u64>,
}

/// Why a loader cannot be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    #[error("no stream {wanted:?} in {dataset:?}; it has {}", .found.join(", "))]
    NoStream { dataset: String, wanted: String, found: Vec<String> },
    #[error("stream {stream:?} is {what}, which this version does not decode; leave it out")]
    Opaque { stream: String, what: String },
    #[error(
        "windows and delta_timestamps cannot both be given: windows are times, delta_timestamps are frames"
    )]
    TwoForms,
    #[error("{key:?} is asked for twice")]
    Twice { key: String },
    #[error("{what} of {stream:?}: wanted {wanted}, found {found}")]
    Window { stream: String, what: &'static str, wanted: &'static str, found: String },
    #[error("window of {stream:?} has {steps} steps; at most {limit} fit (a batch must fit memory)")]
    TooManySteps { stream: String, steps: u64, limit: u64 },
    #[error(
        "delta_timestamps of {stream:?}: {seconds} s is no multiple of 1/{fps} s within 1e-4 s; \
         ask for times between frames with windows="
    )]
    OffGrid { stream: String, seconds: f64, fps: f64 },
    #[error("delta_timestamps are frames of a LeRobot dataset, and {dataset:?} is {layout}; use windows=")]
    NoFrames { dataset: String, layout: String },
    #[error("{what} wanted {wanted}, found {found}")]
    Parameter { what: &'static str, wanted: String, found: String },
    #[error("{dataset:?} has no frames of its own: name the stream whose frames are meant (anchor_stream=), one of {}", .streams.join(", "))]
    NoFrameClock { dataset: String, streams: Vec<String> },
    #[error("episode {wanted} is not in {dataset:?}, which has {episodes} (first {first}, last {last})")]
    NoEpisode { dataset: String, wanted: i64, episodes: usize, first: i64, last: i64 },
    #[error("no anchors: {why}")]
    NoAnchors { why: String },
    #[error("stream {stream:?} as {interp:?}")]
    Field { stream: String, interp: Interp, source: robocache_kernels::FieldError },
    #[error("dtype of {stream:?}: {from} streams keep their dtype, found {wanted} asked for")]
    Cast { stream: String, from: DType, wanted: DType },
    #[error(
        "dtype of {key:?}: a batch of this loader has no column of that name to cast; it has {}", .columns.join(", ")
    )]
    NoColumn { key: String, columns: Vec<String> },
    #[error("dtype must be float32, bfloat16, float16 or float64, found {found}")]
    NotFloating { found: DType },
    #[error(
        "the ring would take {bytes} bytes ({slots} slots of {slot_bytes}), and the limit is {limit}; \
         make batch_size, windows or slots smaller, or raise the daemon's memory"
    )]
    RingTooLarge { bytes: u128, slots: u32, slot_bytes: u128, limit: u64 },
    #[error("anchors at {hz} Hz")]
    Grid { hz: f64, source: ClockError },
    #[error(transparent)]
    Read(#[from] ReadError),
}

impl Plan {
    /// Plans a loader. Reads clocks and text columns where the plan depends on them.
    pub fn new(dataset: &Dataset, spec: &LoaderSpec, limits: Limits) -> Result<Self, PlanError> {
        check_parameters(spec)?;
        let name = dataset.root().display().to_string();
        let frames = plan_anchors::frame_kind(dataset, spec, &name)?;
        let anchors = plan_anchors::plan(dataset, spec, &frames, &name)?;
        let frame_anchors =
            frames.clock() == Some(FRAME_CLOCK) && matches!(dataset.layout(), Layout::LeRobot { .. });
        let asked = plan_columns::asked(dataset, spec, limits, &name, frames.clock(), frame_anchors)?;
        let streams = plan_layout::streams(dataset, &asked.columns, frame_anchors);
        let frame_clock =
            frame_anchors.then(|| streams.iter().position(|&s| plan_layout::on_frame_clock(dataset, s)));
        let placed = plan_layout::place(asked.columns, &streams, spec.batch_size, spec.slots, limits)?;
        let shuffle = if spec.shuffle { Shuffle::Keyed } else { Shuffle::Off };
        let order = Order::new(anchors.len(), spec.seed, shuffle);
        let fingerprint = plan_anchors::fingerprint(dataset, spec, &anchors);
        Ok(Self {
            anchors,
            order,
            streams,
            frame_clock: frame_clock.flatten(),
            columns: placed.columns,
            infos: placed.infos,
            texts: asked.texts,
            slot_end: placed.end,
            device_end: placed.device_end,
            fingerprint,
            warnings: dataset.warnings(),
        })
    }
}

fn check_parameters(spec: &LoaderSpec) -> Result<(), PlanError> {
    let parameter =
        |what, wanted: &str, found: String| PlanError::Parameter { what, wanted: wanted.to_owned(), found };
    if spec.windows.is_some() && spec.delta_timestamps.is_some() {
        return Err(PlanError::TwoForms);
    }
    if spec.batch_size == 0 {
        return Err(parameter("batch_size", "at least 1", "0".to_owned()));
    }
    if !(2..=256).contains(&spec.slots) {
        return Err(parameter("slots", "2 to 256", spec.slots.to_string()));
    }
    if spec.world_size == 0 || spec.rank >= spec.world_size {
        let found = format!("rank {} of world_size {}", spec.rank, spec.world_size);
        return Err(parameter("rank", "a rank below world_size", found));
    }
    for dtype in std::iter::once(spec.dtype).chain(spec.dtypes.iter().map(|(_, dtype)| *dtype)) {
        if !dtype.is_float() {
            return Err(PlanError::NotFloating { found: dtype });
        }
    }
    Ok(())
}
