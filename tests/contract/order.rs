//! Streams and events: what waits for what.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use torch_uvm::driver::{Advice, CaptureMode, Location, Stream};

use super::machine::{DEVICE, Gate, MIB, Machine, MachineExt};

/// Long enough that a call which does not wait has returned.
const A_WHILE: Duration = Duration::from_millis(60);

/// Whether `call` returns only after `gate` has been opened (by another thread, after a while).
fn waits_for(gate: &Gate, call: impl FnOnce()) -> bool {
    let opened = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(A_WHILE);
            opened.store(true, Ordering::SeqCst);
            gate.open();
        });
        call();
        opened.load(Ordering::SeqCst)
    })
}

/// An event that was never recorded has completed.
pub fn an_event_never_recorded_is_complete(machine: &dyn Machine) {
    let driver = machine.driver();
    let event = driver.event_create(DEVICE).unwrap();
    assert_eq!(driver.event_query(DEVICE, event), Ok(true));
    driver.event_synchronize(DEVICE, event).unwrap();
    driver.event_destroy(DEVICE, event).unwrap();
}

/// An event completes when all that was queued before its record has, and not before.
pub fn an_event_waits_for_what_was_queued_before_it(machine: &dyn Machine) {
    let driver = machine.driver();
    let (stream, gate) = machine.gated_stream();
    let [first, second] = [(); 2].map(|()| driver.event_create(DEVICE).unwrap());
    driver.event_record(DEVICE, first, stream).unwrap();
    driver.event_record(DEVICE, second, stream).unwrap();
    thread::sleep(A_WHILE);
    assert_eq!(driver.event_query(DEVICE, first), Ok(false));
    assert_eq!(driver.event_query(DEVICE, second), Ok(false));
    gate.0.open();
    driver.event_synchronize(DEVICE, second).unwrap();
    assert_eq!(driver.event_query(DEVICE, second), Ok(true));
    assert_eq!(driver.event_query(DEVICE, first), Ok(true), "recorded before one that has completed");
    for event in [first, second] {
        driver.event_destroy(DEVICE, event).unwrap();
    }
    driver.stream_destroy(DEVICE, stream).unwrap();
}

/// A second record replaces the first.
pub fn recording_again_replaces_the_record(machine: &dyn Machine) {
    let driver = machine.driver();
    let (busy, gate) = machine.gated_stream();
    let idle = driver.stream_create(DEVICE).unwrap();
    let event = driver.event_create(DEVICE).unwrap();
    driver.event_record(DEVICE, event, busy).unwrap();
    assert_eq!(driver.event_query(DEVICE, event), Ok(false));
    driver.event_record(DEVICE, event, idle).unwrap();
    driver.event_synchronize(DEVICE, event).unwrap();
    assert_eq!(driver.event_query(DEVICE, event), Ok(true));
    gate.0.open();
    driver.event_destroy(DEVICE, event).unwrap();
    for stream in [busy, idle] {
        driver.stream_synchronize(DEVICE, stream).unwrap();
        driver.stream_destroy(DEVICE, stream).unwrap();
    }
}

/// Destroying a pending event does not wait, and the stream goes on.
pub fn a_pending_event_can_be_destroyed(machine: &dyn Machine) {
    let driver = machine.driver();
    let (stream, gate) = machine.gated_stream();
    let event = driver.event_create(DEVICE).unwrap();
    driver.event_record(DEVICE, event, stream).unwrap();
    // With the gate closed: a call that waited would hang until the gate's own limit.
    driver.event_destroy(DEVICE, event).unwrap();
    assert!(gate.0.is_closed());
    gate.0.open();
    driver.stream_synchronize(DEVICE, stream).unwrap();
    driver.stream_destroy(DEVICE, stream).unwrap();
}

/// Destroying a busy stream does not wait, and its work completes.
pub fn a_busy_stream_can_be_destroyed(machine: &dyn Machine) {
    let driver = machine.driver();
    let (stream, gate) = machine.gated_stream();
    let event = driver.event_create(DEVICE).unwrap();
    driver.event_record(DEVICE, event, stream).unwrap();
    driver.stream_destroy(DEVICE, stream).unwrap();
    assert_eq!(driver.event_query(DEVICE, event), Ok(false), "destroying does not wait");
    gate.0.open();
    driver.event_synchronize(DEVICE, event).unwrap();
    assert_eq!(driver.event_query(DEVICE, event), Ok(true));
    driver.event_destroy(DEVICE, event).unwrap();
}

