// Grouped GEMMs for Hopper: TMA, wgmma, warp specialisation, a persistent grid. Compiled for sm_90a alone, and only
// when that is among the architectures (SMOP_HAS_SM90A).
//
// pipeline_sm90.cuh has the block's structure; here are the producers, the kernels and their launch.
//
// What loads an operand:
// - weights: TMA, one 3-D tensor map over (X, N, K) or (X, K, N). The expert is a coordinate, so no map is ever edited.
// - rows as they lie: TMA, 2-D. A tile may run into the next expert's rows; those products are not stored.
// - gathered rows: cp.async by all four producer warps.
// - weight gradients: cp.async for both operands. A foreign row would be summed, so rows past the segment become zeros.
#include <initializer_list>

#include "gemm.cuh"
#include "pipeline_sm90.cuh"
#include "tensor_map.cuh"

namespace smop {
namespace {

using namespace sm90;

template <class T, int kBlockN>
__device__ __forceinline__ void store_tile(const Epilogue<T>& to, const float (&acc)[kBlockN / 2], float* stages,
                                           int first_col) {
  const int warp = threadIdx.x / kWarp - kProducerWarps;
#pragma unroll
  for (int piece = 0; piece < kBlockN / kStageCols; ++piece)
    store_piece(to, acc, piece * kStageCols / 2, stages + warp * kStageFloats, warp * 16,
                first_col + piece * kStageCols);
}

// The TMA boxes of one stage of the weights.
template <int kBlockN, bool kTransB>
__device__ __forceinline__ void load_weights(const Ring<kBlockN>& ring, const CUtensorMap& map, int k, int n,
                                             int expert) {
  if constexpr (kTransB) {
#pragma unroll
    for (int i = 0; i < kBlockN / 64; ++i)
      ptx::tma_load(ring.b() + i * kBlockBytes, &map, ring.full(), n + i * 64, k, expert);
  } else {
    ptx::tma_load(ring.b(), &map, ring.full(), k, n, expert);
  }
}

template <class T, int kBlockN, bool kTransB>
__device__ __forceinline__ void produce_by_tma(const SmopGemm& p, const CUtensorMap& a_map, const CUtensorMap& b_map,
                                               const Shared& shared, RowTileScheduler scheduler) {
  if (threadIdx.x != 0) return;
  Ring<kBlockN> ring{shared};
  RowTile tile;
  for (int64_t number = blockIdx.x; scheduler.find(number, tile); number += gridDim.x) {
    for (int k = 0; k < p.k; k += kBlockK) {
      ptx::mbarrier_wait(ring.empty(), ring.phase ^ 1);
      ptx::mbarrier_arrive_expect(ring.full(), kABytes + kBBytes<kBlockN>);
      ptx::tma_load(ring.a(), &a_map, ring.full(), k, tile.row);
      load_weights<kBlockN, kTransB>(ring, b_map, k, tile.col_tile * kBlockN, tile.expert);
      ring.advance();
    }
  }
}

template <class T, int kBlockN, bool kTransB>
__device__ __forceinline__ void produce_gathered(const SmopGemm& p, const CUtensorMap& b_map, const Shared& shared,
                                                 RowTileScheduler scheduler) {
  constexpr int kRows = kBlockM / (kGroup / 8);  // 8 threads copy the 128 bytes of a row
  const int chunk = threadIdx.x % 8, first = threadIdx.x / 8;
  const T* a = static_cast<const T*>(p.a);
  Ring<kBlockN> ring{shared};
  Announcer<kBlockN> announcer{{shared}};
  RowTile tile;
  for (int64_t number = blockIdx.x; scheduler.find(number, tile); number += gridDim.x) {
    int rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first + i * (kGroup / 8);
      rows[i] = row < tile.rows ? p.order[tile.row + row] / p.top_k : -1;
    }
    for (int k = 0; k < p.k; k += kBlockK) {
      ptx::mbarrier_wait(ring.empty(), ring.phase ^ 1);
      if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(ring.full(), kBBytes<kBlockN>);
        load_weights<kBlockN, kTransB>(ring, b_map, k, tile.col_tile * kBlockN, tile.expert);
      }
      const int col = k + chunk * 8;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool exists = rows[i] >= 0 && col < p.k;
        const T* src = exists ? a + rows[i] * p.lda + col : a;
        ptx::cp_async16(ring.a() + ptx::swizzled(first + i * (kGroup / 8), chunk), src,
                        exists ? 2 * min(8, p.k - col) : 0);
      }
      announcer.issued();
      ring.advance();
    }
  }
  announcer.drain();
}

