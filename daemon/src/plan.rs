//! From what a client asks for to what is built for every batch, or to the reason why not.
//!
//! A [`Plan`] is immutable and complete: which anchors in which order, which streams must be in memory, and for
//! every column of the batch where it lies in a slot and how it is made. Everything a request can get wrong about
//! the dataset is found here, before a slot is allocated; what only data can get wrong is found when it is read.

use std::collections::HashSet;

use robocache_formats::{Dataset, Layout, ReadError, StreamKind, TextTable};
use robocache_kernels::{Field, FieldKernel, Offsets};
use robocache_types::{ClockError, DType, Interp};
use robocache_wire::spec::{ColumnInfo, ColumnRole, LoaderSpec, OffsetsSpec, WindowSpec};

use crate::anchors::Anchors;
use crate::plan_anchors::{self, FRAME_CLOCK};
use crate::sampler::{Order, Shuffle};

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
    pub fingerprint: [u8; 16],
    pub warnings: Vec<String>,
}

/// A column of the batch, or of the batch and its mask.
#[derive(Debug)]
pub struct Column {
    pub source: Source,
    /// Of sample 0, from the start of the slot.
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
    RingTooLarge { bytes: u128, slots: u32, slot_bytes: u64, limit: u64 },
    #[error("anchors at {hz} Hz")]
    Grid { hz: f64, source: ClockError },
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// LeRobot's own index columns.
const INDEX_STREAMS: [&str; 5] = ["index", "episode_index", "frame_index", "task_index", "timestamp"];

impl Plan {
    /// Plans a loader. Reads clocks and text columns where the plan depends on them.
    pub fn new(dataset: &Dataset, spec: &LoaderSpec, limits: Limits) -> Result<Self, PlanError> {
        check_parameters(spec)?;
        let name = dataset.root().display().to_string();
        let frames = plan_anchors::frame_kind(dataset, spec, &name)?;
        let anchors = plan_anchors::plan(dataset, spec, &frames, &name)?;
        let mut builder = Builder {
            dataset,
            spec,
            limits,
            name,
            on_frames: frames.clock(),
            wanted: Vec::new(),
            keys: HashSet::new(),
            texts: Vec::new(),
        };
        builder.data_columns()?;
        builder.check_dtypes()?;
        let frame_anchors =
            frames.clock() == Some(FRAME_CLOCK) && matches!(dataset.layout(), Layout::LeRobot { .. });
        builder.index_columns(frame_anchors)?;
        builder.finish(anchors, frame_anchors)
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

/// A column asked for, before it has a place.
struct Wanted {
    key: String,
    shape: Vec<u64>,
    dtype: DType,
    role: ColumnRole,
    source: WantedSource,
    /// Targets of one sample and their shape, where there is a mask.
    mask: Option<(usize, Vec<u64>)>,
}

enum WantedSource {
    /// Position in `Dataset::streams`.
    Stream(usize, FieldKernel),
    TaskText(usize, usize),
    Index(Index),
}

struct Builder<'a> {
    dataset: &'a Dataset,
    spec: &'a LoaderSpec,
    limits: Limits,
    name: String,
    /// The clock whose rows the anchors are.
    on_frames: Option<usize>,
    wanted: Vec<Wanted>,
    keys: HashSet<String>,
    texts: Vec<TextTable>,
}

impl Builder<'_> {
    fn data_columns(&mut self) -> Result<(), PlanError> {
        let spec = self.spec;
        for (key, window) in spec.windows.iter().flatten() {
            let stream = self.stream(key)?;
            let offsets = Offsets::Times(self.window_offsets(key, window)?);
            self.push_stream(key, stream, offsets, window.interp, window.max_gap, Form::Window)?;
        }
        for (key, deltas) in spec.delta_timestamps.iter().flatten() {
            let stream = self.stream(key)?;
            let offsets = Offsets::Rows(self.frame_offsets(key, deltas)?);
            self.push_stream(key, stream, offsets, None, None, Form::Window)?;
        }
        let features = match (&spec.features, &spec.windows, &spec.delta_timestamps) {
            (Some(features), _, _) => features.clone(),
            (None, Some(_), _) => Vec::new(),
            (None, None, deltas) => self.default_features(deltas.is_some()),
        };
        for key in features {
            if INDEX_STREAMS.contains(&key.as_str()) && self.has_frame_index(&key) {
                continue; // every batch carries it already
            }
            let stream = self.stream(&key)?;
            let on_frames = self.on_frames == Some(self.dataset.streams()[stream].clock);
            let offsets = if on_frames { Offsets::Rows([0].into()) } else { Offsets::Times([0].into()) };
            let form = if on_frames { Form::Row } else { Form::Anchor };
            self.push_stream(&key, stream, offsets, None, None, form)?;
        }
        Ok(())
    }

