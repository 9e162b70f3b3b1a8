// The allocator as PyTorch sees it: statistics and history.

#include <torch_uvm/allocator.h>

#include <torch_uvm/failure.h>
#include <torch_uvm/observers.h>
#include <torch_uvm/text.h>
#include <torch_uvm/translate.h>

namespace torch_uvm {

namespace {

using c10cca::RecordContext;

c10::CachingDeviceAllocator::Stat translate(const bridge::Stat& from) {
  c10::CachingDeviceAllocator::Stat stat;
  stat.current = from.current;
  stat.peak = from.peak;
  stat.allocated = from.allocated;
  stat.freed = from.freed;
  return stat;
}

c10::CachingDeviceAllocator::StatArray translate(const bridge::StatArray& from) {
  // In the order of c10::CachingDeviceAllocator::StatType.
  return {translate(from.aggregate), translate(from.small_pool), translate(from.large_pool)};
}

} // namespace

c10::CachingDeviceAllocator::DeviceStats UvmAllocator::getDeviceStats(c10::DeviceIndex device) {
  bridge::DeviceStats from{};
  check(bridge::device_stats(device, from));
  c10::CachingDeviceAllocator::DeviceStats stats;
  stats.allocation = translate(from.allocation);
  stats.segment = translate(from.segment);
  stats.active = translate(from.active);
  stats.inactive_split = translate(from.inactive_split);
  stats.allocated_bytes = translate(from.allocated_bytes);
  stats.reserved_bytes = translate(from.reserved_bytes);
  stats.active_bytes = translate(from.active_bytes);
  stats.inactive_split_bytes = translate(from.inactive_split_bytes);
  stats.requested_bytes = translate(from.requested_bytes);
  stats.num_alloc_retries = from.num_alloc_retries;
  stats.num_ooms = from.num_ooms;
  stats.oversize_allocations = translate(from.oversize_allocations);
  stats.oversize_segments = translate(from.oversize_segments);
  stats.num_sync_all_streams = from.num_sync_all_streams;
  stats.num_device_alloc = from.num_device_alloc;
  stats.num_device_free = from.num_device_free;
  stats.max_split_size = static_cast<int64_t>(NativeConfig::max_split_size());
  add_later_stats(stats, from, [](const bridge::StatArray& array) { return translate(array); });
  return stats;
}

void UvmAllocator::resetAccumulatedStats(c10::DeviceIndex device) {
  check(bridge::reset_accumulated_stats(device));
}

void UvmAllocator::resetPeakStats(c10::DeviceIndex device) {
  check(bridge::reset_peak_stats(device));
}

void UvmAllocator::record_history(const HistoryRequest& request) {
  TORCH_CHECK(
      request.when == RecordContext::NEVER || request.recorder != nullptr,
      "recordHistory: stacks were asked for without a function that gathers them");
  bridge::Recording recording{};
  recording.enabled = request.enabled;
  recording.capacity = request.max_entries;
  recording.level = static_cast<bridge::RecordContext>(request.when);
  recording.clear = request.clear;
  for (const auto& name : request.skip) {
    recording.skip.push_back(action_named(name));
  }
  check(bridge::set_history(recording));
  stacks_.configure(request);
  annotations_.configure(request);
}

bool UvmAllocator::isHistoryEnabled() {
  return bridge::history_enabled();
}

void UvmAllocator::recordAnnotation(const std::vector<std::pair<std::string, std::string>>& metadata) {
  annotations_.add(metadata);
}

c10cca::SnapshotInfo UvmAllocator::snapshot_of(MempoolId pool, bool with_traces) {
  bridge::Snapshot snapshot;
  check(bridge::snapshot(pool_id(pool), with_traces, snapshot));
  auto info = translate(snapshot);
  if (with_traces) {
    info.external_annotations = annotations_.all();
  }
  info.config_metadata = config_info();

  const auto to_nanoseconds = clock_.makeConverter();
  const auto to_microseconds = [&](auto& time) { time.t_ = to_nanoseconds(time.approx_t_) / 1000; };
  for (auto& trace : info.device_traces) {
    for (auto& entry : trace) {
      to_microseconds(entry.time_);
    }
  }
  for (auto& annotation : info.external_annotations) {
    to_microseconds(annotation.time_);
  }
  return info;
}

void UvmAllocator::push_compile_context(const std::string& name) {
  if (bridge::history_enabled()) { // the trace is all that it is for
    check(bridge::push_compile_context(current_device(), bytes_of(name)));
  }
}

void UvmAllocator::pop_compile_context() {
  if (bridge::initialized()) { // one without its push is no error
    check(bridge::pop_compile_context(current_device()));
  }
}

void UvmAllocator::set_user_metadata(const std::string& metadata) {
  bridge::set_user_metadata(bytes_of(metadata));
}

std::string UvmAllocator::user_metadata() {
  return std::string(bridge::user_metadata());
}

void UvmAllocator::annotate(const void* ptr, const std::string& metadata) {
  check(bridge::annotate(address(ptr), bytes_of(metadata)));
}

std::shared_ptr<c10::GatheredContext> UvmAllocator::context_of(const void* ptr) {
  const auto context = bridge::context_of(address(ptr));
  return context ? context->gathered : nullptr;
}

void UvmAllocator::attachOutOfMemoryObserver(c10cca::OutOfMemoryObserver observer) {
  out_of_memory_observers().attach(std::move(observer));
}

void UvmAllocator::attachAllocatorTraceTracker(c10cca::AllocatorTraceTracker tracker) {
  trace_trackers().attach(std::move(tracker));
  if (bridge::initialized()) { // else init() does it
    check(bridge::set_tracing(true));
  }
}

void UvmAllocator::attach_oom_rejection_observer(RejectionObserver observer) {
  rejection_observers().attach(std::move(observer));
}

} // namespace torch_uvm
