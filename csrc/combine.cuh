// What the combine kernels share. LayerNorm parameters may be float32 beside 16-bit activations (autocast keeps them
// so): P is their type.
#pragma once
#include "common.cuh"

namespace smop {

template <class T>
__device__ __forceinline__ const T* row_of(const void* base, int64_t row, int dim) {
  return static_cast<const T*>(base) + row * dim;
}

// The row of choice `slot`, -1 for none.
template <class Args>
__device__ __forceinline__ int row_of_choice(const Args& p, int64_t slot) {
  return min(p.inverse[slot], p.tokens * p.top_k - 1);
}

// As by_dtype, with the type of the LayerNorm parameters: that of the activations, or float32.
template <class F>
cudaError_t by_dtypes(int dtype, int ln_dtype, F&& f) {
  return by_dtype(dtype, [&](auto t) {
    if (ln_dtype == SMOP_FLOAT32) return f(t, float{});
    return ln_dtype == dtype ? f(t, t) : cudaErrorInvalidValue;
  });
}

// combine_bwd sums its columns over runs of at most so many rows of one expert: enough to make the partial sums small,
// few enough to fill the device.
inline int rows_per_run(int64_t rows) {
  const int64_t even = ceil_div(rows, 256);
  return static_cast<int>(even < 2 ? 2 : even > 128 ? 128 : even);
}

// The partial sums of a run, each padded(O) wide: of dz, and with LayerNorm those that become dln_weight and dln_bias.
__host__ __device__ __forceinline__ int sums_per_run(bool layer_norm) { return layer_norm ? 3 : 1; }

}  // namespace smop
