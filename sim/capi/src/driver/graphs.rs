//! Captures and graphs.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;

use crate::entry::{entry_points, put};
use crate::graphs::{self, CaptureAnswers, InstantiateParams};
use crate::machine::{Handle, chip, machine};

entry_points! { driver;
    /// `cuStreamBeginCapture_v2`.
    fn cuStreamBeginCapture_v2(on: Handle, mode: c_int) { graphs::begin_capture(on, mode) }

    /// `cuStreamEndCapture`.
    fn cuStreamEndCapture(on: Handle, graph: *mut Handle) {
        match graphs::end_capture(on) {
            Ok(captured) => put(graph, captured),
            Err(failure) => {
                put(graph, null_mut())?;
                Err(failure)
            }
        }
    }

    /// `cuStreamIsCapturing`.
    fn cuStreamIsCapturing(on: Handle, status: *mut c_int) { put(status, graphs::capture_status(on)?) }

    /// `cuThreadExchangeStreamCaptureMode`.
    fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int) { graphs::exchange_capture_mode(mode) }

    /// `cuStreamGetCaptureInfo`, the form of CUDA 10.1.
    fn cuStreamGetCaptureInfo(on: Handle, status: *mut c_int, id: *mut u64) {
        let (graph, dependencies, edges, count) = (null_mut(), null_mut(), null_mut(), null_mut());
        graphs::capture_info(on, &CaptureAnswers { status, id, graph, dependencies, edges, count })
    }

    /// `cuStreamGetCaptureInfo_v2`.
    fn cuStreamGetCaptureInfo_v2(
        on: Handle, status: *mut c_int, id: *mut u64, graph: *mut Handle, dependencies: *mut *const Handle,
        count: *mut usize,
    ) { graphs::capture_info(on, &CaptureAnswers { status, id, graph, dependencies, edges: null_mut(), count }) }

    /// `cuStreamGetCaptureInfo_v3`.
    fn cuStreamGetCaptureInfo_v3(
        on: Handle, status: *mut c_int, id: *mut u64, graph: *mut Handle, dependencies: *mut *const Handle,
        edges: *mut *const u8, count: *mut usize,
    ) { graphs::capture_info(on, &CaptureAnswers { status, id, graph, dependencies, edges, count }) }

    /// `cuStreamUpdateCaptureDependencies`, the form before CUDA 12.3.
    fn cuStreamUpdateCaptureDependencies(on: Handle, nodes: *mut Handle, count: usize, flags: c_uint) {
        graphs::update_capture_dependencies(on, nodes, count, flags)
    }

    /// `cuStreamUpdateCaptureDependencies_v2`; edges here carry no data.
    fn cuStreamUpdateCaptureDependencies_v2(
        on: Handle, nodes: *mut Handle, _data: *mut c_void, count: usize, flags: c_uint,
    ) { graphs::update_capture_dependencies(on, nodes, count, flags) }

    /// `cuDeviceGetGraphMemAttribute`: graphs here have no memory of their own.
    fn cuDeviceGetGraphMemAttribute(device: c_int, attribute: c_int, value: *mut u64) {
        graphs::memory_attribute(device, attribute)?;
        put(value, 0)
    }

    /// `cuDeviceSetGraphMemAttribute`: sets high marks (1, 3) back.
    fn cuDeviceSetGraphMemAttribute(device: c_int, attribute: c_int, _value: *const u64) {
        graphs::memory_attribute(device, attribute)
    }

    /// `cuDeviceGraphMemTrim`.
    fn cuDeviceGraphMemTrim(device: c_int) { chip(device).map(drop) }

    /// `cuGraphCreate`.
    fn cuGraphCreate(graph: *mut Handle, _flags: c_uint) { put(graph, machine()?.graph_create()?.0 as Handle) }

    /// `cuGraphDestroy`.
    fn cuGraphDestroy(graph: Handle) { graphs::destroy(graph) }

    /// `cuGraphInstantiateWithFlags`.
    fn cuGraphInstantiateWithFlags(exec: *mut Handle, graph: Handle, _flags: u64) {
        put(exec, graphs::instantiate(graph)?)
    }

    /// `cuGraphInstantiate`, the form of CUDA 10, whose arguments are those of `_v2`.
    fn cuGraphInstantiate(
        exec: *mut Handle, graph: Handle, _node: *mut Handle, _log: *mut c_char, _bytes: usize,
    ) { put(exec, graphs::instantiate(graph)?) }

    /// `cuGraphInstantiate_v2`, the form before CUDA 12.
    fn cuGraphInstantiate_v2(
        exec: *mut Handle, graph: Handle, _node: *mut Handle, _log: *mut c_char, _bytes: usize,
    ) { put(exec, graphs::instantiate(graph)?) }

    /// `cuGraphInstantiateWithParams`.
    fn cuGraphInstantiateWithParams(exec: *mut Handle, graph: Handle, params: *mut InstantiateParams) {
        put(exec, graphs::instantiate_with(graph, params)?)
    }

    /// `cuGraphUpload`: there is nothing to upload.
    fn cuGraphUpload(_exec: Handle, _on: Handle) { machine().map(drop) }

    /// `cuGraphLaunch`.
    fn cuGraphLaunch(exec: Handle, on: Handle) { graphs::launch(exec, on) }

    /// `cuGraphExecDestroy`.
    fn cuGraphExecDestroy(exec: Handle) { graphs::destroy_exec(exec) }

    /// `cuGraphGetNodes`.
    fn cuGraphGetNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) {
        graphs::nodes(graph, false, nodes, count)
    }

    /// `cuGraphGetRootNodes`.
    fn cuGraphGetRootNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) {
        graphs::nodes(graph, true, nodes, count)
    }

    /// `cuGraphGetEdges`.
    fn cuGraphGetEdges(graph: Handle, from: *mut Handle, to: *mut Handle, count: *mut usize) {
        graphs::edges(graph, from, to, count)
    }

    /// `cuGraphGetEdges_v2`; edges here carry no data.
    fn cuGraphGetEdges_v2(graph: Handle, from: *mut Handle, to: *mut Handle, _data: *mut c_void, count: *mut usize) {
        graphs::edges(graph, from, to, count)
    }

    /// `cuGraphNodeGetDependencies`.
    fn cuGraphNodeGetDependencies(node: Handle, nodes: *mut Handle, count: *mut usize) {
        graphs::neighbours(node, false, nodes, count)
    }

    /// `cuGraphNodeGetDependencies_v2`; edges here carry no data.
    fn cuGraphNodeGetDependencies_v2(node: Handle, nodes: *mut Handle, _data: *mut c_void, count: *mut usize) {
        graphs::neighbours(node, false, nodes, count)
    }

    /// `cuGraphNodeGetDependentNodes_v2`; edges here carry no data.
    fn cuGraphNodeGetDependentNodes_v2(node: Handle, nodes: *mut Handle, _data: *mut c_void, count: *mut usize) {
        graphs::neighbours(node, true, nodes, count)
    }

    /// `cuGraphNodeGetDependentNodes`.
    fn cuGraphNodeGetDependentNodes(node: Handle, nodes: *mut Handle, count: *mut usize) {
        graphs::neighbours(node, true, nodes, count)
    }

    /// `cuGraphNodeGetType`.
    fn cuGraphNodeGetType(node: Handle, kind: *mut c_int) { put(kind, graphs::node_type(node)?) }

    /// `cuGraphDebugDotPrint`.
    fn cuGraphDebugDotPrint(graph: Handle, path: *const c_char, _flags: c_uint) { graphs::dot_print(graph, path) }
}
