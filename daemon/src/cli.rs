//! The command line: what can be asked of `robocached`, and what each question ends with.
//!
//! Arguments only; the work is in the module of each subcommand. Facts go to stdout, everything else to stderr, and
//! every way to end has its number in [`crate::exit`].

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use robocache_wire::fds::SocketError;

use crate::config::{DatasetFlag, Flags, GpuConfig, ServeOptions};
use crate::exit::{Exit, Failure};
use crate::logging::{self, LogFormat};
use crate::server::{self, ServeError};
use crate::size::Bytes;
use crate::synth::SynthArgs;
use crate::{admin, doctor, inspect, synth};

/// Reads robot episodes once per host and serves ready, time-aligned batches to trainers through shared memory.
#[derive(Debug, Parser)]
#[command(
    name = "robocached",
    version,
    propagate_version = true,
    subcommand_required = true,
    max_term_width = 110
)]
#[command(arg_required_else_help = true, after_long_help = AFTER)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

const AFTER: &str = "\
A first run, from nothing to batches:

  robocached synth /tmp/demo --layout lerobot-v3.0 --episodes 20    # a dataset to play with
  robocached inspect /tmp/demo                                      # what is in it
  robocached serve --dataset demo=/tmp/demo &                       # serve it
  python -c 'import robocache as rc; print(next(iter(rc.DataLoader(\"demo\", batch_size=8))))'
  robocached status                                                 # who reads what, how fast
  robocached stop

Exit codes: 0 done; 1 failed, or findings; 2 wrong command line or config; 3 no daemon; 4 already running.
Environment: ROBOCACHE_SOCKET (the socket), ROBOCACHE_LOG (log filter, such as robocached=debug).";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve datasets until told to stop
    Serve(ServeArgs),
    /// Show what a dataset holds: streams, rates, jitter, gaps, duplicates, nulls, NaN
    Inspect(InspectArgs),
    /// Check this host: limits, shared memory, versions; each finding with its cure
    Doctor(DoctorArgs),
    /// Show what a running daemon is doing
    Status(StatusArgs),
    /// Stop a running daemon
    Stop(StopArgs),
    /// Write a realistic dataset of a chosen size, for trials and benchmarks
    Synth(SynthArgs),
}

/// Arguments of `serve`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  robocached serve --dataset pick=/data/pick --dataset drive=/data/drive --memory 8GiB
  robocached serve --config /etc/robocache.toml --log-format json

Clients may also name any path this daemon's user can read; --dataset gives it a name. SIGTERM lets clients finish
their batches and leaves; SIGHUP reads the config file again. A second daemon on the same socket is refused (exit 4).
The config file's keys are in docs/operating.md; what a flag says wins over the file.")]
pub struct ServeArgs {
    /// Config file (TOML)
    #[arg(long, value_name = "FILE.toml")]
    pub config: Option<PathBuf>,
    /// Serve the dataset at PATH under NAME; may be repeated
    #[arg(long = "dataset", value_name = "NAME=PATH")]
    pub datasets: Vec<DatasetFlag>,
    /// Unix socket to listen on [default: $ROBOCACHE_SOCKET, else $XDG_RUNTIME_DIR/robocache/robocached.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Host memory for decoded episodes, such as 8GiB [default: half of what is available]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Bytes>,
    /// GPU memory for episodes on each GPU, such as 4GiB [default: a quarter of what is free]
    #[arg(long, value_name = "SIZE")]
    pub gpu_cache: Option<Bytes>,
    /// Pinned host memory for episodes that the GPU cache does not hold [default: a quarter of --memory]
    #[arg(long, value_name = "SIZE")]
    pub pinned_cache: Option<Bytes>,
    /// Simulated GPUs "sim:0", ..., for tests on hosts without one
    #[arg(long, value_name = "N", hide = true)]
    pub simulate_gpus: Option<u32>,
    /// Threads that read files, and as many that assemble batches [default: CPUs]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// Let members of this group attach too [default: only this user]
    #[arg(long, value_name = "NAME")]
    pub group: Option<String>,
    /// Form of log lines on stderr
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Leave when standard input ends (for a parent process that holds the other end of the pipe)
    #[arg(long)]
    pub exit_with_parent: bool,
    /// Leave after this many seconds without a client
    #[arg(long, value_name = "SECONDS")]
    pub idle_exit: Option<u64>,
}

/// Arguments of `inspect`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  robocached inspect /data/pick                                  # a LeRobot dataset, or one with robocache.toml
  robocached inspect /data/flight --write-manifest -             # draft a manifest for loose tables, to stdout
  robocached inspect /data/flight --write-manifest               # the same into /data/flight/robocache.toml
  robocached inspect /data/pick --json | jq '.streams[].name'

