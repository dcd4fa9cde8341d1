//! Writes every numeric stream of a dataset as raw little-endian bytes, one file per stream, episodes end to end, to
//! compare with what another reader says. Prints the time that reading took.
//!
//!     cargo run --release -p robocache-formats --example dump -- DATASET [OUT_DIRECTORY]

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use robocache_formats::{Dataset, OpenOptions, StreamKind};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let path = PathBuf::from(arguments.next().ok_or("which dataset?")?);
    let out = arguments.next().map(PathBuf::from);
    let started = Instant::now();
    let dataset = Dataset::open(&path, &OpenOptions::default())?;
    println!("opened in {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
    dataset.warnings().iter().for_each(|warning| println!("warning: {warning}"));
    let numeric = |stream: &usize| dataset.streams()[*stream].kind == StreamKind::Numeric;
    let streams: Vec<usize> = (0..dataset.streams().len()).filter(numeric).collect();
    let mut files = streams
        .iter()
        .map(|stream| out.as_deref().map(|out| create(out, &dataset.streams()[*stream].name)).transpose())
        .collect::<Result<Vec<_>, _>>()?;
    let (mut bytes, mut seconds) = (0, 0.0);
    for unit in dataset.units() {
        let started = Instant::now();
        let read = dataset.read(&unit, &streams)?;
        seconds += started.elapsed().as_secs_f64();
        for episode in &read {
            for (file, stream) in files.iter_mut().zip(episode) {
                bytes += stream.values.buffer.len();
                if let Some(file) = file {
                    file.write_all(&stream.values.buffer)?;
                }
            }
        }
    }
    println!(
        "{} episodes, {bytes} bytes in {:.1} ms: {:.0} MB/s on one thread",
        dataset.episodes().len(),
        seconds * 1e3,
        bytes as f64 / seconds / 1e6
    );
    Ok(())
}

fn create(out: &Path, stream: &str) -> std::io::Result<File> {
    File::create(out.join(format!("{}.bin", stream.replace('/', "_"))))
}