    /// Every dtype asked for is of a column that there is: a misspelt key would go unnoticed for a whole training.
    fn check_dtypes(&self) -> Result<(), PlanError> {
        let mut seen = HashSet::new();
        for (key, _) in &self.spec.dtypes {
            if !self.wanted.iter().any(|wanted| wanted.key == *key) {
                let columns = self.wanted.iter().map(|wanted| wanted.key.clone()).collect();
                return Err(PlanError::NoColumn { key: key.clone(), columns });
            }
            if !seen.insert(key) {
                return Err(PlanError::Twice { key: format!("dtype of {key}") });
            }
        }
        Ok(())
    }

    /// Whether the index columns of a batch will hold this stream, row for row.
    fn has_frame_index(&self, key: &str) -> bool {
        matches!(self.dataset.layout(), Layout::LeRobot { .. })
            && self.on_frames.is_some()
            && self.dataset.streams().iter().any(|stream| stream.name == key)
    }

    fn default_features(&self, all: bool) -> Vec<String> {
        let taken = |name: &String| self.keys.contains(name) || INDEX_STREAMS.contains(&name.as_str());
        let wanted = |kind: &StreamKind| match kind {
            StreamKind::Numeric => true,
            StreamKind::Text => all,
            _ => false,
        };
        let streams = self.dataset.streams().iter().filter(|stream| wanted(&stream.kind));
        streams.map(|stream| stream.name.clone()).filter(|name| !taken(name)).collect()
    }

    fn stream(&self, key: &str) -> Result<usize, PlanError> {
        let streams = self.dataset.streams();
        let position =
            streams.iter().position(|stream| stream.name == key).ok_or_else(|| PlanError::NoStream {
                dataset: self.name.clone(),
                wanted: key.to_owned(),
                found: streams.iter().map(|stream| stream.name.clone()).collect(),
            })?;
        match &streams[position].kind {
            StreamKind::Opaque { what } => {
                Err(PlanError::Opaque { stream: key.to_owned(), what: what.clone() })
            }
            _ => Ok(position),
        }
    }

    fn window_offsets(&self, key: &str, window: &WindowSpec) -> Result<Box<[i64]>, PlanError> {
        let bad = |what, wanted, found| PlanError::Window { stream: key.to_owned(), what, wanted, found };
        let too_many =
            |steps| PlanError::TooManySteps { stream: key.to_owned(), steps, limit: self.limits.steps };
        if let Some(gap) = window.max_gap
            && !(gap > 0.0 && gap.is_finite())
        {
            return Err(bad("max_gap", "a positive number of seconds", gap.to_string()));
        }
        let offsets: Box<[i64]> = match &window.offsets {
            OffsetsSpec::Grid { hz, steps, start } => {
                if *steps == 0 {
                    return Err(bad("steps", "at least 1", "0".to_owned()));
                }
                if *steps > self.limits.steps {
                    return Err(too_many(*steps));
                }
                if !(hz.is_finite() && *hz > 0.0) {
                    return Err(bad("hz", "a positive number", hz.to_string()));
                }
                #[expect(clippy::cast_precision_loss, reason = "steps are far below 2^53")]
                let offset = |k: u64| seconds_to_ns(start + k as f64 / hz);
                (0..*steps).map(offset).collect::<Option<_>>().ok_or_else(|| {
                    bad(
                        "start and hz",
                        "offsets within 292 years",
                        format!("start {start} s, {steps} steps at {hz} Hz"),
                    )
                })?
            }
            OffsetsSpec::At(at) => {
                if at.is_empty() {
                    return Err(bad("at", "at least one offset", "none".to_owned()));
                }
                if at.len() as u64 > self.limits.steps {
                    return Err(too_many(at.len() as u64));
                }
                at.iter()
                    .map(|&seconds| {
                        seconds_to_ns(seconds)
                            .ok_or_else(|| bad("at", "finite seconds within 292 years", seconds.to_string()))
                    })
                    .collect::<Result<_, _>>()?
            }
        };
        Ok(offsets)
    }

