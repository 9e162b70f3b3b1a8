// What the allocator asks of PyTorch (declared in torch_uvm/bridge_types.h).

#include <torch_uvm/allocator.h>
#include <torch_uvm/custom_allocators.h>
#include <torch_uvm/history.h>
#include <torch_uvm/observers.h>
#include <torch_uvm/torch_version.h>

#include <c10/util/ApproximateClock.h>
#include <c10/util/Exception.h>

namespace torch_uvm {

Observers<c10cca::OutOfMemoryObserver>& out_of_memory_observers() {
  static auto* observers = new Observers<c10cca::OutOfMemoryObserver>();
  return *observers;
}

Observers<c10cca::AllocatorTraceTracker>& trace_trackers() {
  static auto* trackers = new Observers<c10cca::AllocatorTraceTracker>();
  return *trackers;
}

Observers<std::function<void(int64_t, size_t, size_t, size_t)>>& rejection_observers() {
  static auto* observers = new Observers<std::function<void(int64_t, size_t, size_t, size_t)>>();
  return *observers;
}

CustomAllocators& custom_allocators() {
  static auto* allocators = new CustomAllocators();
  return *allocators;
}

namespace bridge {

namespace {

// Runs a function of PyTorch's from within the allocator, which exceptions cannot cross.
template <typename Function, typename Result>
Result guarded(const char* what, Result otherwise, Function function) noexcept {
  try {
    try {
      return function();
    } catch (const std::exception& error) {
      TORCH_WARN("uvm allocator: ", what, " threw: ", error.what());
    }
  } catch (...) { // NOLINT(bugprone-empty-catch): no exception at all, or a warning handler that throws
  }
  return otherwise;
}

} // namespace

StreamFilter::StreamFilter(std::function<bool(CUstream_st*)> filter) : filter_(std::move(filter)) {}

bool StreamFilter::accepts(std::uint64_t stream) const noexcept {
  return guarded("the stream filter of a memory pool", false, [&] {
    return filter_(reinterpret_cast<cudaStream_t>(stream));
  });
}

rust::Vec<rust::String> settings_tokens(rust::Slice<const std::uint8_t> conf) noexcept {
  rust::Vec<rust::String> tokens;
  for (const auto& token : torch_uvm::settings_tokens({reinterpret_cast<const char*>(conf.data()), conf.size()})) {
    tokens.push_back(rust::String::lossy(token));
  }
  return tokens;
}

bool run_free_memory_callbacks() noexcept {
  return guarded("a free-memory callback", false, [] {
    bool freed = false;
    for (const auto& name : c10::FreeCudaMemoryCallbacksRegistry()->Keys()) {
      freed |= c10::FreeCudaMemoryCallbacksRegistry()->Create(name)->Execute();
    }
    return freed;
  });
}

std::int64_t approximate_time() noexcept {
  return static_cast<std::int64_t>(c10::getApproximateTime());
}

rust::Vec<std::int64_t> unix_microseconds(rust::Slice<const std::int64_t> times) noexcept {
  const auto to_nanoseconds = UvmAllocator::instance().time_converter();
  rust::Vec<std::int64_t> microseconds;
  microseconds.reserve(times.size());
  for (const auto time : times) {
    microseconds.push_back(static_cast<std::int64_t>(to_nanoseconds(time)) / 1000);
  }
  return microseconds;
}

std::uint64_t custom_alloc(std::uint64_t allocator, std::uint64_t bytes) noexcept {
  return guarded("the allocator of a memory pool", std::uint64_t{0}, [&] {
    auto* custom = reinterpret_cast<c10cca::CUDAAllocator*>(allocator);
    return reinterpret_cast<std::uint64_t>(custom->raw_alloc(bytes));
  });
}

bool custom_free(std::uint64_t allocator, std::uint64_t ptr) noexcept {
  auto* custom = reinterpret_cast<c10cca::CUDAAllocator*>(allocator);
  if (!AllocatorInterface::reachable(custom)) {
    return false;
  }
  // Even where it throws, the memory was its own to free: the driver must not free it again.
  return guarded("the allocator of a memory pool", true, [&] {
    custom->raw_delete(reinterpret_cast<void*>(ptr));
    return true;
  });
}

void pool_forgotten(std::int32_t device, PoolId pool) noexcept {
  custom_allocators().forget(static_cast<c10::DeviceIndex>(device), {pool.first, pool.second});
}

void trace(const TraceEntry& entry) noexcept {
  guarded("a trace tracker", false, [&] {
    const auto translated = translate(entry);
    for (const auto& tracker : trace_trackers().all()) {
      tracker(translated);
    }
    return true;
  });
}

} // namespace bridge
} // namespace torch_uvm
