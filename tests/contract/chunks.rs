//! Physical chunks, the addresses they are mapped at, and who may use them.

use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::Instant;

use torch_uvm::driver::{CaptureMode, Chunk, DeviceIndex, DevicePtr, Driver, ErrorKind, Location, Range, Result};

use super::machine::{DEVICE, MIB, Machine, MachineExt};

const ON_DEVICE: Location = Location::Device(DEVICE);

/// The most memory that one of these tests holds at a place. One test runs at a time on a GPU.
const BUDGET: u64 = 256 * MIB;

/// Set for a test's other process, which imports its standard input.
const OTHER_PROCESS: &str = "TORCH_UVM_CONTRACT_OTHER_PROCESS";

/// Where chunks can lie on this machine.
fn places(machine: &dyn Machine) -> Vec<Location> {
    let info = machine.driver().device_info(DEVICE).unwrap();
    let host = info.host_chunk_location();
    if host.is_none() {
        println!("no chunks of host memory here");
    }
    info.chunks.then_some(ON_DEVICE).into_iter().chain(host).collect()
}

/// Addresses that go back at the end, with all that is mapped there.
struct Reserved<'a> {
    driver: &'a dyn Driver,
    range: Range,
    mapped: Vec<Range>,
}

impl<'a> Reserved<'a> {
    fn new(machine: &'a dyn Machine, bytes: u64) -> Self {
        let driver = machine.driver();
        let range = Range { ptr: driver.address_reserve(bytes, 0).unwrap(), bytes };
        Self { driver, range, mapped: Vec::new() }
    }

    /// The part of it from `offset` on.
    fn part(&self, offset: u64, bytes: u64) -> Range {
        assert!(offset + bytes <= self.range.bytes);
        Range { ptr: self.range.ptr.offset(offset), bytes }
    }

    /// Maps a chunk at an offset, for the device to use.
    fn map(&mut self, offset: u64, bytes: u64, chunk: Chunk) -> Range {
        let range = self.part(offset, bytes);
        self.driver.chunk_map(range, chunk).unwrap();
        self.mapped.push(range);
        self.driver.set_access(range, &[ON_DEVICE]).unwrap();
        range
    }

    fn unmap(&mut self, range: Range) {
        self.driver.chunk_unmap(range).unwrap();
        self.mapped.retain(|mapped| mapped.ptr < range.ptr || mapped.ptr >= range.ptr.offset(range.bytes));
    }

    /// Creates a chunk that goes with its mapping, and maps it.
    fn fill(&mut self, at: Location, offset: u64, bytes: u64) -> Range {
        assert!(bytes <= BUDGET);
        let chunk = self.driver.chunk_create(at, bytes, false).unwrap();
        let range = self.map(offset, bytes, chunk);
        self.driver.chunk_release(chunk).unwrap();
        range
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        for range in &self.mapped {
            let unmapped = self.driver.chunk_unmap(*range);
            assert!(std::thread::panicking() || unmapped.is_ok(), "{unmapped:?}");
        }
        let freed = self.driver.address_free(self.range);
        assert!(std::thread::panicking() || freed.is_ok(), "{freed:?}");
    }
}

/// A result as the tables show it.
fn told<T>(result: &Result<T>) -> String {
    result.as_ref().map_or_else(|error| format!("{} ({})", error.name, error.code), |_| "ok".to_owned())
}

/// The device says what it has, and the granularity is what the allocator builds on.
pub fn chunks_are_described(machine: &dyn Machine) {
    let driver = machine.driver();
    let info = driver.device_info(DEVICE).unwrap();
    println!("chunks {}, of host memory {}, shareable {}", info.chunks, info.host_chunks, info.shareable_chunks);
    assert!(info.chunks && info.shareable_chunks, "every device since Pascal on Linux");
    for at in places(machine) {
        let granularity = driver.chunk_granularity(at).unwrap();
        println!("{at:?}: granularity {granularity}");
        assert_eq!(2 * MIB % granularity, 0);
    }
    let host = driver.chunk_create(Location::Host, 2 * MIB, true);
    assert_eq!(host.unwrap_err().kind, ErrorKind::InvalidValue, "host memory without a node");
    if !info.host_chunks {
        let refused = driver.chunk_create(Location::HostNuma(0), 2 * MIB, true);
        assert_eq!(refused.unwrap_err().kind, ErrorKind::NotSupported);
    }
}

