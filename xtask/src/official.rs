//! PyTorch's official wheels, fetched whole with pip.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::fingerprint::{Fingerprint, Stamp, sha256_of};
use crate::paths::{self, shown};
use crate::pins::OfficialTorch;
use crate::process;
use crate::python::{self, Python, Venv};
use crate::step::Step;

/// Fetches the official wheel for `python` with pip, which checks it against the pinned checksums.
pub fn fetch(step: &Step, venv: &Venv, torch: &OfficialTorch, python: &Python) -> Result<PathBuf> {
    let version = torch.version();
    let Some(pinned) = torch.package.wheel_for(&python.tag, &python.machine) else {
        bail!(
            "no checksum of PyTorch {version} for {} on {} is pinned in xtask/src/pins.rs, so the package index is \
             not asked",
            python.tag,
            python.machine
        );
    };
    let folder = paths::downloads().join(format!("torch-{version}-{}", python.tag));
    let kept = || {
        let entries = fs::read_dir(&folder).ok()?;
        entries.flatten().map(|entry| entry.path()).find(|path| path.extension().is_some_and(|e| e == "whl"))
    };
    let stamp_for = |wheel: &Path| -> Result<Stamp> {
        let inputs = Fingerprint::new("official").value("sha256", pinned.sha256).big_file(wheel)?;
        Ok(Stamp::new(folder.join("checked.stamp"), inputs))
    };
    if let Some(wheel) = kept() {
        let stamp = stamp_for(&wheel)?;
        if stamp.is_fresh(&[]) || sha256_of(&wheel)? == pinned.sha256 {
            stamp.write()?;
            step.up_to_date();
            return Ok(wheel);
        }
        step.note(format_args!("{} is not what it should be: fetched again", shown(&wheel)));
        fs::remove_file(&wheel).with_context(|| format!("cannot remove {}", shown(&wheel)))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", shown(&folder)))?;
    let requirements = folder.join("requirements.txt");
    python::write_requirements(&requirements, std::slice::from_ref(&torch.package))?;
    process::run(
        venv.pip(["download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--progress-bar=on"])
            .arg("--dest")
            .arg(&folder)
            .arg("--requirement")
            .arg(&requirements),
    )
    .with_context(|| format!("pip could not fetch torch=={version}; is the package index reachable?"))?;
    let wheel = kept().with_context(|| format!("pip left no wheel in {}", shown(&folder)))?;
    let sum = sha256_of(&wheel)?;
    ensure!(sum == pinned.sha256, "{} has SHA-256 {sum}, not {}", shown(&wheel), pinned.sha256);
    stamp_for(&wheel)?.write()?;
    Ok(wheel)
}
