// What python/torch_uvm calls, through ctypes: exported from the plug-in's library and from a patched libc10_cuda.so.
//
// Plain C, so that one Python package serves every Python and every PyTorch. Every function that can fail answers a
// negative number and leaves the reason in torch_uvm_last_error(); nothing throws. Strings belong to the library and are
// good until this thread's next call. No function takes the GIL, and all may be called from any thread.
#pragma once

#include <stdint.h>

#define TORCH_UVM_API extern "C" __attribute__((visibility("default")))

// Counts up whenever a function below changes: the Python package refuses a library of another number. What a table holds
// is asked for by name, so that a new number in one changes nothing here.
#define TORCH_UVM_C_API 3

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
// All that there is by name, as JSON:
//
//   tables      by table ("memory_info", "statistics", "segments", "place_samples"), its columns in their order: name; type
//               (int; bool: 0 or 1; str: 0, 1, … stand for words); words; path (where torch.cuda.memory_stats() has it,
//               below uvm.; empty: nowhere); meaning
//   options     key, type of its value in Python, default, meaning
//   placements  name, meaning
TORCH_UVM_API const char* torch_uvm_description();
// The numbers of a table for a device, row by row: writes the first `capacity` of them, answers how many there are. The
// first two tables have one row, the third one for each segment by address, the last one for each change of what is
// populated while the memory history was recorded, oldest first. Needs an initialised allocator.
TORCH_UVM_API int64_t torch_uvm_rows(const char* table, int device, uint64_t* numbers, uint64_t capacity);
// Where what a private pool takes from CUDA from now on is placed: one of the placements. The pool must be there (MemPool
// makes it on the current device).
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
