//! Every call can be made to fail by its own name, and by no other.

use std::os::fd::AsFd;
use torch_uvm::driver::{Advice, CaptureMode, Driver, Event, Location, Range, Stream};
use torch_uvm_sim::{
    Chunk, Code, Config, CopyKind, DevicePtr, EntryPoint, Fault, GraphExecId, GraphId, IpcHandle, Machine, SimDriver,
    SimResult, Which,
};

/// Calls an entry point. A planted fault strikes before the arguments are looked at, so any will do.
fn call(machine: &Machine, entry_point: EntryPoint) -> SimResult<()> {
    let (ptr, stream, event) = (DevicePtr(0), Stream(0), Event(0));
    let range = Range { ptr, bytes: 0 };
    let (graph, exec, chunk) = (GraphId(0), GraphExecId(0), Chunk(0));
    match entry_point {
        EntryPoint::DeviceCount => machine.device_count().map(drop),
        EntryPoint::DeviceInfo => machine.device_info(0).map(drop),
        EntryPoint::DeviceMemory => machine.device_memory(0).map(drop),
        EntryPoint::HostMemory => machine.host_memory().map(drop),
        EntryPoint::AllocManaged => machine.alloc_managed(0, 1).map(drop),
        EntryPoint::AllocDevice => machine.alloc_device(0, 1).map(drop),
        EntryPoint::Free => machine.free(0, ptr),
        EntryPoint::Advise => machine.advise(0, range, Advice::SetReadMostly),
        EntryPoint::Prefetch => machine.prefetch(0, range, Location::Host, stream),
        EntryPoint::Discard => machine.discard(0, &[range], stream),
        EntryPoint::DiscardAndPrefetch => machine.discard_and_prefetch(0, &[range], Location::Host, stream),
        EntryPoint::RangeAttribute => machine.range_advice(range).map(drop),
        EntryPoint::PointerInfo => machine.pointer_info(0).map(drop),
        EntryPoint::AddressRange => machine.address_range(ptr).map(drop),
        EntryPoint::HostAlloc => machine.host_alloc(0, 1).map(drop),
        EntryPoint::HostFree => machine.host_free(0, 0),
        EntryPoint::HostRegister => machine.host_register(0, 0, 0),
        EntryPoint::HostUnregister => machine.host_unregister(0, 0),
        EntryPoint::Memcpy => machine.memcpy(0, 0, 0, 0, CopyKind::Default),
        EntryPoint::MemcpyAsync => machine.memcpy_async(0, 0, 0, 0, CopyKind::Default, stream),
        EntryPoint::Memset => machine.memset(0, 0, 0, 1, 0),
        EntryPoint::MemsetAsync => machine.memset_async(0, 0, 0, 1, 0, stream),
        EntryPoint::LaunchKernel => machine.launch_kernel(0, stream, Vec::new()),
        EntryPoint::LaunchHostFunc => machine.launch_host_func(0, stream, std::sync::Arc::new(|| {})),
        EntryPoint::StreamCreate => machine.stream_create(0, true, 0).map(drop),
        EntryPoint::StreamDestroy => machine.stream_destroy(0, stream),
        EntryPoint::StreamSynchronize => machine.stream_synchronize(0, stream),
        EntryPoint::StreamQuery => machine.stream_query(0, stream).map(drop),
        EntryPoint::StreamWaitEvent => machine.stream_wait_event(0, stream, event),
        EntryPoint::StreamIsCapturing => machine.stream_is_capturing(0, stream).map(drop),
        EntryPoint::StreamInfo => machine.stream_info(0, stream).map(drop),
        EntryPoint::DeviceSynchronize => machine.device_synchronize(0),
        EntryPoint::EventCreate => machine.event_create(0, false).map(drop),
        EntryPoint::EventRecord => machine.event_record(0, event, stream),
        EntryPoint::EventQuery => machine.event_query(0, event).map(drop),
        EntryPoint::EventSynchronize => machine.event_synchronize(0, event),
        EntryPoint::EventElapsed => machine.event_elapsed(0, event, event).map(drop),
        EntryPoint::EventDestroy => machine.event_destroy(0, event),
        EntryPoint::ExchangeCaptureMode => machine.exchange_capture_mode(CaptureMode::Global).map(drop),
        EntryPoint::BeginCapture => machine.begin_capture(0, stream, CaptureMode::Global),
        EntryPoint::EndCapture => machine.end_capture(0, stream).map(drop),
        EntryPoint::CaptureInfo => machine.capture_info(0, stream).map(drop),
        EntryPoint::UpdateCaptureDependencies => machine.update_capture_dependencies(0, stream, &[], false),
        EntryPoint::GraphCreate => machine.graph_create().map(drop),
        EntryPoint::GraphDestroy => machine.graph_destroy(graph),
        EntryPoint::GraphNodes => machine.graph_nodes(graph).map(drop),
        EntryPoint::GraphInstantiate => machine.graph_instantiate(graph).map(drop),
        EntryPoint::GraphExecDestroy => machine.graph_exec_destroy(exec),
        EntryPoint::GraphLaunch => machine.graph_launch(0, exec, stream),
        EntryPoint::IpcHandle => machine.ipc_handle(0, ptr).map(drop),
        EntryPoint::IpcOpen => machine.ipc_open(0, &IpcHandle([0; 64])).map(drop),
        EntryPoint::IpcClose => machine.ipc_close(0, ptr),
        EntryPoint::ChunkGranularity => machine.chunk_granularity(Location::Host).map(drop),
        EntryPoint::AddressReserve => machine.address_reserve(0, 0).map(drop),
        EntryPoint::AddressFree => machine.address_free(range),
        EntryPoint::ChunkCreate => machine.chunk_create(Location::Host, 0, false).map(drop),
        EntryPoint::ChunkRelease => machine.chunk_release(chunk),
        EntryPoint::ChunkRetain => machine.chunk_retain(0).map(drop),
        EntryPoint::ChunkInfo => machine.chunk_info(chunk).map(drop),
        EntryPoint::ChunkExport => machine.chunk_export(chunk).map(drop),
        EntryPoint::ChunkImport => machine.chunk_import(std::io::stdin().as_fd()).map(drop),
        EntryPoint::ChunkMap => machine.chunk_map(range, chunk),
        EntryPoint::ChunkUnmap => machine.chunk_unmap(range),
        EntryPoint::SetAccess => machine.set_access(range, &[]),
        EntryPoint::GetAccess => machine.has_access(0, Location::Host).map(drop),
        EntryPoint::CanAccessPeer => machine.can_access_peer(0, 0).map(drop),
        EntryPoint::EnablePeer => machine.enable_peer(0, 0),
        EntryPoint::DisablePeer => machine.disable_peer(0, 0),
    }
}

