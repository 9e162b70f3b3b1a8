// What of PyTorch's and CUDA's types is a plain number in the bridge, and back.
#pragma once

#include <torch_uvm/torch_version.h>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>

#include <cstdint>

namespace torch_uvm {

inline std::uint64_t address(const void* ptr) {
  return reinterpret_cast<std::uint64_t>(ptr);
}

inline void* pointer(std::uint64_t address) {
  return reinterpret_cast<void*>(address);
}

inline std::uint64_t handle(cudaStream_t stream) {
  return reinterpret_cast<std::uint64_t>(stream);
}

inline bridge::PoolId pool_id(MempoolId pool) {
  return {pool.first, pool.second};
}

inline c10::Device cuda(c10::DeviceIndex device) {
  return c10::Device(c10::kCUDA, device);
}

inline c10::DeviceIndex current_device() {
  c10::DeviceIndex device = 0;
  // The check itself is a call into c10, which the hot path only makes when there is something to say.
  if (const auto error = c10::cuda::GetDevice(&device); C10_UNLIKELY(error != cudaSuccess)) {
    C10_CUDA_CHECK(error);
  }
  return device;
}

} // namespace torch_uvm
