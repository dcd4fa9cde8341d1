//! `robocached doctor`: what on this host would keep the daemon from working well, and what to do about it.
//!
//! A check never changes the host, never needs privileges, and never panics on a strange one: what it cannot find
//! out it says so. FAIL means the daemon cannot run; WARN means it runs, but worse or not for everybody.

mod gpu;
mod kernel;
mod limits;
mod place;

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::json;

use crate::cli::{self, DoctorArgs};
use crate::exit::{Exit, Failure};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// A stable name for scripts.
    pub check: &'static str,
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do, where there is something to do.
    pub cure: Option<String>,
}

impl Finding {
    pub(crate) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, found: found.into(), cure: None }
    }

    pub(crate) fn warn(check: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Warn, found: found.into(), cure: Some(cure.into()) }
    }

    pub(crate) fn fail(check: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Fail, found: found.into(), cure: Some(cure.into()) }
    }
}

/// Looks at everything.
pub fn examine(args: &DoctorArgs) -> Vec<Finding> {
    let mut findings = kernel::findings();
    findings.extend(limits::findings(args.memory));
    findings.extend(place::findings(args.socket.as_deref()));
    findings.extend(gpu::findings());
    findings
}

/// Does what `robocached doctor` was asked to.
///
/// # Errors
///
/// Standard output cannot be written; as the peer of a GPU check, what the check is to find out.
pub fn run(args: &DoctorArgs) -> Result<Exit, Failure> {
    if args.gpu_peer {
        return gpu::peer();
    }
    let findings = examine(args);
    let text = if args.json {
        let worst = findings.iter().map(|finding| finding.verdict).max();
        let facts = json!({ "version": env!("CARGO_PKG_VERSION"), "verdict": worst, "findings": findings });
        format!("{facts:#}\n")
    } else {
        table(&findings)
    };
    cli::print(&text)?;
    let failed = findings.iter().any(|finding| finding.verdict == Verdict::Fail);
    Ok(if failed { Exit::Failed } else { Exit::Ok })
}

fn table(findings: &[Finding]) -> String {
    let mut text = String::new();
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    for Finding { check, verdict, found, cure } in findings {
        let verdict = match verdict {
            Verdict::Ok => "OK  ",
            Verdict::Warn => "WARN",
            Verdict::Fail => "FAIL",
        };
        let mut line = |line: std::fmt::Arguments<'_>| text.write_fmt(line).expect("a String takes any text");
        line(format_args!("{verdict}  {check:width$}  {found}\n"));
        if let Some(cure) = cure {
            line(format_args!("      {:width$}  -> {cure}\n", ""));
        }
    }
    text
}
