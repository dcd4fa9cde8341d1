//! What the fuzz targets do with their input. `tests/corpus.rs` does the same with the checked-in corpus, on stable.

use robocache_wire::batch::BatchHeader;
use robocache_wire::message::{Message, ToClient, ToDaemon};
use robocache_wire::segment::{ClientSegment, HEADER_BYTES, Shape};
use robocache_wire::spec::LoaderInfo;
use rustix::fs::{MemfdFlags, SealFlags};

/// Any bytes are a message or an error; a message that was decoded can be encoded and is the same again.
pub fn message(data: &[u8]) {
    if let Ok(message) = ToDaemon::decode(data)
        && let Ok(bytes) = message.encode()
    {
        assert_eq!(ToDaemon::decode(&bytes).expect("own bytes"), message);
    }
    if let Ok(message) = ToClient::decode(data)
        && let Ok(bytes) = message.encode()
    {
        assert_eq!(ToClient::decode(&bytes).expect("own bytes"), message);
    }
}

/// Any bytes as `control` are a segment or an error. The first two say how long the memfds are, in pages.
pub fn segment(data: &[u8]) {
    let [control_pages, data_pages, control @ ..] = data else { return };
    if let Ok(header) = BatchHeader::decode(control, 64) {
        assert!((1..=64).contains(&header.rows));
    }
    let Some(shape) =
        control.first_chunk::<HEADER_BYTES>().and_then(|header| Shape::decode_header(header).ok())
    else {
        return;
    };
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    let memfd = |bytes: &[u8], pages: u8, seals| {
        let fd =
            rustix::fs::memfd_create("fuzz", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memfd");
        let len = 4096 * u64::from(pages);
        rustix::io::pwrite(&fd, bytes, 0).expect("pwrite");
        rustix::fs::ftruncate(&fd, len).expect("ftruncate");
        rustix::fs::fcntl_add_seals(&fd, seals).expect("seals");
        fd
    };
    let control = memfd(control, *control_pages, seals);
    let data = memfd(&[], *data_pages, seals | SealFlags::FUTURE_WRITE);
    let info = LoaderInfo {
        client: shape.client,
        daemon_pid: shape.daemon_pid,
        fingerprint: String::new(),
        anchors: 0,
        batch_size: shape.batch_size,
        rank: 0,
        world_size: 1,
        drop_last: false,
        slots: shape.slots,
        slot_bytes: shape.slot_bytes,
        columns: Vec::new(),
        text_tables: Vec::new(),
        warnings: Vec::new(),
        gpu: None,
    };
    if let Ok(open) = ClientSegment::open(&control, &data, &info) {
        assert_eq!(*open.shape(), shape);
    }
}
