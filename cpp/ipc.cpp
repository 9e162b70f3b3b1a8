#include <torch_uvm/ipc.h>

#include <torch_uvm/failure.h>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>

#include <cuda_runtime_api.h>

#include <cstring>

namespace torch_uvm {

namespace {

// A handle is a version, a kind and CUDA's own handle; the oldest PyTorch versions sent only the last.
constexpr char kVersion = 1;
constexpr char kCudaMalloc = 'c';
constexpr char kExpandableSegment = 'e';
constexpr size_t kHeader = 2;

cudaIpcMemHandle_t parse(const std::string& handle) {
  size_t start = 0;
  if (handle.size() != CUDA_IPC_HANDLE_SIZE) {
    TORCH_CHECK(
        handle.size() > kHeader, "this is not a handle of shared CUDA memory: it has ", handle.size(), " bytes");
    TORCH_CHECK(
        handle[0] <= kVersion,
        "this handle of shared CUDA memory comes from a newer PyTorch (format ",
        static_cast<int>(handle[0]),
        "; known here up to ",
        static_cast<int>(kVersion),
        ")");
    TORCH_CHECK(
        handle[1] != kExpandableSegment,
        "the uvm allocator cannot open memory that another process allocated with expandable_segments:True: "
        "set expandable_segments:False there");
    TORCH_CHECK(
        handle[1] == kCudaMalloc && handle.size() == kHeader + CUDA_IPC_HANDLE_SIZE,
        "this is not a handle of shared CUDA memory");
    start = kHeader;
  }
  cudaIpcMemHandle_t parsed;
  std::memcpy(&parsed, handle.data() + start, CUDA_IPC_HANDLE_SIZE);
  return parsed;
}

} // namespace

c10cca::ShareableHandle share(void* ptr) {
  bridge::SharedAllocation shared{};
  check(bridge::ipc_handle(reinterpret_cast<std::uint64_t>(ptr), shared));
  static_assert(CUDA_IPC_HANDLE_SIZE == 64, "src/driver/mod.rs: IpcHandle");
  std::string handle{kVersion, kCudaMalloc};
  handle.append(reinterpret_cast<const char*>(shared.handle.data()), shared.handle.size());
  return {static_cast<ptrdiff_t>(shared.offset), std::move(handle)};
}

// Closes a handle when its last user is gone. The owner is never destroyed.
struct OpenedHandles::Closer {
  OpenedHandles* owner;
  std::string handle;
  c10::DeviceIndex device;

  void operator()(void* ptr) const noexcept {
    std::lock_guard<std::recursive_mutex> lock(owner->mutex_);
    try {
      c10::cuda::CUDAGuard guard(device);
      // At the end of the process CUDA may be gone already.
      C10_CUDA_CHECK_WARN(cudaIpcCloseMemHandle(ptr));
    } catch (const std::exception& error) {
      TORCH_WARN("uvm allocator: closing shared memory: ", error.what());
    }
    owner->opened_.erase(handle);
    owner->closed_.notify_all();
  }
};

std::shared_ptr<void> OpenedHandles::open(const std::string& handle) {
  const auto cuda_handle = parse(handle);
  std::unique_lock<std::recursive_mutex> lock(mutex_);
  for (auto found = opened_.find(handle); found != opened_.end(); found = opened_.find(handle)) {
    if (auto opened = found->second.lock()) {
      return opened;
    }
    // Its last user is about to close it, and waits for the lock.
    closed_.wait(lock);
  }
  c10::DeviceIndex device = 0;
  C10_CUDA_CHECK(c10::cuda::GetDevice(&device));
  void* ptr = nullptr;
  C10_CUDA_CHECK(cudaIpcOpenMemHandle(&ptr, cuda_handle, cudaIpcMemLazyEnablePeerAccess));
  std::shared_ptr<void> opened(ptr, Closer{this, handle, device});
  opened_[handle] = opened;
  return opened;
}

} // namespace torch_uvm
