//! `cargo xtask demo`: a PyTorch program on unified memory, on the GPU if there is one.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::environment::Environment;
use crate::process;
use crate::sim::{Machine, Simulator};

const CONFIGURATION: &str = "PYTORCH_CUDA_ALLOC_CONF";
const RATIO: f64 = 5.0;
const MIB: u64 = 1 << 20;

/// Makes the wheel, installs it and runs the program. The exit status is the program's.
pub fn run(torch: &str, force_simulator: bool) -> Result<ExitCode> {
    let (environment, _) = Environment::patched(torch)?;
    let gpu = if force_simulator { None } else { ask_for_gpu(&environment)? };
    let mut program = environment.python("tests/python/demo.py");
    let configuration = match &gpu {
        Some(gpu) => {
            eprintln!("==> demo: on this machine's GPU: {}", gpu.name);
            gpu.configuration()
        }
        None => {
            let machine = Machine::small_gh200();
            let why = if force_simulator { "as asked" } else { "PyTorch finds no GPU on this machine" };
            eprintln!("==> demo: {why}: on a simulated GH200 with 2 GiB of its own and 10 GiB beside it");
            Simulator::prepare()?.apply(&mut program, &machine);
            format!("use_uvm:True,uvm_oversubscription_ratio:{RATIO:.1},uvm_access_pattern:gpu_first")
        }
    };
    eprintln!("==> demo: {CONFIGURATION}='{configuration}'");
    let status = process::status(program.env(CONFIGURATION, configuration).env_remove("PYTORCH_ALLOC_CONF"))?;
    Ok(exit_code(status))
}

/// A program's exit status as ours; a program that a signal ended counts as failed.
pub fn exit_code(status: std::process::ExitStatus) -> ExitCode {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.map_or(ExitCode::FAILURE, ExitCode::from)
}

/// The GPU that the program will use.
struct Gpu {
    name: String,
    free: u64,
    total: u64,
}

impl Gpu {
    /// The demo's options, with the cap lowered: others may be using this card, so the program may hold a quarter of
    /// what is free at most, and no more than half of that on the card.
    fn configuration(&self) -> String {
        let ratio = RATIO.min(self.free as f64 / 4.0 / self.total as f64);
        // Two more digits than anyone would type; cut, not rounded, so that the quarter is kept.
        let ratio = (ratio * 1e4).floor() / 1e4;
        let limit = (self.free / 8).min(2048 * MIB) / MIB;
        format!(
            "use_uvm:True,uvm_oversubscription_ratio:{ratio},uvm_access_pattern:gpu_first,uvm_device_limit_mb:{limit}"
        )
    }
}

/// Asks PyTorch itself, with its own allocator, so that a GPU counts only if PyTorch can use it.
fn ask_for_gpu(environment: &Environment) -> Result<Option<Gpu>> {
    const QUESTION: &str = "\
import torch
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    print(free, total, torch.cuda.get_device_name())
";
    let mut python = Command::new(environment.venv.python());
    python.args(["-c", QUESTION]).env_remove(CONFIGURATION).env_remove("PYTORCH_ALLOC_CONF");
    let answer = process::capture(python.env_remove("PYTHONPATH")).context("the patched PyTorch does not import")?;
    Ok(parse_gpu(&answer))
}

fn parse_gpu(answer: &str) -> Option<Gpu> {
    let mut words = answer.trim().splitn(3, ' ');
    let (free, total) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some(Gpu { free, total, name: words.next()?.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpu_is_understood() {
        let gpu = parse_gpu("84000000000 85000000000 NVIDIA H100 80GB HBM3\n").unwrap();
        assert_eq!((gpu.name.as_str(), gpu.total), ("NVIDIA H100 80GB HBM3", 85_000_000_000));
        assert!(parse_gpu("").is_none());
    }

    #[test]
    fn cap_is_at_most_a_quarter_of_what_is_free() {
        for (free, total) in [(84_000_000_000, 85_000_000_000), (3_000_000_000, 85_000_000_000), (1 << 33, 1 << 33)] {
            let configuration = Gpu { name: String::new(), free, total }.configuration();
            let value = |key: &str| -> f64 {
                let item = configuration.split(',').find_map(|item| item.strip_prefix(key));
                item.unwrap().trim_start_matches(':').parse().unwrap()
            };
            assert!(value("uvm_oversubscription_ratio") * total as f64 <= free as f64 / 4.0, "{configuration}");
            assert!(value("uvm_device_limit_mb") * MIB as f64 <= free as f64 / 8.0, "{configuration}");
        }
    }
}
