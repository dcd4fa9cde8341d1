//! A Parquet file as the decoder reads it, with what its pages say of themselves held against what they can hold.
//!
//! The decoder takes a page's sizes from its header, which nothing but the page itself vouches for, and allocates by
//! them; gzip and Brotli bodies it unpacks to their end, whatever the header says. So no byte reaches it before:
//! - it lies in the file (a read of what does not is no allocation either);
//! - a page's unpacked size is one that its codec can make of the packed one, and no chunk's pages hold more values in
//!   sum than the footer says, which `ParquetTable` has held against the file;
//! - a body that could unpack to more than a page can be was unpacked once for its size alone. That doubles the cost
//!   for Brotli, and for gzip pages of more than 2 MB.
//!
//! Upstream: apache/arrow-rs #10734 (sizes of pages).

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{ChunkReader, Length};

use crate::thrift::{PageHeader, PageKind, Stop, check_footer, check_struct, page_header};

/// Bytes read for a page header at first; more where it holds long minima and maxima.
const HEADER_GUESS: usize = 512;
/// No page header is longer.
const LONGEST_HEADER: usize = 16 << 20;
/// A page's size is an i32.
const LARGEST_PAGE: u64 = 1 << 31;

/// A file from which only what was checked is read. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Guarded(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: File,
    size_bytes: u64,
    part: Part,
    seen: Mutex<Seen>,
}

/// What of the file the decoder is about to read.
#[derive(Debug)]
enum Part {
    Footer,
    /// Offset indexes, several in one read.
    Indexes(Vec<Range<u64>>),
    /// Column chunks, by their place in the file.
    Pages(Vec<Chunk>),
}

/// A column of a row group.
#[derive(Debug)]
struct Chunk {
    bytes: Range<u64>,
    codec: Compression,
    /// Of all pages together.
    values: u64,
    access: Access,
}

/// How the decoder finds a chunk's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    /// One after the other: a header is read, then the body behind it.
    Walked,
    /// By the offset index: header and body are read as one.
    Indexed,
}

#[derive(Debug, Default)]
struct Seen {
    /// Of each chunk: where the page begins that was counted last, and the values up to there.
    counted: HashMap<usize, (u64, u64)>,
    /// Bodies that must be unpacked for their size, by where they begin.
    suspect: HashMap<u64, (PageHeader, Compression)>,
}

impl Guarded {
    /// For the footer.
    pub(crate) fn footer(file: File) -> Result<Self, ParquetError> {
        Self::new(file, Part::Footer)
    }

    /// For the offset indexes, where `metadata`, the footer, says that there are some.
    pub(crate) fn indexes(file: File, metadata: &ParquetMetaData) -> Result<Self, ParquetError> {
        let columns = metadata.row_groups().iter().flat_map(|group| group.columns());
        Self::new(file, Part::Indexes(columns.filter_map(|column| column.offset_index_range()).collect()))
    }

    /// For the pages of `leaves` (columns of the Parquet schema) in `groups`. `metadata` is what the decoder goes by.
    pub(crate) fn pages(
        file: File,
        metadata: &ParquetMetaData,
        groups: &[usize],
        leaves: &[usize],
    ) -> Result<Self, ParquetError> {
        let mut chunks = Vec::with_capacity(groups.len() * leaves.len());
        for group in groups {
            for leaf in leaves {
                let column = metadata.row_group(*group).column(*leaf);
                let (start, len) = column.byte_range();
                let indexed =
                    metadata.page_index().is_some_and(|index| index.page_locations(*group, *leaf).is_some());
                if len == 0 {
                    continue; // of no rows: it would hide the one behind it
                }
                chunks.push(Chunk {
                    bytes: start..start.saturating_add(len),
                    codec: column.compression(),
                    values: u64::try_from(column.num_values()).unwrap_or(0),
                    access: if indexed { Access::Indexed } else { Access::Walked },
                });
            }
        }
        chunks.sort_by_key(|chunk| chunk.bytes.start);
        Self::new(file, Part::Pages(chunks))
    }

