//! Host memory that is left to this process.
//!
//! The machine says it in `/proc/meminfo`, each memory cgroup above this process in its own files; the tightest wins.
//! Managed memory that lives in host memory counts against both, and a process that goes over is killed without a
//! word, so the allocator must know before it gets there. Page cache that the kernel would reclaim counts as
//! available, as `MemAvailable` has it for the machine.
//!
//! The parsing functions are pure: text in, numbers or an error naming the file and the line out.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::{DriverError, ErrorKind, HostMemory, Result};

/// Names a file to be read in place of `/proc/meminfo`: the memory of a simulated machine. The limits of the real
/// machine's cgroups say nothing about a simulated one, so they are then left out.
pub const MEMINFO_VARIABLE: &str = "TORCH_UVM_MEMINFO";

/// The files that say how much host memory is left.
#[derive(Clone, Debug)]
pub struct HostMemoryFiles {
    meminfo: PathBuf,
    cgroups: Option<CgroupFiles>,
    /// Where NUMA nodes are described, `None` where the machine is simulated.
    nodes: Option<NodeFiles>,
}

/// Where the NUMA nodes of the machine, and those that are GPUs' memory, are described.
#[derive(Clone, Debug)]
struct NodeFiles {
    /// A folder per NUMA node.
    root: PathBuf,
    /// A folder per GPU, of the NVIDIA driver's making.
    gpus: PathBuf,
}

/// Where the cgroups of this process are described.
#[derive(Clone, Debug)]
struct CgroupFiles {
    /// The file that names this process's cgroups.
    membership: PathBuf,
    /// Where the cgroup file systems are mounted.
    root: PathBuf,
}

impl HostMemoryFiles {
    /// This machine's own files, or those of the machine that the environment names ([`MEMINFO_VARIABLE`]).
    #[must_use]
    pub fn from_env() -> Self {
        match std::env::var_os(MEMINFO_VARIABLE).filter(|value| !value.is_empty()) {
            Some(meminfo) => Self { meminfo: meminfo.into(), cgroups: None, nodes: None },
            None => Self {
                meminfo: "/proc/meminfo".into(),
                cgroups: Some(CgroupFiles { membership: "/proc/self/cgroup".into(), root: "/sys/fs/cgroup".into() }),
                nodes: Some(NodeFiles {
                    root: "/sys/devices/system/node".into(),
                    gpus: "/proc/driver/nvidia/gpus".into(),
                }),
            },
        }
    }

    /// Reads them all.
    ///
    /// Where a GPU's memory is a NUMA node (GH200 in NUMA mode) the kernel counts it among the machine's, and the
    /// allocator on the device's side already: it is taken out. The NVIDIA driver names these nodes, also those of GPUs
    /// that this process does not see; `gpu_nodes` are those that the caller knows of, for containers that hide the
    /// driver's files.
    ///
    /// # Errors
    ///
    /// A file that must be there and is not, or one that says something unexpected. A missing cgroup file is no limit.
    pub fn read(&self, gpu_nodes: &[i32]) -> Result<HostMemory> {
        let text = fs::read_to_string(&self.meminfo).map_err(|error| unreadable(&self.meminfo, &error))?;
        let mut memory = parse_meminfo(&text, &self.meminfo)?;
        if let Some(nodes) = &self.nodes {
            for node in nodes.of_gpus(gpu_nodes)? {
                let file = nodes.root.join(format!("node{node}/meminfo"));
                // No such file: the memory is not online, and so not counted in the first place.
                let Some(text) = read_if_there(&file)? else { continue };
                let of_gpu = parse_node_meminfo(&text, &file)?;
                memory.total = memory.total.saturating_sub(of_gpu.total);
                memory.available = memory.available.saturating_sub(of_gpu.available);
            }
        }
        if let Some(cgroups) = &self.cgroups {
            // No such file: a kernel without cgroups.
            if let Some(text) = read_if_there(&cgroups.membership)? {
                let machine = memory.total;
                for limit in parse_membership(&text, &cgroups.membership)?.iter().flat_map(|g| g.folders(&cgroups.root))
                {
                    memory = limit.tighten(memory, machine)?;
                }
            }
        }
        Ok(memory)
    }
}

