//! The one simulated machine of this process.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use torch_uvm_sim::{
    Config, DeviceMemory, DevicePtr, Event, GraphExecId, GraphId, HostMemory, Machine, Profile, Stream,
};

use crate::context;
use crate::errors::code;
use crate::log;
use crate::outcome::Outcome;
use crate::process;

/// A stream, event, graph … as C sees it.
pub type Handle = *mut c_void;

/// What the simulated driver says it is: the first that has all of CUDA 13's entry points.
pub const DRIVER_VERSION: i32 = 13_000;

/// The file in which the simulated host's `/proc/meminfo` stands, for whoever asks how much host memory is left
/// (the allocator's `driver::host`).
const MEMINFO: &str = "TORCH_UVM_MEMINFO";

static MACHINE: OnceLock<Option<Machine>> = OnceLock::new();
/// The devices that `CUDA_VISIBLE_DEVICES` lets through, by their place in the machine: the program's ordinals count
/// these.
static VISIBLE: OnceLock<Vec<i32>> = OnceLock::new();
static MEMINFO_FILE: OnceLock<File> = OnceLock::new();
/// Whom to tell of the machine when there is one.
static STARTED: OnceLock<fn(&Machine)> = OnceLock::new();

/// The machine. Fails, as CUDA does, in a child forked after CUDA's first use, and where the environment describes no
/// machine that can be simulated.
pub fn machine() -> Outcome<&'static Machine> {
    if process::is_orphaned() {
        Err(code::NOT_INITIALIZED)?;
    }
    process::use_cuda();
    Ok(MACHINE.get_or_init(start).as_ref().ok_or(code::NO_DEVICE)?)
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
    // All devices are alike, so a machine of only the visible ones does.
    let visible = visible_devices(std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref(), config.devices);
    let count = i32::try_from(visible.len()).ok().filter(|count| *count > 0)?;
    let config = config.devices(count);
    let _ = VISIBLE.set(visible);
    log::line(&format!("simulating {} x {}", config.devices, config.profile.device_name));
    let machine = Machine::new(config);
    machine.on_host_memory_change(|memory| {
        if let Some(file) = MEMINFO_FILE.get() {
            // Nothing here can be done about a memfd that takes no write; the figures then stay as they were.
            let _ = write_meminfo(file, memory);
        }
    });
    if let Some(started) = STARTED.get() {
        started(&machine);
    }
    Some(machine)
}

/// What `CUDA_VISIBLE_DEVICES` says of a machine of `devices`: ordinals or beginnings of UUIDs (`GPU-…`), up to the first
/// that names no device.
fn visible_devices(list: Option<&str>, devices: i32) -> Vec<i32> {
    let Some(list) = list else {
        return (0..devices).collect();
    };
    let mut visible = Vec::new();
    for name in list.split(',').map(str::trim) {
        let wanted = match name.strip_prefix("GPU-") {
            Some(uuid) => (0..devices).find(|device| !uuid.is_empty() && uuid_text(*device).starts_with(uuid)),
            None => name.parse().ok().filter(|device| (0..devices).contains(device)),
        };
        match wanted {
            // CUDA takes a device named twice for a mistake, and shows none.
            Some(device) if visible.contains(&device) => return Vec::new(),
            Some(device) => visible.push(device),
            None => break,
        }
    }
    visible
}

fn uuid(device: i32) -> [u8; 16] {
    let mut uuid = *b"torch-uvm-sim\0\0\0";
    uuid[15] = device as u8;
    // Told apart by its first byte too, so that a short beginning of its text will do.
    uuid[0] = device as u8;
    uuid
}

/// The UUID of the device at a place in the machine, as `nvidia-smi -L` prints it, without `GPU-`.
pub fn uuid_text(place: i32) -> String {
    let mut text: String = uuid(place).iter().map(|byte| format!("{byte:02x}")).collect();
    for at in [20, 16, 12, 8] {
        text.insert(at, '-');
    }
    text
}

/// Always the same length, so that a reader never sees half of one text and half of another's length.
fn write_meminfo(file: &File, memory: HostMemory) -> io::Result<()> {
    let (total, available) = (memory.total >> 10, memory.available >> 10);
    let text = format!(
        "MemTotal:       {total:>14} kB\nMemFree:        {available:>14} kB\nMemAvailable:   {available:>14} kB\n"
    );
    file.write_all_at(text.as_bytes(), 0)
}

/// Has `started` called with the machine when there is one, and shows the host's memory to whoever looks for it. To be called when
/// the library is loaded, before any thread exists: afterwards the environment could not be changed safely.
pub fn prepare(started: fn(&Machine)) {
    let _ = STARTED.set(started);
    // SAFETY: a plain system call with a C string.
    let descriptor = unsafe { libc::memfd_create(c"torch-uvm-sim-meminfo".as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return;
    }
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

/// The PCI bus of the device at a place in the machine.
pub fn bus_at(place: i32) -> i32 {
    place + 1
}

/// Its PCI bus id.
pub fn bus_id_at(place: i32) -> String {
    format!("0000:{:02X}:00.0", bus_at(place))
}

/// The memory of the device at a place in the machine; `None` where this process does not use that device. Starts nothing.
pub fn memory_at(place: i32) -> Option<DeviceMemory> {
    if process::is_orphaned() {
        return None;
    }
    let device = VISIBLE.get()?.iter().position(|visible| *visible == place)?;
    let device = i32::try_from(device).ok().filter(|device| context::is_active(*device).is_ok_and(|active| active))?;
    MACHINE.get()?.as_ref()?.device_memory_now(device)
}

/// How many calls of this process planted faults have failed: for tests, which must see that theirs struck.
#[unsafe(no_mangle)]
pub extern "C" fn uvmsim_faults_hit() -> u64 {
    MACHINE.get().and_then(Option::as_ref).map_or(0, Machine::faults_hit)
}

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

/// The same, for whoever asks CUDA for its facts: that is a call of the engine's, which may be planted to fail.
pub fn described(device: i32) -> Outcome<Chip> {
    machine()?.device_info(device)?;
    chip(device)
}

impl Chip {
    /// Its place in the machine.
    fn place(&self) -> i32 {
        VISIBLE.get().and_then(|visible| visible.get(self.index as usize).copied()).unwrap_or(self.index)
    }

    pub fn uuid(&self) -> [u8; 16] {
        uuid(self.place())
    }

    pub fn pci_bus(&self) -> i32 {
        bus_at(self.place())
    }

    pub fn pci_bus_id(&self) -> String {
        bus_id_at(self.place())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_devices_are_those_before_the_first_unknown() {
        assert_eq!(visible_devices(None, 3), [0, 1, 2]);
        assert_eq!(visible_devices(Some("2, 0"), 3), [2, 0]);
        assert_eq!(visible_devices(Some("1,7,0"), 3), [1]);
        assert_eq!(visible_devices(Some("1,1"), 3), [0; 0]);
        assert_eq!(visible_devices(Some("GPU-01,GPU-00"), 3), [1, 0]);
        for none in ["", "32", "-1", "GPU-", "NoDevFiles"] {
            assert_eq!(visible_devices(Some(none), 3), [0; 0], "{none}");
        }
    }
}
