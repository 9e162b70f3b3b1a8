//! Allocation, population, advice, and the bytes in them.

use torch_uvm::driver::{Advice, DeviceIndex, ErrorKind, Location, Range, Result, Stream};

use super::machine::{DEVICE, MIB, Machine, MachineExt};

/// One that no machine of the tests has.
const NO_DEVICE: DeviceIndex = 99;

/// Both kinds of memory are aligned as the trait says, at every size.
pub fn allocations_are_aligned(machine: &dyn Machine) {
    let driver = machine.driver();
    for bytes in [1, 511, 512, 4096, 65_536, MIB, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 3 * MIB, 5 * MIB, 32 * MIB] {
        let managed = driver.alloc_managed(DEVICE, bytes).unwrap();
        let device = driver.alloc_device(DEVICE, bytes).unwrap();
        println!(
            "{bytes} bytes: managed at {managed:?} (2^{}), device at {device:?} (2^{})",
            managed.0.trailing_zeros(),
            device.0.trailing_zeros()
        );
        let alignment = if bytes >= 2 * MIB { 2 * MIB } else { 512 };
        assert_eq!(managed.0 % alignment, 0, "{bytes} managed bytes at {managed:?}");
        assert_eq!(device.0 % alignment, 0, "{bytes} device bytes at {device:?}");
        machine.free(managed);
        machine.free(device);
    }
}

/// Live allocations do not overlap, and each holds its own bytes.
pub fn allocations_are_disjoint(machine: &dyn Machine) {
    let driver = machine.driver();
    let mut live = Vec::new();
    for (seed, bytes) in (1..).zip([1, 512, 100_000, 2 * MIB, 2 * MIB + 512]) {
        for ptr in [driver.alloc_managed(DEVICE, bytes).unwrap(), driver.alloc_device(DEVICE, bytes).unwrap()] {
            let pattern = machine.pattern(bytes, seed);
            println!("{bytes} bytes at {ptr:?}");
            machine.write(ptr, &pattern);
            live.push((ptr, pattern));
        }
    }
    for (ptr, pattern) in &live {
        machine.assert_bytes(*ptr, pattern, "among others");
    }
    live.into_iter().for_each(|(ptr, _)| machine.free(ptr));
}

/// The driver takes device memory for managed pages in steps of this size: 64 chunks of 2 MiB
/// (`uvm_perf_pma_batch_nonpinned_order`, 6 by default).
const DRIVER_STEP: u64 = 128 * MIB;

/// A large range costs nothing until it is populated.
pub fn managed_memory_holds_nothing_until_populated(machine: &dyn Machine) {
    let driver = machine.driver();
    // The first use of a device costs it memory of its own.
    let warm = machine.managed(2 * MIB);
    machine.prefetch_and_wait(warm, Location::Device(DEVICE));
    machine.free(warm.ptr);
    let free = || driver.device_memory(DEVICE).unwrap().free;
    let start = free();
    let range = machine.managed(256 * MIB);
    assert_eq!(free(), start, "reserving holds nothing");

    for populated in (0..256).step_by(32) {
        let part = Range { ptr: range.ptr.offset(populated * MIB), bytes: 32 * MIB };
        machine.prefetch_and_wait(part, Location::Device(DEVICE));
        println!("{} MiB populated: {} bytes of device memory taken", populated + 32, start - free());
    }
    let taken = start - free();
    let about = range.bytes - DRIVER_STEP..=range.bytes + DRIVER_STEP;
    assert!(about.contains(&taken), "populating {} bytes took {taken}", range.bytes);

    machine.prefetch_and_wait(range, Location::Host);
    println!("all moved to the host: {} bytes taken", start - free());
    assert!(start - free() + DRIVER_STEP >= taken, "the driver keeps the chunks of pages that leave");

    machine.free(range.ptr);
    println!("freed: {} bytes taken", start.saturating_sub(free()));
    assert!(free() + DRIVER_STEP >= start, "freeing gives it back");
}

/// Populating in steps, as a segment grows, leaves what is there alone.
pub fn a_range_grows_in_steps(machine: &dyn Machine) {
    let range = machine.managed(16 * MIB);
    let mut held = Vec::new();
    for step in 0..8 {
        let part = Range { ptr: range.ptr.offset(step * 2 * MIB), bytes: 2 * MIB };
        machine.prefetch_and_wait(part, Location::Device(DEVICE));
        let pattern = machine.pattern(part.bytes, step as u8);
        machine.write(part.ptr, &pattern);
        held.extend(pattern);
        machine.assert_bytes(range.ptr, &held, "grown");
    }
    machine.free(range.ptr);
}

