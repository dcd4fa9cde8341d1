//! Help, exit codes, config errors, doctor.

use serde_json::Value;

use super::common::{private_directory, robocached, text};

#[test]
fn every_subcommand_explains_itself_and_its_exit_codes() {
    let directory = private_directory();
    for subcommand in ["serve", "inspect", "doctor", "status", "stop", "synth"] {
        let output = robocached(directory.path(), &[subcommand, "--help"]);
        assert_eq!(output.status.code(), Some(0), "{subcommand}");
        let help = text(&output.stdout);
        assert!(help.contains("Usage: robocached"), "{help}");
        assert!(help.to_lowercase().contains("exit"), "{subcommand} says nothing of how it ends: {help}");
    }
    let help = text(&robocached(directory.path(), &["--help"]).stdout);
    assert!(help.contains("robocached synth") && help.contains("Exit codes"), "{help}");
}

#[test]
fn a_wrong_command_line_ends_with_2_and_says_what_is_known() {
    let directory = private_directory();
    for args in
        [&["sevre"][..], &["serve", "--memroy", "1"], &["serve", "--memory", "8 apples"], &["inspect"]]
    {
        let output = robocached(directory.path(), args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
    let error = text(&robocached(directory.path(), &["serve", "--memory", "8 apples"]).stderr);
    assert!(error.contains("GiB"), "{error}");
}

#[test]
fn an_unknown_config_key_ends_with_2_and_names_file_line_and_keys() {
    let directory = private_directory();
    let config = directory.path().join("robocache.conf.toml");
    std::fs::write(&config, "group = \"robots\"\nmemroy = \"8GiB\"\n").unwrap();
    let output = robocached(directory.path(), &["serve", "--config", config.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    let error = text(&output.stderr);
    for wanted in ["robocache.conf.toml", "line 2", "memroy", "memory"] {
        assert!(error.contains(wanted), "no {wanted:?} in {error}");
    }
    let output = robocached(directory.path(), &["serve", "--config", "/nowhere/at/all.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("/nowhere/at/all.toml"));
}

#[test]
fn without_a_daemon_status_and_stop_end_with_3_and_say_how_to_start_one() {
    let directory = private_directory();
    for subcommand in ["status", "stop"] {
        let output = robocached(directory.path(), &[subcommand]);
        assert_eq!(output.status.code(), Some(3), "{subcommand}");
        assert!(text(&output.stderr).contains("robocached serve"), "{subcommand}");
    }
}

#[test]
fn doctor_gives_every_finding_a_verdict_and_every_bad_one_a_cure() {
    let directory = private_directory();
    let output = robocached(directory.path(), &["doctor", "--json"]);
    let facts: Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = facts["findings"].as_array().unwrap();
    let mut failed = false;
    for finding in findings {
        let verdict = finding["verdict"].as_str().unwrap();
        assert!(["OK", "WARN", "FAIL"].contains(&verdict), "{finding}");
        assert_eq!(finding["cure"].is_string(), verdict != "OK", "{finding}");
        failed |= verdict == "FAIL";
    }
    assert_eq!(output.status.code(), Some(i32::from(failed)));
    let checks: Vec<&str> = findings.iter().map(|finding| finding["check"].as_str().unwrap()).collect();
    for check in
        ["kernel", "memfd", "futex", "memory", "nofile", "memlock", "shm", "cpus", "socket", "daemon"]
    {
        assert!(checks.contains(&check), "no {check} in {checks:?}");
    }
}

#[test]
fn doctor_fails_a_budget_that_the_host_does_not_have() {
    let directory = private_directory();
    let output = robocached(directory.path(), &["doctor", "--json", "--memory", "1000TiB"]);
    assert_eq!(output.status.code(), Some(1));
    let facts: Value = serde_json::from_slice(&output.stdout).unwrap();
    let memory =
        facts["findings"].as_array().unwrap().iter().find(|finding| finding["check"] == "memory").unwrap();
    assert_eq!(memory["verdict"], "FAIL");
    assert!(memory["cure"].as_str().unwrap().contains("--memory"), "{memory}");
}

#[test]
fn doctor_fails_a_socket_directory_that_others_may_write() {
    let directory = private_directory();
    let open = directory.path().join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let output = robocached(&open, &["doctor"]);
    assert_eq!(output.status.code(), Some(1));
    let table = text(&output.stdout);
    assert!(table.contains("FAIL  socket") && table.contains("chmod 700"), "{table}");
}
