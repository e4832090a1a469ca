// Grouped GEMMs for Hopper: TMA, wgmma, warp specialisation, a persistent grid. Compiled for sm_90a alone, and only
// when that is among the architectures (SMOP_HAS_SM90A).
//
// pipeline_sm90.cuh has the block's structure; here are the producers, the kernels and their launch.
//
// What loads an operand:
// - weights: TMA, one 3-D tensor map over (X, N, K) or (X, K, N). The expert is a coordinate, so no map is ever edited.
// - rows as they lie: TMA, 2-D. A tile may run into the next expert's rows; those products are not stored.
// - gathered rows: cp.async by all four producer warps.
// - weight gradients: the same, 64 rows of both operands a stage. A foreign row would be summed, so the consumers clear
//   the rows past the segment (clear_rows).
#include <initializer_list>

#include "pipeline_sm90.cuh"
#include "tensor_map.cuh"

namespace smop {
namespace {

using namespace sm90;

template <class T, int kBlockN>
__device__ __forceinline__ void store_tile(const Epilogue<T>& to, const float (&acc)[kBlockN / 2], float* stages,
                                           int first_col) {
  const int warp = threadIdx.x / kWarp - kProducerWarps;
  float sums[kBlockN / kStageCols];
#pragma unroll
  for (int piece = 0; piece < kBlockN / kStageCols; ++piece)
    sums[piece] = store_piece(to, acc, piece * kStageCols / 2, stages + warp * kStageFloats, warp * 16,
                              first_col + piece * kStageCols);
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
    to.sums[static_cast<int64_t>(group) * to.n + first_col + col] =
        from[0] + from[kStageFloats] + (from[2 * kStageFloats] + from[3 * kStageFloats]);
  }
  ptx::named_barrier(kGroupBarrier + group, kGroup);  // read before the next tile's pieces are staged
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
  const int64_t lda = p.lda;
  Ring<kBlockN> ring{shared};
  Announcer<kBlockN> announcer{{shared}};
  RowTile tile;
  for (int64_t number = blockIdx.x; scheduler.find(number, tile); number += gridDim.x) {
    // A row that does not exist has an address too, of which nothing is read.
    const T* from[kRows];
    uint32_t exists = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first + i * (kGroup / 8);
      const bool inside = row < tile.rows;
      from[i] = static_cast<const T*>(p.a) + chunk * 8 + (inside ? p.order[tile.row + row] / p.top_k : 0) * lda;
      exists |= inside << i;
    }
    for (int k = 0; k < p.k; k += kBlockK) {
      ptx::mbarrier_wait(ring.empty(), ring.phase ^ 1);
      if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(ring.full(), kBBytes<kBlockN>);
        load_weights<kBlockN, kTransB>(ring, b_map, k, tile.col_tile * kBlockN, tile.expert);
      }
      const int bytes = max(0, min(16, 2 * (p.k - k - chunk * 8)));
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        ptx::cp_async16(ring.a() + ptx::swizzled(first + i * (kGroup / 8), chunk), from[i] + k,
                        exists >> i & 1 ? bytes : 0);
      announcer.issued();
      ring.advance();
    }
  }
  announcer.drain();
}

// The tiles of a weight gradient, counted on the host: as kernel arguments they cost the roles no registers.
struct WgradGrid {
  int row_tiles, col_tiles;
  int64_t tiles;
};

// The TMA boxes of 64 rows × 64·kBlocks columns.
template <int kBlocks>
__device__ __forceinline__ void load_rows(uint32_t dst, const CUtensorMap& map, uint32_t barrier, int col, int row) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) ptx::tma_load(dst + i * kBlockBytes, &map, barrier, col + i * 64, row);
}

template <class T, int kBlockN>
__device__ __forceinline__ void produce_wgrad_by_tma(const SmopWgrad& p, const WgradGrid& grid,
                                                     const CUtensorMap& a_map, const CUtensorMap& b_map,
                                                     const Shared& shared) {
  if (threadIdx.x != 0) return;
  Ring<kBlockN> ring{shared};
  for (int64_t number = blockIdx.x; number < grid.tiles; number += gridDim.x) {
    const WeightTile tile = weight_tile(number, grid.row_tiles, grid.col_tiles);
    const int begin = tile.expert ? p.offs[tile.expert - 1] : 0, end = p.offs[tile.expert];
    for (int k = begin; k < end; k += kBlockK) {
      ptx::mbarrier_wait(ring.empty(), ring.phase ^ 1);
      ptx::mbarrier_arrive_expect(ring.full(), kABytes + kBBytes<kBlockN>);
      load_rows<kBlockM / 64>(ring.a(), a_map, ring.full(), tile.row_tile * kBlockM, k);
      load_rows<kBlockN / 64>(ring.b(), b_map, ring.full(), tile.col_tile * kBlockN, k);
      ring.advance();
    }
  }
}

