//! Reading the host's memory from files that the tests write.

use super::*;

const MIB: u64 = 1 << 20;
const MEMINFO: &str = "MemTotal:       4194304 kB\nMemFree:  1048576 kB\nMemAvailable:    2097152 kB\nBuffers: 1 kB\n";

/// A folder that goes away with the test.
struct Sandbox(PathBuf);

impl Sandbox {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("torch-uvm-host-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let sandbox = Self(folder);
        sandbox.write("meminfo", MEMINFO);
        sandbox
    }

    fn write(&self, path: &str, text: &str) {
        let file = self.0.join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }

    fn files(&self) -> HostMemoryFiles {
        HostMemoryFiles {
            meminfo: self.0.join("meminfo"),
            cgroups: Some(CgroupFiles { membership: self.0.join("membership"), root: self.0.join("cgroup") }),
            nodes: Some(NodeFiles { root: self.0.join("node"), gpus: self.0.join("gpus") }),
        }
    }

    fn read(&self) -> Result<HostMemory> {
        self.files().read(&[])
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn mib(total: u64, available: u64) -> HostMemory {
    HostMemory { total: total * MIB, available: available * MIB }
}

#[test]
fn the_machine_alone() {
    assert_eq!(Sandbox::new("alone").read(), Ok(mib(4096, 2048)));
}

#[test]
fn the_tightest_cgroup_on_the_path_wins() {
    let sandbox = Sandbox::new("v2");
    sandbox.write("membership", "0::/jobs/mine\n");
    sandbox.write("cgroup/jobs/mine/memory.max", "max\n");
    sandbox.write("cgroup/jobs/mine/memory.current", "1\n");
    assert_eq!(sandbox.read(), Ok(mib(4096, 2048)), "max is no limit");

    sandbox.write("cgroup/jobs/memory.max", &format!("{}\n", 1024 * MIB));
    sandbox.write("cgroup/jobs/memory.current", &format!("{}\n", 700 * MIB));
    assert_eq!(sandbox.read(), Ok(mib(1024, 324)), "the parent's limit holds");

    let stat = format!("anon {}\ninactive_file {}\nactive_file 9\n", 400 * MIB, 200 * MIB);
    sandbox.write("cgroup/jobs/memory.stat", &stat);
    assert_eq!(sandbox.read(), Ok(mib(1024, 524)), "reclaimable page cache is available");

    sandbox.write("cgroup/jobs/mine/memory.high", &format!("{}\n", 100 * MIB));
    assert_eq!(sandbox.read(), Ok(HostMemory { total: 100 * MIB, available: 100 * MIB - 1 }));
}

#[test]
fn a_limit_that_is_overdrawn_leaves_nothing() {
    let sandbox = Sandbox::new("overdrawn");
    sandbox.write("membership", "0::/\n");
    sandbox.write("cgroup/memory.max", "1000\n");
    sandbox.write("cgroup/memory.current", "2000\n");
    assert_eq!(sandbox.read(), Ok(HostMemory { total: 1000, available: 0 }));
}

#[test]
fn version_1_beside_an_empty_version_2() {
    let sandbox = Sandbox::new("v1");
    sandbox.write("membership", "4:cpu,memory:/docker/abc\n1:name=systemd:/\n0::/\n");
    // The container's own cgroup is the root of what it sees.
    sandbox.write("cgroup/memory/memory.limit_in_bytes", &format!("{}\n", 512 * MIB));
    sandbox.write("cgroup/memory/memory.usage_in_bytes", &format!("{}\n", 500 * MIB));
    sandbox.write("cgroup/memory/memory.stat", &format!("inactive_file 7\ntotal_inactive_file {}\n", 100 * MIB));
    assert_eq!(sandbox.read(), Ok(mib(512, 112)));
    sandbox.write("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    assert_eq!(sandbox.read(), Ok(mib(4096, 2048)), "near 2^63 is no limit");
}

#[test]
fn what_changes_while_the_process_runs_is_seen_at_once() {
    let sandbox = Sandbox::new("changes");
    sandbox.write("membership", "0::/job\n");
    sandbox.write("cgroup/job/memory.max", &format!("{}\n", 1024 * MIB));
    sandbox.write("cgroup/job/memory.current", &format!("{}\n", 100 * MIB));
    let files = sandbox.files();
    let read = || files.read(&[]).unwrap();
    assert_eq!(read(), mib(1024, 924));
    // Others in the cgroup take some.
    sandbox.write("cgroup/job/memory.current", &format!("{}\n", 900 * MIB));
    assert_eq!(read(), mib(1024, 124));
    // Others on the machine take more.
    sandbox.write("meminfo", &MEMINFO.replace("2097152", &format!("{}", 50 * 1024)));
    assert_eq!(read(), mib(1024, 50));
    // The limit falls under what is used already, and is lifted.
    sandbox.write("cgroup/job/memory.max", &format!("{}\n", 512 * MIB));
    assert_eq!(read(), mib(512, 0));
    sandbox.write("cgroup/job/memory.max", "max\n");
    assert_eq!(read(), mib(4096, 50));
}

#[test]
fn cgroups_of_version_1_nest_too_and_both_versions_count() {
    let sandbox = Sandbox::new("nested");
    sandbox.write("membership", "5:memory:/slurm/job/step\n0::/session\n");
    for (folder, limit, usage) in [("slurm/job/step", 900, 10), ("slurm/job", 800, 700), ("slurm", 2000, 100)] {
        sandbox.write(&format!("cgroup/memory/{folder}/memory.limit_in_bytes"), &format!("{}\n", limit * MIB));
        sandbox.write(&format!("cgroup/memory/{folder}/memory.usage_in_bytes"), &format!("{}\n", usage * MIB));
    }
    assert_eq!(sandbox.read(), Ok(mib(800, 100)), "the job's, not the step's");
    // A wider limit that others have used up is the tighter one.
    sandbox.write("cgroup/memory/slurm/memory.usage_in_bytes", &format!("{}\n", 1970 * MIB));
    assert_eq!(sandbox.read(), Ok(mib(800, 30)));
    sandbox.write("cgroup/memory/slurm/memory.usage_in_bytes", "0\n");
    // "Hybrid": version 2 beside it.
    sandbox.write("cgroup/unified/session/memory.max", &format!("{}\n", 1000 * MIB));
    sandbox.write("cgroup/unified/session/memory.current", &format!("{}\n", 960 * MIB));
    assert_eq!(sandbox.read().unwrap().available, 40 * MIB);
}

#[test]
fn a_cgroup_outside_the_view_is_looked_for_at_its_root_only() {
    let sandbox = Sandbox::new("outside");
    sandbox.write("membership", "0::/../other\n");
    sandbox.write("other/memory.max", "1\n");
    sandbox.write("other/memory.current", "1\n");
    sandbox.write("cgroup/memory.max", &format!("{}\n", 64 * MIB));
    sandbox.write("cgroup/memory.current", "0\n");
    assert_eq!(sandbox.read(), Ok(mib(64, 64)));
}

#[test]
fn memory_of_a_gpu_that_is_a_numa_node_is_no_host_memory() {
    let sandbox = Sandbox::new("node");
    sandbox.write(
        "node/node1/meminfo",
        "Node 1 MemTotal:  2097152 kB\nNode 1 MemFree:   1048576 kB\nNode 1 Inactive(file): 1024 kB\n",
    );
    assert_eq!(sandbox.files().read(&[1]), Ok(mib(2048, 1023)), "known to the caller");
    assert_eq!(sandbox.files().read(&[2]), Ok(mib(4096, 2048)), "not online");
    sandbox.write("gpus/0009:01:00.0/information", "Model: x\n");
    sandbox.write("gpus/0019:01:00.0/numa_status", "Node:      -1\nStatus:    disabled\n");
    assert_eq!(sandbox.read(), Ok(mib(4096, 2048)), "no node");
    sandbox.write("gpus/0009:01:00.0/numa_status", "Node:      1\nStatus:    online\n");
    assert_eq!(sandbox.read(), Ok(mib(2048, 1023)), "known to the driver");
    assert_eq!(sandbox.files().read(&[1]), Ok(mib(2048, 1023)), "counted once");
}

#[test]
fn malformed_files_are_named_with_their_line() {
    for (file, text, told) in [
        ("meminfo", "MemTotal: 1 kB\nMemAvailable: lots kB\n", "meminfo, line 2: expected a number of kB"),
        ("meminfo", "MemTotal: 1 MB\nMemAvailable: 1 kB\n", "meminfo, line 1: expected a number of kB"),
        ("meminfo", "MemTotal: 1 kB\nMemAvailable: -1 kB\n", "meminfo, line 2: expected a number of kB"),
        ("meminfo", "MemTotal: 99999999999999999999 kB\n", "meminfo, line 1: expected a number of kB"),
        ("meminfo", "MemTotal: 18446744073709551615 kB\n", "meminfo, line 1: expected a number of kB"),
        ("meminfo", "MemTotal: 1 kB\n", "meminfo has no line MemAvailable"),
        ("meminfo", "", "meminfo has no line MemTotal"),
        ("gpus/0/numa_status", "Node: one\n", "numa_status, line 1: expected the number of a node, found \"one\""),
        ("membership", "0::/\nnonsense\n", "membership, line 2: expected hierarchy:controllers:path"),
        ("cgroup/memory.max", "twelve\n", "memory.max, line 1: expected a number of bytes, found \"twelve\""),
        ("cgroup/memory.current", "\n", "memory.current, line 1: expected a number of bytes, found \"\""),
        ("cgroup/memory.stat", "anon 1\ninactive_file x\n", "memory.stat, line 2: expected a number of bytes"),
    ] {
        let sandbox = Sandbox::new("malformed");
        sandbox.write("membership", "0::/\n");
        sandbox.write("cgroup/memory.max", "4096\n");
        sandbox.write("cgroup/memory.current", "0\n");
        sandbox.write(file, text);
        let error = sandbox.read().unwrap_err();
        assert!(error.to_string().contains(told), "{file}: {error}");
    }
}

#[test]
fn this_machine_can_be_read() {
    let memory = HostMemoryFiles::from_env().read(&[]).unwrap();
    assert!(memory.available <= memory.total && memory.total > 0, "{memory:?}");
}