    fn frame_offsets(&self, key: &str, deltas: &[f64]) -> Result<Box<[i64]>, PlanError> {
        let no_frames = || PlanError::NoFrames {
            dataset: self.name.clone(),
            layout: format!("of layout {:?}", self.dataset.layout()),
        };
        let fps = self.dataset.fps().ok_or_else(no_frames)?;
        if self.on_frames.is_none() {
            return Err(PlanError::Parameter {
                what: "delta_timestamps",
                wanted: "anchors=\"frames\"".to_owned(),
                found: format!("{:?}", self.spec.anchors),
            });
        }
        let bad = |wanted, found| PlanError::Window {
            stream: key.to_owned(),
            what: "delta_timestamps",
            wanted,
            found,
        };
        if deltas.is_empty() {
            return Err(bad("at least one offset", "none".to_owned()));
        }
        if deltas.len() as u64 > self.limits.steps {
            let steps = deltas.len() as u64;
            return Err(PlanError::TooManySteps { stream: key.to_owned(), steps, limit: self.limits.steps });
        }
        let frame = |&seconds: &f64| {
            if !(seconds.is_finite() && (seconds * fps).abs() < 9e15) {
                return Err(bad("finite seconds", seconds.to_string()));
            }
            let frames = (seconds * fps).round_ties_even();
            // LeRobot's own tolerance (tolerance_s) and test, check_delta_timestamps.
            if (frames / fps - seconds).abs() > 1e-4 {
                return Err(PlanError::OffGrid { stream: key.to_owned(), seconds, fps });
            }
            #[expect(clippy::cast_possible_truncation, reason = "whole and below 2^53")]
            Ok(frames as i64)
        };
        deltas.iter().map(frame).collect()
    }

    fn push_stream(
        &mut self,
        key: &str,
        stream: usize,
        offsets: Offsets,
        interp: Option<Interp>,
        max_gap: Option<f64>,
        form: Form,
    ) -> Result<(), PlanError> {
        let schema = &self.dataset.streams()[stream];
        let floating = schema.dtype.is_float() && schema.kind == StreamKind::Numeric;
        let default = if floating { Interp::Linear } else { Interp::Previous };
        let interp = interp.or(schema.interp).unwrap_or(default);
        let asked = self.spec.dtypes.iter().find(|(name, _)| name == key).map(|(_, dtype)| *dtype);
        let to = match (floating, asked) {
            (true, asked) => asked.unwrap_or(self.spec.dtype),
            (false, None) => schema.dtype,
            (false, Some(wanted)) => {
                return Err(PlanError::Cast { stream: key.to_owned(), from: schema.dtype, wanted });
            }
        };
        let steps = match &offsets {
            Offsets::Rows(offsets) | Offsets::Times(offsets) => offsets.len(),
        };
        #[expect(clippy::cast_possible_truncation, reason = "checked to be a positive number; saturates")]
        let max_gap_ns = max_gap.map(|seconds| (seconds * 1e9).round() as i64);
        let field = Field { offsets, interp, max_gap_ns, dim: schema.dim(), from: schema.dtype, to };
        let kernel = FieldKernel::new(field).map_err(|source| PlanError::Field {
            stream: key.to_owned(),
            interp,
            source,
        })?;
        let role = match schema.kind {
            StreamKind::Text => ColumnRole::Text { table: self.text_table(stream)? },
            _ => ColumnRole::Data,
        };
        let leading: &[u64] = match form {
            Form::Window => &[steps as u64],
            Form::Anchor | Form::Row => &[],
        };
        let shape = leading.iter().copied().chain(schema.shape.iter().map(|&n| n as u64)).collect();
        let mask = (form != Form::Row).then(|| (steps, leading.to_vec()));
        self.push(Wanted {
            key: key.to_owned(),
            shape,
            dtype: to,
            role,
            source: WantedSource::Stream(stream, kernel),
            mask,
        })
    }