/// Bytes outlive every move, under every advice.
pub fn bytes_survive_moves(machine: &dyn Machine) {
    let node = machine.driver().device_info(DEVICE).unwrap().host_numa_node.filter(|_| machine.has_numa_locations());
    let advices: [&[Advice]; 6] = [
        &[],
        &[Advice::SetPreferredLocation(Location::Device(DEVICE))],
        &[Advice::SetPreferredLocation(Location::Host), Advice::SetAccessedBy(Location::Device(DEVICE))],
        &[Advice::SetAccessedBy(Location::Device(DEVICE)), Advice::SetAccessedBy(Location::Host)],
        &[Advice::SetReadMostly],
        &[Advice::SetReadMostly, Advice::SetPreferredLocation(Location::Device(DEVICE))],
    ];
    for (seed, advices) in (1..).zip(advices) {
        // Not a multiple of a page: moves are of whole pages, bytes are not.
        let range = machine.managed(6 * MIB + 123);
        let pattern = machine.pattern(range.bytes, seed);
        machine.write(range.ptr, &pattern);
        for advice in advices {
            machine.advise(range, *advice).unwrap();
        }
        machine.assert_bytes(range.ptr, &pattern, "after advice");
        let locations = [Location::Device(DEVICE), Location::Host, Location::Device(DEVICE)];
        for to in locations.into_iter().chain(node.map(Location::HostNuma)) {
            machine.prefetch_and_wait(range, to);
            machine.assert_bytes(range.ptr, &pattern, &format!("{advices:?}, moved to {to:?}"));
        }
        // A part of it, from the middle of a page.
        let part = Range { ptr: range.ptr.offset(1_000_001), bytes: 777 };
        machine.prefetch_and_wait(part, Location::Device(DEVICE));
        machine.assert_bytes(range.ptr, &pattern, "a part moved");
        machine.write(part.ptr, &[7; 777]);
        machine.prefetch_and_wait(range, Location::Host);
        machine.assert_bytes(part.ptr, &[7; 777], "written after a move");
        machine.assert_bytes(range.ptr, &pattern[..1_000_001], "beside what was written");
        machine.free(range.ptr);
    }
}

/// Runs a discard on a new stream, and waits.
fn discard(machine: &dyn Machine, range: Range) -> Result<()> {
    let driver = machine.driver();
    let stream = driver.stream_create(DEVICE).unwrap();
    let result = driver.discard(DEVICE, range, stream);
    driver.stream_synchronize(DEVICE, stream).unwrap();
    driver.stream_destroy(DEVICE, stream).unwrap();
    result
}

/// Discarded memory keeps its address and its advice, its neighbours their bytes; after a prefetch it is as new. The device's
/// free figure does not rise.
pub fn discarded_memory_is_used_again(machine: &dyn Machine) {
    let driver = machine.driver();
    let range = machine.managed(192 * MIB);
    if !driver.device_info(DEVICE).unwrap().discard {
        assert_eq!(discard(machine, range).unwrap_err().kind, ErrorKind::NotSupported);
        machine.free(range.ptr);
        return;
    }
    machine.advise(range, Advice::SetPreferredLocation(Location::Device(DEVICE))).unwrap();
    machine.prefetch_and_wait(range, Location::Device(DEVICE));
    let pattern = machine.pattern(4 * MIB, 5);
    let end = Range { ptr: range.ptr.offset(4 * MIB), bytes: range.bytes - 4 * MIB };
    machine.write(range.ptr, &pattern);
    machine.write(end.ptr, &pattern);
    let free = || driver.device_memory(DEVICE).unwrap().free;
    let before = free();
    for _ in 0..2 {
        discard(machine, end).unwrap();
        println!("discarding {} bytes: {} bytes of device memory came free", end.bytes, free().saturating_sub(before));
        if !driver.device_info(DEVICE).unwrap().integrated {
            assert!(free() < before + DRIVER_STEP, "the driver keeps the chunks");
        }
        machine.assert_bytes(range.ptr, &pattern, "beside what was discarded");
    }
    machine.prefetch_and_wait(end, Location::Device(DEVICE));
    for at in [0, end.bytes - pattern.len() as u64] {
        machine.write(end.ptr.offset(at), &pattern);
        machine.assert_bytes(end.ptr.offset(at), &pattern, "populated again");
    }
    machine.assert_bytes(range.ptr, &pattern, "beside what was populated again");
    discard(machine, range).unwrap();
    machine.free(range.ptr);
}

