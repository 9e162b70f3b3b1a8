// The measured loops of `cargo xtask bench hotpath`. benches/hotpath_loops.py compiles this file against the wheel's own
// headers and calls it through ctypes, so that Python is outside the loops and both backends run the same machine code.
//
// The loops do what tensors do: `CUDACachingAllocator::get()->allocate(n)` returns a DataPtr, whose destructor frees
// the block.

#include <c10/core/Allocator.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#define HOTPATH_EXPORT __attribute__((visibility("default")))

namespace {

using Clock = std::chrono::steady_clock;

double nanoseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

void allocate_and_free(c10::Allocator* allocator, std::size_t bytes, std::size_t times) {
  for (std::size_t i = 0; i < times; ++i) {
    c10::DataPtr block = allocator->allocate(bytes);
  }
}

// Sizes spread evenly over the powers of two from 512 bytes to 4 MiB: many small blocks, a few large ones.
std::vector<std::size_t> log_uniform_sizes(std::size_t count, std::mt19937_64& random) {
  std::uniform_real_distribution<double> exponent(std::log(512.0), std::log(4.0 * 1024 * 1024));
  std::vector<std::size_t> sizes(count);
  for (auto& size : sizes) {
    size = static_cast<std::size_t>(std::exp(exponent(random)));
  }
  return sizes;
}

// Replaces randomly chosen blocks: each replacement is two operations, a free and an allocation.
void churn(
    c10::Allocator* allocator,
    std::vector<c10::DataPtr>& live,
    const std::vector<std::size_t>& sizes,
    const std::vector<std::uint32_t>& victims) {
  for (std::size_t i = 0; i < victims.size(); ++i) {
    c10::DataPtr& block = live[victims[i]];
    block.clear();
    block = allocator->allocate(sizes[i]);
  }
}

// No exception may cross into ctypes: every entry point answers a negative number instead, and says why on stderr.
template <class Loop>
double guarded(const char* name, Loop&& loop) {
  try {
    return loop();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", name, error.what());
    return -1;
  }
}

} // namespace

extern "C" {

// Nanoseconds a pair: allocate `bytes`, free them again.
HOTPATH_EXPORT double hotpath_pair(std::size_t bytes, std::size_t pairs) {
  return guarded("hotpath_pair", [&] {
    c10::Allocator* allocator = c10::cuda::CUDACachingAllocator::get();
    allocate_and_free(allocator, bytes, pairs / 10 + 1);
    const auto start = Clock::now();
    allocate_and_free(allocator, bytes, pairs);
    return nanoseconds_since(start) / static_cast<double>(pairs);
  });
}

// The same through raw_alloc and raw_delete, the entry points of extensions that keep plain pointers.
HOTPATH_EXPORT double hotpath_raw_pair(std::size_t bytes, std::size_t pairs) {
  return guarded("hotpath_raw_pair", [&] {
    auto* allocator = c10::cuda::CUDACachingAllocator::get();
    const auto loop = [&](std::size_t times) {
      for (std::size_t i = 0; i < times; ++i) {
        allocator->raw_delete(allocator->raw_alloc(bytes));
      }
    };
    loop(pairs / 10 + 1);
    const auto start = Clock::now();
    loop(pairs);
    return nanoseconds_since(start) / static_cast<double>(pairs);
  });
}

// Nanoseconds an operation (one allocation or one free) with `live` blocks of mixed sizes alive throughout. The blocks
// are replaced four times over before the clock starts, so that the caches are those of a program that has run a while.
HOTPATH_EXPORT double hotpath_mixed(std::size_t live_blocks, std::size_t operations, std::uint64_t seed) {
  return guarded("hotpath_mixed", [&] {
    c10::Allocator* allocator = c10::cuda::CUDACachingAllocator::get();
    std::mt19937_64 random(seed);
    std::uniform_int_distribution<std::uint32_t> pick(0, static_cast<std::uint32_t>(live_blocks - 1));
    const auto victims = [&](std::size_t count) {
      std::vector<std::uint32_t> chosen(count);
      for (auto& index : chosen) {
        index = pick(random);
      }
      return chosen;
    };

    std::vector<c10::DataPtr> live(live_blocks);
    const auto first_sizes = log_uniform_sizes(live_blocks, random);
    for (std::size_t i = 0; i < live_blocks; ++i) {
      live[i] = allocator->allocate(first_sizes[i]);
    }
    const std::size_t warm = 4 * live_blocks;
    churn(allocator, live, log_uniform_sizes(warm, random), victims(warm));

    const std::size_t replacements = operations / 2;
    const auto sizes = log_uniform_sizes(replacements, random);
    const auto chosen = victims(replacements);
    const auto start = Clock::now();
    churn(allocator, live, sizes, chosen);
    return nanoseconds_since(start) / static_cast<double>(2 * replacements);
  });
}

// Nanoseconds a pair as each thread sees it: `threads` threads allocate and free `bytes` on the same device and stream.
HOTPATH_EXPORT double hotpath_threads(std::size_t threads, std::size_t bytes, std::size_t pairs_each) {
  return guarded("hotpath_threads", [&] {
    c10::Allocator* allocator = c10::cuda::CUDACachingAllocator::get();
    const auto run = [&](std::size_t pairs) {
      std::vector<std::thread> workers;
      std::vector<std::exception_ptr> failures(threads);
      for (std::size_t i = 0; i < threads; ++i) {
        workers.emplace_back([&, i] {
          try {
            allocate_and_free(allocator, bytes, pairs);
          } catch (...) {
            failures[i] = std::current_exception();
          }
        });
      }
      for (auto& worker : workers) {
        worker.join();
      }
      for (auto& failure : failures) {
        if (failure) {
          std::rethrow_exception(failure);
        }
      }
    };
    run(pairs_each / 10 + 1);
    const auto start = Clock::now();
    run(pairs_each);
    return nanoseconds_since(start) / static_cast<double>(pairs_each);
  });
}

} // extern "C"
