//! `robocached synth`: writes datasets that look like a robot's, of a chosen size, in constant memory.
//!
//! What is written is a function of the arguments and the seed alone (on one machine: `sin` is the platform's). The
//! file that makes a directory a dataset (`info.json`, `robocache.toml`) is written last, so that an interrupted run
//! leaves nothing that could be taken for one.

mod features;
mod lerobot;
mod signal;
mod stats;
mod streams;
mod table;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::cli;
use crate::exit::{Exit, Failure};
use crate::size::Bytes;

/// Arguments of `synth`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  robocached synth /tmp/pick --layout lerobot-v3.0 --episodes 50 --frames 300
  robocached synth /tmp/big --layout lerobot-v2.1 --size 2GiB --codec zstd
  robocached synth /tmp/flight --layout streams --episodes 3 --tactile-dim 16

LeRobot layouts hold observation.state, action, observation.tactile if asked for, and LeRobot's index columns.
Stream tables hold imu (200 Hz with jitter and repeated stamps), wheel (50 Hz with a hole), camera_pose (20 Hz, a
quaternion), joints (100 Hz), command (--fps), tactile (150 Hz) if asked for, and their robocache.toml.

Exit codes: 0 written; 1 OUT is not empty, or cannot be written; 2 wrong command line.")]
pub struct SynthArgs {
    /// Directory to write; made if absent, refused if not empty
    pub out: PathBuf,
    /// How the dataset lies on disk
    #[arg(long, value_enum, default_value_t = SynthLayout::LerobotV30)]
    pub layout: SynthLayout,
    /// Episodes to write
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..))]
    pub episodes: u64,
    /// Write as many episodes as it takes for the data to fill SIZE in memory, instead of --episodes
    #[arg(long, value_name = "SIZE", conflicts_with = "episodes")]
    pub size: Option<Bytes>,
    /// Frames of an episode; with stream tables it lasts frames / fps seconds
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub frames: u64,
    /// Frames a second
    #[arg(long, value_name = "HZ", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub fps: u32,
    /// Elements of the state (joints)
    #[arg(long, value_name = "D", default_value_t = 14, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub state_dim: u32,
    /// Elements of the action (command)
    #[arg(long, value_name = "D", default_value_t = 14, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub action_dim: u32,
    /// Elements of a tactile sensor; 0 is none
    #[arg(long, value_name = "D", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=4096))]
    pub tactile_dim: u32,
    /// Another seed, other data
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Compression of the Parquet files
    #[arg(long, value_enum, default_value_t = Codec::Snappy)]
    pub codec: Codec,
    /// How vectors are stored: LeRobot's own writer uses fixed, its v2.1-to-v3.0 converter variable
    #[arg(long, value_enum, default_value_t = ListKind::Fixed)]
    pub list: ListKind,
    /// Print what was written as JSON
    #[arg(long)]
    pub json: bool,
}

/// Layout of a synthetic dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SynthLayout {
    /// One file an episode
    #[value(name = "lerobot-v2.1")]
    LerobotV21,
    /// Many episodes in a file, metadata in Parquet
    #[value(name = "lerobot-v3.0")]
    LerobotV30,
    /// A table per stream, each with its own clock
    Streams,
}

/// Compression of Parquet pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Codec {
    None,
    Snappy,
    Zstd,
    Lz4,
    Gzip,
    Brotli,
}

/// Parquet type of a vector column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ListKind {
    /// `fixed_size_list<float>[D]`
    Fixed,
    /// `list<float>`
    Variable,
}

/// What was written.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Written {
    pub(crate) frames: u64,
    /// Of Parquet data files, metadata not counted.
    pub(crate) file_bytes: u64,
    pub(crate) files: u64,
}

/// One run: the arguments with the number of episodes settled.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    pub(crate) args: &'a SynthArgs,
    pub(crate) episodes: u64,
    pub(crate) progress: ProgressBar,
}

/// Bytes one episode takes in memory, uncompressed.
fn episode_bytes(args: &SynthArgs) -> u64 {
    match args.layout {
        SynthLayout::LerobotV21 | SynthLayout::LerobotV30 => args.frames * lerobot::row_bytes(args),
        SynthLayout::Streams => streams::episode_bytes(args),
    }
}

/// Does what `robocached synth` was asked to.
///
/// # Errors
///
/// `out` is not an empty directory, or writing fails.
pub fn run(args: &SynthArgs) -> Result<Exit, Failure> {
    let episodes = match args.size {
        None => args.episodes,
        Some(Bytes(size)) => size.div_ceil(episode_bytes(args)).max(1),
    };
    let started = Instant::now();
    prepare(&args.out)?;
    let total = episodes.saturating_mul(episode_bytes(args));
    let progress = ProgressBar::new(total).with_style(
        ProgressStyle::with_template(
            "{elapsed} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left",
        )
        .context("the progress bar's template")?,
    );
    let job = Job { args, episodes, progress };
    let written = match args.layout {
        SynthLayout::LerobotV21 | SynthLayout::LerobotV30 => lerobot::write(&job),
        SynthLayout::Streams => streams::write(&job),
    }
    .with_context(|| format!("writing a dataset into {:?}", args.out))?;
    job.progress.finish_and_clear();
    cli::print(&summary(&job, total, written, started.elapsed().as_secs_f64()))?;
    Ok(Exit::Ok)
}

fn prepare(out: &Path) -> anyhow::Result<()> {
    match std::fs::read_dir(out) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            std::fs::create_dir_all(out).with_context(|| format!("cannot make {out:?}"))
        }
        Err(error) => Err(error).with_context(|| format!("cannot write into {out:?}")),
        Ok(mut entries) => {
            if entries.next().is_some() {
                bail!("{out:?} is not empty; name a new directory, or remove it first");
            }
            Ok(())
        }
    }
}

fn summary(job: &Job<'_>, data_bytes: u64, written: Written, seconds: f64) -> String {
    let Written { frames, file_bytes, files } = written;
    let args = job.args;
    if args.json {
        let facts = json!({
            "path": args.out, "episodes": job.episodes, "frames": frames, "data_bytes": data_bytes,
            "file_bytes": file_bytes, "files": files, "seconds": seconds,
        });
        return format!("{facts:#}\n");
    }
    format!(
        "{}: {} episodes, {frames} frames, {} in memory, {} in {files} data file(s), {seconds:.1} s\n",
        args.out.display(),
        job.episodes,
        Bytes(data_bytes),
        Bytes(file_bytes),
    )
}

/// Rows that are made and handed to a writer at a time.
pub(crate) const BLOCK_ROWS: u64 = 4096;

/// `0..rows` in blocks of [`BLOCK_ROWS`].
pub(crate) fn blocks(rows: u64) -> impl Iterator<Item = std::ops::Range<u64>> {
    (0..rows.div_ceil(BLOCK_ROWS)).map(move |block| block * BLOCK_ROWS..((block + 1) * BLOCK_ROWS).min(rows))
}

/// Numbers that must fit the format's `int64`.
pub(crate) fn int64(value: u64) -> anyhow::Result<i64> {
    let fits = i64::try_from(value);
    ensure!(fits.is_ok(), "{value} does not fit the format's int64");
    Ok(fits?)
}
