//! What moved and why: counts by cause, peaks by place, and the report of both. A policy that falls back to demand faults shows here.

use torch_uvm_sim::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const DEV: Location = Location::Device(0);
const S: Stream = Stream(0);

/// 2 GiB of device memory and 10 GiB of host memory, without the coherence that would spare it faults.
fn machine() -> Machine {
    let profile = Profile { device_memory: 2 * GIB, host_memory: 10 * GIB, ..Profile::h100() };
    Machine::new(Config { profile, ..Config::small_gh200() })
}

fn all(ptr: DevicePtr, bytes: u64) -> Range {
    Range { ptr, bytes }
}

fn prefetch(m: &Machine, range: Range, to: Location) {
    m.prefetch(0, range, to, S).unwrap();
    m.stream_synchronize(0, S).unwrap();
}

fn touch(m: &Machine, range: Range, write: bool) {
    m.launch_kernel(0, S, vec![Access { range, write }]).unwrap();
    m.stream_synchronize(0, S).unwrap();
}

fn near(nanoseconds: u64, bytes: u64, speed: f64) {
    let expected = bytes as f64 / speed;
    assert!((nanoseconds as f64 - expected).abs() <= 0.001 * expected, "{nanoseconds} ns, not {expected}");
}

#[test]
fn each_cause_has_its_own_figures() {
    let m = machine();
    let costs = m.profile().costs.clone();
    let bytes = 64 * MIB;
    let a = m.alloc_managed(0, bytes).unwrap();
    prefetch(&m, all(a, bytes), Location::Host);
    assert_eq!(m.populated().prefetches.bytes_host, bytes);

    prefetch(&m, all(a, bytes), DEV);
    let prefetches = m.traffic().prefetches;
    assert_eq!((prefetches.count, prefetches.bytes_h2d, prefetches.bytes_d2h), (32, bytes, 0));
    near(prefetches.nanoseconds, bytes, costs.prefetch_h2d);

    prefetch(&m, all(a, bytes), Location::Host);
    assert_eq!((m.traffic().prefetches.count, m.traffic().prefetches.bytes_d2h), (64, bytes));
    assert_eq!(m.traffic().faults, Moved::default());

    touch(&m, all(a, bytes), false);
    let faults = m.traffic().faults;
    assert_eq!((faults.count, faults.bytes_h2d), (32, bytes));
    near(faults.nanoseconds, bytes, costs.migrate_fault);
    assert_eq!(m.counters().device_faults, 32);

    let host = vec![1u8; 5 * MIB as usize];
    m.write(0, a, &host).unwrap();
    let copies = m.traffic().copies;
    assert_eq!((copies.count, copies.bytes_h2d, copies.bytes_d2h), (1, 5 * MIB, 0));
    near(copies.nanoseconds, 5 * MIB, costs.copy_h2d);
    assert_eq!(m.traffic().faults, faults, "the pages were there");
    assert_eq!((m.traffic().remote, m.traffic().evictions), Default::default());

    // The sums of the older counters are those of the causes.
    let (counters, traffic) = (m.counters(), m.traffic());
    assert_eq!(counters.migrations, traffic.prefetches.count + traffic.faults.count);
    assert_eq!(counters.bytes_h2d, traffic.prefetches.bytes_h2d + traffic.faults.bytes_h2d + traffic.copies.bytes_h2d);

    let b = m.alloc_managed(0, bytes).unwrap();
    touch(&m, all(b, bytes), true);
    assert_eq!(m.populated().faults.bytes_device, bytes);
    near(m.populated().faults.nanoseconds, bytes, costs.populate_fault);
    m.reset_counters();
    assert_eq!((m.traffic(), m.populated(), m.counters()), Default::default());
}

#[test]
fn copies_reach_mapped_pages_and_move_others() {
    let m = machine();
    let host = vec![1u8; 3 * MIB as usize];
    let host_preferred = |bytes| {
        let a = m.alloc_managed(0, bytes).unwrap();
        m.advise(0, all(a, bytes), Advice::SetPreferredLocation(Location::Host)).unwrap();
        m.advise(0, all(a, bytes), Advice::SetAccessedBy(DEV)).unwrap();
        prefetch(&m, all(a, bytes), Location::Host);
        a
    };
    let a = host_preferred(8 * MIB);
    m.reset_counters();
    // 3 MiB from 1 MiB on: the bytes that are used count, not their pages.
    m.write(0, a.offset(MIB), &host).unwrap();
    let remote = m.traffic().remote;
    assert_eq!((remote.count, remote.bytes_d2h, remote.bytes_h2d), (2, 3 * MIB, 0));
    assert_eq!((m.counters().migrations, m.counters().device_faults), (0, 0));
    near(remote.nanoseconds, 3 * MIB, m.profile().costs.remote);
    let d = m.alloc_device(0, 2 * MIB).unwrap();
    m.memcpy(0, d.0, a.0, 2 * MIB, CopyKind::Default).unwrap();
    assert_eq!((m.traffic().remote.count, m.traffic().remote.bytes_h2d), (3, 2 * MIB));
    m.memset(0, a.0, 0, 1, 4).unwrap();
    m.device_synchronize(0).unwrap();
    assert_eq!(m.traffic().remote.bytes_d2h, 3 * MIB + 4);
    assert_eq!(m.residency_of(all(a, 8 * MIB)).unwrap().host, 8 * MIB);

    // The same without the mapping: the pages move.
    let b = m.alloc_managed(0, 8 * MIB).unwrap();
    prefetch(&m, all(b, 8 * MIB), Location::Host);
    m.reset_counters();
    m.write(0, b.offset(MIB), &host).unwrap();
    assert_eq!((m.traffic().faults.count, m.traffic().faults.bytes_h2d), (2, 4 * MIB));
    assert_eq!(m.traffic().remote, Moved::default());
}

