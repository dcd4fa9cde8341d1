//! Where each column of a batch lies in a slot, which streams must be in memory for it, and whether a ring fits.
//!
//! Columns and masks follow the batch header in the order they were asked for, each aligned, each contiguous. For a GPU
//! they lie in a slot of their own there, and only text codes stay behind the header. A client chooses the factors, so sums are made in 128 bits, which 64-bit sizes of 2^32 rows cannot overflow; an offset
//! that saturates 64 is of a ring that is refused before anything is placed there.

use robocache_formats::{Dataset, StreamKind};
use robocache_types::DType;
use robocache_wire::batch::{COLUMN_ALIGN, SLOT_ALIGN, first_column_offset};
use robocache_wire::spec::{ColumnInfo, ColumnRole, Place};

use crate::plan::{Column, Limits, PlanError, Source};
use crate::plan_anchors::FRAME_CLOCK;
use crate::plan_columns::{Wanted, WantedSource};

/// Columns with their places.
pub(crate) struct Placed {
    pub(crate) columns: Vec<Column>,
    /// The same columns, and their masks, as clients are told of them.
    pub(crate) infos: Vec<ColumnInfo>,
    /// Where the last one ends, from the start of the slot.
    pub(crate) end: u64,
    /// The same of the slot's part on the GPU; 0 where there is none.
    pub(crate) device_end: u64,
}

/// The streams that must be in memory, as positions in `Dataset::streams`, ascending.
pub(crate) fn streams(dataset: &Dataset, columns: &[Wanted], frame_anchors: bool) -> Vec<usize> {
    let streams_of = |wanted: &Wanted| match &wanted.source {
        WantedSource::Stream(stream, _) | WantedSource::TaskText(stream, _) => Some(*stream),
        WantedSource::Index(_) => None,
    };
    let mut streams: Vec<usize> = columns.iter().filter_map(streams_of).collect();
    if frame_anchors && !streams.iter().any(|&s| on_frame_clock(dataset, s)) {
        // The anchors' times come with a stream of the frame clock; any small one will do.
        let clock = (0..dataset.streams().len())
            .filter(|&s| on_frame_clock(dataset, s) && dataset.streams()[s].kind == StreamKind::Numeric)
            .min_by_key(|&s| dataset.streams()[s].dim());
        streams.extend(clock);
    }
    streams.sort_unstable();
    streams.dedup();
    streams
}

/// Whether a stream's rows are the dataset's own frames.
pub(crate) fn on_frame_clock(dataset: &Dataset, stream: usize) -> bool {
    dataset.streams()[stream].clock == FRAME_CLOCK
}

/// Gives every column its place; `streams` holds all that they need, ascending.
pub(crate) fn place(
    wanted: Vec<Wanted>,
    streams: &[usize],
    batch_size: u32,
    slots: u32,
    limits: Limits,
) -> Result<Placed, PlanError> {
    let rows = u128::from(batch_size);
    let mut end = u128::from(first_column_offset(batch_size));
    let mut device_end = 0_u128;
    let mut take = |place: Place, bytes: u64| {
        let end = if place == Place::Host { &mut end } else { &mut device_end };
        let offset = end.next_multiple_of(u128::from(COLUMN_ALIGN));
        *end = offset + u128::from(bytes) * rows;
        u64::try_from(offset).unwrap_or(u64::MAX)
    };
    let (mut columns, mut infos) = (Vec::new(), Vec::new());
    for wanted in wanted {
        let elements = wanted.shape.iter().fold(1_u64, |n, &d| n.saturating_mul(d));
        let bytes = elements.saturating_mul(wanted.dtype.size_bytes() as u64);
        let place = match (limits.gpu_ring_bytes, wanted.role) {
            (None, _) | (_, ColumnRole::Text { .. }) => Place::Host,
            (Some(_), _) => Place::Device,
        };
        let offset = take(place, bytes);
        infos.push(ColumnInfo {
            name: wanted.key.clone(),
            dtype: wanted.dtype,
            shape: wanted.shape,
            offset,
            role: wanted.role,
            place,
        });
        let mask = wanted.mask.map(|(steps, shape)| {
            let offset = take(place, steps as u64);
            let (name, role) = (format!("{}_is_pad", wanted.key), ColumnRole::Mask);
            infos.push(ColumnInfo { name, dtype: DType::Bool, shape, offset, role, place });
            (usize_of(offset), steps)
        });
        let nth = |stream| streams.binary_search(&stream).expect("listed above");
        let source = match wanted.source {
            WantedSource::Stream(stream, kernel) => Source::Stream { nth: nth(stream), kernel },
            WantedSource::TaskText(stream, tasks) => Source::TaskText { nth: nth(stream), tasks },
            WantedSource::Index(index) => Source::Index(index),
        };
        columns.push(Column { source, place, offset: usize_of(offset), bytes: usize_of(bytes), mask });
    }
    let fits = |end: u128, limit: u64| {
        let slot_bytes = end.next_multiple_of(u128::from(SLOT_ALIGN));
        let bytes = slot_bytes * u128::from(slots);
        let refused = PlanError::RingTooLarge { bytes, slots, slot_bytes, limit };
        u64::try_from(end).ok().filter(|_| bytes <= u128::from(limit)).ok_or(refused)
    };
    let device_end = fits(device_end, limits.gpu_ring_bytes.unwrap_or(0))?;
    Ok(Placed { columns, infos, end: fits(end, limits.ring_bytes)?, device_end })
}

