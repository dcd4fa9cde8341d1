//! The fuzz targets' corpus, run on stable: every file that was once worth keeping is still a value or an error.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "test code: a failure here is the test's")]
#![expect(unreachable_pub, reason = "the bodies are shared with the fuzz targets")]

#[path = "../fuzz/fuzz_targets/bodies.rs"]
mod bodies;

fn each(name: &str, run: impl Fn(&[u8])) {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut seen = 0;
    for entry in std::fs::read_dir(&directory).unwrap() {
        let whole = std::fs::read(entry.unwrap().path()).unwrap();
        run(&whole);
        // And what a cut or a flipped byte makes of it.
        for at in 0..whole.len().min(600) {
            run(&whole[..at]);
            let mut other = whole.clone();
            other[at] ^= 0x40;
            run(&other);
        }
        seen += 1;
    }
    assert!(seen >= 3, "{directory:?} has {seen} files");
}

#[test]
fn every_message_of_the_corpus_is_a_message_or_an_error() {
    each("message", bodies::message);
}

#[test]
fn every_segment_of_the_corpus_is_a_segment_or_an_error() {
    each("segment", bodies::segment);
}
