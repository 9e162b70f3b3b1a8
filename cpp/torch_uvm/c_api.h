// What python/torch_uvm calls, through ctypes: exported from the plug-in's library and from a patched libc10_cuda.so.
//
// Plain C, so that one Python package serves every Python and every PyTorch. Every function that can fail answers a
// negative number and leaves the reason in torch_uvm_last_error(); nothing throws. Strings belong to the library and are
// good until this thread's next call. No function takes the GIL, and all may be called from any thread.
#pragma once

#include <stdint.h>

#define TORCH_UVM_API extern "C" __attribute__((visibility("default")))

// Counts up whenever anything below changes: the Python package refuses a library of another number.
#define TORCH_UVM_C_API 2

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

// What is populated where, in bytes unless it is a count. Mirrored as the struct above. The books know what this process was
// asked to do; what the driver moves by itself at a page fault they do not see.
struct torch_uvm_place_stats_t {
  uint64_t populated_device; // populated on the GPU
  uint64_t populated_device_peak; // the most of it since the last reset of peaks
  uint64_t populated_host; // in host memory
  uint64_t populated_host_peak;
  uint64_t populated_unplaced; // wherever the driver moves it
  uint64_t populated_unplaced_peak;
  uint64_t moved_to_device; // bytes of memory in use or cached that hints and the allocator moved to the device
  uint64_t moved_to_host; // the same to the host
  uint64_t discarded; // bytes whose contents were dropped, by hints and by the allocator
  uint64_t prefetches; // count of hints
  uint64_t advices;
  uint64_t discards;
  uint64_t stage; // 0: there is room; 1: cached memory is given back first; 2: the device limit is met
  uint64_t stage_changes; // how often that changed
  uint64_t light_reclamations; // how often cached memory was given back because the device was nearly full
  uint64_t hard_reclamations; // how often live memory was moved out, or all caches were given back
  uint64_t reclaimed; // bytes that those gave
  uint64_t moves_out; // count of live allocations moved to the host to make room
  uint64_t moved_out; // bytes of them
  uint64_t regrets; // count of those that were freed soon after
};

// A segment, and where its pages lie. Bytes.
struct torch_uvm_segment_t {
  uint64_t base;
  uint64_t range_bytes; // address space
  uint64_t filled; // from its start, holes included
  uint64_t vacant; // holes
  uint64_t discarded_end; // discarded beyond filled
  uint64_t populated_device; // where its pages lie, as far as this process was asked to put them there
  uint64_t populated_host;
  uint64_t populated_unplaced;
  uint64_t pool_first; // the MempoolId_t; (0, 0) is the default pool
  uint64_t pool_second;
  int32_t memory; // 0 managed, 1 plain device memory, 2 from a MemPool's own allocator
  int32_t place; // where it is meant to live: 0 device, 1 host, 2 wherever the driver moves it
  int32_t is_small; // of blocks of at most 1 MiB
  int32_t growing; // populated from its start as blocks need it
};

// What was populated where at one moment. Bytes.
struct torch_uvm_place_sample_t {
  int64_t time_us; // microseconds since 1970, as in snapshots
  uint64_t device;
  uint64_t host;
  uint64_t unplaced;
  uint64_t allocated; // in live allocations
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
TORCH_UVM_API int torch_uvm_set_pool_placement(
    int device,
    uint64_t pool_first,
    uint64_t pool_second,
    const char* placement);

// Hints about a range inside one live allocation; its device is the allocation's, and so is the stream (a cudaStream_t).
// A device is given by its number; -1 is the host. torch_uvm.prefetch and the others say what they do.
TORCH_UVM_API int torch_uvm_prefetch(uint64_t ptr, uint64_t bytes, int to, uint64_t stream);
// set_preferred_location, unset_preferred_location, set_accessed_by, unset_accessed_by, set_read_mostly or
// unset_read_mostly. The location is for the first, third and fourth.
TORCH_UVM_API int torch_uvm_advise(uint64_t ptr, uint64_t bytes, const char* advice, int location);
TORCH_UVM_API int torch_uvm_discard(uint64_t ptr, uint64_t bytes, uint64_t stream);
TORCH_UVM_API int torch_uvm_place_stats(int device, torch_uvm_place_stats_t* stats);
// The device's segments by address: writes the first `capacity` of them, answers how many there are.
TORCH_UVM_API int64_t torch_uvm_segments(int device, torch_uvm_segment_t* segments, uint64_t capacity);
// How what is populated where has changed while the memory history was recorded, oldest first: likewise.
TORCH_UVM_API int64_t torch_uvm_place_samples(int device, torch_uvm_place_sample_t* samples, uint64_t capacity);

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
