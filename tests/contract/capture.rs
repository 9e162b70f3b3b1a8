//! What is legal while a stream captures: a table, made by trying every call in every situation.

use std::fmt::Write as _;
use std::os::fd::AsFd;
use std::sync::Mutex;

use torch_uvm::driver::{
    Advice, CaptureMode, Chunk, DevicePtr, Driver, ErrorKind, Event, Location, Range, Result, Stream,
};

use super::machine::{Capture, DEVICE, MIB, Machine, MachineExt};

/// How a stream captures, and from where a call comes meanwhile.
struct Situation {
    name: &'static str,
    /// The mode of the capture.
    mode: CaptureMode,
    /// The call comes from another thread than the one that began the capture.
    other_thread: bool,
    /// The calling thread has exchanged its capture mode for relaxed.
    exchanged: bool,
}

const fn situation(name: &'static str, mode: CaptureMode, other_thread: bool, exchanged: bool) -> Situation {
    Situation { name, mode, other_thread, exchanged }
}

const SITUATIONS: [Situation; 9] = [
    situation("global", CaptureMode::Global, false, false),
    situation("thread-local", CaptureMode::ThreadLocal, false, false),
    situation("relaxed", CaptureMode::Relaxed, false, false),
    situation("global, exchanged", CaptureMode::Global, false, true),
    situation("thread-local, exchanged", CaptureMode::ThreadLocal, false, true),
    situation("relaxed, exchanged", CaptureMode::Relaxed, false, true),
    situation("global, other thread", CaptureMode::Global, true, false),
    situation("global, other thread, exchanged", CaptureMode::Global, true, true),
    situation("thread-local, other thread", CaptureMode::ThreadLocal, true, false),
];

/// What a call finds: a stream that captures, one that does not, and one of everything else.
struct Scene<'a> {
    driver: &'a dyn Driver,
    captured: Stream,
    other: Stream,
    managed: Range,
    device_memory: DevicePtr,
    /// Where chunks of host memory lie, if there are any.
    host: Option<Location>,
    /// A chunk of the device's memory and one of the host's, of 2 MiB.
    chunks: Vec<Chunk>,
    /// Where the first is mapped, and where nothing is.
    mapped: Range,
    unmapped: Range,
    /// Recorded on the other stream before the capture.
    event: Event,
    /// Recorded on the captured stream.
    captured_event: Event,
    /// What remains to be given back at the end.
    owned: Mutex<Owned>,
}

#[derive(Default)]
struct Owned {
    memory: Vec<DevicePtr>,
    streams: Vec<Stream>,
    events: Vec<Event>,
}

impl Scene<'_> {
    fn own(&self) -> std::sync::MutexGuard<'_, Owned> {
        self.owned.lock().unwrap()
    }

    fn free(&self, ptr: DevicePtr) -> Result<()> {
        self.driver.free(DEVICE, ptr)?;
        self.own().memory.retain(|&owned| owned != ptr);
        Ok(())
    }

    fn destroy_event(&self, event: Event) -> Result<()> {
        self.driver.event_destroy(DEVICE, event)?;
        self.own().events.retain(|&owned| owned != event);
        Ok(())
    }

    fn map_and_unmap(&self, chunk: Chunk) -> Result<()> {
        self.driver.chunk_map(self.unmapped, chunk)?;
        self.driver.set_access(self.unmapped, &[Location::Device(DEVICE)])?;
        self.driver.chunk_unmap(self.unmapped)
    }

    fn prefetch(&self, stream: Stream) -> Result<()> {
        self.driver.prefetch(DEVICE, self.managed, Location::Device(DEVICE), stream)
    }
}

type Call = fn(&Scene) -> Result<()>;

/// When a call is legal. There are no other cases (docs/driver-contract.md: measured).
#[derive(Clone, Copy)]
enum Legal {
    /// In every situation.
    Always,
    /// What CUDA calls potentially unsafe: where the thread is relaxed, or the capture does not concern it.
    Relaxed,
    /// In no situation: `CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED`.
    Never,
    /// In no situation: `CUDA_ERROR_CAPTURED_EVENT`.
    NeverOnCapturedEvent,
}

