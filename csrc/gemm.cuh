// What the two GEMM families share: where a tile's epilogue writes, and the launchers that gemm.cu chooses between.
#pragma once
#include "epilogue.cuh"

namespace smop {

constexpr int kTileRows = 128;                     // of either family
constexpr int kSumsATile = kTileRows / kSumRows;  // column sums of a row tile

// Whether a tile is of its expert's first rows: those bring what the expert has of `ahead`, each column a part.
__device__ __forceinline__ bool first_of_expert(const SmopGemm& p, const RowTile& tile) {
  return tile.row == expert_rows(p.offs, tile.expert, p.rows).begin;
}

template <class T>
__device__ __forceinline__ Epilogue<T> gemm_epilogue(const SmopGemm& p, const RowTile& tile) {
  const int64_t at = static_cast<int64_t>(tile.row) * p.n;
  return {static_cast<T*>(p.out) + at,
          p.pre ? static_cast<T*>(p.pre) + at : nullptr,
          p.aux ? static_cast<const T*>(p.aux) + at : nullptr,
          p.bias ? static_cast<const T*>(p.bias) + static_cast<int64_t>(tile.expert) * p.n : nullptr,
          p.n,
          p.n,
          tile.rows,
          p.epilogue,
          p.sums ? p.sums + static_cast<int64_t>(tile.index) * kSumsATile * padded(p.n) : nullptr};
}

template <class T>
__device__ __forceinline__ Epilogue<T> wgrad_epilogue(const SmopWgrad& p, int expert, int m0, int block_m) {
  T* out = static_cast<T*>(p.out) + (static_cast<int64_t>(expert) * p.m + m0) * p.n;
  return {out, nullptr, nullptr, nullptr, p.n, p.n, min(block_m, p.m - m0), SMOP_IDENTITY, nullptr};
}

// Any device from sm_80 on, any shape and alignment.
cudaError_t launch_gemm_sm80(const SmopGemm& args, uint64_t stream, bool dependent);
cudaError_t launch_wgrad_sm80(const SmopWgrad& args, uint64_t stream, bool dependent);

// sm_90 only; `serves` says whether TMA and 16-byte copies can address the operands.
bool gemm_sm90_serves(const SmopGemm& args);
bool wgrad_sm90_serves(const SmopWgrad& args);
cudaError_t launch_gemm_sm90(const SmopGemm& args, uint64_t stream, bool dependent);
cudaError_t launch_wgrad_sm90(const SmopWgrad& args, uint64_t stream, bool dependent);

}  // namespace smop
