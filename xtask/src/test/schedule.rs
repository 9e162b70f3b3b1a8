//! Runs steps beside each other where one waits for the network or uses one core only, and says how each went.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use super::counts::Counts;
use crate::output;
use crate::paths::{self, shown};
use crate::step::seconds;

/// A step: makes something, checks something, or runs tests.
pub struct Task<'a> {
    pub name: String,
    /// The steps whose results it needs. Without one of them it does not run, and counts as failed.
    pub after: Vec<String>,
    /// How many cores it keeps busy; 0 where it mostly waits for the network.
    pub cores: usize,
    pub body: Box<dyn FnOnce() -> Result<Counts> + Send + 'a>,
}

/// How a step went.
pub struct Outcome {
    pub name: String,
    pub took: Duration,
    /// What of its tests passed: a step that failed has at least one that did not.
    pub counts: Counts,
    pub error: Option<String>,
}

impl Outcome {
    /// `name: passed, 12 passed, 0 failed (3.1 s)`.
    pub fn line(&self) -> String {
        let took = seconds(self.took);
        let what = match &self.error {
            Some(error) => format!("FAILED: {error}"),
            None if self.counts == Counts::default() => "done".to_owned(),
            None => self.counts.to_string(),
        };
        format!("{:24} {took:>12}  {what}", self.name)
    }
}

/// Where a step that runs beside others writes.
pub fn log(name: &str) -> PathBuf {
    paths::test_logs().join(format!("{}.log", name.replace(": ", "-").replace([' ', '/'], "-")))
}

/// Runs the steps, each as soon as those that it needs are done and `cores` are enough, in the order of the list. With
/// `apart`, what they say goes to logs, and only what failed is shown. The outcomes are in the order in which they ended.
pub fn run(tasks: Vec<Task>, cores: usize, apart: bool) -> Vec<Outcome> {
    let (sender, receiver) = mpsc::channel();
    let mut waiting = tasks;
    let mut running: BTreeMap<String, usize> = BTreeMap::new();
    let mut ended: Vec<Outcome> = Vec::new();
    thread::scope(|scope| {
        while !waiting.is_empty() || !running.is_empty() {
            let mut left = Vec::new();
            for task in waiting.drain(..) {
                let state = |name: &String| ended.iter().find(|outcome| outcome.name == *name);
                if let Some(missing) = task.after.iter().find(|name| state(name).is_some_and(|o| o.error.is_some())) {
                    let error = Some(format!("not run: it needs «{missing}»"));
                    ended.push(finished(task.name, Duration::ZERO, Counts::FAILED, error));
                    continue;
                }
                let busy: usize = running.values().sum();
                let ready = task.after.iter().all(|name| state(name).is_some());
                let room = task.cores == 0 || busy == 0 || busy + task.cores <= cores;
                if !(ready && room && (apart || running.is_empty())) {
                    left.push(task);
                    continue;
                }
                running.insert(task.name.clone(), task.cores);
                output::say(format_args!("==> test: {} …", task.name));
                let sender = sender.clone();
                scope.spawn(move || {
                    let started = Instant::now();
                    let name = task.name;
                    let guarded = || catch_unwind(AssertUnwindSafe(task.body)).unwrap_or_else(|_| bail!("it panicked"));
                    let result =
                        if apart { output::to_log(&log(&name), guarded).unwrap_or_else(Err) } else { guarded() };
                    // The receiver lives until all have ended.
                    drop(sender.send((name, started.elapsed(), result)));
                });
            }
            waiting = left;
            if running.is_empty() {
                // What is left needs steps that were not asked for, or each other: a mistake in the list.
                for task in waiting.drain(..) {
                    let error = Some(format!("not run: it needs {}", task.after.join(", ")));
                    ended.push(finished(task.name, Duration::ZERO, Counts::FAILED, error));
                }
                continue;
            }
            let Ok((name, took, result)) = receiver.recv() else { break };
            running.remove(&name);
            let (counts, error) = judged(result);
            if apart && error.is_some() {
                show(&name);
            }
            ended.push(finished(name, took, counts, error));
        }
    });
    ended
}