/// Discards that cannot be. What a GPU answers is told and not asserted: it has not been measured yet.
pub fn bad_discards_are_told(machine: &dyn Machine) {
    if !machine.driver().device_info(DEVICE).unwrap().discard {
        return;
    }
    let calls: [(&str, Call); 5] = [
        ("discard of 0 bytes", |m| on_managed(m, |r| discard(m, empty(r)))),
        ("discard beyond the allocation", |m| on_managed(m, |r| discard(m, beyond(r)))),
        ("discard of device memory", |m| on_device(m, |r| discard(m, r))),
        ("discard on the legacy default stream", |m| on_managed(m, |r| m.driver().discard(DEVICE, r, Stream(0)))),
        ("discard of freed memory", |m| {
            let range = m.managed(4 * MIB);
            m.free(range.ptr);
            discard(m, range)
        }),
    ];
    for (name, call) in calls {
        let result = call(machine);
        println!("{name}: {:?}", result.as_ref().map_err(|error| error.code));
        if !machine.is_real() {
            assert_eq!(result.unwrap_err().kind, ErrorKind::InvalidValue, "{name}");
        }
    }
    let missing = machine.managed(2 * MIB);
    let error = machine.driver().discard(NO_DEVICE, missing, Stream(1)).unwrap_err();
    assert_eq!(error.code, 101, "{error}");
    machine.free(missing.ptr);
}

/// Each advice can be given and taken back, for a part of a range, twice, and where it was never given.
pub fn every_advice_can_be_given_and_taken_back(machine: &dyn Machine) {
    let range = machine.managed(8 * MIB);
    let part = Range { ptr: range.ptr.offset(2 * MIB), bytes: 2 * MIB };
    let pattern = machine.pattern(range.bytes, 9);
    machine.write(range.ptr, &pattern);
    for place in [Location::Device(DEVICE), Location::Host] {
        for (set, unset) in [
            (Advice::SetPreferredLocation(place), Advice::UnsetPreferredLocation),
            (Advice::SetAccessedBy(place), Advice::UnsetAccessedBy(place)),
            (Advice::SetReadMostly, Advice::UnsetReadMostly),
        ] {
            for advice in [unset, set, set, unset, unset] {
                machine.advise(part, advice).unwrap();
                machine.advise(range, advice).unwrap();
            }
        }
    }
    machine.assert_bytes(range.ptr, &pattern, "after all advice");
    machine.free(range.ptr);
}

/// Host memory is what it says.
pub fn host_memory_is_told(machine: &dyn Machine) {
    let memory = machine.driver().host_memory().unwrap();
    println!("{memory:?}");
    assert!(memory.available <= memory.total && memory.total > 0, "{memory:?}");
}

/// The facts of a device agree with each other.
pub fn devices_are_described(machine: &dyn Machine) {
    let driver = machine.driver();
    let count = driver.device_count().unwrap();
    assert!(count > DEVICE);
    for device in 0..count {
        let info = driver.device_info(device).unwrap();
        println!("{info:?}");
        assert!(!info.name.is_empty());
        let memory = driver.device_memory(device).unwrap();
        println!("{memory:?}");
        assert!(memory.free <= memory.total, "{memory:?}");
        assert_eq!(driver.device_info(device), Ok(info), "constant");
    }
    assert_eq!(driver.device_count(), Ok(count));
}

type Call = fn(&dyn Machine) -> Result<()>;

/// Runs `call` on managed memory of 4 MiB.
fn on_managed(machine: &dyn Machine, call: impl FnOnce(Range) -> Result<()>) -> Result<()> {
    let range = machine.managed(4 * MIB);
    let result = call(range);
    machine.free(range.ptr);
    result
}

/// Runs `call` on device memory of 4 MiB.
fn on_device(machine: &dyn Machine, call: impl FnOnce(Range) -> Result<()>) -> Result<()> {
    let range = Range { ptr: machine.driver().alloc_device(DEVICE, 4 * MIB).unwrap(), bytes: 4 * MIB };
    let result = call(range);
    machine.free(range.ptr);
    result
}

fn advise_managed(machine: &dyn Machine, advice: Advice) -> Result<()> {
    on_managed(machine, |range| machine.advise(range, advice))
}

