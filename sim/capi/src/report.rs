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

use serde::Serialize;
use torch_uvm_sim::Machine;

use crate::process;

const VARIABLE: &str = "TORCH_UVM_SIM_REPORT";

struct Report {
    machine: Machine,
    head: Head,
    file: Mutex<File>,
}

/// What does not change: the process, and when it began.
#[derive(Serialize)]
struct Head {
    process: u32,
    parent: u32,
    /// In nanoseconds since 1970.
    started: u64,
    command: Vec<String>,
}

/// One report.
#[derive(Serialize)]
struct Line<'a, R> {
    #[serde(flatten)]
    head: &'a Head,
    complete: bool,
    #[serde(flatten)]
    machine: R,
}

impl Report {
    /// Whether it is this process's. A child that was forked has all of it too, and must not write.
    fn is_own(&self) -> bool {
        self.head.process == std::process::id()
    }
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
    let started = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX));
    let arguments = fs::read("/proc/self/cmdline").unwrap_or_default();
    let arguments = arguments.strip_suffix(b"\0").unwrap_or(&arguments).split(|byte| *byte == 0);
    let command = arguments.map(|argument| String::from_utf8_lossy(argument).into_owned()).collect();
    let head = Head { process, parent: std::os::unix::process::parent_id(), started, command };
    if REPORT.set(Report { machine: machine.clone(), head, file }).is_ok() {
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
        && report.is_own()
    {
        // What is queued still counts: on a real device it would have run by now.
        report.machine.run_down();
        write(true);
    }
}

fn write(complete: bool) {
    let Some(report) = REPORT.get() else { return };
    if process::is_orphaned() || !report.is_own() {
        return;
    }
    let line = Line { head: &report.head, complete, machine: report.machine.report().json() };
    let Ok(mut line) = serde_json::to_vec(&line) else { return };
    line.push(b'\n');
    let file = report.file.lock().unwrap_or_else(PoisonError::into_inner);
    // One write, and readers take the first line only: a process that is ended in between leaves nothing half written. A
    // report that cannot be written must not fail the program.
    let _ = file.write_all_at(&line, 0);
}
