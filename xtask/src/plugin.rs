//! `cargo xtask plugin`: the wheel `torch-uvm`, the allocator as a plug-in for stock PyTorch.
//!
//! It holds the Python package and one library for each minor version of PyTorch, compiled against that version's
//! headers and linked against its `libc10.so` and `libc10_cuda.so`. Of each official wheel only these are fetched. The
//! simulator's libraries go with it, for `python -m torch_uvm simulate`.

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::build_tools;
use crate::c_api;
use crate::cuda::Cuda;
use crate::elf::Library;
use crate::fingerprint::sha256_of;
use crate::index::Index;
use crate::manylinux::{self, Glibc};
use crate::members::{self, C10, C10_CUDA};
use crate::pack::Wheel;
use crate::package;
use crate::paths::{self, shown};
use crate::pins::{self, PLUGIN_RELEASES, PluginRelease};
use crate::platform_libraries::{self, PlatformLibraries};
use crate::process;
use crate::python::{Python, Venv};
use crate::repack::WheelName;
use crate::simulator_libraries;
use crate::step::{Step, Steps};
use crate::toolchain::{Machine, Toolchain};
use crate::tree;

/// The platform that PyTorch's own wheels ask for since 2.7: nobody who can have PyTorch is left out.
const PLATFORM: Glibc = (2, 28);
const PACKAGE: &str = "torch_uvm";

/// Makes the wheel for this machine in the folder `out`; see [`make_with`].
pub fn make(releases: &[&'static PluginRelease], out: &Path) -> Result<PathBuf> {
    make_with(&Toolchain::native()?, releases, out)
}

/// Makes the wheel for the toolchain's machine in the folder `out`, with a library for each of the releases. What did not
/// change is kept.
pub fn make_with(toolchain: &Toolchain, releases: &[&'static PluginRelease], out: &Path) -> Result<PathBuf> {
    toolchain.require()?;
    let python = Python::find(None)?;
    let machine = toolchain.machine.name();
    let steps = Steps::new("plugin");
    let folder = toolchain.folder("plugin");

    if toolchain.cross {
        let triple = toolchain.machine.triple();
        steps.run(format!("find Rust's standard library for {triple}"), |step| toolchain.prepare_rust(step))?;
    }
    let venv = steps.run("prepare pip, CMake and Ninja", |step| build_tools::prepare(step, &python))?;
    let mut cuda = BTreeMap::new();
    for release in releases {
        let major = release.cuda.major;
        if let Entry::Vacant(entry) = cuda.entry(major) {
            let fetch = |step: &Step| Cuda::fetch(step, &venv, release.cuda, toolchain.machine);
            entry.insert(steps.run(format!("fetch the headers of CUDA {major}"), fetch)?);
        }
    }
    let index = Index::of_pip(&venv)?;
    let mut libraries = Vec::new();
    for release in releases {
        let torch = folder.join(format!("torch/{}-{machine}", release.version));
        steps.run(format!("fetch c10 of PyTorch {}", release.version), |step| {
            members::fetch(step, &index, release, machine, &torch)
        })?;
        let number = pins::version_number(release.version)?;
        libraries.push(Plan { release, number, torch, cuda: &cuda[&release.cuda.major] });
    }
    let platform = platform(&steps, toolchain)?;
    let build = folder.join("build");
    let kind = Kind::Shipped(&platform);
    steps.run("compile the libraries", |step| compile(step, toolchain, &libraries, &venv, &build, kind))?;
    steps.run("check the libraries", |step| {
        libraries.iter().try_for_each(|plan| {
            let library = plan.result(&build);
            check(step, toolchain.machine, plan, &library, &platform)
                .with_context(|| format!("{} cannot be used", shown(&library)))
        })
    })?;
    let simulator = steps
        .run("compile the simulated CUDA libraries", |step| simulator_libraries::build(step, toolchain, &platform))?;
    steps.run("check the simulated CUDA libraries", |step| {
        simulator.iter().try_for_each(|file| {
            simulator_libraries::check(step, toolchain.machine, file, &platform, PLATFORM)
                .with_context(|| format!("{} cannot be used", shown(file)))
        })
    })?;
    let wheel = steps.run("write the wheel", |step| write(step, &libraries, &build, &simulator, machine, out))?;
    steps.finish(shown(&wheel));
    Ok(wheel)
}

/// Makes the wheel in the folder `out` with one library, which AddressSanitizer and UBSan watch. It serves this machine,
/// for tests: their libraries must be loaded first.
pub fn make_sanitized(release: &'static PluginRelease, out: &Path) -> Result<PathBuf> {
    let toolchain = Toolchain::native()?;
    toolchain.require()?;
    let python = Python::find(None)?;
    let steps = Steps::new("sanitizers");
    let folder = paths::target().join("plugin");
    let venv = steps.run("prepare pip, CMake and Ninja", |step| build_tools::prepare(step, &python))?;
    let cuda = steps.run(format!("fetch the headers of CUDA {}", release.cuda.major), |step| {
        Cuda::fetch(step, &venv, release.cuda, toolchain.machine)
    })?;
    let torch = folder.join(format!("torch/{}-{}", release.version, python.machine));
    steps.run(format!("fetch c10 of PyTorch {}", release.version), |step| {
        members::fetch(step, &Index::of_pip(&venv)?, release, &python.machine, &torch)
    })?;
    let plans = [Plan { release, number: pins::version_number(release.version)?, torch, cuda: &cuda }];
    let build = folder.join("build-sanitized");
    steps.run("compile the library", |step| compile(step, &toolchain, &plans, &venv, &build, Kind::Sanitized))?;
    steps.run("write the wheel", |step| write(step, &plans, &build, &[], &python.machine, out))
}

/// Makes what libraries are linked against so that they run wherever [`PLATFORM`] does.
pub fn platform(steps: &Steps, toolchain: &Toolchain) -> Result<PlatformLibraries> {
    let folder = toolchain.folder("plugin").join("platform");
    let name = manylinux::platform(PLATFORM, toolchain.machine.name());
    steps.run(format!("make what {name} has to link against"), |step| {
        platform_libraries::prepare(step, &folder, PLATFORM, toolchain)
    })
}

/// The releases that `--torch` names, by version (2.11.0) or minor version (2.11); without, all there are for `machine`.
pub fn releases(named: &[String], machine: &str) -> Result<Vec<&'static PluginRelease>> {
    if named.is_empty() {
        return Ok(PLUGIN_RELEASES.iter().filter(|release| release.members_for(machine).is_some()).collect());
    }
    let numbers = named.iter().map(|name| pins::version_number(name)).collect::<Result<BTreeSet<_>>>()?;
    let find = |number: &u32| {
        let found = PLUGIN_RELEASES.iter().find(|r| pins::version_number(r.version).is_ok_and(|n| n == *number));
        found.ok_or_else(|| {
            let known: Vec<_> = PLUGIN_RELEASES.iter().map(|release| release.version).collect();
            let named = format!("{}.{}", number / 100, number % 100);
            anyhow!("--torch {named}: the plug-in does not know this version of PyTorch, but {}", known.join(", "))
        })
    };
    numbers.iter().map(find).collect()
}

/// The machine that this program runs on, as `uname -m` calls it.
pub fn machine() -> &'static str {
    std::env::consts::ARCH
}