/// Reserved addresses are disjoint and aligned, and hold nothing.
pub fn addresses_hold_nothing(machine: &dyn Machine) {
    let driver = machine.driver();
    let before = driver.device_memory(DEVICE).unwrap().free;
    let large = Reserved::new(machine, 64 << 30);
    let [first, second] = [4 * MIB, 2 * MIB].map(|bytes| Reserved::new(machine, bytes));
    for reserved in [&large, &first, &second] {
        assert_eq!(reserved.range.ptr.0 % (2 * MIB), 0, "{:?}", reserved.range);
    }
    let end = |reserved: &Reserved| reserved.range.ptr.offset(reserved.range.bytes);
    assert!(end(&first) <= second.range.ptr || end(&second) <= first.range.ptr);
    assert_eq!(driver.device_memory(DEVICE).unwrap().free, before);
    for alignment in [2 * MIB, 32 * MIB, 1 << 30] {
        let ptr = driver.address_reserve(4 * MIB, alignment).unwrap();
        assert_eq!(ptr.0 % alignment, 0, "{ptr:?}");
        driver.address_free(Range { ptr, bytes: 4 * MIB }).unwrap();
    }
}

/// Chunks of both places are written and read by copies, memsets, kernels and across their seams.
pub fn chunks_hold_bytes(machine: &dyn Machine) {
    for at in places(machine) {
        let mut reserved = Reserved::new(machine, 16 * MIB);
        reserved.fill(at, 0, 6 * MIB);
        reserved.fill(ON_DEVICE, 6 * MIB, 4 * MIB);
        let whole = reserved.part(0, 10 * MIB);
        let pattern = machine.pattern(whole.bytes, 3);
        machine.write(whole.ptr, &pattern);
        machine.assert_bytes(whole.ptr, &pattern, &format!("written over two chunks, {at:?}"));
        machine.copy(whole.ptr, whole.ptr.offset(5 * MIB), 5 * MIB);
        machine.assert_bytes(whole.ptr, &pattern[5 * MIB as usize..], "copied over the seam");
        machine.set(whole.ptr.offset(MIB), 7, 6 * MIB);
        machine.assert_bytes(whole.ptr.offset(MIB), &[7; 6 * MIB as usize], "set over the seam");
        // 1 added to each word of 0x07070707.
        let computed = machine.add_one(whole.ptr.offset(MIB), 6 * MIB as u32 / 4);
        println!("{at:?}: kernels compute: {computed}");
        if computed {
            let expected = [8, 7, 7, 7].repeat(6 * MIB as usize / 4);
            machine.assert_bytes(whole.ptr.offset(MIB), &expected, "computed by a kernel");
        }
    }
}

/// What programs ask about pointers. Triton asks for DEVICE_POINTER and launches nothing where it is refused.
pub fn pointers_are_told(machine: &dyn Machine) {
    let driver = machine.driver();
    let told_of = |what: &str, ptr: DevicePtr| {
        for (name, value) in machine.pointer_attributes(ptr) {
            println!(
                "{what}: {name} = {}",
                value.as_ref().map_or_else(|error| told(&Err::<(), _>(error.clone())), i64::to_string)
            );
            if name == "DEVICE_POINTER" {
                assert_eq!(value.ok(), Some(ptr.0 as i64), "{what}");
            }
        }
    };
    for at in places(machine) {
        let mut reserved = Reserved::new(machine, 4 * MIB);
        let range = reserved.fill(at, 0, 4 * MIB);
        told_of(&format!("a chunk at {at:?}"), range.ptr.offset(100));
    }
    let plain = driver.alloc_device(DEVICE, 4 * MIB).unwrap();
    told_of("memory of cuMemAlloc", plain.offset(100));
    machine.free(plain);
    let managed = machine.managed(4 * MIB);
    told_of("managed memory", managed.ptr.offset(100));
    machine.free(managed.ptr);
}

