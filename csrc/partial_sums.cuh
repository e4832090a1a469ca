// The second stage of sums over many rows: a column's partial sums added up in a fixed order.
#pragma once
#include <type_traits>

#include "common.cuh"

namespace smop {

constexpr int kSumThreads = 256, kSumWarps = kSumThreads / kWarp;

// sum[c] = Σ over i < count of partial[i * stride + c] for the kCols columns of a lane, whose `partial` is its own, in a
// block of kSumThreads; the warps share the rows. Valid in warp 0. `exists` is false in lanes without a column.
template <int kCols>
__device__ __forceinline__ void sum_partials(float (&sum)[kCols], const float* partial, int64_t stride, int count,
                                             bool exists) {
  using Columns = std::conditional_t<kCols == 4, float4, float>;
  static_assert(sizeof(Columns) == sizeof sum);
  __shared__ Columns part[kSumWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int c = 0; c < kCols; ++c) sum[c] = 0.f;
  const auto add = [&](const Columns& v) {
#pragma unroll
    for (int c = 0; c < kCols; ++c) sum[c] += reinterpret_cast<const float*>(&v)[c];
  };
  if (exists) {
#pragma unroll 4
    for (int i = warp; i < count; i += kSumWarps) add(*reinterpret_cast<const Columns*>(partial + i * stride));
  }
  part[warp][lane] = *reinterpret_cast<const Columns*>(sum);
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kCols; ++c) sum[c] = 0.f;
#pragma unroll
  for (int w = 0; w < kSumWarps; ++w) add(part[w][lane]);
}

}  // namespace smop
