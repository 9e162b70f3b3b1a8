//! The virtual environment with the programs that compile: CMake and Ninja, and pip that fetches what is compiled.

use anyhow::{Context, Result};

use crate::fingerprint::{Fingerprint, Stamp};
use crate::paths;
use crate::pins;
use crate::process;
use crate::python::{Python, Venv};
use crate::step::Step;

/// Makes the environment; what is there already is kept.
pub fn prepare(step: &Step, python: &Python) -> Result<Venv> {
    let venv = Venv::ensure(paths::target().join(format!("tools-{}", python.tag)), python)?;
    let inputs = pins::BUILD_TOOLS.iter().fold(Fingerprint::new("tools"), |inputs, tool| inputs.value("tool", tool));
    let stamp = Stamp::new(venv.folder().join("tools.stamp"), inputs);
    if stamp.is_fresh(&[&venv.program("cmake"), &venv.program("ninja")]) {
        step.up_to_date();
        return Ok(venv);
    }
    process::run(venv.pip(["install", "--quiet", "--only-binary=:all:"]).args(pins::BUILD_TOOLS))
        .context("pip could not install the build tools; is the package index reachable?")?;
    stamp.write()?;
    Ok(venv)
}
