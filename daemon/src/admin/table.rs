//! A daemon's status for people. The daemon may be of another version: a field that is not there shows as `-`.

use std::fmt::Write as _;

use serde_json::Value;

use crate::size::Bytes;

/// The status as a few lines of text.
pub(super) fn render(status: &Value) -> String {
    let at = |pointer: &str| status.pointer(pointer);
    let mut text = format!(
        "robocached {}, process {}, up {}, on {}\n",
        word(at("/version")),
        word(at("/pid")),
        duration(at("/uptime_s")),
        word(at("/socket")),
    );
    let mut line = |line: std::fmt::Arguments<'_>| text.write_fmt(line).expect("a String takes any text");
    line(format_args!("memory      {} of {} used\n", bytes(at("/memory/used")), bytes(at("/memory/budget"))));
    line(format_args!(
        "store       {} episodes read, {} decoded, {} hit rate, {} evictions\n",
        word(at("/store/episodes_read")),
        bytes(at("/store/bytes_decoded")),
        hit_rate(status),
        word(at("/store/evictions")),
    ));
    for dataset in list(at("/datasets")) {
        line(format_args!(
            "dataset     {}: {} episodes, {} of them in memory ({}), {} streams\n",
            word(dataset.get("path")),
            word(dataset.get("episodes")),
            word(dataset.get("resident_episodes")),
            bytes(dataset.get("resident_bytes")),
            word(dataset.get("streams")),
        ));
    }
    for gpu in list(at("/gpus")) {
        for text in one_gpu(gpu) {
            line(format_args!("{text}\n"));
        }
    }
    let loaders = list(at("/loaders"));
    if loaders.is_empty() {
        line(format_args!("no loaders\n"));
        return text;
    }
    let header = [
        "pid",
        "rank",
        "batch",
        "batches",
        "samples/s",
        "slots",
        "ready",
        "held",
        "full",
        "starved",
        "dataset",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(loaders.iter().map(loader));
    let widths: [usize; 11] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .enumerate()
            // The last column is text, the others are numbers.
            .map(
                |(column, (cell, width))| if column == 10 { cell.clone() } else { format!("{cell:>width$}") },
            )
            .collect();
        line(format_args!("{}\n", cells.join("  ")));
    }
    line(format_args!("full: time the ring had no free slot; starved: time a batch waited for data\n"));
    text
}

fn one_gpu(gpu: &Value) -> [String; 3] {
    let at = |pointer: &str| gpu.pointer(pointer);
    let hits = ["/gpu_cache/hits", "/pinned_cache/hits", "/passing"].map(|hits| number(at(hits)));
    let share = |nth: usize| match hits {
        [Some(cached), Some(pinned), Some(passing)] if cached + pinned + passing > 0.0 => {
            format!("{:.1} %", 100.0 * [cached, pinned, passing][nth] / (cached + pinned + passing))
        }
        _ => "-".to_owned(),
    };
    let mean = |total: &str, count: &str| match (number(at(total)), number(at(count))) {
        (Some(total), Some(count)) if count > 0.0 => format!("{:.1} us", total * 1e6 / count),
        _ => "-".to_owned(),
    };
    let upload_rate = match (number(at("/uploaded_bytes")), number(at("/upload_s"))) {
        (Some(bytes), Some(seconds)) if seconds > 0.0 => {
            format!(" in {seconds:.2} s ({:.1} GB/s)", bytes / seconds / 1e9)
        }
        _ => String::new(),
    };
    [
        format!(
            "gpu {}       {} ({}, {}), {} of {} free",
            word(at("/ordinal")),
            word(at("/name")),
            word(at("/uuid")),
            word(at("/image")),
            bytes(at("/memory/free")),
            bytes(at("/memory/total")),
        ),
        format!(
            "  tiers     GPU {} of {}, {} of reads; pinned {} of {}, {}; copied for a batch {}; {} uploaded{}",
            bytes(at("/gpu_cache/used")),
            bytes(at("/gpu_cache/budget")),
            share(0),
            bytes(at("/pinned_cache/used")),
            bytes(at("/pinned_cache/budget")),
            share(1),
            share(2),
            bytes(at("/uploaded_bytes")),
            upload_rate,
        ),
        format!(
            "  batches   {} in {} bursts, {} of kernels and {} of the host's time each",
            word(at("/batches")),
            word(at("/bursts")),
            mean("/kernel_s", "/batches"),
            mean("/enqueue_s", "/batches"),
        ),
    ]
}