template <class T, int kBlockN>
__device__ __forceinline__ void produce_wgrad_gathered(const SmopWgrad& p, const WgradGrid& grid,
                                                       const CUtensorMap& a_map, const Shared& shared) {
  constexpr int kRowChunks = kBlockN / 8, kStep = kGroup / kRowChunks;  // kRowChunks threads copy a row of the stage
  const int lane = threadIdx.x % kWarp, chunk = threadIdx.x % kRowChunks, first = threadIdx.x / kRowChunks;
  const int64_t ldb = p.ldb;
  Ring<kBlockN> ring{shared};
  Announcer<kBlockN> announcer{{shared}};
  for (int64_t number = blockIdx.x; number < grid.tiles; number += gridDim.x) {
    const WeightTile tile = weight_tile(number, grid.row_tiles, grid.col_tiles);
    const int begin = tile.expert ? p.offs[tile.expert - 1] : 0, end = p.offs[tile.expert];
    const int col = tile.col_tile * kBlockN + chunk * 8, bytes = max(0, min(16, 2 * (p.n - col)));
    const T* columns = static_cast<const T*>(p.b) + col;
    // Lane l knows the gathered rows l and l + 32 of the stage; they are fetched one stage ahead. Past the segment row
    // 0 stands in, whose values are cleared with the rest.
    const auto gathered = [&](int row) { return row < end ? p.order[row] / p.top_k : 0; };
    int low = gathered(begin + lane), high = gathered(begin + lane + kWarp);
    for (int k = begin; k < end; k += kBlockK) {
      ptx::mbarrier_wait(ring.empty(), ring.phase ^ 1);
      if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(ring.full(), kABytes);
        load_rows<kBlockM / 64>(ring.a(), a_map, ring.full(), tile.row_tile * kBlockM, k);
      }
      const uint32_t dst = ring.b() + chunk / 8 * kBlockBytes;
#pragma unroll
      for (int i = 0; i < kBlockK / kStep; ++i) {
        const int row = first + i * kStep;
        const int from = __shfl_sync(kFullWarp, i * kStep < kWarp ? low : high, row % kWarp);
        ptx::cp_async16(dst + ptx::swizzled(row, chunk % 8), columns + from * ldb, bytes);
      }
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
  begin_kernel();
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
      float acc[kBlockN / 2] = {};
      consume<T, kBlockN, false, kTransB>(acc, ring, k_tiles);
      store_tile<T, kBlockN>(gemm_epilogue<T>(p, tile), acc, shared.stages, tile.col_tile * kBlockN);
    }
  }
}

