//! Stream capture: the table of legal calls as measured on an H200 (driver 580), forks and joins, graphs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use torch_uvm_sim::*;

const SIZE: u64 = 4096;

/// How a call is made while a capture runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Situation {
    /// Plainly, on the capturing thread, by the capture's mode.
    Same(CaptureMode),
    /// The same, between two exchanges of the capture mode.
    Exchanged(CaptureMode),
    /// On another thread, which does not exchange its mode.
    Other(CaptureMode),
    /// On another thread that does.
    OtherExchanged(CaptureMode),
}

use CaptureMode::{Global, Relaxed, ThreadLocal};
use Situation::{Exchanged, Other, OtherExchanged, Same};

const SITUATIONS: [Situation; 12] = [
    Same(Global),
    Same(ThreadLocal),
    Same(Relaxed),
    Exchanged(Global),
    Exchanged(ThreadLocal),
    Exchanged(Relaxed),
    Other(Global),
    Other(ThreadLocal),
    Other(Relaxed),
    OtherExchanged(Global),
    OtherExchanged(ThreadLocal),
    OtherExchanged(Relaxed),
];

/// A call to be tried.
type Call = fn(&Bench) -> SimResult<()>;

struct Bench {
    m: Machine,
    captured: Stream,
    other: Stream,
    managed: DevicePtr,
    device: DevicePtr,
    /// Recorded in the capture, and recorded elsewhere.
    inside: Event,
    outside: Event,
}

fn bench() -> Bench {
    let m = Machine::new(Config::small_gh200());
    let captured = m.stream_create(0, true, 0).unwrap();
    let other = m.stream_create(0, true, 0).unwrap();
    let managed = m.alloc_managed(0, 4 << 20).unwrap();
    let device = m.alloc_device(0, 4 << 20).unwrap();
    let (inside, outside) = (m.event_create(0, false).unwrap(), m.event_create(0, false).unwrap());
    m.event_record(0, outside, other).unwrap();
    m.stream_synchronize(0, other).unwrap();
    Bench { m, captured, other, managed, device, inside, outside }
}

/// Makes a call in a situation: its code (0: success), and whether the capture was spoilt.
fn try_in(situation: Situation, call: Call) -> (i32, bool) {
    let b = bench();
    let (mode, elsewhere, exchanged) = match situation {
        Same(mode) => (mode, false, false),
        Exchanged(mode) => (mode, false, true),
        Other(mode) => (mode, true, false),
        OtherExchanged(mode) => (mode, true, true),
    };
    b.m.begin_capture(0, b.captured, mode).unwrap();
    b.m.memset_async(0, b.device.0, 1, 1, SIZE, b.captured).unwrap();
    b.m.event_record(0, b.inside, b.captured).unwrap();
    let make = || {
        if !exchanged {
            return call(&b);
        }
        assert_eq!(b.m.exchange_capture_mode(Relaxed).unwrap(), Global);
        let result = call(&b);
        assert_eq!(b.m.exchange_capture_mode(Global).unwrap(), Relaxed);
        result
    };
    let result = if elsewhere { std::thread::scope(|s| s.spawn(make).join().unwrap()) } else { make() };
    let spoilt = b.m.capture_info(0, b.captured).unwrap().status == CaptureStatus::Invalidated;
    let ended = b.m.end_capture(0, b.captured);
    if spoilt {
        assert_eq!(ended.unwrap_err().code, Code::STREAM_CAPTURE_INVALIDATED);
        // Ended it is, all the same: the stream can capture again.
        b.m.begin_capture(0, b.captured, Relaxed).unwrap();
        b.m.end_capture(0, b.captured).unwrap();
    } else {
        ended.unwrap();
    }
    (result.map_or_else(|error| error.code.0, |()| 0), spoilt)
}

fn range(ptr: DevicePtr) -> Range {
    Range { ptr, bytes: 2 << 20 }
}

