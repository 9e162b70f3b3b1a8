// An allocator for torch.cuda.MemPool that does what a user without torch-uvm would write: cudaMallocManaged and
// cudaFree, no advice, no prefetch. What the `mempool` row of the benches stands for.
//
// The CUDA runtime's functions are handed in as pointers, so that this compiles without CUDA's headers and always calls
// the runtime that PyTorch has loaded.

#include <atomic>
#include <cstddef>
#include <cstdio>

#define MANAGED_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using MallocManaged = int (*)(void** pointer, std::size_t bytes, unsigned flags);
using Free = int (*)(void* pointer);
using ExchangeCaptureMode = int (*)(int* mode);

constexpr unsigned attach_global = 1; // cudaMemAttachGlobal
constexpr int capture_mode_relaxed = 2; // cudaStreamCaptureModeRelaxed

MallocManaged malloc_managed = nullptr;
Free free_memory = nullptr;
ExchangeCaptureMode exchange_capture_mode = nullptr;
std::size_t limit = 0;
std::atomic<std::size_t> live{0};
std::atomic<std::size_t> calls{0};

// cudaMallocManaged invalidates a capture unless the thread is in relaxed mode.
class RelaxedCapture {
 public:
  RelaxedCapture() {
    failed_ = exchange_capture_mode(&mode_) != 0;
  }
  ~RelaxedCapture() {
    if (!failed_ && exchange_capture_mode(&mode_) != 0) {
      std::fprintf(stderr, "managed.cpp: the thread's capture mode could not be restored\n");
    }
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  int mode_ = capture_mode_relaxed;
  bool failed_ = false;
};

} // namespace

// To be called first. `bytes` is the most that may be live: above it allocations fail, as on a full device.
MANAGED_EXPORT void managed_setup(
    MallocManaged allocate,
    Free release,
    ExchangeCaptureMode exchange,
    std::size_t bytes) {
  malloc_managed = allocate;
  free_memory = release;
  exchange_capture_mode = exchange;
  limit = bytes;
}

// Null, which PyTorch takes for "out of memory", above the limit or where CUDA refuses.
MANAGED_EXPORT void* managed_alloc(std::size_t bytes, int /*device*/, void* /*stream*/) {
  if (malloc_managed == nullptr || live.fetch_add(bytes) + bytes > limit) {
    live.fetch_sub(bytes);
    return nullptr;
  }
  const RelaxedCapture relaxed;
  void* pointer = nullptr;
  const int status = malloc_managed(&pointer, bytes, attach_global);
  if (status != 0) {
    std::fprintf(stderr, "managed.cpp: cudaMallocManaged(%zu) answered %d\n", bytes, status);
    live.fetch_sub(bytes);
    return nullptr;
  }
  calls.fetch_add(1);
  return pointer;
}

MANAGED_EXPORT void managed_free(void* pointer, std::size_t bytes, int /*device*/, void* /*stream*/) {
  const int status = free_memory(pointer);
  if (status != 0) {
    std::fprintf(stderr, "managed.cpp: cudaFree answered %d\n", status);
    return;
  }
  live.fetch_sub(bytes);
}

// Bytes that are allocated now.
MANAGED_EXPORT std::size_t managed_live() {
  return live.load();
}

// How often memory was handed out.
MANAGED_EXPORT std::size_t managed_calls() {
  return calls.load();
}
