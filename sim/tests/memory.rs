//! Memory: allocation, residency, the books; faults injected at every call.

use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use torch_uvm::driver::{Driver, ErrorKind};
use torch_uvm_sim::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const DEV: Location = Location::Device(0);

fn machine() -> Machine {
    Machine::new(Config::small_gh200())
}

fn all(ptr: DevicePtr, bytes: u64) -> Range {
    Range { ptr, bytes }
}

fn prefetch(m: &Machine, range: Range, to: Location) {
    m.prefetch(0, range, to, Stream(0)).unwrap();
    m.stream_synchronize(0, Stream(0)).unwrap();
    m.check_books().unwrap();
}

fn touch(m: &Machine, range: Range, write: bool) {
    m.launch_kernel(0, Stream(0), vec![Access { range, write }]).unwrap();
    m.stream_synchronize(0, Stream(0)).unwrap();
    m.check_books().unwrap();
}

fn at(m: &Machine, range: Range) -> (u64, u64, u64) {
    let r = m.residency_of(range).unwrap();
    (r.nowhere / MIB, r.host / MIB, r.devices[0] / MIB)
}

#[test]
fn bad_arguments_give_the_codes_of_a_real_device() {
    let m = machine();
    let (a, d) = (m.alloc_managed(0, 4 * MIB).unwrap(), m.alloc_device(0, 4 * MIB).unwrap());
    let gone = m.alloc_managed(0, 4 * MIB).unwrap();
    m.free(0, gone).unwrap();
    let advise = |range, advice| m.advise(0, range, advice).unwrap_err().code.0;
    let fetch = |range, to| m.prefetch(0, range, to, Stream(0)).unwrap_err().code.0;
    let preferred = Advice::SetPreferredLocation;
    let codes = [
        (m.alloc_managed(0, 0).unwrap_err().code.0, 1),
        (m.alloc_device(0, 0).unwrap_err().code.0, 1),
        (m.free(0, gone).unwrap_err().code.0, 1),
        (m.free(0, DevicePtr(0x1000)).unwrap_err().code.0, 1),
        (m.free(0, a.offset(512)).unwrap_err().code.0, 1),
        (advise(all(a, 0), Advice::SetReadMostly), 1),
        (advise(all(a, 4 * MIB + 1), Advice::SetReadMostly), 1),
        (advise(all(d, MIB), Advice::SetReadMostly), 1),
        (advise(all(gone, MIB), Advice::SetReadMostly), 1),
        (advise(all(a, MIB), preferred(Location::HostNuma(99))), 1),
        (advise(all(a, MIB), preferred(Location::HostNuma(-1))), 1),
        (advise(all(a, MIB), preferred(Location::Device(99))), 101),
        (advise(all(a, MIB), Advice::SetAccessedBy(Location::HostNuma(0))), 1),
        (fetch(all(a, 0), DEV), 1),
        (fetch(all(d, MIB), DEV), 1),
        (fetch(all(a, MIB), Location::HostNuma(99)), 1),
        (fetch(all(a, MIB), Location::Device(-1)), 101),
        (m.alloc_device(99, 1).unwrap_err().code.0, 101),
        (m.device_info(-1).unwrap_err().code.0, 101),
        (m.alloc_device(0, 1 << 50).unwrap_err().code.0, 2),
        (m.alloc_device(0, u64::MAX).unwrap_err().code.0, 2),
        (m.alloc_managed(0, u64::MAX).unwrap_err().code.0, 2),
        (m.ipc_handle(0, a).unwrap_err().code.0, 1),
        (m.ipc_handle(0, gone).unwrap_err().code.0, 1),
        (m.event_query(0, Event(7)).unwrap_err().code.0, 400),
        (m.stream_query(0, Stream(77)).unwrap_err().code.0, 400),
        (m.memcpy(0, gone.0, a.0, 1, CopyKind::Default).unwrap_err().code.0, 1),
        (m.memcpy(0, a.0 + 4 * MIB - 1, d.0, 2, CopyKind::Default).unwrap_err().code.0, 1),
        (m.memcpy(0, 0, d.0, 2, CopyKind::Default).unwrap_err().code.0, 1),
    ];
    for (n, (got, expected)) in codes.into_iter().enumerate() {
        assert_eq!(got, expected, "number {n}");
    }
    assert_eq!(m.ipc_handle(0, d.offset(MIB)).unwrap(), m.ipc_handle(0, d).unwrap());
    m.free(0, DevicePtr(0)).unwrap();
    assert_eq!(m.live().allocations.len(), 2, "failed calls changed nothing");
}

