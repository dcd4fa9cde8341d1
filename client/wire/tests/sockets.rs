//! Datagrams, descriptors and the socket file.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "test code: a failure here is the test's")]

use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use robocache_wire::fds::{Access, Connection, FDS_MAX, Listener, Receive, Received, SocketError};
use robocache_wire::message::{DATAGRAM_LIMIT, ToClient, ToDaemon};

fn pair() -> (Connection, Connection) {
    Connection::pair().unwrap()
}

#[test]
fn a_message_arrives_whole_with_its_descriptors() {
    let (a, b) = pair();
    let mut file = tempfile();
    file.write_all(b"inside").unwrap();
    a.send(&ToClient::Stopping { pid: 3 }, &[file.as_fd(), file.as_fd()], Duration::ZERO).unwrap();
    let Received::Message(ToClient::Stopping { pid: 3 }, mut fds) = b.receive(Receive::Now).unwrap() else {
        panic!("the message comes")
    };
    assert_eq!(fds.len(), 2);
    let mut received = std::fs::File::from(fds.pop().unwrap());
    let flags = rustix::io::fcntl_getfd(&received).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    received.rewind().unwrap();
    let mut text = String::new();
    received.read_to_string(&mut text).unwrap();
    assert_eq!(text, "inside");
}

fn tempfile() -> std::fs::File {
    rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into()
}

#[test]
fn nothing_closed_and_broken_are_told_apart() {
    let (a, b) = pair();
    assert!(matches!(b.receive::<ToDaemon>(Receive::Now).unwrap(), Received::Nothing));
    assert!(matches!(
        b.receive::<ToDaemon>(Receive::Within(Duration::from_millis(5))).unwrap(),
        Received::Nothing
    ));
    a.send_datagram(b"what?", &[], Duration::ZERO).unwrap();
    assert!(matches!(b.receive::<ToDaemon>(Receive::Now), Err(SocketError::Decode(_))));
    a.send(&ToDaemon::Bye, &[], Duration::ZERO).unwrap();
    drop(a);
    assert!(matches!(b.receive(Receive::Now).unwrap(), Received::Message(ToDaemon::Bye, _)));
    assert!(matches!(b.receive::<ToDaemon>(Receive::Now).unwrap(), Received::Closed));
    assert!(matches!(b.send(&ToDaemon::Bye, &[], Duration::ZERO), Err(SocketError::Closed)));
}

#[test]
fn a_datagram_that_is_cut_is_an_error_and_the_next_one_comes() {
    let (a, b) = pair();
    a.send_datagram(&vec![0; DATAGRAM_LIMIT + 1], &[], Duration::ZERO).unwrap();
    a.send(&ToDaemon::Status, &[], Duration::ZERO).unwrap();
    assert!(matches!(b.receive::<ToDaemon>(Receive::Now), Err(SocketError::Truncated)));
    assert!(matches!(b.receive(Receive::Now).unwrap(), Received::Message(ToDaemon::Status, _)));
}

#[test]
fn more_descriptors_than_a_message_may_carry_are_an_error_and_none_leaks() {
    let (a, b) = pair();
    let file = tempfile();
    assert!(matches!(
        a.send(&ToDaemon::Bye, &[file.as_fd(); FDS_MAX + 1], Duration::ZERO),
        Err(SocketError::DescriptorsLost)
    ));
    // A peer with a larger buffer of its own.
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(9))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    let fds = [file.as_fd(); 9];
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
    rustix::net::sendmsg(&a, &[std::io::IoSlice::new(b"x")], &mut control, rustix::net::SendFlags::empty())
        .unwrap();
    assert!(matches!(b.receive::<ToDaemon>(Receive::Now), Err(SocketError::DescriptorsLost)));
    // Other tests open files meanwhile, memfds of this name three at most: a leak would be nine more.
    let target = |fd: std::io::Result<std::fs::DirEntry>| std::fs::read_link(fd.unwrap().path()).ok();
    let leaked = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(target);
    let leaked = leaked.filter(|path| path.to_string_lossy().starts_with("/memfd:test")).count();
    assert!(leaked <= 4, "{leaked} test memfds are open");
}

#[test]
fn a_peer_that_does_not_read_is_an_error_and_no_wait() {
    let (a, _b) = pair();
    let error = loop {
        if let Err(error) = a.send_datagram(&[1; 1000], &[], Duration::ZERO) {
            break error;
        }
    };
    assert!(matches!(error, SocketError::PeerDoesNotRead { len_bytes: 1000, .. }), "{error}");
}

#[test]
fn the_socket_is_0600_and_a_second_daemon_is_told_the_firsts_pid() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("new").join("robocached.sock");
    let listener = Listener::bind(&path, Access::Owner).unwrap();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
    let error = Listener::bind(&path, Access::Owner).unwrap_err();
    assert!(
        matches!(error, SocketError::AlreadyRunning { pid: Some(pid), .. } if pid == std::process::id()),
        "{error}"
    );
    assert!(listener.accept().unwrap().is_some(), "the second one's question");
    let client = Connection::connect(&path).unwrap();
    assert_eq!(client.peer().unwrap().pid, Some(std::process::id()));
    let served = listener.accept().unwrap().unwrap();
    assert_eq!(served.peer().unwrap().uid, rustix::process::getuid().as_raw());
    drop(listener);
    assert!(!path.exists());
    let group = Access::Group(rustix::process::getgid().as_raw());
    let _again = Listener::bind(&path, group).unwrap();
    assert_eq!(mode(&path), 0o660);
}

#[test]
fn a_dead_daemons_socket_is_replaced_and_another_file_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("robocached.sock");
    // A socket file that nobody listens on, as a kill -9 leaves it.
    let dead =
        rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::SEQPACKET, None)
            .unwrap();
    rustix::net::bind(&dead, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    drop(dead);
    drop(Listener::bind(&path, Access::Owner).unwrap());
    std::fs::write(&path, b"mine").unwrap();
    assert!(matches!(Listener::bind(&path, Access::Owner), Err(SocketError::NotASocket { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

#[test]
fn a_daemon_that_listens_and_does_not_accept_is_not_waited_for_without_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("robocached.sock");
    let _stopped = Listener::bind(&path, Access::Owner).unwrap();
    let mut waiting = Vec::new();
    let error = loop {
        match Connection::connect_within(&path, Duration::from_millis(1)) {
            Ok(connection) => waiting.push(connection),
            Err(error) => break error,
        }
        assert!(waiting.len() < 10_000, "no backlog is that long");
    };
    assert!(matches!(error, SocketError::NotAccepted { waited_ms: 1, .. }), "{error}");
    assert!(error.to_string().contains("SIGSTOP"), "{error}");
}

#[test]
fn a_directory_that_others_may_write_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let error = Listener::bind(&directory.path().join("s.sock"), Access::Owner).unwrap_err();
    assert!(matches!(error, SocketError::UnsafeDirectory { mode: 0o777, .. }), "{error}");
    assert!(error.to_string().contains("chmod 700"), "{error}");
}

#[test]
fn a_path_too_long_for_a_socket_is_told_so() {
    let path = std::path::PathBuf::from(format!("/tmp/{}", "x".repeat(120)));
    let error = Connection::connect(&path).unwrap_err();
    assert!(matches!(error, SocketError::PathTooLong { found: 125, .. }), "{error}");
}
