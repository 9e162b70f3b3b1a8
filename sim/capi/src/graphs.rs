//! Captures and graphs, for both APIs.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt::Write;
use std::ptr::null_mut;
use std::slice;

use torch_uvm_sim::{GraphId, GraphNode, NodeKind};

use crate::context;
use crate::entry::entry_points;
use crate::errors::code;
use crate::machine::{Handle, chip, exec, graph, machine, stream};
use crate::ops;
use crate::outcome::{Outcome, put, put_optional};

/// A node's handle holds its graph and its place in it: a node is only ever looked up. A graph's number has 47 bits, the
/// last of them 0: what is left of 64 is for the place.
const PLACE_BITS: u32 = 64 - 47 + GraphId::ALIGN.trailing_zeros();

fn node_handle(graph: GraphId, place: usize) -> Handle {
    (((graph.0 / GraphId::ALIGN) << PLACE_BITS) | (place as u64 + 1)) as Handle
}

/// The graph and the place that a node's handle holds; whether they exist is another matter.
fn parse_node(node: Handle) -> Outcome<(GraphId, usize)> {
    let bits = node as u64;
    let (graph, place) = (GraphId((bits >> PLACE_BITS) * GraphId::ALIGN), bits & ((1 << PLACE_BITS) - 1));
    let place = usize::try_from(place).ok().and_then(|place| place.checked_sub(1)).ok_or(code::INVALID_VALUE)?;
    Ok((graph, place))
}

fn find_node(node: Handle) -> Outcome<(GraphId, usize, Vec<GraphNode>)> {
    let (graph, place) = parse_node(node)?;
    let nodes = machine()?.graph_nodes(graph)?;
    if place >= nodes.len() {
        Err(code::INVALID_VALUE)?;
    }
    Ok((graph, place, nodes))
}

pub fn begin_capture(on: Handle, mode: c_int) -> Outcome {
    Ok(machine()?.begin_capture(context::use_device(), stream(on), ops::capture_mode(mode)?)?)
}

pub fn end_capture(on: Handle) -> Outcome<Handle> {
    Ok(machine()?.end_capture(context::use_device(), stream(on))?.0 as Handle)
}

pub fn capture_status(on: Handle) -> Outcome<c_int> {
    Ok(ops::capture_status_number(machine()?.stream_is_capturing(context::current_device(), stream(on))?))
}

/// `cudaThreadExchangeStreamCaptureMode`.
///
/// # Safety
/// `mode` is null or valid.
pub unsafe fn exchange_capture_mode(mode: *mut c_int) -> Outcome {
    // SAFETY: null or valid by this function's contract.
    let wanted = *unsafe { mode.as_ref() }.ok_or(code::INVALID_VALUE)?;
    let before = machine()?.exchange_capture_mode(ops::capture_mode(wanted)?)?;
    // SAFETY: as above.
    unsafe { put(mode, ops::capture_mode_number(before)) }
}

/// Where the forms of `…StreamGetCaptureInfo` put their answers; all but the status may be null.
pub struct CaptureAnswers {
    pub status: *mut c_int,
    pub id: *mut u64,
    pub graph: *mut Handle,
    pub dependencies: *mut *const Handle,
    pub edges: *mut *const u8,
    pub count: *mut usize,
}

/// `cudaGraphEdgeData`, all zeros for the plain edges that there are here.
type EdgeData = [u8; 8];
/// Nodes, and the edges to them.
type Dependencies = (Vec<Handle>, Vec<EdgeData>);

thread_local! {
    /// The lists that `capture_info` gave last for each stream: CUDA's belong to the capture, and a caller may read them until
    /// the stream's next operation.
    static DEPENDENCIES: RefCell<HashMap<u64, Dependencies>> = RefCell::default();
}

