//! Arrow IPC by mmap: the file format, and the stream format where a file holds one.
//!
//! Opening checks every block that the footer (or the chain of stream messages) names against the file, so that
//! reading only ever slices inside it. Uncompressed bodies are read in place: the arrays that come back point into
//! the mapping and keep it alive. LZ4 and ZSTD bodies are decoded, a record batch at a time, only the columns asked
//! for, and only after the sizes they declare have been found possible. `arrow-ipc` may panic on what is left of a
//! broken file; that is caught and becomes an error.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::ArrayRef;
use arrow::buffer::Buffer;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::ipc::convert::try_fb_to_schema;
use arrow::ipc::reader::FileDecoder;
use arrow::ipc::{
    Block, BodyCompressionMethod, CompressionType, Message, MessageHeader, MetadataVersion, RecordBatch,
    root_as_footer, root_as_message,
};

use crate::contain::contain;
use crate::error::ReadError;
use crate::map::Mapping;
use crate::memory::Taken;
use crate::parquet::{check_ranges, check_rows};
use crate::table::Table;

/// How a file in the file format begins and ends.
pub(crate) const FILE_MAGIC: &[u8] = b"ARROW1";
/// How a file that holds the stream format begins: the continuation marker before its first message.
pub(crate) const STREAM_MAGIC: &[u8] = &[0xff; 4];
/// No record batch of a dataset is larger; one that says so is broken.
const LARGEST_BATCH_BYTES: u64 = 16 << 30;
/// LZ4 makes at most 255 bytes of one; frames add a little.
const LZ4_GAIN: u64 = 256;
/// Far beyond what ZSTD makes of zeros.
const ZSTD_GAIN: u64 = 1 << 16;

#[derive(Debug)]
pub(crate) struct ArrowTable {
    path: PathBuf,
    mapping: Mapping,
    schema: SchemaRef,
    version: MetadataVersion,
    batches: Vec<Batch>,
    dictionaries: Vec<Block>,
    rows: usize,
}

/// A record batch that lies inside the file.
#[derive(Debug, Clone, Copy)]
struct Batch {
    block: Block,
    first_row: usize,
    rows: usize,
}

impl ArrowTable {
    /// Reads the schema and the place and row count of every batch; no data.
    pub(crate) fn open(path: &Path) -> Result<Self, ReadError> {
        let mapping =
            Mapping::open(path).map_err(|source| ReadError::Io { path: path.to_owned(), source })?;
        let buffer = mapping.buffer().clone();
        let contents = contain(path, || {
            let contents = if buffer.starts_with(FILE_MAGIC) {
                file_contents(&buffer)
            } else {
                stream_contents(&buffer)
            };
            contents.map_err(|source| ReadError::Arrow { path: path.to_owned(), source })
        })?;
        let (mut batches, mut rows) = (Vec::with_capacity(contents.batches.len()), 0_usize);
        for (block, batch_rows) in contents.batches {
            batches.push(Batch { block, first_row: rows, rows: batch_rows });
            rows = rows.checked_add(batch_rows).ok_or_else(|| ReadError::Arrow {
                path: path.to_owned(),
                source: broken("more rows than can be counted"),
            })?;
        }
        check_rows(path, rows, buffer.len() as u64)?;
        Ok(Self {
            path: path.to_owned(),
            mapping,
            schema: contents.schema,
            version: contents.version,
            batches,
            dictionaries: contents.dictionaries,
            rows,
        })
    }