/// Each way to wait does wait.
pub fn synchronising_waits(machine: &dyn Machine) {
    let driver = machine.driver();
    let event = driver.event_create(DEVICE).unwrap();
    let ways: [(&str, &dyn Fn(Stream)); 3] = [
        ("stream_synchronize", &|stream| driver.stream_synchronize(DEVICE, stream).unwrap()),
        ("event_synchronize", &|_| driver.event_synchronize(DEVICE, event).unwrap()),
        ("device_synchronize", &|_| driver.device_synchronize(DEVICE).unwrap()),
    ];
    for (name, wait) in ways {
        let (stream, gate) = machine.gated_stream();
        driver.event_record(DEVICE, event, stream).unwrap();
        assert!(waits_for(&gate.0, || wait(stream)), "{name} returned before the work had completed");
        assert_eq!(driver.event_query(DEVICE, event), Ok(true), "{name}");
        driver.stream_destroy(DEVICE, stream).unwrap();
    }
    driver.event_destroy(DEVICE, event).unwrap();
}

/// Freeing waits for the device's work: an allocator that holds a lock meanwhile holds it as long.
pub fn freeing_waits_for_the_device(machine: &dyn Machine) {
    let driver = machine.driver();
    let populated = machine.managed(4 * MIB);
    machine.prefetch_and_wait(populated, Location::Device(DEVICE));
    let cases = [
        ("device memory", driver.alloc_device(DEVICE, 4 * MIB).unwrap()),
        ("managed memory", machine.managed(4 * MIB).ptr),
        ("populated managed memory", populated.ptr),
    ];
    for (name, ptr) in cases {
        let (stream, gate) = machine.gated_stream();
        let waited = waits_for(&gate.0, || machine.free(ptr));
        println!("freeing {name} waits for work on another stream: {waited}");
        assert!(waited, "{name}");
        driver.stream_synchronize(DEVICE, stream).unwrap();
        driver.stream_destroy(DEVICE, stream).unwrap();
    }
}

/// The other calls do not wait for the device, with work pending on it.
pub fn other_calls_do_not_wait(machine: &dyn Machine) {
    let driver = machine.driver();
    let (busy, gate) = machine.gated_stream();
    let managed = machine.managed(8 * MIB);
    println!("alloc_managed does not wait");
    let device = driver.alloc_device(DEVICE, 8 * MIB).unwrap();
    println!("alloc_device does not wait");
    machine.advise(managed, Advice::SetPreferredLocation(Location::Device(DEVICE))).unwrap();
    println!("advise does not wait");
    driver.prefetch(DEVICE, managed, Location::Device(DEVICE), busy).unwrap();
    println!("prefetch does not wait");
    driver.device_memory(DEVICE).unwrap();
    let idle = driver.stream_create(DEVICE).unwrap();
    let event = driver.event_create(DEVICE).unwrap();
    driver.event_record(DEVICE, event, idle).unwrap();
    driver.event_synchronize(DEVICE, event).unwrap();
    driver.stream_synchronize(DEVICE, idle).unwrap();
    println!("nor do streams and events");
    assert_eq!(driver.stream_is_capturing(DEVICE, busy), Ok(false));
    assert!(gate.0.is_closed());
    gate.0.open();
    driver.stream_synchronize(DEVICE, busy).unwrap();
    driver.event_destroy(DEVICE, event).unwrap();
    for stream in [busy, idle] {
        driver.stream_destroy(DEVICE, stream).unwrap();
    }
    machine.free(managed.ptr);
    machine.free(device);
}

