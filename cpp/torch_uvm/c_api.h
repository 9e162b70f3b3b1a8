// What python/torch_uvm calls, through ctypes: exported from the plug-in's library and from a patched libc10_cuda.so.
//
// Plain C, so that one Python package serves every Python and every PyTorch. Every function that can fail answers a
// negative number and leaves the reason in torch_uvm_last_error(); nothing throws. Strings belong to the library and are
// good until this thread's next call. No function takes the GIL, and all may be called from any thread.
#pragma once

#include <stdint.h>

#define TORCH_UVM_API extern "C" __attribute__((visibility("default")))

// Counts up whenever anything below changes: the Python package refuses a library of another number.
#define TORCH_UVM_C_API 1

// Bytes. A mirror in python/torch_uvm/_library.py.
struct torch_uvm_memory_info_t {
  uint64_t capacity; // hard cap on what this process may populate on the device and beside it
  uint64_t free; // capacity less what is populated and what others hold: what getMemoryInfo answers
  uint64_t populated_device; // populated by this process and meant to live on the GPU
  uint64_t populated_host; // in host memory
  uint64_t populated_unplaced; // wherever the driver moves it (balanced)
  uint64_t allocated; // in live allocations
  uint64_t reserved; // populated in all, cached memory included
  uint64_t device_limit; // soft limit on populated_device
  uint64_t device_total; // the device's memory, as CUDA says
  uint64_t device_free; // of it free, as CUDA says: for every process, and in steps (see docs/driver-contract.md)
  uint64_t host_total; // the machine's memory, or the cgroup's limit where that is less
  uint64_t host_available; // of it available now
  uint64_t host_reserve; // kept for everyone else
};

TORCH_UVM_API int torch_uvm_c_api();
// Why this thread's last failed call failed; never null.
TORCH_UVM_API const char* torch_uvm_last_error();
// The TORCH_UVM_TORCH_VERSION that the library was compiled for: major * 100 + minor.
TORCH_UVM_API int torch_uvm_torch_version();
// 1 where the uvm allocator is PyTorch's CUDA allocator, else 0.
TORCH_UVM_API int torch_uvm_enabled();
// 1 where it has been initialised with PyTorch's CUDA state, else 0.
TORCH_UVM_API int torch_uvm_initialized();
// The options in force as a settings string with every key (those that have no number of their own yet are left out:
// uvm_device_limit_mb and uvm_host_reserve_mb where they are not set). Null where the environment's are wrong.
TORCH_UVM_API const char* torch_uvm_options();
// Needs an initialised allocator.
TORCH_UVM_API int torch_uvm_memory_info(int device, torch_uvm_memory_info_t* info);
// Where what a private pool takes from CUDA from now on is placed: gpu_first, balanced, cpu_first or device. The pool
// must be there (MemPool makes it on the current device).
TORCH_UVM_API int torch_uvm_set_pool_placement(int device, uint64_t pool_first, uint64_t pool_second, const char* placement);

// Only in the plug-in.

// Puts the allocator in place if the environment asks for it, and takes our keys out of PyTorch's sight if there are any.
// 0: no key of ours in the environment, nothing was done. 1: the allocator is in place (where our settings are wrong, its
// initialisation will say so each time). 2: use_uvm is off; our keys are hidden and PyTorch's allocator stays.
// Negative: CUDA was initialised too early.
TORCH_UVM_API int torch_uvm_activate();
// Checks our part of a settings string made at run time and answers PyTorch's part of it; null where ours is wrong.
TORCH_UVM_API const char* torch_uvm_check_settings(const char* settings);
// After PyTorch has parsed its part: applies the whole string to the allocator.
TORCH_UVM_API int torch_uvm_apply_settings(const char* settings);
