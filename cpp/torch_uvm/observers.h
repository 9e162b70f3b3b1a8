// Whoever wants to hear of what the allocator does.
#pragma once

#include <torch_uvm/torch_version.h>

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace torch_uvm {

// A list that grows and is read as a whole. Readers hold no lock while they call what they read.
template <typename Observer>
class Observers {
 public:
  void attach(Observer observer) {
    std::lock_guard<std::mutex> lock(mutex_);
    observers_.push_back(std::move(observer));
  }
  std::vector<Observer> all() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return observers_;
  }
  bool empty() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return observers_.empty();
  }

 private:
  mutable std::mutex mutex_;
  std::vector<Observer> observers_;
};

// Never destroyed: observers may hold Python objects, which are gone before the process's exit handlers run.
Observers<c10cca::OutOfMemoryObserver>& out_of_memory_observers();
Observers<c10cca::AllocatorTraceTracker>& trace_trackers();
// Device, requested, allocated and total bytes.
Observers<std::function<void(int64_t, size_t, size_t, size_t)>>& rejection_observers();

} // namespace torch_uvm