#[test]
fn alignment() {
    let m = machine();
    for bytes in [1, 511, 512, 5000, MIB] {
        assert_eq!(m.alloc_device(0, bytes).unwrap().0 % 512, 0);
        assert_eq!(m.alloc_managed(0, bytes).unwrap().0 % 512, 0);
    }
    for bytes in [2 * MIB, 2 * MIB + 1, 50 * MIB] {
        assert_eq!(m.alloc_device(0, bytes).unwrap().0 % (2 * MIB), 0);
        assert_eq!(m.alloc_managed(0, bytes).unwrap().0 % (2 * MIB), 0);
    }
}

#[test]
fn device_memory_runs_out() {
    let m = machine();
    let a = m.alloc_device(0, GIB).unwrap();
    let b = m.alloc_device(0, GIB).unwrap();
    assert_eq!(m.device_memory(0).unwrap(), DeviceMemory { free: 0, total: 2 * GIB });
    assert_eq!(m.alloc_device(0, 1).unwrap_err().code, Code::OUT_OF_MEMORY);
    m.free(0, a).unwrap();
    m.alloc_device(0, GIB).unwrap();
    m.free(0, b).unwrap();
}

#[test]
fn reserving_holds_nothing_and_populating_does() {
    let m = machine();
    let a = m.alloc_managed(0, 500 * GIB).unwrap();
    assert_eq!(m.device_memory(0).unwrap().free, 2 * GIB);
    prefetch(&m, all(a, 256 * MIB), DEV);
    assert_eq!(m.device_memory(0).unwrap().free, 2 * GIB - 256 * MIB);
    prefetch(&m, all(a.offset(GIB), 512 * MIB), Location::Host);
    assert_eq!(m.host_memory().unwrap().available, 10 * GIB - 512 * MIB);
    assert_eq!(at(&m, all(a, 2 * GIB)), (2048 - 768, 512, 256));
    // Leaving the device gives the driver's chunks back to no one, until the free.
    prefetch(&m, all(a, 256 * MIB), Location::Host);
    assert_eq!(m.device_memory(0).unwrap().free, 2 * GIB - 256 * MIB);
    // But other managed pages use them.
    let b = m.alloc_managed(0, GIB).unwrap();
    prefetch(&m, all(b, 256 * MIB), DEV);
    assert_eq!(m.device_memory(0).unwrap().free, 2 * GIB - 256 * MIB);
    m.free(0, a).unwrap();
    m.free(0, b).unwrap();
    assert_eq!(m.device_memory(0).unwrap().free, 2 * GIB);
    assert_eq!(m.host_memory().unwrap().available, 10 * GIB);
    assert_eq!(m.counters().host_overcommitted, 0);
}

#[test]
fn a_full_device_evicts_the_least_recently_used_but_never_plain_memory() {
    let m = machine();
    m.alloc_device(0, GIB).unwrap();
    let a = m.alloc_managed(0, 4 * GIB).unwrap();
    prefetch(&m, all(a, 512 * MIB), DEV);
    prefetch(&m, all(a.offset(512 * MIB), 512 * MIB), DEV);
    assert_eq!(m.device_memory(0).unwrap().free, 0);
    touch(&m, all(a, 512 * MIB), false);
    prefetch(&m, all(a.offset(GIB), 256 * MIB), DEV);
    assert_eq!(at(&m, all(a, 512 * MIB)), (0, 0, 512), "used last: stays");
    assert_eq!(at(&m, all(a.offset(512 * MIB), 512 * MIB)), (0, 256, 256));
    assert_eq!(m.counters().evictions, 128);
    // Plain memory pushes managed memory out, as long as the host takes it.
    m.alloc_device(0, 768 * MIB).unwrap();
    m.check_books().unwrap();
    assert_eq!(m.residency().devices[0], 256 * MIB);
    m.set_others_host_memory(10 * GIB);
    let before = (m.residency(), m.device_memory(0).unwrap());
    assert_eq!(m.alloc_device(0, 128 * MIB).unwrap_err().code, Code::OUT_OF_MEMORY);
    assert_eq!((m.residency(), m.device_memory(0).unwrap()), before, "a failed call moves nothing");
}

