#![no_main]

#[allow(dead_code, reason = "a target uses its own body only")]
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bodies::lerobot(data);
});
