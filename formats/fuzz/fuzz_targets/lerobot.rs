#![no_main]

#[allow(dead_code, reason = "a target uses its own body only")]
mod bodies;

use std::sync::Once;

static HOOK: Once = Once::new();

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // libfuzzer's hook aborts at any panic, and a decoder's are contained by design; what leaves `lerobot` still aborts.
    HOOK.call_once(|| drop(std::panic::take_hook()));
    bodies::lerobot(data);
});
