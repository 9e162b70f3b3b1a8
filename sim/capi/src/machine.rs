//! The one simulated machine of this process.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use torch_uvm_sim::{Config, DevicePtr, Event, GraphExecId, GraphId, HostMemory, Machine, Profile, Stream};

use crate::entry::Outcome;
use crate::errors::code;
use crate::log;

/// A stream, event, graph … as C sees it.
pub type Handle = *mut c_void;

/// What the simulated driver says it is: the first that has all of CUDA 13's entry points.
pub const DRIVER_VERSION: i32 = 13_000;

/// The file in which the simulated host's `/proc/meminfo` stands, for whoever asks how much host memory is left
/// (the allocator's `driver::host`).
const MEMINFO: &str = "TORCH_UVM_MEMINFO";

static MACHINE: OnceLock<Option<Machine>> = OnceLock::new();
static MEMINFO_FILE: OnceLock<File> = OnceLock::new();
/// Whether this process has used the machine; and whether it is a child, forked by one that had.
static USED: AtomicBool = AtomicBool::new(false);
static ORPHANED: AtomicBool = AtomicBool::new(false);

/// The machine. Fails, as CUDA does, in a child forked after CUDA's first use, and where the environment describes no
/// machine that can be simulated.
pub fn machine() -> Outcome<&'static Machine> {
    if ORPHANED.load(Relaxed) {
        Err(code::NOT_INITIALIZED)?;
    }
    USED.store(true, Relaxed);
    Ok(MACHINE.get_or_init(start).as_ref().ok_or(code::NO_DEVICE)?)
}

/// Whether CUDA is initialised in this process.
pub fn is_used() -> bool {
    USED.load(Relaxed)
}

fn start() -> Option<Machine> {
    let config = match Config::from_env() {
        Ok(config) => config,
        Err(error) => {
            // Said aloud, log or no log: otherwise the program just finds no GPU.
            eprintln!("torch-uvm-sim: {error}");
            return None;
        }
    };
    log::line(&format!("simulating {} x {}", config.devices, config.profile.device_name));
    let machine = Machine::new(config);
    machine.on_host_memory_change(|memory| {
        if let Some(file) = MEMINFO_FILE.get() {
            // Nothing here can be done about a memfd that takes no write; the figures then stay as they were.
            let _ = write_meminfo(file, memory);
        }
    });
    Some(machine)
}

/// Always the same length, so that a reader never sees half of one text and half of another's length.
fn write_meminfo(file: &File, memory: HostMemory) -> io::Result<()> {
    let (total, available) = (memory.total >> 10, memory.available >> 10);
    let text = format!(
        "MemTotal:       {total:>14} kB\nMemFree:        {available:>14} kB\nMemAvailable:   {available:>14} kB\n"
    );
    file.write_all_at(text.as_bytes(), 0)
}

/// Runs when the library is loaded, before any thread exists: afterwards the environment could not be changed safely.
extern "C" fn on_load() {
    // SAFETY: a plain system call with a C string.
    let descriptor = unsafe { libc::memfd_create(c"torch-uvm-sim-meminfo".as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor >= 0 {
        // SAFETY: the descriptor is new and ours alone.
        let file = unsafe { File::from_raw_fd(descriptor) };
        if let Ok(config) = Config::from_env() {
            let host = config.profile.host_memory;
            if write_meminfo(&file, HostMemory { total: host, available: host }).is_ok() {
                // SAFETY: library constructors run before `main` and before other threads.
                unsafe { std::env::set_var(MEMINFO, format!("/proc/self/fd/{}", file.as_raw_fd())) };
                let _ = MEMINFO_FILE.set(file);
            }
        }
    }
    extern "C" fn in_child() {
        // The engine's threads did not come along, and its locks may be held for ever.
        if USED.load(Relaxed) {
            ORPHANED.store(true, Relaxed);
        }
    }
    // SAFETY: the handler only touches atomics, which is allowed after fork.
    unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
}

#[used]
#[unsafe(link_section = ".init_array")]
static ON_LOAD: extern "C" fn() = on_load;

/// One device's constant facts.
#[derive(Clone, Copy)]
pub struct Chip {
    pub profile: &'static Profile,
    index: i32,
}

/// The device of that ordinal.
pub fn chip(device: i32) -> Outcome<Chip> {
    let machine = machine()?;
    if !(0..machine.config().devices).contains(&device) {
        Err(code::INVALID_DEVICE)?;
    }
    Ok(Chip { profile: machine.profile(), index: device })
}

impl Chip {
    pub fn uuid(&self) -> [u8; 16] {
        let mut uuid = *b"torch-uvm-sim\0\0\0";
        uuid[15] = self.index as u8;
        uuid
    }

    pub fn pci_bus(&self) -> i32 {
        self.index + 1
    }

    pub fn pci_bus_id(&self) -> String {
        format!("0000:{:02X}:00.0", self.pci_bus())
    }
}

/// The engine's handles are numbers that are no addresses: C only passes them back.
pub fn stream(handle: Handle) -> Stream {
    Stream(handle as u64)
}

pub fn event(handle: Handle) -> Event {
    Event(handle as u64)
}

pub fn graph(handle: Handle) -> GraphId {
    GraphId(handle as u64)
}

pub fn exec(handle: Handle) -> GraphExecId {
    GraphExecId(handle as u64)
}

pub fn device_ptr<T>(pointer: *const T) -> DevicePtr {
    DevicePtr(pointer as u64)
}