/// All forms of `…StreamGetCaptureInfo`.
///
/// # Safety
/// The pointers are null or valid.
pub unsafe fn capture_info(on: Handle, answers: &CaptureAnswers) -> Outcome {
    let info = machine()?.capture_info(context::current_device(), stream(on))?;
    let nodes = info.graph.map_or_else(Vec::new, |graph| {
        info.dependencies.iter().map(|place| node_handle(graph, *place)).collect::<Vec<_>>()
    });
    DEPENDENCIES.with_borrow_mut(|lists| {
        let edges = vec![EdgeData::default(); nodes.len()];
        let count = nodes.len();
        let (nodes, edges) = lists.entry(on as u64).insert_entry((nodes, edges)).into_mut();
        // SAFETY: null or valid by this function's contract.
        unsafe {
            put(answers.status, ops::capture_status_number(info.status))?;
            put_optional(answers.id, info.id);
            put_optional(answers.graph, info.graph.map_or(null_mut(), |graph| graph.0 as Handle));
            put_optional(answers.dependencies, nodes.as_ptr());
            put_optional(answers.edges, edges.as_ptr().cast());
            put_optional(answers.count, count);
        }
        Ok(())
    })
}

/// `cudaStreamAddCaptureDependencies`.
const ADD_DEPENDENCIES: c_uint = 0;
/// `cudaStreamSetCaptureDependencies`.
const SET_DEPENDENCIES: c_uint = 1;

/// All forms of `…StreamUpdateCaptureDependencies`.
///
/// # Safety
/// `nodes` is null or has `count` elements.
pub unsafe fn update_capture_dependencies(on: Handle, nodes: *const Handle, count: usize, flags: c_uint) -> Outcome {
    if (nodes.is_null() && count > 0) || !matches!(flags, ADD_DEPENDENCIES | SET_DEPENDENCIES) {
        Err(code::INVALID_VALUE)?;
    }
    let (machine, device) = (machine()?, context::current_device());
    let graph = machine.capture_info(device, stream(on))?.graph;
    let mut places = Vec::with_capacity(count);
    for at in 0..count {
        // SAFETY: `at < count`, by this function's contract.
        let (of, place) = parse_node(unsafe { nodes.add(at).read() })?;
        if graph.is_some_and(|graph| graph != of) {
            Err(code::INVALID_VALUE)?;
        }
        places.push(place);
    }
    Ok(machine.update_capture_dependencies(device, stream(on), &places, flags == SET_DEPENDENCIES)?)
}

/// Checks the arguments of `…DeviceGetGraphMemAttribute`: used and reserved bytes, now (0, 2) and at most (1, 3).
pub fn memory_attribute(device: c_int, attribute: c_int) -> Outcome {
    chip(device)?;
    if (0..=3).contains(&attribute) { Ok(()) } else { Err(code::INVALID_VALUE)? }
}

pub fn instantiate(what: Handle) -> Outcome<Handle> {
    Ok(machine()?.graph_instantiate(graph(what))?.0 as Handle)
}

/// `cudaGraphInstantiateParams` and `CUDA_GRAPH_INSTANTIATE_PARAMS`.
#[repr(C)]
pub struct InstantiateParams {
    flags: u64,
    upload_stream: Handle,
    error_node: Handle,
    result: c_int,
}

/// `cudaGraphInstantiateWithParams` and `cuGraphInstantiateWithParams`.
///
/// # Safety
/// `params` is null or valid.
pub unsafe fn instantiate_with(what: Handle, params: *mut InstantiateParams) -> Outcome<Handle> {
    // SAFETY: null or valid by this function's contract.
    let params = unsafe { params.as_mut() }.ok_or(code::INVALID_VALUE)?;
    params.error_node = null_mut();
    params.result = 0;
    instantiate(what)
}

pub fn launch(what: Handle, on: Handle) -> Outcome {
    Ok(machine()?.graph_launch(context::use_device(), exec(what), stream(on))?)
}

pub fn destroy(what: Handle) -> Outcome {
    Ok(machine()?.graph_destroy(graph(what))?)
}

pub fn destroy_exec(what: Handle) -> Outcome {
    Ok(machine()?.graph_exec_destroy(exec(what))?)
}

/// Writes a list by CUDA's rule: with no array only the count is told; an array is filled up to `count`, the rest of it
/// with zeros.
///
/// # Safety
/// `count` is null or valid; the arrays are null or have `*count` elements.
unsafe fn put_list(items: &[Handle], array: *mut Handle, count: *mut usize) -> Outcome {
    if count.is_null() {
        Err(code::INVALID_VALUE)?;
    }
    if !array.is_null() {
        // SAFETY: the caller's array has as many elements as it says in `count`.
        let array = unsafe { slice::from_raw_parts_mut(array, count.read()) };
        for (at, to) in array.iter_mut().enumerate() {
            *to = items.get(at).copied().unwrap_or(std::ptr::null_mut());
        }
    }
    // SAFETY: not null, and valid by this function's contract.
    unsafe { put(count, items.len()) }
}