impl Legal {
    /// What the call must give in a situation, as [`observe`] writes it.
    fn expected(self, situation: &Situation) -> &'static str {
        let relaxed = situation.exchanged || situation.mode == CaptureMode::Relaxed;
        let concerned = !situation.other_thread || situation.mode == CaptureMode::Global;
        match self {
            Legal::Always => "ok",
            Legal::Relaxed if relaxed || !concerned => "ok",
            Legal::Relaxed | Legal::Never => "900!",
            Legal::NeverOnCapturedEvent => "907!",
        }
    }
}

/// The legacy default stream, which is not captured.
const LEGACY: Stream = Stream(0);

/// Every call, in the order of the trait, with what the trait says of it.
const CALLS: &[(&str, Legal, Call)] = &[
    ("device_info", Legal::Always, |s| s.driver.device_info(DEVICE).map(drop)),
    ("device_memory", Legal::Always, |s| s.driver.device_memory(DEVICE).map(drop)),
    ("alloc_managed", Legal::Relaxed, |s| s.driver.alloc_managed(DEVICE, 2 * MIB).map(|ptr| s.own().memory.push(ptr))),
    ("alloc_device", Legal::Relaxed, |s| s.driver.alloc_device(DEVICE, 2 * MIB).map(|ptr| s.own().memory.push(ptr))),
    ("free of managed memory", Legal::Relaxed, |s| s.free(s.managed.ptr)),
    ("free of device memory", Legal::Relaxed, |s| s.free(s.device_memory)),
    ("advise, preferred location", Legal::Relaxed, |s| {
        s.driver.advise(DEVICE, s.managed, Advice::SetPreferredLocation(Location::Device(DEVICE)))
    }),
    ("advise, accessed by", Legal::Relaxed, |s| {
        s.driver.advise(DEVICE, s.managed, Advice::SetAccessedBy(Location::Host))
    }),
    ("advise, read mostly", Legal::Relaxed, |s| s.driver.advise(DEVICE, s.managed, Advice::SetReadMostly)),
    ("prefetch on the captured stream", Legal::Never, |s| s.prefetch(s.captured)),
    ("prefetch on another stream", Legal::Always, |s| s.prefetch(s.other)),
    ("prefetch on the legacy stream", Legal::Always, |s| s.prefetch(LEGACY)),
    ("stream_create", Legal::Always, |s| s.driver.stream_create(DEVICE).map(|stream| s.own().streams.push(stream))),
    ("stream_destroy of another stream", Legal::Always, |s| {
        s.driver.stream_destroy(DEVICE, s.other)?;
        s.own().streams.retain(|&owned| owned != s.other);
        Ok(())
    }),
    ("stream_synchronize of the captured stream", Legal::Never, |s| s.driver.stream_synchronize(DEVICE, s.captured)),
    ("stream_synchronize of another stream", Legal::Relaxed, |s| s.driver.stream_synchronize(DEVICE, s.other)),
    ("stream_synchronize of the legacy stream", Legal::Relaxed, |s| s.driver.stream_synchronize(DEVICE, LEGACY)),
    ("stream_is_capturing of the captured stream", Legal::Always, |s| {
        s.driver.stream_is_capturing(DEVICE, s.captured).map(|capturing| assert!(capturing))
    }),
    ("stream_is_capturing of another stream", Legal::Always, |s| {
        s.driver.stream_is_capturing(DEVICE, s.other).map(|capturing| assert!(!capturing))
    }),
    ("stream_is_capturing of the legacy stream", Legal::Always, |s| {
        s.driver.stream_is_capturing(DEVICE, LEGACY).map(|capturing| assert!(!capturing))
    }),
    ("device_synchronize", Legal::Never, |s| s.driver.device_synchronize(DEVICE)),
    ("event_create", Legal::Always, |s| s.driver.event_create(DEVICE).map(|event| s.own().events.push(event))),
    ("event_record on the captured stream", Legal::Always, |s| s.driver.event_record(DEVICE, s.event, s.captured)),
    ("event_record on another stream", Legal::Always, |s| s.driver.event_record(DEVICE, s.event, s.other)),
    ("event_record on the legacy stream", Legal::Always, |s| s.driver.event_record(DEVICE, s.event, LEGACY)),
    ("event_query", Legal::Relaxed, |s| s.driver.event_query(DEVICE, s.event).map(drop)),
    ("event_query of a captured event", Legal::NeverOnCapturedEvent, |s| {
        s.driver.event_query(DEVICE, s.captured_event).map(drop)
    }),
    ("event_synchronize", Legal::Relaxed, |s| s.driver.event_synchronize(DEVICE, s.event)),
    ("event_synchronize of a captured event", Legal::NeverOnCapturedEvent, |s| {
        s.driver.event_synchronize(DEVICE, s.captured_event)
    }),
    ("event_destroy", Legal::Always, |s| s.destroy_event(s.event)),
    ("event_destroy of a captured event", Legal::Always, |s| s.destroy_event(s.captured_event)),
    ("ipc_handle", Legal::Always, |s| s.driver.ipc_handle(DEVICE, s.device_memory).map(drop)),
    ("chunk_granularity", Legal::Always, |s| s.driver.chunk_granularity(Location::Device(DEVICE)).map(drop)),
    ("address_reserve and address_free", Legal::Always, |s| {
        let ptr = s.driver.address_reserve(2 * MIB, 0)?;
        s.driver.address_free(Range { ptr, bytes: 2 * MIB })
    }),
    ("chunk_create and chunk_release, device", Legal::Always, |s| {
        s.driver.chunk_release(s.driver.chunk_create(Location::Device(DEVICE), 2 * MIB, true)?)
    }),
    ("chunk_create and chunk_release, host", Legal::Always, |s| match s.host {
        Some(at) => s.driver.chunk_release(s.driver.chunk_create(at, 2 * MIB, true)?),
        None => Ok(()),
    }),
    ("chunk_map, set_access, chunk_unmap, device", Legal::Always, |s| s.map_and_unmap(s.chunks[0])),
    ("chunk_map, set_access, chunk_unmap, host", Legal::Always, |s| {
        s.chunks.get(1).map_or(Ok(()), |&chunk| s.map_and_unmap(chunk))
    }),
    ("chunk_unmap of a chunk mapped before", Legal::Always, |s| {
        s.driver.chunk_unmap(s.mapped)?;
        s.driver.chunk_map(s.mapped, s.chunks[0])
    }),
    ("chunk_export and chunk_import", Legal::Always, |s| {
        let descriptor = s.driver.chunk_export(s.chunks[0])?;
        s.driver.chunk_release(s.driver.chunk_import(descriptor.as_fd())?)
    }),
];

