//! The fuzz targets' corpus, run on stable: every file that was once worth keeping is still a value or an error.
#![expect(clippy::unwrap_used, reason = "test code: a failure here is the test's")]
#![expect(unreachable_pub, reason = "the bodies are shared with the fuzz targets")]

#[path = "../fuzz/fuzz_targets/bodies.rs"]
mod bodies;

/// Runs every file of a corpus, and what a cut or a flipped byte at about `places` of them makes of it.
fn each(name: &str, places: usize, run: impl Fn(&[u8])) {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut seen = 0;
    for entry in std::fs::read_dir(&directory).unwrap() {
        let whole = std::fs::read(entry.unwrap().path()).unwrap();
        run(&whole);
        // An odd stride comes by every alignment.
        for at in (0..whole.len()).step_by((whole.len() / places) | 1) {
            run(&whole[..at]);
            let mut other = whole.clone();
            other[at] ^= 1 << (at % 8);
            run(&other);
        }
        seen += 1;
    }
    assert!(seen >= 8, "{directory:?} has {seen} files");
}

#[test]
fn every_table_of_the_corpus_is_a_table_or_an_error() {
    // Decoders' panics are contained, and would fill the log.
    each("table", 250, bodies::table);
}

#[test]
fn every_lerobot_dataset_of_the_corpus_is_a_dataset_or_an_error() {
    each("lerobot", 300, |data| {
        bodies::lerobot(data);
    });
    for name in ["v20", "v21", "v30"] {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/lerobot").join(name);
        let streams = bodies::lerobot(&std::fs::read(path).unwrap());
        assert_eq!(streams, 2 * 9, "{name}: every stream of both episodes");
    }
}

#[test]
fn every_manifest_of_the_corpus_is_a_manifest_or_an_error() {
    each("manifest", 1000, bodies::manifest);
}
