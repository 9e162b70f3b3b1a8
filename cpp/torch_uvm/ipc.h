// Memory shared between processes (device placement only: CUDA gives no handles for managed memory).
#pragma once

#include <torch_uvm/torch_version.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

namespace torch_uvm {

// The handle by which another process opens this allocation, in `native`'s format, so that either allocator may be on
// either side.
c10cca::ShareableHandle share(void* ptr);

// Memory of other processes that is open here. CUDA opens a handle once a process and context, and several storages may
// lie in one, so each is opened once and closed when the last user is gone.
class OpenedHandles {
 public:
  std::shared_ptr<void> open(const std::string& handle);

 private:
  struct Closer;

  // Recursive: should std::shared_ptr run out of memory while it takes a handle, it closes it at once.
  std::recursive_mutex mutex_;
  std::condition_variable_any closed_;
  std::unordered_map<std::string, std::weak_ptr<void>> opened_;
};

} // namespace torch_uvm