/// The device's free figure falls by a chunk's size when it is created, and rises when it is gone; the host's likewise.
pub fn figures_are_exact(machine: &dyn Machine) {
    let driver = machine.driver();
    // The first use of a device costs it memory of its own.
    Reserved::new(machine, 2 * MIB).fill(ON_DEVICE, 0, 2 * MIB);
    let device = || driver.device_memory(DEVICE).unwrap().free;
    let host = || driver.host_memory().unwrap().available;
    let integrated = driver.device_info(DEVICE).unwrap().integrated;
    for at in places(machine) {
        let (on_device, in_host, bytes) = (device(), host(), 16 * MIB);
        let chunk = driver.chunk_create(at, bytes, false).unwrap();
        println!(
            "{at:?}: {bytes} bytes take {} of the device and {} of the host",
            on_device - device(),
            in_host as i64 - host() as i64
        );
        if at == ON_DEVICE {
            assert_eq!(on_device - device(), bytes);
        } else if !machine.is_real() {
            assert_eq!(in_host - host(), bytes);
            assert!(integrated || device() == on_device);
        }
        // Mapped and released, it is there; unmapped, it is gone.
        let mut reserved = Reserved::new(machine, bytes);
        let range = reserved.map(0, bytes, chunk);
        driver.chunk_release(chunk).unwrap();
        machine.set(range.ptr, 1, bytes);
        machine.assert_bytes(range.ptr.offset(bytes - 4), &[1; 4], "released, and mapped");
        assert!(at != ON_DEVICE || on_device - device() == bytes);
        reserved.unmap(range);
        if !machine.is_real() || at == ON_DEVICE {
            assert_eq!(device(), on_device, "{at:?}: unmapped after the release");
        }
        assert!(machine.is_real() || host() == in_host);
        // Never mapped, it is gone at its release.
        let chunk = driver.chunk_create(at, bytes, false).unwrap();
        driver.chunk_release(chunk).unwrap();
        assert!((machine.is_real() && at != ON_DEVICE) || device() == on_device, "{at:?}: released unmapped");
    }
    let refused = driver.chunk_create(ON_DEVICE, 1 << 50, false);
    println!("a chunk of 2^50 bytes: {}", told(&refused));
    let kind = refused.unwrap_err().kind;
    assert!(machine.is_real() || kind == ErrorKind::OutOfMemory, "{kind:?}");
}

/// Bytes belong to the chunk: they are the same at each address at which it is mapped, and after it was mapped nowhere.
pub fn bytes_belong_to_the_chunk(machine: &dyn Machine) {
    let driver = machine.driver();
    for (seed, at) in (1..).zip(places(machine)) {
        let chunk = driver.chunk_create(at, 4 * MIB, false).unwrap();
        let pattern = machine.pattern(4 * MIB, seed);
        let (mut here, mut there) = (Reserved::new(machine, 4 * MIB), Reserved::new(machine, 8 * MIB));
        let first = here.map(0, 4 * MIB, chunk);
        machine.write(first.ptr, &pattern);
        let second = there.map(2 * MIB, 4 * MIB, chunk);
        machine.assert_bytes(second.ptr, &pattern, "mapped twice");
        machine.write(second.ptr, &[9; 100]);
        machine.assert_bytes(first.ptr, &[9; 100], "written by the other address");
        here.unmap(first);
        machine.assert_bytes(second.ptr.offset(100), &pattern[100..], "unmapped at one address");
        there.unmap(second);
        let again = there.map(0, 4 * MIB, chunk);
        machine.assert_bytes(again.ptr.offset(100), &pattern[100..], "mapped nowhere for a while");
        driver.chunk_release(chunk).unwrap();
    }
}

