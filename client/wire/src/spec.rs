//! What a client asks for and what it is told: the bodies of the `Open` and `Opened` messages.
//!
//! [`LoaderSpec`] is a peer's word: nothing in it is checked here. The daemon turns it into a plan or refuses it.
//! [`LoaderInfo`] is the daemon's answer: where in a slot each column lies, so that a client needs no other
//! knowledge of the dataset. Field names are part of the wire contract (`docs/protocol.md`).

use std::path::PathBuf;

use robocache_types::{DType, Interp};
use serde::{Deserialize, Serialize};

/// Everything a loader is made of. Times are seconds here, as the user wrote them; the daemon makes them `i64` ns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoaderSpec {
    pub dataset: DatasetRef,
    /// A manifest for a dataset that carries none: TOML text, read as `robocache.toml` would be.
    #[serde(default)]
    pub manifest: Option<String>,
    /// Samples in a batch; at least 1.
    pub batch_size: u32,
    /// Windows by stream, in the order the batch will have.
    #[serde(default)]
    pub windows: Option<Vec<(String, WindowSpec)>>,
    /// LeRobot's form: seconds by stream, taken as frame offsets `round(dt * fps)`.
    #[serde(default)]
    pub delta_timestamps: Option<Vec<(String, Vec<f64>)>>,
    /// Further streams, delivered at the anchor.
    #[serde(default)]
    pub features: Option<Vec<String>>,
    #[serde(default)]
    pub anchors: AnchorSpec,
    /// The stream whose frames the anchors are, where `anchors` is `Frames` and the dataset has no clock of its own.
    #[serde(default)]
    pub anchor_stream: Option<String>,
    /// Dtype that floating streams are cast to, unless `dtypes` says otherwise: float32, bfloat16, float16 or float64.
    #[serde(default = "float32")]
    pub dtype: DType,
    /// Dtype by stream.
    #[serde(default)]
    pub dtypes: Vec<(String, DType)>,
    /// `"cpu"`; where the daemon has GPUs `"cuda"` (its first), `"cuda:N"` as it numbers them, or `"cuda:GPU-..."`, the
    /// UUID, which is the same in every process whatever `CUDA_VISIBLE_DEVICES` says; `"sim:N"`, a simulated one.
    #[serde(default = "cpu")]
    pub device: String,
    #[serde(default)]
    pub shuffle: bool,
    #[serde(default)]
    pub seed: u64,
    #[serde(default)]
    pub drop_last: bool,
    /// `episode_index` values to draw from; absent: all.
    #[serde(default)]
    pub episodes: Option<Vec<i64>>,
    #[serde(default)]
    pub rank: u32,
    #[serde(default = "one")]
    pub world_size: u32,
    /// Batches the ring holds; at least 2. On a GPU the least: the daemon makes more to produce them in bursts.
    pub slots: u32,
    /// Where to begin.
    #[serde(default)]
    pub start: Position,
}

const fn float32() -> DType {
    DType::Float32
}

fn cpu() -> String {
    "cpu".to_owned()
}

const fn one() -> u32 {
    1
}

/// Which dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatasetRef {
    /// An absolute path on the daemon's host.
    Path(PathBuf),
    /// The name of a dataset the daemon serves (`--dataset NAME=PATH`).
    Name(String),
}

/// What the samples are built around.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnchorSpec {
    /// Every frame of the dataset, or of `anchor_stream`.
    #[default]
    Frames,
    /// The start of every episode.
    Episodes,
    /// A grid of this many hertz from the start of every episode to its end.
    Every { hz: f64 },
}

/// Time offsets from the anchor for one stream, in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowSpec {
    pub offsets: OffsetsSpec,
    /// Absent: the stream's own default.
    #[serde(default)]
    pub interp: Option<Interp>,
    /// Targets inside a hole longer than this many seconds are padded.
    #[serde(default)]
    pub max_gap: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OffsetsSpec {
    /// `start + k / hz` for `k < steps`.
    Grid { hz: f64, steps: u64, start: f64 },
    /// These.
    At(Vec<f64>),
}

/// A place in the endless sequence of epochs.
///
/// `consumed` counts samples of the epoch's global order (all ranks together) that are done with: ranks take
/// strides of that order, so after `k` batches each it is `k * batch_size * world_size`, and a loader of another
/// world size can go on from there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    pub epoch: u64,
    #[serde(default)]
    pub consumed: u64,
}