/// `cudaGraphGetNodes`, or the root nodes only.
///
/// # Safety
/// As [`put_list`].
pub unsafe fn list_nodes(what: Handle, roots_only: bool, array: *mut Handle, count: *mut usize) -> Outcome {
    let nodes = machine()?.graph_nodes(graph(what))?;
    let wanted = nodes.iter().enumerate().filter(|(_, node)| !roots_only || node.dependencies.is_empty());
    let handles: Vec<_> = wanted.map(|(place, _)| node_handle(graph(what), place)).collect();
    // SAFETY: this function's contract.
    unsafe { put_list(&handles, array, count) }
}

/// `cudaGraphGetEdges`.
///
/// # Safety
/// As [`put_list`].
pub unsafe fn list_edges(what: Handle, from: *mut Handle, to: *mut Handle, count: *mut usize) -> Outcome {
    let (mut sources, mut targets) = (Vec::new(), Vec::new());
    for (place, node) in machine()?.graph_nodes(graph(what))?.iter().enumerate() {
        for dependency in &node.dependencies {
            sources.push(node_handle(graph(what), *dependency));
            targets.push(node_handle(graph(what), place));
        }
    }
    // SAFETY: this function's contract. The first call must leave `count` as the second expects it.
    unsafe {
        let room = if count.is_null() { 0 } else { count.read() };
        put_list(&sources, from, count)?;
        put(count, room)?;
        put_list(&targets, to, count)
    }
}

/// `cudaGraphNodeGetDependencies` (`forward` false) and `cudaGraphNodeGetDependentNodes` (true).
///
/// # Safety
/// As [`put_list`].
pub unsafe fn neighbours(node: Handle, forward: bool, array: *mut Handle, count: *mut usize) -> Outcome {
    let (graph, place, nodes) = find_node(node)?;
    let places: Vec<usize> = if forward {
        (0..nodes.len()).filter(|other| nodes[*other].dependencies.contains(&place)).collect()
    } else {
        nodes[place].dependencies.clone()
    };
    let handles: Vec<_> = places.into_iter().map(|place| node_handle(graph, place)).collect();
    // SAFETY: this function's contract.
    unsafe { put_list(&handles, array, count) }
}

/// `cudaGraphNodeGetType`.
pub fn node_type(node: Handle) -> Outcome<c_int> {
    let (_, place, nodes) = find_node(node)?;
    Ok(match nodes[place].kind {
        NodeKind::Kernel => 0,
        NodeKind::Memcpy => 1,
        NodeKind::Memset => 2,
        NodeKind::Host => 3,
    })
}

/// `cudaGraphDebugDotPrint`.
///
/// # Safety
/// `path` is null or a C string.
pub unsafe fn dot_print(what: Handle, path: *const c_char) -> Outcome {
    if path.is_null() {
        Err(code::INVALID_VALUE)?;
    }
    // SAFETY: a C string by this function's contract.
    let path = unsafe { CStr::from_ptr(path) }.to_str().map_err(|_| code::INVALID_VALUE)?;
    let mut text = String::from("digraph dot {\n");
    for (place, node) in machine()?.graph_nodes(graph(what))?.iter().enumerate() {
        let _ = writeln!(text, "  node{place} [label=\"{place}: {:?}\"];", node.kind);
        for dependency in &node.dependencies {
            let _ = writeln!(text, "  node{dependency} -> node{place};");
        }
    }
    text.push_str("}\n");
    Ok(std::fs::write(path, text).map_err(|_| code::OPERATING_SYSTEM)?)
}