/// A chunk's place changes under a fixed address, both ways, with its neighbours in use.
pub fn contents_move_under_a_fixed_address(machine: &dyn Machine) {
    let driver = machine.driver();
    let places = places(machine);
    let bytes = 8 * MIB;
    let (mut segment, mut aside) = (Reserved::new(machine, 3 * bytes), Reserved::new(machine, bytes));
    for part in 0..3 {
        segment.fill(ON_DEVICE, part * bytes, bytes);
    }
    let pattern = machine.pattern(3 * bytes, 8);
    machine.write(segment.range.ptr, &pattern);
    let middle = segment.part(bytes, bytes);
    for &to in places.iter().rev().chain(&places) {
        let chunk = driver.chunk_create(to, bytes, false).unwrap();
        let alias = aside.map(0, bytes, chunk);
        machine.copy(alias.ptr, middle.ptr, bytes);
        segment.unmap(middle);
        segment.map(bytes, bytes, chunk);
        aside.unmap(alias);
        driver.chunk_release(chunk).unwrap();
        machine.assert_bytes(segment.range.ptr, &pattern, &format!("moved to {to:?}"));
    }
}

/// A call on the addresses of a segment of three chunks of 4 MiB and 4 MiB without one, and on a chunk that is not mapped.
type Call = fn(&dyn Driver, Range, Chunk) -> Result<()>;

/// How well it is known that a GPU refuses.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    /// The manual says so.
    Manual,
    /// It is not known, and tried.
    Unknown,
    /// It is not known, and not tried: a success would leave something behind.
    Untried,
}

/// What is refused. All are `CUDA_ERROR_INVALID_VALUE` on a simulated machine.
const REFUSED: &[(&str, Known, Call)] = &[
    ("unmapping a part of a chunk", Known::Manual, |d, r, _| d.chunk_unmap(part(r, 0, 2))),
    ("unmapping from a chunk's middle", Known::Manual, |d, r, _| d.chunk_unmap(part(r, 2, 2))),
    ("unmapping a chunk and a part of the next", Known::Manual, |d, r, _| d.chunk_unmap(part(r, 0, 6))),
    ("unmapping where nothing is mapped", Known::Unknown, |d, r, _| d.chunk_unmap(part(r, 12, 4))),
    ("unmapping 0 bytes", Known::Unknown, |d, r, _| d.chunk_unmap(part(r, 0, 0))),
    ("mapping where something is mapped", Known::Manual, |d, r, chunk| d.chunk_map(part(r, 4, 4), chunk)),
    ("mapping partly where something is mapped", Known::Manual, |d, r, chunk| d.chunk_map(part(r, 10, 4), chunk)),
    // An H200 maps it, whoever has the addresses behind.
    ("mapping beyond the reservation", Known::Untried, |d, r, chunk| d.chunk_map(part(r, 14, 4), chunk)),
    ("mapping more than the chunk", Known::Manual, |d, r, chunk| d.chunk_map(part(r, 12, 6), chunk)),
    ("mapping a part of the chunk", Known::Untried, |d, r, chunk| d.chunk_map(part(r, 12, 2), chunk)),
    ("mapping beside the granularity", Known::Manual, |d, r, chunk| {
        d.chunk_map(Range { ptr: r.ptr.offset(12 * MIB + 4096), bytes: 4 * MIB }, chunk)
    }),
    ("access where nothing is mapped", Known::Manual, |d, r, _| d.set_access(part(r, 12, 4), &[ON_DEVICE])),
    ("access to more than is mapped", Known::Manual, |d, r, _| d.set_access(part(r, 8, 8), &[ON_DEVICE])),
    ("access for nobody", Known::Unknown, |d, r, _| d.set_access(part(r, 0, 4), &[])),
    ("access of the CPU to a chunk of the device", Known::Manual, |d, r, _| {
        d.set_access(part(r, 0, 4), &[Location::Host])
    }),
    ("freeing addresses where something is mapped", Known::Untried, |d, r, _| d.address_free(r)),
    ("freeing a part of a reservation", Known::Manual, |d, r, _| d.address_free(part(r, 0, 2))),
    ("reserving 0 bytes", Known::Unknown, |d, _, _| d.address_reserve(0, 0).map(drop)),
    ("an alignment that is no power of two", Known::Unknown, |d, _, _| d.address_reserve(2 * MIB, 3 * MIB).map(drop)),
    ("a chunk of 0 bytes", Known::Manual, |d, _, _| d.chunk_create(ON_DEVICE, 0, false).map(drop)),
    ("a chunk of 1 MiB and a byte", Known::Manual, |d, _, _| d.chunk_create(ON_DEVICE, MIB + 1, false).map(drop)),
    ("exporting what was not made for it", Known::Manual, |d, _, chunk| d.chunk_export(chunk).map(drop)),
    ("importing what is no chunk", Known::Manual, |d, _, _| {
        d.chunk_import(std::fs::File::open("/dev/null").unwrap().as_fd()).map(drop)
    }),
];

