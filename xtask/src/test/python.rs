//! The Python tests: PyTorch on the simulated device, patched, as it is published, and with the plug-in.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::OnceLock;

use anyhow::{Context, Result};

use super::counts::Counts;
use super::schedule::Task;
use super::{Part, Run, counted, making, testing};
use crate::build_tools;
use crate::environment::{self, Environment};
use crate::index::Index;
use crate::pins::{self, OfficialTorch};
use crate::process;
use crate::python::Python;
use crate::sim::Simulator;
use crate::step::Step;
use crate::{output, paths};

/// Names the folder of the simulator's libraries to the Python tests, which put their own programs on it.
pub const LIBRARIES_VARIABLE: &str = "TORCH_UVM_SIM_LIB";
/// Folders with CUDA headers, for what the benchmark compiles.
const CUDA_INCLUDE_VARIABLE: &str = "TORCH_UVM_CUDA_INCLUDE";

/// How many processes run the Python tests at the most.
const MOST_PROCESSES: usize = 4;

/// What some steps make and others use.
#[derive(Default)]
pub struct Made {
    simulator: OnceLock<Simulator>,
    plugin: OnceLock<PathBuf>,
    patched: OnceLock<Environment>,
}

/// The newest release that the plug-in is tested with: it proves what is the same for all.
pub fn newest() -> &'static OfficialTorch {
    &pins::PLUGIN_TESTS[0]
}

pub fn add<'a>(run: &'a Run, parts: &[&Part], tasks: &mut Vec<Task<'a>>) {
    let asked = |part| parts.contains(&&part);
    let (simulator, adapter, plugin) = (asked(Part::Simulator), asked(Part::Adapter), asked(Part::Plugin));
    let patched = format!("PyTorch {} patched", run.torch);
    let ground = format!("CUDA of PyTorch {}", run.torch);
    // First what is fetched, in the order in which it is needed; then what is compiled; then the tests.
    if adapter {
        tasks.push(making(&ground, &[], 0, || Environment::patched_ground(&run.torch).map(drop)));
    }
    if simulator || plugin {
        for torch in pins::PLUGIN_TESTS {
            tasks.push(making(official(torch), &[], 0, || Environment::official(torch).map(drop)));
        }
    }
    if simulator || adapter || plugin {
        tasks.push(making("simulator", &[], 1, || keep(&run.made.simulator, Simulator::prepare()?)));
    }
    if plugin {
        tasks.push(making("plug-in", &["simulator"], 1, || keep(&run.made.plugin, environment::plugin_wheel()?)));
    }
    if adapter {
        tasks.push(making(&patched, &[&ground], 1, || keep(&run.made.patched, Environment::patched(&run.torch)?.0)));
    }
    let processes = processes();
    if simulator {
        for torch in pins::PLUGIN_TESTS {
            let name = format!("simulator: PyTorch {}", torch.version());
            let after = ["simulator", &official(torch)];
            tasks.push(testing(name, &after, 1, || acceptance(run, torch)));
        }
    }
    if plugin {
        for (index, torch) in pins::PLUGIN_TESTS.iter().enumerate() {
            let name = format!("plug-in: PyTorch {}", torch.version());
            let after = ["plug-in", &official(torch)];
            tasks.push(testing(name, &after, processes, move || with_plugin(run, torch, index == 0)));
        }
    }
    if adapter {
        let name = format!("adapter: PyTorch {}", run.torch);
        tasks.push(testing(name, &["simulator", &patched], processes, || adapter_tests(run)));
    }
}

/// What to say where the package index has a newer PyTorch than the tests. Whether it is there is no test of ours.
pub fn newer_than_tested() -> Option<String> {
    let tools = build_tools::prepare(&Step::unseen(), &Python::find(None).ok()?).ok()?;
    let there = Index::of_pip(&tools).ok()?.newest("torch").ok()??;
    let tested = newest().version();
    let note = format!("the package index has PyTorch {there}; the newest in xtask/src/pins.rs is {tested}");
    (there != tested).then_some(note)
}

fn official(torch: &OfficialTorch) -> String {
    format!("PyTorch {}", torch.version())
}

/// Keeps what a step made; each step is there once.
fn keep<T>(place: &OnceLock<T>, made: T) -> Result<()> {
    drop(place.set(made));
    Ok(())
}

fn made<T>(place: &OnceLock<T>) -> Result<&T> {
    place.get().context("the step that makes this did not run")
}

/// The simulator's own acceptance program, with PyTorch's own allocator.
fn acceptance(run: &Run, torch: &OfficialTorch) -> Result<Counts> {
    let environment = Environment::official(torch)?;
    let mut program = environment.python("sim/capi/tests/smoke.py");
    made(&run.made.simulator)?.apply(&mut program, &crate::sim::Machine::small_gh200());
    counted(program.env_remove("PYTORCH_CUDA_ALLOC_CONF").env_remove("PYTORCH_ALLOC_CONF"))
}

fn adapter_tests(run: &Run) -> Result<Counts> {
    python_tests(made(&run.made.patched)?, made(&run.made.simulator)?, &run.arguments, false)
}

fn with_plugin(run: &Run, torch: &OfficialTorch, all: bool) -> Result<Counts> {
    let environment = Environment::stock(torch, made(&run.made.plugin)?)?;
    python_tests(&environment, made(&run.made.simulator)?, &run.arguments, all)
}

fn processes() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MOST_PROCESSES)
}

/// The tests of tests/python, in a few processes at a time: each keeps a PyTorch loaded. What one version of PyTorch
/// proves for all runs only with `all`.
fn python_tests(environment: &Environment, simulator: &Simulator, arguments: &[String], all: bool) -> Result<Counts> {
    let mut pytest = Command::new(environment.venv.python());
    pytest.args(["-m", "pytest", "tests/python", "--durations=20"]).arg(format!("--numprocesses={}", processes()));
    pytest.args((!all).then_some("--every-version-only")).args(arguments);
    pytest.current_dir(paths::root()).env_remove("PYTHONPATH").env(LIBRARIES_VARIABLE, simulator.libraries());
    counted(&mut pytest)
}

/// PyTorch's own tests, with native and with uvm.
pub fn pytorch(run: &Run) -> Result<()> {
    let ((environment, overlay), simulator) = (Environment::patched(&run.torch)?, Simulator::prepare()?);
    let mut suite = environment.python("tests/python/pytorch_suite.py");
    suite.arg(&overlay.source).args(&run.arguments).env(LIBRARIES_VARIABLE, simulator.libraries());
    output::say(format_args!("==> test pytorch: {}", process::line(&suite)));
    process::run(&mut suite)
}

/// `cargo xtask bench`: native and uvm in one run.
pub fn bench_hotpath(torch: &str, arguments: &[String]) -> Result<ExitCode> {
    let ((environment, overlay), simulator) = (Environment::patched(torch)?, Simulator::prepare()?);
    let mut driver = environment.python("benches/run.py");
    driver.args(["--workloads", "hotpath", "--backends", "native,uvm", "--out", "target/bench/hotpath.json"]);
    driver.args(arguments).env(LIBRARIES_VARIABLE, simulator.libraries());
    driver.env(CUDA_INCLUDE_VARIABLE, std::env::join_paths(&overlay.cuda_include)?);
    output::say(format_args!("==> bench hotpath: {}", process::line(&driver)));
    Ok(crate::demo::exit_code(process::status(&mut driver)?))
}