#[test]
fn always_legal() {
    let calls: [(&str, Call); 12] = [
        ("device_info", |b| b.m.device_info(0).map(drop)),
        ("device_memory", |b| b.m.device_memory(0).map(drop)),
        ("prefetch elsewhere", |b| b.m.prefetch(0, range(b.managed), Location::Device(0), b.other)),
        ("prefetch, legacy", |b| b.m.prefetch(0, range(b.managed), Location::Host, Stream(0))),
        ("stream_create", |b| b.m.stream_create(0, true, 0).map(drop)),
        ("stream_destroy", |b| b.m.stream_destroy(0, b.other)),
        ("capture_info", |b| b.m.capture_info(0, b.captured).map(drop)),
        ("event_create", |b| b.m.event_create(0, false).map(drop)),
        ("event_record", |b| b.m.event_record(0, b.outside, b.other)),
        ("event_record, legacy", |b| b.m.event_record(0, b.outside, Stream(0))),
        ("event_destroy", |b| b.m.event_destroy(0, b.inside)),
        ("ipc_handle", |b| b.m.ipc_handle(0, b.device).map(drop)),
    ];
    for (name, call) in calls {
        for situation in SITUATIONS {
            assert_eq!(try_in(situation, call), (0, false), "{name}, {situation:?}");
        }
    }
}

#[test]
fn unsafe_calls() {
    let calls: [(&str, Call); 9] = [
        ("alloc_managed", |b| b.m.alloc_managed(0, SIZE).map(drop)),
        ("alloc_device", |b| b.m.alloc_device(0, SIZE).map(drop)),
        ("free managed", |b| b.m.free(0, b.managed)),
        ("free device", |b| b.m.free(0, b.device)),
        ("advise", |b| b.m.advise(0, range(b.managed), Advice::SetPreferredLocation(Location::Host))),
        ("stream_synchronize", |b| b.m.stream_synchronize(0, b.other)),
        ("stream_synchronize, legacy", |b| b.m.stream_synchronize(0, Stream(0))),
        ("event_query", |b| b.m.event_query(0, b.outside).map(drop)),
        ("event_synchronize", |b| b.m.event_synchronize(0, b.outside)),
    ];
    for (name, call) in calls {
        for situation in SITUATIONS {
            let forbidden = matches!(situation, Same(Global) | Same(ThreadLocal) | Other(Global));
            let expected = if forbidden { (900, true) } else { (0, false) };
            assert_eq!(try_in(situation, call), expected, "{name}, {situation:?}");
        }
    }
}

#[test]
fn never_legal() {
    let calls: [(&str, i32, Call); 5] = [
        ("prefetch there", 900, |b| b.m.prefetch(0, range(b.managed), Location::Device(0), b.captured)),
        ("stream_synchronize there", 900, |b| b.m.stream_synchronize(0, b.captured)),
        ("device_synchronize", 900, |b| b.m.device_synchronize(0)),
        ("event_query inside", 907, |b| b.m.event_query(0, b.inside).map(drop)),
        ("event_synchronize inside", 907, |b| b.m.event_synchronize(0, b.inside)),
    ];
    for (name, code, call) in calls {
        for situation in SITUATIONS {
            assert_eq!(try_in(situation, call), (code, true), "{name}, {situation:?}");
        }
    }
}

#[test]
fn a_spoilt_capture_takes_nothing_more() {
    let b = bench();
    b.m.begin_capture(0, b.captured, Global).unwrap();
    assert_eq!(b.m.alloc_device(0, SIZE).unwrap_err().code.0, 900);
    assert_eq!(b.m.alloc_device(0, SIZE).unwrap_err().code.0, 900, "again");
    assert_eq!(b.m.memset_async(0, b.device.0, 1, 1, SIZE, b.captured).unwrap_err().code.0, 901);
    assert_eq!(b.m.end_capture(0, b.captured).unwrap_err().code.0, 901);
    b.m.alloc_device(0, SIZE).unwrap();
}