/// Prefetches on a new stream.
fn prefetch(machine: &dyn Machine, range: Range, to: Location) -> Result<()> {
    let driver = machine.driver();
    let stream = driver.stream_create(DEVICE).unwrap();
    let result = driver.prefetch(DEVICE, range, to, stream);
    driver.stream_synchronize(DEVICE, stream).unwrap();
    driver.stream_destroy(DEVICE, stream).unwrap();
    result
}

fn beyond(range: Range) -> Range {
    Range { bytes: range.bytes + 2 * MIB, ..range }
}

fn empty(range: Range) -> Range {
    Range { bytes: 0, ..range }
}

/// Calls on bad arguments, and what they must give: a `CUresult` as a number, 0 for success.
const ARGUMENTS: &[(&str, Call, i32)] = &[
    ("alloc_managed of 0 bytes", |m| m.driver().alloc_managed(DEVICE, 0).map(drop), 1),
    ("alloc_device of 0 bytes", |m| m.driver().alloc_device(DEVICE, 0).map(drop), 1),
    ("alloc_device of 2^50 bytes", |m| m.driver().alloc_device(DEVICE, 1 << 50).map(drop), 2),
    ("alloc_device of 2^64 - 1 bytes", |m| m.driver().alloc_device(DEVICE, u64::MAX).map(drop), 2),
    ("free of address 0", |m| m.driver().free(DEVICE, Default::default()), 0),
    (
        "free of an address that CUDA never gave",
        |m| on_managed(m, |r| m.driver().free(DEVICE, r.ptr.offset(1 << 40))),
        1,
    ),
    ("free of managed memory from its middle", |m| on_managed(m, |r| m.driver().free(DEVICE, r.ptr.offset(MIB))), 1),
    ("free of device memory from its middle", |m| on_device(m, |r| m.driver().free(DEVICE, r.ptr.offset(MIB))), 1),
    (
        "free of managed memory twice",
        |m| {
            let range = m.managed(4 * MIB);
            m.free(range.ptr);
            m.driver().free(DEVICE, range.ptr)
        },
        1,
    ),
    (
        "free of device memory twice",
        |m| {
            let ptr = m.driver().alloc_device(DEVICE, 4 * MIB).unwrap();
            m.free(ptr);
            m.driver().free(DEVICE, ptr)
        },
        1,
    ),
    ("advise on 0 bytes", |m| on_managed(m, |r| m.advise(empty(r), Advice::SetReadMostly)), 1),
    ("advise beyond the allocation", |m| on_managed(m, |r| m.advise(beyond(r), Advice::SetReadMostly)), 1),
    ("advise on device memory", |m| on_device(m, |r| m.advise(r, Advice::SetReadMostly)), 1),
    (
        "preferred location device 99",
        |m| advise_managed(m, Advice::SetPreferredLocation(Location::Device(NO_DEVICE))),
        101,
    ),
    ("preferred location device -1", |m| advise_managed(m, Advice::SetPreferredLocation(Location::Device(-1))), 101),
    ("preferred location NUMA node 0", |m| advise_managed(m, Advice::SetPreferredLocation(Location::HostNuma(0))), 0),
    ("preferred location NUMA node 99", |m| advise_managed(m, Advice::SetPreferredLocation(Location::HostNuma(99))), 1),
    ("preferred location NUMA node -1", |m| advise_managed(m, Advice::SetPreferredLocation(Location::HostNuma(-1))), 1),
    ("accessed by device 99", |m| advise_managed(m, Advice::SetAccessedBy(Location::Device(NO_DEVICE))), 101),
    ("accessed by NUMA node 0", |m| advise_managed(m, Advice::SetAccessedBy(Location::HostNuma(0))), 1),
    (
        "no longer accessed by device 99",
        |m| advise_managed(m, Advice::UnsetAccessedBy(Location::Device(NO_DEVICE))),
        101,
    ),
    ("prefetch of 0 bytes", |m| on_managed(m, |r| prefetch(m, empty(r), Location::Device(DEVICE))), 1),
    ("prefetch beyond the allocation", |m| on_managed(m, |r| prefetch(m, beyond(r), Location::Device(DEVICE))), 1),
    ("prefetch of device memory", |m| on_device(m, |r| prefetch(m, r, Location::Device(DEVICE))), 1),
    ("prefetch to device 99", |m| on_managed(m, |r| prefetch(m, r, Location::Device(NO_DEVICE))), 101),
    ("prefetch to NUMA node 0", |m| on_managed(m, |r| prefetch(m, r, Location::HostNuma(0))), 0),
    ("prefetch to NUMA node 99", |m| on_managed(m, |r| prefetch(m, r, Location::HostNuma(99))), 1),
    (
        "prefetch of freed memory",
        |m| {
            let range = m.managed(4 * MIB);
            m.free(range.ptr);
            prefetch(m, range, Location::Device(DEVICE))
        },
        1,
    ),
    ("ipc_handle of device memory", |m| on_device(m, |r| m.driver().ipc_handle(DEVICE, r.ptr).map(drop)), 0),
    (
        "ipc_handle of device memory's middle",
        |m| on_device(m, |r| m.driver().ipc_handle(DEVICE, r.ptr.offset(MIB)).map(drop)),
        0,
    ),
    ("ipc_handle of managed memory", |m| on_managed(m, |r| m.driver().ipc_handle(DEVICE, r.ptr).map(drop)), 1),
    (
        "ipc_handle of freed memory",
        |m| {
            let ptr = m.driver().alloc_device(DEVICE, 4 * MIB).unwrap();
            m.free(ptr);
            m.driver().ipc_handle(DEVICE, ptr).map(drop)
        },
        1,
    ),
    ("device_info of device 99", |m| m.driver().device_info(NO_DEVICE).map(drop), 101),
    ("device_info of device -1", |m| m.driver().device_info(-1).map(drop), 101),
    ("device_memory of device 99", |m| m.driver().device_memory(NO_DEVICE).map(drop), 101),
    ("alloc_managed on device 99", |m| m.driver().alloc_managed(NO_DEVICE, MIB).map(drop), 101),
    ("alloc_device on device 99", |m| m.driver().alloc_device(NO_DEVICE, MIB).map(drop), 101),
    ("free on device 99", |m| on_managed(m, |r| m.driver().free(NO_DEVICE, r.ptr)), 101),
    ("advise on device 99", |m| on_managed(m, |r| m.driver().advise(NO_DEVICE, r, Advice::SetReadMostly)), 101),
    ("stream_create on device 99", |m| m.driver().stream_create(NO_DEVICE).map(drop), 101),
    ("event_create on device 99", |m| m.driver().event_create(NO_DEVICE).map(drop), 101),
    ("device_synchronize of device 99", |m| m.driver().device_synchronize(NO_DEVICE), 101),
];

