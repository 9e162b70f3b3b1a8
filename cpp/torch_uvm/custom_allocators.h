// The allocators that MemPools bring along, kept for as long as their pools hold memory.
#pragma once

#include <torch_uvm/torch_version.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace torch_uvm {

class CustomAllocators {
 public:
  void keep(c10::DeviceIndex device, MempoolId pool, CustomAllocator allocator) {
    if (allocator) {
      std::lock_guard<std::mutex> lock(mutex_);
      kept_.emplace(std::make_pair(device, pool), std::move(allocator));
    }
    drop_forgotten();
  }

  // Called under the allocator's lock, where whatever an allocator does when it is destroyed must not run.
  void forget(c10::DeviceIndex device, MempoolId pool) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kept_.find({device, pool});
    if (found != kept_.end()) {
      forgotten_.push_back(std::move(found->second));
      kept_.erase(found);
    }
  }

  void drop_forgotten() {
    std::vector<CustomAllocator> dropped;
    std::lock_guard<std::mutex> lock(mutex_);
    dropped.swap(forgotten_);
    // Destroyed after the lock is released: in the reverse order of their declarations.
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<c10::DeviceIndex, MempoolId>, CustomAllocator> kept_;
  std::vector<CustomAllocator> forgotten_;
};

// Never destroyed, as the allocator itself.
CustomAllocators& custom_allocators();

} // namespace torch_uvm
