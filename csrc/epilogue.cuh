// From accumulators to rows in memory: bias, activation or its derivative, predicated 16-byte stores. Both GEMM
// families use it, because mma.sync and wgmma leave a warp the same fragment: of an 8-column block, lane l holds
// columns 2(l%4), +1 of rows l/4 and l/4 + 8.
#pragma once
#include "common.cuh"

namespace smop {

constexpr int kStageRows = 16, kStageCols = 32;
// 8 floats of padding make the fragment writes of a half-warp hit 32 different banks.
constexpr int kStageStride = kStageCols + 8;
constexpr int kStageFloats = kStageRows * kStageStride;  // a warp's share of shared memory

template <class T>
struct Epilogue {
  T* out;         // the tile's first row
  T* pre;         // likewise, or null
  const T* aux;   // likewise, or null
  const T* bias;  // of the expert, or null
  int64_t ld;     // of out, pre and aux
  int n;          // columns that exist
  int rows;       // rows of the tile that exist
  int kind;       // SmopEpilogue
  float* sums;    // or null: column sums of the tile's first kSumRows rows; those of the next follow padded(n) on
};
constexpr int kSumRows = 64;  // rows of a column sum: what a warpgroup, or a warp of the sm_80 family, has of a tile

// Of eight columns' values in each lane, the sums over the eight lanes with the same lane % 4. A lane returns one
// column, kept_column(): each exchange halves what a lane still holds.
__device__ __forceinline__ float sum_over_rows(const float (&v)[8]) {
  const int lane = threadIdx.x % kWarp;
  float four[4], two[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool high = lane & 16;
    four[i] = (high ? v[i + 4] : v[i]) + __shfl_xor_sync(kFullWarp, high ? v[i] : v[i + 4], 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool high = lane & 8;
    two[i] = (high ? four[i + 2] : four[i]) + __shfl_xor_sync(kFullWarp, high ? four[i] : four[i + 2], 8);
  }
  const bool high = lane & 4;
  return (high ? two[1] : two[0]) + __shfl_xor_sync(kFullWarp, high ? two[0] : two[1], 4);
}

// The column of a piece whose sum a lane holds.
__device__ __forceinline__ int kept_column() {
  const int lane = threadIdx.x % kWarp;
  return lane % 4 * 8 + (lane & 16 ? 4 : 0) + (lane & 8 ? 2 : 0) + (lane & 4 ? 1 : 0);
}

// The activation, or the derivative, at x.
__device__ __forceinline__ float transcendental(int kind, float x) {
  if (kind == SMOP_GELU || kind == SMOP_GELU_GRAD) {
    const float cdf = 0.5f * (1.f + erff(x * 0.707106781f));
    return kind == SMOP_GELU ? x * cdf : cdf + x * 0.398942280f * expf(-0.5f * x * x);
  }
  const float s = 1.f / (1.f + expf(-x));
  return kind == SMOP_SILU ? x * s : s * (1.f + x * (1.f - s));
}

// What an epilogue adds or multiplies with, straight from memory: eight columns from `col` on, saved activations of row
// `row` of the tile.
template <class T>
struct FromMemory {
  __device__ __forceinline__ void bias(const Epilogue<T>& to, int col, float (&v)[8]) const {
    load8(to.bias + col, to.n - col, v);
  }
  __device__ __forceinline__ void aux(const Epilogue<T>& to, int row, int col, float (&v)[8]) const {
    load8(to.aux + row * to.ld + col, to.n - col, v);
  }
};

// One 16×32 piece of a warp's accumulators: acc[base + 4j + i] is element i of its column block j. `row` is the piece's
// first row within the tile, `col` its first column in the matrix. The stage is the warp's own. `base` must be a
// constant once inlined. `from` loads the bias and the saved activations. Returns, where sums are wanted, the sum of
// column kept_column() over the piece's rows.
template <class T, int N, class From>
__device__ __forceinline__ float store_piece(const Epilogue<T>& to, const float (&acc)[N], int base, float* stage,
                                             int row, int col, const From& from) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();  // the piece before has been read
#pragma unroll
  for (int j = 0; j < kStageCols / 8; ++j) {
    float* at = stage + (lane / 4) * kStageStride + j * 8 + (lane % 4) * 2;
    *reinterpret_cast<float2*>(at) = make_float2(acc[base + 4 * j], acc[base + 4 * j + 1]);
    *reinterpret_cast<float2*>(at + 8 * kStageStride) = make_float2(acc[base + 4 * j + 2], acc[base + 4 * j + 3]);
  }
  __syncwarp();
  const int my_col = col + (lane % 4) * 8;
  const int valid = to.n - my_col;
  float sums[8] = {};
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const int my_row = half * 8 + lane / 4;
    if (row + my_row >= to.rows || valid <= 0) continue;
    const int64_t at = static_cast<int64_t>(row + my_row) * to.ld + my_col;
    float* mine = stage + my_row * kStageStride + (lane % 4) * 8;
    float v[8], other[8];
    *reinterpret_cast<float4*>(v) = *reinterpret_cast<const float4*>(mine);
    *reinterpret_cast<float4*>(v + 4) = *reinterpret_cast<const float4*>(mine + 4);
    if (to.bias) {
      from.bias(to, my_col, other);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += other[i];
    }
    if (to.pre) store8(to.pre + at, valid, v);
    if (to.kind == SMOP_RELU) {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = v[i] <= 0.f ? 0.f : v[i];  // a NaN stays one
    } else if (to.kind == SMOP_RELU_GRAD) {
      from.aux(to, row + my_row, my_col, other);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = other[i] <= 0.f ? 0.f : v[i];
    } else if (to.kind != SMOP_IDENTITY) {
      // erf and exp, inlined once for each of a thread's accumulators, would be most of the kernel's code: here they
      // work in place on the lane's 8 staged floats, in a loop that stays a loop.
      const bool gradient = to.kind >= SMOP_GELU_GRAD;
      if (gradient) from.aux(to, row + my_row, my_col, other);
#pragma unroll
      for (int i = 0; i < 8; ++i) mine[i] = gradient ? other[i] : v[i];
#pragma unroll 1
      for (int i = 0; i < 8; ++i) mine[i] = transcendental(to.kind, mine[i]);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = gradient ? v[i] * mine[i] : mine[i];
    }
    store8(to.out + at, valid, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += v[i];
  }
  return to.sums ? sum_over_rows(sums) : 0.f;
}

}  // namespace smop