#[test]
fn begin_and_end() {
    let b = bench();
    assert_eq!(b.m.begin_capture(0, Stream(0), Relaxed).unwrap_err().code, Code::STREAM_CAPTURE_UNSUPPORTED);
    assert_eq!(b.m.end_capture(0, b.captured).unwrap_err().code, Code::ILLEGAL_STATE);
    b.m.begin_capture(0, b.captured, ThreadLocal).unwrap();
    assert_eq!(b.m.begin_capture(0, b.captured, Relaxed).unwrap_err().code, Code::ILLEGAL_STATE);
    let elsewhere = std::thread::scope(|s| s.spawn(|| b.m.end_capture(0, b.captured)).join().unwrap());
    assert_eq!(elsewhere.unwrap_err().code, Code::STREAM_CAPTURE_WRONG_THREAD);
    let first = b.m.capture_info(0, b.captured).unwrap();
    b.m.end_capture(0, b.captured).unwrap();
    b.m.begin_capture(0, b.captured, Relaxed).unwrap();
    let second = b.m.capture_info(0, b.captured).unwrap();
    assert!(first.status == CaptureStatus::Active && first.id != 0 && first.id != second.id);
    // Any thread may end a relaxed capture.
    std::thread::scope(|s| s.spawn(|| b.m.end_capture(0, b.captured)).join().unwrap()).unwrap();
    assert_eq!(b.m.capture_info(0, b.captured).unwrap().status, CaptureStatus::None);
}

#[test]
fn fork_and_join() {
    let b = bench();
    let done = b.m.event_create(0, false).unwrap();
    let fork = |join: bool| {
        b.m.begin_capture(0, b.captured, Global).unwrap();
        b.m.memset_async(0, b.device.0, 1, 1, SIZE, b.captured).unwrap();
        b.m.event_record(0, b.inside, b.captured).unwrap();
        b.m.stream_wait_event(0, b.other, b.inside).unwrap();
        b.m.memset_async(0, b.device.0, 2, 1, SIZE, b.other).unwrap();
        assert_eq!(b.m.capture_info(0, b.other).unwrap().status, CaptureStatus::Active);
        if join {
            b.m.event_record(0, done, b.other).unwrap();
            b.m.stream_wait_event(0, b.captured, done).unwrap();
            b.m.memset_async(0, b.device.0, 3, 1, SIZE, b.captured).unwrap();
        }
        assert_eq!(b.m.capture_info(0, b.other).unwrap().status, CaptureStatus::Active);
        b.m.end_capture(0, b.captured)
    };
    let graph = fork(true).unwrap();
    let nodes = b.m.graph_nodes(graph).unwrap();
    assert_eq!(nodes.iter().map(|node| node.dependencies.clone()).collect::<Vec<_>>(), [vec![], vec![0], vec![0, 1]]);
    assert_eq!(fork(false).unwrap_err().code, Code::STREAM_CAPTURE_UNJOINED);
    for stream in [b.captured, b.other] {
        assert_eq!(b.m.capture_info(0, stream).unwrap().status, CaptureStatus::None);
    }
}

#[test]
fn a_graph_in_the_making_can_be_looked_at() {
    let b = bench();
    let set = |stream| b.m.memset_async(0, b.device.0, 1, 1, SIZE, stream).unwrap();
    b.m.begin_capture(0, b.captured, Global).unwrap();
    let info = || b.m.capture_info(0, b.captured).unwrap();
    assert_eq!(info().dependencies, []);
    set(b.captured);
    b.m.event_record(0, b.inside, b.captured).unwrap();
    b.m.stream_wait_event(0, b.other, b.inside).unwrap();
    set(b.captured);
    assert_eq!(info().dependencies, [1]);
    assert_eq!(b.m.capture_info(0, b.other).unwrap().dependencies, [0]);
    let graph = info().graph.unwrap();
    assert_eq!(b.m.graph_nodes(graph).unwrap().iter().map(|node| node.dependencies.len()).collect::<Vec<_>>(), [0, 1]);
    assert!(b.m.graph_instantiate(graph).is_err() && b.m.graph_destroy(graph).is_err(), "not before it is whole");
    assert_eq!(b.m.end_capture(0, b.captured).unwrap(), graph);
    b.m.graph_destroy(graph).unwrap();
    assert_eq!(b.m.capture_info(0, b.captured).unwrap().graph, None);
    // A spoilt capture has no graph.
    b.m.begin_capture(0, b.captured, Global).unwrap();
    let graph = b.m.capture_info(0, b.captured).unwrap().graph.unwrap();
    assert!(b.m.alloc_device(0, SIZE).is_err());
    assert_eq!(b.m.capture_info(0, b.captured).unwrap().graph, None);
    assert!(b.m.end_capture(0, b.captured).is_err() && b.m.graph_nodes(graph).is_err());
}

