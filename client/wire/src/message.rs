//! The messages of the socket: one datagram each, a 16-byte header and a JSON body. Normative: `docs/protocol.md`.
//!
//! Decoding takes any bytes and never panics: what a peer sends is an allegation. The header's magic, version and
//! body length have the same place in every version, so that two versions can tell each other which they are.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::spec::{IpcHandle, LoaderInfo, LoaderSpec, OffsetsSpec, Position};

/// `RC01` in a hex dump.
pub const MAGIC: u32 = u32::from_le_bytes(*b"RC01");
/// The version of protocol and segment that this crate speaks.
pub const VERSION: u16 = 1;
/// Bytes before the body.
pub const HEADER_BYTES: usize = 16;
/// The longest body, in bytes.
pub const BODY_LIMIT: usize = 128 * 1024;
/// The longest datagram, in bytes.
pub const DATAGRAM_LIMIT: usize = HEADER_BYTES + BODY_LIMIT;

/// What a client says.
#[derive(Debug, Clone, PartialEq)]
pub enum ToDaemon {
    /// Make a loader. Answered with [`ToClient::Opened`] or [`ToClient::Refused`].
    Open(Box<LoaderSpec>),
    /// Go on elsewhere: begins run `run`, one higher than the last. No answer.
    Seek { run: u32, position: Position },
    /// Answered with [`ToClient::StatusReply`].
    Status,
    /// Stop the daemon, draining first unless `now`. Answered with [`ToClient::Stopping`].
    Stop { now: bool },
    /// The close that follows is meant. Of a loader for a GPU: and everything of the ring there is closed.
    Bye,
    /// A loader for a GPU: the ring is open on this side. One event a slot, which this client records when it is done
    /// with what it leased. Nothing is produced before this came. No answer.
    Attached { done: Vec<IpcHandle> },
}

/// What the daemon says.
#[derive(Debug, Clone, PartialEq)]
pub enum ToClient {
    /// Carries descriptors: control, data, texts where there are text tables, and a simulated device's memory and events.
    Opened(Box<LoaderInfo>),
    Refused {
        code: RefusalCode,
        message: String,
    },
    /// Batch `seq` of `run` cannot be made, nor any after it.
    Failed {
        run: u32,
        seq: u64,
        message: String,
    },
    /// The daemon is about to stop; what is published or being filled still comes.
    Draining {
        reason: String,
    },
    StatusReply(serde_json::Value),
    Stopping {
        pid: u32,
    },
}

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RefusalCode {
    /// The client asked for what cannot be.
    BadRequest,
    /// No such dataset.
    NotFound,
    /// This user may not.
    NotAllowed,
    /// The dataset is broken; the message says file, column and row.
    Dataset,
    /// The daemon has no such device.
    UnsupportedDevice,
    /// A limit of the daemon's is reached.
    Busy,
    /// A bug of the daemon's.
    Internal,
}

impl RefusalCode {
    /// The code as it is on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::NotFound => "not_found",
            Self::NotAllowed => "not_allowed",
            Self::Dataset => "dataset",
            Self::UnsupportedDevice => "unsupported_device",
            Self::Busy => "busy",
            Self::Internal => "internal",
        }
    }
}

/// A message that cannot be sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    #[error("{kind} would take {found} bytes, the limit is {BODY_LIMIT}; its longest part is {longest}")]
    TooLong { kind: &'static str, found: usize, longest: String },
    #[error("{field} is {value}, which is not a number of seconds or hertz")]
    NotFinite { field: String, value: f64 },
    #[error("{kind} does not become JSON")]
    Json { kind: &'static str, source: serde_json::Error },
}

/// A datagram that is no message of ours.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    #[error("a message has at least {HEADER_BYTES} bytes, this one {found}")]
    Short { found: usize },
    #[error("this is not RoboCache: magic {MAGIC:#010x} wanted, found {found:#010x}")]
    Magic { found: u32 },
    #[error(
        "the peer speaks version {found} of the RoboCache protocol, this program version {VERSION}: upgrade {}",
        if *found < VERSION { "the peer, then restart it" } else { "this program" }
    )]
    Version { found: u16 },
    #[error("{kind} is not a kind of message that may come from this side")]
    Kind { kind: u16 },
    #[error("the header says {said} bytes of body, {found} came; the limit is {BODY_LIMIT}")]
    Length { said: u32, found: usize },
    #[error("the reserved field of the header is {found:#x}, not 0")]
    Reserved { found: u32 },
    #[error("the body of {kind} is not what it should be")]
    Json { kind: &'static str, source: serde_json::Error },
}

