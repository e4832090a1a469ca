// The second stage of sums over many rows: a column's partial sums added up in a fixed order.
#pragma once
#include "common.cuh"

namespace smop {

constexpr int kSumThreads = 256, kSumWarps = kSumThreads / kWarp;

// The sum of partial[i * stride] over i < count, for the 32 columns of a block of kSumThreads, one a lane, whose
// `partial` is its own; the warps share the rows. Valid in warp 0. `exists` is false in lanes without a column.
__device__ __forceinline__ float sum_partials(const float* partial, int64_t stride, int count, bool exists) {
  __shared__ float part[kSumWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float sum = 0.f;
  if (exists) {
#pragma unroll 8
    for (int i = warp; i < count; i += kSumWarps) sum += partial[i * stride];
  }
  part[warp][lane] = sum;
  __syncthreads();
  sum = 0.f;
#pragma unroll
  for (int w = 0; w < kSumWarps; ++w) sum += part[w][lane];
  return sum;
}

}  // namespace smop
