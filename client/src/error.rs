//! What can go wrong, for the one who attaches and for the one who iterates: wanted, found, and how to go on.

use std::path::PathBuf;
use std::time::Duration;

use robocache_types::DType;
use robocache_wire::fds::SocketError;
use robocache_wire::message::RefusalCode;
use robocache_wire::segment::SegmentError;
use robocache_wire::spec::Position;

/// No loader could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    #[error("{what} must be {wanted}, found {found}")]
    Argument { what: &'static str, wanted: &'static str, found: String },
    #[error(
        "no robocached answers on {path:?} ({}): start one with `robocached serve --socket {}`{}",
        why(*.errno), path.display(), hint(*.explicit)
    )]
    NoDaemon { path: PathBuf, errno: rustix::io::Errno, explicit: Named },
    #[error(
        "the daemon on {path:?} runs as user {uid}, which is neither you, nor root, nor the owner of the socket's \
         directory: its batches are not trusted. Start your own with `robocached serve --socket PATH`"
    )]
    NotTrusted { path: PathBuf, uid: u32 },
    #[error(
        "not allowed to connect to {path:?}: the socket is another user's. Start your own daemon with \
         `robocached serve --socket PATH`, or have its owner serve your group (serve --group NAME)"
    )]
    NotAllowed { path: PathBuf },
    #[error("robocached refuses ({}): {message}", .code.name())]
    Refused { code: RefusalCode, message: String },
    #[error("robocached closed the connection on {path:?} instead of answering; its log says why")]
    HungUp { path: PathBuf },
    #[error(
        "robocached on {path:?} did not answer within {limit:?}; a large dataset is indexed once, raise open_timeout"
    )]
    TimedOut { path: PathBuf, limit: Duration },
    #[error("interrupted while waiting for robocached's answer")]
    Interrupted,
    #[error("robocached on {path:?} breaks the protocol: {what}")]
    Protocol { path: PathBuf, what: String },
    /// The ring was made, and cannot be opened here; or the device that was named is none.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
}

/// Who named the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// The program, or `$ROBOCACHE_SOCKET`: then it is that daemon or none.
    Explicitly,
    /// Nobody: the default path, and an embedded daemon where a program for it is found.
    ByDefault,
}

fn why(errno: rustix::io::Errno) -> &'static str {
    match errno {
        rustix::io::Errno::NOENT => "there is no such socket",
        rustix::io::Errno::CONNREFUSED => "the socket is a dead daemon's",
        _ => "it cannot be reached",
    }
}

const fn hint(named: Named) -> &'static str {
    match named {
        Named::Explicitly => "; for a daemon of this process's own, name no socket",
        Named::ByDefault => {
            ", or install `robocached` where PATH or $ROBOCACHE_DAEMON finds it, and it is started for you"
        }
    }
}

/// The embedded daemon did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmbeddedError {
    #[error("cannot make a private directory for the embedded daemon's socket in {path:?}")]
    Directory { path: PathBuf, source: std::io::Error },
    #[error("cannot run {program:?} as the embedded daemon")]
    Spawn { program: PathBuf, source: std::io::Error },
    #[error("the embedded daemon {program:?} ended at once ({status}); it said: {stderr}")]
    Ended { program: PathBuf, status: String, stderr: String },
    #[error("the embedded daemon {program:?} did not open its socket within {limit:?}; it said: {stderr}")]
    TimedOut { program: PathBuf, limit: Duration, stderr: String },
}

/// The next batch cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoaderError {
    #[error(
        "robocached (process {pid}) is gone. Batches in hand stay valid; start it again, attach anew and go on at \
         epoch {}, consumed {} (position(), state_dict())", .position.epoch, .position.consumed
    )]
    DaemonGone { pid: u32, position: Position },
    #[error("{message} (at epoch {}, consumed {}; seek elsewhere to go on)", .position.epoch, .position.consumed)]
    Failed { message: String, position: Position },
    #[error(
        "robocached is stopping ({reason}). Attach to the next one and go on at epoch {}, consumed {}",
        .position.epoch, .position.consumed
    )]
    Draining { reason: String, position: Position },
    #[error(
        "all {slots} slots of the ring are held by this process, so no batch can come: drop batches (and views of \
         them) when done, copy what must stay, or raise slots="
    )]
    AllSlotsHeld { slots: u32 },
    #[error("this loader was connected before a fork: connect again in the child process")]
    Forked,
    #[error("position consumed={consumed} lies beyond the {anchors} samples of an epoch")]
    Position { consumed: u64, anchors: u64 },
    #[error("robocached refuses ({}): {message}", .code.name())]
    Refused { code: RefusalCode, message: String },
    #[error("robocached breaks the protocol: {what}")]
    Protocol { what: String },
    #[error(transparent)]
    Socket(#[from] SocketError),
}

/// A GPU, or a ring on one, cannot be had or used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    #[error(
        "device must be \"cpu\", \"cuda\", \"cuda:N\", \"cuda:GPU-<uuid>\" or, for tests, \"sim:N\", found {found:?}"
    )]
    Name { found: String },
    #[error(
        "no CUDA driver was found (libcuda.so.1): install NVIDIA's driver, give the container its GPUs, or use device \"cpu\""
    )]
    NoDriver,
    #[error(
        "CUDA cannot be used in a process forked from one that uses it: start processes by spawn (torch: \
         multiprocessing_context=\"spawn\"), use no worker processes (the daemon prefetches), or use device \"cpu\""
    )]
    Forked,
    #[error(
        "device {wanted:?} is not among those that this process sees: {}. Look at CUDA_VISIBLE_DEVICES here and of the \
         daemon, and which GPUs the container was given", listed(.seen)
    )]
    NotVisible { wanted: String, seen: Vec<String> },
    #[error("{call} failed: {what}{}{cure}", if .cure.is_empty() { "" } else { ". " })]
    Call { call: &'static str, what: String, cure: String },
    #[error(
        "stream {stream:#x} is being captured into a CUDA graph, whose replays would read this slot when it holds other \
         batches: copy the batch to a tensor of your own outside the capture, and capture work on that"
    )]
    Capturing { stream: u64 },
    #[error(
        "stream {stream:#x} belongs to another device than the batch, which is on {uuid}: use one of that device's"
    )]
    OtherDevice { stream: u64, uuid: String },
    #[error("robocached's ring on {uuid} is not what it says: {what}")]
    Ring { uuid: String, what: String },
}

fn listed(uuids: &[String]) -> String {
    if uuids.is_empty() { "none".to_owned() } else { uuids.join(", ") }
}

/// A column is not what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ColumnError {
    #[error("a batch has no column {wanted:?}; it has {found:?}")]
    Missing { wanted: String, found: Vec<String> },
    #[error("column {name:?} is {found}, {wanted} was asked for")]
    DType { name: String, wanted: DType, found: DType },
    #[error("column {name:?} is text: ask for text({name:?})")]
    IsText { name: String },
    #[error("column {name:?} is {found}, not text: ask for tensor({name:?})")]
    NotText { name: String, found: DType },
    #[error("column {name:?} holds bytes that are no {dtype}")]
    Bits { name: String, dtype: DType },
    #[error("row {row} of column {name:?} has code {code}; its text table has {count} strings")]
    TextCode { name: String, row: usize, code: i32, count: u32 },
    #[error(
        "column {name:?} is in the memory of {device}: ask for device_tensor({name:?}), and to_host() for a copy"
    )]
    OnDevice { name: String, device: String },
    #[error("column {name:?} is in host memory: ask for tensor({name:?}) or text({name:?})")]
    OnHost { name: String },
}
