//! `cargo xtask test`: every test of the project.

mod counts;
mod lint;
mod nightly;
mod python;
mod rust;
mod schedule;

use std::process::{Command, ExitCode};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::output;
use crate::paths::{self, shown};
use crate::process;
use crate::step::seconds;
use counts::Counts;
use schedule::{Counted, Task};

/// A part of the tests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Part {
    /// Formatting, lints, types and documentation, of Rust, Python and C++
    Lint,
    /// The Rust tests
    Rust,
    /// The simulated device under PyTorch as it is published
    Simulator,
    /// The patched PyTorch on the simulated device
    Adapter,
    /// PyTorch as it is published, with the plug-in, on the simulated device
    Plugin,
    /// PyTorch's own test_cuda.py, with native and with uvm
    Pytorch,
    /// Plants faults in the allocator, one after the other: the Rust tests must notice each
    Faults,
    /// Changes the pure modules in every place (cargo-mutants): the tests must notice each change
    Mutants,
    /// The C++ adapter with AddressSanitizer and UBSan, on the simulated device
    Sanitizers,
    /// Every order in which threads can take turns in the threads' caches (loom)
    Loom,
    /// What takes hours: pytorch, faults, mutants, sanitizers and loom
    Nightly,
    /// All of these
    All,
}

/// What runs without a part: minutes.
const USUAL: &[Part] = &[Part::Lint, Part::Rust, Part::Simulator, Part::Adapter, Part::Plugin];
const NIGHTLY: &[Part] = &[Part::Pytorch, Part::Faults, Part::Mutants, Part::Sanitizers, Part::Loom];

fn parts(part: Option<Part>) -> Vec<Part> {
    match part {
        None => USUAL.to_vec(),
        Some(Part::Nightly) => NIGHTLY.to_vec(),
        Some(Part::All) => [USUAL, NIGHTLY].concat(),
        Some(part) => vec![part],
    }
}

/// What is asked for, and what steps make for others.
#[derive(Default)]
pub struct Run {
    /// PyTorch's release that is patched.
    torch: String,
    /// The user's arguments for pytest and PyTorch's test suite.
    arguments: Vec<String>,
    made: python::Made,
    tools: OnceLock<crate::python::Venv>,
}

/// Runs the parts, all of them even if one fails, and says at the end how each step went. The last line has the counts.
pub fn run(part: Option<Part>, torch: &str, arguments: &[String]) -> Result<ExitCode> {
    let parts = parts(part);
    let run = Run { torch: torch.to_owned(), arguments: arguments.to_vec(), ..Run::default() };
    let mut tasks = Vec::new();
    // Nightly's steps want the machine to themselves: they come one after the other, when the others are done.
    let (nightly, usual): (Vec<_>, Vec<_>) = parts.iter().partition(|part| NIGHTLY.contains(part));
    python::add(&run, &usual, &mut tasks);
    lint::add(&run, &usual, &mut tasks);
    rust::add(&usual, &mut tasks);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let apart = tasks.len() > 1;
    let started = std::time::Instant::now();
    let mut outcomes = schedule::run(tasks, cores + 1, apart);
    outcomes.extend(schedule::run(nightly::tasks(&run, &nightly), 1, false));

    output::say("");
    for outcome in &outcomes {
        output::say(outcome.line());
    }
    if let Some(note) = usual.contains(&&Part::Plugin).then(python::newer_than_tested).flatten() {
        output::say(format_args!("==> note: {note}"));
    }
    let failed = outcomes.iter().any(|outcome| outcome.error.is_some());
    let logs = if apart { format!("; logs in {}", shown(&paths::test_logs())) } else { String::new() };
    output::say(format_args!("==> test: {} steps in {}{logs}", outcomes.len(), seconds(started.elapsed())));
    let counts: Counts = outcomes.iter().map(|outcome| outcome.counts).sum();
    // On the standard output, and last: it is what programs read.
    println!("{counts}");
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// A step that makes something.
fn making<'a>(
    name: impl Into<String>,
    after: &[&str],
    cores: usize,
    body: impl FnOnce() -> Result<()> + Send + 'a,
) -> Task<'a> {
    let after = after.iter().map(|name| name.to_string()).collect();
    Task { name: name.into(), after, cores, body: Box::new(|| body().map(|()| Counts::default())) }
}

