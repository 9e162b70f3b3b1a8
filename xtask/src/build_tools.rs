//! The virtual environments with the programs that compile (CMake and Ninja, and pip and uv that fetch), and with those that
//! check the sources.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

use crate::fingerprint::{Fingerprint, Stamp};
use crate::paths;
use crate::pins::{self, PinnedPackage};
use crate::process;
use crate::python::{self, Python, Venv};
use crate::step::Step;
use crate::uv::Uv;

/// Held while one of the environments is made: several steps ask for them at once.
static BUSY: Mutex<()> = Mutex::new(());

/// Makes the environment; what is there already is kept.
pub fn prepare(step: &Step, python: &Python) -> Result<Venv> {
    let _busy = BUSY.lock().unwrap_or_else(PoisonError::into_inner);
    let venv = Venv::ensure(paths::target().join(format!("tools-{}", python.tag)), python)?;
    let inputs = pins::BUILD_TOOLS.iter().fold(Fingerprint::new("tools"), |inputs, tool| inputs.value("tool", tool));
    let stamp = Stamp::new(venv.folder().join("tools.stamp"), inputs);
    if stamp.is_fresh(&[&venv.program("cmake"), &venv.program("ninja"), &venv.program("uv")]) {
        step.up_to_date();
        return Ok(venv);
    }
    process::run(venv.pip(["install", "--quiet", "--only-binary=:all:"]).args(pins::BUILD_TOOLS))
        .context("pip could not install the build tools; is the package index reachable?")?;
    stamp.write()?;
    Ok(venv)
}

/// Makes the environment with what checks the sources, and with the PyTorch whose types mypy reads: that of `torch` alone,
/// without its CUDA libraries.
pub fn prepare_lints(step: &Step, python: &Python, torch: &PinnedPackage) -> Result<Venv> {
    let tools = prepare(step, python)?;
    let _busy = BUSY.lock().unwrap_or_else(PoisonError::into_inner);
    let uv = Uv::of(&tools)?;
    let venv = Venv::ensure_bare(paths::target().join(format!("lint-{}", python.tag)), python, &uv)?;
    let inputs = pins::LINT_TOOLS.iter().fold(Fingerprint::new("lints"), |inputs, tool| inputs.value("tool", tool));
    let stamp = Stamp::new(venv.folder().join("tools.stamp"), inputs.value("torch", &torch.requirement()));
    if stamp.is_fresh(&[&venv.program("ruff")]) {
        step.up_to_date();
        return Ok(venv);
    }
    stamp.clear()?;
    let requirements = venv.folder().join("requirements.txt");
    python::write_requirements(&requirements, std::slice::from_ref(torch))?;
    process::run(uv.install(&venv).args(["--no-deps", "--require-hashes", "--requirement"]).arg(&requirements))
        .and_then(|()| process::run(uv.install(&venv).arg("numpy").args(pins::LINT_TOOLS)))
        .context("uv could not install what checks the sources; is the package index reachable?")?;
    stamp.write()?;
    Ok(venv)
}
