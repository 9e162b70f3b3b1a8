//! The machine that is built for, and the compilers for it: this machine's own, or those that cross-compile.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::paths;
use crate::process;
use crate::step::Step;
use crate::tools::{self, Tool};

/// A machine that wheels are made for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Machine {
    #[value(name = "x86_64")]
    X86_64,
    #[value(name = "aarch64")]
    Aarch64,
}

impl Machine {
    /// The machine that this program runs on.
    pub fn own() -> Result<Self> {
        match env::consts::ARCH {
            "x86_64" => Ok(Self::X86_64),
            "aarch64" => Ok(Self::Aarch64),
            other => bail!("this machine is {other}: wheels are made for x86_64 and aarch64, on either"),
        }
    }

    /// As `uname -m` calls it, and wheels do.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// As Rust calls it.
    pub fn triple(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// The largest page that its kernels may have, in bytes: a segment that is aligned to less cannot be mapped there.
    pub fn largest_page(self) -> u64 {
        match self {
            Self::X86_64 => 4 << 10,
            Self::Aarch64 => 64 << 10,
        }
    }

    fn cross_cxx(self) -> Tool {
        match self {
            Self::X86_64 => Tool { program: "x86_64-linux-gnu-g++", package: "g++-x86-64-linux-gnu" },
            Self::Aarch64 => Tool { program: "aarch64-linux-gnu-g++", package: "g++-aarch64-linux-gnu" },
        }
    }

    fn cross_cc(self) -> Tool {
        match self {
            Self::X86_64 => Tool { program: "x86_64-linux-gnu-gcc", package: "gcc-x86-64-linux-gnu" },
            Self::Aarch64 => Tool { program: "aarch64-linux-gnu-gcc", package: "gcc-aarch64-linux-gnu" },
        }
    }
}

/// What compiles for a machine.
#[derive(Clone, Debug)]
pub struct Toolchain {
    pub machine: Machine,
    /// Whether this machine is another one.
    pub cross: bool,
    cc: OsString,
    cxx: OsString,
}

impl Toolchain {
    /// For this machine: the compilers that `CC` and `CXX` name, else `cc` and `g++`.
    pub fn native() -> Result<Self> {
        Self::of(Machine::own()?)
    }

    /// For `machine`. For another one than this it is the compilers that `CC_<triple>` and `CXX_<triple>` name, with the
    /// triple's dashes or with underscores in their place, else Debian's cross compilers. `CC` and `CXX` name those for
    /// this machine.
    pub fn of(machine: Machine) -> Result<Self> {
        Ok(Self::on(Machine::own()?, machine, |name| env::var_os(name).filter(|value| !value.is_empty())))
    }

    fn on(own: Machine, machine: Machine, variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let cross = machine != own;
        let named = |name: &str, usual: &str| {
            let found = if cross {
                let triple = machine.triple();
                variable(&format!("{name}_{triple}"))
                    .or_else(|| variable(&format!("{name}_{}", triple.replace('-', "_"))))
            } else {
                variable(name)
            };
            found.unwrap_or_else(|| usual.into())
        };
        let (cc, cxx) = if cross { (machine.cross_cc(), machine.cross_cxx()) } else { (tools::CC, tools::CXX) };
        Self { machine, cross, cc: named("CC", cc.program), cxx: named("CXX", cxx.program) }
    }

    pub fn cxx(&self) -> &OsStr {
        &self.cxx
    }

    pub fn cc(&self) -> &OsStr {
        &self.cc
    }

    /// A folder of `target/`: for another machine one of its own, so that one build never finds the other's files.
    pub fn folder(&self, name: &str) -> PathBuf {
        let name = if self.cross { format!("{name}-{}", self.machine.name()) } else { name.to_owned() };
        paths::target().join(name)
    }

    /// An error that names the compilers that are missing and how to get them.
    pub fn require(&self) -> Result<()> {
        let machine = self.machine;
        let (cc, cxx) = if self.cross { (machine.cross_cc(), machine.cross_cxx()) } else { (tools::CC, tools::CXX) };
        // One that a variable names is looked for when it is run: it may come with arguments.
        let usual = [(cc, &self.cc), (cxx, &self.cxx)].into_iter().filter(|(tool, named)| tool.program == *named);
        tools::require(&usual.map(|(tool, _)| tool).collect::<Vec<_>>())
    }

