//! What the simulator has to say, where `TORCH_UVM_SIM_LOG` sends it: a file, or `stderr`. Unset: nowhere.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::{LazyLock, Mutex, PoisonError};

enum Sink {
    Nowhere,
    Stderr,
    File(Mutex<File>),
}

static SINK: LazyLock<Sink> = LazyLock::new(|| {
    let Some(target) = std::env::var_os("TORCH_UVM_SIM_LOG").filter(|target| !target.is_empty()) else {
        return Sink::Nowhere;
    };
    if target == "stderr" {
        return Sink::Stderr;
    }
    match OpenOptions::new().create(true).append(true).open(&target) {
        Ok(file) => Sink::File(Mutex::new(file)),
        Err(error) => {
            eprintln!("torch-uvm-sim: cannot open TORCH_UVM_SIM_LOG={}: {error}; using stderr", target.display());
            Sink::Stderr
        }
    }
});

/// Writes one line, with the process's id before it: several processes may share a file.
pub fn line(text: &str) {
    let text = format!("torch-uvm-sim[{}]: {text}\n", std::process::id());
    // A log that cannot be written must not fail the program that runs on the simulator.
    let _ = match &*SINK {
        Sink::Nowhere => Ok(()),
        Sink::Stderr => std::io::stderr().write_all(text.as_bytes()),
        Sink::File(file) => file.lock().unwrap_or_else(PoisonError::into_inner).write_all(text.as_bytes()),
    };
}

/// Writes the line the first time only.
pub fn once(text: &str) {
    static SAID: LazyLock<Mutex<HashSet<String>>> = LazyLock::new(Mutex::default);
    if matches!(*SINK, Sink::Nowhere) {
        return;
    }
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(text.to_owned()) {
        line(text);
    }
}
