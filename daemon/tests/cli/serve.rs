//! `serve`, `status` and `stop` as processes; what a served loader delivers is tested with the daemon's core.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};

use super::common::{command, json, private_directory, robocached, text};

/// A daemon that is killed when the test ends, however it ends.
struct Daemon(Child);

impl Daemon {
    /// Starts it and returns once it says that it serves.
    fn start(directory: &Path, args: &[&str]) -> Self {
        let mut child = command(directory, &[&["serve"], args].concat())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = child.stderr.take().unwrap();
        let daemon = Self(child);
        let mut lines = BufReader::new(stderr).lines();
        let mut said = String::new();
        for line in &mut lines {
            let line = line.unwrap();
            if line.contains("serving") {
                // Its log must not fill the pipe.
                std::thread::Builder::new()
                    .name("log".to_owned())
                    .spawn(move || lines.for_each(drop))
                    .unwrap();
                return daemon;
            }
            said.push_str(&line);
        }
        panic!("the daemon never said that it serves: {said}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn a_daemon_is_seen_by_status_and_doctor_and_gone_after_stop() {
    let directory = private_directory();
    let data = directory.path().join("data");
    let args = ["synth", data.to_str().unwrap(), "--episodes", "2", "--frames", "10"];
    assert!(robocached(directory.path(), &args).status.success());
    let dataset = format!("pick={}", data.display());
    let mut daemon = Daemon::start(directory.path(), &["--dataset", &dataset, "--memory", "64MiB"]);

    let status = json(directory.path(), &["status", "--json"]);
    assert_eq!(status["pid"], daemon.0.id());
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(status["memory"]["budget"], 64 << 20);
    assert!(status["served"].to_string().contains("pick"), "{status}");
    let table = text(&robocached(directory.path(), &["status"]).stdout);
    assert!(table.contains("64.0 MiB") && table.contains("no loaders"), "{table}");
    let doctor = text(&robocached(directory.path(), &["doctor"]).stdout);
    assert!(doctor.contains(&format!("process {}", daemon.0.id())), "{doctor}");

    let stopped = robocached(directory.path(), &["stop"]);
    assert_eq!(stopped.status.code(), Some(0), "{}", text(&stopped.stderr));
    assert_eq!(daemon.0.wait().unwrap().code(), Some(0));
    assert_eq!(robocached(directory.path(), &["status"]).status.code(), Some(3));
}

#[test]
fn a_second_daemon_on_the_same_socket_ends_with_4_and_names_the_first() {
    let directory = private_directory();
    let daemon = Daemon::start(directory.path(), &[]);
    let second = robocached(directory.path(), &["serve"]);
    assert_eq!(second.status.code(), Some(4));
    let error = text(&second.stderr);
    assert!(error.contains(&daemon.0.id().to_string()), "{error}");
}

#[test]
fn with_exit_with_parent_the_end_of_standard_input_is_the_daemons() {
    let directory = private_directory();
    let mut daemon = Daemon::start(directory.path(), &["--exit-with-parent"]);
    drop(daemon.0.stdin.take());
    assert_eq!(daemon.0.wait().unwrap().code(), Some(0));
}

#[test]
fn stop_now_does_not_wait() {
    let directory = private_directory();
    let mut daemon = Daemon::start(directory.path(), &[]);
    assert_eq!(robocached(directory.path(), &["stop", "--now"]).status.code(), Some(0));
    daemon.0.wait().unwrap();
}

#[test]
fn log_lines_are_json_when_asked_for() {
    let directory = private_directory();
    let mut child = command(directory.path(), &["serve", "--log-format", "json"])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    let daemon = Daemon(child);
    let event: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&event["level"], &event["message"]), (&"INFO".into(), &"serving".into()));
    drop(daemon);
}