fn part(range: Range, from_mib: u64, mib: u64) -> Range {
    Range { ptr: range.ptr.offset(from_mib * MIB), bytes: mib * MIB }
}

/// What must not be is refused and changes nothing.
pub fn what_must_not_be_is_refused(machine: &dyn Machine) {
    let driver = machine.driver();
    let mut segment = Reserved::new(machine, 16 * MIB);
    for offset in [0, 4, 8] {
        segment.fill(ON_DEVICE, offset * MIB, 4 * MIB);
    }
    let pattern = machine.pattern(12 * MIB, 2);
    machine.write(segment.range.ptr, &pattern);
    let chunk = driver.chunk_create(ON_DEVICE, 4 * MIB, false).unwrap();
    let mut wrong = String::new();
    for &(name, known, call) in REFUSED {
        if machine.is_real() && known == Known::Untried {
            continue;
        }
        let before = driver.device_memory(DEVICE).unwrap().free;
        let result = call(driver, segment.range, chunk);
        println!("| {name} | {} |", told(&result));
        let right = match &result {
            Ok(()) => machine.is_real() && known == Known::Unknown,
            Err(error) => machine.is_real() || error.code == 1,
        };
        if !right {
            wrong += &format!("{name}: {}\n", told(&result));
        }
        if driver.device_memory(DEVICE).unwrap().free != before {
            wrong += &format!("{name}: the device's free memory changed\n");
        }
    }
    for (name, at, code) in [
        ("a chunk on device 99", Location::Device(99), 101),
        ("a chunk on device -1", Location::Device(-1), 101),
        ("a chunk on NUMA node 99", Location::HostNuma(99), 1),
    ] {
        if matches!(at, Location::HostNuma(_)) && places(machine).len() < 2 {
            continue;
        }
        let result = driver.chunk_create(at, 2 * MIB, false);
        println!("| {name} | {} |", told(&result));
        if result.is_ok() || (!machine.is_real() && result.as_ref().is_err_and(|error| error.code != code)) {
            wrong += &format!("{name}: {}\n", told(&result));
        }
    }
    driver.chunk_release(chunk).unwrap();
    assert!(wrong.is_empty(), "{wrong}");
    machine.assert_bytes(segment.range.ptr, &pattern, "after all that was refused");
    // Several whole mappings go at once.
    segment.unmap(segment.part(0, 8 * MIB));
    machine.assert_bytes(segment.range.ptr.offset(8 * MIB), &pattern[8 * MIB as usize..], "beside what was unmapped");
}

/// A new mapping can be used by nobody, whatever was at its addresses before.
pub fn access_is_given_anew(machine: &dyn Machine) {
    let driver = machine.driver();
    let mut segment = Reserved::new(machine, 8 * MIB);
    let range = segment.fill(ON_DEVICE, 0, 4 * MIB);
    machine.set(range.ptr, 1, range.bytes);
    segment.unmap(range);
    let chunk = driver.chunk_create(ON_DEVICE, 4 * MIB, false).unwrap();
    driver.chunk_map(range, chunk).unwrap();
    // Not on a real GPU: whether it ends the context is not known.
    if !machine.is_real() {
        assert!(machine.try_write(range.ptr, &[1]).is_err(), "no access was given");
    }
    driver.set_access(range, &[ON_DEVICE]).unwrap();
    driver.set_access(range, &[ON_DEVICE]).unwrap();
    machine.write(range.ptr, &[1]);
    segment.mapped.push(range);
    driver.chunk_release(chunk).unwrap();
    // One call for two chunks.
    let other = segment.fill(ON_DEVICE, 4 * MIB, 4 * MIB);
    driver.set_access(segment.range, &[ON_DEVICE]).unwrap();
    machine.set(segment.range.ptr, 2, 8 * MIB);
    machine.assert_bytes(other.ptr, &[2; 100], "set by one memset");
}