Exit codes: 0 every stream can be read; 1 one or the whole cannot, or a manifest is already there; 2 wrong
command line.")]
pub struct InspectArgs {
    /// A dataset directory, a manifest, or one Parquet / Arrow table
    pub path: PathBuf,
    /// Print facts as JSON
    #[arg(long)]
    pub json: bool,
    /// The episode to look at closely, by its episode_index [default: the first]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub episode: Option<i64>,
    /// Look closely at all episodes, which reads all of them
    #[arg(long, conflicts_with = "episode")]
    pub all: bool,
    /// A manifest to read the dataset with, instead of its own robocache.toml
    #[arg(long, value_name = "FILE.toml")]
    pub manifest: Option<PathBuf>,
    /// Draft a manifest from what the tables look like, into PATH/robocache.toml or FILE; - is stdout
    #[arg(long, value_name = "FILE", num_args = 0..=1, conflicts_with_all = ["json", "episode", "all", "manifest"])]
    pub write_manifest: Option<Option<PathBuf>>,
    /// Overwrite a manifest that exists
    #[arg(long, requires = "write_manifest")]
    pub force: bool,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each line is OK, WARN or FAIL with what was found and, where it is not OK, what to do about it.

Exit codes: 0 nothing FAILs; 1 something does.")]
pub struct DoctorArgs {
    /// Print findings as JSON
    #[arg(long)]
    pub json: bool,
    /// The socket whose directory and daemon to check
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Judge this memory budget instead of the default one
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Bytes>,
    /// Be the other process of the check that GPU memory can be shared
    #[arg(long, hide = true)]
    pub gpu_peer: bool,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 it answered; 1 it answered nonsense; 3 no daemon.")]
pub struct StatusArgs {
    /// Print the daemon's answer as JSON
    #[arg(long)]
    pub json: bool,
    /// The daemon's socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

/// Arguments of `stop`.
#[derive(Debug, Args)]
#[command(after_help = "\
Clients are told, keep the batches they hold, and raise an error at their next one.

Exit codes: 0 it is gone; 1 it did not go in time; 3 there was none.")]
pub struct StopArgs {
    /// The daemon's socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Do not wait for it to let its clients go: kill it if it is not gone after two seconds
    #[arg(long)]
    pub now: bool,
}

/// Parses the command line, does what it says, and reports errors on stderr with their causes.
pub fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(exit) => exit.into(),
        Err(Failure { exit, error }) => {
            report(&error);
            exit.into()
        }
    }
}

fn run(cli: Cli) -> Result<Exit, Failure> {
    match cli.command {
        Command::Serve(args) => serve(args),
        Command::Inspect(args) => {
            logging::init(LogFormat::Text, "warn")?;
            inspect::run(&args)
        }
        Command::Doctor(args) => doctor::run(&args),
        Command::Status(args) => admin::status(&args),
        Command::Stop(args) => admin::stop(&args),
        Command::Synth(args) => {
            logging::init(LogFormat::Text, "warn")?;
            synth::run(&args)
        }
    }
}

fn serve(args: ServeArgs) -> Result<Exit, Failure> {
    let ServeArgs {
        config,
        datasets,
        socket,
        memory,
        threads,
        group,
        log_format,
        gpu_cache,
        pinned_cache,
        simulate_gpus,
        exit_with_parent,
        idle_exit,
    } = args;
    let gpu = GpuConfig { gpu_cache, pinned_cache, simulate: simulate_gpus, ..GpuConfig::default() };
    let flags = Flags { socket, group, memory, threads, gpu, log_format, idle_exit, datasets };
    let options = ServeOptions::new(config, flags, exit_with_parent)
        .map_err(|error| Failure::new(Exit::Usage, error))?;
    logging::init(options.config.log.format, options.config.log_level())
        .map_err(|error| Failure::new(Exit::Usage, error))?;
    server::run(options).map_err(|error| {
        let exit = match &error {
            ServeError::Socket(SocketError::AlreadyRunning { .. }) => Exit::AlreadyRunning,
            ServeError::NoGroup { .. } => Exit::Usage,
            _ => Exit::Failed,
        };
        Failure::new(exit, error)
    })?;
    Ok(Exit::Ok)
}

/// `robocached: what failed: why: why that`, on one line, so that scripts can grep it.
fn report(error: &anyhow::Error) {
    // Nothing is left to tell anybody if stderr is closed.
    drop(writeln!(std::io::stderr(), "robocached: {error:#}"));
}

/// Writes facts to stdout. A reader that has gone away (`| head`) is no error.
///
/// # Errors
///
/// Any other failure to write.
pub fn print(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn write_manifest_takes_a_file_or_none() {
        let written = |args: &[&str]| match Cli::try_parse_from(args).unwrap().command {
            Command::Inspect(args) => args.write_manifest,
            other => panic!("{other:?}"),
        };
        assert_eq!(written(&["robocached", "inspect", "d"]), None);
        assert_eq!(written(&["robocached", "inspect", "d", "--write-manifest"]), Some(None));
        assert_eq!(written(&["robocached", "inspect", "d", "--write-manifest", "-"]), Some(Some("-".into())));
    }
}
