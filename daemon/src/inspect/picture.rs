//! Small pictures for a terminal: a histogram in one line, and what part of a time line a stream covers.

/// Eighths of a cell, by height.
const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// One character per count, as high as its share of the largest. Anything above 0 is visible.
pub(crate) fn histogram(counts: &[u64]) -> String {
    let largest = counts.iter().copied().max().unwrap_or(0);
    let bar = |count: u64| match (count, largest) {
        (0, _) | (_, 0) => BARS[0],
        (count, largest) => {
            let height = (u128::from(count) * 8).div_ceil(u128::from(largest));
            BARS.get(usize::try_from(height).unwrap_or(8)).copied().unwrap_or('█')
        }
    };
    counts.iter().copied().map(bar).collect()
}

/// `width` cells from `span.0` to `span.1` (nanoseconds): `█` covered, `▒` in part, `·` not at all.
///
/// Two stamps cover the time between them if it is at most `hole_ns`.
pub(crate) fn timeline(stamps_ns: &[i64], span: (i64, i64), hole_ns: i64, width: usize) -> String {
    let (start, end) = span;
    let length = i128::from(end) - i128::from(start);
    let mut covered = vec![0_i128; width];
    let cells = i128::try_from(width).unwrap_or(0);
    // Positions in units of 1 / width of a nanosecond, so that cells have whole bounds.
    let mut cover = |from: i64, to: i64| {
        let clamp = |t: i64| (i128::from(t) - i128::from(start)).clamp(0, length) * cells;
        let (from, to) = (clamp(from), clamp(to));
        if length == 0 || to <= from {
            return;
        }
        let (first, last) = (from / length, (to - 1) / length);
        for cell in first..=last.min(cells - 1) {
            let (low, high) = (cell * length, (cell + 1) * length);
            if let Some(covered) = usize::try_from(cell).ok().and_then(|cell| covered.get_mut(cell)) {
                *covered += to.min(high) - from.max(low);
            }
        }
    };
    let mut pieces = Vec::new();
    for pair in stamps_ns.windows(2) {
        let &[before, after] = pair else { continue };
        if after > before && i128::from(after) - i128::from(before) <= i128::from(hole_ns) {
            match pieces.last_mut() {
                Some((_, end)) if *end == before => *end = after,
                _ => pieces.push((before, after)),
            }
        }
    }
    pieces.into_iter().for_each(|(from, to)| cover(from, to));
    covered
        .into_iter()
        .map(|part| match (part, length) {
            (0, _) => '·',
            (part, length) if part * 10 >= length * 9 => '█',
            _ => '▒',
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_in_proportion_and_nothing_seen_is_invisible() {
        assert_eq!(histogram(&[0, 1, 500, 1000]), " ▁▄█");
        assert_eq!(histogram(&[0, 0]), "  ");
        assert_eq!(histogram(&[u64::MAX, 1]), "█▁");
    }

    #[test]
    fn a_hole_shows_where_it_is() {
        let mut stamps: Vec<i64> = (0..=40).collect();
        stamps.extend(60..=100);
        assert_eq!(timeline(&stamps, (0, 100), 1, 10), "████··████");
    }

    #[test]
    fn a_stream_that_starts_late_and_ends_early_leaves_the_ends_open() {
        let stamps: Vec<i64> = (25..=80).collect();
        assert_eq!(timeline(&stamps, (0, 100), 1, 10), "··▒█████··");
    }

    #[test]
    fn extreme_stamps_and_empty_spans_are_drawn_without_overflow() {
        assert_eq!(timeline(&[i64::MIN, i64::MAX], (i64::MIN, i64::MAX), i64::MAX, 4), "····");
        assert_eq!(timeline(&[5], (5, 5), 1, 3), "···");
        assert_eq!(timeline(&[], (0, 10), 1, 3), "···");
        assert_eq!(timeline(&[0, 10], (0, 10), 10, 0), "");
    }
}
