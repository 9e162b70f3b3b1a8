//! The virtual environments in which the tests and the demo run: the patched wheel, or PyTorch as it is published with
//! the plug-in beside it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::build_tools;
use crate::fingerprint::{Fingerprint, Stamp};
use crate::lock::Lock;
use crate::official;
use crate::paths::{self, shown};
use crate::pins::{self, OfficialTorch, PinnedPackage};
use crate::plugin;
use crate::process;
use crate::python::{self, Python, Venv};
use crate::step::{Step, Steps};
use crate::uv::Uv;
use crate::wheel::{self, Overlay, Request};

/// A Python with a PyTorch that has our allocator, its CUDA libraries, and what the tests import.
pub struct Environment {
    pub venv: Venv,
}

impl Environment {
    /// What can be installed before the patched wheel of the release `torch` is made: most of the bytes.
    pub fn patched_ground(torch: &str) -> Result<Self> {
        let release = pins::release(torch)?;
        let _lock = Lock::take()?;
        let steps = Steps::new("environment");
        let python = Python::find(Some(&release.official))?;
        let tools = steps.run("prepare uv", |step| build_tools::prepare(step, &python))?;
        let official = steps.run(format!("fetch the official wheel of PyTorch {torch}"), |step| {
            official::fetch(step, &tools, &release.official, &python)
        })?;
        let folder = paths::venv(torch);
        let venv =
            steps.run(format!("install the CUDA libraries of PyTorch {torch} in {}", shown(&folder)), |step| {
                let uv = Uv::of(&tools)?;
                let venv = Venv::ensure_bare(folder, &python, &uv)?;
                let mut packages = official::requirements(&official)?;
                packages.extend(pins::TEST_PACKAGES.iter().map(|name| name.to_string()));
                install_packages(step, &uv, &venv, None, &packages)?;
                Ok(venv)
            })?;
        Ok(Self { venv })
    }

    /// Makes the patched wheel of the release `torch` and installs it; what is there already is kept.
    pub fn patched(torch: &str) -> Result<(Self, Overlay)> {
        let release = pins::release(torch)?;
        let _lock = Lock::take()?;
        let ground = Self::patched_ground(torch)?;
        let overlay = wheel::make(&Request::usual(release))?;
        let steps = Steps::new("environment");
        steps.run(format!("install {}", shown(&overlay.wheel)), |step| {
            let uv = Uv::of(&build_tools::prepare(step, &overlay.python)?)?;
            install_wheel(step, &uv, &ground.venv, "torch", &overlay.wheel)
        })?;
        Ok((ground, overlay))
    }

    /// The official wheel `torch` alone, without the plug-in.
    pub fn official(torch: &OfficialTorch) -> Result<Self> {
        Self::official_in(paths::plugin_venv(torch.version()), torch)
    }

    fn official_in(folder: PathBuf, torch: &OfficialTorch) -> Result<Self> {
        let _lock = Lock::take()?;
        let python = Python::find(Some(torch))?;
        let steps = Steps::new("environment");
        let tools = steps.run("prepare uv", |step| build_tools::prepare(step, &python))?;
        let what = format!("install PyTorch {} and its CUDA libraries in {}", torch.version(), shown(&folder));
        let venv = steps.run(what, |step| {
            let uv = Uv::of(&tools)?;
            let venv = Venv::ensure_bare(folder, &python, &uv)?;
            let mut packages = vec![format!("torch=={}", torch.version())];
            packages.extend(pins::TEST_PACKAGES.iter().map(|name| name.to_string()));
            if install_packages(step, &uv, &venv, Some(&torch.package), &packages)? {
                warm(&venv)?;
            }
            Ok(venv)
        })?;
        Ok(Self { venv })
    }

    /// Installs the official wheel `torch` and the plug-in's wheel; what is there already is kept.
    pub fn stock(torch: &OfficialTorch, plugin: &Path) -> Result<Self> {
        Self::stock_in(paths::plugin_venv(torch.version()), torch, plugin)
    }

