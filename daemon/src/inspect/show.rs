//! A report as text for a terminal.

use std::fmt::Write as _;

use robocache_formats::StreamStats;

use super::picture;
use super::{Report, StreamReport};

/// Headings of the table, left and right aligned columns as [`RIGHT`] says.
const HEADINGS: [&str; 12] = [
    "stream",
    "type",
    "rows",
    "mean Hz",
    "Hz",
    "jitter 0.5x .. 2x",
    "gaps",
    "longest",
    "dup",
    "null",
    "NaN",
    "min .. max",
];
const RIGHT: [bool; 12] = [false, false, true, true, true, false, true, true, true, true, true, false];

pub(super) fn text(report: &Report) -> String {
    let mut text = String::new();
    let mut line = |line: std::fmt::Arguments<'_>| {
        text.write_fmt(line).and_then(|()| text.write_str("\n")).expect("a String takes any text");
    };
    line(format_args!("{}", report.path));
    line(format_args!("{}", facts(report)));
    for warning in &report.warnings {
        line(format_args!("warning: {warning}"));
    }
    if let Some(notes) = &report.drafted {
        line(format_args!("no manifest: this is how a drafted one reads it (--write-manifest writes it)"));
        notes.iter().for_each(|note| line(format_args!("check: {note}")));
    }
    let looked = &report.looked_at;
    match looked.episodes {
        1 => line(format_args!("\nepisode {} ({})", looked.episode_index, looked.name)),
        many => line(format_args!("\nall {many} episodes")),
    }
    for row in table(&report.streams) {
        line(format_args!("{}", row.trim_end()));
    }
    for (names, first) in by_clock(&report.streams) {
        clock_problems(first)
            .into_iter()
            .for_each(|problem| line(format_args!("{}: {problem}", label(&names))));
    }
    for stream in &report.streams {
        problems(stream).into_iter().for_each(|problem| line(format_args!("{}: {problem}", stream.name)));
    }
    if let (Some(start), Some(end)) = (looked.start_ns, looked.end_ns) {
        line(format_args!(
            "\ntime line of episode {}, {}",
            looked.episode_index,
            seconds(end.saturating_sub(start))
        ));
        for (names, first) in by_clock(&report.streams) {
            if let Some(coverage) = &first.coverage {
                line(format_args!("{coverage} {}", label(&names)));
            }
        }
    }
    text
}

fn facts(report: &Report) -> String {
    let mut facts = vec![report.layout.clone()];
    facts.extend(report.fps.map(|fps| format!("{fps} Hz")));
    facts.push(counted(report.episodes as u64, "episode"));
    facts.extend(report.frames.map(|frames| counted(frames, "frame")));
    if !report.tasks.is_empty() {
        facts.push(counted(report.tasks.len() as u64, "task"));
    }
    facts.push(counted(report.streams.len() as u64, "stream"));
    facts.push(format!("fingerprint {}", report.fingerprint));
    facts.join(", ")
}

fn counted(count: u64, thing: &str) -> String {
    format!("{count} {thing}{}", if count == 1 { "" } else { "s" })
}

fn table(streams: &[StreamReport]) -> Vec<String> {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(streams.iter().map(cells));
    let widths: [usize; HEADINGS.len()] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let pad = |column: usize, cell: &str| {
        let width = widths[column];
        if RIGHT[column] { format!("{cell:>width$}") } else { format!("{cell:width$}") }
    };
    rows.iter()
        .map(|row| {
            row.iter().enumerate().map(|(column, cell)| pad(column, cell)).collect::<Vec<_>>().join("  ")
        })
        .collect()
}

fn cells(stream: &StreamReport) -> [String; HEADINGS.len()] {
    let none = || "-".to_owned();
    let mut row: [String; HEADINGS.len()] = std::array::from_fn(|_column| none());
    row[0].clone_from(&stream.name);
    row[1] = stream_type(stream);
    let Some(stats) = &stream.stats else { return row };
    row[2] = stats.rows.to_string();
    row[3] = stream.mean_rate_hz.map_or_else(none, |hz| format!("{hz:.2}"));
    row[4] = stats.median_rate_hz.map_or_else(none, |hz| format!("{hz:.2}"));
    row[5] = stats.jitter.map_or_else(none, |bins| picture::histogram(&bins));
    row[6] = stats.gaps_over_1_5_periods.to_string();
    row[7] = stats.longest_gaps.first().map_or_else(none, |gap| seconds(gap.length_ns));
    row[8] = stats.duplicate_stamps.to_string();
    row[9] = stats.nulls.to_string();
    row[10] = stats.nan.to_string();
    row[11] = match (stats.min, stats.max) {
        (Some(min), Some(max)) => format!("{} .. {}", number(min), number(max)),
        _ => none(),
    };
    row
}