fn plant(machine: &Machine, entry_point: EntryPoint) {
    machine.inject(Fault { call: Some(entry_point), which: Which::Nth(1), code: Code::LAUNCH_TIMEOUT });
}

#[test]
fn each_call_fails_by_its_own_name() {
    for &entry_point in EntryPoint::ALL {
        let machine = Machine::new(Config::small_gh200());
        plant(&machine, entry_point);
        let error = call(&machine, entry_point).expect_err(entry_point.method());
        assert_eq!((error.code, error.call), (Code::LAUNCH_TIMEOUT, entry_point.driver_name()));
        assert_eq!(machine.calls().into_iter().collect::<Vec<_>>(), [(entry_point, 1)], "counted once, by its name");
        assert_eq!(machine.faults_hit(), 1);
    }
}

/// A method of [`Driver`], by its name, and a call of it.
type Method = (&'static str, fn(&SimDriver) -> torch_uvm::driver::Result<()>);

const EMPTY: Range = Range { ptr: DevicePtr(0), bytes: 0 };

const METHODS: &[Method] = &[
    ("device_count", |d| d.device_count().map(drop)),
    ("device_info", |d| d.device_info(0).map(drop)),
    ("device_memory", |d| d.device_memory(0).map(drop)),
    ("host_memory", |d| d.host_memory().map(drop)),
    ("alloc_managed", |d| d.alloc_managed(0, 1).map(drop)),
    ("alloc_device", |d| d.alloc_device(0, 1).map(drop)),
    ("free", |d| d.free(0, DevicePtr(0))),
    ("advise", |d| d.advise(0, EMPTY, Advice::SetReadMostly)),
    ("prefetch", |d| d.prefetch(0, EMPTY, Location::Host, Stream(0))),
    ("discard", |d| d.discard(0, EMPTY, Stream(0))),
    ("stream_create", |d| d.stream_create(0).map(drop)),
    ("stream_destroy", |d| d.stream_destroy(0, Stream(0))),
    ("stream_synchronize", |d| d.stream_synchronize(0, Stream(0))),
    ("stream_is_capturing", |d| d.stream_is_capturing(0, Stream(0)).map(drop)),
    ("device_synchronize", |d| d.device_synchronize(0)),
    ("event_create", |d| d.event_create(0).map(drop)),
    ("event_record", |d| d.event_record(0, Event(0), Stream(0))),
    ("stream_wait_event", |d| d.stream_wait_event(0, Stream(0), Event(0))),
    ("event_query", |d| d.event_query(0, Event(0)).map(drop)),
    ("event_synchronize", |d| d.event_synchronize(0, Event(0))),
    ("event_destroy", |d| d.event_destroy(0, Event(0))),
    ("exchange_capture_mode", |d| d.exchange_capture_mode(CaptureMode::Global).map(drop)),
    ("ipc_handle", |d| d.ipc_handle(0, DevicePtr(0)).map(drop)),
    ("chunk_granularity", |d| d.chunk_granularity(Location::Device(0)).map(drop)),
    ("address_reserve", |d| d.address_reserve(0, 0).map(drop)),
    ("address_free", |d| d.address_free(EMPTY)),
    ("chunk_create", |d| d.chunk_create(Location::Device(0), 0, false).map(drop)),
    ("chunk_release", |d| d.chunk_release(Chunk(0))),
    ("chunk_map", |d| d.chunk_map(EMPTY, Chunk(0))),
    ("chunk_unmap", |d| d.chunk_unmap(EMPTY)),
    ("set_access", |d| d.set_access(EMPTY, &[])),
    ("chunk_export", |d| d.chunk_export(Chunk(0)).map(drop)),
    ("chunk_import", |d| d.chunk_import(std::io::stdin().as_fd()).map(drop)),
];

#[test]
fn each_method_of_the_driver_fails_by_its_own_name() {
    for (name, method) in METHODS {
        let driver = SimDriver::new(Config::small_gh200());
        let entry_point = EntryPoint::parse(name).unwrap_or_else(|| panic!("{name} is no entry point"));
        plant(driver.machine(), entry_point);
        let error = method(&driver).expect_err(name);
        assert_eq!((error.code, error.call), (Code::LAUNCH_TIMEOUT.0, entry_point.driver_name()), "{name}");
        assert_eq!(driver.machine().faults_hit(), 1, "{name}");
    }
}
