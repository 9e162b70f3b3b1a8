"""Runs an official PyTorch wheel on the simulated device: exits non-zero when something is not as on a real one.

    cargo xtask sim -- python sim/capi/tests/smoke.py

Written for PyTorch's `native` allocator; everything here must hold for any allocator. What needs kernels (arithmetic)
is left out, or its results are not looked at: the simulator runs none.
"""

import ctypes
import os
import subprocess
import sys
import threading

import torch

MIB = 1 << 20
TESTS = []


def test(function):
    TESTS.append(function)
    return function


def pattern(count, seed=0):
    """Bytes that differ from any shifted or zeroed version of themselves."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


@test
def the_device_is_there():
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == int(os.environ.get("TORCH_UVM_SIM_DEVICES", "1"))
    properties = torch.cuda.get_device_properties(0)
    assert properties.name.startswith("NVIDIA"), properties
    assert properties.total_memory == torch.cuda.mem_get_info()[1], properties
    assert properties.major >= 9 and properties.multi_processor_count > 0, properties


@test
def copies_are_exact():
    for count in (1, 513, 4097, 3 * MIB + 5):
        source = pattern(count)
        on_device = source.cuda()
        again = torch.empty_like(on_device)
        again.copy_(on_device)
        assert torch.equal(again.cpu(), source), count
    # A slice, which starts in the middle of its block.
    assert torch.equal(on_device[1000:2000].cpu(), source[1000:2000])


@test
def pinned_copies_wait_for_their_stream():
    source = pattern(MIB).pin_memory()
    assert source.is_pinned()
    result = torch.empty(MIB, dtype=torch.uint8, pin_memory=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_device = source.to("cuda", non_blocking=True)
        result.copy_(on_device, non_blocking=True)
    stream.synchronize()
    assert torch.equal(result, source)


@test
def streams_and_events_order_work():
    first, second = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
    source = pattern(MIB, 1)
    on_device = torch.empty(MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    pinned = source.pin_memory()
    done = torch.cuda.Event(enable_timing=True)
    start = torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(first):
        start.record()
        on_device.copy_(pinned, non_blocking=True)
        done.record()
    second.wait_event(done)
    with torch.cuda.stream(second):
        copy = on_device.clone()
    second.synchronize()
    assert done.query() and start.elapsed_time(done) >= 0
    assert torch.equal(copy.cpu(), source)


@test
def record_stream_keeps_a_block():
    side = torch.cuda.Stream()
    source = pattern(4 * MIB, 2)
    result = torch.empty(4 * MIB, dtype=torch.uint8, pin_memory=True)
    block = source.cuda()
    address = block.data_ptr()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result.copy_(block, non_blocking=True)
        block.record_stream(side)
    del block
    # Would overwrite the block before `side` has read it, if it were handed out again.
    other = torch.zeros(4 * MIB, dtype=torch.uint8).pin_memory().to("cuda", non_blocking=True)
    side.synchronize()
    assert torch.equal(result, source), "reused too early"
    del other
    torch.cuda.synchronize()
    assert address


@test
def graphs_replay_copies():
    source = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
    target = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        between = torch.empty_like(source)
        between.copy_(source)
        target.copy_(between)
    for seed in (3, 4):
        data = pattern(MIB, seed)
        source.copy_(data)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(target.cpu(), data), seed
    graph.reset()


@test
def an_unsafe_call_spoils_a_capture():
    # By the driver API: PyTorch 2.6's own books do not survive a capture that fails.
    driver = ctypes.CDLL("libcuda.so.1")
    stream = torch.cuda.Stream()
    handle, graph, pointer = ctypes.c_void_p(stream.cuda_stream), ctypes.c_void_p(), ctypes.c_uint64()
    assert driver.cuStreamBeginCapture_v2(handle, 0) == 0
    assert driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(MIB)) == 900
    assert driver.cuStreamEndCapture(handle, ctypes.byref(graph)) == 901
    assert not graph.value
    torch.cuda.synchronize()
    assert torch.equal(pattern(100).cuda().cpu(), pattern(100))


@test
def a_graph_in_the_making_is_there_to_be_asked_about():
    """As CUDA 13's runtime asks, which is how PyTorch's newer allocators do."""
    runtime = ctypes.CDLL("libcudart.so.13")
    stream = ctypes.c_void_p(torch.cuda.Stream().cuda_stream)
    pointer = ctypes.c_void_p(torch.empty(MIB, dtype=torch.uint8, device="cuda").data_ptr())

    def info():
        status, number, graph, nodes, count = (
            ctypes.c_int(),
            ctypes.c_uint64(),
            ctypes.c_void_p(),
            ctypes.POINTER(ctypes.c_void_p)(),
            ctypes.c_size_t(),
        )
        answers = [ctypes.byref(answer) for answer in (status, number, graph, nodes)]
        assert runtime.cudaStreamGetCaptureInfo(stream, *answers, None, ctypes.byref(count)) == 0
        return status.value, graph.value, nodes[: count.value]

    def before(node):
        nodes, count = (ctypes.c_void_p * 8)(), ctypes.c_size_t(8)
        assert runtime.cudaGraphNodeGetDependencies(ctypes.c_void_p(node), nodes, None, ctypes.byref(count)) == 0
        return nodes[: count.value]

    assert info() == (0, None, [])
    assert runtime.cudaStreamBeginCapture(stream, 2) == 0
    status, graph, nodes = info()
    assert status == 1 and graph and not nodes
    for _ in range(2):
        assert runtime.cudaMemsetAsync(pointer, 1, ctypes.c_size_t(MIB), stream) == 0
    (last,) = info()[2]
    (first,) = before(last)
    assert before(first) == []
    none = (ctypes.c_void_p * 1)()
    assert runtime.cudaStreamUpdateCaptureDependencies(stream, none, None, ctypes.c_size_t(0), 1) == 0
    assert info()[2] == []
    whole = ctypes.c_void_p()
    assert runtime.cudaStreamEndCapture(stream, ctypes.byref(whole)) == 0 and whole.value == graph
    assert before(last) == [first]
    assert runtime.cudaGraphDestroy(whole) == 0


@test
def failed_calls_tell_those_who_listen():
    driver = ctypes.CDLL("libcuda.so.1")
    told = []
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
    listen = kind(lambda data, level, text, size: told.append((data, level, text[:size].decode())))
    handle, pointer = ctypes.c_void_p(), ctypes.c_uint64()
    assert driver.cuLogsRegisterCallback(listen, ctypes.c_void_p(7), ctypes.byref(handle)) == 0
    assert driver.cuMemFree_v2(ctypes.c_uint64(0xDEAD000)) == 1
    ((data, level, text),) = told
    assert (data, level) == (7, 0) and "0xdead000" in text, told
    assert driver.cuLogsUnregisterCallback(handle) == 0
    assert driver.cuMemFree_v2(ctypes.c_uint64(0xDEAD000)) == 1 and len(told) == 1
    assert driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(MIB)) == 0
    assert driver.cuMemFree_v2(pointer) == 0


@test
def the_management_library_agrees():
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    assert nvml.nvmlInit_v2() == 0
    count, device = ctypes.c_uint(), ctypes.c_void_p()
    assert nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0 and count.value >= torch.cuda.device_count()
    assert nvml.nvmlDeviceGetHandleByIndex_v2(count, ctypes.byref(device)) == 2, "one too many"
    assert nvml.nvmlDeviceGetHandleByPciBusId_v2(b"00000000:01:00.0", ctypes.byref(device)) == 0
    name, uuid = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
    assert nvml.nvmlDeviceGetName(device, name, 96) == 0 and nvml.nvmlDeviceGetUUID(device, uuid, 96) == 0
    properties = torch.cuda.get_device_properties(0)
    assert name.value.decode() == properties.name and uuid.value.decode() == f"GPU-{properties.uuid}", (name, uuid)
    kept = torch.empty(16 * MIB, dtype=torch.uint8, device="cuda")
    memory = (ctypes.c_uint64 * 3)()
    assert nvml.nvmlDeviceGetMemoryInfo(device, memory) == 0
    free, total = torch.cuda.mem_get_info()
    assert list(memory) == [total, free, total - free] and kept.numel() <= memory[2], list(memory)
    found, processes = ctypes.c_uint(0), (ctypes.c_uint64 * 2)()
    assert nvml.nvmlDeviceGetComputeRunningProcesses(device, ctypes.byref(found), None) == 7 and found.value == 1
    assert nvml.nvmlDeviceGetComputeRunningProcesses(device, ctypes.byref(found), processes) == 0
    assert processes[0] & 0xFFFFFFFF == os.getpid() and processes[1] == total - free
    assert nvml.nvmlDeviceGetNvLinkState(device, 0, ctypes.byref(count)) == 3, "there are no links"


@test
def the_management_library_answers_where_every_driver_does():
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    assert nvml.nvmlInit_v2() == 0
    device, value = ctypes.c_void_p(), ctypes.c_uint()
    assert nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) == 0
    for form, words in ((2, 9), (3, 10)):
        fabric = (ctypes.c_uint * words)(*[0xFFFF] * words)
        assert nvml.nvmlDeviceGetGpuFabricInfoV(device, fabric) == 25, "a version that there is not"
        fabric[0] = 4 * words | form << 24
        assert nvml.nvmlDeviceGetGpuFabricInfoV(device, fabric) == 0
        status, clique, state = fabric[5], fabric[6], fabric[7] & 0xFF
        assert (status, clique, state) == (0, 0, 0), "not supported, says the answer, and not the call"
    assert nvml.nvmlDeviceGetGpuFabricInfoV(device, None) == 2
    for kind in (0, 1, 2):
        assert nvml.nvmlDeviceGetClockInfo(device, kind, ctypes.byref(value)) == 0 and value.value > 100, kind
    assert nvml.nvmlDeviceGetTemperature(device, 0, ctypes.byref(value)) == 0 and 0 < value.value < 100
    assert nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(value)) == 0
    fields = (ctypes.c_uint64 * 10)(82, 0, 0, 0, 0, 91, 0, 0, 0, 0)
    assert nvml.nvmlDeviceGetFieldValues(device, 2, fields) == 0
    assert [fields[at] >> 32 for at in (3, 8)] == [3, 3], "each for itself"
    state = (ctypes.c_uint * 3)(7, 7, 7)
    assert nvml.nvmlSystemGetConfComputeState(state) == 0 and list(state) == [0, 0, 0]


@test
def pools_are_apart():
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        inside = torch.empty(MIB, dtype=torch.uint8, device="cuda")
    outside = torch.empty(MIB, dtype=torch.uint8, device="cuda")
    segments = {s["address"]: s for s in torch.cuda.memory_snapshot()}

    def pool_of(tensor):
        at = max(a for a in segments if a <= tensor.data_ptr())
        return segments[at]["segment_pool_id"]

    assert pool_of(inside) == pool.id and pool_of(outside) == (0, 0)


@test
def statistics_and_snapshots_agree():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    tensor = torch.empty(10 * MIB, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() - before == 10 * MIB
    assert torch.cuda.memory_reserved() >= torch.cuda.memory_allocated()
    blocks = [b for s in torch.cuda.memory._snapshot()["segments"] for b in s["blocks"]]
    assert any(b["state"] == "active_allocated" and b["size"] == 10 * MIB for b in blocks)
    free = torch.cuda.mem_get_info()[0]
    del tensor
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] >= free


@test
def too_much_is_an_error():
    total = torch.cuda.mem_get_info()[1]
    try:
        torch.empty(64 * total, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError as error:
        assert "Tried to allocate" in str(error), error
    else:
        raise AssertionError("64 times the device's memory was allocated")
    assert torch.equal(pattern(100).cuda().cpu(), pattern(100)), "the device works on"


@test
def threads_share_the_device():
    errors = []

    def work(seed):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(10):
                    data = pattern(100_000 + turn, seed)
                    assert torch.equal(data.cuda().clone().cpu(), data)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@test
def loaders_pin_in_the_background():
    data = torch.utils.data.TensorDataset(torch.arange(64))
    seen = []
    for (batch,) in torch.utils.data.DataLoader(data, batch_size=8, num_workers=2, pin_memory=True):
        assert batch.is_pinned()
        seen += batch.cuda(non_blocking=True).cpu().tolist()
    assert seen == list(range(64)), seen


@test
def the_host_is_simulated_too():
    path = os.environ["TORCH_UVM_MEMINFO"]

    def available():
        with open(path) as file:
            fields = dict(line.split(":") for line in file.read().splitlines())
        assert int(fields["MemAvailable"].split()[0]) <= int(fields["MemTotal"].split()[0])
        return int(fields["MemAvailable"].split()[0]) * 1024

    before = available()
    pinned = torch.empty(64 * MIB, dtype=torch.uint8, pin_memory=True)
    assert before - available() >= 64 * MIB, (before, available())
    del pinned


@test
def managed_memory_works_beside():
    """The runtime and the driver API, called by name as a plug-in does."""
    driver = ctypes.CDLL("libcuda.so.1")
    assert driver.cuInit(0) == 0
    torch.cuda.synchronize()
    pointer = ctypes.c_uint64()
    assert driver.cuMemAllocManaged(ctypes.byref(pointer), ctypes.c_size_t(4 * MIB), 1) == 0
    assert driver.cuMemsetD8_v2(pointer, ctypes.c_ubyte(7), ctypes.c_size_t(4 * MIB)) == 0
    assert driver.cuMemPrefetchAsync(pointer, ctypes.c_size_t(4 * MIB), -1, None) == 0
    assert driver.cuCtxSynchronize() == 0
    assert bytes((ctypes.c_ubyte * 16).from_address(pointer.value)) == b"\7" * 16
    assert driver.cuMemFree_v2(pointer) == 0
    assert driver.cuMemFree_v2(pointer) == 1, "freed twice"


@test
def both_runtimes_answer_by_their_own_version():
    pointer = ctypes.c_uint64()
    driver = ctypes.CDLL("libcuda.so.1")
    assert driver.cuMemAllocManaged(ctypes.byref(pointer), ctypes.c_size_t(4 * MIB), 1) == 0
    size = ctypes.c_size_t(4 * MIB)
    for name, version, properties, host in (
        ("libcudart.so.12", 12040, "cudaGetDeviceProperties_v2", (ctypes.c_int(-1), None)),
        # A location (type host, id 0) is passed in one register; then the flags.
        ("libcudart.so.13", 13000, "cudaGetDeviceProperties", (ctypes.c_uint64(2), ctypes.c_uint(0), None)),
    ):
        runtime = ctypes.CDLL(name)
        value = ctypes.c_int()
        assert runtime.cudaRuntimeGetVersion(ctypes.byref(value)) == 0 and value.value == version, (name, value)
        assert runtime.cudaMemPrefetchAsync(pointer, size, *host) == 0, name
        room = (ctypes.c_uint64 * 256)()
        assert getattr(runtime, properties)(room, 0) == 0
        assert room[36] == torch.cuda.mem_get_info()[1], "totalGlobalMem, in both after name, uuid and luid"
    assert driver.cuCtxSynchronize() == 0
    assert driver.cuMemFree_v2(pointer) == 0


def python(script, **environment):
    """What a script prints in a process of its own."""
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@test
def linear_layers_run_forwards_and_backwards():
    # What they compute is not looked at: kernels do nothing.
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 8)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    out = model(torch.empty(32, 64, device="cuda"))
    assert out.shape == (32, 8)
    out.sum().backward()
    optimizer.step()
    half = model.half()(torch.empty(32, 64, device="cuda", dtype=torch.half))
    assert half.shape == (32, 8)
    torch.cuda.synchronize()


@test
def libraries_that_do_not_start_say_so():
    try:
        torch.fft.fft(torch.empty(8, device="cuda"))
    except RuntimeError as error:
        assert "cuFFT" in str(error), error
    else:
        raise AssertionError("cuFFT ran: take it into the list of what runs")


@test
def visible_devices_are_honoured():
    count = "import torch; print(torch.cuda.device_count())"
    assert python(count, CUDA_VISIBLE_DEVICES="32") == "0"
    assert python(count, CUDA_VISIBLE_DEVICES="1,0", TORCH_UVM_SIM_DEVICES="3") == "2"


@test
def expandable_segments_expand():
    script = """
