// Everything that differs between PyTorch versions, and nothing else. The rest of cpp/ is the same for all of them.
//
// The build says which version it is (TORCH_UVM_TORCH_VERSION, major * 100 + minor): c10 has no header that does in all
// of them. A new version is added by extending the conditions here and, where CUDAAllocator gained or changed a method,
// AllocatorInterface below.
#pragma once

#include <c10/cuda/CUDAAllocatorConfig.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <torch_uvm/bridge.rs.h>

#include <algorithm>
#include <utility>

#ifndef TORCH_UVM_TORCH_VERSION
#error "TORCH_UVM_TORCH_VERSION is not defined: the build defines it, 206 for PyTorch 2.6 (cmake/TorchUvm.cmake)"
#endif
#if TORCH_UVM_TORCH_VERSION != 206
#error "This PyTorch version is not supported: TORCH_UVM_TORCH_VERSION must be 206 (PyTorch 2.6)"
#endif

namespace torch_uvm {

namespace c10cca = c10::cuda::CUDACachingAllocator;

using MempoolId = c10::cuda::MempoolId_t;

// What recordHistory was asked for.
struct HistoryRequest {
  bool enabled;
  c10cca::CreateContextFn recorder;
  size_t max_entries;
  c10cca::RecordContext when;
  bool clear; // forget what was recorded before
};

// PyTorch's interface with the same methods in every version: what changed its signature ends here, in one of ours.
class AllocatorInterface : public c10cca::CUDAAllocator {
 public:
  void emptyCache() final {
    empty_cache(active_pool_id());
  }
  c10cca::SnapshotInfo snapshot() final {
    return snapshot_of(active_pool_id());
  }
  void recordHistory(
      bool enabled,
      c10cca::CreateContextFn recorder,
      size_t max_entries,
      c10cca::RecordContext when) final {
    record_history({enabled, recorder, max_entries, when, /*clear=*/false});
  }
  void ensureExistsAndIncrefPool(c10::DeviceIndex device, MempoolId pool) final {
    ensure_pool(device, pool, custom_allocator(pool));
  }
  void beginAllocateToPool(c10::DeviceIndex device, MempoolId pool, std::function<bool(cudaStream_t)> filter)
      final {
    begin_allocate_to_pool(device, pool, std::move(filter), custom_allocator(pool));
  }

  // The allocator that a MemPool brought along, if it can be reached now. 2.6 knows it only through the pool that is
  // active on this thread.
  static c10cca::CUDAAllocator* active_custom_allocator() {
    auto* active = c10::cuda::MemPoolContext::getActiveMemPool();
    return active ? active->allocator() : nullptr;
  }

 protected:
  virtual void empty_cache(MempoolId pool) = 0; // {0, 0}: all
  virtual c10cca::SnapshotInfo snapshot_of(MempoolId pool) = 0; // {0, 0}: all
  virtual void record_history(const HistoryRequest& request) = 0;
  virtual void ensure_pool(c10::DeviceIndex device, MempoolId pool, c10cca::CUDAAllocator* custom) = 0;
  virtual void begin_allocate_to_pool(
      c10::DeviceIndex device,
      MempoolId pool,
      std::function<bool(cudaStream_t)> filter,
      c10cca::CUDAAllocator* custom) = 0;

 private:
  static MempoolId active_pool_id() {
    auto* active = c10::cuda::MemPoolContext::getActiveMemPool();
    return active ? active->id() : MempoolId{0, 0};
  }
  static c10cca::CUDAAllocator* custom_allocator(MempoolId pool) {
    return active_pool_id() == pool ? active_custom_allocator() : nullptr;
  }
};

// PyTorch's own settings. The first call parses the environment, and throws for what is wrong with it.
inline bridge::NativeSettings native_settings() {
  using Config = c10cca::CUDAAllocatorConfig;
  bridge::NativeSettings settings{};
  settings.max_split_size = Config::max_split_size();
  settings.max_non_split_rounding_size = Config::max_non_split_rounding_size();
  settings.garbage_collection_threshold = Config::garbage_collection_threshold();
  settings.expandable_segments = Config::expandable_segments();
  const auto divisions = Config::roundup_power2_divisions();
  std::copy_n(
      divisions.begin(),
      std::min(divisions.size(), settings.roundup_power2_divisions.size()),
      settings.roundup_power2_divisions.begin());
  return settings;
}

// The settings as a snapshot shows them.
inline c10cca::AllocatorConfigInfo config_info() {
  using Config = c10cca::CUDAAllocatorConfig;
  c10cca::AllocatorConfigInfo info{};
  info.garbage_collection_threshold = Config::garbage_collection_threshold();
  info.max_split_size = Config::max_split_size();
  info.pinned_num_register_threads = Config::pinned_num_register_threads();
  info.expandable_segments = Config::expandable_segments();
  info.release_lock_on_malloc = Config::release_lock_on_cudamalloc();
  info.pinned_use_host_register = Config::pinned_use_cuda_host_register();
  info.last_allocator_settings = Config::last_allocator_settings();
  info.roundup_power2_divisions = Config::roundup_power2_divisions();
  return info;
}

inline c10cca::TraceEntry make_trace_entry(
    c10cca::TraceEntry::Action action,
    const bridge::TraceEntry& entry,
    std::shared_ptr<c10::GatheredContext> context) {
  return c10cca::TraceEntry(
      action,
      static_cast<c10::DeviceIndex>(entry.device),
      entry.address,
      entry.bytes,
      reinterpret_cast<cudaStream_t>(entry.stream),
      static_cast<c10::approx_time_t>(entry.time),
      std::move(context));
}

} // namespace torch_uvm