/// One library that is to be made.
struct Plan<'a> {
    release: &'static PluginRelease,
    /// 206 for PyTorch 2.6.
    number: u32,
    /// What is used of the official wheel.
    torch: PathBuf,
    cuda: &'a Cuda,
}

impl Plan<'_> {
    fn file_name(&self) -> String {
        format!("libtorch_uvm_{}.so", self.number)
    }

    fn result(&self, build: &Path) -> PathBuf {
        build.join("lib").join(self.file_name())
    }

    /// This library's settings for `cmake/plugin/CMakeLists.txt`.
    fn definitions(&self) -> Result<Vec<String>> {
        let c10 = self.torch.join(C10);
        let abi = Library::read(&c10)?.cxx11_abi("c10").with_context(|| format!("cannot use {}", shown(&c10)))?;
        let number = self.number;
        Ok(vec![
            format!("-DPLUGIN_TORCH_{number}={}", self.torch.join("torch").display()),
            format!("-DPLUGIN_CXX11_ABI_{number}={}", u32::from(abi)),
            format!("-DPLUGIN_CXX_STANDARD_{number}={}", self.release.cxx_standard),
            format!("-DPLUGIN_CUDA_{number}={}", self.cuda.include_list()),
            format!("-DPLUGIN_CUDART_{number}={}", self.cuda.runtime_library.display()),
        ])
    }
}

/// What a library is for.
enum Kind<'a> {
    /// Linked against what every platform has.
    Shipped(&'a PlatformLibraries),
    /// With AddressSanitizer and UBSan, for tests on this machine.
    Sanitized,
}