entry_points! { both;
    /// `cuStreamBeginCapture_v2`.
    fn cuStreamBeginCapture_v2 = cudaStreamBeginCapture: (on: Handle, mode: c_int) { begin_capture(on, mode) }

    /// `cuStreamEndCapture`.
    fn cuStreamEndCapture = cudaStreamEndCapture: (on: Handle, graph: *mut Handle) {
        match end_capture(on) {
            Ok(captured) => put(graph, captured),
            Err(failure) => {
                put(graph, null_mut())?;
                Err(failure)
            }
        }
    }

    /// `cuStreamIsCapturing`.
    fn cuStreamIsCapturing = cudaStreamIsCapturing: (on: Handle, status: *mut c_int) { put(status, capture_status(on)?) }

    /// `cuThreadExchangeStreamCaptureMode`.
    fn cuThreadExchangeStreamCaptureMode = cudaThreadExchangeStreamCaptureMode: (mode: *mut c_int) { exchange_capture_mode(mode) }

    /// `cuStreamGetCaptureInfo`, the form of CUDA 10.1.
    fn cuStreamGetCaptureInfo = uvmsim_rt12_cudaStreamGetCaptureInfo: (on: Handle, status: *mut c_int, id: *mut u64) {
        let (graph, dependencies, edges, count) = (null_mut(), null_mut(), null_mut(), null_mut());
        capture_info(on, &CaptureAnswers { status, id, graph, dependencies, edges, count })
    }

    /// `cuStreamGetCaptureInfo_v2`.
    fn cuStreamGetCaptureInfo_v2 = cudaStreamGetCaptureInfo_v2: (
        on: Handle, status: *mut c_int, id: *mut u64, graph: *mut Handle, dependencies: *mut *const Handle,
        count: *mut usize,
    ) { capture_info(on, &CaptureAnswers { status, id, graph, dependencies, edges: null_mut(), count }) }

    /// `cuStreamGetCaptureInfo_v3`.
    fn cuStreamGetCaptureInfo_v3 = cudaStreamGetCaptureInfo_v3, uvmsim_rt13_cudaStreamGetCaptureInfo: (
        on: Handle, status: *mut c_int, id: *mut u64, graph: *mut Handle, dependencies: *mut *const Handle,
        edges: *mut *const u8, count: *mut usize,
    ) { capture_info(on, &CaptureAnswers { status, id, graph, dependencies, edges, count }) }

    /// `cuStreamUpdateCaptureDependencies`, the form before CUDA 12.3.
    fn cuStreamUpdateCaptureDependencies = uvmsim_rt12_cudaStreamUpdateCaptureDependencies: (on: Handle, nodes: *mut Handle, count: usize, flags: c_uint) {
        update_capture_dependencies(on, nodes, count, flags)
    }

    /// `cuStreamUpdateCaptureDependencies_v2`; edges here carry no data.
    fn cuStreamUpdateCaptureDependencies_v2 = cudaStreamUpdateCaptureDependencies_v2, uvmsim_rt13_cudaStreamUpdateCaptureDependencies: (
        on: Handle, nodes: *mut Handle, _data: *mut c_void, count: usize, flags: c_uint,
    ) { update_capture_dependencies(on, nodes, count, flags) }

    /// `cuDeviceGetGraphMemAttribute`: graphs here have no memory of their own.
    fn cuDeviceGetGraphMemAttribute = cudaDeviceGetGraphMemAttribute: (device: c_int, attribute: c_int, value: *mut u64) {
        memory_attribute(device, attribute)?;
        put(value, 0)
    }

    /// `cuDeviceSetGraphMemAttribute`: sets high marks (1, 3) back.
    fn cuDeviceSetGraphMemAttribute = cudaDeviceSetGraphMemAttribute: (device: c_int, attribute: c_int, _value: *const u64) {
        memory_attribute(device, attribute)
    }

    /// `cuDeviceGraphMemTrim`.
    fn cuDeviceGraphMemTrim = cudaDeviceGraphMemTrim: (device: c_int) { chip(device).map(drop) }

    /// `cuGraphCreate`.
    fn cuGraphCreate = cudaGraphCreate: (graph: *mut Handle, _flags: c_uint) { put(graph, machine()?.graph_create()?.0 as Handle) }

    /// `cuGraphDestroy`.
    fn cuGraphDestroy = cudaGraphDestroy: (graph: Handle) { destroy(graph) }

    /// `cuGraphInstantiateWithFlags`.
    fn cuGraphInstantiateWithFlags = cudaGraphInstantiate, cudaGraphInstantiateWithFlags: (exec: *mut Handle, graph: Handle, _flags: u64) {
        put(exec, instantiate(graph)?)
    }

    /// `cuGraphInstantiateWithParams`.
    fn cuGraphInstantiateWithParams = cudaGraphInstantiateWithParams: (exec: *mut Handle, graph: Handle, params: *mut InstantiateParams) {
        put(exec, instantiate_with(graph, params)?)
    }

    /// `cuGraphUpload`: there is nothing to upload.
    fn cuGraphUpload = cudaGraphUpload: (_exec: Handle, _on: Handle) { machine().map(drop) }

    /// `cuGraphLaunch`.
    fn cuGraphLaunch = cudaGraphLaunch: (exec: Handle, on: Handle) { launch(exec, on) }

    /// `cuGraphExecDestroy`.
    fn cuGraphExecDestroy = cudaGraphExecDestroy: (exec: Handle) { destroy_exec(exec) }

    /// `cuGraphGetNodes`.
    fn cuGraphGetNodes = cudaGraphGetNodes: (graph: Handle, nodes: *mut Handle, count: *mut usize) {
        list_nodes(graph, false, nodes, count)
    }

    /// `cuGraphGetRootNodes`.
    fn cuGraphGetRootNodes = cudaGraphGetRootNodes: (graph: Handle, nodes: *mut Handle, count: *mut usize) {
        list_nodes(graph, true, nodes, count)
    }

    /// `cuGraphGetEdges`.
    fn cuGraphGetEdges = uvmsim_rt12_cudaGraphGetEdges: (graph: Handle, from: *mut Handle, to: *mut Handle, count: *mut usize) {
        list_edges(graph, from, to, count)
    }

    /// `cuGraphGetEdges_v2`; edges here carry no data.
    fn cuGraphGetEdges_v2 = cudaGraphGetEdges_v2, uvmsim_rt13_cudaGraphGetEdges: (graph: Handle, from: *mut Handle, to: *mut Handle, _data: *mut c_void, count: *mut usize) {
        list_edges(graph, from, to, count)
    }

    /// `cuGraphNodeGetDependencies`.
    fn cuGraphNodeGetDependencies = uvmsim_rt12_cudaGraphNodeGetDependencies: (node: Handle, nodes: *mut Handle, count: *mut usize) {
        neighbours(node, false, nodes, count)
    }

    /// `cuGraphNodeGetDependencies_v2`; edges here carry no data.
    fn cuGraphNodeGetDependencies_v2 = cudaGraphNodeGetDependencies_v2, uvmsim_rt13_cudaGraphNodeGetDependencies: (node: Handle, nodes: *mut Handle, _data: *mut c_void, count: *mut usize) {
        neighbours(node, false, nodes, count)
    }

    /// `cuGraphNodeGetDependentNodes`.
    fn cuGraphNodeGetDependentNodes = uvmsim_rt12_cudaGraphNodeGetDependentNodes: (node: Handle, nodes: *mut Handle, count: *mut usize) {
        neighbours(node, true, nodes, count)
    }

    /// `cuGraphNodeGetDependentNodes_v2`; edges here carry no data.
    fn cuGraphNodeGetDependentNodes_v2 = cudaGraphNodeGetDependentNodes_v2, uvmsim_rt13_cudaGraphNodeGetDependentNodes: (node: Handle, nodes: *mut Handle, _data: *mut c_void, count: *mut usize) {
        neighbours(node, true, nodes, count)
    }

    /// `cuGraphNodeGetType`.
    fn cuGraphNodeGetType = cudaGraphNodeGetType: (node: Handle, kind: *mut c_int) { put(kind, node_type(node)?) }

    /// `cuGraphDebugDotPrint`.
    fn cuGraphDebugDotPrint = cudaGraphDebugDotPrint: (graph: Handle, path: *const c_char, _flags: c_uint) { dot_print(graph, path) }
}

entry_points! { driver;
    /// `cuGraphInstantiate`, the form of CUDA 10, whose arguments are those of `_v2`.
    fn cuGraphInstantiate(
        exec: *mut Handle, graph: Handle, _node: *mut Handle, _log: *mut c_char, _bytes: usize,
    ) { put(exec, instantiate(graph)?) }

    /// `cuGraphInstantiate_v2`, the form before CUDA 12.
    fn cuGraphInstantiate_v2(
        exec: *mut Handle, graph: Handle, _node: *mut Handle, _log: *mut c_char, _bytes: usize,
    ) { put(exec, instantiate(graph)?) }
}