#[test]
fn a_full_host_lets_prefetch_succeed_and_counts_what_it_could_not_do() {
    let m = Machine::new(Config::small_gh200().host_memory(GIB));
    let a = m.alloc_managed(0, 8 * GIB).unwrap();
    prefetch(&m, all(a, 2 * GIB), Location::Host);
    assert_eq!(at(&m, all(a, 2 * GIB)), (1024, 1024, 0));
    assert_eq!((m.counters().prefetch_skipped, m.counters().host_overcommitted), (GIB, 0));
    m.host_touch(all(a.offset(4 * GIB), 2 * MIB), true);
    assert_eq!(m.counters().host_overcommitted, 2 * MIB);
    assert_eq!(m.host_memory().unwrap().available, 0);
    assert_eq!(m.host_alloc(0, MIB).unwrap_err().code, Code::OUT_OF_MEMORY);
}

#[test]
fn advice_decides_where_pages_go() {
    let m = Machine::new(Config::new(Profile::h100()).device_memory(2 * GIB).host_memory(8 * GIB));
    let fresh = || all(m.alloc_managed(0, 64 * MIB).unwrap(), 64 * MIB);
    let plain = fresh();
    touch(&m, plain, true);
    assert_eq!(at(&m, plain), (0, 0, 64));
    assert_eq!(m.counters().device_faults, 32);
    m.host_touch(plain, false);
    assert_eq!(at(&m, plain), (0, 64, 0), "no coherence: the CPU's touch moves it");

    let on_host = fresh();
    m.advise(0, on_host, Advice::SetPreferredLocation(Location::Host)).unwrap();
    m.advise(0, on_host, Advice::SetAccessedBy(DEV)).unwrap();
    touch(&m, on_host, true);
    touch(&m, on_host, true);
    assert_eq!(at(&m, on_host), (0, 64, 0));
    assert_eq!(m.counters().bytes_remote, 128 * MIB);
    let advice = m.range_advice(on_host).unwrap();
    assert_eq!((advice.preferred, advice.accessed_by), (Some(Location::Host), vec![DEV]));
    prefetch(&m, on_host, DEV);
    assert_eq!(at(&m, on_host), (0, 0, 64), "prefetch ignores the preferred location");
    assert_eq!(m.range_advice(on_host).unwrap().last_prefetch, Some(DEV));

    let copied = fresh();
    prefetch(&m, copied, Location::Host);
    m.advise(0, copied, Advice::SetReadMostly).unwrap();
    touch(&m, copied, false);
    assert_eq!(at(&m, copied), (0, 64, 64));
    touch(&m, copied, true);
    assert_eq!(at(&m, copied), (0, 0, 64), "a write leaves one copy");
    prefetch(&m, copied, Location::Host);
    m.advise(0, copied, Advice::UnsetReadMostly).unwrap();
    m.check_books().unwrap();
    assert_eq!(at(&m, copied), (0, 64, 0));
}

#[test]
fn coherent_machines_reach_the_other_side_and_move_what_is_hot() {
    let m = machine();
    let a = all(m.alloc_managed(0, 64 * MIB).unwrap(), 64 * MIB);
    prefetch(&m, a, Location::Host);
    for _ in 0..3 {
        touch(&m, a, false);
        assert_eq!(at(&m, a), (0, 64, 0));
    }
    touch(&m, a, false);
    assert_eq!(at(&m, a), (0, 0, 64));
    m.advise(0, a, Advice::SetAccessedBy(Location::Host)).unwrap();
    m.host_touch(a, true);
    assert_eq!(at(&m, a), (0, 0, 64), "the CPU writes across the link");
    assert_eq!(m.counters().device_faults, 0);
}