fn loader(loader: &Value) -> [String; 11] {
    let at = |pointer: &str| loader.pointer(pointer);
    let rate = match (number(at("/counts/samples")), number(at("/age_s"))) {
        (Some(samples), Some(age)) if age > 0.0 => format!("{:.0}", samples / age),
        _ => "-".to_owned(),
    };
    [
        word(at("/pid")),
        format!("{}/{}", word(at("/rank")), word(at("/world_size"))),
        word(at("/batch_size")),
        word(at("/counts/batches")),
        rate,
        word(at("/slots/total")),
        word(at("/slots/ready")),
        word(at("/slots/leased")),
        duration(at("/counts/ring_full_s")),
        duration(at("/counts/data_wait_s")),
        word(at("/dataset")),
    ]
}

fn list(value: Option<&Value>) -> &[Value] {
    value.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn number(value: Option<&Value>) -> Option<f64> {
    value.and_then(Value::as_f64)
}

fn word(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

fn bytes(value: Option<&Value>) -> String {
    value.and_then(Value::as_u64).map_or_else(|| "-".to_owned(), |bytes| Bytes(bytes).to_string())
}

fn hit_rate(status: &Value) -> String {
    match (number(status.pointer("/store/hits")), number(status.pointer("/store/misses"))) {
        (Some(hits), Some(misses)) if hits + misses > 0.0 => {
            format!("{:.1} %", 100.0 * hits / (hits + misses))
        }
        _ => "-".to_owned(),
    }
}

fn duration(value: Option<&Value>) -> String {
    match number(value) {
        None => "-".to_owned(),
        Some(s) if s < 60.0 => format!("{s:.1} s"),
        Some(s) if s < 3600.0 => format!("{:.0} min", s / 60.0),
        Some(s) => format!("{:.1} h", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_answer_of_any_shape_is_shown_and_missing_fields_are_dashes() {
        for status in
            [json!({}), json!([1, 2]), json!({ "datasets": 3, "gpus": [0, {}], "loaders": [{}, 7, null] })]
        {
            assert!(render(&status).contains("process -"), "{status}");
        }
    }

    #[test]
    fn a_gpu_shows_what_of_its_reads_came_from_where() {
        let status = json!({ "gpus": [{
            "ordinal": 0, "gpu_cache": { "hits": 3 }, "pinned_cache": { "hits": 1 }, "passing": 0,
            "batches": 4, "kernel_s": 1e-4, "enqueue_s": 4e-5, "uploaded_bytes": 5_000_000_000_u64, "upload_s": 0.1,
        }] });
        let text = render(&status);
        assert!(
            text.contains("75.0 % of reads") && text.contains("25.0 %; copied for a batch 0.0 %"),
            "{text}"
        );
        assert!(text.contains("25.0 us of kernels and 10.0 us of the host's time"), "{text}");
        assert!(text.contains("4.7 GiB uploaded in 0.10 s (50.0 GB/s)"), "{text}");
    }

    #[test]
    fn rates_are_per_second_of_the_loaders_life() {
        let status = json!({
            "pid": 7, "store": { "hits": 3, "misses": 1 },
            "loaders": [{ "pid": 9, "age_s": 2.0, "rank": 1, "world_size": 4, "counts": { "samples": 500 } }],
        });
        let text = render(&status);
        assert!(text.contains("75.0 % hit rate"), "{text}");
        assert!(text.contains("1/4") && text.contains("250"), "{text}");
    }
}
