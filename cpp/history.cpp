#include <torch_uvm/history.h>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>

#include <algorithm>
#include <string_view>

namespace torch_uvm {

namespace {

std::shared_ptr<c10::GatheredContext> gathered(const std::shared_ptr<bridge::StackContext>& context) {
  return context ? context->gathered : nullptr;
}

c10cca::TraceEntry::Action translate(bridge::Action action) {
  using Theirs = c10cca::TraceEntry;
  switch (action) {
    case bridge::Action::Alloc:
      return Theirs::ALLOC;
    case bridge::Action::FreeRequested:
      return Theirs::FREE_REQUESTED;
    case bridge::Action::FreeCompleted:
      return Theirs::FREE_COMPLETED;
    case bridge::Action::SegmentAlloc:
      return Theirs::SEGMENT_ALLOC;
    case bridge::Action::SegmentFree:
      return Theirs::SEGMENT_FREE;
    case bridge::Action::SegmentMap:
      return Theirs::SEGMENT_MAP;
    case bridge::Action::SegmentUnmap:
      return Theirs::SEGMENT_UNMAP;
    case bridge::Action::Snapshot:
      return Theirs::SNAPSHOT;
    case bridge::Action::OutOfMemory:
      return Theirs::OOM;
    case bridge::Action::Annotate:
      return annotation();
  }
  TORCH_INTERNAL_ASSERT(false, "unknown action of the uvm allocator: ", static_cast<int>(action));
}

c10cda::SegmentInfo translate(const bridge::SegmentInfo& from) {
  c10cda::SegmentInfo segment;
  segment.device = static_cast<c10::DeviceIndex>(from.device);
  segment.address = from.address;
  segment.total_size = from.total_bytes;
  segment.requested_size = from.requested_bytes;
  segment.allocated_size = from.allocated_bytes;
  segment.active_size = from.active_bytes;
  segment.stream = reinterpret_cast<cudaStream_t>(from.stream);
  segment.is_large = from.is_large;
  segment.is_expandable = from.is_expandable;
  segment.owner_private_pool_id = {from.pool.first, from.pool.second};
  segment.context_when_allocated = gathered(from.context);
  segment.blocks.reserve(from.blocks.size());
  for (const auto& block : from.blocks) {
    auto& info = segment.blocks.emplace_back();
    info.size = block.bytes;
    info.requested_size = block.requested_bytes;
    info.allocated = block.allocated;
    info.active = block.active;
    info.context_when_allocated = gathered(block.context);
  }
  return segment;
}

} // namespace

bridge::Action action_named(const std::string& name) {
  static constexpr std::pair<std::string_view, bridge::Action> kActions[] = {
      {"alloc", bridge::Action::Alloc},
      {"free_requested", bridge::Action::FreeRequested},
      {"free_completed", bridge::Action::FreeCompleted},
      {"segment_alloc", bridge::Action::SegmentAlloc},
      {"segment_free", bridge::Action::SegmentFree},
      {"segment_map", bridge::Action::SegmentMap},
      {"segment_unmap", bridge::Action::SegmentUnmap},
      {"snapshot", bridge::Action::Snapshot},
      {"oom", bridge::Action::OutOfMemory},
      {"annotate", bridge::Action::Annotate},
  };
  std::string known;
  for (const auto& [theirs, action] : kActions) {
    if (name == theirs) {
      return action;
    }
    known.append(known.empty() ? "" : ", ").append(theirs);
  }
  TORCH_CHECK(false, "skip_actions: '", name, "' is not allowed: expected some of ", known);
}

c10cca::TraceEntry translate(const bridge::TraceEntry& entry) {
  return make_trace_entry(translate(entry.action), entry, gathered(entry.context));
}

c10cca::SnapshotInfo translate(const bridge::Snapshot& snapshot) {
  c10cca::SnapshotInfo info;
  info.segments.reserve(snapshot.segments.size());
  for (const auto& segment : snapshot.segments) {
    info.segments.push_back(translate(segment));
  }
  info.device_traces.reserve(snapshot.traces.size());
  for (const auto& trace : snapshot.traces) {
    auto& entries = info.device_traces.emplace_back();
    entries.reserve(trace.entries.size());
    for (const auto& entry : trace.entries) {
      entries.push_back(translate(entry));
    }
  }
  return info;
}

void StackRecorder::configure(const HistoryRequest& request) {
  if (request.enabled) {
    recorder_.store(request.recorder);
    level_.store(request.when);
  } else {
    level_.store(c10cca::RecordContext::NEVER);
    recorder_.store(nullptr);
  }
}

std::shared_ptr<bridge::StackContext> StackRecorder::gather_now() const {
  // Null where recording ends at this moment.
  const auto recorder = recorder_.load();
  auto stack = recorder ? recorder() : nullptr;
  return stack ? std::make_shared<bridge::StackContext>(bridge::StackContext{std::move(stack)}) : nullptr;
}

void Annotations::configure(const HistoryRequest& request) {
  std::lock_guard<std::mutex> lock(mutex_);
  enabled_.store(request.enabled);
  max_entries_ = std::max(size_t{1}, request.max_entries);
  entries_.clear();
}

void Annotations::add(const std::vector<std::pair<std::string, std::string>>& metadata) {
  if (!enabled_.load(std::memory_order_relaxed)) {
    return;
  }
  c10::DeviceIndex device = 0;
  C10_CUDA_CHECK(c10::cuda::GetDevice(&device));
  c10cda::AnnotationEntry entry(device, c10::getApproximateTime());
  for (const auto& [name, value] : metadata) {
    entry.recordUserMetadata(name, value);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (entries_.size() == max_entries_) {
    entries_.pop_front();
  }
  entries_.push_back(std::move(entry));
}

std::vector<c10cda::AnnotationEntry> Annotations::all() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return {entries_.begin(), entries_.end()};
}

} // namespace torch_uvm