#[test]
fn discarded_memory_loses_its_bytes_and_is_slow_until_prefetched() {
    let m = machine();
    let a = m.alloc_managed(0, 8 * MIB).unwrap();
    let stream = m.stream_create(0, true, 0).unwrap();
    m.memset_async(0, a.0, 7, 1, 8 * MIB, stream).unwrap();
    m.discard(0, &[all(a.offset(MIB), 4 * MIB)], stream).unwrap();
    m.stream_synchronize(0, stream).unwrap();
    // SAFETY: managed memory, live.
    let byte = |offset: u64| unsafe { *((a.0 + offset) as *const u8) };
    assert_eq!([byte(0), byte(2 * MIB), byte(4 * MIB - 1), byte(4 * MIB)], [7, 0, 0, 7], "whole pages only");
    m.memset_async(0, a.0 + 2 * MIB, 1, 1, 1, stream).unwrap();
    m.stream_synchronize(0, stream).unwrap();
    assert_eq!(m.counters().slow_discard_writes, 2 * MIB);
    m.discard_and_prefetch(0, &[all(a, 8 * MIB)], DEV, stream).unwrap();
    m.memset_async(0, a.0, 1, 1, 8 * MIB, stream).unwrap();
    m.stream_synchronize(0, stream).unwrap();
    assert_eq!(m.counters().slow_discard_writes, 2 * MIB);
    assert_eq!(m.discard(0, &[all(a, 8 * MIB)], Stream(0)).unwrap_err().code, Code::INVALID_VALUE);
    for config in [Config::small_gh200().discard(false), Config::small_gh200().concurrent_managed_access(false)] {
        let m = Machine::new(config);
        let (a, stream) = (m.alloc_managed(0, 8 * MIB).unwrap(), m.stream_create(0, true, 0).unwrap());
        assert_eq!(m.discard(0, &[all(a, 8 * MIB)], stream).unwrap_err().code, Code::NOT_SUPPORTED);
    }
}

#[test]
fn an_integrated_machine_has_one_memory() {
    let m = Machine::new(Config::new(Profile::gb10()).device_memory(4 * GIB));
    let a = m.alloc_managed(0, 8 * GIB).unwrap();
    prefetch(&m, all(a, GIB), DEV);
    prefetch(&m, all(a.offset(GIB), GIB), Location::Host);
    m.alloc_device(0, GIB).unwrap();
    assert_eq!(m.device_memory(0).unwrap(), DeviceMemory { free: GIB, total: 4 * GIB });
    assert_eq!(m.host_memory().unwrap(), HostMemory { total: 4 * GIB, available: GIB });
    prefetch(&m, all(a.offset(2 * GIB), 2 * GIB), DEV);
    assert_eq!((m.device_memory(0).unwrap().free, m.counters().prefetch_skipped), (0, GIB));
    m.free(0, a).unwrap();
    assert_eq!(m.host_memory().unwrap().available, 3 * GIB);
}

#[test]
fn without_concurrent_managed_access_there_is_no_prefetch() {
    let m = Machine::new(Config::small_gh200().concurrent_managed_access(false));
    assert!(!m.device_info(0).unwrap().concurrent_managed_access);
    let a = m.alloc_managed(0, 4 * MIB).unwrap();
    assert_eq!(m.prefetch(0, all(a, MIB), DEV, Stream(0)).unwrap_err().code, Code::INVALID_DEVICE);
    assert!(m.advise(0, all(a, MIB), Advice::SetPreferredLocation(DEV)).is_err());
    m.advise(0, all(a, MIB), Advice::SetReadMostly).unwrap();
}

#[test]
fn two_devices() {
    let m = Machine::new(Config::small_gh200().devices(2));
    assert!(m.can_access_peer(0, 1).unwrap() && !m.can_access_peer(0, 0).unwrap());
    m.enable_peer(0, 1).unwrap();
    assert_eq!(m.enable_peer(0, 1).unwrap_err().code, Code::PEER_ACCESS_ALREADY_ENABLED);
    let (a, b) = (m.alloc_device(0, MIB).unwrap(), m.alloc_device(1, MIB).unwrap());
    m.write(0, a, &[3; 100]).unwrap();
    m.memcpy(1, b.0, a.0, 100, CopyKind::DeviceToDevice).unwrap();
    let mut out = [0; 100];
    m.read(1, b, &mut out).unwrap();
    assert_eq!((out[99], m.counters().bytes_d2d), (3, 100));
    let shared = all(m.alloc_managed(0, 4 * MIB).unwrap(), 4 * MIB);
    prefetch(&m, shared, DEV);
    prefetch(&m, shared, Location::Device(1));
    assert_eq!(m.residency_of(shared).unwrap().devices, [0, 4 * MIB]);
    let event = m.event_create(1, false).unwrap();
    assert_eq!(m.event_record(0, event, Stream(0)).unwrap_err().code, Code::INVALID_HANDLE);
    m.event_record(1, event, Stream(0)).unwrap();
}

