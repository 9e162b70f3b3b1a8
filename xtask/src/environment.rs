//! The virtual environment in which the patched wheel runs.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::fingerprint::{Fingerprint, Stamp};
use crate::lock::Lock;
use crate::paths::{self, shown};
use crate::pins;
use crate::process;
use crate::python::Venv;
use crate::step::{Step, Steps};
use crate::wheel::{self, Overlay, Request};

/// A Python with the patched PyTorch, its CUDA libraries, and what the tests import.
pub struct Environment {
    pub venv: Venv,
    pub overlay: Overlay,
}

impl Environment {
    /// Makes the wheel of the release `torch` and installs it; what is there already is kept.
    pub fn prepare(torch: &str) -> Result<Self> {
        let release = pins::release(torch)?;
        let _lock = Lock::take()?;
        let overlay = wheel::make(&Request::usual(release))?;
        let steps = Steps::new("environment");
        let folder = paths::venv(release.version());
        let venv = steps.run(format!("install PyTorch and its CUDA libraries in {}", shown(&folder)), |step| {
            let venv = Venv::ensure(folder, &overlay.python)?;
            install(step, &venv, &overlay.wheel)?;
            Ok(venv)
        })?;
        Ok(Self { venv, overlay })
    }

    /// This environment's Python with a script of the repository.
    pub fn python(&self, script: &str) -> Command {
        let mut command = Command::new(self.venv.python());
        command.arg(paths::root().join(script)).current_dir(paths::root());
        command.env_remove("PYTHONPATH").env_remove("PYTHONHOME");
        command
    }
}

fn install(step: &Step, venv: &Venv, wheel: &Path) -> Result<()> {
    let packages =
        pins::TEST_PACKAGES.iter().fold(Fingerprint::new("packages"), |all, name| all.value("package", name));
    let packages = Stamp::new(venv.folder().join("packages.stamp"), packages);
    let torch = Stamp::new(venv.folder().join("torch.stamp"), Fingerprint::new("torch").big_file(wheel)?);
    let (with_packages, with_torch) = (packages.is_fresh(&[]), torch.is_fresh(&[]));
    if with_packages && with_torch {
        step.up_to_date();
        return Ok(());
    }
    torch.clear()?;
    // The first time pip brings the CUDA libraries, gigabytes of them; later only PyTorch itself is replaced.
    let mut pip = venv.pip(["install", "--only-binary=:all:", "--progress-bar=on", "--no-compile"]);
    if with_packages {
        pip.args(["--no-deps", "--force-reinstall"]);
    } else {
        pip.args(pins::TEST_PACKAGES);
    }
    process::run(pip.arg(wheel)).with_context(|| format!("pip could not install {}", shown(wheel)))?;
    packages.write()?;
    torch.write()
}
