#![expect(unsafe_code, reason = "maps memory that another process maps too")]
//! The memfds of a ring: made by the daemon, opened and checked by the client. Layout and seals: `docs/segment.md`.
//!
//! What must stay true:
//! - `control` is written by both processes at any time: it is touched through atomics only.
//! - `data` is written by the daemon only (the kernel holds clients to it by `F_SEAL_FUTURE_WRITE`), and only the slot
//!   that a `Claimed` stands for. Only a leased slot is read. So a `&mut [u8]` exists only while filling, a `&[u8]` only while leased.
//! - `texts` cannot change at all (`F_SEAL_WRITE`).
//! - The files cannot shrink (`F_SEAL_SHRINK`), so no access faults.
//!
//! The header is written once by the daemon and never read back by it. The client reads it once and checks the copy.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::consumer::Lease;
use crate::producer::Filling;
use crate::shape::PAGE;
pub use crate::shape::{HEADER_BYTES, SegmentError, Shape};
use crate::spec::LoaderInfo;
use crate::sync::{AtomicU64, Ordering};
use crate::words::{LINES_OFFSET, Line, Memory, WORDS_OFFSET, Words};

/// A page, as a length in memory.
const PAGE_LEN: usize = 4096;

/// The memfds to send to the client, in order.
#[derive(Debug)]
pub struct RingFds {
    pub control: OwnedFd,
    pub data: OwnedFd,
}

impl RingFds {
    /// For `Connection::send`, with `texts` where the loader has text tables.
    pub fn borrow<'a>(&'a self, texts: Option<&'a OwnedFd>) -> Vec<BorrowedFd<'a>> {
        [Some(&self.control), Some(&self.data), texts].into_iter().flatten().map(AsFd::as_fd).collect()
    }
}

const CONTROL_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);
const DATA_SEALS: SealFlags = CONTROL_SEALS.union(SealFlags::FUTURE_WRITE);
const TEXTS_SEALS: SealFlags = CONTROL_SEALS.union(SealFlags::WRITE);

/// The daemon's view of a ring's memory.
#[derive(Debug)]
pub struct DaemonSegment {
    control: Mapping,
    data: Mapping,
    shape: Shape,
}