/// Makes one call in one situation. "ok" or the error's code; "!" where it invalidated the capture, "?" where the
/// capture ended otherwise, "~" for each thing that could not be given back afterwards.
fn observe(machine: &dyn Machine, situation: &Situation, call: Call) -> String {
    let driver = machine.driver();
    let captured = driver.stream_create(DEVICE).unwrap();
    let other = driver.stream_create(DEVICE).unwrap();
    let managed = machine.managed(2 * MIB);
    let device_memory = driver.alloc_device(DEVICE, 2 * MIB).unwrap();
    let [event, captured_event] = [(); 2].map(|()| driver.event_create(DEVICE).unwrap());
    driver.event_record(DEVICE, event, other).unwrap();
    driver.stream_synchronize(DEVICE, other).unwrap();
    let host = driver.device_info(DEVICE).unwrap().host_chunk_location();
    let create = |at| driver.chunk_create(at, 2 * MIB, true).unwrap();
    let chunks: Vec<_> = [Location::Device(DEVICE)].into_iter().chain(host).map(create).collect();
    let [mapped, unmapped] =
        [(); 2].map(|()| Range { ptr: driver.address_reserve(2 * MIB, 0).unwrap(), bytes: 2 * MIB });
    driver.chunk_map(mapped, chunks[0]).unwrap();
    let owned = Owned {
        memory: vec![managed.ptr, device_memory],
        streams: vec![captured, other],
        events: vec![event, captured_event],
    };
    let scene = Scene {
        driver,
        captured,
        other,
        managed,
        device_memory,
        host,
        chunks,
        mapped,
        unmapped,
        event,
        captured_event,
        owned: Mutex::new(owned),
    };

    machine.begin_capture(captured, situation.mode).unwrap();
    driver.event_record(DEVICE, captured_event, captured).unwrap();
    let make_call = || {
        if !situation.exchanged {
            return call(&scene);
        }
        assert_eq!(driver.exchange_capture_mode(CaptureMode::Relaxed), Ok(CaptureMode::Global), "a thread's default");
        let result = call(&scene);
        assert_eq!(driver.exchange_capture_mode(CaptureMode::Global), Ok(CaptureMode::Relaxed));
        result
    };
    let result = if situation.other_thread {
        std::thread::scope(|scope| scope.spawn(make_call).join().unwrap())
    } else {
        make_call()
    };

    let status = machine.capture_status(captured).unwrap();
    assert_eq!(driver.stream_is_capturing(DEVICE, captured), Ok(true), "an invalidated capture counts as one");
    let ended = machine.end_capture(captured).map_err(|error| error.code);
    assert_eq!(driver.stream_is_capturing(DEVICE, captured), Ok(false));
    let survived = match (status, ended) {
        (Capture::Active, Ok(())) => "",
        (Capture::Invalidated, Err(901)) => "!",
        _ => "?",
    };

    let chunks = scene.chunks.iter().map(|&chunk| driver.chunk_release(chunk));
    let unmapping = driver.chunk_unmap(mapped);
    let addresses = [mapped, unmapped].map(|range| driver.address_free(range));
    let kept = [unmapping].into_iter().chain(addresses).chain(chunks).filter(Result::is_err).count();
    // A call that failed has changed nothing: all of it is still there to be given back.
    let owned = scene.owned.into_inner().unwrap();
    let events = owned.events.into_iter().map(|event| driver.event_destroy(DEVICE, event));
    let streams = owned.streams.into_iter().map(|stream| driver.stream_destroy(DEVICE, stream));
    let memory = owned.memory.into_iter().map(|ptr| driver.free(DEVICE, ptr));
    let lost = events.chain(streams).chain(memory).filter(Result::is_err).map(|_| "~").collect::<String>();
    let lost = lost + &"~".repeat(kept);

    let code = result.map_or_else(|error| error.code.to_string(), |()| "ok".to_owned());
    code + survived + &lost
}

