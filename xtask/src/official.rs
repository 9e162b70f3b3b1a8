//! PyTorch's official wheels, fetched whole with pip.

use std::fs::{self, File};
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use zip::ZipArchive;

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

/// What a wheel says it needs, extras apart: requirements as pip takes them.
pub fn requirements(wheel: &Path) -> Result<Vec<String>> {
    let read = || -> Result<String> {
        let mut archive = ZipArchive::new(BufReader::new(File::open(wheel)?))?;
        let names =
            archive.file_names().map(|name| name.map(|name| name.into_owned())).collect::<Result<Vec<_>, _>>()?;
        let metadata = names.into_iter().find(|name| name.ends_with(".dist-info/METADATA")).context("no METADATA")?;
        Ok(io::read_to_string(archive.by_name(&metadata)?)?)
    };
    let text = read().with_context(|| format!("cannot read the metadata of {}", shown(wheel)))?;
    Ok(required(&text))
}

fn required(metadata: &str) -> Vec<String> {
    let head = metadata.lines().take_while(|line| !line.is_empty());
    let needs = head.filter_map(|line| line.strip_prefix("Requires-Dist: "));
    needs.filter(|need| !need.contains("extra ==")).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requirements_are_those_without_extras() {
        let text = "Name: torch\nRequires-Dist: filelock\nRequires-Dist: optree>=0.13; extra == \"optree\"\n\
                    Requires-Dist: triton==3.2.0; platform_system == \"Linux\"\n\nRequires-Dist: no\n";
        assert_eq!(required(text), ["filelock", "triton==3.2.0; platform_system == \"Linux\""]);
    }
}
