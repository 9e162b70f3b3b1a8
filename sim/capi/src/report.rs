//! What this process did on the machine, written for who started it: `python -m torch_uvm simulate`, and tests.
//!
//! `TORCH_UVM_SIM_REPORT` names a folder. Each process that uses CUDA writes a file `<process id>.json` there (`<id>-2.json` if
//! there is one already): one line, first when it begins, again whenever it has waited for a device, and at its end. A process
//! that ends without running its exit handlers (`_exit`, a signal) leaves the figures of the last time it waited, and
//! `"complete": false`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use torch_uvm_sim::Machine;
use torch_uvm_sim::report::text;

use crate::machine;

const VARIABLE: &str = "TORCH_UVM_SIM_REPORT";

struct Report {
    machine: Machine,
    /// A child that was forked has all of this too, and must not write.
    process: u32,
    /// What does not change: the process, and when it began.
    head: String,
    file: Mutex<File>,
}

static REPORT: OnceLock<Report> = OnceLock::new();

/// Begins to report, if it is wanted.
pub fn start(machine: &Machine) {
    let Some(folder) = std::env::var_os(VARIABLE).filter(|folder| !folder.is_empty()) else { return };
    let process = std::process::id();
    let file = match open(Path::new(&folder), process) {
        Ok(file) => Mutex::new(file),
        Err(error) => {
            eprintln!("torch-uvm-sim: {VARIABLE}={}: cannot write a report there: {error}", folder.display());
            return;
        }
    };
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let arguments = fs::read("/proc/self/cmdline").unwrap_or_default();
    let arguments = arguments.strip_suffix(b"\0").unwrap_or(&arguments).split(|byte| *byte == 0);
    let command: Vec<_> = arguments.map(|argument| text(&String::from_utf8_lossy(argument))).collect();
    let parent = std::os::unix::process::parent_id();
    let head = format!(
        "\"process\": {process}, \"parent\": {parent}, \"started\": {started}, \"command\": [{}]",
        command.join(", ")
    );
    if REPORT.set(Report { machine: machine.clone(), process, head, file }).is_ok() {
        write(false);
        // SAFETY: a plain function, in a library that is never unloaded: programs need it from their start.
        unsafe { libc::atexit(at_exit) };
    }
}

fn open(folder: &Path, process: u32) -> io::Result<File> {
    fs::create_dir_all(folder)?;
    let mut count = 1;
    loop {
        let name = if count == 1 { format!("{process}.json") } else { format!("{process}-{count}.json") };
        match OpenOptions::new().write(true).create_new(true).open(folder.join(name)) {
            // A program that became another one with `exec` keeps its process id.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => count += 1,
            other => return other,
        }
    }
}

/// After an entry point that succeeded: those that wait are the moments at which the figures are worth having.
pub fn after(entry_point: &str) {
    if REPORT.get().is_some()
        && matches!(
            entry_point,
            "cudaDeviceSynchronize"
                | "cudaStreamSynchronize"
                | "cudaEventSynchronize"
                | "cudaMemcpy"
                | "cudaFree"
                | "cuCtxSynchronize"
                | "cuStreamSynchronize"
                | "cuEventSynchronize"
                | "cuMemFree_v2"
        )
    {
        write(false);
    }
}

extern "C" fn at_exit() {
    if let Some(report) = REPORT.get()
        && report.process == std::process::id()
    {
        // What is queued still counts: on a real device it would have run by now.
        report.machine.run_down();
        write(true);
    }
}

fn write(complete: bool) {
    let Some(report) = REPORT.get() else { return };
    if machine::is_orphaned() || report.process != std::process::id() {
        return;
    }
    let line = format!("{{{}, \"complete\": {complete}, {}}}\n", report.head, report.machine.report().json_members());
    let file = report.file.lock().unwrap_or_else(PoisonError::into_inner);
    // One write, and readers take the first line only: a process that is ended in between leaves nothing half written. A
    // report that cannot be written must not fail the program.
    let _ = file.write_all_at(line.as_bytes(), 0);
}
