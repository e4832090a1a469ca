// Weights on their way into the L2 while the launches before the one that reads them leave DRAM idle. Whether that is
// worth it is the caller's to say (`worth_bringing` in llama_smop/ops/backends/cuda.py). No result depends on it.
#pragma once
#include "tile_scheduler.cuh"
#ifdef __CUDACC__
#include "ptx.cuh"
#endif

namespace smop {

struct Part {
  int at, bytes;
};

// Part `number` of `count` of so many bytes, in whole lines of the L2: the last parts are shorter, or empty.
SMOP_HOST_DEVICE Part part_of(int bytes, int count, int number) {
  constexpr int kLine = 128;
  const unsigned lines = (static_cast<unsigned>(bytes) + kLine - 1) / kLine;
  const int size = static_cast<int>((lines + count - 1) / static_cast<unsigned>(count)) * kLine;
  const int at = number * size, left = bytes - at;
  return {at, left <= 0 ? 0 : left < size ? left : size};
}

#ifdef __CUDACC__
// Blocks more of a launch that bring what a later one reads, one thread of a warp a part.
constexpr int kPrefetchBlocks = 128;

__device__ __forceinline__ const char* expert_ahead(const SmopAhead& ahead, int expert) {
  return static_cast<const char*>(ahead.from) + expert * ahead.stride;
}

// Whether this block is one of those, the last of the grid, and has done it: with `offs` of experts that have rows.
__device__ __forceinline__ bool only_prefetches(const SmopAhead& ahead, int experts, const int32_t* offs = nullptr,
                                                int64_t rows = 0) {
  const int block = blockIdx.x - (gridDim.x - kPrefetchBlocks);
  if (!ahead.from || block < 0) return false;
  const unsigned number = block * kWarp + threadIdx.x, parts = kPrefetchBlocks * kWarp / static_cast<unsigned>(experts);
  const int expert = static_cast<int>(number / parts);
  if (threadIdx.x >= kWarp || expert >= experts) return true;
  if (offs) {
    const ExpertRows own = expert_rows(offs, expert, rows);
    if (own.begin == own.end) return true;
  }
  const Part part = part_of(ahead.bytes, static_cast<int>(parts), static_cast<int>(number % parts));
  ptx::prefetch_l2(expert_ahead(ahead, expert) + part.at, part.bytes);
  return true;
}

// `ahead`, or nothing where bulk prefetches cannot address it.
inline SmopAhead prefetchable(SmopAhead ahead) {
  const bool aligned = all_aligned16({ahead.from}) && ahead.bytes % 16 == 0 && ahead.stride % 16 == 0;
  if (!aligned || ahead.bytes <= 0) ahead.from = nullptr;
  return ahead;
}

inline int prefetch_blocks(const SmopAhead& ahead) { return ahead.from ? kPrefetchBlocks : 0; }
#endif

}  // namespace smop
