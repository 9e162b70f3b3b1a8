//! Formatting, lints, types and documentation. `.pre-commit-config.yaml` runs them too.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::python::newest;
use super::rust::{BRIDGE, bridge_headers, cargo};
use super::schedule::Task;
use super::{Part, Run, checked, checking, making};
use crate::build_tools;
use crate::cuda::Cuda;
use crate::index::Index;
use crate::members;
use crate::paths::{self, shown};
use crate::pins::{self, PLUGIN_RELEASES, PluginRelease};
use crate::python::Python;
use crate::step::{Step, Steps};
use crate::toolchain::Machine;

/// The folders of C++ whose formatting is checked.
const FORMATTED: [&str; 3] = ["cpp", "cmake/plugin", "benches"];
/// Python beside the package, which alone has to have types.
const PYTHON: [&str; 4] = ["python", "tests", "benches", "sim"];

pub fn add<'a>(run: &'a Run, parts: &[&Part], tasks: &mut Vec<Task<'a>>) {
    if !parts.contains(&&Part::Lint) {
        return;
    }
    let lint = |program: &'static str, arguments: &'static [&'static str]| move || lint(run, program, arguments);
    tasks.extend([
        checking("rustfmt", &[], 1, || checked(&mut cargo(&["fmt", "--all", "--check"]))),
        checking("clippy: bridge", &[], 1, || {
            clippy(&["--workspace", "--exclude", "xtask"], &BRIDGE)?;
            clippy(&["--package", "xtask", "--profile", "xtask"], &[])
        }),
        checking("clippy", &["clippy: bridge"], 1, || clippy(&["--package", "torch-uvm"], &[])),
        checking("rustdoc", &["clippy: bridge"], 1, documentation),
        making("lint tools", &[], 0, || tools(run)),
        checking("ruff format", &["lint tools"], 1, lint("ruff", &["format", "--check", "--diff"])),
        checking("ruff", &["lint tools"], 1, lint("ruff", &["check", "--output-format", "concise"])),
        checking("mypy", &["lint tools"], 1, || {
            checked(program(run, "mypy")?.arg("--cache-dir").arg(paths::target().join("mypy")))
        }),
        checking("clang-format", &["lint tools"], 1, || clang_format(run)),
        making("headers", &["lint tools"], 0, headers),
        checking("clang-tidy", &["headers", "clippy: bridge"], 1, || clang_tidy(run)),
    ]);
}

fn clippy(packages: &[&str], features: &[&str]) -> Result<()> {
    let mut command = cargo(&["clippy", "--all-targets", "--quiet"]);
    checked(command.args(packages).args(features).args(["--", "-D", "warnings"]))
}

fn documentation() -> Result<()> {
    let arguments = ["doc", "--workspace", "--exclude", "xtask", "--no-deps", "--document-private-items", "--quiet"];
    checked(cargo(&arguments).args(BRIDGE).env("RUSTDOCFLAGS", "-D warnings"))
}

fn tools(run: &Run) -> Result<()> {
    let steps = Steps::new("lint");
    let python = Python::find(None)?;
    let venv = steps.run("prepare ruff, mypy, clang-format and clang-tidy", |step| {
        build_tools::prepare_lints(step, &python, &newest().package)
    })?;
    // Set once: this step is there once.
    drop(run.tools.set(venv));
    Ok(())
}

/// A program of the environment that [`tools`] made, in the repository's root.
fn program(run: &Run, name: &str) -> Result<Command> {
    let venv = run.tools.get().context("what checks the sources is not there")?;
    let mut command = Command::new(venv.program(name));
    command.current_dir(paths::root()).env_remove("PYTHONPATH");
    if name == "mypy" {
        command.arg("--python-executable").arg(venv.python());
    }
    Ok(command)
}

fn lint(run: &Run, name: &str, arguments: &[&str]) -> Result<()> {
    checked(program(run, name)?.args(arguments).args(PYTHON))
}

fn clang_format(run: &Run) -> Result<()> {
    let files = FORMATTED.iter().map(|folder| sources(folder, &["cpp", "h"])).collect::<Result<Vec<_>>>()?;
    checked(program(run, "clang-format")?.args(["--dry-run", "--Werror"]).args(files.concat()))
}

/// The release whose headers clang-tidy reads.
pub fn release() -> Result<&'static PluginRelease> {
    let number = pins::version_number(newest().version())?;
    let found = PLUGIN_RELEASES.iter().find(|release| pins::version_number(release.version).is_ok_and(|n| n == number));
    found.with_context(|| format!("the plug-in does not know PyTorch {}", newest().version()))
}

fn header_folder(release: &PluginRelease) -> PathBuf {
    paths::target().join("lint").join(release.version)
}

fn headers() -> Result<()> {
    let release = release()?;
    let tools = build_tools::prepare(&Step::unseen(), &Python::find(None)?)?;
    let steps = Steps::new("lint");
    steps.run(format!("fetch the headers of c10 of PyTorch {}", release.version), |step| {
        members::fetch(step, &Index::of_pip(&tools)?, release, crate::plugin::machine(), &header_folder(release))
    })?;
    steps.run(format!("fetch the headers of CUDA {}", release.cuda.major), |step| {
        Cuda::fetch(step, &tools, release.cuda, Machine::own()?)
    })?;
    Ok(())
}

fn clang_tidy(run: &Run) -> Result<()> {
    let release = release()?;
    let tools = build_tools::prepare(&Step::unseen(), &Python::find(None)?)?;
    let cuda = Cuda::fetch(&Step::unseen(), &tools, release.cuda, Machine::own()?)?;
    let mut command = program(run, "clang-tidy")?;
    command.arg("--quiet").args(sources("cpp", &["cpp"])?.iter().filter(|file| !file.starts_with("cpp/patched")));
    command.args(["--", "-x", "c++", &format!("-std=c++{}", release.cxx_standard), "-Icpp", "-DTORCH_UVM_PLUGIN"]);
    command.arg(format!("-DTORCH_UVM_TORCH_VERSION={}", pins::version_number(release.version)?));
    command.arg("-D_GLIBCXX_USE_CXX11_ABI=1").arg("-I").arg(bridge_headers());
    for folder in cuda.include.iter().chain([&header_folder(release).join("torch/include")]) {
        command.arg("-isystem").arg(folder);
    }
    checked(&mut command)
}

/// The files below a folder of the repository that end so.
fn sources(folder: &str, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut left = vec![paths::root().join(folder)];
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot read the folder {}", shown(&folder)))? {
            let path = entry?.path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|e| extensions.iter().any(|wanted| e == *wanted)) {
                files.push(path.strip_prefix(paths::root())?.to_owned());
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_found_below() {
        let files = sources("cpp", &["cpp"]).unwrap();
        assert!(files.contains(&"cpp/plugin/activate.cpp".into()) && files.contains(&"cpp/allocator.cpp".into()));
        assert!(files.iter().all(|file| file.extension().is_some_and(|e| e == "cpp")));
        assert!(sources("no-such-folder", &["cpp"]).is_err());
    }

    #[test]
    fn newest_release_is_known_to_the_plugin() {
        assert_eq!(release().unwrap().version, newest().version());
    }
}
