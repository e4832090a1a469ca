// Grouped GEMMs for Hopper: TMA, wgmma, warp specialisation, a persistent grid. Compiled for sm_90a alone, and only
// when that is among the architectures (SMOP_HAS_SM90A).
//
// pipeline_sm90.cuh has the block's structure, producers_sm90.cuh what fills its stages, store_sm90.cuh what becomes of
// the products; here are the kernels and their launch.
#include <initializer_list>

#include "producers_sm90.cuh"
#include "store_sm90.cuh"
#include "tensor_map.cuh"

namespace smop {
namespace {

using namespace sm90;

template <class T, int kBlockN, bool kTransB>
__global__ __launch_bounds__(kThreads, 1) void grouped_gemm_sm90(const __grid_constant__ SmopGemm p,
                                                                 const __grid_constant__ CUtensorMap a_map,
                                                                 const __grid_constant__ CUtensorMap b_map,
                                                                 const __grid_constant__ CUtensorMap aux_map) {
  extern __shared__ unsigned char base[];
  const Shared shared(base);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&b_map);
    if (!p.order) ptx::prefetch_tensormap(&a_map);
    if (p.aux) ptx::prefetch_tensormap(&aux_map);
  }
  begin_kernel();
  RowTileScheduler scheduler(p.offs, p.experts, p.rows, kBlockM, static_cast<int>(ceil_div(p.n, kBlockN)));
  init_barriers<kBlockN>(shared, p.order ? 1 + kProducerWarps : 1);
  __syncthreads();
  if (threadIdx.x < kGroup) {
    ptx::lower_registers<kProducerRegisters>();
    if (p.order)
      produce_gathered<T, kBlockN, kTransB>(p, b_map, shared, scheduler);
    else
      produce_by_tma<T, kBlockN, kTransB>(p, a_map, b_map, aux_map, shared, scheduler);
  } else {
    ptx::raise_registers<kConsumerRegisters>();
    Ring<kBlockN> ring{shared};
    RowTile tile;
    int tiles = 0;
    const int k_tiles = static_cast<int>(ceil_div(p.k, kBlockK));
    for (int number = blockIdx.x; scheduler.find(number, tile); number += gridDim.x) {
      const Epilogue<T> to = gemm_epilogue<T>(p, tile);
      const int first_col = tile.col_tile * kBlockN;
      const TileBias<T, kBlockN> bias(to, first_col);
      float acc[kBlockN / 2] = {};
      if (tile.rows > (threadIdx.x / kGroup - 1) * 64)
        consume<T, kBlockN, false, kTransB>(acc, ring, k_tiles);
      else
        pass(ring, k_tiles);
      store_tile<T, kBlockN>(to, acc, ring, first_col, bias.share(to, shared, tiles++));
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
  if (threadIdx.x == 0 && p.a_rows > 0) {
    ptx::prefetch_tensormap(&a_map);
    if (!p.order) ptx::prefetch_tensormap(&b_map);
  }
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
    for (int number = blockIdx.x; number < grid.tiles; number += gridDim.x) {
      const WeightTile tile = weight_tile(number, grid.row_tiles, grid.col_tiles);
      const ExpertRows own = expert_rows(p.offs, tile.expert, p.a_rows);
      const int rows = own.end - own.begin;
      const int k_tiles = static_cast<int>(ceil_div(rows, kBlockK));
      float acc[kBlockN / 2] = {};
      consume<T, kBlockN, true, true>(acc, ring, k_tiles, rows - (k_tiles - 1) * kBlockK);
      store_tile<T, kBlockN>(wgrad_epilogue<T>(p, tile.expert, tile.row_tile * kBlockM, kBlockM), acc, ring,
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

// The tile width with the least rounds × cost of a round. A tile costs its columns and, for loading A and its epilogue,
// about as much as 80 more (predicted from the machine code, not measured). Wide tiles read less; narrow ones leave
// fewer SMs idle in the last round, and with few tokens, when reading the weights is all, put every SM to it.
int best_width(std::initializer_list<int> widths, int64_t row_tiles, int n, int sms) {
  int best = 0;
  int64_t least = INT64_MAX;
  for (const int width : widths) {
    const int64_t cost = ceil_div(row_tiles * ceil_div(n, width), sms) * (width + 80);
    if (cost < least) least = cost, best = width;
  }
  return best;
}

// One block an SM, each walking its share of the tiles.
template <class... Parameters, class... Arguments>
cudaError_t launch_tiles(void (*kernel)(Parameters...), int64_t tiles, int sms, uint64_t stream, bool dependent,
                         const Arguments&... arguments) {
  if (tiles > kMostTiles) return cudaErrorInvalidConfiguration;
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
  CUtensorMap a_map{}, b_map{}, aux_map{};
  const cuuint64_t inner = p.b_k_major ? p.k : p.n, outer = p.b_k_major ? p.n : p.k;
  const cuuint64_t b_strides[2] = {static_cast<cuuint64_t>(p.ldb) * 2, static_cast<cuuint64_t>(p.stride_b) * 2};
  if (auto e = tensor_map(b_map, p.dtype, p.b, 3, {inner, outer, static_cast<cuuint64_t>(p.experts)}, b_strides,
                          p.b_k_major ? kBlockN : kBlockK))
    return e;
  if (!p.order)
    if (auto e = rows_map(a_map, p.dtype, p.a, p.a_rows, p.k, p.lda, kBlockM)) return e;
  if (p.aux)
    if (auto e = rows_map(aux_map, p.dtype, p.aux, p.rows, p.n, p.n, kBlockM)) return e;
  const int64_t tiles = max_row_tiles(p.rows, p.experts, kBlockM) * ceil_div(p.n, kBlockN);
  const auto queue = [&](auto kernel) {
    return launch_tiles(kernel, tiles, sms, stream, dependent, p, a_map, b_map, aux_map);
  };
  if constexpr (kBlockN % 64 == 0)  // the boxes of a transposed B are 64 wide
    if (!p.b_k_major) return queue(grouped_gemm_sm90<T, kBlockN, true>);
  return queue(grouped_gemm_sm90<T, kBlockN, false>);
}

template <class T, int kBlockN>
cudaError_t launch_wgrad(const SmopWgrad& p, int sms, uint64_t stream, bool dependent) {
  CUtensorMap a_map{}, b_map{};
  const int64_t row_tiles = ceil_div(p.m, kBlockM), col_tiles = ceil_div(p.n, kBlockN);
  const int64_t tiles = p.experts * row_tiles * col_tiles;
  const WgradGrid grid{static_cast<int>(row_tiles), static_cast<int>(col_tiles), static_cast<int>(tiles)};
  if (p.a_rows > 0) {  // without rows nothing is loaded, and a map cannot be made
    if (auto e = rows_map(a_map, p.dtype, p.a, p.a_rows, p.m, p.lda, kBlockK)) return e;
    if (!p.order)
      if (auto e = rows_map(b_map, p.dtype, p.b, p.b_rows, p.n, p.ldb, kBlockK)) return e;
  }
  return launch_tiles(grouped_wgrad_sm90<T, kBlockN>, tiles, sms, stream, dependent, p, grid, a_map, b_map);
}

}  // namespace

bool gemm_sm90_serves(const SmopGemm& p) {
  const int64_t inner = p.b_k_major ? p.k : p.n, outer = p.b_k_major ? p.n : p.k;
  return p.k > 0 && addressable(p.a, p.lda) && p.lda >= p.k && addressable(p.b, p.ldb) && p.stride_b % 8 == 0 &&
         p.ldb >= inner && p.stride_b >= p.ldb * (outer - 1) + inner &&
         (!p.aux || (!p.order && addressable(p.aux, p.n)));
}

bool wgrad_sm90_serves(const SmopWgrad& p) {
  return addressable(p.a, p.lda) && p.lda >= p.m && addressable(p.b, p.ldb) && p.ldb >= p.n &&
         (!p.order || (p.n % 8 == 0 && p.ldb < int64_t{1} << 31));
}

cudaError_t launch_gemm_sm90(const SmopGemm& p, uint64_t stream, bool dependent) {
  int sms = 0;
  if (auto e = sm_count(sms)) return e;
  // What even routing gives: every expert has rows, and on average half a tile too many.
  const int64_t busy = p.rows < p.experts ? p.rows : p.experts;
  const int64_t even = p.rows / kBlockM + p.experts / 2, row_tiles = even > busy ? even : busy;
  return by_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const int width = p.b_k_major ? best_width({256, 192, 160, 128, 64}, row_tiles, p.n, sms)
                                  : best_width({256, 192, 128, 64}, row_tiles, p.n, sms);
    switch (width) {
      case 256: return launch_gemm<T, 256>(p, sms, stream, dependent);
      case 192: return launch_gemm<T, 192>(p, sms, stream, dependent);
      case 160: return launch_gemm<T, 160>(p, sms, stream, dependent);
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