fn stream_type(stream: &StreamReport) -> String {
    let shape = match stream.shape.as_slice() {
        [] => String::new(),
        shape => format!("{shape:?}").replace(' ', ""),
    };
    match (stream.kind.as_str(), stream.texts) {
        ("numeric", _) => format!("{}{shape}", stream.dtype),
        ("text", Some(texts)) => format!("text, {texts} distinct"),
        (kind, _) => format!("{kind}{shape}"),
    }
}

/// What is wrong with the stamps, which streams of one clock have in common.
fn clock_problems(stream: &StreamReport) -> Vec<String> {
    let Some(stats) = &stream.stats else { return Vec::new() };
    [
        (stats.backward_stamps, "stamp that runs backwards", "stamps that run backwards"),
        (stats.bad_stamps, "stamp that is null or no number", "stamps that are null or no numbers"),
        (stats.gaps_over_5_periods, "gap of more than 5 periods", "gaps of more than 5 periods"),
    ]
    .into_iter()
    .filter(|(count, ..)| *count > 0)
    .map(|(count, one, many)| format!("{count} {}", if count == 1 { one } else { many }))
    .collect()
}

/// What is wrong with the stream itself.
fn problems(stream: &StreamReport) -> Vec<String> {
    let Some(StreamStats { infinite, error, .. }) = &stream.stats else { return Vec::new() };
    let infinite = (*infinite > 0).then(|| format!("infinite elements: {infinite}"));
    let error = error.as_ref().map(|error| format!("cannot be read as declared: {error}"));
    infinite.into_iter().chain(error).collect()
}

/// Streams that were looked at, by clock: all names, and the first one.
fn by_clock(streams: &[StreamReport]) -> Vec<(Vec<&str>, &StreamReport)> {
    let mut clocks: Vec<(Vec<&str>, &StreamReport)> = Vec::new();
    for stream in streams.iter().filter(|stream| stream.stats.is_some()) {
        match clocks.iter_mut().find(|(_, first)| first.clock == stream.clock) {
            Some((names, _)) => names.push(&stream.name),
            None => clocks.push((vec![&stream.name], stream)),
        }
    }
    clocks
}

/// Names in the room there is: all of a few, what many have in common, or the first of them.
fn label(names: &[&str]) -> String {
    const FEW: usize = 3;
    let (Some(first), many) = (names.first(), names.len()) else { return String::new() };
    if many <= FEW {
        return names.join(", ");
    }
    let common = first.match_indices('.').rev().map(|(dot, _)| &first[..=dot]);
    match common.into_iter().find(|prefix| names.iter().all(|name| name.starts_with(prefix))) {
        Some(prefix) => format!("{prefix}* ({many} streams)"),
        None => format!("{}, and {} more", names[..FEW].join(", "), many - FEW),
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
fn seconds(ns: i64) -> String {
    match ns {
        ns if ns < 1_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        ns if ns < 1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        ns => format!("{:.3} s", ns as f64 / 1e9),
    }
}

/// Short, however large.
fn number(value: f64) -> String {
    if value == 0.0 || (1e-3..1e6).contains(&value.abs()) {
        let text = format!("{value:.4}");
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    format!("{value:.3e}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_keep_their_size() {
        for (value, text) in [
            (0.0, "0"),
            (-0.75, "-0.75"),
            (12.0, "12"),
            (100.0, "100"),
            (1e10, "1.000e10"),
            (2.5e-7, "2.500e-7"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn many_names_are_shortened_to_what_they_share() {
        assert_eq!(label(&["a", "b"]), "a, b");
        assert_eq!(label(&["imu.gyro.x", "imu.gyro.y", "imu.gyro.z", "imu.acc"]), "imu.* (4 streams)");
        assert_eq!(label(&["state", "action", "index", "task", "time"]), "state, action, index, and 2 more");
    }

    #[test]
    fn times_have_the_unit_that_fits() {
        assert_eq!(
            [seconds(5_000), seconds(2_500_000), seconds(15_933_333_333)],
            ["5.0 us", "2.5 ms", "15.933 s"]
        );
    }
}