/// A step's counts; what went wrong beside failing tests counts as one more.
fn judged(result: Result<Counts>) -> (Counts, Option<String>) {
    match result {
        Ok(counts) if counts.failed == 0 => (counts, None),
        Ok(counts) => (counts, Some(format!("{counts}"))),
        Err(error) => {
            let counted = error.downcast_ref::<Counted>().map(|counted| counted.0);
            (counted.filter(|counts| counts.failed > 0).unwrap_or(Counts::FAILED), Some(format!("{error:#}")))
        }
    }
}

/// Goes with an error: the tests that were counted before it.
#[derive(Debug)]
pub struct Counted(pub Counts);

impl std::fmt::Display for Counted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Counted {}

fn finished(name: String, took: Duration, counts: Counts, error: Option<String>) -> Outcome {
    let outcome = Outcome { name, took, counts, error };
    output::say(format_args!("    {}", outcome.line()));
    outcome
}

/// Shows the end of a step's log.
fn show(name: &str) {
    const LINES: usize = 400;
    let log = log(name);
    let text = fs::read(&log).unwrap_or_else(|error| anyhow!("cannot be read: {error}").to_string().into_bytes());
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    output::say(format_args!("--- {}", shown(&log)));
    for line in &lines[lines.len().saturating_sub(LINES)..] {
        output::say(line);
    }
    output::say("---");
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn task<'a>(
        name: &str,
        after: &[&str],
        cores: usize,
        body: impl FnOnce() -> Result<Counts> + Send + 'a,
    ) -> Task<'a> {
        let after = after.iter().map(|name| name.to_string()).collect();
        Task { name: name.into(), after, cores, body: Box::new(body) }
    }

    #[test]
    fn steps_wait_for_what_they_need() {
        let seen = Mutex::new(Vec::new());
        let note = |name: &'static str| {
            let seen = &seen;
            move || {
                seen.lock().unwrap().push(name);
                Ok(Counts::PASSED)
            }
        };
        let tasks =
            vec![task("c", &["b", "a"], 1, note("c")), task("b", &["a"], 1, note("b")), task("a", &[], 9, note("a"))];
        let ended = run(tasks, 2, false);
        assert_eq!(*seen.lock().unwrap(), ["a", "b", "c"]);
        assert!(ended.iter().all(|outcome| outcome.error.is_none()));
    }

    #[test]
    fn what_needs_a_failed_step_fails_and_the_rest_runs() {
        let counts = Counts { passed: 3, failed: 2, skipped: 0 };
        let tasks = vec![
            task("broken", &[], 1, || bail!("no luck")),
            task("needs it", &["broken"], 1, || unreachable!()),
            task("red", &[], 1, || Ok(Counts { passed: 3, failed: 2, skipped: 0 })),
            task("died", &[], 1, || {
                Err(anyhow!("status 1").context(Counted(Counts { passed: 7, failed: 1, skipped: 0 })))
            }),
            task("panics", &[], 1, || panic!("as it should in this test")),
            task("fine", &[], 0, || Ok(Counts::default())),
            task("lost", &["nobody"], 1, || unreachable!()),
        ];
        let ended = run(tasks, 2, false);
        let of = |name: &str| ended.iter().find(|outcome| outcome.name == name).unwrap();
        assert_eq!((of("broken").counts, of("broken").error.as_deref()), (Counts::FAILED, Some("no luck")));
        assert!(of("needs it").error.as_ref().unwrap().contains("«broken»"));
        assert_eq!((of("red").counts, of("red").error.is_some()), (counts, true));
        assert_eq!(of("died").counts.passed, 7);
        assert_eq!(of("panics").counts, Counts::FAILED);
        assert!(of("fine").line().contains("done"), "{}", of("fine").line());
        assert!(of("lost").error.as_ref().unwrap().contains("nobody"));
    }
}
