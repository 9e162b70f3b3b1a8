//! Memory that has more than one address: virtual memory management, and IPC between processes.

use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use torch_uvm_sim::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

const DEVICE: Location = Location::Device(0);
const BY_DEVICE: &[(Location, bool)] = &[(DEVICE, true)];

fn range(at: u64, bytes: u64) -> Range {
    Range { ptr: DevicePtr(at), bytes }
}

fn machine() -> Machine {
    Machine::new(Config::small_gh200())
}

fn byte(m: &Machine, at: u64) -> u8 {
    let mut out = [0];
    m.read(0, DevicePtr(at), &mut out).unwrap();
    out[0]
}

#[test]
fn a_segment_grows_by_mapping() {
    let m = machine();
    let base = m.address_reserve(64 * MIB, 0).unwrap().0;
    assert_eq!(m.device_memory(0).unwrap().free, 2 * GIB, "addresses hold nothing");
    assert!(m.write(0, DevicePtr(base), &[1]).is_err(), "nothing is mapped");
    let mut handles = Vec::new();
    for step in 0..3 {
        let id = m.chunk_create(DEVICE, 20 * MIB, false).unwrap();
        let at = base + step * 20 * MIB;
        m.chunk_map(range(at, 20 * MIB), id).unwrap();
        assert!(m.write(0, DevicePtr(at), &[1]).is_err(), "no access yet");
        m.set_access(range(at, 20 * MIB), BY_DEVICE).unwrap();
        handles.push(id);
    }
    assert_eq!(m.device_memory(0).unwrap().free, 2 * GIB - 60 * MIB);
    // One tensor over two mappings.
    m.memset_async(0, base + 19 * MIB, 7, 1, 2 * MIB, Stream(0)).unwrap();
    m.memcpy(0, base + 39 * MIB, base + 19 * MIB, 2 * MIB, CopyKind::DeviceToDevice).unwrap();
    assert_eq!([byte(&m, base + 20 * MIB), byte(&m, base + 41 * MIB - 1)], [7, 7]);
    assert!(m.memset_async(0, base + 59 * MIB, 7, 1, 2 * MIB, Stream(0)).is_err(), "beyond the mappings");
    assert_eq!(m.pointer_info(base + 30 * MIB).unwrap().kind, PointerKind::Device);
    // The bytes belong to the handle: unmapped and mapped elsewhere, they are still there.
    m.chunk_unmap(range(base + 20 * MIB, 20 * MIB)).unwrap();
    assert_eq!(m.device_memory(0).unwrap().free, 2 * GIB - 60 * MIB);
    let other = m.address_reserve(20 * MIB, 2 * MIB).unwrap().0;
    m.chunk_map(range(other, 20 * MIB), handles[1]).unwrap();
    m.set_access(range(other, 20 * MIB), BY_DEVICE).unwrap();
    assert_eq!(byte(&m, other), 7);
    // Released, it lives as long as it is mapped.
    for id in handles {
        m.chunk_release(id).unwrap();
        assert!(m.chunk_release(id).is_err());
    }
    assert_eq!(m.device_memory(0).unwrap().free, 2 * GIB - 60 * MIB);
    m.chunk_unmap(range(other, 20 * MIB)).unwrap();
    m.chunk_unmap(range(base, 20 * MIB)).unwrap();
    assert!(m.address_free(range(base, 64 * MIB)).is_err(), "still mapped");
    m.chunk_unmap(range(base + 40 * MIB, 20 * MIB)).unwrap();
    m.address_free(range(base, 64 * MIB)).unwrap();
    m.address_free(range(other, 20 * MIB)).unwrap();
    assert_eq!(m.device_memory(0).unwrap().free, 2 * GIB);
    assert!(m.live().is_empty(), "{:?}", m.live());
}

#[test]
fn bad_mappings() {
    let m = machine();
    let base = m.address_reserve(8 * MIB, 0).unwrap().0;
    let id = m.chunk_create(DEVICE, 4 * MIB, false).unwrap();
    let code = |result: SimResult<()>| result.unwrap_err().code.0;
    assert_eq!(m.chunk_create(DEVICE, 3 * MIB, true).unwrap_err().code.0, 1);
    assert_eq!(m.chunk_create(DEVICE, 4 * GIB, true).unwrap_err().code.0, 2);
    assert_eq!(m.address_reserve(1, 0).unwrap_err().code.0, 1);
    assert_eq!(code(m.chunk_map(range(base, 2 * MIB), id)), 1);
    assert_eq!(code(m.chunk_map(range(base + 6 * MIB, 4 * MIB), id)), 1);
    m.chunk_map(range(base + 2 * MIB, 4 * MIB), id).unwrap();
    assert_eq!(code(m.chunk_map(range(base, 4 * MIB), id)), 1);
    assert_eq!(code(m.chunk_unmap(range(base + 2 * MIB, 2 * MIB))), 1);
    assert_eq!(code(m.set_access(range(base, 8 * MIB), BY_DEVICE)), 1);
    assert_eq!(code(m.free(0, DevicePtr(base + 2 * MIB))), 1, "mapped, not allocated");
    m.set_access(range(base + 2 * MIB, 4 * MIB), BY_DEVICE).unwrap();
    assert_eq!(m.ipc_handle(0, DevicePtr(base + 2 * MIB)).unwrap_err().code.0, 1);
    // Unmapping does not wait: work that still needs the memory breaks the device, as on a real one.
    m.memset_async(0, base + 2 * MIB, 1, 1, MIB, Stream(0)).unwrap();
    m.chunk_unmap(range(base + 2 * MIB, 4 * MIB)).unwrap();
    assert_eq!(code(m.stream_synchronize(0, Stream(0))), 700);
}