/// What is queued on a stream after a wait comes after what the event stands for, and nothing waits for an event that was
/// never recorded.
pub fn a_stream_waits_for_an_event(machine: &dyn Machine) {
    let driver = machine.driver();
    let (busy, gate) = machine.gated_stream();
    let idle = driver.stream_create(DEVICE).unwrap();
    let [event, after] = [(); 2].map(|()| driver.event_create(DEVICE).unwrap());
    driver.stream_wait_event(DEVICE, idle, event).unwrap();
    driver.stream_synchronize(DEVICE, idle).unwrap();
    driver.event_record(DEVICE, event, busy).unwrap();
    driver.stream_wait_event(DEVICE, idle, event).unwrap();
    driver.event_record(DEVICE, after, idle).unwrap();
    thread::sleep(A_WHILE);
    assert_eq!(driver.event_query(DEVICE, after), Ok(false));
    gate.0.open();
    driver.event_synchronize(DEVICE, after).unwrap();
    assert_eq!(driver.event_query(DEVICE, event), Ok(true));
    for event in [event, after] {
        driver.event_destroy(DEVICE, event).unwrap();
    }
    for stream in [busy, idle] {
        driver.stream_destroy(DEVICE, stream).unwrap();
    }
}

/// A prefetch is ordered on its stream: its event completes after it, and after what was before it. on its stream: its event completes after it, and after what was before it.
pub fn a_prefetch_is_ordered_on_its_stream(machine: &dyn Machine) {
    let driver = machine.driver();
    let range = machine.managed(8 * MIB);
    let pattern = machine.pattern(range.bytes, 3);
    machine.write(range.ptr, &pattern);
    let (stream, gate) = machine.gated_stream();
    let event = driver.event_create(DEVICE).unwrap();
    driver.prefetch(DEVICE, range, Location::Device(DEVICE), stream).unwrap();
    driver.event_record(DEVICE, event, stream).unwrap();
    assert_eq!(driver.event_query(DEVICE, event), Ok(false));
    gate.0.open();
    driver.event_synchronize(DEVICE, event).unwrap();
    machine.assert_bytes(range.ptr, &pattern, "prefetched");
    driver.event_destroy(DEVICE, event).unwrap();
    driver.stream_destroy(DEVICE, stream).unwrap();
    machine.free(range.ptr);
}

/// A discard runs in the order of its stream: not before what was queued ahead of it, and the call does not wait.
pub fn a_discard_is_ordered_on_its_stream(machine: &dyn Machine) {
    let driver = machine.driver();
    if !driver.device_info(DEVICE).unwrap().discard {
        return;
    }
    let range = machine.managed(8 * MIB);
    machine.prefetch_and_wait(range, Location::Device(DEVICE));
    let (stream, gate) = machine.gated_stream();
    let event = driver.event_create(DEVICE).unwrap();
    driver.discard(DEVICE, range, stream).unwrap();
    driver.event_record(DEVICE, event, stream).unwrap();
    assert_eq!(driver.event_query(DEVICE, event), Ok(false));
    gate.0.open();
    driver.event_synchronize(DEVICE, event).unwrap();
    // Populated after the discard, on another stream: what is written then stays.
    machine.prefetch_and_wait(range, Location::Device(DEVICE));
    let pattern = machine.pattern(range.bytes, 4);
    machine.write(range.ptr, &pattern);
    driver.device_synchronize(DEVICE).unwrap();
    machine.assert_bytes(range.ptr, &pattern, "written after a discard");
    driver.event_destroy(DEVICE, event).unwrap();
    driver.stream_destroy(DEVICE, stream).unwrap();
    machine.free(range.ptr);
}

/// Streams of the driver's making do not wait for one another, nor for the legacy default stream.
pub fn streams_are_independent(machine: &dyn Machine) {
    let driver = machine.driver();
    let (busy, gate) = machine.gated_stream();
    let idle = driver.stream_create(DEVICE).unwrap();
    driver.stream_synchronize(DEVICE, idle).unwrap();
    driver.stream_synchronize(DEVICE, Stream(0)).unwrap();
    assert!(gate.0.is_closed());

    let legacy_gate = super::machine::OpenAtEnd(Gate::default());
    machine.queue_gate(Stream(0), &legacy_gate.0);
    driver.stream_synchronize(DEVICE, idle).unwrap();
    legacy_gate.0.open();
    gate.0.open();
    driver.device_synchronize(DEVICE).unwrap();
    for stream in [busy, idle] {
        driver.stream_destroy(DEVICE, stream).unwrap();
    }
}

