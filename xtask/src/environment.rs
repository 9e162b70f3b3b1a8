//! The virtual environments in which the tests and the demo run: the patched wheel, or PyTorch as it is published with
//! the plug-in beside it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::build_tools;
use crate::fingerprint::{Fingerprint, Stamp};
use crate::lock::Lock;
use crate::official;
use crate::paths::{self, shown};
use crate::pins::{self, OfficialTorch};
use crate::plugin;
use crate::process;
use crate::python::{Python, Venv};
use crate::step::{Step, Steps};
use crate::wheel::{self, Overlay, Request};

/// A Python with a PyTorch that has our allocator, its CUDA libraries, and what the tests import.
pub struct Environment {
    pub venv: Venv,
}

impl Environment {
    /// Makes the patched wheel of the release `torch` and installs it; what is there already is kept.
    pub fn patched(torch: &str) -> Result<(Self, Overlay)> {
        let release = pins::release(torch)?;
        let _lock = Lock::take()?;
        let overlay = wheel::make(&Request::usual(release))?;
        let steps = Steps::new("environment");
        let folder = paths::venv(release.version());
        let venv = steps.run(format!("install PyTorch and its CUDA libraries in {}", shown(&folder)), |step| {
            let venv = Venv::ensure(folder, &overlay.python)?;
            install(step, &venv, &[("torch", &overlay.wheel)])?;
            Ok(venv)
        })?;
        Ok((Self { venv }, overlay))
    }

    /// Installs the official wheel `torch` and the plug-in's wheel; what is there already is kept.
    pub fn stock(torch: &OfficialTorch, plugin: &Path) -> Result<Self> {
        let _lock = Lock::take()?;
        let version = torch.version();
        let python = Python::find(Some(torch))?;
        let steps = Steps::new("environment");
        let tools = steps.run("prepare pip", |step| build_tools::prepare(step, &python))?;
        let official = steps.run(format!("fetch the official wheel of PyTorch {version}"), |step| {
            official::fetch(step, &tools, torch, &python)
        })?;
        let folder = paths::plugin_venv(version);
        let venv =
            steps.run(format!("install PyTorch, its CUDA libraries and the plug-in in {}", shown(&folder)), {
                |step| {
                    let venv = Venv::ensure(folder, &python)?;
                    install(step, &venv, &[("torch", &official), ("plugin", plugin)])?;
                    Ok(venv)
                }
            })?;
        Ok(Self { venv })
    }

    /// This environment's Python with a script of the repository.
    pub fn python(&self, script: &str) -> Command {
        let mut command = Command::new(self.venv.python());
        command.arg(paths::root().join(script)).current_dir(paths::root());
        command.env_remove("PYTHONPATH").env_remove("PYTHONHOME");
        command
    }
}

/// Makes the plug-in with all its libraries.
pub fn plugin_wheel() -> Result<std::path::PathBuf> {
    let releases = plugin::releases(&[], plugin::machine())?;
    let _lock = Lock::take()?;
    plugin::make(&releases, &paths::wheels())
}

/// Installs wheels, each under a name that its stamp is known by, and the tests' packages.
fn install(step: &Step, venv: &Venv, wheels: &[(&str, &Path)]) -> Result<()> {
    let packages =
        pins::TEST_PACKAGES.iter().fold(Fingerprint::new("packages"), |all, name| all.value("package", name));
    let packages = Stamp::new(venv.folder().join("packages.stamp"), packages);
    let mut stale = Vec::new();
    for (name, wheel) in wheels {
        let stamp =
            Stamp::new(venv.folder().join(name).with_extension("stamp"), Fingerprint::new(name).big_file(wheel)?);
        if !stamp.is_fresh(&[]) {
            stale.push((stamp, *wheel));
        }
    }
    let with_packages = packages.is_fresh(&[]);
    if with_packages && stale.is_empty() {
        step.up_to_date();
        return Ok(());
    }
    stale.iter().try_for_each(|(stamp, _)| stamp.clear())?;
    let names: Vec<_> = wheels.iter().map(|(_, wheel)| shown(wheel).to_string()).collect();
    let install = |arguments: &[&str], wheels: &[&Path]| {
        // Compiled to bytecode: the tests start hundreds of processes, and where PYTHONDONTWRITEBYTECODE is set each would
        // compile PyTorch anew.
        let mut pip = venv.pip(["install", "--only-binary=:all:", "--progress-bar=on"]);
        pip.args(arguments).args(wheels);
        process::run(&mut pip).with_context(|| format!("pip could not install {}", names.join(" and ")))
    };
    // The first time pip brings the CUDA libraries, gigabytes of them; later only the wheels themselves are replaced, which
    // pip would not do by itself: their versions are the same.
    let first_time = !packages.exists();
    if !with_packages {
        let all: Vec<_> = wheels.iter().map(|(_, wheel)| *wheel).collect();
        install(pins::TEST_PACKAGES, &all)?;
    }
    if !first_time && !stale.is_empty() {
        let wheels: Vec<_> = stale.iter().map(|(_, wheel)| *wheel).collect();
        install(&["--no-deps", "--force-reinstall"], &wheels)?;
    }
    packages.write()?;
    stale.iter().try_for_each(|(stamp, _)| stamp.write())
}