    fn new(file: File, part: Part) -> Result<Self, ParquetError> {
        let size_bytes = file.metadata()?.len();
        Ok(Self(Arc::new(Inner { file, size_bytes, part, seen: Mutex::default() })))
    }
}

impl Inner {
    fn read(&self, start: u64, len: usize) -> Result<Vec<u8>, String> {
        let end = start.checked_add(len as u64).filter(|end| *end <= self.size_bytes);
        if end.is_none() {
            return Err(format!("{len} bytes at {start} in a file of {}", self.size_bytes));
        }
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, start).map_err(|error| error.to_string())?;
        Ok(bytes)
    }

    fn chunk_of(&self, at: u64) -> Option<(usize, &Chunk)> {
        let Part::Pages(chunks) = &self.part else { return None };
        let before = chunks.partition_point(|chunk| chunk.bytes.start <= at).checked_sub(1)?;
        chunks.get(before).filter(|chunk| at < chunk.bytes.end).map(|chunk| (before, chunk))
    }

    /// The header of the page at `at`, as long as it is, once it says nothing impossible.
    fn header(&self, at: u64) -> Result<Vec<u8>, String> {
        let left = usize::try_from(self.size_bytes.saturating_sub(at)).unwrap_or(usize::MAX);
        let mut len = HEADER_GUESS.min(left);
        loop {
            let mut bytes = self.read(at, len)?;
            match page_header(&bytes) {
                Ok(header) => {
                    self.admit(at, &header)?;
                    bytes.truncate(header.len);
                    return Ok(bytes);
                }
                Err(Stop::Ends) if len < left.min(LONGEST_HEADER) => {
                    len = len.saturating_mul(16).min(left).min(LONGEST_HEADER);
                }
                Err(stop) => return Err(format!("the page at byte {at} has {}", what(stop))),
            }
        }
    }

    fn admit(&self, at: u64, header: &PageHeader) -> Result<(), String> {
        let Some((number, chunk)) = self.chunk_of(at) else {
            return Err(format!("a page at byte {at}, outside of the columns that are read"));
        };
        let PageHeader { uncompressed, compressed, values, .. } = *header;
        let largest = gain(chunk.codec).saturating_mul(compressed);
        if chunk.codec != Compression::UNCOMPRESSED && uncompressed > largest {
            return Err(format!(
                "the page at byte {at} has {compressed} bytes that say they unpack to {uncompressed}"
            ));
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match header.kind {
            PageKind::Data { .. } => {
                let (last, before) = seen.counted.get(&number).copied().unwrap_or_default();
                if at > last {
                    let sum = before + values;
                    if sum > chunk.values {
                        return Err(format!(
                            "pages up to byte {at} have {sum} values, the footer says {}",
                            chunk.values
                        ));
                    }
                    seen.counted.insert(number, (at, sum));
                }
            }
            // An entry takes a byte at least.
            PageKind::Dictionary if values > uncompressed => {
                return Err(format!("a dictionary of {values} values in {uncompressed} bytes at byte {at}"));
            }
            _ => {}
        }
        if unpacks_to_its_end(chunk.codec) && largest > LARGEST_PAGE {
            seen.suspect.insert(at + header.len as u64, (*header, chunk.codec));
        }
        Ok(())
    }

    /// Refuses a footer that the decoder cannot be given.
    fn check_footer(&self, bytes: &[u8]) -> Result<(), String> {
        match check_footer(bytes) {
            // An encrypted one is no Thrift; the decoder says so.
            Err(stop) if self.read(self.size_bytes - 4, 4)? == b"PAR1" => {
                Err(format!("the footer has {}", what(stop)))
            }
            _ => Ok(()),
        }
    }

    fn check_indexes(&self, indexes: &[Range<u64>], start: u64, bytes: &[u8]) -> Result<(), String> {
        let end = start + bytes.len() as u64;
        for index in indexes.iter().filter(|index| start <= index.start && index.end <= end) {
            let part = usize::try_from(index.start - start).map_err(|error| error.to_string())?;
            // One that is cut short the decoder refuses itself.
            if let Err(stop @ Stop::Broken(_)) = check_struct(&bytes[part..]) {
                return Err(format!("an offset index with {}", what(stop)));
            }
        }
        Ok(())
    }

    /// Unpacks a body for its size alone, if that may be any.
    fn check_body(&self, at: u64, body: &[u8]) -> Result<(), String> {
        let suspect = self.seen.lock().unwrap_or_else(PoisonError::into_inner).suspect.remove(&at);
        let Some((header, codec)) = suspect else { return Ok(()) };
        let prefix = match header.kind {
            PageKind::Data { is_compressed: false, .. } => return Ok(()),
            PageKind::Data { uncompressed_prefix, .. } => uncompressed_prefix,
            _ => 0,
        };
        let packed = usize::try_from(prefix).ok().and_then(|prefix| body.get(prefix..));
        let (Some(packed), Some(wanted)) = (packed, header.uncompressed.checked_sub(prefix)) else {
            return Err(format!("levels longer than their page, at byte {at}"));
        };
        let mut limited: Box<dyn Read + '_> = match codec {
            Compression::BROTLI(_) => Box::new(brotli::Decompressor::new(packed, 1 << 16)),
            _ => Box::new(flate2::read::MultiGzDecoder::new(packed)),
        };
        let found = std::io::copy(&mut limited.by_ref().take(wanted + 1), &mut std::io::sink())
            .map_err(|error| format!("the page before byte {at} does not unpack: {error}"))?;
        if wanted > 0 && found > wanted {
            return Err(format!("a page that says it unpacks to {wanted} bytes and goes on, at byte {at}"));
        }
        Ok(())
    }
}