/// Any thread may call: one without a context, one with another context; each has afterwards what it had before.
pub fn threads_keep_their_context(machine: &dyn Machine) {
    let driver = machine.driver();
    let all_calls = || {
        let before = machine.current_context();
        let check = |call: &str| assert_eq!(machine.current_context(), before, "after {call}");
        let range = machine.managed(2 * MIB);
        check("alloc_managed");
        let device = driver.alloc_device(DEVICE, 2 * MIB).unwrap();
        check("alloc_device");
        machine.advise(range, Advice::SetReadMostly).unwrap();
        check("advise");
        let stream = driver.stream_create(DEVICE).unwrap();
        check("stream_create");
        driver.prefetch(DEVICE, range, Location::Device(DEVICE), stream).unwrap();
        check("prefetch");
        let event = driver.event_create(DEVICE).unwrap();
        driver.event_record(DEVICE, event, stream).unwrap();
        check("event_record");
        driver.event_synchronize(DEVICE, event).unwrap();
        assert_eq!(driver.event_query(DEVICE, event), Ok(true));
        check("event_query");
        assert_eq!(driver.stream_is_capturing(DEVICE, stream), Ok(false));
        driver.stream_synchronize(DEVICE, stream).unwrap();
        check("stream_synchronize");
        driver.device_memory(DEVICE).unwrap();
        driver.device_synchronize(DEVICE).unwrap();
        driver.ipc_handle(DEVICE, device).unwrap();
        check("ipc_handle");
        driver.free(DEVICE, range.ptr.offset(1)).unwrap_err();
        check("a call that failed");
        driver.event_destroy(DEVICE, event).unwrap();
        driver.stream_destroy(DEVICE, stream).unwrap();
        machine.free(range.ptr);
        machine.free(device);
        check("free");
    };
    all_calls();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                assert!(machine.current_context().is_none_or(|context| context == 0), "a fresh thread has none");
                all_calls();
            });
        }
    });
    machine.with_foreign_context(&mut || all_calls());
}

/// The calls that an allocator makes often take microseconds at most, beside a busy device.
pub fn frequent_calls_take_microseconds(machine: &dyn Machine) {
    const ROUNDS: u32 = 2000;
    let driver = machine.driver();
    let (busy, gate) = machine.gated_stream();
    let [complete, pending] = [(); 2].map(|()| driver.event_create(DEVICE).unwrap());
    driver.event_record(DEVICE, pending, busy).unwrap();
    let measure = |name: &str, call: &dyn Fn()| {
        call();
        let start = Instant::now();
        (0..ROUNDS).for_each(|_| call());
        let each = start.elapsed() / ROUNDS;
        println!("{name}: {each:?}");
        // Loose: a loaded machine is no failure, a call that waits for something is.
        assert!(each < Duration::from_millis(1), "{name} takes {each:?}");
    };
    let calls = || {
        measure("event_query, complete", &|| assert!(driver.event_query(DEVICE, complete).unwrap()));
        measure("event_query, pending", &|| assert!(!driver.event_query(DEVICE, pending).unwrap()));
        measure("stream_is_capturing", &|| assert!(!driver.stream_is_capturing(DEVICE, busy).unwrap()));
        measure("exchange_capture_mode, there and back", &|| {
            let before = driver.exchange_capture_mode(CaptureMode::Relaxed).unwrap();
            driver.exchange_capture_mode(before).unwrap();
        });
        measure("event_create and event_destroy", &|| {
            driver.event_destroy(DEVICE, driver.event_create(DEVICE).unwrap()).unwrap();
        });
    };
    println!("without a current context:");
    calls();
    machine.with_primary_context(&mut || {
        println!("with the primary context current:");
        calls();
        measure("device_memory", &|| assert!(driver.device_memory(DEVICE).is_ok()));
        measure("host_memory", &|| assert!(driver.host_memory().is_ok()));
    });
    gate.0.open();
    driver.stream_synchronize(DEVICE, busy).unwrap();
    driver.stream_destroy(DEVICE, busy).unwrap();
    for event in [complete, pending] {
        driver.event_destroy(DEVICE, event).unwrap();
    }
}
