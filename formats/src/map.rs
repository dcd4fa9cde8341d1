//! A file mapped for reading. The one place of this crate where `unsafe` is.
//!
//! What others do to the file while it is mapped:
//! - Appending, renaming over it and deleting it do no harm: the mapping keeps the old file.
//! - Overwriting it in place changes bytes under whoever reads them. Numbers then come out wrong, as they would from a
//!   torn `read`; [`Mapping::check`] notices by size and time of change, before each read.
//! - Truncating it takes pages away: touching one of them raises SIGBUS, and the process dies. `check` makes the
//!   window small, it cannot close it. Datasets are to be replaced by rename, never rewritten in place.

#![expect(unsafe_code, reason = "mapping a file is a promise about other processes, which no type can keep")]

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use arrow::buffer::Buffer;
use bytes::Bytes;
use memmap2::Mmap;

/// A mapped file; cheap to slice, and alive as long as any slice is. Holds no descriptor.
#[derive(Debug)]
pub(crate) struct Mapping {
    path: PathBuf,
    state: State,
    buffer: Buffer,
}

/// What changes when a file is written in place. File systems that keep no time of change have none.
#[derive(Debug, PartialEq, Eq)]
struct State {
    size_bytes: u64,
    changed: Option<SystemTime>,
    device_and_inode: (u64, u64),
}

impl State {
    fn of(metadata: &Metadata) -> Self {
        Self {
            size_bytes: metadata.len(),
            changed: metadata.modified().ok(),
            device_and_inode: (metadata.dev(), metadata.ino()),
        }
    }
}

impl Mapping {
    /// Maps a whole regular file. An empty file is an empty buffer.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        // SAFETY: `map` asks that the file is not changed or truncated while the mapping lives. Nothing can prove that
        // of other processes: the header says what happens and what is done about it. This process never writes to a
        // dataset's files. The bytes are only ever read as integers and floats, for which every bit pattern is valid,
        // or through arrow's validation.
        let map = unsafe { Mmap::map(&file) }?;
        let buffer = Buffer::from(Bytes::from_owner(map));
        Ok(Self { path: path.to_owned(), state: State::of(&metadata), buffer })
    }

    /// The whole file.
    pub(crate) const fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// An error if the file was written in place since. A file that another took the place of, or none, is no harm:
    /// the mapping is of the old one.
    pub(crate) fn check(&self) -> io::Result<()> {
        let now = match std::fs::metadata(&self.path) {
            Ok(metadata) => State::of(&metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        if now == self.state || now.device_and_inode != self.state.device_and_inode {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "the file was rewritten in place while it was open ({} bytes then, {} now); replace files by renaming",
            self.state.size_bytes, now.size_bytes
        )))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_that_was_truncated_is_refused_before_it_is_touched() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 10_000]).unwrap();
        let mapping = Mapping::open(file.path()).unwrap();
        mapping.check().unwrap();
        assert_eq!(mapping.buffer().as_slice(), [7; 10_000]);
        file.as_file().set_len(10).unwrap();
        let error = mapping.check().unwrap_err().to_string();
        assert!(error.contains("10000 bytes then, 10 now"), "{error}");
        drop(file);
        mapping.check().unwrap(); // deleted: the mapping is still there, but for the pages that were cut off
    }

    #[test]
    fn a_directory_and_an_empty_file_do_no_harm() {
        assert!(Mapping::open(Path::new("/")).is_err());
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(Mapping::open(file.path()).unwrap().buffer().len(), 0);
    }
}
