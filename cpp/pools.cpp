// The allocator as PyTorch sees it: private pools of graphs and MemPools.

#include <torch_uvm/allocator.h>

#include <torch_uvm/failure.h>
#include <torch_uvm/translate.h>

#include <c10/cuda/CUDAStream.h>

namespace torch_uvm {

namespace {

using c10cca::RecordContext;

struct PoolState : c10cca::AllocatorState {
  explicit PoolState(rust::Box<bridge::Checkpoint> checkpoint) : checkpoint(std::move(checkpoint)) {}
  rust::Box<bridge::Checkpoint> checkpoint;
};

} // namespace

void UvmAllocator::begin_allocate_to_pool(
    c10::DeviceIndex device,
    MempoolId pool,
    std::function<bool(cudaStream_t)> filter,
    CustomAllocator custom) {
  const auto custom_address = address(custom.get());
  custom_allocators().keep(device, pool, std::move(custom));
  // A graph is captured on the stream that is current now.
  const auto stream = reinterpret_cast<uint64_t>(c10::cuda::getCurrentCUDAStream(device).stream());
  check(
      bridge::begin_allocate_to_pool(
          device, pool_id(pool), std::make_unique<bridge::StreamFilter>(std::move(filter)), stream, custom_address));
}

void UvmAllocator::endAllocateToPool(c10::DeviceIndex device, MempoolId pool) {
  check(bridge::end_allocate_to_pool(device, pool_id(pool)));
}

void UvmAllocator::releasePool(c10::DeviceIndex device, MempoolId pool) {
  check(bridge::release_pool(device, pool_id(pool)));
}

void UvmAllocator::ensure_pool(c10::DeviceIndex device, MempoolId pool, CustomAllocator custom) {
  const auto custom_address = address(custom.get());
  custom_allocators().keep(device, pool, std::move(custom));
  check(bridge::ensure_pool(device, pool_id(pool), custom_address));
}

void UvmAllocator::set_use_on_oom(c10::DeviceIndex device, MempoolId pool, bool on) {
  check(bridge::set_use_on_oom(device, pool_id(pool), on));
}

void UvmAllocator::set_no_split(c10::DeviceIndex device, MempoolId pool) {
  check(bridge::set_no_split(device, pool_id(pool)));
}

int UvmAllocator::getPoolUseCount(c10::DeviceIndex device, MempoolId pool) {
  std::int32_t count = 0;
  check(bridge::pool_use_count(device, pool_id(pool), count));
  return count;
}

bool UvmAllocator::checkPoolLiveAllocations(
    c10::DeviceIndex device,
    MempoolId pool,
    const std::unordered_set<void*>& expected_live_allocations) {
  std::vector<std::uint64_t> expected;
  expected.reserve(expected_live_allocations.size());
  for (const void* ptr : expected_live_allocations) {
    expected.push_back(address(ptr));
  }
  bool equal = false;
  check(bridge::check_pool_live_allocations(device, pool_id(pool), {expected.data(), expected.size()}, equal));
  return equal;
}

std::shared_ptr<c10cca::AllocatorState> UvmAllocator::getCheckpointState(c10::DeviceIndex device, MempoolId pool) {
  auto checkpoint = bridge::checkpoint(device, pool_id(pool));
  check(checkpoint->valid());
  return std::make_shared<PoolState>(std::move(checkpoint));
}

c10cca::CheckpointDelta UvmAllocator::setCheckpointPoolState(
    c10::DeviceIndex device,
    std::shared_ptr<c10cca::AllocatorState> state) {
  const auto pool_state = std::dynamic_pointer_cast<PoolState>(state);
  TORCH_CHECK(pool_state, "setCheckpointPoolState: this state was not made by the uvm allocator");
  bridge::Restored restored;
  check(bridge::restore(device, *pool_state->checkpoint, stacks_.gather(RecordContext::STATE), restored));
  c10cca::CheckpointDelta delta;
  delta.ptrs_freed.reserve(restored.freed.size());
  for (const auto freed : restored.freed) {
    delta.ptrs_freed.push_back(pointer(freed));
  }
  delta.dataptrs_allocd.reserve(restored.created.size());
  for (const auto created : restored.created) {
    delta.dataptrs_allocd.emplace_back(pointer(created), pointer(created), &deleter, cuda(device));
  }
  return delta;
}

} // namespace torch_uvm