impl Length for Guarded {
    fn len(&self) -> u64 {
        self.0.size_bytes
    }
}

impl ChunkReader for Guarded {
    type T = HeaderReader;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(HeaderReader { inner: Arc::clone(&self.0), start, bytes: None, at: 0 })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let inner = &self.0;
        let checked = || {
            let bytes = inner.read(start, length)?;
            match &inner.part {
                Part::Footer => inner.check_footer(&bytes)?,
                Part::Indexes(indexes) => inner.check_indexes(indexes, start, &bytes)?,
                Part::Pages(_)
                    if inner.chunk_of(start).is_some_and(|(_, chunk)| chunk.access == Access::Indexed) =>
                {
                    let header = page_header(&bytes)
                        .map_err(|stop| format!("the page at byte {start} has {}", what(stop)))?;
                    inner.admit(start, &header)?;
                    inner.check_body(start + header.len as u64, &bytes[header.len..])?;
                }
                Part::Pages(_) => inner.check_body(start, &bytes)?,
            }
            Ok(bytes)
        };
        checked().map(Bytes::from).map_err(ParquetError::General)
    }
}

/// The header of one page, read when the decoder first asks for it; of a footer, the bytes it asks for.
#[derive(Debug)]
pub(crate) struct HeaderReader {
    inner: Arc<Inner>,
    start: u64,
    bytes: Option<Vec<u8>>,
    at: usize,
}

impl Read for HeaderReader {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let bytes = match &mut self.bytes {
            Some(bytes) => bytes,
            none => {
                let read = match self.inner.part {
                    Part::Pages(_) => self.inner.header(self.start),
                    _ => self.inner.read(self.start, into.len()),
                };
                none.insert(read.map_err(std::io::Error::other)?)
            }
        };
        let read = (&bytes[self.at..]).read(into)?;
        self.at += read;
        Ok(read)
    }
}

