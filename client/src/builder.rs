//! What a loader is made of, as the user says it. Becomes a [`LoaderSpec`]; the daemon checks what it means.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use robocache_types::{DType, Interp};
use robocache_wire::spec::{AnchorSpec, DatasetRef, LoaderSpec, OffsetsSpec, Position, WindowSpec};

use crate::device_sim::{LateReads, Lateness};
use crate::error::ConnectError;
use crate::loader::Loader;

/// Time offsets from the anchor for one stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Window(WindowSpec);

impl Window {
    /// `steps` offsets, `1 / hz` seconds apart, the first at 0 (see [`Self::start`]).
    pub const fn new(hz: f64, steps: u64) -> Self {
        Self(WindowSpec { offsets: OffsetsSpec::Grid { hz, steps, start: 0.0 }, interp: None, max_gap: None })
    }

    /// Exactly these offsets, in seconds.
    pub fn at(offsets: impl IntoIterator<Item = f64>) -> Self {
        Self(WindowSpec {
            offsets: OffsetsSpec::At(offsets.into_iter().collect()),
            interp: None,
            max_gap: None,
        })
    }

    /// The first offset of a grid, in seconds; explicit offsets all move by it.
    #[must_use]
    pub fn start(mut self, seconds: f64) -> Self {
        match &mut self.0.offsets {
            OffsetsSpec::Grid { start, .. } => *start = seconds,
            OffsetsSpec::At(offsets) => {
                for offset in offsets {
                    *offset += seconds;
                }
            }
        }
        self
    }

    /// How values between rows are made; the stream's own default otherwise.
    #[must_use]
    pub const fn interp(mut self, interp: Interp) -> Self {
        self.0.interp = Some(interp);
        self
    }

    /// Targets inside a hole longer than this many seconds are padded.
    #[must_use]
    pub const fn max_gap(mut self, seconds: f64) -> Self {
        self.0.max_gap = Some(seconds);
        self
    }
}

/// What samples are built around.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum Anchors {
    /// Every frame of the dataset, or of the anchor stream.
    #[default]
    Frames,
    /// The start of every episode.
    Episodes,
    /// A grid of this many hertz over every episode.
    Every(f64),
}

/// When a daemon of this process's own is started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Embed {
    /// If no socket is named, no daemon answers and `$ROBOCACHE_DAEMON` or PATH has a program.
    #[default]
    Found,
    /// The same with this program.
    Program(PathBuf),
    Never,
}

/// Collects what a loader is made of; [`LoaderBuilder::connect`] makes it.
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until connect()"]
pub struct LoaderBuilder {
    pub(crate) spec: LoaderSpec,
    pub(crate) socket: Option<PathBuf>,
    pub(crate) embed: Embed,
    pub(crate) open_timeout: Duration,
    pub(crate) lateness: Option<Lateness>,
}

impl LoaderBuilder {
    /// `dataset` is a path if it exists or contains a `/`, else the name of a dataset the daemon serves.
    pub(crate) fn new(dataset: &Path) -> Self {
        let is_path = dataset.as_os_str().as_encoded_bytes().contains(&b'/') || dataset.exists();
        let dataset = if is_path {
            // It fails for an empty path or a lost working directory only; the daemon names the path it refuses.
            DatasetRef::Path(std::path::absolute(dataset).unwrap_or_else(|_| dataset.to_owned()))
        } else {
            DatasetRef::Name(dataset.to_string_lossy().into_owned())
        };
        let spec = LoaderSpec {
            dataset,
            manifest: None,
            batch_size: 0,
            windows: None,
            delta_timestamps: None,
            features: None,
            anchors: AnchorSpec::Frames,
            anchor_stream: None,
            dtype: DType::Float32,
            dtypes: Vec::new(),
            device: "cpu".to_owned(),
            shuffle: false,
            seed: 0,
            drop_last: false,
            episodes: None,
            rank: 0,
            world_size: 1,
            slots: 4,
            start: Position::default(),
        };
        Self::from_spec(spec)
    }

    /// A loader made of exactly this: for a client that says it all in the wire's own words.
    pub fn from_spec(spec: LoaderSpec) -> Self {
        let open_timeout = Duration::from_secs(120);
        Self { spec, socket: None, embed: Embed::default(), open_timeout, lateness: None }
    }

    /// Samples in a batch. Must be said.
    pub const fn batch_size(mut self, samples: u32) -> Self {
        self.spec.batch_size = samples;
        self
    }

    /// Deliver `key` at the offsets of `window`. Columns come in the order of these calls.
    pub fn window(mut self, key: impl Into<String>, window: Window) -> Self {
        self.spec.windows.get_or_insert_default().push((key.into(), window.0));
        self
    }

    /// LeRobot's form of a window: seconds, taken as frame offsets `round(dt * fps)`.
    pub fn delta_timestamps(
        mut self,
        key: impl Into<String>,
        seconds: impl IntoIterator<Item = f64>,
    ) -> Self {
        let seconds = seconds.into_iter().collect();
        self.spec.delta_timestamps.get_or_insert_default().push((key.into(), seconds));
        self
    }

    /// Further streams, delivered at the anchor.
    pub fn features<S: Into<String>>(mut self, keys: impl IntoIterator<Item = S>) -> Self {
        self.spec.features = Some(keys.into_iter().map(Into::into).collect());
        self
    }

