//! Says what is being done, how long it took, and in which step a failure happened.

use std::cell::Cell;
use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::output;

/// The steps of one command, printed as they run.
pub struct Steps {
    command: &'static str,
    started: Instant,
}

/// A step that is running.
pub struct Step {
    unchanged: Cell<bool>,
}

impl Step {
    /// A step that nobody is told of, for what is there already.
    pub fn unseen() -> Self {
        Self { unchanged: Cell::new(false) }
    }

    /// Notes that the step's result was already there.
    pub fn up_to_date(&self) {
        self.unchanged.set(true);
    }

    /// Prints a line that belongs to this step.
    pub fn note(&self, text: impl Display) {
        output::say(format_args!("    {text}"));
    }
}

impl Steps {
    pub fn new(command: &'static str) -> Self {
        Self { command, started: Instant::now() }
    }

    /// Runs one step. A failure says which step it was.
    pub fn run<T>(&self, what: impl Display, body: impl FnOnce(&Step) -> Result<T>) -> Result<T> {
        output::say(format_args!("==> {}: {what}", self.command));
        let started = Instant::now();
        let step = Step { unchanged: Cell::new(false) };
        let result = body(&step).with_context(|| format!("{}: step «{what}» failed", self.command))?;
        let took = seconds(started.elapsed());
        output::say(format_args!("    {} ({took})", if step.unchanged.get() { "up to date" } else { "done" }));
        Ok(result)
    }

    /// Prints the closing line, with the time that all steps took together.
    pub fn finish(&self, what: impl Display) {
        output::say(format_args!("==> {}: {what} ({})", self.command, seconds(self.started.elapsed())));
    }
}

/// A time as the commands tell it.
pub fn seconds(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 100.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{} min {:02} s", time.as_secs() / 60, time.as_secs() % 60)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn failure_names_command_and_step() {
        let steps = Steps::new("wheel");
        let error = steps.run("patch the sources", |_| -> Result<()> { bail!("hunk 3") }).unwrap_err();
        assert_eq!(format!("{error:#}"), "wheel: step «patch the sources» failed: hunk 3");
    }

    #[test]
    fn long_times_are_in_minutes() {
        assert_eq!(seconds(Duration::from_millis(1500)), "1.5 s");
        assert_eq!(seconds(Duration::from_secs(125)), "2 min 05 s");
    }
}