#[test]
fn dependencies_can_be_set() {
    let b = bench();
    let set = || b.m.memset_async(0, b.device.0, 1, 1, SIZE, b.captured).unwrap();
    let update = |nodes: &[usize], instead| b.m.update_capture_dependencies(0, b.captured, nodes, instead);
    assert_eq!(update(&[], true).unwrap_err().code, Code::ILLEGAL_STATE);
    b.m.begin_capture(0, b.captured, Global).unwrap();
    set();
    assert_eq!(update(&[1], false).unwrap_err().code, Code::INVALID_VALUE);
    update(&[], true).unwrap();
    set();
    update(&[0, 1], false).unwrap();
    set();
    update(&[0], true).unwrap();
    set();
    // Node 2 leads nowhere, but was let go on purpose.
    let graph = b.m.end_capture(0, b.captured).unwrap();
    let nodes = b.m.graph_nodes(graph).unwrap();
    let dependencies: Vec<_> = nodes.iter().map(|node| node.dependencies.clone()).collect();
    assert_eq!(dependencies, [vec![], vec![], vec![1, 0], vec![0]]);
}

#[test]
fn what_may_not_be_mixed() {
    // A capturing stream cannot wait for work outside it.
    let b = bench();
    b.m.begin_capture(0, b.captured, Relaxed).unwrap();
    assert_eq!(b.m.stream_wait_event(0, b.captured, b.outside).unwrap_err().code, Code::STREAM_CAPTURE_ISOLATION);
    assert!(b.m.end_capture(0, b.captured).is_err());
    // Two captures cannot become one.
    b.m.begin_capture(0, b.captured, Relaxed).unwrap();
    b.m.begin_capture(0, b.other, Relaxed).unwrap();
    b.m.event_record(0, b.inside, b.captured).unwrap();
    assert_eq!(b.m.stream_wait_event(0, b.other, b.inside).unwrap_err().code, Code::STREAM_CAPTURE_MERGE);
    assert!(b.m.end_capture(0, b.captured).is_err() && b.m.end_capture(0, b.other).is_err());
    // The legacy stream cannot join, nor be used while a blocking stream captures.
    b.m.begin_capture(0, b.captured, Relaxed).unwrap();
    b.m.event_record(0, b.inside, b.captured).unwrap();
    assert_eq!(b.m.stream_wait_event(0, Stream(0), b.inside).unwrap_err().code, Code::STREAM_CAPTURE_IMPLICIT);
    assert!(b.m.end_capture(0, b.captured).is_err());
    let blocking = b.m.stream_create(0, false, 0).unwrap();
    b.m.begin_capture(0, blocking, Relaxed).unwrap();
    assert_eq!(b.m.capture_info(0, Stream(0)).unwrap_err().code, Code::STREAM_CAPTURE_IMPLICIT);
    assert_eq!(b.m.capture_info(0, blocking).unwrap().status, CaptureStatus::Active, "asking spoils nothing");
    assert_eq!(b.m.memset_async(0, b.device.0, 0, 1, 1, Stream(0)).unwrap_err().code, Code::STREAM_CAPTURE_IMPLICIT);
    assert!(b.m.end_capture(0, blocking).is_err());
    // Only the stream that began may end.
    b.m.begin_capture(0, b.captured, Relaxed).unwrap();
    b.m.event_record(0, b.inside, b.captured).unwrap();
    b.m.stream_wait_event(0, b.other, b.inside).unwrap();
    assert_eq!(b.m.end_capture(0, b.other).unwrap_err().code, Code::STREAM_CAPTURE_UNMATCHED);
    assert!(b.m.end_capture(0, b.captured).is_err());
}