template <class T, int kBlockN>
__global__ __launch_bounds__(kThreads, 1) void grouped_wgrad_sm90(const __grid_constant__ SmopWgrad p,
                                                                  const __grid_constant__ WgradGrid grid,
                                                                  const __grid_constant__ CUtensorMap a_map,
                                                                  const __grid_constant__ CUtensorMap b_map) {
  extern __shared__ unsigned char base[];
  const Shared shared(base);
  begin_kernel();
  init_barriers<kBlockN>(shared, p.order ? 1 + kProducerWarps : 1);
  __syncthreads();
  if (threadIdx.x < kGroup) {
    ptx::lower_registers<kProducerRegisters>();
    if (p.order)
      produce_wgrad_gathered<T, kBlockN>(p, grid, a_map, shared);
    else
      produce_wgrad_by_tma<T, kBlockN>(p, grid, a_map, b_map, shared);
  } else {
    ptx::raise_registers<kConsumerRegisters>();
    Ring<kBlockN> ring{shared};
    for (int64_t number = blockIdx.x; number < grid.tiles; number += gridDim.x) {
      const WeightTile tile = weight_tile(number, grid.row_tiles, grid.col_tiles);
      const int rows = p.offs[tile.expert] - (tile.expert ? p.offs[tile.expert - 1] : 0);
      const int k_tiles = static_cast<int>(ceil_div(rows, kBlockK));
      float acc[kBlockN / 2] = {};
      consume<T, kBlockN, true, true>(acc, ring, k_tiles, rows - (k_tiles - 1) * kBlockK);
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
template <class... Parameters, class... Arguments>
cudaError_t launch_tiles(void (*kernel)(Parameters...), int64_t tiles, int sms, uint64_t stream, bool dependent,
                         const Arguments&... arguments) {
  const auto blocks = static_cast<unsigned>(tiles < sms ? tiles : sms);
  return launch({blocks, kThreads, kSharedBytes, stream, dependent}, kernel, arguments...);
}

// The map of a matrix of rows, in boxes of 64 columns.
cudaError_t rows_map(CUtensorMap& map, int dtype, const void* base, int64_t rows, int cols, int64_t ld, int box_rows) {
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(ld) * 2, 0};
  return tensor_map(map, dtype, base, 2, {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows), 1}, strides,
                    box_rows);
}

template <class T, int kBlockN>
cudaError_t launch_gemm(const SmopGemm& p, int sms, uint64_t stream, bool dependent) {
  CUtensorMap a_map{}, b_map{};
  const cuuint64_t inner = p.b_k_major ? p.k : p.n, outer = p.b_k_major ? p.n : p.k;
  const cuuint64_t b_strides[2] = {static_cast<cuuint64_t>(p.ldb) * 2, static_cast<cuuint64_t>(p.stride_b) * 2};
  if (auto e = tensor_map(b_map, p.dtype, p.b, 3, {inner, outer, static_cast<cuuint64_t>(p.experts)}, b_strides,
                          p.b_k_major ? kBlockN : kBlockK))
    return e;
  if (!p.order)
    if (auto e = rows_map(a_map, p.dtype, p.a, p.a_rows, p.k, p.lda, kBlockM)) return e;
  const int64_t tiles = max_row_tiles(p.rows, p.experts, kBlockM) * ceil_div(p.n, kBlockN);
  return launch_tiles(p.b_k_major ? grouped_gemm_sm90<T, kBlockN, false> : grouped_gemm_sm90<T, kBlockN, true>, tiles,
                      sms, stream, dependent, p, a_map, b_map);
}

template <class T, int kBlockN>
cudaError_t launch_wgrad(const SmopWgrad& p, int sms, uint64_t stream, bool dependent) {
  CUtensorMap a_map{}, b_map{};
  WgradGrid grid{static_cast<int>(ceil_div(p.m, kBlockM)), static_cast<int>(ceil_div(p.n, kBlockN)), 0};
  grid.tiles = static_cast<int64_t>(p.experts) * grid.row_tiles * grid.col_tiles;
  if (p.a_rows > 0) {  // without rows nothing is loaded, and a map cannot be made
    if (auto e = rows_map(a_map, p.dtype, p.a, p.a_rows, p.m, p.lda, kBlockK)) return e;
    if (!p.order)
      if (auto e = rows_map(b_map, p.dtype, p.b, p.b_rows, p.n, p.ldb, kBlockK)) return e;
  }
  return launch_tiles(grouped_wgrad_sm90<T, kBlockN>, grid.tiles, sms, stream, dependent, p, grid, a_map, b_map);
}

}  // namespace

bool gemm_sm90_serves(const SmopGemm& p) {
  const int64_t inner = p.b_k_major ? p.k : p.n, outer = p.b_k_major ? p.n : p.k;
  return p.k > 0 && addressable(p.a, p.lda) && p.lda >= p.k && addressable(p.b, p.ldb) && p.stride_b % 8 == 0 &&
         p.ldb >= inner && p.stride_b >= p.ldb * (outer - 1) + inner;
}

bool wgrad_sm90_serves(const SmopWgrad& p) {
  return addressable(p.a, p.lda) && p.lda >= p.m && addressable(p.b, p.ldb) && p.ldb >= p.n;
}

cudaError_t launch_gemm_sm90(const SmopGemm& p, uint64_t stream, bool dependent) {
  int sms = 0;
  if (auto e = sm_count(sms)) return e;
  // What even routing gives: every expert has rows, and on average half a tile too many.
  const int64_t busy = p.rows < p.experts ? p.rows : p.experts;
  const int64_t even = p.rows / kBlockM + p.experts / 2, row_tiles = even > busy ? even : busy;
  return by_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    switch (best_width({256, 128, 64}, row_tiles, p.n, sms)) {
      case 256: return launch_gemm<T, 256>(p, sms, stream, dependent);
      case 128: return launch_gemm<T, 128>(p, sms, stream, dependent);
      default: return launch_gemm<T, 64>(p, sms, stream, dependent);
    }
  });
}

cudaError_t launch_wgrad_sm90(const SmopWgrad& p, uint64_t stream, bool dependent) {
  int sms = 0;
  if (auto e = sm_count(sms)) return e;
  const int width = best_width({256, 128}, p.experts * ceil_div(p.m, kBlockM), p.n, sms);
  return by_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    return width == 256 ? launch_wgrad<T, 256>(p, sms, stream, dependent)
                        : launch_wgrad<T, 128>(p, sms, stream, dependent);
  });
}

}  // namespace smop