/// All devices of the machine may be given access to a chunk of any of them.
pub fn several_devices_reach_a_chunk(machine: &dyn Machine) {
    let driver = machine.driver();
    let devices: Vec<DeviceIndex> = (0..driver.device_count().unwrap()).collect();
    println!("{} device(s)", devices.len());
    let all: Vec<Location> = devices.iter().map(|&device| Location::Device(device)).collect();
    for at in all.iter().copied().chain(driver.device_info(DEVICE).unwrap().host_chunk_location()) {
        let mut segment = Reserved::new(machine, 4 * MIB);
        let chunk = driver.chunk_create(at, 4 * MIB, false).unwrap();
        driver.chunk_map(segment.range, chunk).unwrap();
        driver.set_access(segment.range, &all).unwrap();
        let range = segment.range;
        segment.mapped.push(range);
        driver.chunk_release(chunk).unwrap();
        machine.set(range.ptr, 5, range.bytes);
        let expected = if machine.add_one(range.ptr, 16) { [6, 5, 5, 5] } else { [5; 4] };
        machine.assert_bytes(range.ptr, &expected.repeat(16), &format!("{at:?}"));
    }
}

/// The CPU reads and writes a chunk of host memory by its address, once it has access.
pub fn the_cpu_reaches_host_chunks(machine: &dyn Machine) {
    let driver = machine.driver();
    let Some(at) = driver.device_info(DEVICE).unwrap().host_chunk_location() else { return };
    let mut segment = Reserved::new(machine, 4 * MIB);
    let range = segment.fill(at, 0, 4 * MIB);
    driver.set_access(range, &[at]).unwrap();
    machine.set(range.ptr, 3, range.bytes);
    let first = range.ptr.0 as *mut u8;
    // SAFETY: mapped for the CPU just now, and the device is done with it.
    unsafe {
        assert_eq!(first.add(MIB as usize).read_volatile(), 3);
        first.add(MIB as usize).write_volatile(77);
    }
    machine.assert_bytes(range.ptr.offset(MIB - 1), &[3, 77, 3], "written by the CPU");
}

/// Nothing that is done to chunks waits for the device, and none of it disturbs other memory in use.
pub fn chunks_do_not_wait(machine: &dyn Machine) {
    let driver = machine.driver();
    for at in places(machine) {
        let mut segment = Reserved::new(machine, 8 * MIB);
        segment.fill(at, 0, 4 * MIB);
        let (stream, gate) = machine.gated_stream();
        let aside = Reserved::new(machine, 2 * MIB);
        drop(aside);
        let range = segment.fill(at, 4 * MIB, 4 * MIB);
        driver.set_access(segment.range, &[ON_DEVICE]).unwrap();
        segment.unmap(range);
        let shared = driver.chunk_create(at, 2 * MIB, true).unwrap();
        let descriptor = driver.chunk_export(shared).unwrap();
        let again = driver.chunk_import(descriptor.as_fd()).unwrap();
        driver.chunk_release(again).unwrap();
        driver.chunk_release(shared).unwrap();
        assert!(gate.0.is_closed(), "{at:?}: a call has waited for the stream");
        gate.0.open();
        driver.stream_synchronize(DEVICE, stream).unwrap();
        driver.stream_destroy(DEVICE, stream).unwrap();
    }
}