/// Bytes that a codec can make of one, rounded up.
const fn gain(codec: Compression) -> u64 {
    match codec {
        Compression::UNCOMPRESSED => 1,
        Compression::SNAPPY | Compression::LZO => 64, // copies of 64 bytes take 3
        Compression::LZ4 | Compression::LZ4_RAW => 256, // 255, and frames add a little
        Compression::GZIP(_) => 1100,                 // 1032
        Compression::ZSTD(_) => 1 << 16,              // blocks of 128 KiB of one byte take 4
        Compression::BROTLI(_) => LARGEST_PAGE + 1,   // 16 MiB of one byte take some
    }
}

const fn unpacks_to_its_end(codec: Compression) -> bool {
    matches!(codec, Compression::GZIP(_) | Compression::BROTLI(_))
}

fn what(stop: Stop) -> &'static str {
    match stop {
        Stop::Ends => "no end",
        Stop::Broken(what) => what,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;
    use std::sync::Arc;

    use parquet::file::metadata::{
        ColumnChunkMetaData, FileMetaData, ParquetMetaDataBuilder, ParquetMetaDataWriter, RowGroupMetaData,
    };
    use parquet::schema::parser::parse_message_type;
    use parquet::schema::types::SchemaDescriptor;

    use crate::parquet::ParquetTable;
    use crate::table::Table;

    use super::*;

    /// What one page says of itself.
    struct Says {
        codec: Compression,
        uncompressed: i32,
        values: i32,
    }

    fn varint(bytes: &mut Vec<u8>, value: i32) {
        let mut zigzag = u64::try_from(value).unwrap() << 1;
        while zigzag > 0x7f {
            bytes.push(u8::try_from(zigzag & 0x7f | 0x80).unwrap());
            zigzag >>= 7;
        }
        bytes.push(u8::try_from(zigzag).unwrap());
    }

    /// What reading a file of one page, of a column of two numbers, comes to.
    fn read(dir: &Path, says: &Says, body: &[u8]) -> Result<Vec<u8>, String> {
        let mut content = b"PAR1".to_vec();
        content.extend([0x15, 0x00, 0x15]); // a data page
        varint(&mut content, says.uncompressed);
        content.push(0x15);
        varint(&mut content, i32::try_from(body.len()).unwrap());
        content.extend([0x2c, 0x15]);
        varint(&mut content, says.values);
        content.extend([0x15, 0x00, 0x15, 0x06, 0x15, 0x06, 0x00, 0x00]); // plain, no levels
        content.extend(body);

        let schema = parse_message_type("message schema { required int32 n; }").unwrap();
        let schema = Arc::new(SchemaDescriptor::new(Arc::new(schema)));
        let column = ColumnChunkMetaData::builder(schema.column(0))
            .set_compression(says.codec)
            .set_num_values(2)
            .set_total_compressed_size(i64::try_from(content.len() - 4).unwrap())
            .set_total_uncompressed_size(1 << 20)
            .set_data_page_offset(4)
            .build()
            .unwrap();
        let group = RowGroupMetaData::builder(Arc::clone(&schema))
            .set_num_rows(2)
            .set_column_metadata(vec![column])
            .build()
            .unwrap();
        let file_metadata = FileMetaData::new(1, 2, None, None, schema, None);
        let metadata = ParquetMetaDataBuilder::new(file_metadata).set_row_groups(vec![group]).build();
        ParquetMetaDataWriter::new(&mut content, &metadata).finish().unwrap();

        let path = dir.join("page.parquet");
        File::create(&path).unwrap().write_all(&content).unwrap();
        let table = ParquetTable::open(&path).unwrap();
        let chunks = table.read(&[0], std::slice::from_ref(&(0..2))).map_err(|error| {
            std::error::Error::source(&error).map_or_else(String::new, ToString::to_string)
        })?;
        Ok(chunks[0].iter().flat_map(|chunk| chunk.to_data().buffers()[0].to_vec()).collect())
    }

    const NUMBERS: [u8; 8] = [1, 0, 0, 0, 2, 0, 0, 0];

    fn brotli(bytes: &[u8]) -> Vec<u8> {
        let mut packed = Vec::new();
        brotli::CompressorWriter::new(&mut packed, 4096, 9, 22).write_all(bytes).unwrap();
        packed
    }

    #[test]
    fn a_page_that_is_what_it_says_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let snappy = [&[8, 7 << 2][..], &NUMBERS].concat();
        let codecs = [
            (Compression::UNCOMPRESSED, NUMBERS.to_vec()),
            (Compression::SNAPPY, snappy),
            (Compression::BROTLI(Default::default()), brotli(&NUMBERS)),
        ];
        for (codec, body) in codecs {
            assert_eq!(
                read(dir.path(), &Says { codec, uncompressed: 8, values: 2 }, &body).unwrap(),
                NUMBERS
            );
        }
    }

    /// Seen: some 200 bytes of file take 2 GiB of memory, zeroed. Cause: the decoder makes room for what the header says.
    #[test]
    fn a_page_that_says_it_unpacks_to_what_it_cannot_is_refused_before_there_is_room_for_it() {
        let dir = tempfile::tempdir().unwrap();
        for codec in [Compression::SNAPPY, Compression::LZ4_RAW, Compression::ZSTD(Default::default())] {
            let says = Says { codec, uncompressed: i32::MAX, values: 2 };
            let error = read(dir.path(), &says, &[0; 20]).unwrap_err();
            assert!(error.contains("20 bytes that say they unpack to 2147483647"), "{codec}: {error}");
        }
    }

    /// Seen: fewer than 100 bytes of Brotli unpack to 16 MiB, whatever the header says.
    #[test]
    fn brotli_that_goes_on_behind_its_page_is_stopped_there() {
        let dir = tempfile::tempdir().unwrap();
        let codec = Compression::BROTLI(Default::default());
        let says = Says { codec, uncompressed: 8, values: 2 };
        let packed = brotli(&vec![0; 16 << 20]);
        assert!(packed.len() < 100);
        let error = read(dir.path(), &says, &packed).unwrap_err();
        assert!(error.contains("says it unpacks to 8 bytes and goes on"), "{error}");
    }

    /// A list may say that it never ends, a byte or two for 2^31 levels of it; only the footer's number was checked.
    #[test]
    fn pages_of_more_values_than_their_column_has_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let says = Says { codec: Compression::UNCOMPRESSED, uncompressed: 8, values: 1 << 30 };
        let error = read(dir.path(), &says, &NUMBERS).unwrap_err();
        assert!(error.contains("have 1073741824 values, the footer says 2"), "{error}");
    }
    #[test]
    fn pages_found_by_the_offset_index_are_checked_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("indexed.parquet");
        let numbers: arrow::array::ArrayRef = Arc::new((0..100).collect::<arrow::array::Int64Array>());
        let batch = arrow::array::RecordBatch::try_from_iter([("n", numbers)]).unwrap();
        let properties = parquet::file::properties::WriterProperties::builder()
            .set_dictionary_enabled(false)
            .set_write_batch_size(10)
            .set_data_page_row_count_limit(10)
            .build();
        let file = File::create(&path).unwrap();
        let mut writer =
            parquet::arrow::ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let read = |rows: Range<usize>| {
            let table = ParquetTable::open(&path).unwrap();
            table.read(&[0], std::slice::from_ref(&rows)).map_err(|error| {
                std::error::Error::source(&error).map_or_else(String::new, ToString::to_string)
            })
        };
        assert_eq!(read(52..54).unwrap()[0][0].len(), 2);

        // Of the sixth page, which begins with its sizes and then its 10 values, -10.
        let mut content = std::fs::read(&path).unwrap();
        let pages = content.windows(4).enumerate().filter(|(_, bytes)| **bytes == [0x2c, 0x15, 20, 0x15]);
        let at = pages.map(|(at, _)| at).nth(5).unwrap();
        content[at + 2] = 19;
        std::fs::write(&path, content).unwrap();
        assert!(read(52..54).unwrap_err().contains("a negative count"));
        assert_eq!(read(42..44).unwrap()[0][0].len(), 2);
    }
}