// Copies 64 rows of k × 64·kBlocks columns into a stage, as kBlocks blocks of 64 columns. `row_of(i)` is the memory row
// of row i, or -1.
template <int kBlocks, class T, class RowOf>
__device__ __forceinline__ void copy_k_rows(uint32_t dst, const T* base, int64_t ld, int first_col, int cols,
                                            RowOf row_of) {
  constexpr int kRowChunks = kBlocks * 8, kStep = kGroup / kRowChunks;
  const int chunk = threadIdx.x % kRowChunks, first = threadIdx.x / kRowChunks;
  const int col = first_col + chunk * 8;
#pragma unroll
  for (int i = 0; i < kBlockK / kStep; ++i) {
    const int row = first + i * kStep;
    const int from = row_of(row);
    const bool exists = from >= 0 && col < cols;
    ptx::cp_async16(dst + chunk / 8 * kBlockBytes + ptx::swizzled(row, chunk % 8),
                    exists ? base + from * ld + col : base, exists ? 2 * min(8, cols - col) : 0);
  }
}

// The tiles of a weight gradient, counted on the host: as kernel arguments they cost the roles no registers.
struct WgradGrid {
  int row_tiles, col_tiles;
  int64_t tiles;
};

template <class T, int kBlockN>
__device__ __forceinline__ void produce_wgrad(const SmopWgrad& p, const WgradGrid& grid, const Shared& shared) {
  const int lane = threadIdx.x % kWarp;
  Ring<kBlockN> ring{shared};
  Announcer<kBlockN> announcer{{shared}};
  for (int64_t number = blockIdx.x; number < grid.tiles; number += gridDim.x) {
    const WeightTile tile = weight_tile(number, grid.row_tiles, grid.col_tiles);
    const int begin = tile.expert ? p.offs[tile.expert - 1] : 0, end = p.offs[tile.expert];
    // Lane l knows the gathered rows l and l + 32 of the stage; they are fetched one stage ahead.
    const auto gathered = [&](int row) { return row >= end ? -1 : p.order ? p.order[row] / p.top_k : row; };
    int low = gathered(begin + lane), high = gathered(begin + lane + kWarp);
    for (int k = begin; k < end; k += kBlockK) {
      ptx::mbarrier_wait(ring.empty(), ring.phase ^ 1);
      copy_k_rows<kBlockM / 64>(ring.a(), static_cast<const T*>(p.a), p.lda, tile.row_tile * kBlockM, p.m,
                                [&](int row) { return k + row < end ? k + row : -1; });
      copy_k_rows<kBlockN / 64>(ring.b(), static_cast<const T*>(p.b), p.ldb, tile.col_tile * kBlockN, p.n,
                                [&](int row) { return __shfl_sync(kFullWarp, row < kWarp ? low : high, row % kWarp); });
      announcer.issued();
      ring.advance();
      low = gathered(k + kBlockK + lane), high = gathered(k + kBlockK + lane + kWarp);
    }
  }
  announcer.drain();
}

