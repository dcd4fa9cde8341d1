//! Where the daemon meets its clients: the socket's directory, a daemon that is there already.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::Value;

use super::Finding;
use crate::admin::{self, AskError};

pub(super) fn findings(socket: Option<&Path>) -> Vec<Finding> {
    let socket = admin::socket_path(socket);
    vec![directory(&socket), daemon(&socket)]
}

fn directory(socket: &Path) -> Finding {
    let check = "socket";
    let directory = match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if socket.as_os_str().len() > 107 {
        let found = format!("{socket:?} is longer than the 107 bytes that a socket address holds");
        return Finding::fail(check, found, "choose a shorter --socket, or set ROBOCACHE_SOCKET");
    }
    let metadata = match std::fs::symlink_metadata(directory) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Finding::ok(
                check,
                format!("{directory:?} is not there yet; serve makes it, for this user only"),
            );
        }
        Err(error) => {
            let found = format!("{directory:?} cannot be looked at: {error}");
            return Finding::fail(check, found, "choose a --socket in a directory of your own");
        }
    };
    let (uid, mode, own) = (metadata.uid(), metadata.mode() & 0o7777, rustix::process::geteuid().as_raw());
    let found = format!("{directory:?} is user {uid}'s, mode {mode:o}");
    if !metadata.is_dir() {
        return Finding::fail(
            check,
            format!("{directory:?} is no directory"),
            "remove it, or choose another --socket",
        );
    }
    if uid != own && uid != 0 {
        return Finding::fail(
            check,
            found,
            "it must be yours: choose another --socket, or set ROBOCACHE_SOCKET",
        );
    }
    let sticky = mode & 0o1000 != 0;
    if mode & 0o022 != 0 && !sticky {
        let cure = format!("others could put a socket of theirs in its place: chmod 700 {directory:?}");
        return Finding::fail(check, found, cure);
    }
    Finding::ok(check, found)
}

fn daemon(socket: &Path) -> Finding {
    let check = "daemon";
    let ours = env!("CARGO_PKG_VERSION");
    match admin::ask_status(socket) {
        Ok(status) => {
            let theirs = status.get("version").and_then(Value::as_str).unwrap_or("unknown");
            let pid = status.get("pid").and_then(Value::as_u64).unwrap_or(0);
            let found = format!("version {theirs} runs as process {pid} on {socket:?}");
            if theirs == ours {
                return Finding::ok(check, found);
            }
            let cure = format!("this program is {ours}: robocached stop, then serve again");
            Finding::warn(check, found, cure)
        }
        Err(AskError::NoDaemon { .. }) => Finding::ok(check, format!("none runs on {socket:?}")),
        Err(error) => {
            Finding::warn(check, error.to_string(), "stop that process, or choose another --socket")
        }
    }
}