/// Every bad argument gives its error, and leaves nothing behind.
pub fn bad_arguments_are_told(machine: &dyn Machine) {
    let mut wrong = String::new();
    for &(name, call, mut expected) in ARGUMENTS {
        if name.contains("NUMA") && !machine.has_numa_locations() {
            expected = 801;
        }
        // Once to warm up, once to see that nothing stays.
        call(machine).ok();
        let before = machine.driver().device_memory(DEVICE).unwrap();
        let result = call(machine);
        let found = result.as_ref().map_or_else(|error| error.code, |()| 0);
        println!(
            "| {name} | {} |",
            result.as_ref().map_or_else(|e| format!("{} ({})", e.name, e.code), |()| "ok".into())
        );
        if found != expected {
            wrong += &format!("{name}: {found}, not {expected}\n");
        }
        let kind = match expected {
            1 | 101 => ErrorKind::InvalidValue,
            2 => ErrorKind::OutOfMemory,
            801 => ErrorKind::NotSupported,
            _ => ErrorKind::Other,
        };
        if found == expected && result.is_err_and(|error| error.kind != kind) {
            wrong += &format!("{name}: not of kind {kind:?}\n");
        }
        let after = machine.driver().device_memory(DEVICE).unwrap();
        if after.free < before.free {
            wrong += &format!("{name}: {} bytes stay behind\n", before.free - after.free);
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// Sizes that no machine has. Not on a real GPU, which is not to be asked for more managed memory than it has free.
pub fn absurd_managed_sizes_are_refused(machine: &dyn Machine) {
    if machine.is_real() {
        return;
    }
    for bytes in [1 << 60, (1 << 63) - 1, 1 << 63, u64::MAX - 511, u64::MAX] {
        let error = machine.driver().alloc_managed(DEVICE, bytes).unwrap_err();
        assert_eq!(error.kind, ErrorKind::OutOfMemory, "{bytes}: {error}");
    }
}