    fn text_table(&mut self, stream: usize) -> Result<u32, PlanError> {
        let table = self.dataset.texts(stream)?;
        self.texts.push(table);
        Ok(u32::try_from(self.texts.len() - 1).expect("columns fit u32"))
    }

    fn push(&mut self, wanted: Wanted) -> Result<(), PlanError> {
        let mask = wanted.mask.is_some().then(|| format!("{}_is_pad", wanted.key));
        for key in std::iter::once(wanted.key.clone()).chain(mask) {
            if !self.keys.insert(key.clone()) {
                return Err(PlanError::Twice { key });
            }
        }
        self.wanted.push(wanted);
        Ok(())
    }

    /// `index` and its like, for every batch: LeRobot's own columns where the anchors are its frames.
    fn index_columns(&mut self, stored: bool) -> Result<(), PlanError> {
        let computed = [
            ("index", Index::Anchor),
            ("episode_index", Index::Episode),
            ("frame_index", Index::Frame),
            ("task_index", Index::Task),
            ("timestamp", Index::Timestamp),
        ];
        for (key, index) in computed {
            if self.keys.contains(key) {
                continue; // asked for over a window: that is what the key means then, as in LeRobot
            }
            let stream =
                stored.then(|| self.dataset.streams().iter().position(|stream| stream.name == key)).flatten();
            let dtype = if index == Index::Timestamp { DType::Float32 } else { DType::Int64 };
            let source = match stream {
                Some(stream) => self.index_from(stream, dtype)?,
                None => WantedSource::Index(index),
            };
            let (role, shape) = (ColumnRole::Index, Vec::new());
            self.push(Wanted { key: key.to_owned(), shape, dtype, role, source, mask: None })?;
        }
        let time = WantedSource::Index(Index::TimeNs);
        let (role, shape, dtype) = (ColumnRole::Index, Vec::new(), DType::Int64);
        self.push(Wanted { key: "t_ns".to_owned(), shape, dtype, role, source: time, mask: None })?;
        self.task_column(stored)
    }

    fn index_from(&self, stream: usize, to: DType) -> Result<WantedSource, PlanError> {
        let schema = &self.dataset.streams()[stream];
        let field = Field {
            offsets: Offsets::Rows([0].into()),
            interp: Interp::Previous,
            max_gap_ns: None,
            dim: schema.dim(),
            from: schema.dtype,
            to,
        };
        let kernel = FieldKernel::new(field).map_err(|source| PlanError::Field {
            stream: schema.name.clone(),
            interp: Interp::Previous,
            source,
        })?;
        Ok(WantedSource::Stream(stream, kernel))
    }

    fn task_column(&mut self, stored: bool) -> Result<(), PlanError> {
        if self.keys.contains("task") || self.dataset.tasks().is_empty() {
            return Ok(());
        }
        let streams = self.dataset.streams();
        let task_index =
            streams.iter().position(|s| s.name == "task_index" && s.dtype == DType::Int64 && s.dim() == 1);
        let Some(stream) = task_index.filter(|_| stored) else { return Ok(()) };
        let tasks = self.dataset.tasks();
        self.texts.push(tasks.into());
        let table = u32::try_from(self.texts.len() - 1).expect("columns fit u32");
        self.push(Wanted {
            key: "task".to_owned(),
            shape: Vec::new(),
            dtype: DType::Int32,
            role: ColumnRole::Text { table },
            source: WantedSource::TaskText(stream, tasks.len()),
            mask: None,
        })
    }