#[test]
fn a_graph_replays_what_was_captured_and_nothing_runs_before() {
    let b = bench();
    let called = Arc::new(AtomicU32::new(0));
    b.m.begin_capture(0, b.captured, Global).unwrap();
    b.m.memset_async(0, b.device.0, 5, 1, SIZE, b.captured).unwrap();
    b.m.memcpy_async(0, b.device.0 + SIZE, b.device.0, SIZE, CopyKind::Default, b.captured).unwrap();
    let inside = Arc::clone(&called);
    let count = Arc::new(move || {
        inside.fetch_add(1, Ordering::SeqCst);
    });
    b.m.launch_host_func(0, b.captured, count).unwrap();
    b.m.launch_kernel(0, b.captured, vec![]).unwrap();
    let graph = b.m.end_capture(0, b.captured).unwrap();
    let kinds: Vec<_> = b.m.graph_nodes(graph).unwrap().iter().map(|node| node.kind).collect();
    assert_eq!(kinds, [NodeKind::Memset, NodeKind::Memcpy, NodeKind::Host, NodeKind::Kernel]);
    let exec = b.m.graph_instantiate(graph).unwrap();
    b.m.graph_destroy(graph).unwrap();
    let byte = |at: DevicePtr| {
        let mut out = [0];
        b.m.read(0, at, &mut out).unwrap();
        out[0]
    };
    assert_eq!(byte(b.device.offset(SIZE)), 0);
    for round in 1..=3 {
        b.m.write(0, b.device.offset(SIZE), &[0]).unwrap();
        b.m.graph_launch(0, exec, b.other).unwrap();
        assert_eq!(byte(b.device.offset(SIZE)), 0, "a launch is as late as anything");
        b.m.stream_synchronize(0, b.other).unwrap();
        assert_eq!((byte(b.device.offset(SIZE)), called.load(Ordering::SeqCst)), (5, round));
    }
    // Launched into a capture, it becomes part of that graph.
    b.m.begin_capture(0, b.captured, Global).unwrap();
    b.m.launch_kernel(0, b.captured, vec![]).unwrap();
    b.m.graph_launch(0, exec, b.captured).unwrap();
    b.m.launch_kernel(0, b.captured, vec![]).unwrap();
    let outer = b.m.end_capture(0, b.captured).unwrap();
    let nodes = b.m.graph_nodes(outer).unwrap();
    assert_eq!(nodes.len(), 6);
    assert_eq!(nodes[5].dependencies, [4]);
    b.m.graph_exec_destroy(exec).unwrap();
    assert!(b.m.graph_launch(0, exec, b.other).is_err() && b.m.graph_destroy(graph).is_err());
}

#[test]
fn a_graph_that_outlives_its_memory_breaks_the_device() {
    let b = bench();
    b.m.begin_capture(0, b.captured, Global).unwrap();
    b.m.memset_async(0, b.device.0, 5, 1, SIZE, b.captured).unwrap();
    let graph = b.m.end_capture(0, b.captured).unwrap();
    let exec = b.m.graph_instantiate(graph).unwrap();
    b.m.free(0, b.device).unwrap();
    b.m.graph_launch(0, exec, b.other).unwrap();
    assert_eq!(b.m.stream_synchronize(0, b.other).unwrap_err().code, Code::ILLEGAL_ADDRESS);
    assert_eq!(b.m.alloc_device(0, SIZE).unwrap_err().code, Code::ILLEGAL_ADDRESS, "and stays broken");
}
