// The recording of stacks and annotations, and the translation of what the allocator remembers.
#pragma once

#include <torch_uvm/torch_version.h>

#include <c10/util/ApproximateClock.h>

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace torch_uvm {

c10cca::TraceEntry translate(const bridge::TraceEntry& entry);

// What the allocator knows, as PyTorch's snapshot. Times are still approximate.
c10cca::SnapshotInfo translate(const bridge::Snapshot& snapshot);

// The action that snapshots call so; throws for a name that is none.
bridge::Action action_named(const std::string& name);

// Gathers stacks at the level asked for.
class StackRecorder {
 public:
  void configure(const HistoryRequest& request);

  // The stack of the caller, or null where the level does not ask for it. The recorder may take any lock, Python's GIL
  // included: call it with none held.
  std::shared_ptr<bridge::StackContext> gather(c10cca::RecordContext level) const {
    if (C10_LIKELY(level_.load(std::memory_order_relaxed) < level)) {
      return nullptr;
    }
    return gather_now();
  }

 private:
  std::shared_ptr<bridge::StackContext> gather_now() const;

  std::atomic<c10cca::RecordContext> level_{c10cca::RecordContext::NEVER};
  std::atomic<c10cca::CreateContextFn> recorder_{nullptr};
};

// The newest annotations of record_function.
class Annotations {
 public:
  void configure(const HistoryRequest& request);
  void add(const std::vector<std::pair<std::string, std::string>>& metadata);
  std::vector<c10cda::AnnotationEntry> all() const;

 private:
  mutable std::mutex mutex_;
  std::atomic<bool> enabled_{false};
  size_t max_entries_ = 1;
  std::deque<c10cda::AnnotationEntry> entries_;
};

} // namespace torch_uvm