    fn decode(&self, columns: &[usize], ranges: &[Range<usize>]) -> Result<Vec<Vec<ArrayRef>>, ReadError> {
        let failed = |source| ReadError::Arrow { path: self.path.clone(), source };
        let (mut taken, mut held) = (Taken::nothing(), 0_u64);
        let buffer = self.mapping.buffer();
        // The decoder wants the projection in the schema's order.
        let mut projection = columns.to_vec();
        projection.sort_unstable();
        let mut decoder =
            FileDecoder::new(Arc::clone(&self.schema), self.version).with_projection(projection.clone());
        if columns.iter().any(|&column| has_dictionary(self.schema.field(column))) {
            for block in &self.dictionaries {
                let (body, unpacked) = body_checked(buffer, block).map_err(failed)?;
                held = held.saturating_add(unpacked);
                taken.hold(&self.path, held)?;
                decoder.read_dictionary(block, &body).map_err(failed)?;
            }
        }
        let mut chunks = vec![Vec::new(); columns.len()];
        for batch in &self.batches {
            let end = batch.first_row + batch.rows;
            let mut overlaps = ranges
                .iter()
                .map(|range| range.start.max(batch.first_row)..range.end.min(end))
                .filter(|overlap| overlap.start < overlap.end)
                .peekable();
            if overlaps.peek().is_none() {
                continue;
            }
            let (body, unpacked) = body_checked(buffer, &batch.block).map_err(failed)?;
            taken.hold(&self.path, held.saturating_add(unpacked))?;
            let decoded = decoder.read_record_batch(&batch.block, &body).map_err(failed)?;
            let decoded = decoded.ok_or_else(|| failed(broken("a record batch without a header")))?;
            if unpacked > 0 {
                // Of the columns asked for alone.
                let columns = decoded.columns().iter().map(|column| column.get_array_memory_size() as u64);
                held = held.saturating_add(columns.sum::<u64>().min(unpacked));
                taken.hold(&self.path, held)?;
            }
            for overlap in overlaps {
                for (chunks, column) in chunks.iter_mut().zip(columns) {
                    let at = projection.binary_search(column);
                    let at = at.map_err(|_at| failed(broken("a column asked for twice")))?;
                    chunks.push(decoded.column(at).slice(overlap.start - batch.first_row, overlap.len()));
                }
            }
        }
        Ok(chunks)
    }
}

impl Table for ArrowTable {
    fn path(&self) -> &Path {
        &self.path
    }

    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn rows(&self) -> usize {
        self.rows
    }

    fn groups(&self) -> Vec<Range<usize>> {
        self.batches.iter().map(|batch| batch.first_row..batch.first_row + batch.rows).collect()
    }

    fn read(&self, columns: &[usize], ranges: &[Range<usize>]) -> Result<Vec<Vec<ArrayRef>>, ReadError> {
        self.mapping.check().map_err(|source| ReadError::Io { path: self.path.clone(), source })?;
        check_ranges(self, ranges)?;
        contain(&self.path, || self.decode(columns, ranges))
    }
}

/// What a file holds, proven to lie inside it.
struct Contents {
    schema: SchemaRef,
    version: MetadataVersion,
    dictionaries: Vec<Block>,
    /// With the rows of each.
    batches: Vec<(Block, usize)>,
}

fn file_contents(buffer: &Buffer) -> Result<Contents, ArrowError> {
    // 10 bytes at the end: the footer's length as i32, then the magic again. 8 at the start: magic and padding.
    let Some(trailer) = buffer.len().checked_sub(10).filter(|at| *at >= 8) else {
        return Err(broken("too short to have a footer"));
    };
    if buffer[trailer + 4..] != *FILE_MAGIC {
        return Err(broken("the end of the file is missing (it does not close with ARROW1)"));
    }
    let footer_len =
        usize::try_from(i32_at(buffer, trailer)?).map_err(|_negative| broken("a negative footer length"))?;
    let Some(start) = trailer.checked_sub(footer_len).filter(|at| *at >= 8) else {
        return Err(broken("a footer longer than the file"));
    };
    let footer = root_as_footer(&buffer[start..trailer])
        .map_err(|error| broken(&format!("the footer cannot be read: {error}")))?;
    let schema = footer.schema().ok_or_else(|| broken("a footer without a schema"))?;
    let mut contents = Contents {
        schema: schema_of(schema)?,
        version: footer.version(),
        dictionaries: footer.dictionaries().iter().flatten().copied().collect(),
        batches: Vec::new(),
    };
    for block in &contents.dictionaries {
        message_at(buffer, block)?;
    }
    for block in footer.recordBatches().iter().flatten() {
        let message = message_at(buffer, block)?;
        let batch =
            message.header_as_record_batch().ok_or_else(|| broken("a block that is no record batch"))?;
        contents.batches.push((*block, rows_of(batch)?));
    }
    Ok(contents)
}