template <class T, int kBlockN, bool kTransB>
__global__ __launch_bounds__(kThreads, 1) void grouped_gemm_sm90(const __grid_constant__ SmopGemm p,
                                                                 const __grid_constant__ CUtensorMap a_map,
                                                                 const __grid_constant__ CUtensorMap b_map) {
  extern __shared__ unsigned char base[];
  const Shared shared(base);
  RowTileScheduler scheduler(p.offs, p.experts, kBlockM, static_cast<int>(ceil_div(p.n, kBlockN)));
  init_barriers<kBlockN>(shared, p.order ? 1 + kProducerWarps : 1);
  __syncthreads();
  if (threadIdx.x < kGroup) {
    ptx::lower_registers<kProducerRegisters>();
    if (p.order)
      produce_gathered<T, kBlockN, kTransB>(p, b_map, shared, scheduler);
    else
      produce_by_tma<T, kBlockN, kTransB>(p, a_map, b_map, shared, scheduler);
  } else {
    ptx::raise_registers<kConsumerRegisters>();
    Ring<kBlockN> ring{shared};
    RowTile tile;
    const int k_tiles = static_cast<int>(ceil_div(p.k, kBlockK));
    for (int64_t number = blockIdx.x; scheduler.find(number, tile); number += gridDim.x) {
      float acc[kBlockN / 2] = {}, none[4];
      consume<T, kBlockN, false, kTransB, false>(acc, none, ring, k_tiles);
      store_tile<T, kBlockN>(gemm_epilogue<T>(p, tile), acc, shared.stages, tile.col_tile * kBlockN);
    }
  }
}

template <class T, int kBlockN>
__global__ __launch_bounds__(kThreads, 1) void grouped_wgrad_sm90(const __grid_constant__ SmopWgrad p,
                                                                  const __grid_constant__ WgradGrid grid) {
  extern __shared__ unsigned char base[];
  const Shared shared(base);
  init_barriers<kBlockN>(shared, kProducerWarps);
  if (threadIdx.x < kOnesBytes / 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared.ones + threadIdx.x * 4), "r"(ptx::kTwoOnes<T>) : "memory");
    ptx::fence_async_proxy();
  }
  __syncthreads();
  if (threadIdx.x < kGroup) {
    ptx::lower_registers<kProducerRegisters>();
    produce_wgrad<T, kBlockN>(p, grid, shared);
  } else {
    ptx::raise_registers<kConsumerRegisters>();
    Ring<kBlockN> ring{shared};
    for (int64_t number = blockIdx.x; number < grid.tiles; number += gridDim.x) {
      const WeightTile tile = weight_tile(number, grid.row_tiles, grid.col_tiles);
      const int begin = tile.expert ? p.offs[tile.expert - 1] : 0;
      const int k_tiles = static_cast<int>(ceil_div(p.offs[tile.expert] - begin, kBlockK));
      float acc[kBlockN / 2] = {}, sum[4] = {};
      if (p.a_sum && tile.col_tile == 0) {
        consume<T, kBlockN, true, true, true>(acc, sum, ring, k_tiles);
        const int m = tile.row_tile * kBlockM + (threadIdx.x / kWarp - kProducerWarps) * 16 + threadIdx.x % kWarp / 4;
        T* out = static_cast<T*>(p.a_sum) + static_cast<int64_t>(tile.expert) * p.m;
        if (threadIdx.x % 4 == 0) {  // every column of `sum` is the same; column 0 lives in these lanes
          if (m < p.m) out[m] = from_float<T>(sum[0]);
          if (m + 8 < p.m) out[m + 8] = from_float<T>(sum[2]);
        }
      } else {
        consume<T, kBlockN, true, true, false>(acc, sum, ring, k_tiles);
      }
      store_tile<T, kBlockN>(wgrad_epilogue<T>(p, tile.expert, tile.row_tile * kBlockM, kBlockM), acc, shared.stages,
                             tile.col_tile * kBlockN);
    }
  }
}

// --------------------------------------------------------------------------------------------------------------------
// host

bool addressable(const void* pointer, int64_t ld) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && ld % 8 == 0;
}

cudaError_t sm_count(int& count) {
  int device = 0;
  if (auto e = cudaGetDevice(&device)) return e;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

// The tile width with the least rounds × work of a round. A tile costs its columns and, for A and the start of the
// epilogue, about 32 more (an estimate, not yet measured). Wide tiles read less; narrow ones leave fewer SMs idle in
// the last round, and with few tokens, when reading the weights is all, put every SM to it.
int best_width(std::initializer_list<int> widths, int64_t row_tiles, int n, int sms) {
  int best = 0;
  int64_t least = INT64_MAX;
  for (const int width : widths) {
    const int64_t cost = ceil_div(row_tiles * ceil_div(n, width), sms) * (width + 32);
    if (cost < least) least = cost, best = width;
  }
  return best;
}

// One block an SM, each walking its share of the tiles.
template <class... Args>
cudaError_t launch(void (*kernel)(Args...), int64_t tiles, int sms, cudaStream_t stream, const Args&... args) {
  if (auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)) return e;
  kernel<<<static_cast<unsigned>(tiles < sms ? tiles : sms), kThreads, kSharedBytes, stream>>>(args...);
  return cudaGetLastError();
}