impl NodeFiles {
    /// The NUMA nodes that are GPUs' memory: those named by the driver's files, and `known`.
    fn of_gpus(&self, known: &[i32]) -> Result<BTreeSet<i32>> {
        let mut nodes: BTreeSet<i32> = known.iter().copied().collect();
        // No such folder: no driver, or a container that hides it.
        for gpu in fs::read_dir(&self.gpus).into_iter().flatten().flatten() {
            let file = gpu.path().join("numa_status");
            // Only there where the GPU's memory can be a node; a GPU that is not in use may refuse to be read.
            if let Ok(text) = fs::read_to_string(&file) {
                nodes.extend(parse_numa_status(&text, &file)?);
            }
        }
        Ok(nodes)
    }
}

/// Which version's file names a cgroup folder has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Version {
    V1,
    V2,
}

/// A memory cgroup of this process, as `/proc/self/cgroup` names it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Membership {
    version: Version,
    path: String,
}

impl Membership {
    /// The folder of the cgroup and those of its ancestors: a limit holds for everything below it.
    fn folders(&self, root: &Path) -> Vec<Folder> {
        let mounts: &[&str] = match self.version {
            Version::V1 => &["memory"],
            // Beside version 1 ("hybrid"), version 2 is mounted one folder down.
            Version::V2 => &["", "unified"],
        };
        let relative = Path::new(self.path.trim_start_matches('/'));
        // A container may see a path from outside its own view ("/../x", or one that is not there): its view's root is
        // then the cgroup that holds it, and the walk upwards ends there in any case.
        let escapes = relative.components().any(|part| part == Component::ParentDir);
        let relative = if escapes { Path::new("") } else { relative };
        let mut folders = Vec::new();
        for mount in mounts {
            let mount = root.join(mount);
            folders.extend(
                mount
                    .join(relative)
                    .ancestors()
                    .take_while(|folder| folder.starts_with(&mount))
                    .map(|folder| Folder { version: self.version, path: folder.to_path_buf() }),
            );
        }
        folders
    }
}

/// A cgroup's folder.
struct Folder {
    version: Version,
    path: PathBuf,
}

impl Folder {
    /// What is left of `memory` under this cgroup's limit, on a machine with so many bytes. A wider limit than that of
    /// another cgroup may still be the tighter one: others may have used it up.
    fn tighten(&self, memory: HostMemory, machine: u64) -> Result<HostMemory> {
        // `memory.high` counts as a limit: over it a process is not killed but slowed to a halt.
        let (limits, usage, reclaimable): (&[&str], _, _) = match self.version {
            Version::V1 => (&["memory.limit_in_bytes"], "memory.usage_in_bytes", "total_inactive_file"),
            Version::V2 => (&["memory.max", "memory.high"], "memory.current", "inactive_file"),
        };
        let mut limit = None;
        for name in limits {
            let file = self.path.join(name);
            if let Some(text) = read_if_there(&file)? {
                limit = limit.into_iter().chain(parse_limit(&text, &file)?).min();
            }
        }
        // Version 1 writes "no limit" as a number near 2^63: any limit above the machine's memory says nothing.
        let Some(limit) = limit.filter(|&limit| limit < machine) else { return Ok(memory) };
        let file = self.path.join(usage);
        let Some(text) = read_if_there(&file)? else { return Ok(memory) };
        let usage = parse_bytes(text.trim(), &file, 1)?;
        let file = self.path.join("memory.stat");
        let reclaimable = match read_if_there(&file)? {
            Some(text) => parse_stat(&text, reclaimable, &file)?,
            None => 0,
        };
        let available = limit.saturating_sub(usage.saturating_sub(reclaimable));
        Ok(HostMemory { total: memory.total.min(limit), available: memory.available.min(available) })
    }
}

/// `MemTotal` and `MemAvailable` of `/proc/meminfo`.
fn parse_meminfo(text: &str, file: &Path) -> Result<HostMemory> {
    Ok(HostMemory {
        total: require(kib_field(text, "MemTotal:", file)?, "MemTotal", file)?,
        available: require(kib_field(text, "MemAvailable:", file)?, "MemAvailable", file)?,
    })
}