/// A graph that was captured while chunks came and went replays; what it uses is mapped.
pub fn a_segment_of_chunks_grows_inside_a_capture(machine: &dyn Machine) {
    let driver = machine.driver();
    for mode in [CaptureMode::Global, CaptureMode::ThreadLocal, CaptureMode::Relaxed] {
        let mut segment = Reserved::new(machine, 8 * MIB);
        let captured = driver.stream_create(DEVICE).unwrap();
        machine.begin_capture(captured, mode).unwrap();
        let range = segment.fill(ON_DEVICE, 0, 4 * MIB);
        segment.fill(ON_DEVICE, 4 * MIB, 4 * MIB);
        segment.unmap(segment.part(4 * MIB, 4 * MIB));
        assert_eq!(machine.capture_status(captured), Ok(super::machine::Capture::Active), "{mode:?}");
        machine.end_capture(captured).unwrap();
        let bytes = machine.pattern(4 * MIB, 1);
        machine.write(range.ptr, &bytes);
        machine.assert_bytes(range.ptr, &bytes, "created inside a capture");
        driver.stream_destroy(DEVICE, captured).unwrap();
    }
}

/// A file descriptor keeps a chunk's memory, and gives it back to who imports it, in this process too.
pub fn a_descriptor_keeps_the_memory(machine: &dyn Machine) {
    let driver = machine.driver();
    Reserved::new(machine, 2 * MIB).fill(ON_DEVICE, 0, 2 * MIB);
    let free = || driver.device_memory(DEVICE).unwrap().free;
    for at in places(machine) {
        let (before, bytes) = (free(), 8 * MIB);
        let chunk = driver.chunk_create(at, bytes, true).unwrap();
        let mut segment = Reserved::new(machine, bytes);
        let range = segment.map(0, bytes, chunk);
        let pattern = machine.pattern(bytes, 6);
        machine.write(range.ptr, &pattern);
        let descriptor = driver.chunk_export(chunk).unwrap();
        let copy = descriptor.try_clone().unwrap();
        drop(descriptor);
        segment.unmap(range);
        driver.chunk_release(chunk).unwrap();
        assert!(at != ON_DEVICE || before - free() == bytes, "the descriptor keeps it");
        let again = driver.chunk_import(copy.as_fd()).unwrap();
        drop(copy);
        let range = segment.map(0, bytes, again);
        machine.assert_bytes(range.ptr, &pattern, &format!("imported again, {at:?}"));
        segment.unmap(range);
        driver.chunk_release(again).unwrap();
        assert_eq!(free(), before, "{at:?}: nobody has it any more");
    }
}

/// Another process maps the same bytes.
pub fn another_process_maps_a_chunk(machine: &dyn Machine) {
    let driver = machine.driver();
    let bytes = 8 * MIB;
    if std::env::var_os(OTHER_PROCESS).is_some() {
        return in_the_other_process(machine, bytes);
    }
    for at in places(machine) {
        let chunk = driver.chunk_create(at, bytes, true).unwrap();
        let mut segment = Reserved::new(machine, bytes);
        let range = segment.map(0, bytes, chunk);
        let pattern = machine.pattern(bytes, 5);
        machine.write(range.ptr, &pattern);
        let descriptor = driver.chunk_export(chunk).unwrap();
        let done = Command::new(std::env::current_exe().unwrap())
            .args([super::TEST.get(), "--exact", "--nocapture"])
            .env(OTHER_PROCESS, "1")
            .stdin(Stdio::from(descriptor))
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success() && output.contains("1 passed"), "{at:?}: {output}");
        machine.assert_bytes(range.ptr, &[44; 100], "written by the other process");
        machine.assert_bytes(range.ptr.offset(100), &pattern[100..], "beside it");
        driver.chunk_release(chunk).unwrap();
    }
}

fn in_the_other_process(machine: &dyn Machine, bytes: u64) {
    let driver = machine.driver();
    let chunk = driver.chunk_import(std::io::stdin().as_fd()).unwrap();
    let mut segment = Reserved::new(machine, bytes);
    let range = segment.map(0, bytes, chunk);
    machine.assert_bytes(range.ptr, &machine.pattern(bytes, 5), "of the first process");
    machine.write(range.ptr, &[44; 100]);
    driver.chunk_release(chunk).unwrap();
}

