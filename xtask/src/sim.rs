//! `cargo xtask sim`: any command on a simulated CUDA device.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};

use crate::lock::Lock;
use crate::paths::{self, shown};
use crate::plugin;
use crate::simulator_libraries;
use crate::step::Steps;
use crate::toolchain::Toolchain;

#[path = "../../sim/capi/stubs/assemble.rs"]
pub mod libraries;

/// The machines that the simulator has a profile of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Device {
    H100,
    Gh200,
    Gh200Egm,
    Gb10,
    H100NoHostChunks,
    Rtx4090Wsl,
}

/// Which machine is simulated.
#[derive(Args, Clone)]
pub struct Machine {
    /// The kind of machine.
    #[arg(long, value_enum, default_value = "gh200")]
    pub device: Device,
    /// The GPU's memory, such as 2GiB [default: that of the machine].
    #[arg(long, value_name = "SIZE")]
    pub hbm: Option<String>,
    /// The CPU's memory, such as 10GiB [default: that of the machine].
    #[arg(long, value_name = "SIZE")]
    pub host: Option<String>,
    /// How many GPUs the machine has.
    #[arg(long, value_name = "N")]
    pub devices: Option<u32>,
    /// In which order streams make progress: a number, `late` (at synchronisation only) or `eager`.
    #[arg(long, value_name = "N")]
    pub seed: Option<String>,
}

impl Machine {
    /// A GH200 small enough for programs to fill in seconds. Its streams run as late as they may: the demo looks at a block that
    /// another stream still uses, and in a random order that stream might be done already.
    pub fn small_gh200() -> Self {
        let text = |text: &str| Some(text.to_owned());
        Self { device: Device::Gh200, hbm: text("2GiB"), host: text("10GiB"), devices: None, seed: text("late") }
    }

    /// The variables by which the simulator is told.
    fn variables(&self) -> Vec<(&'static str, String)> {
        let device = self.device.to_possible_value().map(|value| value.get_name().to_owned());
        let devices = self.devices.map(|count| count.to_string());
        let all = [
            ("TORCH_UVM_SIM_DEVICE", device),
            ("TORCH_UVM_SIM_HBM", self.hbm.clone()),
            ("TORCH_UVM_SIM_HOST", self.host.clone()),
            ("TORCH_UVM_SIM_DEVICES", devices),
            ("TORCH_UVM_SIM_SEED", self.seed.clone()),
        ];
        all.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
    }
}

/// The libraries that stand in for CUDA's.
pub struct Simulator {
    libraries: PathBuf,
}

impl Simulator {
    /// Builds the libraries; what is there already is kept.
    pub fn prepare() -> Result<Self> {
        let toolchain = Toolchain::native()?;
        toolchain.require()?;
        let _lock = Lock::take()?;
        let steps = Steps::new("simulator");
        let platform = plugin::platform(&steps, &toolchain)?;
        steps.run("build the simulated CUDA libraries", |step| {
            simulator_libraries::build(step, &toolchain, &platform)
        })?;
        let folder = paths::simulator_libraries();
        let libraries = fs::canonicalize(&folder).with_context(|| format!("cannot read {}", shown(&folder)))?;
        Ok(Self { libraries })
    }

    /// The folder they are in.
    pub fn libraries(&self) -> &Path {
        &self.libraries
    }

    /// Has `command` run on `machine`.
    pub fn apply(&self, command: &mut Command, machine: &Machine) {
        for (key, _) in env::vars_os() {
            // A setting left over in the shell must not change the machine that was asked for.
            if is_machine_variable(&key) {
                command.env_remove(key);
            }
        }
        command.envs(machine.variables()).envs(libraries::environment(&self.libraries));
    }
}

fn is_machine_variable(key: &OsString) -> bool {
    ["DEVICE", "HBM", "HOST", "DEVICES", "SEED"]
        .iter()
        .any(|name| key.to_str().is_some_and(|key| key.strip_prefix("TORCH_UVM_SIM_") == Some(name)))
}

/// The cargo that runs us.
pub fn cargo() -> OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Turns this process into `command`, running on `machine`: signals and exit status are the command's own.
pub fn exec(machine: &Machine, command: &[OsString]) -> Result<std::convert::Infallible> {
    let (program, arguments) = command.split_first().context("no command given")?;
    let simulator = Simulator::prepare()?;
    let mut command = Command::new(program);
    simulator.apply(command.args(arguments), machine);
    let error = command.exec();
    Err(anyhow!("cannot start {}: {error}", program.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_those_asked_for() {
        let machine = Machine { devices: Some(2), seed: Some("late".into()), ..Machine::small_gh200() };
        let expected = [
            ("TORCH_UVM_SIM_DEVICE", "gh200"),
            ("TORCH_UVM_SIM_HBM", "2GiB"),
            ("TORCH_UVM_SIM_HOST", "10GiB"),
            ("TORCH_UVM_SIM_DEVICES", "2"),
            ("TORCH_UVM_SIM_SEED", "late"),
        ];
        assert_eq!(machine.variables(), expected.map(|(key, value)| (key, value.to_owned())));
        let whole = Machine { device: Device::Gh200Egm, hbm: None, host: None, devices: None, seed: None };
        assert_eq!(whole.variables(), [("TORCH_UVM_SIM_DEVICE", "gh200-egm".to_owned())]);
    }

    #[test]
    fn libraries_go_before_what_is_preloaded() {
        let variables = libraries::environment(Path::new("/there"));
        let preload = variables.iter().find(|(key, _)| *key == "LD_PRELOAD").unwrap();
        assert!(preload.1.to_string_lossy().starts_with("/there/libcudart.so.12:"));
    }
}
