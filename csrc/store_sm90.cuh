// How a consumer warpgroup of pipeline_sm90.cuh stores its part of a tile: bias, saved activations and column sums.
#pragma once
#include "pipeline_sm90.cuh"

namespace smop::sm90 {

// A tile's bias on its way to the epilogue: a consumer group fetches it before the products and shares it behind them,
// in two places by turns, so that a warp which is a tile ahead overwrites nothing.
template <class T, int kBlockN>
struct TileBias {
  static constexpr int kPerThread = (kBlockN + kGroup - 1) / kGroup;
  T mine[kPerThread];

  __device__ __forceinline__ TileBias(const Epilogue<T>& to, int first_col) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int col = first_col + threadIdx.x % kGroup + i * kGroup;
      if (to.bias && col < to.n) mine[i] = to.bias[col];
    }
  }
  __device__ __forceinline__ const float* share(const Epilogue<T>& to, const Shared& shared, int tiles_before) const {
    const int group = threadIdx.x / kGroup - 1;
    float* place = shared.biases + (group * 2 + tiles_before % 2) * 256;
    if (!to.bias) return place;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (threadIdx.x % kGroup + i * kGroup < kBlockN) place[threadIdx.x % kGroup + i * kGroup] = to_float(mine[i]);
    ptx::named_barrier(kGroupBarrier + group, kGroup);
    return place;
  }
};

// What the epilogue of a piece reads from shared memory: its 32 columns of the bias, and in the ring the box of 64
// columns of saved activations that it lies in, from which 16-byte chunk on.
template <class T>
struct FromShared {
  const float* piece_bias;
  uint32_t box;
  int first_chunk;

  __device__ __forceinline__ void bias(const Epilogue<T>&, int col, float (&v)[8]) const {
    const float4* from = reinterpret_cast<const float4*>(piece_bias + col % kStageCols);
    *reinterpret_cast<float4*>(v) = from[0];
    *reinterpret_cast<float4*>(v + 4) = from[1];
  }
  __device__ __forceinline__ void aux(const Epilogue<T>&, int row, int col, float (&v)[8]) const {
    Packed8<T> packed;
    packed.bits[0] = ptx::load_shared16(box + ptx::swizzled(row, first_chunk + col % kStageCols / 8));
    packed.unpack(v);
  }
};

template <class T, int kBlockN, int kBlocks>
__device__ __forceinline__ void store_tile(const Epilogue<T>& to, const float (&acc)[kBlockN / 2],
                                           Ring<kBlockN, kBlocks>& ring, int first_col, const float* bias = nullptr) {
  const int warp = threadIdx.x / kWarp - kProducerWarps;
  float* stages = ring.shared.stages;
  float sums[kBlockN / kStageCols];
#pragma unroll
  for (int piece = 0; piece < kBlockN / kStageCols; ++piece) {
    const int box = piece / 2 % kAuxBoxesAStage<kBlockN>;
    const bool starts = piece % 2 == 0 && box == 0;
    const bool ends = piece == kBlockN / kStageCols - 1 || (piece % 2 == 1 && box == kAuxBoxesAStage<kBlockN> - 1);
    if (to.aux && starts) ptx::mbarrier_wait(ring.full(), ring.phase);
    sums[piece] = store_piece(to, acc, piece * kStageCols / 2, stages + warp * kStageFloats, warp * 16,
                              first_col + piece * kStageCols,
                              FromShared<T>{bias + piece * kStageCols, ring.a() + box * kABytes, piece % 2 * 4});
    if (to.aux && ends) {
      __syncwarp();
      ring.release(ring.empty());
      ring.advance();
    }
  }
  if (!to.sums) return;
  // A warp has the sums over its 16 rows; the four warps of the group add theirs through their stages.
  static_assert(kBlockN <= kStageFloats && kGroup == 2 * kSumRows);
  const int group = warp / 4;
  float* mine = stages + warp * kStageFloats;
  __syncwarp();
#pragma unroll
  for (int piece = 0; piece < kBlockN / kStageCols; ++piece) mine[piece * kStageCols + kept_column()] = sums[piece];
  ptx::named_barrier(kGroupBarrier + group, kGroup);
  for (int col = threadIdx.x % kGroup; col < kBlockN && first_col + col < to.n; col += kGroup) {
    const float* from = stages + group * 4 * kStageFloats + col;
    to.sums[static_cast<int64_t>(group) * padded(to.n) + first_col + col] =
        from[0] + from[kStageFloats] + (from[2 * kStageFloats] + from[3 * kStageFloats]);
  }
  ptx::named_barrier(kGroupBarrier + group, kGroup);  // read before the next tile's pieces are staged
}

}  // namespace smop::sm90
