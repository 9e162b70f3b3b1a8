//! Where what a command says goes: to the terminal, or, for steps that run beside others, each to a log of its own.

use std::cell::RefCell;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result};

use crate::paths::shown;

thread_local! {
    static LOG: RefCell<Option<File>> = const { RefCell::new(None) };
}

/// Says a line.
pub fn say(text: impl Display) {
    LOG.with_borrow_mut(|log| match log {
        // A log that cannot be written must not fail what it tells of.
        Some(log) => drop(writeln!(log, "{text}")),
        None => eprintln!("{text}"),
    });
}

/// For a program's output, which goes where this thread's goes.
pub fn stdio() -> Stdio {
    LOG.with_borrow(|log| match log.as_ref().map(File::try_clone) {
        Some(Ok(log)) => log.into(),
        _ => Stdio::inherit(),
    })
}

/// Runs `body` with all that this thread says going to `log`.
pub fn to_log<T>(log: &Path, body: impl FnOnce() -> T) -> Result<T> {
    /// Puts back what was there, also after a panic.
    struct Back(Option<File>);
    impl Drop for Back {
        fn drop(&mut self) {
            LOG.set(self.0.take());
        }
    }
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", shown(folder)))?;
    }
    let file = File::create(log).with_context(|| format!("cannot write {}", shown(log)))?;
    let _back = Back(LOG.replace(Some(file)));
    Ok(body())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn log_takes_lines_and_programs_of_its_thread() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("deep/er.log");
        to_log(&log, || {
            say("one");
            Command::new("echo").arg("two").stdout(stdio()).status().unwrap();
            std::thread::scope(|scope| scope.spawn(|| assert!(LOG.with_borrow(Option::is_none))).join().unwrap());
        })
        .unwrap();
        assert_eq!(fs::read_to_string(log).unwrap(), "one\ntwo\n");
        assert!(LOG.with_borrow(Option::is_none));
    }
}
