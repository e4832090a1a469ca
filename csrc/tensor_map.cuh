// Tensor maps for TMA, encoded on the host. The driver's encoder is looked up at run time: nothing links with the
// driver.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>

#include <atomic>

#include "common.cuh"

namespace smop {

inline cudaError_t encoder(PFN_cuTensorMapEncodeTiled_v12000& encode) {
  static std::atomic<PFN_cuTensorMapEncodeTiled_v12000> known{nullptr};
  encode = known.load();
  if (encode) return cudaSuccess;
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const auto e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found);
#else
  const auto e = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &symbol, cudaEnableDefault, &found);
#endif
  if (e) return e;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
  encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(symbol);
  known.store(encode);
  return cudaSuccess;
}

// A map of `rank` dimensions, innermost first; boxes of box_cols (64 or 32) × box_rows elements land in the layout of
// wgmma.cuh.
inline cudaError_t tensor_map(CUtensorMap& map, int dtype, const void* base, int rank, const cuuint64_t (&dims)[3],
                              const cuuint64_t (&strides)[2], int box_cols, int box_rows) {
  PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
  if (auto e = encoder(encode)) return e;
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const auto type = dtype == SMOP_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto swizzle = box_cols == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult made = encode(&map, type, rank, const_cast<void*>(base), dims, strides, box, steps,
                               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace smop
