//! What the daemon says of itself: the JSON of `robocached status --json`. Bytes are bytes, times are seconds.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use crate::gpu::host::Gpu;
use crate::open::Host;
use crate::session::Session;

/// Everything a user may want to know of a running daemon.
pub fn status<'a>(
    started: Instant,
    socket: &Path,
    host: &Host,
    sessions: impl Iterator<Item = &'a Session>,
) -> Value {
    let counters = host.store.counters();
    let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let read_s = get(&counters.read_ns) as f64 / 1e9;
    let datasets: Vec<Value> = host
        .catalog
        .open_datasets()
        .into_iter()
        .map(|(path, dataset)| {
            let (resident_bytes, resident_episodes) = dataset.resident();
            json!({
                "path": path,
                "layout": format!("{:?}", dataset.dataset().layout()),
                "episodes": dataset.dataset().episodes().len(),
                "streams": dataset.dataset().streams().len(),
                "resident_bytes": resident_bytes,
                "resident_episodes": resident_episodes,
            })
        })
        .collect();
    json!({
        "pid": std::process::id(),
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_s": started.elapsed().as_secs_f64(),
        "socket": socket,
        "served": host.catalog.names(),
        "memory": { "used": host.store.used(), "budget": host.store.budget() },
        "store": {
            "episodes_read": get(&counters.episodes_read),
            "bytes_decoded": get(&counters.bytes_decoded),
            "read_s": read_s,
            "evictions": get(&counters.evictions),
            "hits": get(&counters.hits),
            "misses": get(&counters.misses),
        },
        "gpus": host.gpus.open_devices().iter().map(|gpu| one_gpu(gpu)).collect::<Vec<Value>>(),
        "datasets": datasets,
        "loaders": sessions.filter_map(loader).collect::<Vec<Value>>(),
    })
}

fn one_gpu(gpu: &Gpu) -> Value {
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let seconds = |counter: &AtomicU64| get(counter) as f64 / 1e9;
    let (facts, tiers, work) = (gpu.device.facts(), &gpu.tiers, &gpu.work);
    // A device that is lost knows no numbers.
    let (free, total) = gpu.device.memory().unwrap_or((0, facts.memory_bytes));
    json!({
        "ordinal": facts.ordinal,
        "name": facts.name,
        "uuid": facts.uuid,
        "image": facts.image,
        "memory": { "free": free, "total": total },
        "gpu_cache": { "used": get(&tiers.gpu_used), "budget": get(&tiers.gpu_budget), "hits": get(&tiers.gpu_hits) },
        "pinned_cache":
            { "used": get(&tiers.pinned_used), "budget": get(&tiers.pinned_budget), "hits": get(&tiers.pinned_hits) },
        "passing": get(&tiers.passing),
        "uploaded_bytes": get(&tiers.uploaded_bytes),
        "upload_s": seconds(&tiers.upload_ns),
        "batches": get(&work.batches),
        "bursts": get(&work.bursts),
        "burst_s": seconds(&work.burst_ns),
        "kernel_s": seconds(&work.kernel_ns),
        "enqueue_s": seconds(&work.enqueue_ns),
    })
}

fn loader(session: &Session) -> Option<Value> {
    let shared = session.shared();
    let loader = shared.loader()?;
    let (spec, occupancy) = (&loader.spec, loader.producer.occupancy());
    Some(json!({
        "client": shared.client,
        "pid": shared.peer.pid,
        "uid": shared.peer.uid,
        "dataset": loader.dataset.dataset().root(),
        "device": spec.device,
        "batch_size": spec.batch_size,
        "rank": spec.rank,
        "world_size": spec.world_size,
        "age_s": loader.metrics.age().as_secs_f64(),
        "slots": {
            "total": loader.producer.shape().slots,
            "bytes": loader.producer.shape().slot_bytes,
            "free": occupancy.free,
            "filling": occupancy.filling,
            "ready": occupancy.ready,
            "leased": occupancy.leased,
            "scribbled": occupancy.scribbled,
        },
        "counts": loader.metrics.counts(),
    }))
}
