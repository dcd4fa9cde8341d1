//! What the kernel says about this host: memory, limits, CPUs. Reads /proc and /sys, changes nothing.
//!
//! A file that is not there or not understood is `None`, never a guess.

use std::fs;
use std::path::{Path, PathBuf};

/// Memory as the kernel and the control group see it, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Physical memory.
    pub total: Option<u64>,
    /// What could be used without swapping.
    pub available: Option<u64>,
    /// The tightest limit of this process's control group and those above it.
    pub cgroup_limit: Option<u64>,
    /// What that control group uses already, reclaimable file pages not counted.
    pub cgroup_used: Option<u64>,
}

/// Budget of the episode store where nobody names one and nothing is known of the host.
const FALLBACK_BUDGET: u64 = 1 << 30;

impl Memory {
    /// Asks the kernel.
    pub fn now() -> Self {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let (cgroup_limit, cgroup_used) = cgroup();
        Self {
            total: meminfo_bytes(&meminfo, "MemTotal"),
            available: meminfo_bytes(&meminfo, "MemAvailable"),
            cgroup_limit,
            cgroup_used,
        }
    }

    /// Bytes this process may still take before the kernel swaps or kills.
    pub fn usable(&self) -> Option<u64> {
        let group = self.cgroup_limit.map(|limit| limit.saturating_sub(self.cgroup_used.unwrap_or(0)));
        match (self.available, group) {
            (Some(available), Some(group)) => Some(available.min(group)),
            (available, group) => available.or(group),
        }
    }

    /// The store's budget where the user names none: half of [`Memory::usable`].
    pub fn default_budget(&self) -> u64 {
        self.usable().map_or(FALLBACK_BUDGET, |usable| usable / 2)
    }
}

/// A field of /proc/meminfo, which counts in kibibytes.
fn meminfo_bytes(meminfo: &str, field: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// Limit and use of the tightest group at or above ours: version 2 of the interface, else version 1.
fn cgroup() -> (Option<u64>, Option<u64>) {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = |prefix: &str| {
        groups
            .lines()
            .find_map(|line| line.split_once(prefix))
            .map(|(_, path)| path.trim_start_matches('/').to_owned())
    };
    let mut tightest: Option<(u64, Option<u64>)> = None;
    let mut look = |root: &str, group: &str, limit: &str, used: &str, inactive: &str| {
        for directory in Path::new(root).join(group).ancestors().take_while(|at| at.starts_with(root)) {
            let Some(limit) = number(&directory.join(limit)) else { continue };
            if tightest.is_none_or(|(before, _)| limit < before) {
                let stat = fs::read_to_string(directory.join("memory.stat")).unwrap_or_default();
                let reclaimable = stat
                    .lines()
                    .find_map(|line| line.strip_prefix(inactive)?.trim().parse::<u64>().ok())
                    .unwrap_or(0);
                let used = number(&directory.join(used)).map(|used| used.saturating_sub(reclaimable));
                tightest = Some((limit, used));
            }
        }
    };
    if let Some(group) = own("0::") {
        look("/sys/fs/cgroup", &group, "memory.max", "memory.current", "inactive_file ");
    }
    if let Some(group) = own(":memory:") {
        let root = "/sys/fs/cgroup/memory";
        look(root, &group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ");
    }
    match tightest {
        // Version 1 writes "no limit" as a number no host has.
        Some((limit, used)) if limit < 1 << 60 => (Some(limit), used),
        _ => (None, None),
    }
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// CPUs that are switched on, whether or not this process may use them.
pub fn online_cpus() -> Option<usize> {
    let list = fs::read_to_string("/sys/devices/system/cpu/online").ok()?;
    list.trim()
        .split(',')
        .map(|range| match range.split_once('-') {
            None => range.parse::<usize>().ok().map(|_one| 1),
            Some((first, last)) => {
                let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
                Some(last.checked_sub(first)? + 1)
            }
        })
        .sum()
}

/// The kernel's version as `(major, minor)`, and in its own words.
pub fn kernel() -> (Option<(u32, u32)>, String) {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let version = match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    };
    (version, release)
}

/// Where the CUDA driver's library lies, if the loader would find it in the usual places.
pub fn libcuda() -> Option<PathBuf> {
    let listed = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let usual = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/lib/wsl/lib",
    ];
    std::env::split_paths(&listed)
        .chain(usual.into_iter().map(PathBuf::from))
        .map(|directory| directory.join("libcuda.so.1"))
        .find(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       24569048 kB\nMemAvailable:   100 kB\n";
        assert_eq!(meminfo_bytes(text, "MemTotal"), Some(24_569_048 * 1024));
        assert_eq!(meminfo_bytes(text, "MemAvailable"), Some(102_400));
        assert_eq!(meminfo_bytes(text, "Mem"), None);
        assert_eq!(meminfo_bytes("MemTotal: many kB", "MemTotal"), None);
    }

    #[test]
    fn the_budget_is_half_of_what_the_tighter_limit_leaves() {
        let memory =
            Memory { total: Some(100), available: Some(80), cgroup_limit: Some(60), cgroup_used: Some(20) };
        assert_eq!(memory.usable(), Some(40));
        assert_eq!(memory.default_budget(), 20);
        assert_eq!(Memory { cgroup_limit: None, ..memory }.default_budget(), 40);
        assert_eq!(Memory::default().default_budget(), FALLBACK_BUDGET);
    }
}
