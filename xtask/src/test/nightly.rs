//! What takes too long for every change.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::counts::Counts;
use super::lint::release;
use super::python::{LIBRARIES_VARIABLE, newest};
use super::rust::cargo;
use super::schedule::{Counted, Task};
use super::{Part, Run, checking, counted, python, testing};
use crate::environment::Environment;
use crate::faults;
use crate::lock::Lock;
use crate::output;
use crate::paths;
use crate::pins;
use crate::platform_libraries::compilers_file;
use crate::plugin;
use crate::process;
use crate::sim::Simulator;
use crate::toolchain::Toolchain;

/// The tests that go through most of the adapter's C++.
const WATCHED: [&str; 10] = [
    "test_activation.py",
    "test_backend.py",
    "test_caching.py",
    "test_graphs.py",
    "test_hints.py",
    "test_pools.py",
    "test_sharing.py",
    "test_snapshot.py",
    "test_statistics.py",
    "test_threads.py",
];
/// What of PyTorch is compiled without the checks must not look like a fault of ours: containers, `new` and `delete`, and
/// variables that cross the border. The simulator's stand-ins are loaded before AddressSanitizer.
const ADDRESS_OPTIONS: &str = "verify_asan_link_order=0:detect_leaks=0:detect_container_overflow=0:\
                               alloc_dealloc_mismatch=0:detect_odr_violation=0:abort_on_error=1";
const UNDEFINED_OPTIONS: &str = "print_stacktrace=1:abort_on_error=1";
/// The soak's seed and length for each mutant.
const SOAK: &str = "1:2000";

pub fn tasks<'a>(run: &'a Run, parts: &[&Part]) -> Vec<Task<'a>> {
    let task = |part: &&Part| match part {
        Part::Pytorch => Some(checking("pytorch", &[], 1, || python::pytorch(run))),
        Part::Faults => Some(checking("faults", &[], 1, faults::run)),
        Part::Mutants => Some(testing("mutants", &[], 1, || mutants(run))),
        Part::Sanitizers => Some(testing("sanitizers", &[], 1, || sanitizers(run))),
        Part::Loom => Some(testing("loom", &[], 1, loom)),
        _ => None,
    };
    parts.iter().filter_map(task).collect()
}

/// Changes the modules that `.cargo/mutants.toml` names, one place after the other.
fn mutants(run: &Run) -> Result<Counts> {
    let program = cargo_mutants()?;
    let mut command = Command::new(program);
    command.args(["mutants", "--package", "torch-uvm", "--no-shuffle", "--colors", "never", "--output"]);
    command.arg(paths::target()).args(&run.arguments).current_dir(paths::root()).env("TORCH_UVM_SOAK", SOAK);
    let name = process::line(&command);
    output::say(format_args!("==> {name}"));
    let mut counts = None;
    process::watch(&mut command, |line| counts = counted_mutants(line).or(counts))?;
    let counts = counts.with_context(|| format!("`{name}` did not say how many mutants were noticed"))?;
    ensure!(counts.passed + counts.failed > 0, "`{name}` made no mutant");
    let missed = paths::target().join("mutants.out/missed.txt");
    let noticed = || -> Result<()> {
        ensure!(counts.failed == 0, "no test noticed those in {}", paths::shown(&missed));
        Ok(())
    };
    noticed().context(Counted(counts))?;
    Ok(counts)
}

/// cargo-mutants of the pinned version, built under `target/` if it is not there.
fn cargo_mutants() -> Result<PathBuf> {
    let _lock = Lock::take()?;
    let root = paths::target().join("tools");
    let program = root.join("bin/cargo-mutants");
    let version = || process::capture(Command::new(&program).args(["mutants", "--version"])).unwrap_or_default();
    if !version().contains(pins::CARGO_MUTANTS) {
        let mut install = cargo(&["install", "cargo-mutants", "--locked", "--quiet", "--version", pins::CARGO_MUTANTS]);
        process::run(install.arg("--root").arg(&root)).context("cargo-mutants could not be installed")?;
    }
    Ok(program)
}

/// The counts in cargo-mutants' closing line: noticed and missed; those that do not compile show nothing.
fn counted_mutants(line: &str) -> Option<Counts> {
    let (_, rest) = line.split_once(" mutants tested in ").or_else(|| line.split_once(" mutant tested in "))?;
    let (_, rest) = rest.split_once(": ")?;
    let mut counts = Counts::default();
    for part in rest.split(", ") {
        let (number, what) = part.split_once(' ')?;
        let number: u64 = number.parse().ok()?;
        match what {
            "caught" | "timeouts" | "timeout" => counts.passed += number,
            "missed" => counts.failed += number,
            _ => counts.skipped += number,
        }
    }
    Some(counts)
}

/// The adapter's tests with a plug-in that AddressSanitizer and UBSan watch.
fn sanitizers(run: &Run) -> Result<Counts> {
    let wheel = {
        let _lock = Lock::take()?;
        plugin::make_sanitized(release()?, &paths::target().join("sanitizers"))?
    };
    let (environment, simulator) = (Environment::sanitized(newest(), &wheel)?, Simulator::prepare()?);
    let toolchain = Toolchain::native()?;
    let preload = ["libasan.so", "libubsan.so"].map(|name| compilers_file(&toolchain, name));
    let preload =
        preload.into_iter().map(|file| Ok(file?.to_string_lossy().into_owned())).collect::<Result<Vec<_>>>()?;
    let mut pytest = Command::new(environment.venv.python());
    pytest.args(["-m", "pytest", "--numprocesses=2"]).current_dir(paths::root()).env_remove("PYTHONPATH");
    if run.arguments.is_empty() {
        pytest.args(WATCHED.map(|file| format!("tests/python/{file}")));
    }
    pytest.args(&run.arguments).env(LIBRARIES_VARIABLE, simulator.libraries()).env("LD_PRELOAD", preload.join(":"));
    counted(pytest.env("ASAN_OPTIONS", ADDRESS_OPTIONS).env("UBSAN_OPTIONS", UNDEFINED_OPTIONS))
}

/// The models of `src/thread_cache/orders.rs`.
fn loom() -> Result<Counts> {
    let mut command = cargo(&["test", "--package", "torch-uvm", "--lib"]);
    command.arg("--target-dir").arg(paths::target().join("loom"));
    // Optimised: some models have many thousands of orders.
    counted(command.args(["--config", "profile.dev.opt-level=2", "orders::"]).env("RUSTFLAGS", "--cfg loom"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mutants_are_counted() {
        let line = "212 mutants tested in 1h 12m: 3 missed, 190 caught, 15 unviable, 4 timeouts";
        assert_eq!(counted_mutants(line), Some(Counts { passed: 194, failed: 3, skipped: 15 }));
        assert_eq!(counted_mutants("1 mutant tested in 3s: 1 caught"), Some(Counts::PASSED));
        assert_eq!(counted_mutants("ok       Unmutated baseline in 28.1s build + 39.2s test"), None);
    }
}