    fn finish(self, anchors: Anchors, frame_anchors: bool) -> Result<Plan, PlanError> {
        let streams_of = |wanted: &Wanted| match &wanted.source {
            WantedSource::Stream(stream, _) | WantedSource::TaskText(stream, _) => Some(*stream),
            WantedSource::Index(_) => None,
        };
        let mut streams: Vec<usize> = self.wanted.iter().filter_map(streams_of).collect();
        let on_clock = |stream: &usize| self.dataset.streams()[*stream].clock == FRAME_CLOCK;
        if frame_anchors && !streams.iter().any(on_clock) {
            // The anchors' times come with a stream of the frame clock; any small one will do.
            let clock = (0..self.dataset.streams().len())
                .filter(|&s| on_clock(&s) && self.dataset.streams()[s].kind == StreamKind::Numeric)
                .min_by_key(|&s| self.dataset.streams()[s].dim());
            streams.extend(clock);
        }
        streams.sort_unstable();
        streams.dedup();
        let frame_clock = frame_anchors.then(|| streams.iter().position(on_clock)).flatten();

        let rows = u64::from(self.spec.batch_size);
        let mut end = robocache_wire::batch::first_column_offset(self.spec.batch_size);
        let mut place = |bytes: u64| {
            let offset = end.next_multiple_of(ALIGN);
            end = offset.saturating_add(bytes.saturating_mul(rows));
            offset
        };
        let (mut columns, mut infos) = (Vec::new(), Vec::new());
        for wanted in self.wanted {
            let elements = wanted.shape.iter().fold(1_u64, |n, &d| n.saturating_mul(d));
            let bytes = elements.saturating_mul(wanted.dtype.size_bytes() as u64);
            let offset = place(bytes);
            infos.push(ColumnInfo {
                name: wanted.key.clone(),
                dtype: wanted.dtype,
                shape: wanted.shape,
                offset,
                role: wanted.role,
            });
            let mask = wanted.mask.map(|(steps, shape)| {
                let offset = place(steps as u64);
                let (name, role) = (format!("{}_is_pad", wanted.key), ColumnRole::Mask);
                infos.push(ColumnInfo { name, dtype: DType::Bool, shape, offset, role });
                (usize_of(offset), steps)
            });
            let nth = |stream| streams.binary_search(&stream).expect("listed above");
            let source = match wanted.source {
                WantedSource::Stream(stream, kernel) => Source::Stream { nth: nth(stream), kernel },
                WantedSource::TaskText(stream, tasks) => Source::TaskText { nth: nth(stream), tasks },
                WantedSource::Index(index) => Source::Index(index),
            };
            columns.push(Column { source, offset: usize_of(offset), bytes: usize_of(bytes), mask });
        }
        let slot_bytes = end.checked_next_multiple_of(4096).unwrap_or(u64::MAX);
        let bytes = u128::from(slot_bytes) * u128::from(self.spec.slots);
        if bytes > u128::from(self.limits.ring_bytes) {
            let (slots, limit) = (self.spec.slots, self.limits.ring_bytes);
            return Err(PlanError::RingTooLarge { bytes, slots, slot_bytes, limit });
        }
        let shuffle = if self.spec.shuffle { Shuffle::Keyed } else { Shuffle::Off };
        let order = Order::new(anchors.len(), self.spec.seed, shuffle);
        let fingerprint = plan_anchors::fingerprint(self.dataset, self.spec, &anchors);
        Ok(Plan {
            anchors,
            order,
            streams,
            frame_clock,
            columns,
            infos,
            texts: self.texts,
            slot_end: end,
            fingerprint,
            warnings: self.dataset.warnings(),
        })
    }
}

/// Columns begin on lines of their own, and 16-byte vector accesses are aligned.
const ALIGN: u64 = 64;

/// How a column is asked for, which decides its shape and mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// `[B, T, ..]` and a mask `[B, T]`.
    Window,
    /// At the anchor, on a clock of its own: `[B, ..]` and a mask `[B]`.
    Anchor,
    /// The anchor's own row: `[B, ..]`, never padded.
    Row,
}

fn usize_of(offset: u64) -> usize {
    // Larger than any ring, which is then refused; no column is ever placed there.
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// Seconds to the nearest nanosecond; none for what 64 bits cannot hold.
fn seconds_to_ns(seconds: f64) -> Option<i64> {
    let ns = (seconds * 1e9).round();
    #[expect(clippy::cast_possible_truncation, reason = "in range and whole")]
    (ns.is_finite() && ns.abs() < 9.2e18).then_some(ns as i64)
}