/// The daemon's answer to `Open`. Offsets and lengths are bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderInfo {
    /// The daemon's number for this client, also the owner in its slot words.
    pub client: u32,
    /// The daemon's process id.
    pub daemon_pid: u32,
    /// Identity of dataset, anchors and episode choice, in hex: a state belongs to loaders that share it.
    pub fingerprint: String,
    /// Samples of one epoch, over all ranks.
    pub anchors: u64,
    pub batch_size: u32,
    pub rank: u32,
    pub world_size: u32,
    pub drop_last: bool,
    pub slots: u32,
    /// Bytes of one slot, header included.
    pub slot_bytes: u64,
    /// Columns of a batch, in the order the user sees them.
    pub columns: Vec<ColumnInfo>,
    /// Sorted tables of text that columns of role `Text` index: byte lengths of each in the `texts` memfd, in order.
    pub text_tables: Vec<TextTableInfo>,
    /// Things worth telling the user once.
    pub warnings: Vec<String>,
    /// Where the loader is for a GPU: the part of the ring that lies there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuRing>,
}

/// The part of a ring in a GPU's memory: one allocation, slot `i` at `i * slot_bytes` of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuRing {
    pub kind: GpuKind,
    /// `GPU-` or `MIG-` and the 32 hex digits of the device's UUID, as `nvidia-smi -L` shows it.
    pub uuid: String,
    /// As its maker calls it, for people.
    pub name: String,
    /// Bytes of one slot there; a multiple of 256.
    pub slot_bytes: u64,
    /// Bytes of the allocation; at least `slots * slot_bytes`.
    pub bytes: u64,
    /// Of the allocation.
    pub memory: IpcHandle,
    /// One a slot: recorded when the slot's batch was made.
    pub ready: Vec<IpcHandle>,
}

/// What kind of device a ring is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GpuKind {
    /// Handles are CUDA's: `CUipcMemHandle`, `CUipcEventHandle`.
    Cuda,
    /// A memfd for memory and one for events ([`crate::sim`]).
    Sim,
}

/// A handle that another process opens: opaque, 64 bytes, in JSON 128 hex digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct IpcHandle(pub [u8; 64]);

impl std::fmt::Debug for IpcHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IpcHandle(..)") // a right to memory: not for logs
    }
}

impl Serialize for IpcHandle {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let hex: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&hex)
    }
}

impl<'de> Deserialize<'de> for IpcHandle {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let hex = String::deserialize(deserializer)?;
        let wrong = || {
            let digits = hex.bytes().filter(u8::is_ascii_hexdigit).count();
            let len = hex.len();
            serde::de::Error::custom(format!(
                "a handle is 128 hex digits, found {len} bytes with {digits} of them"
            ))
        };
        if hex.len() != 128 || !hex.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let mut bytes = [0; 64];
        for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_not_text| wrong())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_not_hex| wrong())?;
        }
        Ok(Self(bytes))
    }
}

/// One tensor of a batch: `[rows, shape...]` of `dtype`, contiguous, at `offset` of its slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnInfo {
    pub name: String,
    pub dtype: DType,
    /// Without the leading batch dimension.
    pub shape: Vec<u64>,
    /// From the start of the slot, in the memory that `place` says; a multiple of 64.
    pub offset: u64,
    pub role: ColumnRole,
    #[serde(default, skip_serializing_if = "Place::is_host")]
    pub place: Place,
}

/// Which part of a slot a column lies in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// The `data` memfd. Of a loader for a GPU: text codes only.
    #[default]
    Host,
    /// The GPU's memory.
    Device,
}

impl Place {
    fn is_host(&self) -> bool {
        *self == Self::Host
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ColumnRole {
    /// Data of a stream.
    Data,
    /// `<key>_is_pad`.
    Mask,
    /// `index`, `episode_index`, `frame_index`, `task_index`, `timestamp`, `t_ns`.
    Index,
    /// Int32 codes into a text table; the user sees a list of strings. A code of -1 is an empty string.
    Text { table: u32 },
}

/// A text table in the `texts` memfd: `count + 1` little-endian u32 offsets, then the UTF-8 bytes they cut up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextTableInfo {
    pub offset: u64,
    pub len: u64,
    pub count: u32,
}

#[cfg(test)]
mod tests {
    use super::IpcHandle;

    #[test]
    fn a_handle_that_is_none_says_how_it_differs() {
        let read = |text: &str| serde_json::from_str::<IpcHandle>(&format!("{text:?}"));
        assert_eq!(read(&"0aF0".repeat(32)).unwrap().0[..2], [0x0a, 0xf0]);
        for (text, found) in [("00".repeat(63), "126 bytes with 126"), ("0x".repeat(64), "128 bytes with 64")]
        {
            let error = read(&text).unwrap_err().to_string();
            assert!(error.contains(&format!("128 hex digits, found {found} of them")), "{error}");
        }
    }
}