/// The stream format is a chain of messages: `ffffffff`, metadata length as i32, metadata, body; it ends with a
/// length of 0 or with the file.
fn stream_contents(buffer: &Buffer) -> Result<Contents, ArrowError> {
    let mut contents: Option<Contents> = None;
    let mut at = 0;
    while at < buffer.len() {
        if buffer.get(at..at + 4) != Some(STREAM_MAGIC) {
            return Err(broken(&format!("no message where one should be, at byte {at}")));
        }
        let metadata_len = i32_at(buffer, at + 4)?;
        if metadata_len == 0 {
            break;
        }
        let offset = i64::try_from(at).map_err(|_too_large| broken("a file too large"))?;
        let block_of = |body_len| Block::new(offset, metadata_len.saturating_add(8), body_len);
        let body_len = message_at(buffer, &block_of(0))?.bodyLength();
        let block = block_of(body_len);
        let message = message_at(buffer, &block)?;
        match (message.header_type(), &mut contents) {
            (MessageHeader::Schema, None) => {
                let schema = message.header_as_schema().ok_or_else(|| broken("a schema that is none"))?;
                contents = Some(Contents {
                    schema: schema_of(schema)?,
                    version: message.version(),
                    dictionaries: Vec::new(),
                    batches: Vec::new(),
                });
            }
            (MessageHeader::DictionaryBatch, Some(contents)) if contents.batches.is_empty() => {
                contents.dictionaries.push(block);
            }
            (MessageHeader::DictionaryBatch, Some(_)) => {
                return Err(broken(
                    "a stream that changes its dictionaries midway; write it again in the Arrow IPC file format",
                ));
            }
            (MessageHeader::RecordBatch, Some(contents)) => {
                let batch = message.header_as_record_batch().ok_or_else(|| broken("a batch that is none"))?;
                contents.batches.push((block, rows_of(batch)?));
            }
            (other, _) => return Err(broken(&format!("a message of kind {other:?} out of place"))),
        }
        at = end_of(&block).ok_or_else(|| broken("a message of impossible size"))?;
    }
    contents.ok_or_else(|| broken("a stream without a schema"))
}

fn schema_of(schema: arrow::ipc::Schema<'_>) -> Result<SchemaRef, ArrowError> {
    if !schema.endianness().equals_to_target_endianness() {
        return Err(broken("written big-endian, which is not read here"));
    }
    let schema: Schema = try_fb_to_schema(schema)?;
    Ok(Arc::new(schema))
}

fn rows_of(batch: RecordBatch<'_>) -> Result<usize, ArrowError> {
    usize::try_from(batch.length()).map_err(|_negative| broken("a negative number of rows"))
}

/// One past the last byte of a block; `None` where its numbers make no sense.
fn end_of(block: &Block) -> Option<usize> {
    let metadata_len = i64::from(block.metaDataLength());
    if block.offset() < 0 || metadata_len < 8 || block.bodyLength() < 0 {
        return None;
    }
    let end = block.offset().checked_add(metadata_len)?.checked_add(block.bodyLength())?;
    usize::try_from(end).ok()
}

/// The metadata of a block, which is proven to lie inside the file, body and all.
fn message_at<'a>(buffer: &'a Buffer, block: &Block) -> Result<Message<'a>, ArrowError> {
    let end = end_of(block).filter(|end| *end <= buffer.len());
    let (Some(_), Ok(start), Ok(len)) =
        (end, usize::try_from(block.offset()), usize::try_from(block.metaDataLength()))
    else {
        return Err(broken(&format!(
            "a block of {} + {} bytes at {} in a file of {}",
            block.metaDataLength(),
            block.bodyLength(),
            block.offset(),
            buffer.len()
        )));
    };
    // Files older than Arrow 0.15 have no continuation marker before the length.
    let prefix = if buffer[start..].starts_with(STREAM_MAGIC) { 8 } else { 4 };
    root_as_message(&buffer[start + prefix..start + len])
        .map_err(|error| broken(&format!("metadata at byte {start} cannot be read: {error}")))
}

