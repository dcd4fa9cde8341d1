//! Where log lines go: to stderr, as text or as one JSON object a line. Set up once, by `main`.
//!
//! Standard output is for what a command was asked to print and nothing else, so that pipes stay clean.

use std::io::IsTerminal;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// Form of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// The environment variable that overrides the level, in `tracing`'s filter language (`robocached=debug`).
pub const LOG_VARIABLE: &str = "ROBOCACHE_LOG";

/// A log filter that cannot be understood.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    #[error("log filter {filter:?} is not one: use error, warn, info, debug, trace, or target=level pairs")]
    Filter { filter: String, source: tracing_subscriber::filter::ParseError },
    #[error("a log subscriber is already set in this process")]
    AlreadySet,
}

/// Sends log lines to stderr from here on. `$ROBOCACHE_LOG` wins over `level`.
///
/// # Errors
///
/// The filter does not parse, or logging was set up before.
pub fn init(format: LogFormat, level: &str) -> Result<(), LogError> {
    let filter = std::env::var(LOG_VARIABLE).unwrap_or_else(|_unset| level.to_owned());
    let parsed = EnvFilter::try_new(&filter).map_err(|source| LogError::Filter { filter, source })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(|_other| LogError::AlreadySet)
}
