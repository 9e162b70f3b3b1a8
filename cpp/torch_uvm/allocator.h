// The allocator as PyTorch sees it: c10's CUDAAllocator, backed by the Rust allocator. No policy and no bookkeeping.
#pragma once

#include <torch_uvm/custom_allocators.h>
#include <torch_uvm/history.h>
#include <torch_uvm/ipc.h>
#include <torch_uvm/torch_version.h>

#include <atomic>
#include <string>

namespace torch_uvm {

class UvmAllocator final : public AllocatorInterface {
 public:
  // The one object of the process. Never destroyed: tensors may be freed as late as the process's exit handlers.
  static UvmAllocator& instance();

  // c10::Allocator
  c10::DataPtr allocate(size_t bytes) override;
  c10::DeleterFnPtr raw_deleter() const override;
  void copy_data(void* dest, const void* src, std::size_t count) const override;

  // CUDAAllocator; what differs between versions is in AllocatorInterface
  void* raw_alloc(size_t bytes) override;
  void* raw_alloc_with_stream(size_t bytes, cudaStream_t stream) override;
  void raw_delete(void* ptr) override;
  void init(int device_count) override;
  bool initialized() override;
  double getMemoryFraction(c10::DeviceIndex device) override;
  void setMemoryFraction(double fraction, c10::DeviceIndex device) override;
  void enable(bool value) override;
  bool isEnabled() const override;
  void cacheInfo(c10::DeviceIndex device, size_t* largest_block) override;
  void* getBaseAllocation(void* ptr, size_t* size) override;
  void recordStream(const c10::DataPtr& ptr, c10::cuda::CUDAStream stream) override;
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override;
  void resetAccumulatedStats(c10::DeviceIndex device) override;
  void resetPeakStats(c10::DeviceIndex device) override;
  void endAllocateToPool(c10::DeviceIndex device, MempoolId pool) override;
  void releasePool(c10::DeviceIndex device, MempoolId pool) override;
  int getPoolUseCount(c10::DeviceIndex device, MempoolId pool) override;
  bool checkPoolLiveAllocations(
      c10::DeviceIndex device,
      MempoolId pool,
      const std::unordered_set<void*>& expected_live_allocations) override;
  c10cca::ShareableHandle shareIpcHandle(void* ptr) override;
  std::shared_ptr<void> getIpcDevPtr(std::string handle) override;
  bool isHistoryEnabled() override;
  void recordAnnotation(const std::vector<std::pair<std::string, std::string>>& metadata) override;
  void attachOutOfMemoryObserver(c10cca::OutOfMemoryObserver observer) override;
  void attachAllocatorTraceTracker(c10cca::AllocatorTraceTracker tracker) override;
  void enablePeerAccess(c10::DeviceIndex device, c10::DeviceIndex device_to_access) override;
  cudaError_t memcpyAsync(
      void* dst,
      int dst_device,
      const void* src,
      int src_device,
      size_t count,
      cudaStream_t stream,
      bool p2p_enabled) override;
  std::shared_ptr<c10cca::AllocatorState> getCheckpointState(c10::DeviceIndex device, MempoolId pool) override;
  c10cca::CheckpointDelta setCheckpointPoolState(c10::DeviceIndex device, std::shared_ptr<c10cca::AllocatorState> state)
      override;
  std::string name() override;

 protected:
  void empty_cache(MempoolId pool) override;
  c10cca::SnapshotInfo snapshot_of(MempoolId pool, bool with_traces) override;
  void record_history(const HistoryRequest& request) override;
  void ensure_pool(c10::DeviceIndex device, MempoolId pool, CustomAllocator custom) override;
  void begin_allocate_to_pool(
      c10::DeviceIndex device,
      MempoolId pool,
      std::function<bool(cudaStream_t)> filter,
      CustomAllocator custom) override;
  void set_use_on_oom(c10::DeviceIndex device, MempoolId pool, bool on) override;
  void set_no_split(c10::DeviceIndex device, MempoolId pool) override;
  void push_compile_context(const std::string& name) override;
  void pop_compile_context() override;
  void set_user_metadata(const std::string& metadata) override;
  std::string user_metadata() override;
  void annotate(const void* ptr, const std::string& metadata) override;
  std::shared_ptr<c10::GatheredContext> context_of(const void* ptr) override;
  std::pair<size_t, size_t> memory_info(c10::DeviceIndex device) override;
  void attach_oom_rejection_observer(RejectionObserver observer) override;
  c10::DataPtr allocate_at(size_t bytes, void* wanted) override;

 public:
  // Turns the times of the allocator's history into nanoseconds since 1970.
  auto time_converter() {
    return clock_.makeConverter();
  }

 private:
  UvmAllocator() = default;

  void* malloc(c10::DeviceIndex device, size_t bytes, cudaStream_t stream);
  void tell(void* ptr);
  bool free(void* ptr); // false: throw_failure() says why
  static void deleter(void* ptr);

  bool caching() const;

  std::atomic<bool> enabled_{true};
  StackRecorder stacks_;
  Annotations annotations_;
  OpenedHandles opened_handles_;
  c10::ApproximateClockToUnixTimeConverter clock_;
};

} // namespace torch_uvm
