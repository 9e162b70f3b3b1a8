//! The CUDA runtime's headers and library, from NVIDIA's packages: what is compiled against where there is no toolkit.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};

use crate::fingerprint::{Fingerprint, Stamp};
use crate::manylinux;
use crate::paths::{self, shown};
use crate::pins::CudaHeaders;
use crate::process;
use crate::python::{self, Venv};
use crate::step::Step;
use crate::toolchain::Machine;

/// Where the CUDA headers and the runtime library to link against are.
pub struct Cuda {
    pub include: Vec<PathBuf>,
    pub runtime_library: PathBuf,
}

impl Cuda {
    /// The headers and the library of `pinned`; fetched if they are not there.
    pub fn fetch(step: &Step, venv: &Venv, pinned: &CudaHeaders, machine: Machine) -> Result<Self> {
        /// The wheel and the plug-in are made at the same time and want the same headers.
        static BUSY: Mutex<()> = Mutex::new(());
        let _busy = BUSY.lock().unwrap_or_else(PoisonError::into_inner);
        let own = machine == Machine::own()?;
        let name = if own { pinned.major.to_string() } else { format!("{}-{}", pinned.major, machine.name()) };
        let folder = paths::target().join("cuda").join(name);
        let inputs = pinned
            .packages
            .iter()
            .fold(Fingerprint::new("cuda headers"), |inputs, package| inputs.value("package", &package.requirement()));
        let stamp = Stamp::new(folder.with_added_extension("stamp"), inputs);
        if stamp.is_fresh(&[&folder]) {
            step.up_to_date();
        } else {
            stamp.clear()?;
            if folder.exists() {
                fs::remove_dir_all(&folder).with_context(|| format!("cannot remove the old {}", shown(&folder)))?;
            }
            fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", shown(&folder)))?;
            let requirements = folder.join("requirements.txt");
            python::write_requirements(&requirements, pinned.packages)?;
            process::run(
                venv.pip([
                    "install",
                    "--no-deps",
                    "--only-binary=:all:",
                    "--require-hashes",
                    "--quiet",
                    "--no-compile",
                ])
                .args(if own { Vec::new() } else { platforms(machine) })
                .arg("--target")
                .arg(&folder)
                .arg("--requirement")
                .arg(&requirements),
            )
            .context("pip could not fetch NVIDIA's header packages; is the package index reachable?")?;
            stamp.write()?;
        }
        Self::find(&folder.join("nvidia"), &format!("libcudart.so.{}", pinned.major))
    }

    /// CUDA 12's packages have a folder each, CUDA 13's share one.
    fn find(packages: &Path, library: &str) -> Result<Self> {
        let folders = fs::read_dir(packages).with_context(|| format!("cannot read {}", shown(packages)))?;
        let mut folders: Vec<_> = folders.flatten().map(|entry| entry.path()).collect();
        folders.sort();
        let include: Vec<_> = folders.iter().map(|path| path.join("include")).filter(|path| path.is_dir()).collect();
        for header in ["cuda_runtime_api.h", "crt/host_defines.h"] {
            ensure!(
                include.iter().any(|folder| folder.join(header).exists()),
                "NVIDIA's packages in {} brought no {header}",
                shown(packages)
            );
        }
        let runtime_library = folders.iter().map(|path| path.join("lib").join(library)).find(|path| path.is_file());
        let runtime_library = runtime_library
            .with_context(|| format!("NVIDIA's packages in {} brought no {library}", shown(packages)))?;
        Ok(Self { include, runtime_library })
    }

    /// The folders with headers, as CMake takes a list.
    pub fn include_list(&self) -> String {
        let folders: Vec<_> = self.include.iter().map(|folder| folder.to_string_lossy()).collect();
        folders.join(";")
    }
}

/// pip's options for a machine that is not this one. pip knows no order of platforms: each tag that a package may have is
/// named.
fn platforms(machine: Machine) -> Vec<String> {
    let newer = (17..=28).map(|minor| manylinux::platform((2, minor), machine.name()));
    let tags = ["manylinux2014"].map(|name| format!("{name}_{}", machine.name())).into_iter().chain(newer);
    tags.flat_map(|tag| ["--platform".to_owned(), tag]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(file: PathBuf) {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, "").unwrap();
    }

    #[test]
    fn both_layouts_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let twelve = folder.path().join("12");
        put(twelve.join("cuda_runtime/include/cuda_runtime_api.h"));
        put(twelve.join("cuda_runtime/lib/libcudart.so.12"));
        put(twelve.join("cuda_nvcc/include/crt/host_defines.h"));
        let found = Cuda::find(&twelve, "libcudart.so.12").unwrap();
        assert_eq!(found.include, [twelve.join("cuda_nvcc/include"), twelve.join("cuda_runtime/include")]);
        assert_eq!(found.runtime_library, twelve.join("cuda_runtime/lib/libcudart.so.12"));

        let thirteen = folder.path().join("13");
        put(thirteen.join("cu13/include/cuda_runtime_api.h"));
        put(thirteen.join("cu13/include/crt/host_defines.h"));
        let error = Cuda::find(&thirteen, "libcudart.so.13").map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("brought no libcudart.so.13"), "{error}");
        put(thirteen.join("cu13/lib/libcudart.so.13"));
        assert_eq!(Cuda::find(&thirteen, "libcudart.so.13").unwrap().include_list().matches("include").count(), 1);
        fs::remove_file(thirteen.join("cu13/include/crt/host_defines.h")).unwrap();
        assert!(Cuda::find(&thirteen, "libcudart.so.13").is_err());
    }
}
