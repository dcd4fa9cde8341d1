//! What the kernel can do: sealed memfds, shared futexes, pidfds; and what it does with huge pages.

use std::sync::atomic::AtomicU32;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use rustix::thread::futex;

use super::Finding;
use crate::host;

/// The first kernel with all that is needed: F_SEAL_FUTURE_WRITE is of 5.1, pidfd_open of 5.3.
const OLDEST: (u32, u32) = (5, 3);

pub(super) fn findings() -> Vec<Finding> {
    vec![version(), sealing(), shared_futex(), pidfd(), huge_pages()]
}

fn version() -> Finding {
    let (version, release) = host::kernel();
    match version {
        Some(version) if version >= OLDEST => Finding::ok("kernel", release),
        _ => Finding::fail(
            "kernel",
            release,
            format!("robocached needs Linux {}.{} or newer; boot a newer kernel", OLDEST.0, OLDEST.1),
        ),
    }
}

/// Does what the daemon does to a ring, and checks that it holds.
fn sealing() -> Finding {
    let cure = "robocached shares batches through sealed memfds and cannot run without; a seccomp profile or \
                gVisor may forbid them: allow memfd_create and fcntl(F_ADD_SEALS)";
    let sealed = || -> Result<bool, Errno> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = memfd_create("robocache-doctor", flags)?;
        ftruncate(&memfd, 4096)?;
        rustix::io::pwrite(&memfd, b"x", 0)?;
        fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE)?;
        let resized = ftruncate(&memfd, 8192).is_ok() || ftruncate(&memfd, 0).is_ok();
        let written = rustix::io::pwrite(&memfd, b"y", 0).is_ok();
        Ok(!resized && !written)
    };
    match sealed() {
        Ok(true) => Finding::ok("memfd", "memfds can be made and sealed (shrink, grow, future write)"),
        Ok(false) => Finding::fail("memfd", "a sealed memfd could still be resized or written", cure),
        Err(error) => Finding::fail("memfd", format!("a memfd cannot be made and sealed: {error}"), cure),
    }
}

fn shared_futex() -> Finding {
    // The word is not what the caller expects, so a kernel with futexes answers EAGAIN at once.
    let word = AtomicU32::new(1);
    match futex::wait(&word, futex::Flags::empty(), 0, None) {
        Err(Errno::AGAIN) => Finding::ok("futex", "shared futexes work"),
        other => Finding::fail(
            "futex",
            format!("a shared futex answered {other:?}, not EAGAIN"),
            "trainers wait on futexes; allow the futex system call",
        ),
    }
}

fn pidfd() -> Finding {
    match pidfd_open(getpid(), PidfdFlags::empty()) {
        Ok(_fd) => Finding::ok("pidfd", "processes can be watched by pidfd"),
        Err(error) => Finding::warn(
            "pidfd",
            format!("pidfd_open failed: {error}"),
            "slots of a killed trainer are then freed when its socket closes; allow pidfd_open, or use Linux 5.3",
        ),
    }
}

fn huge_pages() -> Finding {
    let chosen = |file: &str| {
        let text = std::fs::read_to_string(format!("/sys/kernel/mm/transparent_hugepage/{file}")).ok()?;
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0.to_owned())
    };
    match (chosen("enabled"), chosen("shmem_enabled")) {
        (None, None) => Finding::ok("hugepages", "the kernel has no transparent huge pages"),
        (private, shared) => {
            let say = |choice: Option<String>| choice.unwrap_or_else(|| "unknown".to_owned());
            Finding::ok(
                "hugepages",
                format!(
                    "transparent huge pages: {} for private, {} for shared memory (advise is best for large rings)",
                    say(private),
                    say(shared)
                ),
            )
        }
    }
}