/// A step that checks one thing.
fn checking<'a>(name: &str, after: &[&str], cores: usize, body: impl FnOnce() -> Result<()> + Send + 'a) -> Task<'a> {
    let after = after.iter().map(|name| name.to_string()).collect();
    Task { name: name.into(), after, cores, body: Box::new(|| body().map(|()| Counts::PASSED)) }
}

/// A step that runs tests.
fn testing<'a>(
    name: impl Into<String>,
    after: &[&str],
    cores: usize,
    body: impl FnOnce() -> Result<Counts> + Send + 'a,
) -> Task<'a> {
    let after = after.iter().map(|name| name.to_string()).collect();
    Task { name: name.into(), after, cores, body: Box::new(body) }
}

/// Runs a test runner and counts what it says.
fn counted(command: &mut Command) -> Result<Counts> {
    let name = process::line(command);
    output::say(format_args!("==> {name}"));
    // cargo has a closing line for each program that it runs. What other runners' programs say in between is not theirs.
    let (mut sum, mut last) = (Counts::default(), Counts::default());
    let status = process::watch(command, |line| match Counts::in_line(line) {
        Some(counts) if line.starts_with("test result: ") => sum += counts,
        Some(counts) => last = counts,
        None => {}
    })?;
    let counts = sum + last;
    let ran = || -> Result<()> {
        ensure!(status.success(), "`{name}` ended with {status}");
        ensure!(counts.passed > 0, "`{name}` ran no test");
        Ok(())
    };
    ran().context(Counted(counts))?;
    Ok(counts)
}

/// Runs a program that checks something.
fn checked(command: &mut Command) -> Result<()> {
    output::say(format_args!("==> {}", process::line(command)));
    process::run(command)
}

pub use python::bench_hotpath;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_every_part() {
        let single = Part::value_variants().iter().filter(|part| !matches!(part, Part::Nightly | Part::All));
        assert_eq!(parts(Some(Part::All)), single.copied().collect::<Vec<_>>());
        assert_eq!(parts(Some(Part::Lint)), [Part::Lint]);
    }

    #[test]
    fn usual_steps_need_nothing_that_is_not_there() {
        let run = Run { torch: crate::pins::DEFAULT_TORCH.into(), ..Run::default() };
        for chosen in USUAL.iter().map(|part| vec![*part]).chain([USUAL.to_vec()]) {
            let mut tasks = Vec::new();
            let chosen: Vec<_> = chosen.iter().collect();
            python::add(&run, &chosen, &mut tasks);
            lint::add(&run, &chosen, &mut tasks);
            rust::add(&chosen, &mut tasks);
            let names: Vec<_> = tasks.iter().map(|task| task.name.clone()).collect();
            for task in &tasks {
                assert!(task.after.iter().all(|name| names.contains(name)), "{} needs {:?}", task.name, task.after);
            }
            assert!(!names.is_empty());
        }
    }

    #[test]
    fn runners_are_counted_and_an_empty_run_is_none() {
        let run = |script: &str| counted(Command::new("sh").args(["-c", script]));
        assert_eq!(run("echo '3 passed, 1 skipped in 0.1s'").unwrap(), Counts { passed: 3, failed: 0, skipped: 1 });
        let error = run("echo '3 passed, 2 failed in 0.1s'; exit 1").unwrap_err();
        assert_eq!(error.downcast_ref::<Counted>().unwrap().0.failed, 2);
        assert!(run("true").is_err());
        let cargo = "test result: ok. 2 passed; 0 failed; 0 ignored";
        assert_eq!(run(&format!("echo '{cargo}'; echo '{cargo}'")).unwrap().passed, 4);
        let nested = "echo '0 passed, 1 failed (PyTorch 2)'; echo '3 passed, 0 failed (PyTorch 2)'";
        assert_eq!(run(nested).unwrap(), Counts { passed: 3, failed: 0, skipped: 0 });
    }
}