    /// The same in an environment of its own, for a plug-in with sanitizers.
    pub fn sanitized(torch: &OfficialTorch, plugin: &Path) -> Result<Self> {
        Self::stock_in(paths::sanitizers_venv(torch.version()), torch, plugin)
    }

    fn stock_in(folder: PathBuf, torch: &OfficialTorch, plugin: &Path) -> Result<Self> {
        let _lock = Lock::take()?;
        let environment = Self::official_in(folder, torch)?;
        let steps = Steps::new("environment");
        steps.run(format!("install {} beside PyTorch {}", shown(plugin), torch.version()), |step| {
            let uv = Uv::of(&build_tools::prepare(step, &Python::find(Some(torch))?)?)?;
            install_wheel(step, &uv, &environment.venv, "plugin", plugin)
        })?;
        Ok(environment)
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
pub fn plugin_wheel() -> Result<PathBuf> {
    let releases = plugin::releases(&[], plugin::machine())?;
    let _lock = Lock::take()?;
    plugin::make(&releases, &paths::wheels())
}

/// Installs packages; `pinned` first, by itself, for its checksums cover no other. What is there already is kept. Answers
/// whether there was anything to do.
fn install_packages(
    step: &Step,
    uv: &Uv,
    venv: &Venv,
    pinned: Option<&PinnedPackage>,
    packages: &[String],
) -> Result<bool> {
    let inputs = packages.iter().fold(Fingerprint::new("packages 2"), |all, name| all.value("package", name));
    let inputs = pinned.iter().fold(inputs, |all, pinned| all.value("pinned", &pinned.requirement()));
    let stamp = Stamp::new(venv.folder().join("packages.stamp"), inputs);
    if stamp.is_fresh(&[]) {
        step.up_to_date();
        return Ok(false);
    }
    stamp.clear()?;
    let cannot = || format!("uv could not install {}; is the package index reachable?", packages.join(", "));
    if let Some(pinned) = pinned {
        let requirements = venv.folder().join("requirements.txt");
        python::write_requirements(&requirements, std::slice::from_ref(pinned))?;
        let mut install = uv.install(venv);
        install.args(["--no-deps", "--require-hashes", "--requirement"]).arg(&requirements);
        process::run(&mut install).with_context(cannot)?;
    }
    process::run(uv.install(venv).args(packages)).with_context(cannot)?;
    stamp.write()?;
    Ok(true)
}

/// Installs one of our wheels in place of what there is of it: its version may be the same and its contents not.
fn install_wheel(step: &Step, uv: &Uv, venv: &Venv, name: &str, wheel: &Path) -> Result<()> {
    let inputs = Fingerprint::new(name).big_file(wheel)?;
    let stamp = Stamp::new(venv.folder().join(name).with_extension("stamp"), inputs);
    if stamp.is_fresh(&[]) {
        step.up_to_date();
        return Ok(());
    }
    stamp.clear()?;
    process::run(uv.install(venv).args(["--no-deps", "--reinstall"]).arg(wheel))
        .with_context(|| format!("uv could not install {}", shown(wheel)))?;
    warm(venv)?;
    stamp.write()
}

/// Imports what the tests import, so that Python keeps the bytecode: the tests start hundreds of processes, and where
/// PYTHONDONTWRITEBYTECODE is set each would compile PyTorch anew.
fn warm(venv: &Venv) -> Result<()> {
    const IMPORTS: &str = "import numpy, plotly.graph_objects, pytest, torch, torch._dynamo, xdist";
    let mut python = Command::new(venv.python());
    python.args(["-c", IMPORTS]).env_remove("PYTHONDONTWRITEBYTECODE").env_remove("PYTHONPATH");
    process::capture(&mut python).with_context(|| format!("{} does not import", shown(venv.folder())))?;
    Ok(())
}