impl DaemonSegment {
    /// Make a ring's memory: zeroed, sealed, header written.
    pub fn create(shape: Shape) -> Result<(Self, RingFds), SegmentError> {
        shape.check()?;
        let (control_bytes, data_bytes) = (shape.control_bytes(), shape.data_bytes()?);
        let control_fd = memfd("control", control_bytes)?;
        let control =
            Mapping::new("control", &control_fd, control_bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        let data_fd = memfd("data", data_bytes)?;
        let data = Mapping::new("data", &data_fd, data_bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        seal("control", &control_fd, control_bytes, CONTROL_SEALS)?;
        seal("data", &data_fd, data_bytes, DATA_SEALS)?;

        let mut padded = [0; HEADER_BYTES.next_multiple_of(8)];
        padded[..HEADER_BYTES].copy_from_slice(&shape.encode_header()?);
        for (word, bytes) in control.header().iter().zip(padded.chunks_exact(8)) {
            let mut le = [0; 8];
            le.copy_from_slice(bytes);
            word.store(u64::from_le_bytes(le), Ordering::Relaxed);
        }
        Ok((Self { control, data, shape }, RingFds { control: control_fd, data: data_fd }))
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }
}

/// The client's view of a ring's memory.
#[derive(Debug)]
pub struct ClientSegment {
    control: Mapping,
    data: Mapping,
    shape: Shape,
    fork: ForkMark,
}

impl ClientSegment {
    /// Map what the daemon sent and check all of it, against itself and against `info`.
    pub fn open(control_fd: impl AsFd, data_fd: impl AsFd, info: &LoaderInfo) -> Result<Self, SegmentError> {
        let control_bytes = sealed_size("control", &control_fd, CONTROL_SEALS)?;
        let data_bytes = sealed_size("data", &data_fd, DATA_SEALS)?;
        let wanted = LINES_OFFSET as u64;
        if control_bytes < wanted {
            return Err(SegmentError::Size { memfd: "control", wanted, found: control_bytes });
        }
        let control =
            Mapping::new("control", &control_fd, control_bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        let mut padded = [0; HEADER_BYTES.next_multiple_of(8)];
        for (word, bytes) in control.header().iter().zip(padded.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&padded[..HEADER_BYTES]);
        let shape = Shape::decode_header(&header)?;

        for (memfd, wanted, found) in
            [("control", shape.control_bytes(), control_bytes), ("data", shape.data_bytes()?, data_bytes)]
        {
            if wanted != found {
                return Err(SegmentError::Size { memfd, wanted, found });
            }
        }
        for (field, wanted, found) in [
            ("slots", u64::from(info.slots), u64::from(shape.slots)),
            ("slot_bytes", info.slot_bytes, shape.slot_bytes),
            ("batch_size", u64::from(info.batch_size), u64::from(shape.batch_size)),
            ("client", u64::from(info.client), u64::from(shape.client)),
            ("daemon_pid", u64::from(info.daemon_pid), u64::from(shape.daemon_pid)),
        ] {
            if wanted != found {
                return Err(SegmentError::Field { field, wanted, found });
            }
        }
        let data = Mapping::new("data", &data_fd, data_bytes, ProtFlags::READ)?;
        Ok(Self { control, data, shape, fork: ForkMark::new()? })
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Whether this process is a forked child of the one that opened the segment. No system call.
    #[inline]
    pub fn forked(&self) -> Forked {
        self.fork.look()
    }
}

impl Filling {
    /// The bytes of the slot being filled: [`Shape::slot_bytes`] of them, with whatever an older batch left there.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let slot = self.slot();
        let segment = self.segment();
        let (ptr, len) = segment.data.slot(slot, &segment.shape);
        // SAFETY: `Mapping::slot` gives a span inside the mapping, which lives as long as the producer that `self`
        // holds. No other reference to these bytes exists in this process: `self` holds the slot's only `Claimed`
        // (`ProducerRing` gives out one at a time, by its own `held`), and is borrowed mutably. No other process can write
        // them (F_SEAL_FUTURE_WRITE, set before the descriptor left this process), and initialised they are by the kernel.
        unsafe { std::slice::from_raw_parts_mut(ptr.as_ptr(), len) }
    }
}

impl Lease {
    /// The bytes of the leased slot: [`Shape::slot_bytes`] of them.
    pub fn bytes(&self) -> &[u8] {
        let slot = self.slot();
        let segment = self.segment();
        let (ptr, len) = segment.data.slot(slot, &segment.shape);
        // SAFETY: `Mapping::slot` gives a span inside the mapping, which lives as long as the consumer that `self`
        // holds and cannot shrink (F_SEAL_SHRINK, checked in `open`). The daemon writes only slots it claimed, and
        // cannot claim this one before `self` is dropped; nobody else can write them (F_SEAL_FUTURE_WRITE, checked).
        unsafe { std::slice::from_raw_parts(ptr.as_ptr(), len) }
    }
}

macro_rules! impl_memory {
    ($segment:ty) => {
        impl Memory for $segment {
            #[inline]
            fn words(&self) -> &Words {
                self.control.words()
            }

            #[inline]
            fn lines(&self) -> &[Line] {
                self.control.lines(&self.shape)
            }
        }
    };
}
impl_memory!(DaemonSegment);
impl_memory!(ClientSegment);

/// The text tables of a loader, whose bytes cannot change.
#[derive(Debug)]
pub struct Texts {
    mapping: Mapping,
}

impl Texts {
    /// A memfd with these bytes, sealed against any write.
    pub fn create(bytes: &[u8]) -> Result<OwnedFd, SegmentError> {
        let len_bytes = bytes.len() as u64;
        let fd = memfd("texts", len_bytes.max(1))?;
        let mut written = 0;
        while written < bytes.len() {
            let rest = bytes.get(written..).unwrap_or_default();
            match rustix::io::pwrite(&fd, rest, written as u64) {
                Ok(n) => written += n,
                Err(Errno::INTR) => {}
                Err(source) => {
                    return Err(SegmentError::System { call: "pwrite", memfd: "texts", len_bytes, source });
                }
            }
        }
        seal("texts", &fd, len_bytes, TEXTS_SEALS)?;
        Ok(fd)
    }

    /// Map a texts memfd.
    pub fn open(fd: impl AsFd) -> Result<Self, SegmentError> {
        let len_bytes = sealed_size("texts", &fd, TEXTS_SEALS)?;
        if len_bytes == 0 {
            return Err(SegmentError::Size { memfd: "texts", wanted: 1, found: 0 });
        }
        Ok(Self { mapping: Mapping::new("texts", &fd, len_bytes, ProtFlags::READ)? })
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is readable, this long and lives as long as `self`. F_SEAL_WRITE (checked in `open`)
        // means that no writable mapping exists and none can be made: the bytes never change.
        unsafe { std::slice::from_raw_parts(self.mapping.ptr.as_ptr(), self.mapping.len) }
    }
}

/// Whether this is still the process that opened the segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forked {
    /// The same process.
    Same,
    /// A forked child.
    Child,
}

/// A page that the kernel zeroes in forked children (`MADV_WIPEONFORK`), so that a child is told without a system call.
#[derive(Debug)]
struct ForkMark(Mapping);

impl ForkMark {
    fn new() -> Result<Self, SegmentError> {
        let system =
            |call| move |source| SegmentError::System { call, memfd: "fork mark", len_bytes: PAGE, source };
        let len = PAGE_LEN;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice aliases nothing.
        let ptr = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(system("mmap"))?;
        let mapping = Mapping { ptr: non_null(ptr.cast(), "fork mark", PAGE)?, len };
        // SAFETY: the range is exactly the mapping made above; wiping it in children changes nothing here.
        unsafe { rustix::mm::madvise(ptr, len, Advice::LinuxWipeOnFork) }.map_err(system("madvise"))?;
        let mark = Self(mapping);
        mark.word().store(1, Ordering::Relaxed);
        Ok(mark)
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: the mapping is a page, aligned to a page, readable and writable, and lives as long as `self`;
        // AtomicU64 is valid for all bytes, and nothing touches this page but through this.
        unsafe { self.0.ptr.cast::<AtomicU64>().as_ref() }
    }

    #[inline]
    fn look(&self) -> Forked {
        if self.word().load(Ordering::Relaxed) == 0 { Forked::Child } else { Forked::Same }
    }
}

/// A mapped range, unmapped on drop.
struct Mapping {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the range stays mapped until drop whatever thread looks at it. Access goes through atomics, or through slices that
// `Filling` (exclusive) and `Lease` (shared, of bytes that no one writes) hand out.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({} bytes)", self.len)
    }
}

impl Mapping {
    fn new(
        memfd: &'static str,
        fd: &impl AsFd,
        len_bytes: u64,
        protection: ProtFlags,
    ) -> Result<Self, SegmentError> {
        let failed = |source| SegmentError::System { call: "mmap", memfd, len_bytes, source };
        let len = usize::try_from(len_bytes).or(Err(Errno::NOMEM)).map_err(failed)?;
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of this process's.
        let ptr = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, fd, 0) }
            .map_err(failed)?;
        Ok(Self { ptr: non_null(ptr.cast(), memfd, len_bytes)?, len })
    }

    /// The 64 words of `control`'s first 512 bytes.
    fn header(&self) -> &[AtomicU64] {
        // SAFETY: every `control` mapping has at least 4096 bytes (`Shape::control_bytes`, and checked in `open`) and starts
        // at a page; AtomicU64 is valid for all bytes and may be shared with other processes.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().cast::<AtomicU64>(), WORDS_OFFSET / 8) }
    }

    #[inline]
    fn words(&self) -> &Words {
        // SAFETY: as in `header`: 512 + 384 bytes lie within 4096.
        let at = unsafe { self.ptr.add(WORDS_OFFSET) };
        // SAFETY: 512 is a multiple of Words' alignment of 64; its fields are atomics, valid for all bytes and free
        // to be changed by others, and its padding is never read.
        unsafe { at.cast::<Words>().as_ref() }
    }

    #[inline]
    fn lines(&self, shape: &Shape) -> &[Line] {
        // SAFETY: `Shape::control_bytes` is at least 4096 + 64 * slots, and the mapping is that long: the daemon made
        // it so, and the client checked it in `open`, before which it calls nothing that comes here.
        let at = unsafe { self.ptr.add(LINES_OFFSET) };
        // SAFETY: as above for the length; 4096 is a multiple of Line's alignment, and Line is made of atomics.
        unsafe { std::slice::from_raw_parts(at.as_ptr().cast::<Line>(), shape.slots as usize) }
    }

    /// Where slot `slot` lies in a `data` mapping.
    #[inline]
    fn slot(&self, slot: usize, shape: &Shape) -> (NonNull<u8>, usize) {
        let len = self.len / shape.slots as usize;
        assert!(
            slot < shape.slots as usize,
            "slots are given out by the ring, which has as many as the shape"
        );
        // SAFETY: `len * slots <= self.len` and `slot < slots`, so the slot begins and ends inside the mapping.
        (unsafe { self.ptr.add(slot * len) }, len)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` with this length, and nothing borrowed from `self` outlives it.
        let unmapped = unsafe { rustix::mm::munmap(self.ptr.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of a range we mapped: {unmapped:?}");
    }
}

fn non_null(ptr: *mut u8, memfd: &'static str, len_bytes: u64) -> Result<NonNull<u8>, SegmentError> {
    NonNull::new(ptr).ok_or(SegmentError::System { call: "mmap", memfd, len_bytes, source: Errno::NOMEM })
}

fn memfd(memfd: &'static str, len_bytes: u64) -> Result<OwnedFd, SegmentError> {
    let system = |call| move |source| SegmentError::System { call, memfd, len_bytes, source };
    let name = format!("robocache-{memfd}");
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(system("memfd_create"))?;
    rustix::fs::ftruncate(&fd, len_bytes).map_err(system("ftruncate"))?;
    Ok(fd)
}

fn seal(memfd: &'static str, fd: &OwnedFd, len_bytes: u64, seals: SealFlags) -> Result<(), SegmentError> {
    rustix::fs::fcntl_add_seals(fd, seals).map_err(|source| SegmentError::System {
        call: "fcntl(F_ADD_SEALS)",
        memfd,
        len_bytes,
        source,
    })
}

/// The size of a memfd that was sent to us, once its seals are such that the size stays true.
fn sealed_size(memfd: &'static str, fd: &impl AsFd, wanted: SealFlags) -> Result<u64, SegmentError> {
    let found = rustix::fs::fcntl_get_seals(fd).map_err(|source| SegmentError::NoMemfd { memfd, source })?;
    if !found.contains(wanted) {
        return Err(SegmentError::Seals { memfd, wanted, found });
    }
    let stat = rustix::fs::fstat(fd).map_err(|source| SegmentError::NoMemfd { memfd, source })?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}