template <class T, int kBlockN>
cudaError_t launch_gemm(const SmopGemm& p, int sms, cudaStream_t stream) {
  CUtensorMap a_map{}, b_map{};
  const cuuint64_t inner = p.b_k_major ? p.k : p.n, outer = p.b_k_major ? p.n : p.k;
  const cuuint64_t b_strides[2] = {static_cast<cuuint64_t>(p.ldb) * 2, static_cast<cuuint64_t>(p.stride_b) * 2};
  if (auto e = tensor_map(b_map, p.dtype, p.b, 3, {inner, outer, static_cast<cuuint64_t>(p.experts)}, b_strides,
                          p.b_k_major ? kBlockN : kBlockK))
    return e;
  if (!p.order) {
    const cuuint64_t a_strides[2] = {static_cast<cuuint64_t>(p.lda) * 2, 0};
    if (auto e = tensor_map(a_map, p.dtype, p.a, 2,
                            {static_cast<cuuint64_t>(p.k), static_cast<cuuint64_t>(p.a_rows), 1}, a_strides, kBlockM))
      return e;
  }
  const int64_t tiles = max_row_tiles(p.rows, p.experts, kBlockM) * ceil_div(p.n, kBlockN);
  return launch(p.b_k_major ? grouped_gemm_sm90<T, kBlockN, false> : grouped_gemm_sm90<T, kBlockN, true>, tiles, sms,
                stream, p, a_map, b_map);
}

}  // namespace

bool gemm_sm90_serves(const SmopGemm& p) {
  const int64_t inner = p.b_k_major ? p.k : p.n, outer = p.b_k_major ? p.n : p.k;
  return p.k > 0 && addressable(p.a, p.lda) && p.lda >= p.k && addressable(p.b, p.ldb) && p.stride_b % 8 == 0 &&
         p.ldb >= inner && p.stride_b >= p.ldb * (outer - 1) + inner;
}

bool wgrad_sm90_serves(const SmopWgrad& p) { return addressable(p.a, p.lda) && addressable(p.b, p.ldb); }

cudaError_t launch_gemm_sm90(const SmopGemm& p, cudaStream_t stream) {
  int sms = 0;
  if (auto e = sm_count(sms)) return e;
  // What even routing gives: every expert has rows, and on average half a tile too many.
  const int64_t busy = p.rows < p.experts ? p.rows : p.experts;
  const int64_t even = p.rows / kBlockM + p.experts / 2, row_tiles = even > busy ? even : busy;
  return by_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    switch (best_width({256, 128, 64}, row_tiles, p.n, sms)) {
      case 256: return launch_gemm<T, 256>(p, sms, stream);
      case 128: return launch_gemm<T, 128>(p, sms, stream);
      default: return launch_gemm<T, 64>(p, sms, stream);
    }
  });
}

cudaError_t launch_wgrad_sm90(const SmopWgrad& p, cudaStream_t stream) {
  int sms = 0;
  if (auto e = sm_count(sms)) return e;
  const int64_t row_tiles = ceil_div(p.m, kBlockM);
  const int width = best_width({256, 128}, p.experts * row_tiles, p.n, sms);
  WgradGrid grid{static_cast<int>(row_tiles), static_cast<int>(ceil_div(p.n, width)), 0};
  grid.tiles = static_cast<int64_t>(p.experts) * grid.row_tiles * grid.col_tiles;
  return by_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    return launch(width == 256 ? grouped_wgrad_sm90<T, 256> : grouped_wgrad_sm90<T, 128>, grid.tiles, sms, stream, p,
                  grid);
  });
}

}  // namespace smop
