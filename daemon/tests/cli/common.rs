//! Running the built binary, and the real data it is tried on.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// `robocached ARGS` with a socket of its own in `directory`, so that no daemon of the user's is met.
pub(crate) fn command(directory: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_robocached"));
    command.args(args).env("ROBOCACHE_SOCKET", directory.join("robocached.sock")).env_remove("ROBOCACHE_LOG");
    command
}

/// Runs it to its end.
pub(crate) fn robocached(directory: &Path, args: &[&str]) -> Output {
    command(directory, args).output().unwrap()
}

/// Runs it, insists on exit code 0, and reads what it printed as JSON.
pub(crate) fn json(directory: &Path, args: &[&str]) -> Value {
    let output = robocached(directory, args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A directory that only this user can write, as sockets need it.
pub(crate) fn private_directory() -> tempfile::TempDir {
    tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .tempdir()
        .unwrap()
}

/// Recorded data that the tests read in place.
pub(crate) fn real(name: &str) -> PathBuf {
    let root = std::env::var_os("ROBOCACHE_TEST_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    let path = root.join(name);
    assert!(
        path.exists(),
        "test data is missing: {path:?}; set ROBOCACHE_TEST_DATA to the folder that holds {name}"
    );
    path
}
