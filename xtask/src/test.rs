//! `cargo xtask test`: every test of the project.

use std::process::{Command, ExitCode};

use anyhow::Result;
use clap::ValueEnum;

use crate::environment::Environment;
use crate::faults;
use crate::paths;
use crate::process;
use crate::sim::{self, Simulator};

/// Names the folder of the simulator's libraries to the Python tests, which put their own programs on it.
const LIBRARIES_VARIABLE: &str = "TORCH_UVM_SIM_LIB";
/// Folders with CUDA headers, for what the benchmark compiles.
const CUDA_INCLUDE_VARIABLE: &str = "TORCH_UVM_CUDA_INCLUDE";

/// A part of the tests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Part {
    /// Formatting, lints and the Rust tests
    Rust,
    /// The patched PyTorch on the simulated device
    Adapter,
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
const PYTORCH: Suite = ("pytorch", pytorch);
const FAULTS: Suite = ("faults", |_, _| faults::run());

/// What belongs to a part; without one, all that takes minutes.
fn suites(part: Option<Part>) -> &'static [Suite] {
    match part {
        None => &[RUST, ADAPTER],
        Some(Part::Rust) => &[RUST],
        Some(Part::Adapter) => &[ADAPTER],
        Some(Part::Pytorch) => &[PYTORCH],
        Some(Part::Faults) => &[FAULTS],
        Some(Part::All) => &[RUST, ADAPTER, PYTORCH, FAULTS],
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
    let (environment, simulator) = (Environment::prepare(torch)?, Simulator::prepare()?);
    let mut pytest = Command::new(environment.venv.python());
    pytest.args(["-m", "pytest", "tests/python"]).args(arguments).current_dir(paths::root());
    pytest.env_remove("PYTHONPATH").env(LIBRARIES_VARIABLE, simulator.libraries());
    eprintln!("==> test adapter: {}", process::line(&pytest));
    process::run(&mut pytest)
}

fn pytorch(torch: &str, arguments: &[String]) -> Result<()> {
    let (environment, simulator) = (Environment::prepare(torch)?, Simulator::prepare()?);
    let mut suite = environment.python("tests/python/pytorch_suite.py");
    suite.arg(&environment.overlay.source).args(arguments).env(LIBRARIES_VARIABLE, simulator.libraries());
    eprintln!("==> test pytorch: {}", process::line(&suite));
    process::run(&mut suite)
}

/// `cargo xtask bench`: native and uvm in one run.
pub fn bench_hotpath(torch: &str, arguments: &[String]) -> Result<ExitCode> {
    let (environment, simulator) = (Environment::prepare(torch)?, Simulator::prepare()?);
    let mut driver = environment.python("benches/hotpath.py");
    driver.args(arguments).env(LIBRARIES_VARIABLE, simulator.libraries());
    driver.env(CUDA_INCLUDE_VARIABLE, std::env::join_paths(&environment.overlay.cuda_include)?);
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