    /// Sees to it that Rust's standard library for the machine is there: `rustup` fetches it where it manages this Rust.
    pub fn prepare_rust(&self, step: &Step) -> Result<()> {
        let triple = self.machine.triple();
        if !self.cross || has_standard_library(triple)? {
            step.up_to_date();
            return Ok(());
        }
        ensure!(
            tools::find("rustup").is_some(),
            "this Rust has no standard library for {triple}, and there is no rustup that could fetch it: install Rust \
             with https://rustup.rs, or the package that brings the library (on Debian: libstd-rust-dev of that \
             architecture)"
        );
        process::run(Command::new("rustup").args(["target", "add", triple])).with_context(|| {
            format!(
                "rustup could not fetch Rust's standard library for {triple}: is the network there? By hand it is \
                     `rustup target add {triple}`"
            )
        })?;
        ensure!(
            has_standard_library(triple)?,
            "rustup has fetched Rust's standard library for {triple}, but not for the Rust that is in PATH"
        );
        Ok(())
    }

    /// Tells cargo what to compile for, and with what. For this machine nothing needs to be said.
    pub fn apply(&self, cargo: &mut Command) {
        if !self.cross {
            return;
        }
        let triple = self.machine.triple();
        let linker = format!("CARGO_TARGET_{}_LINKER", triple.to_uppercase().replace('-', "_"));
        cargo.args(["--target", triple]).env(linker, &self.cc);
        cargo.env(format!("CC_{triple}"), &self.cc).env(format!("CXX_{triple}"), &self.cxx);
    }

    /// The folder in a cargo target folder below which a profile's results lie.
    pub fn results(&self, target: &std::path::Path) -> PathBuf {
        if self.cross { target.join(self.machine.triple()) } else { target.to_owned() }
    }

    /// What CMake has to be told; see `cmake/TorchUvm.cmake`.
    pub fn definitions(&self) -> Vec<String> {
        if !self.cross {
            return Vec::new();
        }
        vec![
            "-DCMAKE_SYSTEM_NAME=Linux".into(),
            format!("-DCMAKE_SYSTEM_PROCESSOR={}", self.machine.name()),
            format!("-DCMAKE_CXX_COMPILER={}", self.cxx.to_string_lossy()),
            format!("-DTORCH_UVM_CARGO_TARGET={}", self.machine.triple()),
        ]
    }
}

fn has_standard_library(triple: &str) -> Result<bool> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let folder = process::capture(Command::new(rustc).args(["--print", "target-libdir", "--target", triple]))
        .context("cannot ask rustc where its libraries are")?;
    Ok(std::path::Path::new(folder.trim()).is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(own: Machine, machine: Machine, variables: &[(&str, &str)]) -> Toolchain {
        Toolchain::on(own, machine, |name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into())
        })
    }

    #[test]
    fn own_compilers_are_those_of_the_environment() {
        let native = on(Machine::X86_64, Machine::X86_64, &[("CXX", "clang++")]);
        assert_eq!((native.cc(), native.cxx(), native.cross), ("cc".as_ref(), "clang++".as_ref(), false));
        assert!(native.definitions().is_empty());
        let mut cargo = Command::new("cargo");
        native.apply(&mut cargo);
        assert_eq!(cargo.get_args().count() + cargo.get_envs().count(), 0);
    }

    #[test]
    fn cross_compilers_are_never_those_for_this_machine() {
        let cross = on(Machine::X86_64, Machine::Aarch64, &[("CXX", "clang++"), ("CC", "clang")]);
        assert_eq!((cross.cc(), cross.cxx()), ("aarch64-linux-gnu-gcc".as_ref(), "aarch64-linux-gnu-g++".as_ref()));
        let named = on(Machine::X86_64, Machine::Aarch64, &[("CXX_aarch64_unknown_linux_gnu", "my-g++")]);
        assert_eq!(named.cxx(), "my-g++");
        let back = on(Machine::Aarch64, Machine::X86_64, &[]);
        assert_eq!(back.cxx(), "x86_64-linux-gnu-g++");

        let mut cargo = Command::new("cargo");
        cross.apply(&mut cargo);
        let variables: Vec<_> = cargo.get_envs().map(|(key, _)| key.to_string_lossy().into_owned()).collect();
        assert!(variables.contains(&"CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER".to_owned()), "{variables:?}");
        // The host's own build scripts must go on finding this machine's compilers.
        assert!(!variables.iter().any(|name| name == "CC" || name == "CXX"), "{variables:?}");
    }

    #[test]
    fn folders_of_machines_are_apart() {
        let native = on(Machine::X86_64, Machine::X86_64, &[]);
        let cross = on(Machine::X86_64, Machine::Aarch64, &[]);
        assert!(native.folder("plugin").ends_with("plugin") && cross.folder("plugin").ends_with("plugin-aarch64"));
        let folder = std::path::Path::new("t");
        assert_eq!(native.results(folder), folder);
        assert_eq!(cross.results(folder), folder.join("aarch64-unknown-linux-gnu"));
    }
}