fn usize_of(offset: u64) -> usize {
    // Larger than any ring, which is then refused; no column is ever placed there.
    usize::try_from(offset).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Index;

    fn column(key: &str, shape: &[u64]) -> Wanted {
        Wanted {
            key: key.to_owned(),
            shape: shape.to_vec(),
            dtype: DType::Float32,
            role: ColumnRole::Data,
            source: WantedSource::Index(Index::Timestamp),
            mask: None,
        }
    }

    const LIMITS: Limits = Limits { steps: 1 << 20, ring_bytes: 1 << 30, gpu_ring_bytes: None };

    #[test]
    fn columns_and_masks_follow_each_other_aligned_and_do_not_overlap() {
        let mut wanted = vec![column("a", &[3, 7]), column("b", &[]), column("c", &[5])];
        wanted[0].mask = Some((3, vec![3]));
        let placed = place(wanted, &[], 5, 2, LIMITS).unwrap();
        let spans = placed.infos.iter().map(|info| {
            let elements = info.shape.iter().product::<u64>();
            (info.name.as_str(), info.offset, info.offset + 5 * elements * info.dtype.size_bytes() as u64)
        });
        let mut before = first_column_offset(5);
        for (name, start, end) in spans {
            assert!(start >= before && start % COLUMN_ALIGN == 0, "{name} begins at {start}, after {before}");
            before = end;
        }
        assert_eq!(placed.end, before);
        assert_eq!(
            placed.infos.iter().map(|info| &*info.name).collect::<Vec<_>>(),
            ["a", "a_is_pad", "b", "c"]
        );
    }

    #[test]
    fn for_a_gpu_only_text_codes_stay_behind_the_header() {
        let limits = Limits { gpu_ring_bytes: Some(1 << 20), ..LIMITS };
        let mut wanted = vec![column("a", &[3, 7]), column("text", &[]), column("c", &[5])];
        wanted[0].mask = Some((3, vec![3]));
        wanted[1].role = ColumnRole::Text { table: 0 };
        let placed = place(wanted, &[], 5, 2, limits).unwrap();
        let places: Vec<_> = placed.infos.iter().map(|info| (&*info.name, info.place, info.offset)).collect();
        let (host, device) = (Place::Host, Place::Device);
        assert_eq!(
            places,
            [
                ("a", device, 0),
                ("a_is_pad", device, 448),
                ("text", host, first_column_offset(5)),
                ("c", device, 512)
            ]
        );
        assert_eq!((placed.end, placed.device_end), (first_column_offset(5) + 20, 612));
        let refused = place(vec![column("a", &[1 << 20])], &[], 5, 2, limits);
        assert!(matches!(refused, Err(PlanError::RingTooLarge { limit: 1_048_576, .. })));
    }

    /// 2^20 steps of 4096 floats for 2^32 samples are 2^66 bytes: nothing may wrap to a small ring.
    #[test]
    fn a_batch_beyond_64_bits_is_refused_whatever_comes_behind_it() {
        for shapes in
            [[[1 << 20, 1 << 12], [1, 1]], [[u64::MAX, u64::MAX], [u64::MAX, 2]], [[1 << 32, 1], [3, 3]]]
        {
            let wanted = shapes.iter().zip(["a", "b"]).map(|(shape, key)| column(key, shape)).collect();
            let refused = place(wanted, &[], u32::MAX, 256, LIMITS);
            assert!(matches!(refused, Err(PlanError::RingTooLarge { bytes, .. }) if bytes > 1 << 64));
        }
    }
}
