//! A trainer in a process of its own, for tests that kill it: this test binary again, running only [`trainer_process`].
//!
//! It reads the same loader as every other trainer here, on whatever device, and writes a line for every batch it is
//! done with: where it goes on after, the batch's ids, and a checksum of its data. So a log says what was delivered,
//! and [`assert_complete`] holds it against a loader that nobody killed.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use robocache::{Batch, Loader, LoaderBuilder, Position};

use crate::support::{Daemon, data};

/// What every trainer loads.
fn loader(builder: LoaderBuilder) -> LoaderBuilder {
    builder.features(["action"]).shuffle(true).seed(9)
}

/// Starts a trainer that goes on at `start`.
pub(crate) fn trainer(daemon: &Daemon, device: &str, log: &Path, start: Position) -> Child {
    trainer_by(Command::new(std::env::current_exe().unwrap()), daemon, device, log, start)
}

/// The same, run by another program.
pub(crate) fn trainer_by(
    mut runner: Command,
    daemon: &Daemon,
    device: &str,
    log: &Path,
    start: Position,
) -> Child {
    runner
        .args(["--exact", "trainer::trainer_process", "--nocapture"])
        .env("TRAINER_SOCKET", daemon.socket())
        .env("TRAINER_DEVICE", device)
        .env("TRAINER_LOG", log)
        .env("TRAINER_START", format!("{} {}", start.epoch, start.consumed))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Not a test: what [`trainer`] runs.
#[test]
fn trainer_process() {
    let Ok(socket) = std::env::var("TRAINER_SOCKET") else { return };
    let start = std::env::var("TRAINER_START").unwrap();
    let (epoch, consumed) = start.split_once(' ').unwrap();
    let start = Position { epoch: epoch.parse().unwrap(), consumed: consumed.parse().unwrap() };
    let mut log = std::fs::File::options().append(true).open(std::env::var("TRAINER_LOG").unwrap()).unwrap();
    let builder = loader(Loader::builder(data("g1_v30_conv")).batch_size(64));
    let builder = builder.device(std::env::var("TRAINER_DEVICE").unwrap());
    let mut loader = builder.socket(socket).start(start).connect().unwrap();
    let mut held = std::collections::VecDeque::new();
    loop {
        let Some(batch) = loader.next_batch().unwrap() else { continue };
        let after = batch.position_after();
        let line = format!("{} {} {}\n", after.epoch, after.consumed, content(&batch));
        log.write_all(line.as_bytes()).unwrap();
        held.push_back(batch);
        if held.len() > 2 {
            held.pop_front();
        }
    }
}

/// What a line says of a batch, but for its position.
fn content(batch: &Batch) -> String {
    let sum = bytes(batch, "action").iter().fold(0_u64, |sum, &byte| sum.rotate_left(5) ^ u64::from(byte));
    format!("{:?} {sum}", batch.ids())
}

/// The bytes of a column, wherever it lies.
pub(crate) fn bytes(batch: &Batch, name: &str) -> Vec<u8> {
    match batch.device_tensor(name) {
        Ok(tensor) => tensor.to_host().unwrap(),
        Err(_on_host) => batch.raw(name).unwrap().bytes().to_vec(),
    }
}

/// An empty log.
pub(crate) fn create(log: &Path) {
    std::fs::write(log, "").unwrap();
}

/// What a log says of each batch: where the trainer went on, and the rest of the line. A line cut short is left out.
pub(crate) fn lines(log: &Path) -> Vec<(Position, String)> {
    let text = std::fs::read_to_string(log).unwrap();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _cut)| whole);
    let line = |line: &str| {
        let mut words = line.splitn(3, ' ');
        let mut number = || words.next().unwrap().parse::<u64>().unwrap();
        let position = Position { epoch: number(), consumed: number() };
        (position, words.next().unwrap().to_owned())
    };
    whole.lines().map(line).collect()
}

/// Kills trainers one after another, each of which goes on where the last whole line of the one before left off.
/// `after` is called with the number of each, once it is gone.
pub(crate) fn kill_in_a_row(
    daemon: &Daemon,
    device: &str,
    log: &Path,
    kills: usize,
    mut after: impl FnMut(usize),
) {
    let mut random = 0x2545_f491_u64;
    let mut position = Position::default();
    for kill in 0..kills {
        let before = lines(log).len();
        let mut child = trainer(daemon, device, log, position);
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let wanted = before + 1 + usize::try_from(random >> 61).unwrap();
        daemon.wait_until("the trainer has done some batches", || lines(log).len() >= wanted);
        child.kill().unwrap();
        child.wait().unwrap();
        cut_to_whole_lines(log);
        position = lines(log).last().unwrap().0;
        after(kill);
    }
}

/// Cuts what a killed process left of a last line: even one write may end between two pages.
pub(crate) fn cut_to_whole_lines(log: &Path) {
    let text = std::fs::read(log).unwrap();
    let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline as u64 + 1);
    std::fs::File::options().write(true).open(log).unwrap().set_len(whole).unwrap();
}

/// The batches of a log are those of a loader on the CPU that nobody killed: none lost, none twice, none changed.
pub(crate) fn assert_complete(daemon: &Daemon, log: &Path) {
    let mut whole = loader(daemon.loader(data("g1_v30_conv"))).connect().unwrap();
    for (n, (position, found)) in lines(log).iter().enumerate() {
        let batch = loop {
            if let Some(batch) = whole.next_batch().unwrap() {
                break batch;
            }
        };
        assert_eq!((&batch.position_after(), &content(&batch)), (position, found), "batch {n}");
    }
}
