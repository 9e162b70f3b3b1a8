//! The simulator's libraries: for the commands here, and for `python -m torch_uvm simulate`, as the plug-in's wheel carries
//! them. They hold no debug information, and are linked so that they run wherever the wheel does.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::elf::Library;
use crate::fingerprint::{Fingerprint, Stamp};
use crate::manylinux::{self, Glibc};
use crate::paths::{self, shown};
use crate::platform_libraries::{self, PlatformLibraries};
use crate::process;
use crate::sim::{self, libraries};
use crate::step::Step;
use crate::toolchain::{Machine, Toolchain};
use crate::tree;

/// Another name for `libcuda.so.1`. A wheel holds no links, so it is a copy there; the loader takes no harm from it.
const ALIAS: &str = "libcuda.so";

/// The simulator's cargo profile (`.cargo/config.toml`), and its folder under `target/`.
const PROFILE: &str = "simulator";

/// Builds the libraries; what is there already is kept. The files that the wheel is to carry.
pub fn build(step: &Step, toolchain: &Toolchain, platform: &PlatformLibraries) -> Result<Vec<PathBuf>> {
    let folder = toolchain.folder("sim");
    let out = folder.join("lib");
    let files: Vec<_> =
        [libraries::ENGINE, ALIAS].iter().chain(&libraries::STAND_INS).map(|name| out.join(name)).collect();
    let by_name = folder.join("link");
    link_names(&by_name, platform)?;
    let missing = folder.join("glibc.o");
    process::run(
        Command::new(toolchain.cxx())
            .args(["-c", "-O2", "-fPIC", "-o"])
            .arg(&missing)
            .arg(paths::root().join("cmake/plugin/glibc.cpp")),
    )?;
    // rustc names the system's libraries itself, without their folders: the first folder that has one decides.
    let loader = platform.link.iter().filter(|file| name(file).starts_with("ld-linux"));
    // `atexit` and `pthread_atfork` are no functions of libc: each library has its own.
    let own = platform_libraries::compilers_file(toolchain, "libc_nonshared.a")?;
    let mut cargo = Command::new(sim::cargo());
    cargo.args(["rustc", "--profile", PROFILE, "--package", "torch-uvm-sim-capi", "--lib"]);
    toolchain.apply(&mut cargo);
    cargo.args(["--", "-C", "strip=symbols", "-C", "link-arg=-Wl,-z,defs", "-C"]);
    cargo.arg(format!("link-arg=-L{}", by_name.display()));
    for file in loader.chain([&missing, &own]) {
        cargo.arg("-C").arg(format!("link-arg={}", file.display()));
    }
    process::run(cargo.current_dir(paths::root()))?;
    let engine = toolchain.results(&paths::target()).join(PROFILE).join(libraries::ENGINE);
    let sources = paths::root().join("sim/capi/stubs");
    let mut inputs = Fingerprint::new("simulator").file(&engine)?;
    for file in tree::files(&sources)? {
        inputs = inputs.file(&sources.join(file))?;
    }
    // Programs may be running on them: they are not written anew without need.
    let stamp = Stamp::new(out.with_added_extension("stamp"), inputs);
    if stamp.is_fresh(&files.iter().map(PathBuf::as_path).collect::<Vec<_>>()) {
        step.up_to_date();
        return Ok(files);
    }
    stamp.clear()?;
    libraries::assemble(toolchain.cc(), &engine, &sources, &out)
        .with_context(|| format!("cannot make the stand-ins for CUDA's libraries in {}", shown(&out)))?;
    stamp.write()?;
    Ok(files)
}

/// Puts the platform's libraries into `folder` under the names that `-l` looks for.
fn link_names(folder: &Path, platform: &PlatformLibraries) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove the old {}", shown(folder)))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", shown(folder)))?;
    for file in &platform.link {
        if let Some((stem, _)) = name(file).split_once(".so.") {
            let target = fs::canonicalize(file).with_context(|| format!("cannot read {}", shown(file)))?;
            let link = folder.join(format!("{stem}.so"));
            symlink(target, &link).with_context(|| format!("cannot make {}", shown(&link)))?;
        }
    }
    Ok(())
}

fn name(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// An error unless a library runs wherever `newest` does, and finds the others beside it.
pub fn check(step: &Step, machine: Machine, file: &Path, platform: &PlatformLibraries, newest: Glibc) -> Result<()> {
    let ours = Library::read(file)?;
    for needed in &ours.needed {
        ensure!(platform.sonames.contains(needed) || needed == libraries::ENGINE, "it needs {needed}");
    }
    let run_path = if name(file) == libraries::ENGINE { "" } else { "$ORIGIN" };
    ensure!(ours.run_path == run_path, "it looks for its libraries in {:?}, not {run_path:?}", ours.run_path);
    ours.check_alignment(machine.largest_page())?;
    let oldest = manylinux::oldest_glibc(&ours)?;
    if oldest > newest {
        bail!("it needs glibc {}.{}, newer than {}.{}", oldest.0, oldest.1, newest.0, newest.1);
    }
    let size = fs::metadata(file).with_context(|| format!("cannot read {}", shown(file)))?.len();
    step.note(format_args!("{}: {:.2} MB, needs GLIBC_{}.{}", name(file), size as f64 / 1e6, oldest.0, oldest.1));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn libraries_get_the_names_that_the_linker_looks_for() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let file = folder.path().join(name);
            fs::write(&file, name).unwrap();
            file
        };
        let link = ["libc.so.6", "libstdc++.a", "libgcc_s.so.1", "ld-linux-x86-64.so.2"].map(file).into();
        let platform = PlatformLibraries { link, sonames: BTreeSet::new() };
        for _ in 0..2 {
            link_names(&folder.path().join("link"), &platform).unwrap();
        }
        let mut names: Vec<_> =
            fs::read_dir(folder.path().join("link")).unwrap().map(|e| name(&e.unwrap().path())).collect();
        names.sort();
        assert_eq!(names, ["ld-linux-x86-64.so", "libc.so", "libgcc_s.so"]);
        assert_eq!(fs::read_to_string(folder.path().join("link/libc.so")).unwrap(), "libc.so.6");
    }
}
