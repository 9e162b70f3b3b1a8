//! The project's commands: `cargo xtask …`.
//!
//! A reader should find a command in the file of its name; what several share lies in `environment` (the virtual
//! environments with a PyTorch), `sim` (the simulator's libraries), `wheel` and `plugin` and the modules they are made of.

mod build_tools;
mod c_api;
mod cuda;
mod demo;
mod elf;
mod environment;
mod exports;
mod faults;
mod fingerprint;
mod index;
mod lock;
mod manylinux;
mod members;
mod official;
mod output;
mod pack;
mod package;
mod paths;
mod pins;
mod platform_libraries;
mod plugin;
mod process;
mod python;
mod release;
mod repack;
mod sim;
mod simulator_libraries;
mod source;
mod step;
mod test;
mod toolchain;
mod tools;
mod tree;
mod uv;
mod wheel;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Builds, runs and tests PyTorch with torch-uvm's allocator inside.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a PyTorch program on unified memory: on the GPU if there is one, else on a simulated GH200
    Demo {
        #[command(flatten)]
        torch: Torch,
        /// Take the simulated GH200 even if there is a GPU.
        #[arg(long)]
        sim: bool,
    },
    /// Runs the tests; without a part, those that take minutes: lint, rust, simulator, adapter and plugin
    Test {
        part: Option<test::Part>,
        #[command(flatten)]
        torch: Torch,
        /// Arguments for pytest or PyTorch's test suite, after `--`.
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Makes the official wheel anew with our allocator in its libc10_cuda.so
    Wheel(WheelArguments),
    /// Makes the wheel torch-uvm: the allocator as a plug-in for stock PyTorch, one library for each minor version
    Plugin(PluginArguments),
    /// Sets the version, and makes the plug-in's wheel of it with its checksums
    Release {
        /// The new version, three numbers; CHANGELOG.md must say what is new in it.
        version: String,
        /// Where the wheel and the checksums go [default: target/release/VERSION].
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Measures the allocator against PyTorch's own, in the same wheel on the simulated device
    Bench {
        what: Benchmark,
        #[command(flatten)]
        torch: Torch,
        /// Arguments for the benchmark, after `--`.
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Runs any command on a simulated CUDA device
    Sim {
        #[command(flatten)]
        machine: sim::Machine,
        /// The command and its arguments, after `--`.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Benchmark {
    /// Nanoseconds of an allocation and a free
    Hotpath,
}

#[derive(Args)]
struct Torch {
    /// The release of PyTorch.
    #[arg(long = "torch", value_name = "VERSION", default_value = pins::DEFAULT_TORCH)]
    version: String,
}

#[derive(Args)]
struct WheelArguments {
    #[command(flatten)]
    torch: Torch,
    /// PyTorch's source, instead of Debian's source package.
    #[arg(long, value_name = "DIR")]
    pytorch_src: Option<PathBuf>,
    /// An official CUDA wheel, instead of the package index's.
    #[arg(long, value_name = "FILE")]
    official: Option<PathBuf>,
    /// Where the wheel goes [default: target/wheels].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Rebuild the sources as they are, without our allocator: shows what the toolchain alone changes.
    #[arg(long)]
    unpatched: bool,
}

#[derive(Args)]
struct PluginArguments {
    /// Only the library for this version of PyTorch (2.11 or 2.11.0); may be given more than once [default: all].
    #[arg(long = "torch", value_name = "VERSION")]
    versions: Vec<String>,
    /// The machine it is for [default: this one]; for another one cross compilers are needed.
    #[arg(long, value_enum)]
    machine: Option<toolchain::Machine>,
    /// Where the wheel goes [default: target/wheels].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
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
        Command::Demo { torch, sim } => demo::run(&torch.version, sim),
        Command::Test { part, torch, arguments } => test::run(part, &torch.version, &arguments),
        Command::Wheel(arguments) => make_wheel(arguments),
        Command::Plugin(arguments) => make_plugin(arguments),
        Command::Release { version, out } => release::run(&version, out).map(|()| ExitCode::SUCCESS),
        Command::Bench { what: Benchmark::Hotpath, torch, arguments } => {
            test::bench_hotpath(&torch.version, &arguments)
        }
        Command::Sim { machine, command } => match sim::exec(&machine, &command)? {},
    }
}

fn make_wheel(arguments: WheelArguments) -> Result<ExitCode> {
    let mut request = wheel::Request::usual(pins::release(&arguments.torch.version)?);
    request.source = arguments.pytorch_src;
    request.official = arguments.official;
    request.unpatched = arguments.unpatched;
    if let Some(out) = arguments.out {
        request.out = out;
    }
    let _lock = lock::Lock::take()?;
    wheel::make(&request)?;
    Ok(ExitCode::SUCCESS)
}

fn make_plugin(arguments: PluginArguments) -> Result<ExitCode> {
    let machine = arguments.machine.map_or_else(toolchain::Machine::own, Ok)?;
    let releases = plugin::releases(&arguments.versions, machine.name())?;
    let _lock = lock::Lock::take()?;
    plugin::make_with(&toolchain::Toolchain::of(machine)?, &releases, &arguments.out.unwrap_or_else(paths::wheels))?;
    Ok(ExitCode::SUCCESS)
}
