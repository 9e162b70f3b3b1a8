// The C++ side of src/bridge.rs's `extern "C++"` block: the opaque types that cross, and what the allocator asks of
// PyTorch.
//
// The Rust build compiles this header without PyTorch's or CUDA's headers: everything of theirs is only declared here.
#pragma once

#include <rust/cxx.h>

#include <cstdint>
#include <functional>
#include <memory>

struct CUstream_st; // what a cudaStream_t points to

namespace c10 {
struct GatheredContext;
}

namespace torch_uvm::bridge {

struct TraceEntry; // defined by the generated bridge header
struct PoolId;

// The stack that PyTorch gathered for an allocation. The allocator keeps it and gives it back.
struct StackContext {
  std::shared_ptr<c10::GatheredContext> gathered;
};

// Decides which streams' allocations go to a private pool.
class StreamFilter {
 public:
  explicit StreamFilter(std::function<bool(CUstream_st*)> filter);
  bool accepts(std::uint64_t stream) const noexcept;

 private:
  std::function<bool(CUstream_st*)> filter_;
};

// Called by the allocator. None of them throws: an exception of PyTorch's is reported as a warning.
rust::Vec<rust::String> settings_tokens(rust::Slice<const std::uint8_t> conf) noexcept;
bool run_free_memory_callbacks() noexcept;
std::int64_t approximate_time() noexcept;
rust::Vec<std::int64_t> unix_microseconds(rust::Slice<const std::int64_t> times) noexcept;
std::uint64_t custom_alloc(std::uint64_t allocator, std::uint64_t bytes) noexcept;
bool custom_free(std::uint64_t allocator, std::uint64_t ptr) noexcept;
void pool_forgotten(std::int32_t device, PoolId pool) noexcept;
void trace(const TraceEntry& entry) noexcept;

} // namespace torch_uvm::bridge