#[test]
fn the_listener_hears_of_host_memory() {
    let m = machine();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let (inside, other) = (Arc::clone(&heard), m.clone());
    m.on_host_memory_change(move |memory| {
        // No lock is held: the machine may be asked.
        assert_eq!(other.host_memory_now(), memory);
        inside.lock().unwrap().push(memory.available);
    });
    let a = m.alloc_managed(0, GIB).unwrap();
    prefetch(&m, all(a, GIB), Location::Host);
    m.free(0, a).unwrap();
    assert_eq!(*heard.lock().unwrap(), [10 * GIB, 9 * GIB, 10 * GIB]);
}

#[test]
fn pointers_are_known() {
    let m = machine();
    let (d, a) = (m.alloc_device(0, 100).unwrap(), m.alloc_managed(0, MIB).unwrap());
    let (p, own) = (m.host_alloc(0, MIB).unwrap(), vec![0u8; 8192]);
    let mine = own.as_ptr() as u64;
    m.host_register(0, mine, 8192).unwrap();
    assert_eq!(m.host_register(0, mine + 1, 10).unwrap_err().code, Code::HOST_MEMORY_ALREADY_REGISTERED);
    for (address, kind, base, bytes) in [
        (d.0 + 9, PointerKind::Device, d.0, 100),
        (a.0 + 9, PointerKind::Managed, a.0, MIB),
        (p + 9, PointerKind::PinnedHost, p, MIB),
        (mine + 9, PointerKind::RegisteredHost, mine, 8192),
        (mine + 9000, PointerKind::Unregistered, mine + 9000, 0),
    ] {
        let info = m.pointer_info(address).unwrap();
        assert_eq!((info.kind, info.base, info.bytes), (kind, base, bytes));
    }
    assert_eq!(m.address_range(d.offset(50)).unwrap(), all(d, 100));
    m.host_unregister(0, mine).unwrap();
    assert_eq!(m.host_unregister(0, mine).unwrap_err().code, Code::HOST_MEMORY_NOT_REGISTERED);
    m.host_free(0, p).unwrap();
    assert_eq!(m.host_free(0, p).unwrap_err().code, Code::INVALID_VALUE);
    let handle = m.ipc_handle(0, d).unwrap();
    assert_eq!(m.ipc_open(0, &handle).unwrap(), d);
    m.ipc_close(0, d).unwrap();
    assert!(m.ipc_close(0, d).is_err());
    m.free(0, d).unwrap();
    assert!(m.ipc_open(0, &handle).is_err() && m.ipc_open(0, &IpcHandle([0; 64])).is_err());
}

#[test]
fn rows_are_copied() {
    let m = machine();
    let d = m.alloc_device(0, 4096).unwrap();
    let source: Vec<u8> = (0..64).collect();
    let rows = Rows { width: 4, height: 3, dst_pitch: 8, src_pitch: 16 };
    m.memcpy_2d_async(0, d.0, source.as_ptr() as u64, rows, CopyKind::HostToDevice, Stream(0)).unwrap();
    let mut out = [0; 24];
    m.read(0, d, &mut out).unwrap();
    assert_eq!(out[..4], [0, 1, 2, 3]);
    assert_eq!(out[8..12], [16, 17, 18, 19]);
    assert_eq!(out[16..20], [32, 33, 34, 35]);
    let bad = Rows { dst_pitch: 2, ..rows };
    assert!(m.memcpy_2d_async(0, d.0, source.as_ptr() as u64, bad, CopyKind::HostToDevice, Stream(0)).is_err());
}

/// Memory of less than 2 MiB lies on pages of its own, whatever the host's page: what becomes of one allocation does not
/// touch its neighbours.
#[test]
fn hosts_with_large_pages() {
    for page in [4 << 10, 64 << 10] {
        let m = Machine::new(Config::small_gh200().host_page(page));
        let bytes = 96 << 10;
        let managed = [(); 3].map(|()| m.alloc_managed(0, bytes).unwrap());
        let device = [(); 3].map(|()| m.alloc_device(0, bytes).unwrap());
        for [left, middle, right] in [managed, device] {
            for (ptr, value) in [(left, 1), (middle, 2), (right, 3)] {
                assert_eq!(ptr.0 % page, 0);
                m.memset_async(0, ptr.0, value, 1, bytes, Stream(0)).unwrap();
            }
            // From the middle of one page to the middle of the next: with pages of 64 KiB there is no whole one between.
            m.memset_async(0, middle.0 + (24 << 10), 0, 1, 64 << 10, Stream(0)).unwrap();
            m.stream_synchronize(0, Stream(0)).unwrap();
            let read = |ptr: DevicePtr, offset: u64| {
                let mut out = [0];
                m.read(0, ptr.offset(offset), &mut out).unwrap();
                out[0]
            };
            let end = bytes - 1;
            assert_eq!([read(left, end), read(middle, 0), read(middle, end), read(right, 0)], [1, 2, 2, 3]);
            assert_eq!([(24 << 10) - 1, 24 << 10, (88 << 10) - 1, 88 << 10].map(|at| read(middle, at)), [2, 0, 0, 2]);
            m.free(0, middle).unwrap();
            assert_eq!([read(left, end), read(right, 0)], [1, 3]);
        }
        m.check_books().unwrap();
    }
}