/// The whole table of legality holds.
pub fn every_call_in_every_situation(machine: &dyn Machine) {
    let mut table = format!("| call | {} |\n", SITUATIONS.map(|situation| situation.name).join(" | "));
    let mut wrong = String::new();
    for (name, legal, call) in CALLS {
        let _ = write!(table, "| {name} |");
        for situation in &SITUATIONS {
            let found = observe(machine, situation, *call);
            let _ = write!(table, " {found} |");
            let expected = legal.expected(situation);
            if found != expected {
                let _ = writeln!(wrong, "{name}, {}: {found}, not {expected}", situation.name);
            }
        }
        table.push('\n');
    }
    println!("{table}");
    assert!(wrong.is_empty(), "not as the driver's contract says:\n{wrong}");
}

/// A call that spoils a capture gives its error, and the capture's end another.
pub fn an_invalidated_capture_is_told_at_its_end(machine: &dyn Machine) {
    let driver = machine.driver();
    let stream = driver.stream_create(DEVICE).unwrap();
    machine.begin_capture(stream, CaptureMode::Global).unwrap();
    let error = driver.alloc_managed(DEVICE, MIB).unwrap_err();
    assert_eq!((error.kind, error.code), (ErrorKind::StreamCapture, 900), "{error}");
    // Whether a spoilt capture still forbids what it forbade is CUDA's affair.
    let second = driver.alloc_managed(DEVICE, MIB);
    println!("the same call again: {:?}", second.as_ref().map_err(|error| error.code));
    assert_eq!(machine.end_capture(stream).unwrap_err().code, 901);
    if let Ok(ptr) = second {
        machine.free(ptr);
    }
    driver.stream_destroy(DEVICE, stream).unwrap();
}