#[test]
fn a_working_set_beyond_the_device_costs_evictions() {
    let m = machine();
    let bytes = 3 * GIB;
    let a = m.alloc_managed(0, bytes).unwrap();
    for round in 0..3 {
        touch(&m, all(a, bytes), true);
        m.check_books().unwrap();
        let (traffic, counters) = (m.traffic(), m.counters());
        assert_eq!(traffic.evictions.count, counters.evictions);
        assert_eq!(traffic.evictions.bytes_d2h, counters.bytes_d2h);
        // Least recently used, in turn: everything faults, each time.
        assert_eq!(counters.device_faults, (round + 1) * bytes / (2 * MIB));
        assert_eq!(traffic.faults.bytes_h2d, round * bytes);
    }
    assert_eq!(m.peaks().devices[0], Peak { managed: 2 * GIB, plain: 0, total: 2 * GIB });
    assert_eq!(m.peaks().all, bytes);
    // The page that makes room goes before the other one leaves the host.
    let most = GIB + 2 * MIB;
    assert_eq!(m.peaks().host, Peak { managed: most, plain: 0, total: most });
}

#[test]
fn peaks_are_by_place_and_begin_anew() {
    let m = machine();
    let d = m.alloc_device(0, 100 * MIB).unwrap();
    let a = m.alloc_managed(0, 300 * MIB).unwrap();
    prefetch(&m, all(a, 200 * MIB), DEV);
    m.free(0, d).unwrap();
    let pinned = m.host_alloc(0, 50 * MIB).unwrap();
    prefetch(&m, all(a.offset(200 * MIB), 100 * MIB), Location::Host);
    prefetch(&m, all(a, 300 * MIB), DEV);
    let peaks = m.peaks();
    assert_eq!(peaks.devices, [Peak { managed: 300 * MIB, plain: 100 * MIB, total: 300 * MIB }]);
    assert_eq!(peaks.host, Peak { managed: 100 * MIB, plain: 50 * MIB, total: 150 * MIB });
    assert_eq!(peaks.all, 350 * MIB);
    m.host_free(0, pinned).unwrap();
    m.reset_counters();
    assert_eq!(m.peaks().devices, [Peak { managed: 300 * MIB, plain: 0, total: 300 * MIB }]);
    assert_eq!((m.peaks().host, m.peaks().all), (Peak::default(), 300 * MIB));
    m.alloc_device(0, 4 * GIB).unwrap_err();
    assert_eq!((m.counters().out_of_memory, m.peaks().all), (1, 300 * MIB), "what failed was never there");
}

#[test]
fn running_down_books_and_touches_nothing() {
    let m = Machine::new(Config { schedule: Schedule::Late, ..machine().config().clone() });
    let stream = m.stream_create(0, true, 0).unwrap();
    let a = m.alloc_managed(0, 8 * MIB).unwrap();
    let pinned = m.host_alloc(0, 8 * MIB).unwrap();
    // SAFETY: the machine's own memory, of this size.
    unsafe { std::ptr::write_bytes(pinned as *mut u8, 7, 8 << 20) };
    let called = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = called.clone();
    let hold = m.hold(0, stream).unwrap();
    m.prefetch(0, all(a, 8 * MIB), DEV, stream).unwrap();
    m.launch_host_func(
        0,
        stream,
        std::sync::Arc::new(move || {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }),
    )
    .unwrap();
    m.memset_async(0, a.0, 9, 1, 8 * MIB, stream).unwrap();
    m.memcpy_async(0, pinned, a.0, 8 * MIB, CopyKind::Default, stream).unwrap();
    assert_eq!((m.live().pending_operations, m.peaks().all), (5, 8 * MIB));
    m.run_down();
    assert_eq!(m.live().pending_operations, 0);
    assert_eq!((m.peaks().all, m.traffic().copies.bytes_d2h), (16 * MIB, 8 * MIB));
    assert_eq!(called.load(std::sync::atomic::Ordering::Relaxed), 0);
    // SAFETY: as above.
    assert_eq!(unsafe { *(pinned as *const u8) }, 7);
    m.check_books().unwrap();
    hold.release();
}

#[test]
fn the_report_is_json_and_the_same_each_time() {
    let run = || {
        let m = Machine::new(Config { schedule: Schedule::Seeded(5), ..machine().config().clone() });
        let a = m.alloc_managed(0, 3 * GIB).unwrap();
        for step in 0..40 {
            let range = all(a.offset(step * 70 * MIB), 60 * MIB);
            m.prefetch(0, range, if step % 3 == 0 { Location::Host } else { DEV }, S).unwrap();
            m.launch_kernel(0, S, vec![Access { range, write: step % 2 == 0 }]).unwrap();
        }
        m.run_down();
        serde_json::to_string(&m.report().json()).unwrap()
    };
    let text = run();
    assert_eq!(text, run());
    for part in [
        r#""machine":{"device":"h100","#,
        r#""host_memory":10737418240"#,
        r#""schedule":"5""#,
        r#""peaks":{"devices":[{"managed":2147483648,"#,
        r#""traffic":{"copies":{"count":0,"#,
        r#""pending_operations":0"#,
        r#""cuMemPrefetchAsync":40"#,
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}
