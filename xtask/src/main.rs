//! The project's commands: `cargo xtask …`.

mod elf;
mod exports;
mod fingerprint;
mod paths;
mod pins;
mod process;
mod python;
mod repack;
mod source;
mod step;
mod tools;
mod tree;
mod wheel;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

/// Builds, runs and tests PyTorch with torch-uvm's allocator inside.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes the official wheel anew with our allocator in its libc10_cuda.so.
    Wheel(WheelArguments),
}

#[derive(Args)]
struct WheelArguments {
    /// The release of PyTorch.
    #[arg(long, default_value = pins::DEFAULT_TORCH)]
    torch: String,
    /// PyTorch's source, instead of Debian's source package.
    #[arg(long, value_name = "DIR")]
    pytorch_src: Option<PathBuf>,
    /// The official CUDA wheel, instead of the package index's.
    #[arg(long, value_name = "FILE")]
    official: Option<PathBuf>,
    /// Where the wheel goes [default: target/wheels].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Rebuild the sources as they are, without our allocator: shows what the toolchain alone changes.
    #[arg(long)]
    unpatched: bool,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Wheel(arguments) => {
            let mut request = wheel::Request::usual(pins::release(&arguments.torch)?);
            request.source = arguments.pytorch_src;
            request.official = arguments.official;
            request.unpatched = arguments.unpatched;
            if let Some(out) = arguments.out {
                request.out = out;
            }
            wheel::make(&request)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
