//! A report as text for a terminal.

use std::fmt::Write as _;

use robocache_formats::StreamStats;

use super::picture;
use super::{Report, StreamReport};

/// Headings of the table, left and right aligned columns as [`RIGHT`] says.
const HEADINGS: [&str; 11] =
    ["stream", "type", "rows", "Hz", "jitter 0.5x .. 2x", "gaps", "longest", "dup", "null", "NaN", "min .. max"];
const RIGHT: [bool; 11] = [false, false, true, true, false, true, true, true, true, true, false];

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
    for stream in &report.streams {
        for problem in problems(stream) {
            line(format_args!("{}: {problem}", stream.name));
        }
    }
    if let (Some(start), Some(end)) = (looked.start_ns, looked.end_ns) {
        line(format_args!("\ntime line of episode {}, {}", looked.episode_index, seconds(end.saturating_sub(start))));
        for (names, coverage) in coverages(&report.streams) {
            line(format_args!("{coverage} {}", names.join(", ")));
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
        .map(|row| row.iter().enumerate().map(|(column, cell)| pad(column, cell)).collect::<Vec<_>>().join("  "))
        .collect()
}

fn cells(stream: &StreamReport) -> [String; HEADINGS.len()] {
    let none = || "-".to_owned();
    let mut row: [String; HEADINGS.len()] = std::array::from_fn(|_column| none());
    row[0].clone_from(&stream.name);
    row[1] = stream_type(stream);
    let Some(stats) = &stream.stats else { return row };
    row[2] = stats.rows.to_string();
    row[3] = stats.median_rate_hz.map_or_else(none, |hz| format!("{hz:.2}"));
    row[4] = stats.jitter.map_or_else(none, |bins| picture::histogram(&bins));
    row[5] = stats.gaps_over_1_5_periods.to_string();
    row[6] = stats.longest_gaps.first().map_or_else(none, |gap| seconds(gap.length_ns));
    row[7] = stats.duplicate_stamps.to_string();
    row[8] = stats.nulls.to_string();
    row[9] = stats.nan.to_string();
    row[10] = match (stats.min, stats.max) {
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

fn problems(stream: &StreamReport) -> Vec<String> {
    let Some(stats) = &stream.stats else { return Vec::new() };
    let StreamStats { backward_stamps, bad_stamps, infinite, gaps_over_5_periods, error, .. } = stats;
    let mut problems = Vec::new();
    let mut count = |count: u64, what: &str| {
        if count > 0 {
            problems.push(format!("{count} {what}"));
        }
    };
    count(*backward_stamps, "stamps run backwards");
    count(*bad_stamps, "stamps are null or no numbers");
    count(*infinite, "elements are infinite");
    count(*gaps_over_5_periods, "gaps of more than 5 periods");
    problems.extend(error.as_ref().map(|error| format!("cannot be read as declared: {error}")));
    problems
}

/// Streams of one clock share a line.
fn coverages(streams: &[StreamReport]) -> Vec<(Vec<&str>, &str)> {
    let mut lines: Vec<(usize, Vec<&str>, &str)> = Vec::new();
    for stream in streams {
        let Some(coverage) = &stream.coverage else { continue };
        match lines.iter_mut().find(|(clock, _, _)| *clock == stream.clock) {
            Some((_, names, _)) => names.push(&stream.name),
            None => lines.push((stream.clock, vec![&stream.name], coverage)),
        }
    }
    lines.into_iter().map(|(_, names, coverage)| (names, coverage)).collect()
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
        for (value, text) in
            [(0.0, "0"), (-0.75, "-0.75"), (12.0, "12"), (100.0, "100"), (1e10, "1.000e10"), (2.5e-7, "2.500e-7")]
        {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn times_have_the_unit_that_fits() {
        assert_eq!([seconds(5_000), seconds(2_500_000), seconds(15_933_333_333)], ["5.0 us", "2.5 ms", "15.933 s"]);
    }
}
