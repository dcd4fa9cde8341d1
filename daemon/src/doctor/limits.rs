//! What this process may use: memory, descriptors, locked memory, CPUs.

use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::host::{self, Memory};
use crate::size::Bytes;

/// Descriptors below which a handful of loaders with many files could run out.
const DESCRIPTORS: u64 = 4096;
/// Shared memory below which torch's own workers are known to die (Docker's default is 64 MiB).
const SHM: u64 = 1 << 30;

pub(super) fn findings(budget: Option<Bytes>) -> Vec<Finding> {
    vec![memory(budget), descriptors(), locked_memory(), shm(), overcommit(), cpus()]
}

fn memory(budget: Option<Bytes>) -> Finding {
    let memory = Memory::now();
    let Some(usable) = memory.usable() else {
        return Finding::warn(
            "memory",
            "neither /proc/meminfo nor a control group says how much there is",
            "give `serve` an explicit --memory",
        );
    };
    let chosen = budget.map_or_else(|| memory.default_budget(), |budget| budget.0);
    let limit = match memory.cgroup_limit {
        Some(limit) => format!("control group limit {}", Bytes(limit)),
        None => "no control group limit".to_owned(),
    };
    let found = format!("budget {}, usable {}, {limit}", Bytes(chosen), Bytes(usable));
    if chosen > usable {
        let cure = format!(
            "the kernel would swap or kill: serve with --memory {} or less, or raise the container's limit",
            usable / 2
        );
        return Finding::fail("memory", found, cure);
    }
    if chosen > usable / 4 * 3 {
        return Finding::warn("memory", found, "little is left for trainers; serve with a smaller --memory");
    }
    Finding::ok("memory", found)
}

fn say(limit: Option<u64>, what: impl Fn(u64) -> String) -> String {
    limit.map_or_else(|| "unlimited".to_owned(), what)
}

fn descriptors() -> Finding {
    let limit = getrlimit(Resource::Nofile);
    let plain = |n: u64| n.to_string();
    let found = format!("{} open files, which serve takes all of", say(limit.maximum, plain));
    match limit.maximum {
        Some(hard) if hard < DESCRIPTORS => Finding::warn(
            "nofile",
            found,
            format!(
                "raise the hard limit: ulimit -Hn {DESCRIPTORS} as root, or LimitNOFILE={DESCRIPTORS} in the systemd unit"
            ),
        ),
        _ => Finding::ok("nofile", found),
    }
}

fn locked_memory() -> Finding {
    let limit = getrlimit(Resource::Memlock);
    let size = |n: u64| Bytes(n).to_string();
    let found =
        format!("{} may be locked (hard limit {})", say(limit.current, size), say(limit.maximum, size));
    match limit.current {
        Some(soft) if soft < 64 << 20 && host::libcuda().is_some() => Finding::warn(
            "memlock",
            found,
            "pinning memory for a GPU may fail: ulimit -l unlimited, LimitMEMLOCK=infinity, docker --ulimit memlock=-1",
        ),
        _ => Finding::ok("memlock", found),
    }
}

fn shm() -> Finding {
    let check = "shm";
    let Ok(stat) = rustix::fs::statvfs("/dev/shm") else {
        return Finding::warn(
            check,
            "no /dev/shm; robocached needs none, but torch's own DataLoader workers do",
            "mount a tmpfs at /dev/shm, or docker run --shm-size=8g",
        );
    };
    let size = stat.f_blocks.saturating_mul(stat.f_frsize);
    let found = format!("/dev/shm has {} (memfds are not counted there)", Bytes(size));
    if size < SHM {
        let cure = "torch's own DataLoader workers may die with a bus error: docker run --shm-size=8g, or --ipc=host";
        return Finding::warn(check, found, cure);
    }
    Finding::ok(check, found)
}

fn overcommit() -> Finding {
    let mode = std::fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap_or_default();
    match mode.trim() {
        "2" => Finding::warn(
            "overcommit",
            "the kernel promises no more memory than it has (vm.overcommit_memory = 2)",
            "large rings may be refused: sysctl vm.overcommit_memory=0, or serve with a smaller --memory",
        ),
        "" => Finding::ok("overcommit", "unknown"),
        mode => Finding::ok("overcommit", format!("vm.overcommit_memory = {mode}")),
    }
}

fn cpus() -> Finding {
    let Ok(usable) = std::thread::available_parallelism() else {
        return Finding::warn(
            "cpus",
            "their number cannot be found out",
            "give `serve` an explicit --threads",
        );
    };
    let online = host::online_cpus();
    let found = match online {
        Some(online) => format!("{usable} of {online} usable (affinity, cpuset and quota considered)"),
        None => format!("{usable} usable"),
    };
    if usable.get() == 1 {
        return Finding::warn(
            "cpus",
            found,
            "daemon and trainer share one CPU; widen the cpuset or the quota",
        );
    }
    Finding::ok("cpus", found)
}
