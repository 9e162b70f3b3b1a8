//! `cargo xtask test faults`: shows that the tests can fail.
//!
//! Each patch in `tests/faults/` plants one fault in the allocator. The sources are copied under `target/`, a fault is
//! planted in the copy, and the Rust tests must go red: those that the patch names in a line `Red: NAME`, if it does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::paths::{self, shown};
use crate::process;
use crate::sim::cargo;
use crate::step::Steps;
use crate::tree;
use crate::wheel::apply;

/// What the copy is made of; the rest of the repository is no concern of the Rust tests.
const SOURCES: &[&str] = &["Cargo.toml", "Cargo.lock", "build.rs", "src", "sim", "tests", "xtask", "cpp"];
/// A fault may make a test wait for ever: that counts as red after so many seconds.
const PATIENCE: &str = "900";
/// The soak's seed and length here: each fault is to be seen within so many operations.
const SOAK: &str = "1:20000";
/// What `timeout` ends with when it had to stop the program.
const TIMED_OUT: i32 = 124;

/// Plants each fault in turn. An error names the faults that no test noticed.
pub fn run() -> Result<()> {
    let steps = Steps::new("test faults");
    let faults = faults(&paths::root().join("tests/faults"))?;
    let clean = paths::target().join("faults/clean");
    let work = paths::target().join("faults/work");
    copy_sources(&clean)?;
    tree::sync(&clean, &work)?;
    steps.run("without a fault the tests pass", |_| {
        let outcome = test(&work)?;
        ensure!(outcome.green, "they do not: {}", outcome.red.join(", "));
        Ok(())
    })?;
    let mut unnoticed = Vec::new();
    for fault in &faults {
        let what = format!("{}: {}", fault.name, fault.title);
        steps.run(&what, |step| {
            tree::sync(&clean, &work)?;
            apply(&fault.patch, &work)?;
            let outcome = test(&work)?;
            step.note(format_args!("red: {}", if outcome.green { "none".into() } else { outcome.red.join(", ") }));
            let missed: Vec<_> = fault.expected.iter().filter(|name| !outcome.is_red(name)).collect();
            if outcome.green || !missed.is_empty() {
                unnoticed.push(format!("{what} (expected red: {})", fault.expected.join(", ")));
            }
            Ok(())
        })?;
    }
    ensure!(unnoticed.is_empty(), "no test noticed these faults:\n  {}", unnoticed.join("\n  "));
    steps.finish(format_args!("{} faults planted, each noticed", faults.len()));
    Ok(())
}

/// A fault to plant.
struct Fault {
    name: String,
    patch: PathBuf,
    /// The patch's first line.
    title: String,
    /// Tests that must go red.
    expected: Vec<String>,
}

fn faults(folder: &Path) -> Result<Vec<Fault>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read the folder {}", shown(folder)))?;
    let mut patches: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    patches.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
    patches.sort();
    ensure!(!patches.is_empty(), "there is no patch in {}", shown(folder));
    patches
        .into_iter()
        .map(|patch| {
            let text = fs::read_to_string(&patch).with_context(|| format!("cannot read {}", shown(&patch)))?;
            let name = patch.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let (title, expected) = parse_head(&text);
            Ok(Fault { name, patch, title, expected })
        })
        .collect()
}

/// The first line of a patch, and the tests in its lines `Red: NAME`.
fn parse_head(text: &str) -> (String, Vec<String>) {
    let head = || text.lines().take_while(|line| !line.starts_with("--- ") && !line.starts_with("diff "));
    let expected = head().filter_map(|line| line.strip_prefix("Red:")).map(|name| name.trim().to_owned()).collect();
    (head().next().unwrap_or_default().to_owned(), expected)
}

fn copy_sources(to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_dir_all(to).with_context(|| format!("cannot remove the old {}", shown(to)))?;
    }
    let mut present = SOURCES.iter().filter(|part| paths::root().join(part).exists());
    present.try_for_each(|part| tree::copy(&paths::root().join(part), &to.join(part)))
}

/// How the tests went.
struct Outcome {
    green: bool,
    red: Vec<String>,
}

impl Outcome {
    fn is_red(&self, name: &str) -> bool {
        self.red.iter().any(|red| red == name || red.ends_with(&format!("::{name}")))
    }
}

fn test(work: &Path) -> Result<Outcome> {
    let mut command = Command::new("timeout");
    command
        .arg(PATIENCE)
        .arg(cargo())
        .args(["test", "--package", "torch-uvm", "--no-fail-fast", "--color", "never"])
        .current_dir(work)
        .env("CARGO_TARGET_DIR", paths::target().join("faults/build"))
        .env("TORCH_UVM_SOAK", SOAK)
        .stdin(Stdio::null());
    let output = command.output().with_context(|| format!("cannot start `{}`", process::line(&command)))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut red = red_tests(&text);
    if output.status.code() == Some(TIMED_OUT) {
        red.push(format!("(no end within {PATIENCE} s)"));
    } else if !output.status.success() && red.is_empty() {
        // A fault that the compiler refuses shows nothing about the tests.
        ensure!(
            text.lines().any(|line| line.starts_with("running ")),
            "`{}` did not get to the tests:\n{}",
            process::line(&command),
            String::from_utf8_lossy(&output.stderr)
        );
        red.push("(a test program died)".to_owned());
    }
    Ok(Outcome { green: output.status.success(), red })
}

/// The names of the tests that failed, from what cargo's test runner printed.
fn red_tests(text: &str) -> Vec<String> {
    let failed = |line: &str| Some(line.strip_prefix("test ")?.strip_suffix(" ... FAILED")?.to_owned());
    text.lines().filter_map(failed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn head_holds_title_and_expected_tests() {
        let text = "A block is reused before its event completed.\n\nRed: streams::waits\nRed: model\n\n--- a/x\n+++ b/x\nRed: no\n";
        let (title, expected) = parse_head(text);
        assert_eq!(title, "A block is reused before its event completed.");
        assert_eq!(expected, ["streams::waits", "model"]);
    }

    #[test]
    fn red_tests_are_found_in_the_runners_output() {
        let text =
            "running 3 tests\ntest a::b ... ok\ntest a::c ... FAILED\ntest d ... FAILED\n\nfailures:\n    a::c\n";
        assert_eq!(red_tests(text), ["a::c", "d"]);
        let outcome = Outcome { green: false, red: red_tests(text) };
        assert!(outcome.is_red("c") && outcome.is_red("a::c") && !outcome.is_red("b"));
    }
}