/// `MemTotal` of a node's `meminfo`, and what of it the kernel counts in the machine's `MemAvailable`: free pages and
/// page cache. A node has no `MemAvailable` of its own; this is a little more than the kernel would count, and so errs
/// on the side of less host memory.
fn parse_node_meminfo(text: &str, file: &Path) -> Result<HostMemory> {
    // Each line begins with "Node 1 ".
    let field = |name: &str| {
        for (number, line) in (1..).zip(text.lines()) {
            if let Some(value) = line.split_once(name).map(|(_, value)| value) {
                return kib(value, file, number).map(Some);
            }
        }
        Ok(None)
    };
    let cache = field(" Active(file):")?.unwrap_or(0) + field(" Inactive(file):")?.unwrap_or(0);
    Ok(HostMemory {
        total: require(field(" MemTotal:")?, "MemTotal", file)?,
        available: require(field(" MemFree:")?, "MemFree", file)?.saturating_add(cache),
    })
}

/// The bytes of the field `name` (with its colon) of a `meminfo` file.
fn kib_field(text: &str, name: &str, file: &Path) -> Result<Option<u64>> {
    for (number, line) in (1..).zip(text.lines()) {
        if let Some(value) = line.strip_prefix(name) {
            return kib(value, file, number).map(Some);
        }
    }
    Ok(None)
}

/// "  1024 kB" in bytes.
fn kib(value: &str, file: &Path, line: usize) -> Result<u64> {
    value
        .trim()
        .strip_suffix("kB")
        .and_then(|number| number.trim_end().parse::<u64>().ok())
        .and_then(|number| number.checked_mul(1024))
        .ok_or_else(|| malformed(file, line, &format!("expected a number of kB, found {:?}", value.trim())))
}

/// The node that a GPU's memory is, from the driver's `numa_status`: a line "Node:      1"; -1 is none.
fn parse_numa_status(text: &str, file: &Path) -> Result<Option<i32>> {
    for (number, line) in (1..).zip(text.lines()) {
        if let Some(node) = line.strip_prefix("Node:") {
            let node = node.trim();
            let node: i32 = node
                .parse()
                .map_err(|_| malformed(file, number, &format!("expected the number of a node, found {node:?}")))?;
            return Ok(Some(node).filter(|&node| node >= 0));
        }
    }
    Ok(None)
}

/// The memory cgroups of this process, from `/proc/self/cgroup`: lines of `hierarchy:controllers:path`.
fn parse_membership(text: &str, file: &Path) -> Result<Vec<Membership>> {
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let mut parts = line.splitn(3, ':');
        let (Some(hierarchy), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            let what = format!("expected hierarchy:controllers:path, found {line:?}");
            return Err(malformed(file, number, &what));
        };
        if hierarchy == "0" && controllers.is_empty() {
            found.push(Membership { version: Version::V2, path: path.to_owned() });
        } else if controllers.split(',').any(|controller| controller == "memory") {
            found.push(Membership { version: Version::V1, path: path.to_owned() });
        }
    }
    Ok(found)
}

/// A cgroup's limit: bytes, or "max" for none.
fn parse_limit(text: &str, file: &Path) -> Result<Option<u64>> {
    match text.trim() {
        "max" => Ok(None),
        number => parse_bytes(number, file, 1).map(Some),
    }
}

fn parse_bytes(text: &str, file: &Path, line: usize) -> Result<u64> {
    text.parse().map_err(|_| malformed(file, line, &format!("expected a number of bytes, found {text:?}")))
}

/// The value of `name` in a cgroup's `memory.stat`; 0 where there is none.
fn parse_stat(text: &str, name: &str, file: &Path) -> Result<u64> {
    for (number, line) in (1..).zip(text.lines()) {
        if let Some((key, value)) = line.split_once(' ')
            && key == name
        {
            return parse_bytes(value.trim(), file, number);
        }
    }
    Ok(0)
}

/// The file's text; `None` where there is no such file.
fn read_if_there(file: &Path) -> Result<Option<String>> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        // A path through a file that is no folder is as absent as one through no file.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(unreadable(file, &error)),
    }
}

fn require(value: Option<u64>, name: &str, file: &Path) -> Result<u64> {
    value.ok_or_else(|| failure(format!("{} has no line {name}", file.display())))
}

fn malformed(file: &Path, line: usize, what: &str) -> DriverError {
    failure(format!("{}, line {line}: {what}", file.display()))
}

fn unreadable(file: &Path, error: &io::Error) -> DriverError {
    failure(format!("{} could not be read: {error}", file.display()))
}

/// No CUDA call: the name stands where a `CUresult`'s name would.
fn failure(message: String) -> DriverError {
    DriverError {
        kind: ErrorKind::Other,
        call: "reading the host's memory",
        code: -1,
        name: "host memory unknown".to_owned(),
        message,
    }
}

#[cfg(test)]
mod tests;