/// A little of everything through the [`Driver`] face; cleans up after itself whatever fails.
fn scenario(d: &SimDriver) -> torch_uvm::driver::Result<()> {
    let stream = d.stream_create(0)?;
    let run = || -> torch_uvm::driver::Result<()> {
        let ptr = d.alloc_managed(0, 8 * MIB)?;
        let inner = || -> torch_uvm::driver::Result<()> {
            d.advise(0, all(ptr, 8 * MIB), Advice::SetPreferredLocation(DEV))?;
            d.prefetch(0, all(ptr, 4 * MIB), DEV, stream)?;
            let event = d.event_create(0)?;
            let waited = d.event_record(0, event, stream).and_then(|()| d.event_synchronize(0, event));
            d.event_destroy(0, event).or_else(|_| d.event_destroy(0, event))?;
            waited?;
            d.stream_synchronize(0, stream)
        };
        let result = inner();
        d.free(0, ptr).or_else(|_| d.free(0, ptr))?;
        result
    };
    let result = run();
    d.stream_destroy(0, stream).or_else(|_| d.stream_destroy(0, stream))?;
    result
}

#[test]
fn every_call_can_fail_once_and_a_failed_call_changes_nothing() {
    let d = SimDriver::new(Config::small_gh200());
    scenario(&d).unwrap();
    let calls = d.machine().calls();
    assert_eq!(calls[&EntryPoint::AllocManaged], 1);
    for (&call, &count) in &calls {
        for n in 1..=count {
            let d = SimDriver::new(Config::small_gh200());
            d.machine().inject(Fault { call: Some(call), which: Which::Nth(n), code: Code::UNKNOWN });
            let result = scenario(&d);
            assert_eq!(d.machine().faults_hit(), 1, "{call:?}");
            if let Err(error) = result {
                assert_eq!((error.kind, error.code, error.call), (ErrorKind::Other, 999, call.driver_name()));
            }
            let live = d.machine().live();
            assert!(
                live.allocations.is_empty() && live.streams.is_empty() && live.events.is_empty(),
                "{call:?} {live:?}"
            );
        }
    }
    d.machine().inject(Fault { call: EntryPoint::parse("cudaMalloc"), which: Which::Every, code: Code::OUT_OF_MEMORY });
    for _ in 0..2 {
        assert_eq!(d.alloc_device(0, 1).unwrap_err().kind, ErrorKind::OutOfMemory);
    }
    d.machine().clear_faults();
    d.alloc_device(0, 1).unwrap();
}

#[derive(Clone, Debug)]
enum Do {
    Managed(u64),
    Plain(u64),
    Free(usize),
    Prefetch(usize, u64, u64, bool),
    Touch(usize, u64, u64, bool),
    HostTouch(usize, u64, u64, bool),
    Advise(usize, u64, u64, usize),
    Discard(usize, u64, u64),
    Others(u64),
}