import torch
a = torch.arange(1 << 20, dtype=torch.uint8)
blocks = [a.cuda() for _ in range(80)]
assert all(torch.equal(b.cpu(), a) for b in blocks)
segments = torch.cuda.memory_snapshot()
assert any(s["is_expandable"] for s in segments), segments
free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
# The middle goes back to the device, the rest keeps its contents and its addresses.
del blocks[20:60]
torch.cuda.empty_cache()
gone = reserved - torch.cuda.memory_reserved()
assert gone >= 36 << 20 and torch.cuda.mem_get_info()[0] - free == gone, (gone, torch.cuda.mem_get_info(), free)
blocks += [a.cuda() for _ in range(40)]
large = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
assert all(torch.equal(b.cpu(), a) for b in blocks)
# Segments grow while a graph is captured; another stream has segments of its own.
side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
with torch.cuda.stream(side):
    beside = blocks[0].clone()
torch.cuda.synchronize()
with torch.cuda.graph(graph):
    copies = [blocks[0].clone() for _ in range(40)]
graph.replay()
torch.cuda.synchronize()
assert all(torch.equal(b.cpu(), a) for b in [beside, *copies])
graph.reset()
try:
    torch.empty(4 * torch.cuda.mem_get_info()[1], dtype=torch.uint8, device="cuda")
