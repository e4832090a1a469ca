// What every kernel file uses: 16-bit element types, 16-byte row access that tolerates any alignment, reductions,
// launch checks.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "api.h"
#include "tile_scheduler.cuh"

namespace smop {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// The first statement of every kernel. With programmatic dependent launch (launch(), below) a kernel's blocks may be on
// the device while the launch before it still runs: here they wait until that has completed and its writes are
// visible, then let the launch after take the places that become free.
__device__ __forceinline__ void begin_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(fp16 v) { return __half2float(v); }
__device__ __forceinline__ float to_float(float v) { return v; }
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}

// Two elements in 32 bits, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  const T pair[2] = {from_float<T>(first), from_float<T>(second)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof bits);
  return bits;
}
template <class T>
__device__ __forceinline__ void unpack(uint32_t bits, float& first, float& second) {
  T pair[2];
  memcpy(pair, &bits, sizeof bits);
  first = to_float(pair[0]), second = to_float(pair[1]);
}

__device__ __forceinline__ bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Eight elements of which all exist, at a 16-byte aligned address.
template <class T>
struct Packed8 {
  uint4 bits[sizeof(T) / 2];

  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) bits[i] = reinterpret_cast<const uint4*>(p)[i];
  }
  __device__ __forceinline__ void unpack(float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = to_float(reinterpret_cast<const T*>(bits)[i]);
  }
};

// Eight consecutive elements, of which `n` exist (n may be ≥ 8 or ≤ 0); those that do not read as zero. 16-byte
// accesses where the address allows them, which is every time for contiguous rows whose width is a multiple of 8.
template <class T>
__device__ __forceinline__ void load8(const T* p, int n, float (&v)[8]) {
  if (n >= 8 && aligned16(p)) {
    Packed8<T> packed;
    packed.load(p);
    packed.unpack(v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = i < n ? to_float(p[i]) : 0.f;
  }
}

// The same for kernels compiled for both kinds of rows: kAligned, their width is a multiple of 8 and every row aligned.
template <bool kAligned, class T>
__device__ __forceinline__ void load8(const T* p, int n, float (&v)[8]) {
  if constexpr (kAligned) {
    Packed8<T> packed;
    packed.load(p);
    packed.unpack(v);
  } else {
    load8(p, n, v);
  }
}

template <class T>
__device__ __forceinline__ void store8_aligned(T* p, const float (&v)[8]) {
  constexpr int kPer = 16 / sizeof(T);
#pragma unroll
  for (int j = 0; j < 8; j += kPer) {
    uint4 bits;
    T* e = reinterpret_cast<T*>(&bits);
#pragma unroll
    for (int i = 0; i < kPer; ++i) e[i] = from_float<T>(v[j + i]);
    *reinterpret_cast<uint4*>(p + j) = bits;
  }
}

template <class T>
__device__ __forceinline__ void store8(T* p, int n, const float (&v)[8]) {
  if (n >= 8 && aligned16(p)) {
    store8_aligned(p, v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < n) p[i] = from_float<T>(v[i]);
  }
}

// The width of rows of partial sums: they start at 16-byte boundaries.
__host__ __device__ __forceinline__ int padded(int width) { return (width + 7) / 8 * 8; }

// Butterfly sums: every lane gets the same bits, and the order is fixed.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) v += __shfl_xor_sync(kFullWarp, v, d);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, d));
  return v;
}

// Sums of N values over the block, the same in every thread. `shared` holds N * warps floats, 16-byte aligned, and may
// be written again after the caller's next barrier: callers take two by turns.
template <int N, int kThreads>
__device__ __forceinline__ void block_sum(float (&v)[N], float* shared) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps % 4 == 0);
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = warp_sum(v[i]);
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) shared[i * kWarps + warp] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    v[i] = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; w += 4) {
      const float4 four = *reinterpret_cast<const float4*>(shared + i * kWarps + w);
      v[i] += four.x + four.y + (four.z + four.w);
    }
  }
}

// Calls f with a value of the element type: by_dtype(args->dtype, [&](auto t) { using T = decltype(t); ... }).
template <class F>
cudaError_t by_dtype(int dtype, F&& f) {
  switch (dtype) {
    case SMOP_BFLOAT16: return f(bf16{});
    case SMOP_FLOAT16: return f(fp16{});
    default: return cudaErrorInvalidValue;
  }
}

inline bool all_aligned16(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return true;
}

inline cudaStream_t as_stream(uint64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

struct Grid {
  dim3 blocks;
  int threads;
  size_t shared;  // dynamic, bytes
  uint64_t stream;
  bool dependent;  // may start before the launch ahead has ended; not for the first launch of an operator
  int cluster = 1;  // blocks a cluster; the blocks are a multiple
};

// Queues a kernel, by programmatic dependent launch where that is asked for and the device has it.
template <class... Parameters, class... Arguments>
cudaError_t launch(const Grid& grid, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (grid.shared > 48 * 1024)
    if (auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(grid.shared)))
      return e;
  int device = 0, major = 0;
  if (grid.dependent) {
    if (auto e = cudaGetDevice(&device)) return e;
    if (auto e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return e;
  }
  cudaLaunchAttribute attributes[2]{};
  int count = 0;
  if (major >= 9) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = as_stream(grid.stream);
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace smop
