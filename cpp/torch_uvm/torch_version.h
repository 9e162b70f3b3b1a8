// Everything that differs between PyTorch versions, and nothing else. The rest of cpp/ is the same for all of them.
//
// The build says which version it is (TORCH_UVM_TORCH_VERSION, major * 100 + minor): c10 has no header that does in all
// of them. A new version is added by extending the conditions here and, where CUDAAllocator gained or changed a method,
// AllocatorInterface below.
#pragma once

// The official wheels' libc10_cuda can make expandable segments, and the headers of up to 2.14 answer whether they are
// asked for only where this says so.
#ifndef PYTORCH_C10_DRIVER_API_SUPPORTED
#define PYTORCH_C10_DRIVER_API_SUPPORTED
#endif

#include <c10/cuda/CUDAAllocatorConfig.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <torch_uvm/bridge.rs.h>

#ifndef TORCH_UVM_TORCH_VERSION
#error "TORCH_UVM_TORCH_VERSION is not defined: the build defines it, 206 for PyTorch 2.6 (cmake/TorchUvm.cmake)"
#endif
#if TORCH_UVM_TORCH_VERSION < 206 || TORCH_UVM_TORCH_VERSION > 215
#error "This PyTorch version is not supported: TORCH_UVM_TORCH_VERSION must be 206 (2.6) to 215 (2.15)"
#endif
#define TORCH_UVM_SINCE(version) (TORCH_UVM_TORCH_VERSION >= (version))