fn compile(step: &Step, toolchain: &Toolchain, plans: &[Plan], venv: &Venv, build: &Path, kind: Kind) -> Result<()> {
    let sums = || -> Vec<_> { plans.iter().map(|plan| sha256_of(&plan.result(build)).ok()).collect() };
    let before = sums();
    let numbers: Vec<_> = plans.iter().map(|plan| plan.number.to_string()).collect();
    let kind = match kind {
        Kind::Shipped(platform) => {
            let system: Vec<_> = platform.link.iter().map(|file| file.to_string_lossy()).collect();
            format!("-DPLUGIN_SYSTEM_LIBRARIES={}", system.join(";"))
        }
        Kind::Sanitized => "-DPLUGIN_SANITIZE=ON".to_owned(),
    };
    let mut configure = Command::new(venv.program("cmake"));
    configure
        .args(["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-S"])
        .arg(paths::root().join("cmake/plugin"))
        .arg("-B")
        .arg(build)
        .arg(format!("-DCMAKE_MAKE_PROGRAM={}", venv.program("ninja").display()))
        .arg(format!("-DTORCH_UVM_CARGO_DIR={}", toolchain.folder("bridge").display()))
        .arg(format!("-DPLUGIN_VERSIONS={}", numbers.join(";")))
        .arg(kind)
        .args(toolchain.definitions());
    for plan in plans {
        configure.args(plan.definitions()?);
    }
    process::run_logged(&mut configure, &build.with_file_name("configure.log"))?;
    let mut run = Command::new(venv.program("cmake"));
    run.arg("--build").arg(build);
    process::run_logged(&mut run, &build.with_file_name("build.log"))?;
    if before == sums() {
        step.up_to_date();
    }
    Ok(())
}

/// An error unless the library runs wherever [`PLATFORM`] does, beside the PyTorch it is for, and leaks nothing.
fn check(step: &Step, machine: Machine, plan: &Plan, library: &Path, platform: &PlatformLibraries) -> Result<()> {
    let ours = Library::read(library)?;
    c_api::check(&ours, c_api::Home::PlugIn)?;
    let leaks: Vec<_> =
        ours.exports.iter().filter(|(name, weak)| !may_export(name, **weak)).map(|(name, _)| name.as_str()).collect();
    ensure!(leaks.is_empty(), "it exports what is none of c_api.h: {}", leaks.join(", "));

    let soname = |file: &Path| Library::read(file).map(|library| library.soname);
    let torch = [C10, C10_CUDA].map(|name| plan.torch.join(name));
    for name in &ours.needed {
        let known = platform.sonames.contains(name)
            || soname(&plan.cuda.runtime_library)? == *name
            || soname(&torch[0])? == *name
            || soname(&torch[1])? == *name;
        ensure!(known, "it needs {name}, which a PyTorch process may not have");
    }
    ensure!(ours.run_path.is_empty(), "it looks for its libraries in {}", ours.run_path);
    ours.check_alignment(machine.largest_page())?;

    let oldest = manylinux::oldest_glibc(&ours)?;
    let newest = |prefix| ours.newest_needed(prefix).unwrap_or_default().iter().map(u32::to_string).collect::<Vec<_>>();
    let needs = ["GLIBC_", "GLIBCXX_", "CXXABI_"].map(|prefix| format!("{prefix}{}", newest(prefix).join(".")));
    if oldest > PLATFORM {
        bail!(
            "it needs {}: glibc {}.{}, newer than {}.{}",
            needs.join(", "),
            oldest.0,
            oldest.1,
            PLATFORM.0,
            PLATFORM.1
        );
    }
    let size = fs::metadata(library).with_context(|| format!("cannot read {}", shown(library)))?.len();
    step.note(format_args!(
        "{}: {:.2} MB, needs {}, segments aligned to {} KiB",
        plan.file_name(),
        size as f64 / 1e6,
        needs.join(", "),
        ours.alignment >> 10
    ));
    Ok(())
}

/// The functions that Python calls, and what inline code of c10's headers shares within the process (exports.map).
fn may_export(name: &str, weak: bool) -> bool {
    const SHARED: [&str; 6] = ["_ZN3c10", "_ZGVN3c10", "_ZZN3c10", "_ZZNK3c10", "_ZGVZN3c10", "_ZGVZNK3c10"];
    name.starts_with(c_api::PREFIX) || weak && SHARED.iter().any(|prefix| name.starts_with(prefix))
}

