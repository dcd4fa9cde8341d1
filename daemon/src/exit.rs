//! The one table of exit codes. Scripts rely on it: never renumber; `docs/operating.md` repeats it.

use std::process::ExitCode;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done; nothing to complain about.
    Ok = 0,
    /// It failed, or it found something wrong (`doctor`: a FAIL; `inspect`: a dataset that cannot be read).
    Failed = 1,
    /// The command line or the config file is wrong. clap uses the same number.
    Usage = 2,
    /// No daemon answers on the socket.
    NoDaemon = 3,
    /// A daemon already serves this socket.
    AlreadyRunning = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error together with the exit code it deserves.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub error: anyhow::Error,
}

impl Failure {
    /// `error`, ending the process with `exit`.
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into() }
    }
}

/// Whatever nobody classified is a plain failure.
impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(Exit::Failed, error)
    }
}
