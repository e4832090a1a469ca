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
    float* place = shared.biases + (group * 2 + tiles_before % 2) * kMaxBlockN;
    if (!to.bias) return place;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (threadIdx.x % kGroup + i * kGroup < kBlockN) place[threadIdx.x % kGroup + i * kGroup] = to_float(mine[i]);
    ptx::named_barrier(kGroupBarrier + group, kGroup);
    return place;
  }
};

// What the epilogue of a piece reads from shared memory: its columns of the bias, and the box of saved activations in
// the ring that is as wide.
template <class T>
struct FromShared {
  const float* piece_bias;
  int first_col;
  uint32_t box;

  __device__ __forceinline__ float2 bias(const Epilogue<T>&, int col) const {
    return *reinterpret_cast<const float2*>(piece_bias + col - first_col);
  }
  template <int kCols>
  __device__ __forceinline__ uint32_t aux(const Epilogue<T>&, uint32_t, int row, int) const {
    return box + row * ptx::kSwizzleRow;
  }
};

// A warp's part of box number `box` of a tile, 64 columns or the kCols that are left; its column sums go to shared
// memory.
template <int kCols, class T, int kBlockN, int kBlocks>
__device__ __forceinline__ void store_box(const Epilogue<T>& to, const float (&acc)[kBlockN / 2],
                                          Ring<kBlockN, kBlocks>& ring, int first_col, const float* bias, int box) {
  const int warp = threadIdx.x / kWarp - kProducerWarps, col = box * 64;
  const int place = box % kAuxBoxesAStage<kBlockN>;  // in the stage of saved activations
  if (to.aux && place == 0) ptx::mbarrier_wait(ring.full(), ring.phase);
  const FromShared<T> from{bias + col, first_col + col, ring.a() + place * kABytes};
  float sums[kCols / 32];
  store_piece<kCols>(to, acc, col / 2, ring.shared.stages + warp * kStageBytes, warp * 16, first_col + col, from, sums);
  if (to.sums) {
    float* mine = ring.shared.sums + warp * kMaxBlockN + col + kept_column<kCols>();
#pragma unroll
    for (int i = 0; i < kCols / 32; ++i) mine[i] = sums[i];
  }
  if (to.aux && (place == kAuxBoxesAStage<kBlockN> - 1 || box == kAuxBoxes<kBlockN> - 1)) {
    __syncwarp();
    ring.release(ring.empty());
    ring.advance();
  }
}

template <class T, int kBlockN, int kBlocks>
__device__ __forceinline__ void store_tile(const Epilogue<T>& to, const float (&acc)[kBlockN / 2],
                                           Ring<kBlockN, kBlocks>& ring, int first_col, const float* bias = nullptr) {
#pragma unroll
  for (int box = 0; box < kBlockN / 64; ++box) store_box<64>(to, acc, ring, first_col, bias, box);
  if constexpr (kBlockN % 64 != 0) store_box<kBlockN % 64>(to, acc, ring, first_col, bias, kBlockN / 64);
  if (!to.sums) return;
  // A warp has the sums over its 16 rows, a group over its 64.
  static_assert(kGroup == 2 * kSumRows);
  const int group = threadIdx.x / kGroup - 1;
  ptx::named_barrier(kGroupBarrier + group, kGroup);
  for (int col = threadIdx.x % kGroup; col < kBlockN && first_col + col < to.n; col += kGroup) {
    const float* from = ring.shared.sums + group * 4 * kMaxBlockN + col;
    to.sums[static_cast<int64_t>(group) * padded(to.n) + first_col + col] =
        from[0] + from[kMaxBlockN] + (from[2 * kMaxBlockN] + from[3 * kMaxBlockN]);
  }
  ptx::named_barrier(kGroupBarrier + group, kGroup);  // read before the next tile's sums are written
}

}  // namespace smop::sm90
