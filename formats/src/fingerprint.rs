//! The identity of a dataset's content, as far as its metadata tells.
//!
//! The same bytes must give the same fingerprint on every machine and in every later version: what is hashed is
//! written out below, length-prefixed and little-endian, and the hash is XXH3-128.

use twox_hash::XxHash3_128;

use crate::dataset::{Layout, StreamKind};
use crate::layout::LayoutReader;

pub(crate) fn fingerprint(reader: &dyn LayoutReader) -> [u8; 16] {
    let mut bytes = Vec::new();
    match reader.layout() {
        Layout::LeRobot { version } => {
            text(&mut bytes, "lerobot");
            text(&mut bytes, version);
        }
        Layout::Streams => text(&mut bytes, "streams"),
        Layout::Frames => text(&mut bytes, "frames"),
        Layout::Nested => text(&mut bytes, "nested"),
    }
    number(&mut bytes, reader.fps().map_or(u64::MAX, f64::to_bits));
    number(&mut bytes, reader.streams().len() as u64);
    for stream in reader.streams() {
        text(&mut bytes, &stream.name);
        number(&mut bytes, u64::from(stream.dtype.code()));
        number(&mut bytes, stream.shape.len() as u64);
        stream.shape.iter().for_each(|length| number(&mut bytes, *length as u64));
        number(&mut bytes, stream.clock as u64);
        number(
            &mut bytes,
            match stream.kind {
                StreamKind::Numeric => 0,
                StreamKind::Text => 1,
                StreamKind::Opaque { .. } => 2,
            },
        );
    }
    number(&mut bytes, reader.episodes().len() as u64);
    for episode in reader.episodes() {
        bytes.extend_from_slice(&episode.index.to_le_bytes());
        number(&mut bytes, episode.frames.map_or(u64::MAX, |frames| frames as u64));
    }
    let files = reader.files();
    number(&mut bytes, files.len() as u64);
    for (name, size) in files {
        text(&mut bytes, &name);
        number(&mut bytes, size);
    }
    XxHash3_128::oneshot(&bytes).to_le_bytes()
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    number(bytes, text.len() as u64);
    bytes.extend_from_slice(text.as_bytes());
}

fn number(bytes: &mut Vec<u8>, number: u64) {
    bytes.extend_from_slice(&number.to_le_bytes());
}