/// The exchange gives the mode before, for this thread alone.
pub fn the_capture_mode_belongs_to_a_thread(machine: &dyn Machine) {
    let driver = machine.driver();
    assert_eq!(driver.exchange_capture_mode(CaptureMode::ThreadLocal), Ok(CaptureMode::Global));
    assert_eq!(driver.exchange_capture_mode(CaptureMode::Relaxed), Ok(CaptureMode::ThreadLocal));
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(driver.exchange_capture_mode(CaptureMode::Relaxed), Ok(CaptureMode::Global)));
    });
    assert_eq!(driver.exchange_capture_mode(CaptureMode::Global), Ok(CaptureMode::Relaxed));
}

/// Growing a segment inside a capture, as the allocator does it: allocation, advice, population on a side stream,
/// and the bytes are there.
pub fn a_segment_grows_inside_a_capture(machine: &dyn Machine) {
    let driver = machine.driver();
    for mode in [CaptureMode::Global, CaptureMode::ThreadLocal, CaptureMode::Relaxed] {
        let captured = driver.stream_create(DEVICE).unwrap();
        let side = driver.stream_create(DEVICE).unwrap();
        machine.begin_capture(captured, mode).unwrap();

        let before = driver.exchange_capture_mode(CaptureMode::Relaxed).unwrap();
        let range = machine.managed(8 * MIB);
        machine.advise(range, Advice::SetPreferredLocation(Location::Device(DEVICE))).unwrap();
        machine.advise(range, Advice::SetAccessedBy(Location::Host)).unwrap();
        driver.prefetch(DEVICE, Range { ptr: range.ptr, bytes: 4 * MIB }, Location::Device(DEVICE), side).unwrap();
        driver.stream_synchronize(DEVICE, side).unwrap();
        driver.exchange_capture_mode(before).unwrap();

        assert_eq!(machine.capture_status(captured), Ok(Capture::Active), "{mode:?}");
        machine.end_capture(captured).unwrap();
        let bytes = machine.pattern(4 * MIB, 1);
        machine.write(range.ptr, &bytes);
        machine.assert_bytes(range.ptr, &bytes, "populated inside a capture");
        machine.free(range.ptr);
        driver.stream_destroy(DEVICE, side).unwrap();
        driver.stream_destroy(DEVICE, captured).unwrap();
    }
}

/// What a discard is while a stream captures. Not measured on a GPU yet, so there it is told and not asserted.
pub fn discarding_while_a_stream_captures(machine: &dyn Machine) {
    if !machine.driver().device_info(DEVICE).unwrap().discard {
        return;
    }
    let calls: [(&str, Legal, Call); 2] = [
        ("discard on the captured stream", Legal::Never, |s| s.driver.discard(DEVICE, s.managed, s.captured)),
        ("discard on another stream", Legal::Always, |s| s.driver.discard(DEVICE, s.managed, s.other)),
    ];
    for (name, legal, call) in calls {
        for situation in &SITUATIONS {
            let found = observe(machine, situation, call);
            println!("{name}, {}: {found}", situation.name);
            if !machine.is_real() {
                assert_eq!(found, legal.expected(situation), "{name}, {}", situation.name);
            }
        }
    }
}

/// After an invalidated capture the stream works again, also for another capture.
pub fn an_invalidated_capture_can_be_ended_and_repeated(machine: &dyn Machine) {
    let driver = machine.driver();
    let stream = driver.stream_create(DEVICE).unwrap();
    machine.begin_capture(stream, CaptureMode::Global).unwrap();
    driver.device_synchronize(DEVICE).unwrap_err();
    assert_eq!(machine.capture_status(stream), Ok(Capture::Invalidated));
    assert_eq!(driver.stream_is_capturing(DEVICE, stream), Ok(true));
    machine.end_capture(stream).unwrap_err();
    driver.stream_synchronize(DEVICE, stream).unwrap();
    machine.begin_capture(stream, CaptureMode::Global).unwrap();
    machine.end_capture(stream).unwrap();
    driver.stream_destroy(DEVICE, stream).unwrap();
}
