//! What the daemon says of itself: the JSON of `robocached status --json`. Bytes are bytes, times are seconds.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde_json::{Value, json};

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
        "datasets": datasets,
        "loaders": sessions.filter_map(loader).collect::<Vec<Value>>(),
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
            "total": spec.slots,
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
