// Grouped GEMMs for Hopper: TMA, wgmma, warp specialisation, a persistent grid. Compiled for sm_90a alone, and only
// when that is among the architectures (SMOP_HAS_SM90A).
//
// pipeline_sm90.cuh has the block's structure, producers_sm90.cuh what fills its stages, store_sm90.cuh what becomes of
// the products; here are the kernels and their launch.
#include "producers_sm90.cuh"
#include "store_sm90.cuh"
#include "tensor_map.cuh"

namespace smop {
namespace {

using namespace sm90;

template <class T, int kBlockN, bool kTransB, int kBlocks>
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
  RowTileScheduler<kBlocks> scheduler(p.offs, p.experts, p.rows, kBlockM, static_cast<int>(ceil_div(p.n, kBlockN)));
  init_barriers<kBlockN, kBlocks>(shared, p.order ? 1 + kProducerWarps : 1);
  if (threadIdx.x < kGroup) {
    ptx::lower_registers<kProducerRegisters>();
    if (p.order)
      produce_gathered<T, kBlockN, kTransB, kBlocks>(p, b_map, shared, scheduler);
    else
      produce_by_tma<T, kBlockN, kTransB, kBlocks>(p, a_map, b_map, aux_map, shared, scheduler);
  } else {
    ptx::raise_registers<kConsumerRegisters>();
    Ring<kBlockN, kBlocks> ring{shared};
    RowTile tile;
    int tiles = 0;
    const int k_tiles = static_cast<int>(ceil_div(p.k, kBlockK));
    for (int number = blockIdx.x / kBlocks; scheduler.find(number, tile, cluster_rank<kBlocks>());
         number += gridDim.x / kBlocks) {
      const Epilogue<T> to = gemm_epilogue<T>(p, tile);
      const int first_col = tile.col_tile * kBlockN;
      const TileBias<T, kBlockN> bias(to, first_col);
      float acc[kBlockN / 2] = {};
      if (tiles == 0) fall_behind(ring, k_tiles, p.order != nullptr);
      if (tile.rows > (threadIdx.x / kGroup - 1) * 64)
        consume<T, false, kTransB>(acc, ring, k_tiles);
      else
        pass(ring, k_tiles);
      store_tile<T, kBlockN>(to, acc, ring, first_col, bias.share(to, shared, tiles++));
    }
  }
}

template <class T, int kBlockN, int kBlocks>
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
  init_barriers<kBlockN, kBlocks>(shared, p.order ? 1 + kProducerWarps : 1);
  if (threadIdx.x < kGroup) {
    ptx::lower_registers<kProducerRegisters>();
    if (p.order)
      produce_wgrad_gathered<T, kBlockN, kBlocks>(p, grid, a_map, shared);
    else
      produce_wgrad_by_tma<T, kBlockN, kBlocks>(p, grid, a_map, b_map, shared);
  } else {
    ptx::raise_registers<kConsumerRegisters>();
    Ring<kBlockN, kBlocks> ring{shared};
    for (int number = blockIdx.x; number < grid.tiles; number += gridDim.x) {
      const WeightTile tile = grid.tile(number, p.order != nullptr);
      const ExpertRows own = expert_rows(p.offs, tile.expert, p.a_rows);
      const int rows = own.end - own.begin;
      const int k_tiles = static_cast<int>(ceil_div(rows, kBlockK));
      float acc[kBlockN / 2] = {};
      consume<T, true, true>(acc, ring, k_tiles, rows - (k_tiles - 1) * kBlockK);
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

// A way to cut a product, into tiles of so many columns for blocks alone or in clusters of two, and what launches it.
template <class Product>
struct Cut {
  int width, blocks;
  cudaError_t (*launch)(const Product& p, int sms, uint64_t stream, bool dependent);
};

// The cut with the least rounds × cost of a round. A tile costs its columns and, for loading A and its epilogue, about
// as much as 80 more; 24 less where the cluster's other block loads half of B, which `paired` of the row tiles gain (all
// predicted, not measured: the first from the machine code, the second from the bytes that L2 delivers). Wide tiles
// read less; narrow ones leave fewer SMs idle in the last round, and with few tokens, when reading the weights is all,
// put every SM to it. In a single round blocks that wait for each other gain nothing. Without `paired` rows there are no
// clusters: the weight gradients' would not be right. What the product asks for is not left to choose; null when there
// is no such cut.
template <class Product, int kCuts>
const Cut<Product>* best_cut(const Cut<Product> (&cuts)[kCuts], const Product& p, int64_t row_tiles, int64_t paired,
                             int sms) {
  const Cut<Product>* best = nullptr;
  int64_t least = INT64_MAX;
  for (const Cut<Product>& cut : cuts) {
    if (sms < cut.blocks || (p.columns && cut.width != p.columns) || (p.cluster && cut.blocks != p.cluster)) continue;
    const int64_t rounds = ceil_div(row_tiles * ceil_div(p.n, cut.width), sms / cut.blocks * cut.blocks);
    if (cut.blocks > 1 && (paired == 0 || (rounds < 2 && !p.cluster))) continue;
    const int64_t cost = rounds * ((cut.width + 80) * row_tiles - (cut.blocks > 1 ? 24 * paired : 0));
    if (cost < least) least = cost, best = &cut;
  }
  return best;
}

template <class Product, int kCuts>
cudaError_t launch_best(const Cut<Product> (&cuts)[kCuts], const Product& p, int64_t row_tiles, int64_t paired, int sms,
                        uint64_t stream, bool dependent) {
  const Cut<Product>* cut = best_cut(cuts, p, row_tiles, paired, sms);
  return cut ? cut->launch(p, sms, stream, dependent) : cudaErrorInvalidValue;
}

// One block an SM, each walking its share of the tiles.
template <class... Parameters, class... Arguments>
cudaError_t launch_tiles(void (*kernel)(Parameters...), int64_t tiles, int cluster, int sms, uint64_t stream,
                         bool dependent, const Arguments&... arguments) {
  if (tiles > kMostTiles) return cudaErrorInvalidConfiguration;
  const int64_t busy = tiles < sms ? tiles : sms;
  const auto blocks = static_cast<unsigned>(busy < cluster ? cluster : busy / cluster * cluster);
  return launch({blocks, kThreads, kSharedBytes, stream, dependent, cluster}, kernel, arguments...);
}

// The map of a matrix of rows, in boxes of 64 columns.
cudaError_t rows_map(CUtensorMap& map, int dtype, const void* base, int64_t rows, int cols, int64_t ld, int box_rows) {
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(ld) * 2, 0};
  return tensor_map(map, dtype, base, 2, {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows), 1}, strides,
                    64, box_rows);
}

template <class T, int kBlockN, int kBlocks>
cudaError_t launch_gemm(const SmopGemm& p, int sms, uint64_t stream, bool dependent) {
  CUtensorMap a_map{}, b_map{}, aux_map{};
  const cuuint64_t inner = p.b_k_major ? p.k : p.n, outer = p.b_k_major ? p.n : p.k;
  const cuuint64_t b_strides[2] = {static_cast<cuuint64_t>(p.ldb) * 2, static_cast<cuuint64_t>(p.stride_b) * 2};
  if (auto e = tensor_map(b_map, p.dtype, p.b, 3, {inner, outer, static_cast<cuuint64_t>(p.experts)}, b_strides,
                          p.b_k_major ? 64 : kBCols<kBlockN>, (p.b_k_major ? kBlockN : kBlockK) / kBlocks))
    return e;
  if (!p.order)
    if (auto e = rows_map(a_map, p.dtype, p.a, p.a_rows, p.k, p.lda, kBlockM)) return e;
  if (p.aux)
    if (auto e = rows_map(aux_map, p.dtype, p.aux, p.rows, p.n, p.n, kBlockM)) return e;
  const int64_t tiles = max_row_tiles(p.rows, p.experts, kBlockM) * ceil_div(p.n, kBlockN);
  const auto kernel =
      p.b_k_major ? grouped_gemm_sm90<T, kBlockN, false, kBlocks> : grouped_gemm_sm90<T, kBlockN, true, kBlocks>;
  return launch_tiles(kernel, tiles, kBlocks, sms, stream, dependent, p, a_map, b_map, aux_map);
}

template <class T, int kBlockN, int kBlocks>
cudaError_t launch_wgrad(const SmopWgrad& p, int sms, uint64_t stream, bool dependent) {
  CUtensorMap a_map{}, b_map{};
  const int64_t row_tiles = ceil_div(p.m, kBlockM), col_tiles = ceil_div(p.n, kBlockN);
  const int64_t tiles = p.experts * row_tiles * col_tiles;
  const WgradGrid grid{static_cast<int>(row_tiles), static_cast<int>(col_tiles), static_cast<int>(tiles)};
  if (p.a_rows > 0) {  // without rows nothing is loaded, and a map cannot be made
    if (auto e = rows_map(a_map, p.dtype, p.a, p.a_rows, p.m, p.lda, p.order ? kBlockK / kBlocks : kBlockK)) return e;
    if (!p.order)
      if (auto e = rows_map(b_map, p.dtype, p.b, p.b_rows, p.n, p.ldb, kBlockK / kBlocks)) return e;
  }
  const auto kernel = grouped_wgrad_sm90<T, kBlockN, kBlocks>;
  return launch_tiles(kernel, tiles, kBlocks, sms, stream, dependent, p, grid, a_map, b_map);
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
  // What even routing gives: every expert has rows, on average half a tile too many, and every second expert an odd
  // number of row tiles.
  const int64_t busy = p.rows < p.experts ? p.rows : p.experts;
  const int64_t even = p.rows / kBlockM + p.experts / 2, row_tiles = even > busy ? even : busy;
  const int64_t paired = row_tiles > busy ? row_tiles - busy / 2 : 0;
  return by_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    static constexpr Cut<SmopGemm> cuts[] = {{256, 1, launch_gemm<T, 256, 1>}, {256, 2, launch_gemm<T, 256, 2>},
                                             {192, 1, launch_gemm<T, 192, 1>}, {192, 2, launch_gemm<T, 192, 2>},
                                             {160, 1, launch_gemm<T, 160, 1>}, {160, 2, launch_gemm<T, 160, 2>},
                                             {128, 1, launch_gemm<T, 128, 1>}, {64, 1, launch_gemm<T, 64, 1>}};
    return launch_best(cuts, p, row_tiles, paired, sms, stream, dependent);
  });
}

cudaError_t launch_wgrad_sm90(const SmopWgrad& p, uint64_t stream, bool dependent) {
  int sms = 0;
  if (auto e = sm_count(sms)) return e;
  const int64_t row_tiles = ceil_div(p.m, kBlockM), rows = p.experts * row_tiles;
  // Blocks of a cluster have both a tile, and rows enough to fill the ring.
  const bool pairs = (p.order ? ceil_div(p.n, 256) : row_tiles) % 2 == 0 &&
                     p.a_rows >= int64_t{kStages<256>} * kBlockK * p.experts;
  return by_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    static constexpr Cut<SmopWgrad> cuts[] = {
        {256, 1, launch_wgrad<T, 256, 1>}, {256, 2, launch_wgrad<T, 256, 2>}, {128, 1, launch_wgrad<T, 128, 1>}};
    return launch_best(cuts, p, rows, pairs ? rows : 0, sms, stream, dependent);
  });
}

}  // namespace smop