/// Something that travels in a datagram.
pub trait Message: Sized {
    /// The datagram.
    fn encode(&self) -> Result<Vec<u8>, EncodeError>;
    /// The message in a datagram.
    fn decode(datagram: &[u8]) -> Result<Self, DecodeError>;
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Empty {}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Seek {
    run: u32,
    position: Position,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Attached {
    done: Vec<IpcHandle>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stop {
    now: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Refused {
    code: RefusalCode,
    message: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Failed {
    run: u32,
    seq: u64,
    message: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Draining {
    reason: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stopping {
    pid: u32,
}

const OPEN: u16 = 1;
const SEEK: u16 = 2;
const STATUS: u16 = 3;
const STOP: u16 = 4;
const BYE: u16 = 5;
const ATTACHED: u16 = 6;
const OPENED: u16 = 65;
const REFUSED: u16 = 66;
const FAILED: u16 = 67;
const DRAINING: u16 = 68;
const STATUS_REPLY: u16 = 69;
const STOPPING: u16 = 70;

impl Message for ToDaemon {
    fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        match self {
            Self::Open(spec) => {
                // JSON has no NaN: serde_json would write null, which reads back as "absent".
                check_finite(spec)?;
                datagram(OPEN, "Open", spec)
            }
            Self::Seek { run, position } => datagram(SEEK, "Seek", &Seek { run: *run, position: *position }),
            Self::Status => datagram(STATUS, "Status", &Empty {}),
            Self::Stop { now } => datagram(STOP, "Stop", &Stop { now: *now }),
            Self::Bye => datagram(BYE, "Bye", &Empty {}),
            Self::Attached { done } => datagram(ATTACHED, "Attached", &Attached { done: done.clone() }),
        }
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (kind, body) = open(bytes)?;
        Ok(match kind {
            OPEN => Self::Open(Box::new(json("Open", body)?)),
            SEEK => {
                let Seek { run, position } = json("Seek", body)?;
                Self::Seek { run, position }
            }
            STATUS => json("Status", body).map(|Empty {}| Self::Status)?,
            STOP => json("Stop", body).map(|Stop { now }| Self::Stop { now })?,
            BYE => json("Bye", body).map(|Empty {}| Self::Bye)?,
            ATTACHED => json("Attached", body).map(|Attached { done }| Self::Attached { done })?,
            kind => return Err(DecodeError::Kind { kind }),
        })
    }
}

impl Message for ToClient {
    fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        match self {
            Self::Opened(info) => datagram(OPENED, "Opened", info),
            Self::Refused { code, message } => {
                datagram(REFUSED, "Refused", &Refused { code: *code, message: message.clone() })
            }
            Self::Failed { run, seq, message } => {
                datagram(FAILED, "Failed", &Failed { run: *run, seq: *seq, message: message.clone() })
            }
            Self::Draining { reason } => datagram(DRAINING, "Draining", &Draining { reason: reason.clone() }),
            Self::StatusReply(value) => datagram(STATUS_REPLY, "StatusReply", value),
            Self::Stopping { pid } => datagram(STOPPING, "Stopping", &Stopping { pid: *pid }),
        }
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (kind, body) = open(bytes)?;
        Ok(match kind {
            OPENED => Self::Opened(Box::new(json("Opened", body)?)),
            REFUSED => {
                let Refused { code, message } = json("Refused", body)?;
                Self::Refused { code, message }
            }
            FAILED => {
                let Failed { run, seq, message } = json("Failed", body)?;
                Self::Failed { run, seq, message }
            }
            DRAINING => json("Draining", body).map(|Draining { reason }| Self::Draining { reason })?,
            STATUS_REPLY => Self::StatusReply(json("StatusReply", body)?),
            STOPPING => json("Stopping", body).map(|Stopping { pid }| Self::Stopping { pid })?,
            kind => return Err(DecodeError::Kind { kind }),
        })
    }
}

fn datagram(kind: u16, name: &'static str, body: &impl Serialize) -> Result<Vec<u8>, EncodeError> {
    let mut bytes = vec![0; HEADER_BYTES];
    serde_json::to_writer(&mut bytes, body).map_err(|source| EncodeError::Json { kind: name, source })?;
    let found = bytes.len() - HEADER_BYTES;
    let len = match u32::try_from(found) {
        Ok(len) if found <= BODY_LIMIT => len,
        _ => return Err(EncodeError::TooLong { kind: name, found, longest: longest(body) }),
    };
    bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
    bytes[6..8].copy_from_slice(&kind.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    Ok(bytes)
}

/// The field of an over-long body that takes most of it, with its length.
fn longest(body: &impl Serialize) -> String {
    let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(body) else {
        return "the whole of it".to_owned();
    };
    fields
        .iter()
        .map(|(name, value)| (value.to_string().len(), name))
        .max()
        .map_or_else(|| "nothing".to_owned(), |(len, name)| format!("{name:?} with {len} bytes"))
}

fn open(bytes: &[u8]) -> Result<(u16, &[u8]), DecodeError> {
    let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(DecodeError::Short { found: bytes.len() });
    };
    let [m0, m1, m2, m3, v0, v1, k0, k1, l0, l1, l2, l3, r0, r1, r2, r3] = *header;
    let magic = u32::from_le_bytes([m0, m1, m2, m3]);
    if magic != MAGIC {
        return Err(DecodeError::Magic { found: magic });
    }
    let version = u16::from_le_bytes([v0, v1]);
    if version != VERSION {
        return Err(DecodeError::Version { found: version });
    }
    let said = u32::from_le_bytes([l0, l1, l2, l3]);
    if body.len() > BODY_LIMIT || u32::try_from(body.len()) != Ok(said) {
        return Err(DecodeError::Length { said, found: body.len() });
    }
    let reserved = u32::from_le_bytes([r0, r1, r2, r3]);
    if reserved != 0 {
        return Err(DecodeError::Reserved { found: reserved });
    }
    Ok((u16::from_le_bytes([k0, k1]), body))
}

fn json<T: DeserializeOwned>(kind: &'static str, body: &[u8]) -> Result<T, DecodeError> {
    serde_json::from_slice(body).map_err(|source| DecodeError::Json { kind, source })
}

fn check_finite(spec: &LoaderSpec) -> Result<(), EncodeError> {
    let check = |field: &dyn Fn() -> String, value: f64| {
        if value.is_finite() { Ok(()) } else { Err(EncodeError::NotFinite { field: field(), value }) }
    };
    if let crate::spec::AnchorSpec::Every { hz } = spec.anchors {
        check(&|| "anchors: hz".to_owned(), hz)?;
    }
    for (key, window) in spec.windows.iter().flatten() {
        match &window.offsets {
            OffsetsSpec::Grid { hz, start, .. } => {
                check(&|| format!("window {key:?}: hz"), *hz)?;
                check(&|| format!("window {key:?}: start"), *start)?;
            }
            OffsetsSpec::At(offsets) => {
                for at in offsets {
                    check(&|| format!("window {key:?}: an offset"), *at)?;
                }
            }
        }
        if let Some(max_gap) = window.max_gap {
            check(&|| format!("window {key:?}: max_gap"), max_gap)?;
        }
    }
    for (key, deltas) in spec.delta_timestamps.iter().flatten() {
        for delta in deltas {
            check(&|| format!("delta_timestamps {key:?}"), *delta)?;
        }
    }
    Ok(())
}
