//! `inspect --write-manifest`: the drafted manifest, to a file that is not there yet, or to stdout.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use robocache_formats::{FILE_NAME, draft_manifest};

use crate::cli;

/// Drafts a manifest for `path` and writes it to `target` (`-` is stdout; absent: into the dataset's directory).
/// What a person should check goes to stderr.
pub(super) fn write(path: &Path, target: Option<&Path>, force: bool) -> anyhow::Result<()> {
    let (text, notes) = draft_manifest(path)?;
    for note in notes {
        // Nothing is left to tell anybody if stderr is closed.
        drop(writeln!(std::io::stderr(), "check: {note}"));
    }
    let target = match target {
        Some(target) if target == Path::new("-") => return Ok(cli::print(&text)?),
        Some(target) => target.to_owned(),
        None => beside(path)?,
    };
    let mut options = OpenOptions::new();
    if force {
        options.write(true).create(true).truncate(true)
    } else {
        options.write(true).create_new(true)
    };
    let mut file = match options.open(&target) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            return Err(anyhow!("{target:?} is there already; use --force to overwrite it, or - for stdout"));
        }
        outcome => outcome.with_context(|| format!("cannot write {target:?}"))?,
    };
    file.write_all(text.as_bytes()).with_context(|| format!("cannot write {target:?}"))?;
    cli::print(&format!("{}\n", target.display()))?;
    Ok(())
}

fn beside(path: &Path) -> anyhow::Result<PathBuf> {
    if path.is_dir() {
        return Ok(path.join(FILE_NAME));
    }
    Err(anyhow!("{path:?} is one table; name the manifest's file, or - for stdout: --write-manifest FILE"))
}
