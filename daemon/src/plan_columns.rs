//! The columns of a batch that a client asked for, by name, and those that every batch has, before they have places.
//!
//! Owns what a key means: which stream, over which offsets, with which interpolation, dtype, shape and mask, and
//! which keys are there though nobody asked. No key comes twice. A column's place is `plan_layout`'s.

use std::collections::HashSet;

use robocache_formats::{Dataset, Layout, StreamKind, TextTable};
use robocache_kernels::{Field, FieldKernel, Offsets};
use robocache_types::{DType, Interp};
use robocache_wire::spec::{ColumnRole, LoaderSpec};

use crate::plan::{Index, Limits, PlanError};
use crate::plan_offsets;

/// All columns of a batch, in their order, and the texts that they point into.
pub(crate) struct Asked {
    pub(crate) columns: Vec<Wanted>,
    pub(crate) texts: Vec<TextTable>,
}

/// A column asked for, before it has a place.
pub(crate) struct Wanted {
    pub(crate) key: String,
    pub(crate) shape: Vec<u64>,
    pub(crate) dtype: DType,
    pub(crate) role: ColumnRole,
    pub(crate) source: WantedSource,
    /// Targets of one sample and their shape, where there is a mask.
    pub(crate) mask: Option<(usize, Vec<u64>)>,
}

pub(crate) enum WantedSource {
    /// Position in `Dataset::streams`.
    Stream(usize, FieldKernel),
    TaskText(usize, usize),
    Index(Index),
}

/// The columns of a loader. `on_frames` is the clock whose rows the anchors are; `stored` is whether these are a
/// LeRobot dataset's own frames, with index columns of their own.
pub(crate) fn asked(
    dataset: &Dataset,
    spec: &LoaderSpec,
    limits: Limits,
    name: &str,
    on_frames: Option<usize>,
    stored: bool,
) -> Result<Asked, PlanError> {
    let (wanted, keys, texts) = (Vec::new(), HashSet::new(), Vec::new());
    let mut builder = Builder { dataset, spec, limits, name, on_frames, wanted, keys, texts };
    builder.data_columns()?;
    builder.check_dtypes()?;
    builder.index_columns(stored)?;
    Ok(Asked { columns: builder.wanted, texts: builder.texts })
}

/// LeRobot's own index columns.
const INDEX_STREAMS: [&str; 5] = ["index", "episode_index", "frame_index", "task_index", "timestamp"];

struct Builder<'a> {
    dataset: &'a Dataset,
    spec: &'a LoaderSpec,
    limits: Limits,
    name: &'a str,
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
            let offsets = Offsets::Times(plan_offsets::of_window(key, window, self.limits)?);
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
                dataset: self.name.to_owned(),
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

    fn frame_offsets(&self, key: &str, deltas: &[f64]) -> Result<Box<[i64]>, PlanError> {
        let no_frames = || PlanError::NoFrames {
            dataset: self.name.to_owned(),
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
        plan_offsets::of_deltas(key, deltas, fps, self.limits)
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
}

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