    /// What samples are built around; every frame unless said otherwise.
    pub const fn anchors(mut self, anchors: Anchors) -> Self {
        self.spec.anchors = match anchors {
            Anchors::Frames => AnchorSpec::Frames,
            Anchors::Episodes => AnchorSpec::Episodes,
            Anchors::Every(hz) => AnchorSpec::Every { hz },
        };
        self
    }

    /// The stream whose frames are the anchors.
    pub fn anchor_stream(mut self, key: impl Into<String>) -> Self {
        self.spec.anchor_stream = Some(key.into());
        self
    }

    /// Dtype of floating streams; float32 unless said otherwise.
    pub const fn dtype(mut self, dtype: DType) -> Self {
        self.spec.dtype = dtype;
        self
    }

    /// Dtype of one stream.
    pub fn dtype_of(mut self, key: impl Into<String>, dtype: DType) -> Self {
        self.spec.dtypes.push((key.into(), dtype));
        self
    }

    /// Where batches live: `"cpu"` unless said otherwise. `"cuda:N"` counts the devices that this process sees, `"cuda"`
    /// is the one current in the calling thread, else the first, and `"cuda:GPU-..."` names one by its UUID. `"sim:N"` is a
    /// simulated one, of a daemon that was started with such.
    pub fn device(mut self, device: impl Into<String>) -> Self {
        self.spec.device = device.into();
        self
    }

    /// Whether epochs are shuffled; not unless said otherwise.
    pub const fn shuffle(mut self, shuffle: bool) -> Self {
        self.spec.shuffle = shuffle;
        self
    }

    /// Seed of the shuffle.
    pub const fn seed(mut self, seed: u64) -> Self {
        self.spec.seed = seed;
        self
    }

    /// Leave out what does not fill a batch on every rank.
    pub const fn drop_last(mut self, drop_last: bool) -> Self {
        self.spec.drop_last = drop_last;
        self
    }

    /// Draw from these `episode_index` values only.
    pub fn episodes(mut self, episodes: impl IntoIterator<Item = i64>) -> Self {
        self.spec.episodes = Some(episodes.into_iter().collect());
        self
    }

    /// This process's share: rank `rank` of `world_size`.
    pub const fn rank(mut self, rank: u32, world_size: u32) -> Self {
        self.spec.rank = rank;
        self.spec.world_size = world_size;
        self
    }

    /// Batches the ring holds, at least 2; 4 unless said otherwise.
    pub const fn slots(mut self, slots: u32) -> Self {
        self.spec.slots = slots;
        self
    }

    /// The daemon's socket. Absent: `$ROBOCACHE_SOCKET`, the default path, else an embedded daemon.
    pub fn socket(mut self, path: impl Into<PathBuf>) -> Self {
        self.socket = Some(path.into());
        self
    }

    /// A manifest for a dataset that carries none: the text of a `robocache.toml`.
    pub fn manifest(mut self, toml: impl Into<String>) -> Self {
        self.spec.manifest = Some(toml.into());
        self
    }

    /// Where to begin.
    pub const fn start(mut self, position: Position) -> Self {
        self.spec.start = position;
        self
    }

    /// The `robocached` to start where no socket is named and no daemon answers. Absent: `$ROBOCACHE_DAEMON`, or PATH's.
    pub fn embedded(mut self, program: impl Into<PathBuf>) -> Self {
        self.embed = Embed::Program(program.into());
        self
    }

    /// Never start a daemon.
    pub fn no_embedded(mut self) -> Self {
        self.embed = Embed::Never;
        self
    }

    /// How long to wait for the daemon's answer (it may have to index the dataset); 120 s unless said otherwise.
    pub const fn open_timeout(mut self, limit: Duration) -> Self {
        self.open_timeout = limit;
        self
    }

    /// Let the reads of a simulated device's batches end `by` after their release, and see whether they were left alone.
    #[doc(hidden)]
    pub fn late_reads(mut self, by: Duration, found: Arc<Mutex<LateReads>>) -> Self {
        self.lateness = Some(Lateness { by, found });
        self
    }

    /// What will be sent to the daemon, but that of a CUDA device it sends the UUID.
    pub const fn spec(&self) -> &LoaderSpec {
        &self.spec
    }

    /// Attach to the daemon.
    pub fn connect(&self) -> Result<Loader, ConnectError> {
        self.connect_with(|| ControlFlow::Continue(()))
    }

    /// As [`Self::connect`], asking `go_on` about every 100 ms whether to keep waiting for the answer.
    pub fn connect_with(&self, mut go_on: impl FnMut() -> ControlFlow<()>) -> Result<Loader, ConnectError> {
        let wrong =
            |what, wanted, found: u32| Err(ConnectError::Argument { what, wanted, found: found.to_string() });
        let LoaderSpec { batch_size, slots, rank, world_size, .. } = self.spec;
        match () {
            () if batch_size == 0 => wrong("batch_size", "at least 1", batch_size),
            () if slots < 2 => wrong("slots", "at least 2", slots),
            () if world_size == 0 => wrong("world_size", "at least 1", world_size),
            () if rank >= world_size => wrong("rank", "below world_size", rank),
            () => crate::connect::connect(self, &mut go_on),
        }
    }
}