/// Not a test by itself: the other process of the next one.
#[test]
fn other_process() {
    let Ok(text) = std::env::var("TORCH_UVM_SIM_TEST_HANDLE") else { return };
    let mut handle = [0; 64];
    for (byte, pair) in handle.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    }
    let m = machine();
    let at = m.ipc_open(0, &IpcHandle(handle)).unwrap();
    assert_eq!(m.ipc_open(0, &IpcHandle(handle)).unwrap(), at, "opened twice: the same address");
    assert_eq!(byte(&m, at.0 + 4095), 42);
    assert!(m.free(0, at).is_err());
    m.write(0, at, &[43; 4096]).unwrap();
    m.ipc_close(0, at).unwrap();
    m.ipc_close(0, at).unwrap();
    assert!(m.ipc_close(0, at).is_err() && m.live().is_empty());
}

#[test]
fn another_process_reads_and_writes_the_same_bytes() {
    let m = machine();
    for bytes in [4096, 4 * MIB] {
        let a = m.alloc_device(0, bytes).unwrap();
        m.memset_async(0, a.0, 42, 1, bytes, Stream(0)).unwrap();
        m.stream_synchronize(0, Stream(0)).unwrap();
        let handle: String = m.ipc_handle(0, a).unwrap().0.iter().map(|byte| format!("{byte:02x}")).collect();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "other_process"])
            .env("TORCH_UVM_SIM_TEST_HANDLE", handle)
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
        assert_eq!([byte(&m, a.0), byte(&m, a.0 + 4095)], [43, 43]);
        m.free(0, a).unwrap();
    }
}

/// Not a test by itself: the other process of the next one.
#[test]
fn other_process_with_a_descriptor() {
    let Ok(bytes) = std::env::var("TORCH_UVM_SIM_TEST_DESCRIPTOR") else { return };
    let bytes: u64 = bytes.parse().unwrap();
    let m = machine();
    let id = m.chunk_import(std::io::stdin().as_fd()).unwrap();
    assert_eq!(m.chunk_info(id).unwrap(), (DEVICE, false));
    assert_eq!(m.chunk_export(id).unwrap_err().code.0, 1, "another process's memory");
    let at = m.address_reserve(bytes, 0).unwrap().0;
    m.chunk_map(range(at, bytes), id).unwrap();
    m.set_access(range(at, bytes), BY_DEVICE).unwrap();
    assert_eq!([byte(&m, at), byte(&m, at + bytes - 1)], [42, 42]);
    assert_eq!(m.device_memory(0).unwrap().free, 2 * GIB, "in the other process's books");
    m.write(0, DevicePtr(at), &[43; 4096]).unwrap();
    m.chunk_unmap(range(at, bytes)).unwrap();
    m.chunk_release(id).unwrap();
    m.address_free(range(at, bytes)).unwrap();
    assert!(m.live().is_empty(), "{:?}", m.live());
}

#[test]
fn another_process_maps_the_same_bytes() {
    let m = machine();
    // Not the first of the zone: the place in the file matters.
    let before = m.chunk_create(DEVICE, 2 * MIB, false).unwrap();
    let bytes = 4 * MIB;
    let id = m.chunk_create(DEVICE, bytes, true).unwrap();
    let at = m.address_reserve(bytes, 0).unwrap().0;
    m.chunk_map(range(at, bytes), id).unwrap();
    m.set_access(range(at, bytes), BY_DEVICE).unwrap();
    m.memset_async(0, at, 42, 1, bytes, Stream(0)).unwrap();
    m.stream_synchronize(0, Stream(0)).unwrap();
    assert_eq!(m.chunk_export(before).unwrap_err().code.0, 1, "not made to be exported");
    let descriptor = m.chunk_export(id).unwrap();
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "other_process_with_a_descriptor"])
        .env("TORCH_UVM_SIM_TEST_DESCRIPTOR", bytes.to_string())
        .stdin(Stdio::from(descriptor))
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!([byte(&m, at), byte(&m, at + 4095), byte(&m, at + 4096)], [43, 43, 42]);
}

#[test]
fn memory_is_held_as_often_as_it_was_taken() {
    let m = machine();
    let id = m.chunk_create(DEVICE, 2 * MIB, true).unwrap();
    let at = m.address_reserve(2 * MIB, 0).unwrap().0;
    m.chunk_map(range(at, 2 * MIB), id).unwrap();
    assert_eq!(m.chunk_retain(at + MIB).unwrap(), id);
    assert_eq!(m.chunk_retain(at + 2 * MIB).unwrap_err().code.0, 1);
    let descriptor = m.chunk_export(id).unwrap();
    assert_eq!(m.chunk_import(descriptor.as_fd()).unwrap(), id, "this process's own");
    m.chunk_unmap(range(at, 2 * MIB)).unwrap();
    for _ in 0..3 {
        assert_eq!(m.device_memory(0).unwrap().free, 2 * GIB - 2 * MIB);
        m.chunk_release(id).unwrap();
    }
    assert_eq!(m.device_memory(0).unwrap().free, 2 * GIB - 2 * MIB, "the file descriptor keeps it");
    assert_eq!(m.chunk_import(descriptor.as_fd()).unwrap(), id, "there again");
    m.chunk_release(id).unwrap();
    drop(descriptor);
    assert_eq!(m.device_memory(0).unwrap().free, 2 * GIB);
    assert_eq!(m.chunk_release(id).unwrap_err().code.0, 1, "gone");
    let other = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(m.chunk_import(other.as_fd()).unwrap_err().code.0, 1, "not a handle");
}
