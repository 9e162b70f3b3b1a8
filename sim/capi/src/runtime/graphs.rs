//! Captures and graphs.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;

use crate::entry::{entry_points, put};
use crate::graphs::{self, CaptureAnswers, InstantiateParams};
use crate::machine::{Handle, chip, machine};

type EdgeData = *mut c_void;

entry_points! { runtime;
    /// `cudaStreamBeginCapture`.
    fn cudaStreamBeginCapture(on: Handle, mode: c_int) { graphs::begin_capture(on, mode) }

    /// `cudaStreamEndCapture`.
    fn cudaStreamEndCapture(on: Handle, graph: *mut Handle) {
        match graphs::end_capture(on) {
            Ok(captured) => put(graph, captured),
            Err(failure) => {
                // CUDA says so: a capture that failed gives a null graph.
                put(graph, null_mut())?;
                Err(failure)
            }
        }
    }

    /// `cudaStreamIsCapturing`.
    fn cudaStreamIsCapturing(on: Handle, status: *mut c_int) { put(status, graphs::capture_status(on)?) }

    /// `cudaThreadExchangeStreamCaptureMode`.
    fn cudaThreadExchangeStreamCaptureMode(mode: *mut c_int) { graphs::exchange_capture_mode(mode) }

    /// `cudaStreamGetCaptureInfo` of CUDA 12.
    fn uvmsim_rt12_cudaStreamGetCaptureInfo(on: Handle, status: *mut c_int, id: *mut u64) {
        let (graph, dependencies, edges, count) = (null_mut(), null_mut(), null_mut(), null_mut());
        graphs::capture_info(on, &CaptureAnswers { status, id, graph, dependencies, edges, count })
    }

    /// `cudaStreamGetCaptureInfo_v2`.
    fn cudaStreamGetCaptureInfo_v2(
        on: Handle, status: *mut c_int, id: *mut u64, graph: *mut Handle, dependencies: *mut *const Handle,
        count: *mut usize,
    ) { graphs::capture_info(on, &CaptureAnswers { status, id, graph, dependencies, edges: null_mut(), count }) }

    /// `cudaStreamGetCaptureInfo_v3`.
    fn cudaStreamGetCaptureInfo_v3(
        on: Handle, status: *mut c_int, id: *mut u64, graph: *mut Handle, dependencies: *mut *const Handle,
        edges: *mut *const u8, count: *mut usize,
    ) { graphs::capture_info(on, &CaptureAnswers { status, id, graph, dependencies, edges, count }) }

    /// `cudaStreamGetCaptureInfo` of CUDA 13, which is CUDA 12's `_v3`.
    fn uvmsim_rt13_cudaStreamGetCaptureInfo(
        on: Handle, status: *mut c_int, id: *mut u64, graph: *mut Handle, dependencies: *mut *const Handle,
        edges: *mut *const u8, count: *mut usize,
    ) { graphs::capture_info(on, &CaptureAnswers { status, id, graph, dependencies, edges, count }) }

    /// `cudaStreamUpdateCaptureDependencies` of CUDA 12.
    fn uvmsim_rt12_cudaStreamUpdateCaptureDependencies(
        on: Handle, nodes: *mut Handle, count: usize, flags: c_uint,
    ) { graphs::update_capture_dependencies(on, nodes, count, flags) }

    /// `cudaStreamUpdateCaptureDependencies_v2`; edges here carry no data.
    fn cudaStreamUpdateCaptureDependencies_v2(
        on: Handle, nodes: *mut Handle, _data: EdgeData, count: usize, flags: c_uint,
    ) { graphs::update_capture_dependencies(on, nodes, count, flags) }

    /// `cudaStreamUpdateCaptureDependencies` of CUDA 13, which is CUDA 12's `_v2`.
    fn uvmsim_rt13_cudaStreamUpdateCaptureDependencies(
        on: Handle, nodes: *mut Handle, _data: EdgeData, count: usize, flags: c_uint,
    ) { graphs::update_capture_dependencies(on, nodes, count, flags) }

    /// `cudaDeviceGetGraphMemAttribute`: graphs here have no memory of their own.
    fn cudaDeviceGetGraphMemAttribute(device: c_int, attribute: c_int, value: *mut u64) {
        graphs::memory_attribute(device, attribute)?;
        put(value, 0)
    }

    /// `cudaDeviceSetGraphMemAttribute`: sets high marks (1, 3) back.
    fn cudaDeviceSetGraphMemAttribute(device: c_int, attribute: c_int, _value: *const u64) {
        graphs::memory_attribute(device, attribute)
    }

    /// `cudaDeviceGraphMemTrim`.
    fn cudaDeviceGraphMemTrim(device: c_int) { chip(device).map(drop) }

    /// `cudaGraphCreate`.
    fn cudaGraphCreate(graph: *mut Handle, _flags: c_uint) { put(graph, machine()?.graph_create()?.0 as Handle) }

    /// `cudaGraphDestroy`.
    fn cudaGraphDestroy(graph: Handle) { graphs::destroy(graph) }

    /// `cudaGraphInstantiate`.
    fn cudaGraphInstantiate(exec: *mut Handle, graph: Handle, _flags: u64) { put(exec, graphs::instantiate(graph)?) }

    /// `cudaGraphInstantiateWithFlags`.
    fn cudaGraphInstantiateWithFlags(exec: *mut Handle, graph: Handle, _flags: u64) {
        put(exec, graphs::instantiate(graph)?)
    }

    /// `cudaGraphInstantiateWithParams`.
    fn cudaGraphInstantiateWithParams(exec: *mut Handle, graph: Handle, params: *mut InstantiateParams) {
        put(exec, graphs::instantiate_with(graph, params)?)
    }

    /// `cudaGraphUpload`: there is nothing to upload.
    fn cudaGraphUpload(_exec: Handle, _on: Handle) { machine().map(drop) }

    /// `cudaGraphLaunch`.
    fn cudaGraphLaunch(exec: Handle, on: Handle) { graphs::launch(exec, on) }

    /// `cudaGraphExecDestroy`.
    fn cudaGraphExecDestroy(exec: Handle) { graphs::destroy_exec(exec) }

    /// `cudaGraphGetNodes`.
    fn cudaGraphGetNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) {
        graphs::nodes(graph, false, nodes, count)
    }

    /// `cudaGraphGetRootNodes`.
    fn cudaGraphGetRootNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) {
        graphs::nodes(graph, true, nodes, count)
    }

    /// `cudaGraphGetEdges` of CUDA 12.
    fn uvmsim_rt12_cudaGraphGetEdges(graph: Handle, from: *mut Handle, to: *mut Handle, count: *mut usize) {
        graphs::edges(graph, from, to, count)
    }

    /// `cudaGraphGetEdges` of CUDA 13; edges here carry no data.
    fn uvmsim_rt13_cudaGraphGetEdges(
        graph: Handle, from: *mut Handle, to: *mut Handle, _data: EdgeData, count: *mut usize,
    ) { graphs::edges(graph, from, to, count) }

    /// `cudaGraphGetEdges_v2`.
    fn cudaGraphGetEdges_v2(graph: Handle, from: *mut Handle, to: *mut Handle, _data: EdgeData, count: *mut usize) {
        graphs::edges(graph, from, to, count)
    }

    /// `cudaGraphNodeGetDependencies` of CUDA 12.
    fn uvmsim_rt12_cudaGraphNodeGetDependencies(node: Handle, nodes: *mut Handle, count: *mut usize) {
        graphs::neighbours(node, false, nodes, count)
    }

    /// `cudaGraphNodeGetDependencies` of CUDA 13.
    fn uvmsim_rt13_cudaGraphNodeGetDependencies(
        node: Handle, nodes: *mut Handle, _data: EdgeData, count: *mut usize,
    ) { graphs::neighbours(node, false, nodes, count) }

    /// `cudaGraphNodeGetDependencies_v2`; edges here carry no data.
    fn cudaGraphNodeGetDependencies_v2(node: Handle, nodes: *mut Handle, _data: EdgeData, count: *mut usize) {
        graphs::neighbours(node, false, nodes, count)
    }

    /// `cudaGraphNodeGetDependentNodes` of CUDA 12.
    fn uvmsim_rt12_cudaGraphNodeGetDependentNodes(node: Handle, nodes: *mut Handle, count: *mut usize) {
        graphs::neighbours(node, true, nodes, count)
    }

    /// `cudaGraphNodeGetDependentNodes` of CUDA 13.
    fn uvmsim_rt13_cudaGraphNodeGetDependentNodes(
        node: Handle, nodes: *mut Handle, _data: EdgeData, count: *mut usize,
    ) { graphs::neighbours(node, true, nodes, count) }

    /// `cudaGraphNodeGetDependentNodes_v2`; edges here carry no data.
    fn cudaGraphNodeGetDependentNodes_v2(node: Handle, nodes: *mut Handle, _data: EdgeData, count: *mut usize) {
        graphs::neighbours(node, true, nodes, count)
    }

    /// `cudaGraphNodeGetType`.
    fn cudaGraphNodeGetType(node: Handle, kind: *mut c_int) { put(kind, graphs::node_type(node)?) }

    /// `cudaGraphDebugDotPrint`.
    fn cudaGraphDebugDotPrint(graph: Handle, path: *const c_char, _flags: c_uint) { graphs::dot_print(graph, path) }
}
