//! What the allocator tells of itself: `tracing` events, written to stderr where the environment asks for them.

use crate::error::{Error, Result};
use std::env;
use std::io::stderr;
use std::str::FromStr;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;

/// Says what is written: a level, or levels by module.
const VARIABLE: &str = "TORCH_UVM_LOG";

/// Starts writing, if the environment asks for it. Calling it again does nothing.
///
/// # Errors
/// [`Error::InvalidArgument`] for a value that is neither.
pub(super) fn start() -> Result<()> {
    let Some(wanted) = env::var(VARIABLE).ok().filter(|value| !value.trim().is_empty()) else { return Ok(()) };
    let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(stderr).with_filter(filter(&wanted)?);
    // An error is that it was started before.
    let _ = tracing_subscriber::registry().with(layer).try_init();
    Ok(())
}

/// What a value lets through. White space around levels and modules is dropped.
fn filter(wanted: &str) -> Result<Targets> {
    let items: Option<Vec<String>> = wanted.split(',').map(|item| directive(item.trim())).collect();
    items.and_then(|items| Targets::from_str(&items.join(",")).ok()).ok_or_else(|| {
        Error::InvalidArgument(format!(
            "{VARIABLE}: '{wanted}' is not allowed: expected off, error, warn, info, debug or trace, or levels by module as in \
             warn,torch_uvm::device=debug"
        ))
    })
}

/// A level, or a module's level, in the words of [`Targets`]; `None` for anything else. `Targets` itself would take nothing
/// for the level `error`, and a word that is no level for a module whose events all pass.
fn directive(item: &str) -> Option<String> {
    let level = |word: &str| LevelFilter::from_str(word).ok().filter(|_| !word.is_empty());
    match item.split_once('=') {
        None => level(item).map(|level| level.to_string()),
        Some((module, word)) => {
            let module = Some(module.trim_end()).filter(|module| !module.is_empty())?;
            level(word.trim_start()).map(|level| format!("{module}={level}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn levels_and_modules_are_understood() {
        let all = filter("debug").unwrap();
        assert!(all.would_enable("torch_uvm::device", &Level::DEBUG));
        assert!(!all.would_enable("torch_uvm::device", &Level::TRACE));
        for wanted in ["warn, torch_uvm::device=debug", " torch_uvm::device = debug ,\twarn\n"] {
            let some = filter(wanted).unwrap();
            assert!(some.would_enable("torch_uvm::device::places", &Level::DEBUG), "{wanted}");
            assert!(some.would_enable("torch_uvm::bridge", &Level::WARN), "{wanted}");
            assert!(!some.would_enable("torch_uvm::bridge", &Level::INFO), "{wanted}");
        }
        assert!(!filter("off").unwrap().would_enable("torch_uvm", &Level::ERROR));
    }

    #[test]
    fn what_is_no_level_is_refused() {
        for bad in ["verbose", "torch_uvm=loud", "torch_uvm=", "=debug", "debug,,", ",debug", ","] {
            let error = filter(bad).unwrap_err().to_string();
            assert!(error.contains(VARIABLE) && error.contains(bad), "{error}");
        }
    }
}