/// A kernel that touches an address from which its chunk was taken ends the context. Not on a real GPU, which other tests need.
pub fn an_unmapped_address_ends_the_context(machine: &dyn Machine) {
    if machine.is_real() {
        return;
    }
    let driver = machine.driver();
    let mut segment = Reserved::new(machine, 4 * MIB);
    let range = segment.fill(ON_DEVICE, 0, 4 * MIB);
    let (stream, gate) = machine.gated_stream();
    machine.queue_kernel(stream, range);
    segment.unmap(range);
    gate.0.open();
    let error = driver.stream_synchronize(DEVICE, stream).unwrap_err();
    assert_eq!((error.kind, error.code), (ErrorKind::Other, 700), "{error}");
    assert_eq!(driver.device_memory(DEVICE).unwrap_err().code, 700, "for good");
    std::mem::forget(segment);
}

/// Host memory that is not there is refused, and the chunks that are there stay. Not on a real machine, which others use.
pub fn host_chunks_are_counted(machine: &dyn Machine) {
    let driver = machine.driver();
    let Some(at) = driver.device_info(DEVICE).unwrap().host_chunk_location().filter(|_| !machine.is_real()) else {
        return;
    };
    let mut segment = Reserved::new(machine, 4 * MIB);
    let range = segment.fill(at, 0, 4 * MIB);
    machine.set(range.ptr, 6, range.bytes);
    let left = driver.host_memory().unwrap().available;
    let error = driver.chunk_create(at, left / (2 * MIB) * (2 * MIB) + 2 * MIB, false).unwrap_err();
    assert_eq!(error.kind, ErrorKind::OutOfMemory, "{error}");
    assert_eq!(driver.host_memory().unwrap().available, left);
    let most = driver.chunk_create(at, left / (2 * MIB) * (2 * MIB), false).unwrap();
    assert!(driver.host_memory().unwrap().available < 2 * MIB);
    driver.chunk_release(most).unwrap();
    assert_eq!(driver.host_memory().unwrap().available, left);
    machine.assert_bytes(range.ptr, &[6; 100], "as before");
}

/// What the calls cost. Told, not asserted; a simulated machine's own speed says nothing.
pub fn costs_are_told(machine: &dyn Machine) {
    if !machine.is_real() {
        return;
    }
    let driver = machine.driver();
    for at in places(machine) {
        for mib in [2, 20, 128] {
            let (bytes, count) = (mib * MIB, BUDGET / (mib * MIB));
            let mut segment = Reserved::new(machine, count * bytes);
            let microseconds = |since: Instant| since.elapsed().as_secs_f64() * 1e6 / count as f64;
            let start = Instant::now();
            let chunks: Vec<_> = (0..count).map(|_| driver.chunk_create(at, bytes, false).unwrap()).collect();
            let create = microseconds(start);
            let start = Instant::now();
            for (index, chunk) in (0..).zip(&chunks) {
                driver.chunk_map(segment.part(index * bytes, bytes), *chunk).unwrap();
            }
            let map = microseconds(start);
            let start = Instant::now();
            for index in 0..count {
                driver.set_access(segment.part(index * bytes, bytes), &[ON_DEVICE]).unwrap();
            }
            let access = microseconds(start);
            machine.set(segment.range.ptr, 1, segment.range.bytes);
            let start = Instant::now();
            for index in 0..count {
                driver.chunk_unmap(segment.part(index * bytes, bytes)).unwrap();
            }
            let unmap = microseconds(start);
            let start = Instant::now();
            for chunk in chunks {
                driver.chunk_release(chunk).unwrap();
            }
            let release = microseconds(start);
            segment.mapped.clear();
            println!(
                "{at:?}, {mib} MiB: create {create:.1} us, map {map:.1} us, access {access:.1} us, unmap {unmap:.1} us, \
                 release {release:.1} us"
            );
        }
    }
}
