//! Questions to a daemon that need no loader.

use std::path::Path;
use std::time::{Duration, Instant};

use robocache_wire::fds::{Receive, Received};
use robocache_wire::message::{ToClient, ToDaemon};

use crate::connect::{SEND_PATIENCE, dial};
use crate::error::{ConnectError, Named};

const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// What the daemon on `socket` says of itself, as `robocached status --json` prints it.
pub fn status(socket: &Path) -> Result<serde_json::Value, ConnectError> {
    match ask(socket, &ToDaemon::Status)? {
        ToClient::StatusReply(value) => Ok(value),
        other => Err(unexpected(socket, &other)),
    }
}

/// When a daemon that is told to stop does so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Once its clients have taken what is published.
    Drained,
    Now,
}

/// Stop the daemon on `socket`; returns its process id.
pub fn stop(socket: &Path, when: When) -> Result<u32, ConnectError> {
    match ask(socket, &ToDaemon::Stop { now: when == When::Now })? {
        ToClient::Stopping { pid } => Ok(pid),
        other => Err(unexpected(socket, &other)),
    }
}

fn ask(socket: &Path, question: &ToDaemon) -> Result<ToClient, ConnectError> {
    let connection = dial(socket, Named::Explicitly)?;
    connection.send(question, &[], SEND_PATIENCE)?;
    let start = Instant::now();
    loop {
        let left = ANSWER_LIMIT.saturating_sub(start.elapsed());
        match connection.receive::<ToClient>(Receive::Within(left))? {
            Received::Message(ToClient::Refused { code, message }, _) => {
                return Err(ConnectError::Refused { code, message });
            }
            // A daemon that stops may tell every connection before it answers ours.
            Received::Message(ToClient::Draining { .. }, _) => {}
            Received::Message(answer, _) => return Ok(answer),
            Received::Closed => return Err(ConnectError::HungUp { path: socket.to_owned() }),
            Received::Nothing => {
                return Err(ConnectError::TimedOut { path: socket.to_owned(), limit: ANSWER_LIMIT });
            }
        }
    }
}

fn unexpected(socket: &Path, answer: &ToClient) -> ConnectError {
    ConnectError::Protocol { path: socket.to_owned(), what: format!("its answer was {answer:?}") }
}