#if TORCH_UVM_SINCE(209)
#include <c10/core/AllocatorConfig.h>
#endif

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace torch_uvm {

namespace c10cca = c10::cuda::CUDACachingAllocator;

#if TORCH_UVM_SINCE(211)
namespace c10cda = c10::CachingDeviceAllocator; // where segments and traces live since they serve every device
#else
namespace c10cda = c10::cuda::CUDACachingAllocator;
#endif

using MempoolId = c10::cuda::MempoolId_t;

// The allocator that a MemPool brings along. Up to 2.10 whoever made the pool keeps it alive, and nothing is owned here.
using CustomAllocator = std::shared_ptr<c10cca::CUDAAllocator>;

// What recordHistory was asked for.
struct HistoryRequest {
  bool enabled;
  c10cca::CreateContextFn recorder;
  size_t max_entries;
  c10cca::RecordContext when;
  bool clear; // forget what was recorded before
  std::vector<std::string> skip; // names of actions
};

// PyTorch's interface with the same methods in every version: what changed its signature, or came later, ends here in
// one of ours.
//
// Two methods are left as they are: markCaptureBegin and markCaptureEnd (2.13), by which PyTorch tells a capture from a
// MemPool in use. This allocator asks CUDA whether the stream captures, which works with every version.
class AllocatorInterface : public c10cca::CUDAAllocator {
 public:
#if TORCH_UVM_SINCE(209)
  using c10cca::CUDAAllocator::recordStream; // the overload for any device's streams
#endif

  void beginAllocateToPool(c10::DeviceIndex device, MempoolId pool, std::function<bool(cudaStream_t)> filter) final {
    begin_allocate_to_pool(device, pool, std::move(filter), active_custom_allocator(pool));
  }

#if TORCH_UVM_SINCE(208)
  void emptyCache(MempoolId pool) final {
    empty_cache(pool);
  }
  void pushCompileContext(std::string& name) final {
    push_compile_context(name);
  }
  void popCompileContext() final {
    pop_compile_context();
  }
#else
  void emptyCache() final {
    empty_cache(active_pool_id());
  }
  c10cca::SnapshotInfo snapshot() final {
    return snapshot_of(active_pool_id(), /*with_traces=*/true);
  }
  void recordHistory(bool enabled, c10cca::CreateContextFn recorder, size_t max_entries, c10cca::RecordContext when)
      final {
    record_history({enabled, recorder, max_entries, when, /*clear=*/false, /*skip=*/{}});
  }
  void ensureExistsAndIncrefPool(c10::DeviceIndex device, MempoolId pool) final {
    ensure_pool(device, pool, active_custom_allocator(pool));
  }
#endif

#if TORCH_UVM_SINCE(208) && !TORCH_UVM_SINCE(211)
  c10cca::SnapshotInfo snapshot(MempoolId pool) final {
    return snapshot_of(pool, /*with_traces=*/true);
  }
  void recordHistory(
      bool enabled,
      c10cca::CreateContextFn recorder,
      size_t max_entries,
      c10cca::RecordContext when,
      bool clear) final {
    record_history({enabled, recorder, max_entries, when, clear, /*skip=*/{}});
  }
  void createOrIncrefPool(c10::DeviceIndex device, MempoolId pool, c10cca::CUDAAllocator* custom) final {
    ensure_pool(device, pool, not_owned(custom));
  }
  void setUseOnOOM(c10::DeviceIndex device, MempoolId pool) final {
    set_use_on_oom(device, pool, true);
  }
#endif

#if TORCH_UVM_SINCE(210)
  void setNoSplit(c10::DeviceIndex device, MempoolId pool) final {
    set_no_split(device, pool);
  }
  std::vector<c10cca::StreamSegmentSize> getExpandableSegmentSizes(c10::DeviceIndex device) final {
    std::vector<c10cca::StreamSegmentSize> sizes;
    for (const auto& segment : snapshot_of({0, 0}, /*with_traces=*/false).segments) {
      if (segment.device == device && segment.is_expandable) {
        sizes.emplace_back(static_cast<cudaStream_t>(segment.stream), !segment.is_large, segment.total_size);
      }
    }
    return sizes;
  }
  void setUserMetadata(const std::string& metadata) final {
    set_user_metadata(metadata);
  }
  std::string getUserMetadata() final {
    return user_metadata();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) final {
    return memory_info(device);
  }
#endif

#if TORCH_UVM_SINCE(211)
  c10cca::SnapshotInfo snapshot(MempoolId pool, bool with_traces) final {
    return snapshot_of(pool, with_traces);
  }
  void recordHistory(
      bool enabled,
      c10cca::CreateContextFn recorder,
      size_t max_entries,
      c10cca::RecordContext when,
      bool clear,
      const std::vector<std::string>& skip) final {
    record_history({enabled, recorder, max_entries, when, clear, skip});
  }
  void createOrIncrefPool(c10::DeviceIndex device, MempoolId pool, CustomAllocator custom) final {
    ensure_pool(device, pool, std::move(custom));
  }
  void setUseOnOOM(c10::DeviceIndex device, MempoolId pool, bool on) final {
    set_use_on_oom(device, pool, on);
  }
#endif

#if TORCH_UVM_SINCE(212)
  std::shared_ptr<c10::GatheredContext> getContextForPointer(const void* ptr) final {
    return context_of(ptr);
  }
  void attachOomRejectionObserver(c10cca::OomRejectionObserver observer) final {
    attach_oom_rejection_observer(std::move(observer));
  }
#endif

#if TORCH_UVM_SINCE(213)
  c10::DataPtr allocateWithAddress(size_t bytes, void* address) final {
    return allocate_at(bytes, address);
  }
#endif

#if TORCH_UVM_SINCE(214)
  bool supportsUserMetadata() final {
    return true;
  }
  void annotateMemory(const void* ptr, const std::string& metadata) final {
    annotate(ptr, metadata);
  }
#endif

  // Whether a MemPool's own allocator may be called now. Up to 2.7 it is only known to live while its pool is active on
  // this thread; later versions keep it as long as the pool.
  static bool reachable(const c10cca::CUDAAllocator* custom) {
#if TORCH_UVM_SINCE(208)
    return custom != nullptr;
#else
    const auto* active = c10::cuda::MemPoolContext::getActiveMemPool();
    return active != nullptr && const_cast<c10::cuda::MemPool*>(active)->allocator() == custom;
#endif
  }

 protected:
  // Device, requested bytes, allocated bytes, total bytes.
  using RejectionObserver = std::function<void(int64_t, size_t, size_t, size_t)>;

  virtual void empty_cache(MempoolId pool) = 0; // {0, 0}: all
  virtual c10cca::SnapshotInfo snapshot_of(MempoolId pool, bool with_traces) = 0; // {0, 0}: all
  virtual void record_history(const HistoryRequest& request) = 0;
  virtual void ensure_pool(c10::DeviceIndex device, MempoolId pool, CustomAllocator custom) = 0;
  virtual void begin_allocate_to_pool(
      c10::DeviceIndex device,
      MempoolId pool,
      std::function<bool(cudaStream_t)> filter,
      CustomAllocator custom) = 0;
  virtual void set_use_on_oom(c10::DeviceIndex device, MempoolId pool, bool on) = 0;
  virtual void set_no_split(c10::DeviceIndex device, MempoolId pool) = 0;
  virtual void push_compile_context(const std::string& name) = 0;
  virtual void pop_compile_context() = 0;
  virtual void set_user_metadata(const std::string& metadata) = 0;
  virtual std::string user_metadata() = 0;
  virtual void annotate(const void* ptr, const std::string& metadata) = 0;
  virtual std::shared_ptr<c10::GatheredContext> context_of(const void* ptr) = 0;
  virtual std::pair<size_t, size_t> memory_info(c10::DeviceIndex device) = 0; // free, total
  virtual void attach_oom_rejection_observer(RejectionObserver observer) = 0;
  virtual c10::DataPtr allocate_at(size_t bytes, void* address) = 0;

 private:
  static CustomAllocator not_owned(c10cca::CUDAAllocator* custom) {
    return CustomAllocator(std::shared_ptr<void>(), custom);
  }
#if TORCH_UVM_SINCE(208)
  static CustomAllocator active_custom_allocator(MempoolId /*pool*/) {
    return nullptr; // createOrIncrefPool was told
  }
#else
  // Up to 2.7 an allocator is known only through the pool that is active on this thread.
  static CustomAllocator active_custom_allocator(MempoolId pool) {
    auto* active = c10::cuda::MemPoolContext::getActiveMemPool();
    return active != nullptr && active->id() == pool ? not_owned(active->allocator()) : nullptr;
  }
  static MempoolId active_pool_id() {
    auto* active = c10::cuda::MemPoolContext::getActiveMemPool();
    return active ? active->id() : MempoolId{0, 0};
  }
#endif
};

#if TORCH_UVM_SINCE(210)
using NativeConfig = c10::CachingAllocator::AcceleratorAllocatorConfig;
#else
using NativeConfig = c10cca::CUDAAllocatorConfig;
#endif

// Cuts a settings string into keys, values and each of ':', ',', '[', ']', as the PyTorch that it is for.
inline std::vector<std::string> settings_tokens(const std::string& settings) {
  std::vector<std::string> tokens;
#if TORCH_UVM_SINCE(210)
  const c10::CachingAllocator::ConfigTokenizer tokenizer(settings);
  tokens.reserve(tokenizer.size());
  for (size_t i = 0; i < tokenizer.size(); ++i) {
    tokens.push_back(tokenizer[i]);
  }
#else
  // What CUDAAllocatorConfig::lexArgs does, which is private. Of white space it drops blanks only.
  std::string word;
  const auto end_word = [&] {
    if (!word.empty()) {
      tokens.push_back(std::exchange(word, {}));
    }
  };
  for (const char c : settings) {
    if (c == ',' || c == ':' || c == '[' || c == ']') {
      end_word();
      tokens.emplace_back(1, c);
    } else if (c != ' ') {
      word += c;
    }
  }
  end_word();
#endif
  return tokens;
}

// Has PyTorch parse its settings in the environment, if it has not done so yet; throws for what is wrong with them.
// The settings for CUDA come first, as with native: of two complaints about a key programs then see the same one.
inline void parse_native_settings() {
  c10cca::CUDAAllocatorConfig::instance();
#if TORCH_UVM_SINCE(209)
  c10::CachingAllocator::AcceleratorAllocatorConfig::instance();
#endif
}

// Makes `ours` PyTorch's allocator for CUDA.
inline void take_place_of_native(c10cca::CUDAAllocator* ours) {
  c10cca::allocator.store(ours);
#if TORCH_UVM_SINCE(209)
  // Since 2.9 c10's registry has CUDA's allocator too (torch.accelerator asks there), in some versions with a priority.
  c10::SetAllocator(c10::kCUDA, ours, /*priority=*/255);
#endif
}

// PyTorch's own settings, parsed.
inline bridge::NativeSettings native_settings() {
  using Config = c10cca::CUDAAllocatorConfig;
  bridge::NativeSettings settings{};
  settings.max_split_size = NativeConfig::max_split_size();
  settings.max_non_split_rounding_size = Config::max_non_split_rounding_size();
  settings.garbage_collection_threshold = NativeConfig::garbage_collection_threshold();
  settings.expandable_segments = Config::expandable_segments();
#if TORCH_UVM_SINCE(211)
  settings.large_segment_size = NativeConfig::large_segment_size();
#else
  settings.large_segment_size = size_t{20} << 20; // kLargeBuffer
#endif
#if TORCH_UVM_SINCE(212)
  settings.throw_on_oom = Config::throw_on_cudamalloc_oom();
#endif
  const auto& divisions = NativeConfig::roundup_power2_divisions();
  std::copy_n(
      divisions.begin(),
      std::min(divisions.size(), settings.roundup_power2_divisions.size()),
      settings.roundup_power2_divisions.begin());
  return settings;
}

// The fraction of a device's memory that PyTorch's settings allow each process.
inline double per_process_memory_fraction() {
#if TORCH_UVM_SINCE(210)
  return c10cca::CUDAAllocatorConfig::per_process_memory_fraction();
#else
  return 1.0;
#endif
}

// The settings as a snapshot shows them.
inline c10cca::AllocatorConfigInfo config_info() {
  using Config = c10cca::CUDAAllocatorConfig;
  c10cca::AllocatorConfigInfo info{};
  info.garbage_collection_threshold = NativeConfig::garbage_collection_threshold();
  info.max_split_size = NativeConfig::max_split_size();
  info.pinned_num_register_threads = Config::pinned_num_register_threads();
  info.expandable_segments = Config::expandable_segments();
  info.release_lock_on_malloc = Config::release_lock_on_cudamalloc();
  info.pinned_use_host_register = Config::pinned_use_cuda_host_register();
#if TORCH_UVM_SINCE(209)
  info.graph_capture_record_stream_reuse = Config::graph_capture_record_stream_reuse();
#endif
#if TORCH_UVM_SINCE(213)
  info.max_round_threshold = NativeConfig::pinned_max_round_threshold();
  info.max_cached_size = NativeConfig::pinned_max_cached_size();
#endif
  info.last_allocator_settings = NativeConfig::last_allocator_settings();
  info.roundup_power2_divisions = NativeConfig::roundup_power2_divisions();
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
#if TORCH_UVM_SINCE(208)
      MempoolId{entry.pool.first, entry.pool.second},
#endif
      static_cast<c10::approx_time_t>(entry.time),
      // clang-format off: it cannot place a comma that only some versions have
      std::move(context)
#if TORCH_UVM_SINCE(208)
      // What native says where nothing compiled is running.
      , entry.compile_context.empty() ? std::string("N/A") : std::string(entry.compile_context)
#endif
#if TORCH_UVM_SINCE(210)
      , std::string(entry.user_metadata)
#endif
      // clang-format on
  );
}

// The action that only newer versions know.
inline c10cca::TraceEntry::Action annotation() {
#if TORCH_UVM_SINCE(214)
  return c10cca::TraceEntry::ANNOTATE;
#else
  TORCH_INTERNAL_ASSERT(false, "no PyTorch before 2.14 annotates memory");
#endif
}

// The statistics that came later than 2.6. `translate` makes a StatArray of ours one of theirs.
template <typename Translate>
void add_later_stats(
    c10::CachingDeviceAllocator::DeviceStats& stats,
    const bridge::DeviceStats& from,
    Translate translate) {
#if TORCH_UVM_SINCE(212)
  stats.num_oom_rejections = from.num_oom_rejections;
#endif
#if TORCH_UVM_SINCE(213)
  for (const auto& reserved : from.pool_reserved_bytes) {
    stats.reserved_bytes_by_private_pools[{reserved.pool.first, reserved.pool.second}] = translate(reserved.bytes);
  }
#endif
}

} // namespace torch_uvm
