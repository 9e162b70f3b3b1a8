//! `cargo xtask test`: every test of the project.

use std::process::{Command, ExitCode};

use anyhow::{Result, ensure};
use clap::ValueEnum;

use crate::environment::{self, Environment};
use crate::faults;
use crate::paths;
use crate::pins;
use crate::process;
use crate::sim::{self, Simulator};

/// Names the folder of the simulator's libraries to the Python tests, which put their own programs on it.
const LIBRARIES_VARIABLE: &str = "TORCH_UVM_SIM_LIB";
/// Folders with CUDA headers, for what the benchmark compiles.
const CUDA_INCLUDE_VARIABLE: &str = "TORCH_UVM_CUDA_INCLUDE";

/// How many processes run the Python tests at the most.
const MOST_PROCESSES: usize = 4;

/// A part of the tests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Part {
    /// Formatting, lints and the Rust tests
    Rust,
    /// The patched PyTorch on the simulated device
    Adapter,
    /// PyTorch as it is published, with the plug-in, on the simulated device
    Plugin,
    /// PyTorch's own test_cuda.py, with native and with uvm
    Pytorch,
    /// Plants faults in the allocator, one after the other: the Rust tests must notice each
    Faults,
    /// All of these
    All,
}

/// A part's name and what runs it, given PyTorch's release and the user's arguments.
type Suite = (&'static str, fn(&str, &[String]) -> Result<()>);

const RUST: Suite = ("rust", |_, _| rust());
const ADAPTER: Suite = ("adapter", adapter);
const PLUGIN: Suite = ("plugin", |_, arguments| plugin(arguments));
const PYTORCH: Suite = ("pytorch", pytorch);
const FAULTS: Suite = ("faults", |_, _| faults::run());

/// What belongs to a part; without one, all that takes minutes.
fn suites(part: Option<Part>) -> &'static [Suite] {
    match part {
        None => &[RUST, ADAPTER, PLUGIN],
        Some(Part::Rust) => &[RUST],
        Some(Part::Adapter) => &[ADAPTER],
        Some(Part::Plugin) => &[PLUGIN],
        Some(Part::Pytorch) => &[PYTORCH],
        Some(Part::Faults) => &[FAULTS],
        Some(Part::All) => &[RUST, ADAPTER, PLUGIN, PYTORCH, FAULTS],
    }
}

/// Runs the suites one after the other, all of them even if one fails, and says at the end how each went.
pub fn run(part: Option<Part>, torch: &str, arguments: &[String]) -> Result<ExitCode> {
    let mut failed = false;
    let mut summary = Vec::new();
    for (name, suite) in suites(part) {
        let line = match suite(torch, arguments) {
            Ok(()) => format!("test {name}: passed"),
            Err(error) => {
                failed = true;
                format!("test {name}: FAILED: {error:#}")
            }
        };
        eprintln!("==> {line}");
        summary.push(line);
    }
    if summary.len() > 1 {
        eprintln!("\n{}", summary.join("\n"));
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn rust() -> Result<()> {
    let cargo = |arguments: &[&str]| {
        let mut command = Command::new(sim::cargo());
        command.args(arguments).current_dir(paths::root());
        eprintln!("==> test rust: {}", process::line(&command));
        process::run(&mut command)
    };
    cargo(&["fmt", "--all", "--check"])?;
    cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"])?;
    cargo(&["test", "--workspace"])
}

fn adapter(torch: &str, arguments: &[String]) -> Result<()> {
    let ((environment, _), simulator) = (Environment::patched(torch)?, Simulator::prepare()?);
    python_tests("adapter", &environment, &simulator, &every_version_only(arguments))
}

/// The arguments of all runs but that with the newest release, which is the one to prove what is the same for all.
fn every_version_only(arguments: &[String]) -> Vec<String> {
    arguments.iter().cloned().chain(["--every-version-only".to_owned()]).collect()
}

/// The adapter's tests with each release of [`pins::PLUGIN_TESTS`], all of them even if one fails.
fn plugin(arguments: &[String]) -> Result<()> {
    let (wheel, simulator) = (environment::plugin_wheel()?, Simulator::prepare()?);
    let mut failed = Vec::new();
    for (index, torch) in pins::PLUGIN_TESTS.iter().enumerate() {
        let version = torch.version();
        eprintln!("==> test plugin: PyTorch {version}");
        let environment = Environment::stock(torch, &wheel)?;
        let arguments = if index == 0 { arguments.to_vec() } else { every_version_only(arguments) };
        if let Err(error) = python_tests("plugin", &environment, &simulator, &arguments) {
            failed.push(format!("PyTorch {version}: {error:#}"));
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// The tests of tests/python, in a few processes at a time: each keeps a PyTorch loaded.
fn python_tests(part: &str, environment: &Environment, simulator: &Simulator, arguments: &[String]) -> Result<()> {
    let mut pytest = Command::new(environment.venv.python());
    let processes = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_PROCESSES);
    pytest.args(["-m", "pytest", "tests/python", &format!("--numprocesses={processes}")]).args(arguments);
    pytest.current_dir(paths::root()).env_remove("PYTHONPATH").env(LIBRARIES_VARIABLE, simulator.libraries());
    eprintln!("==> test {part}: {}", process::line(&pytest));
    process::run(&mut pytest)
}

fn pytorch(torch: &str, arguments: &[String]) -> Result<()> {
    let ((environment, overlay), simulator) = (Environment::patched(torch)?, Simulator::prepare()?);
    let mut suite = environment.python("tests/python/pytorch_suite.py");
    suite.arg(&overlay.source).args(arguments).env(LIBRARIES_VARIABLE, simulator.libraries());
    eprintln!("==> test pytorch: {}", process::line(&suite));
    process::run(&mut suite)
}

/// `cargo xtask bench`: native and uvm in one run.
pub fn bench_hotpath(torch: &str, arguments: &[String]) -> Result<ExitCode> {
    let ((environment, overlay), simulator) = (Environment::patched(torch)?, Simulator::prepare()?);
    let mut driver = environment.python("benches/run.py");
    driver.args(["--workloads", "hotpath", "--backends", "native,uvm", "--out", "target/bench/hotpath.json"]);
    driver.args(arguments).env(LIBRARIES_VARIABLE, simulator.libraries());
    driver.env(CUDA_INCLUDE_VARIABLE, std::env::join_paths(&overlay.cuda_include)?);
    eprintln!("==> bench hotpath: {}", process::line(&driver));
    Ok(crate::demo::exit_code(process::status(&mut driver)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_every_part() {
        let names = |suites: &[Suite]| suites.iter().map(|(name, _)| *name).collect::<Vec<_>>();
        let parts = Part::value_variants().iter().filter(|part| **part != Part::All);
        let every: Vec<_> = parts.flat_map(|part| names(suites(Some(*part)))).collect();
        assert_eq!(names(suites(Some(Part::All))), every);
    }
}