fn write(
    step: &Step,
    plans: &[Plan],
    build: &Path,
    simulator: &[PathBuf],
    machine: &str,
    out: &Path,
) -> Result<PathBuf> {
    let mut files = package_files(&paths::root().join("python").join(PACKAGE))?;
    let adapters = plans.iter().map(|plan| ("lib", plan.result(build)));
    for (folder, library) in adapters.chain(simulator.iter().map(|file| ("sim", file.clone()))) {
        let bytes = fs::read(&library).with_context(|| format!("cannot read {}", shown(&library)))?;
        let name = library.file_name().unwrap_or_default().to_string_lossy();
        files.insert(format!("{PACKAGE}/{folder}/{name}"), bytes);
    }
    let package = package::describe(&torch_versions(&plans.iter().map(|plan| plan.number).collect::<Vec<_>>())?)?;
    let wheel = Wheel {
        name: WheelName {
            package: PACKAGE.into(),
            version: package::version()?,
            python: "py3".into(),
            abi: "none".into(),
            platform: manylinux::platform(PLATFORM, machine),
        },
        metadata: package.metadata,
        entry_points: package.entry_points,
        license: &paths::root().join("LICENSE"),
        files,
    };
    let result = out.join(wheel.name.file_name());
    let before = sha256_of(&result).ok();
    let result = wheel.write(out)?;
    if before.is_some_and(|sum| sha256_of(&result).is_ok_and(|now| now == sum)) {
        step.up_to_date();
    }
    Ok(result)
}

/// The Python package's sources, by their path in the wheel.
fn package_files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for file in tree::files(folder)? {
        let shipped = file.extension().is_some_and(|e| e == "py" || e == "pyi") || file.ends_with("py.typed");
        if shipped {
            let path = folder.join(&file);
            let bytes = fs::read(&path).with_context(|| format!("cannot read {}", shown(&path)))?;
            files.insert(format!("{PACKAGE}/{}", file.display()), bytes);
        }
    }
    ensure!(files.contains_key(&format!("{PACKAGE}/__init__.py")), "{} holds no package", shown(folder));
    Ok(files)
}

/// The releases of PyTorch that the wheel serves, as pip takes them: it refuses those that there is no library for. A gap
/// in between is told at run time.
fn torch_versions(numbers: &[u32]) -> Result<String> {
    let version = |number: &u32| format!("{}.{}", number / 100, number % 100);
    let first = numbers.iter().min().context("there is no library to be put into the wheel")?;
    let after = numbers.iter().max().map(|last| last + 1).unwrap_or_default();
    Ok(format!(">={},<{}", version(first), version(&after)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(named: &[&str], machine: &str) -> Result<Vec<&'static str>> {
        let named: Vec<_> = named.iter().map(|name| name.to_string()).collect();
        Ok(releases(&named, machine)?.into_iter().map(|release| release.version).collect())
    }

    #[test]
    fn releases_are_named_by_minor_version() {
        assert_eq!(versions(&[], "x86_64").unwrap().len(), PLUGIN_RELEASES.len());
        assert_eq!(versions(&[], "aarch64").unwrap()[0], "2.11.0");
        assert_eq!(versions(&["2.15", "2.11.0", "2.11"], "x86_64").unwrap(), ["2.11.0", "2.15.0"]);
        let error = versions(&["2.5.1"], "x86_64").unwrap_err().to_string();
        assert!(error.contains("--torch 2.5") && error.contains("2.6.0, ") && error.contains("2.15.0"), "{error}");
        assert!(versions(&["nightly"], "x86_64").is_err());
    }

    #[test]
    fn wheel_serves_the_versions_there_are_libraries_for() {
        assert_eq!(torch_versions(&[206, 207, 215]).unwrap(), ">=2.6,<2.16");
        assert!(torch_versions(&[]).is_err());
    }

    #[test]
    fn only_the_c_interface_and_shared_variables_are_exported() {
        assert!(may_export("torch_uvm_activate", false));
        let settings = "_ZZN3c104cuda20CUDACachingAllocator19CUDAAllocatorConfig8instanceEvE10s_instance";
        assert!(may_export(settings, true) && !may_export(settings, false));
        assert!(!may_export("rust_eh_personality", false) && !may_export("_ZNSt6vectorIiE3fooEv", true));
    }

    #[test]
    fn package_is_shipped_without_what_python_leaves_behind() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("__pycache__")).unwrap();
        for name in ["__init__.py", "py.typed", "__pycache__/__init__.cpython-311.pyc", "notes.txt"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let files = package_files(folder.path()).unwrap();
        assert_eq!(files.keys().collect::<Vec<_>>(), ["torch_uvm/__init__.py", "torch_uvm/py.typed"]);
        fs::remove_file(folder.path().join("__init__.py")).unwrap();
        assert!(package_files(folder.path()).is_err());
    }
}
