//! Running other programs, with errors that say what was run and what it said.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

use crate::output;
use crate::paths::shown;

/// How many lines of a failed program's output are repeated in the error.
const TAIL: usize = 30;

/// Runs a program whose output the user should see (downloads, tests).
pub fn run(command: &mut Command) -> Result<()> {
    let status = status(command)?;
    if !status.success() {
        bail!("`{}` ended with {status}", line(command));
    }
    Ok(())
}

/// Runs a program whose output the user should see, and gives back how it ended.
pub fn status(command: &mut Command) -> Result<ExitStatus> {
    command
        .stdout(output::stdio())
        .stderr(output::stdio())
        .status()
        .with_context(|| format!("cannot start `{}`", line(command)))
}

/// Runs a program whose output the user should see, and shows each line of it to `seen`.
pub fn watch(command: &mut Command, mut seen: impl FnMut(&str)) -> Result<ExitStatus> {
    let cannot = || format!("cannot start `{}`", line(command));
    let (reader, writer) = io::pipe().with_context(cannot)?;
    let errors = writer.try_clone().with_context(cannot)?;
    let name = line(command);
    let started = command.stdout(writer).stderr(errors).spawn();
    // The command keeps the pipe's ends for writing: until it lets go of them, reading does not end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = started.with_context(|| format!("cannot start `{name}`"))?;
    let mut reader = BufReader::new(reader);
    let mut bytes = Vec::new();
    while reader.read_until(b'\n', &mut bytes).with_context(|| format!("cannot read what `{name}` says"))? > 0 {
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim_end_matches(['\n', '\r']);
        output::say(text);
        seen(text);
        bytes.clear();
    }
    child.wait().with_context(|| format!("cannot wait for `{name}`"))
}

/// Runs a program and gives back what it wrote to its standard output.
pub fn capture(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{}`", line(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` ended with {}:\n{}", line(command), output.status, tail(&said));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program that talks a lot: its output goes to `log`, and its last lines into the error if it fails.
pub fn run_logged(command: &mut Command, log: &Path) -> Result<()> {
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let errors = file.try_clone().with_context(|| format!("cannot write {}", log.display()))?;
    let command = command.stdin(Stdio::null()).stdout(file).stderr(errors);
    let status = command.status().with_context(|| format!("cannot start `{}`", line(command)))?;
    if !status.success() {
        let said = fs::read(log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        bail!("`{}` ended with {status}; the whole output is in {}:\n{}", line(command), shown(log), tail(&said));
    }
    Ok(())
}

/// A command as one would type it.
pub fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| quoted(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{word}'") }
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_quotes_what_a_shell_would_split() {
        let mut command = Command::new("pip");
        command.args(["install", "a b", "torch==2.6.0", ""]);
        assert_eq!(line(&command), "pip install 'a b' torch==2.6.0 ''");
    }

    #[test]
    fn tail_keeps_the_end() {
        let text: String = (0..100).map(|n| format!("{n}\n")).collect();
        let kept = tail(&text);
        assert_eq!(kept.lines().count(), TAIL);
        assert!(kept.ends_with("99"));
    }

    #[test]
    fn failures_say_what_was_run_and_said() {
        let error = capture(Command::new("sh").args(["-c", "echo oh no >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("sh -c") && error.contains("oh no") && error.contains('3'), "{error}");
        let error = capture(&mut Command::new("no-such-program-here")).unwrap_err().to_string();
        assert!(error.contains("no-such-program-here"), "{error}");
    }

    #[test]
    fn watched_lines_are_seen() {
        let mut lines = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two >&2; printf three; exit 4"]);
        let status = watch(&mut command, |line| lines.push(line.to_owned())).unwrap();
        assert_eq!((status.code(), lines), (Some(4), vec!["one".to_owned(), "two".to_owned(), "three".to_owned()]));
        assert!(watch(&mut Command::new("no-such-program-here"), |_| ()).is_err());
    }

    #[test]
    fn logged_failure_points_at_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("deep/er/build.log");
        let error = run_logged(Command::new("sh").args(["-c", "echo broken; exit 1"]), &log).unwrap_err().to_string();
        assert!(error.contains("build.log") && error.contains("broken"), "{error}");
        assert_eq!(fs::read_to_string(log).unwrap(), "broken\n");
    }
}
