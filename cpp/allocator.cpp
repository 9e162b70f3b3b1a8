#include <torch_uvm/allocator.h>

#include <torch_uvm/failure.h>
#include <torch_uvm/observers.h>
#include <torch_uvm/settings.h>
#include <torch_uvm/translate.h>

#include <c10/core/impl/GPUTrace.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/Exception.h>
#include <c10/util/env.h>

#include <cuda_runtime_api.h>

namespace torch_uvm {

namespace {

using c10cca::RecordContext;

// Above this native refuses at once; below, sizes can be rounded up without overflow.
constexpr size_t kOneExbibyte = size_t{1} << 60;

cudaStream_t current_stream(c10::DeviceIndex device) {
  const auto stream = c10::cuda::getCurrentCUDAStream(device);
  // Stream 0 is the default stream in c10. CUDAStream::stream() would switch devices to and fro before it says so.
  return stream.id() == 0 ? nullptr : stream.stream();
}

// Binds the device's context to this thread, once. Without one cudaGetDevice, which every allocation asks, looks for it
// each time under a lock of the whole process. The device is the current one and has a context: it just gave memory.
void bind_context(c10::DeviceIndex device) {
  thread_local c10::DeviceIndex bound = -1;
  if (C10_UNLIKELY(bound != device)) {
    C10_CUDA_CHECK(cudaSetDevice(device));
    bound = device;
  }
}

void refuse_absurd(size_t bytes) {
  TORCH_CHECK_WITH(
      OutOfMemoryError, bytes < kOneExbibyte, "CUDA out of memory. Tried to allocate more than 1EB memory.");
}

// Tools such as the CUDA sanitizer of torch.cuda listen to these.
void tell_allocated(void* ptr) {
  if (const auto* interpreter = c10::impl::GPUTrace::get_trace(); C10_UNLIKELY(interpreter != nullptr)) {
    (*interpreter)->trace_gpu_memory_allocation(c10::kCUDA, reinterpret_cast<uintptr_t>(ptr));
  }
}

void tell_freed(void* ptr) {
  if (const auto* interpreter = c10::impl::GPUTrace::get_trace(); C10_UNLIKELY(interpreter != nullptr)) {
    (*interpreter)->trace_gpu_memory_deallocation(c10::kCUDA, reinterpret_cast<uintptr_t>(ptr));
  }
}

void tell_profiler(void* ptr, const bridge::Allocation& allocation, int sign) {
  bridge::DeviceStats stats{};
  check(bridge::device_stats(allocation.device, stats));
  c10::reportMemoryUsageToProfiler(
      ptr,
      sign * static_cast<int64_t>(allocation.block_bytes),
      stats.allocated_bytes.aggregate.current,
      stats.reserved_bytes.aggregate.current,
      cuda(static_cast<c10::DeviceIndex>(allocation.device)));
}

// Memory straight from CUDA, for debugging with tools that look at each allocation: plain device memory, as native's.
// Illegal while a stream captures, on purpose.
void* uncached_allocate(size_t bytes) {
  void* ptr = nullptr;
  C10_CUDA_CHECK(cudaMalloc(&ptr, bytes));
  tell_allocated(ptr);
  return ptr;
}

void uncached_delete(void* ptr) {
  tell_freed(ptr);
  C10_CUDA_CHECK(cudaFree(ptr));
}

} // namespace

// Throws for what is wrong with our options in the environment.
void check_options() {
  rust::String options;
  check(bridge::options(options));
}

UvmAllocator& UvmAllocator::instance() {
  static auto* allocator = new UvmAllocator();
  return *allocator;
}

std::string UvmAllocator::name() {
  return "uvm";
}

void UvmAllocator::init(int device_count) {
  const bool first = !bridge::initialized();
  check_options(); // before PyTorch's, whose parser is at a loss with a backend beside use_uvm
  parse_environment();
  check(bridge::init(device_count, native_settings()));
  if (const double fraction = per_process_memory_fraction(); first && fraction != 1.0) {
    for (int device = 0; device < device_count; ++device) {
      setMemoryFraction(fraction, static_cast<c10::DeviceIndex>(device));
    }
  }
  if (!trace_trackers().empty()) {
    check(bridge::set_tracing(true));
  }
}

bool UvmAllocator::initialized() {
  return bridge::initialized();
}

void UvmAllocator::enable(bool value) {
  enabled_.store(value, std::memory_order_relaxed);
}

bool UvmAllocator::isEnabled() const {
  return enabled_.load(std::memory_order_relaxed);
}

bool UvmAllocator::caching() const {
  static const bool forced_off = c10::utils::has_env("PYTORCH_NO_CUDA_MEMORY_CACHING");
  return C10_LIKELY(!forced_off && isEnabled());
}

// Allocation and free: the hot path.

void* UvmAllocator::malloc(c10::DeviceIndex device, size_t bytes, cudaStream_t stream) {
  auto stack = stacks_.gather(RecordContext::STATE);
  void* ptr = pointer(
      C10_LIKELY(!stack) ? bridge::allocate(device, bytes, handle(stream))
                         : bridge::allocate_with_context(device, bytes, handle(stream), std::move(stack)));
  check(ptr != nullptr);
  bind_context(device);
  tell(ptr);
  return ptr;
}

// Tells whoever listens of a new allocation.
void UvmAllocator::tell(void* ptr) {
  tell_allocated(ptr);
  if (C10_UNLIKELY(c10::memoryProfilingEnabled())) {
    bridge::Allocation allocation{};
    check(bridge::allocation(address(ptr), allocation));
    tell_profiler(ptr, allocation, 1);
  }
}

bool UvmAllocator::free(void* ptr) {
  if (ptr == nullptr) {
    return true;
  }
  const bool profiling = c10::memoryProfilingEnabled();
  bridge::Allocation allocation{};
  if (C10_UNLIKELY(profiling || c10::impl::GPUTrace::get_trace() != nullptr)) {
    // Nobody is told of a free that is none.
    if (!bridge::allocation(address(ptr), allocation)) {
      return false;
    }
    // Before the free: afterwards another thread may have the address already.
    tell_freed(ptr);
  }
  auto stack = stacks_.gather(RecordContext::ALL);
  const bool freed = C10_LIKELY(!stack) ? bridge::free(address(ptr))
                                        : bridge::free_with_context(address(ptr), std::move(stack));
  if (C10_UNLIKELY(profiling && freed)) {
    tell_profiler(ptr, allocation, -1);
  }
  return freed;
}

// Tensors are freed by this, in destructors: an exception would end the process.
void UvmAllocator::deleter(void* ptr) {
  if (C10_UNLIKELY(!instance().free(ptr))) {
    warn_failure();
  }
}

c10::DataPtr UvmAllocator::allocate(size_t bytes) {
  refuse_absurd(bytes);
  const auto device = current_device();
  if (C10_UNLIKELY(!caching())) {
    void* ptr = uncached_allocate(bytes);
    return {ptr, ptr, &uncached_delete, cuda(device)};
  }
  void* ptr = bytes == 0 ? nullptr : malloc(device, bytes, current_stream(device));
  return {ptr, ptr, &deleter, cuda(device)};
}

c10::DeleterFnPtr UvmAllocator::raw_deleter() const {
  return caching() ? &deleter : &uncached_delete;
}

void* UvmAllocator::raw_alloc(size_t bytes) {
  if (bytes == 0) {
    return nullptr;
  }
  refuse_absurd(bytes);
  if (C10_UNLIKELY(!caching())) {
    return uncached_allocate(bytes);
  }
  const auto device = current_device();
  return malloc(device, bytes, current_stream(device));
}

void* UvmAllocator::raw_alloc_with_stream(size_t bytes, cudaStream_t stream) {
  if (bytes == 0) {
    return nullptr;
  }
  refuse_absurd(bytes);
  return caching() ? malloc(current_device(), bytes, stream) : uncached_allocate(bytes);
}

void UvmAllocator::raw_delete(void* ptr) {
  if (caching()) {
    check(free(ptr));
  } else {
    uncached_delete(ptr);
  }
}

c10::DataPtr UvmAllocator::allocate_at(size_t bytes, void* wanted) {
  refuse_absurd(bytes);
  TORCH_CHECK(caching(), "allocateWithAddress: this allocator keeps no memory while its caching is off");
  const auto device = current_device();
  if (bytes == 0) {
    return {nullptr, nullptr, &deleter, cuda(device)};
  }
  void* ptr = pointer(
      bridge::allocate_at(
          device, address(wanted), bytes, handle(current_stream(device)), stacks_.gather(RecordContext::STATE)));
  check(ptr != nullptr);
  tell(ptr);
  return {ptr, ptr, &deleter, cuda(device)};
}

void UvmAllocator::recordStream(const c10::DataPtr& ptr, c10::cuda::CUDAStream stream) {
  // An empty tensor has no memory, and one that came from another process or allocator is not ours to keep alive.
  if (ptr.get() == nullptr || ptr.get_deleter() != &deleter) {
    return;
  }
  check(bridge::record_stream(address(ptr.get()), stream.device_index(), handle(stream.stream())));
}

// Caches and limits.

void UvmAllocator::empty_cache(MempoolId pool) {
  check(bridge::empty_cache(pool_id(pool), stacks_.gather(RecordContext::ALL)));
  custom_allocators().drop_forgotten();
}

void UvmAllocator::cacheInfo(c10::DeviceIndex device, size_t* largest_block) {
  std::uint64_t largest = 0;
  check(bridge::cache_info(device, largest));
  // The caller's own figure is a lower bound, as in native.
  *largest_block = std::max(*largest_block, static_cast<size_t>(largest));
}

double UvmAllocator::getMemoryFraction(c10::DeviceIndex device) {
  double fraction = 0;
  check(bridge::memory_fraction(device, fraction));
  return fraction;
}

void UvmAllocator::setMemoryFraction(double fraction, c10::DeviceIndex device) {
  check(bridge::set_memory_fraction(device, fraction));
}

std::pair<size_t, size_t> UvmAllocator::memory_info(c10::DeviceIndex device) {
  std::uint64_t free = 0;
  std::uint64_t total = 0;
  check(bridge::memory_info(device, free, total));
  return {free, total};
}

void* UvmAllocator::getBaseAllocation(void* ptr, size_t* size) {
  bridge::BaseAllocation base{};
  check(bridge::base_allocation(address(ptr), base));
  if (size != nullptr) {
    *size = base.bytes;
  }
  return pointer(base.address);
}

// Other processes, other devices.

c10cca::ShareableHandle UvmAllocator::shareIpcHandle(void* ptr) {
  return share(ptr);
}

std::shared_ptr<void> UvmAllocator::getIpcDevPtr(std::string handle) {
  return opened_handles_.open(handle);
}

void UvmAllocator::enablePeerAccess(c10::DeviceIndex device, c10::DeviceIndex device_to_access) {
  // Managed memory is reachable from every device without; device placement needs it.
  c10::cuda::CUDAGuard guard(device);
  const cudaError_t result = C10_CUDA_ERROR_HANDLED(cudaDeviceEnablePeerAccess(device_to_access, 0));
  if (result == cudaErrorPeerAccessAlreadyEnabled) {
    (void)cudaGetLastError(); // it is no error: leave no trace of it
  } else {
    C10_CUDA_CHECK(result);
  }
}

cudaError_t UvmAllocator::memcpyAsync(
    void* dst,
    int /*dst_device*/,
    const void* src,
    int /*src_device*/,
    size_t count,
    cudaStream_t stream,
    bool /*p2p_enabled*/) {
  // Managed memory and memory from cudaMalloc are both known to CUDA by address, with and without peer access.
  return cudaMemcpyAsync(dst, src, count, cudaMemcpyDeviceToDevice, stream);
}

void UvmAllocator::copy_data(void* dest, const void* src, std::size_t count) const {
  C10_CUDA_CHECK(cudaMemcpy(dest, src, count, cudaMemcpyDeviceToDevice));
}

} // namespace torch_uvm
