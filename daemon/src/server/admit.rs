//! Who may use the daemon, by what the kernel says of the peer and the host's own lists of groups.
//!
//! The socket file's mode keeps strangers out; this decides between those who got in, and does not rely on it.

use std::time::Duration;

use robocache_wire::fds::{Connection, Peer};
use robocache_wire::message::{RefusalCode, ToClient};

use super::ServeError;
use crate::catalog::Trust;

/// Clients at once; each takes a thread and a few descriptors.
const SESSIONS: usize = 1024;

/// Who a client is and how far to trust it; `None`: it was told why it may not stay.
pub(super) fn admit(connection: &Connection, group: Option<u32>, connected: usize) -> Option<(Peer, Trust)> {
    let refuse = |code, message: String| {
        tracing::warn!(message, "refused a client");
        let refused = ToClient::Refused { code, message };
        if let Err(error) = connection.send(&refused, &[], Duration::ZERO) {
            tracing::debug!(%error, "the refused client did not wait for the reason");
        }
    };
    let peer = match connection.peer() {
        Ok(peer) => peer,
        Err(error) => {
            refuse(RefusalCode::Internal, error.to_string());
            return None;
        }
    };
    let Some(trust) = trust(&peer, group) else {
        let own = nix::unistd::geteuid();
        let message = format!(
            "user {} may not use this daemon, which is user {own}'s; run one of your own, or have its owner set `group`",
            peer.uid
        );
        refuse(RefusalCode::NotAllowed, message);
        return None;
    };
    if connected >= SESSIONS {
        refuse(RefusalCode::Busy, format!("{SESSIONS} clients are connected, which is the limit"));
        return None;
    }
    Some((peer, trust))
}

/// How far a peer may be trusted: the daemon's own user and root wholly, `group` by name, others not at all.
fn trust(peer: &Peer, group: Option<u32>) -> Option<Trust> {
    let own = nix::unistd::geteuid().as_raw();
    if peer.uid == own || peer.uid == 0 {
        return Some(Trust::Owner);
    }
    let group = group?;
    (peer.gid == group || in_group(peer.uid, group)).then_some(Trust::Group)
}

/// Whether a user is a member of a group by the host's own lists.
fn in_group(uid: u32, group: u32) -> bool {
    let Ok(Some(user)) = nix::unistd::User::from_uid(uid.into()) else { return false };
    let Ok(name) = std::ffi::CString::new(user.name) else { return false };
    nix::unistd::getgrouplist(&name, user.gid)
        .is_ok_and(|groups| groups.iter().any(|gid| gid.as_raw() == group))
}

/// The number of the group that the config names.
pub(super) fn group_id(name: &str) -> Result<u32, ServeError> {
    match nix::unistd::Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        Ok(None) => Err(ServeError::NoGroup { name: name.to_owned() }),
        Err(errno) => Err(ServeError::System { what: "cannot look up the group", source: errno.into() }),
    }
}