/// A block's bytes, once every buffer it declares has been found to lie in its body and to have a possible size, and
/// how many those that are compressed unpack to.
fn body_checked(buffer: &Buffer, block: &Block) -> Result<(Buffer, u64), ArrowError> {
    let message = message_at(buffer, block)?;
    let batch = match message.header_type() {
        MessageHeader::DictionaryBatch => message.header_as_dictionary_batch().and_then(|batch| batch.data()),
        _ => message.header_as_record_batch(),
    };
    let batch = batch.ok_or_else(|| broken("a block that holds no batch"))?;
    let (Ok(start), Ok(metadata_len), Some(end)) =
        (usize::try_from(block.offset()), usize::try_from(block.metaDataLength()), end_of(block))
    else {
        return Err(broken("a block of impossible size"));
    };
    let body = &buffer[start + metadata_len..end];
    let gain = match batch.compression() {
        None => None,
        Some(compression) if compression.method() != BodyCompressionMethod::BUFFER => {
            return Err(broken("compressed by a method unknown here"));
        }
        Some(compression) if compression.codec() == CompressionType::LZ4_FRAME => Some(LZ4_GAIN),
        Some(_) => Some(ZSTD_GAIN),
    };
    let mut total: u64 = 0;
    for declared in batch.buffers().iter().flatten() {
        let bytes = usize::try_from(declared.offset())
            .ok()
            .zip(usize::try_from(declared.length()).ok())
            .and_then(|(offset, len)| body.get(offset..offset.checked_add(len)?));
        let Some(bytes) = bytes else {
            return Err(broken(&format!(
                "a buffer of {} bytes at {} in a body of {}",
                declared.length(),
                declared.offset(),
                body.len()
            )));
        };
        let Some(gain) = gain.filter(|_| !bytes.is_empty()) else { continue };
        let Some((size, packed)) = bytes.split_first_chunk::<8>() else {
            return Err(broken("a compressed buffer without its size"));
        };
        let size = i64::from_le_bytes(*size);
        if size == -1 {
            continue; // stored as it is
        }
        let size = u64::try_from(size)
            .map_err(|_negative| broken(&format!("a buffer of {size} bytes, unpacked")))?;
        total = total.saturating_add(size);
        if size > (packed.len() as u64).saturating_mul(gain) || total > LARGEST_BATCH_BYTES {
            return Err(broken(&format!(
                "{} bytes that say they unpack to {size}, which cannot be right",
                packed.len()
            )));
        }
    }
    Ok((buffer.slice_with_length(start, end - start), total))
}

fn has_dictionary(field: &Field) -> bool {
    match field.data_type() {
        DataType::Dictionary(..) => true,
        DataType::List(field)
        | DataType::LargeList(field)
        | DataType::FixedSizeList(field, _)
        | DataType::ListView(field)
        | DataType::LargeListView(field)
        | DataType::Map(field, _) => has_dictionary(field),
        DataType::Struct(fields) => fields.iter().any(|field| has_dictionary(field)),
        DataType::RunEndEncoded(_, values) => has_dictionary(values),
        DataType::Union(fields, _) => fields.iter().any(|(_, field)| has_dictionary(field)),
        _ => false,
    }
}

fn i32_at(buffer: &Buffer, at: usize) -> Result<i32, ArrowError> {
    let bytes = buffer.get(at..).and_then(|rest| rest.first_chunk::<4>());
    bytes.map(|bytes| i32::from_le_bytes(*bytes)).ok_or_else(|| broken("the file ends within a message"))
}

fn broken(what: &str) -> ArrowError {
    ArrowError::ParseError(what.to_owned())
}