except torch.cuda.OutOfMemoryError:
    pass
else:
    raise AssertionError("four times the device's memory")
del blocks, large, beside, copies, graph
torch.cuda.synchronize()
torch.cuda.empty_cache()
print(torch.cuda.memory_reserved())
"""
    assert python(script, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True") == "0"


@test
def other_processes_map_memory():
    """Segments that expand are made of memory without an address, which goes to others as a file descriptor."""
    command = [sys.executable, __file__, other_processes_open_memory.__name__]
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@test
def other_processes_open_memory():
    context = torch.multiprocessing.get_context("spawn")
    data = pattern(MIB, 5)
    here, there = context.Queue(), context.Queue()
    child = context.Process(target=_child_of_other_processes_open_memory, args=(there, here))
    child.start()
    try:
        shared = data.cuda()
        there.put(shared)
        assert here.get(timeout=120) == int(data.sum())
        assert shared[0].item() == 255 and torch.equal(shared[1:].cpu(), data[1:]), (
            "the child has written the first byte"
        )
    finally:
        there.put(None)
        child.join(120)
    assert child.exitcode == 0


def _child_of_other_processes_open_memory(inbox, outbox):
    tensor = inbox.get()
    total = int(tensor.cpu().sum())
    tensor[:1].copy_(torch.tensor([255], dtype=torch.uint8))
    torch.cuda.synchronize()
    outbox.put(total)
    del tensor
    inbox.get()


@test
def a_forked_child_may_not_use_the_device():
    child = os.fork()
    if child == 0:
        try:
            torch.empty(1, device="cuda")
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@test
def other_programs_live_with_the_preload():
    assert subprocess.run(["sh", "-c", "exit 3"]).returncode == 3


def main():
    chosen = [function for function in TESTS if len(sys.argv) < 2 or function.__name__ in sys.argv[1:]]
    failed = 0
    for function in chosen:
        try:
            function()
        except Exception as error:
            failed += 1
            print(f"FAILED {function.__name__}: {type(error).__name__}: {error}")
        else:
            print(f"ok     {function.__name__}")
    print(f"{len(chosen) - failed} passed, {failed} failed (PyTorch {torch.__version__})")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