fn any_do() -> impl Strategy<Value = Do> {
    let (pages, at, which) = (1..200u64, 0..200u64, 0..8usize);
    prop_oneof![
        pages.clone().prop_map(Do::Managed),
        pages.clone().prop_map(Do::Plain),
        which.clone().prop_map(Do::Free),
        (which.clone(), at.clone(), pages.clone(), any::<bool>()).prop_map(|(w, a, p, b)| Do::Prefetch(w, a, p, b)),
        (which.clone(), at.clone(), pages.clone(), any::<bool>()).prop_map(|(w, a, p, b)| Do::Touch(w, a, p, b)),
        (which.clone(), at.clone(), pages.clone(), any::<bool>()).prop_map(|(w, a, p, b)| Do::HostTouch(w, a, p, b)),
        (which.clone(), at.clone(), pages.clone(), 0..7usize).prop_map(|(w, a, p, n)| Do::Advise(w, a, p, n)),
        (which, at, pages).prop_map(|(w, a, p)| Do::Discard(w, a, p)),
        (0..100u64).prop_map(Do::Others),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is done, in whatever order: every byte is counted once where it is, nothing holds more than it has, and
    /// when all is freed all is free.
    #[test]
    fn the_books_balance(coherent in any::<bool>(), devices in 1..3i32, doings in prop::collection::vec(any_do(), 1..60)) {
        let profile = if coherent { Profile::gh200() } else { Profile::h100() };
        let config = Config::new(profile).device_memory(256 * MIB).host_memory(512 * MIB).devices(devices);
        let m = Machine::new(config);
        let stream = m.stream_create(0, true, 0).unwrap();
        let mut live: Vec<(DevicePtr, u64, bool)> = Vec::new();
        let within = |live: &[(DevicePtr, u64, bool)], which: usize, at: u64, pages: u64| {
            let managed: Vec<_> = live.iter().filter(|(_, _, managed)| *managed).collect();
            let &&(ptr, bytes, _) = managed.get(which % managed.len().max(1))?;
            let at = (at * MIB).min(bytes - 1);
            Some(all(ptr.offset(at), (pages * MIB).min(bytes - at)))
        };
        for (n, doing) in doings.into_iter().enumerate() {
            let device = n as i32 % devices;
            match doing {
                Do::Managed(pages) => live.push((m.alloc_managed(device, pages * 2 * MIB - 5).unwrap(), pages * 2 * MIB - 5, true)),
                Do::Plain(pages) => {
                    if let Ok(ptr) = m.alloc_device(device, pages * MIB / 2) {
                        live.push((ptr, pages * MIB / 2, false));
                    }
                }
                Do::Free(which) if !live.is_empty() => {
                    let (ptr, ..) = live.swap_remove(which % live.len());
                    m.free(device, ptr).unwrap();
                }
                Do::Prefetch(w, a, p, host) => {
                    if let Some(range) = within(&live, w, a, p) {
                        let to = if host { Location::Host } else { Location::Device(device) };
                        m.prefetch(device, range, to, stream).unwrap();
                    }
                }
                Do::Touch(w, a, p, write) => {
                    if let Some(range) = within(&live, w, a, p) {
                        m.launch_kernel(device, Stream(0), vec![Access { range, write }]).unwrap();
                    }
                }
                Do::HostTouch(w, a, p, write) => {
                    if let Some(range) = within(&live, w, a, p) {
                        m.host_touch(range, write);
                    }
                }
                Do::Advise(w, a, p, which) => {
                    if let Some(range) = within(&live, w, a, p) {
                        let here = Location::Device(device);
                        let advice = [
                            Advice::SetPreferredLocation(here),
                            Advice::SetPreferredLocation(Location::Host),
                            Advice::UnsetPreferredLocation,
                            Advice::SetAccessedBy(here),
                            Advice::UnsetAccessedBy(here),
                            Advice::SetReadMostly,
                            Advice::UnsetReadMostly,
                        ];
                        m.advise(device, range, advice[which]).unwrap();
                    }
                }
                Do::Discard(w, a, p) => {
                    if let Some(range) = within(&live, w, a, p) {
                        m.discard(device, &[range], stream).unwrap();
                    }
                }
                Do::Others(mib) => m.set_others_host_memory(mib * MIB),
                Do::Free(_) => {}
            }
            m.check_books().map_err(TestCaseError::fail)?;
        }
        for device in 0..devices {
            m.device_synchronize(device).unwrap();
        }
        m.check_books().map_err(TestCaseError::fail)?;
        for (ptr, ..) in live {
            m.free(0, ptr).unwrap();
        }
        m.set_others_host_memory(0);
        m.check_books().map_err(TestCaseError::fail)?;
        for device in 0..devices {
            prop_assert_eq!(m.device_memory(device).unwrap().free, 256 * MIB);
        }
        prop_assert_eq!(m.host_memory().unwrap().available, 512 * MIB);
        prop_assert_eq!(m.residency(), Residency { devices: vec![0; devices as usize], ..Residency::default() });
    }
}
