//! The Rust tests.

use std::process::Command;

use anyhow::Result;

use super::counts::Counts;
use super::schedule::Task;
use super::{Part, counted, testing};
use crate::paths;
use crate::sim;

/// With the bridge to C++ all is there that is there without; its build asks which ABI it is for.
pub const BRIDGE: [&str; 2] = ["--features", "torch-uvm/bridge"];
/// What the bridge's generated headers are copied to; see `build.rs`.
pub fn bridge_headers() -> std::path::PathBuf {
    paths::target().join("bridge-headers")
}

pub fn add(parts: &[&Part], tasks: &mut Vec<Task>) {
    if parts.contains(&&Part::Rust) {
        tasks.push(testing("rust", &[], 1, allocator));
        tasks.push(testing("rust: sim", &[], 1, simulator));
        tasks.push(testing("rust: xtask", &[], 1, xtask));
    }
}

/// Cargo, for what is built in the profile `dev` with the bridge.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(sim::cargo());
    command.args(arguments).current_dir(paths::root());
    command.env("TORCH_UVM_CXX11_ABI", "1").env("TORCH_UVM_CXX_STANDARD", "20");
    command.env("TORCH_UVM_HEADER_DIR", bridge_headers());
    command
}

fn allocator() -> Result<Counts> {
    counted(cargo(&["test", "--package", "torch-uvm", "--no-fail-fast"]).args(BRIDGE))
}

/// Without the bridge: the simulator's library keeps all symbols, and those of the bridge need the adapter's C++.
fn simulator() -> Result<Counts> {
    let packages = ["--package", "torch-uvm-sim", "--package", "torch-uvm-sim-capi"];
    counted(cargo(&["test", "--no-fail-fast"]).args(packages))
}

/// In the profile that these commands themselves are built in: what they are made of need not be built again.
fn xtask() -> Result<Counts> {
    counted(&mut cargo(&["test", "--package", "xtask", "--profile", "xtask"]))
}
