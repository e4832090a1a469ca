// Grouped GEMMs with cp.async, ldmatrix and mma.sync: sm_80 and later, any shape and any alignment.
//
// A block of 8 warps (2 × 4) computes one 128×128 tile; each warp 64×32 of it. The operands pass through a ring of
// kStages shared-memory stages of depth kBlockK. A tile in shared memory is ROWS × COLS elements in the layout it has
// in global memory, its 16-byte chunks exchanged within a row so that the 8 rows an ldmatrix reads lie in different
// banks; an operand whose memory layout has the wrong unit stride for mma.sync is transposed by ldmatrix.trans on the
// way to registers.
#include "epilogue.cuh"
#include "gemm.cuh"
#include "prefetch.cuh"

namespace smop {
namespace {

constexpr int kBlockM = kTileRows, kBlockN = 128, kBlockK = 32, kStages = 4, kThreads = 256;
constexpr int kWarpM = 64, kWarpN = 32;
constexpr int kTileElements = 128 * kBlockK;  // of either operand
constexpr int kSharedBytes = kStages * 2 * kTileElements * 2;
static_assert(kBlockM == kBlockN, "the operands share their tile's size");
static_assert(kThreads / kWarp * kStageBytes <= kSharedBytes, "the epilogue stages in the ring");

// Element offset of 16-byte chunk `chunk` of row `row` in a tile of kCols columns.
template <int kCols>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  if constexpr (kCols == kBlockK)  // 64-byte rows: two of them span the 32 banks
    return row * kCols + (chunk ^ (row / 2 % 4)) * 8;
  else
    return row * kCols + (chunk ^ (row % 8)) * 8;
}

// One chunk of a tile: 8 elements of which `valid` are read. Unaligned memory goes element by element, without
// cp.async; the barrier that publishes the stage serves both.
template <class T>
__device__ __forceinline__ void load_chunk(T* dst, const T* src, int valid) {
  if (aligned16(src)) {
    ptx::cp_async16(ptx::shared_address(dst), src, 2 * max(0, min(valid, 8)));
  } else {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) dst[i] = i < valid ? src[i] : from_float<T>(0.f);
  }
}

// Loads tiles of 128 rows × kBlockK columns: the rows stay, the columns advance with k. Rows may be gathered.
template <class T>
class RowsLoader {
 public:
  static constexpr bool kTransposed = false;  // k is the unit stride, as mma.sync has it

  // `row_of(i)` is the memory row of tile row i < rows.
  template <class RowOf>
  __device__ RowsLoader(const T* base, int64_t ld, int rows, int k, RowOf row_of) : base_(base), k_(k) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int row = threadIdx.x / kRowChunks + i * (kThreads / kRowChunks);
      offset_[i] = row < rows ? row_of(row) * ld : -1;
    }
  }

  __device__ void load(T* tile, int k_tile) const {
    const int chunk = threadIdx.x % kRowChunks;
    const int col = k_tile * kBlockK + chunk * 8;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int row = threadIdx.x / kRowChunks + i * (kThreads / kRowChunks);
      const bool exists = offset_[i] >= 0 && col < k_;
      load_chunk(tile + tile_offset<kBlockK>(row, chunk), exists ? base_ + offset_[i] + col : base_,
                 exists ? k_ - col : 0);
    }
  }

 private:
  static constexpr int kRowChunks = kBlockK / 8, kChunks = kTileElements / 8 / kThreads;
  const T* base_;
  int64_t offset_[kChunks];
  int k_;
};

// Loads tiles of kBlockK rows × 128 columns: the columns stay, the rows advance with k. Rows may be gathered: then the
// index of the next tile's rows is fetched one tile ahead.
template <class T, class RowOf>
class ColsLoader {
 public:
  static constexpr bool kTransposed = true;

  __device__ ColsLoader(const T* base, int64_t ld, int first_col, int cols, int k, RowOf row_of)
      : base_(base), ld_(ld), valid_(cols - first_col - threadIdx.x % kRowChunks * 8), k_(k), row_of_(row_of) {
    first_col_ = first_col + threadIdx.x % kRowChunks * 8;
    fetch_rows(0);
  }

  __device__ void load(T* tile, int k_tile) {
    const int chunk = threadIdx.x % kRowChunks;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int row = threadIdx.x / kRowChunks + i * (kThreads / kRowChunks);
      const bool exists = next_[i] >= 0 && valid_ > 0;
      load_chunk(tile + tile_offset<128>(row, chunk),
                 exists ? base_ + static_cast<int64_t>(next_[i]) * ld_ + first_col_ : base_, exists ? valid_ : 0);
    }
    fetch_rows(k_tile + 1);
  }

 private:
  __device__ void fetch_rows(int k_tile) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int row = k_tile * kBlockK + threadIdx.x / kRowChunks + i * (kThreads / kRowChunks);
      next_[i] = row < k_ ? row_of_(row) : -1;
    }
  }

  static constexpr int kRowChunks = 128 / 8, kChunks = kTileElements / 8 / kThreads;
  const T* base_;
  int64_t ld_;
  int valid_, first_col_, k_;
  RowOf row_of_;
  int next_[kChunks];
};

// acc += A · B over all k tiles.
template <class T, class A, class B>
__device__ __forceinline__ void mainloop(float (&acc)[4][16], T* ring, A& a, B& b, int k_tiles) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_m = warp / 4 * kWarpM, warp_n = warp % 4 * kWarpN;
  const auto a_tile = [&](int stage) { return ring + stage * 2 * kTileElements; };
  const auto b_tile = [&](int stage) { return ring + stage * 2 * kTileElements + kTileElements; };

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < k_tiles) a.load(a_tile(s), s), b.load(b_tile(s), s);
    ptx::cp_async_commit();
  }
#pragma unroll 1
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is complete, and the one loaded next is no longer read
    const int ahead = k_tile + kStages - 1;
    if (ahead < k_tiles) a.load(a_tile(ahead % kStages), ahead), b.load(b_tile(ahead % kStages), ahead);
    ptx::cp_async_commit();

    const T* a_smem = a_tile(k_tile % kStages);
    const T* b_smem = b_tile(k_tile % kStages);
#pragma unroll
    for (int k = 0; k < kBlockK; k += 16) {
      uint32_t a_frag[4][4], b_frag[2][4];
      // Lane l addresses row l % 8 of matrix l / 8. A's four matrices are (m, k), (m + 8, k), (m, k + 8), (m + 8, k +
      // 8).
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = warp_m + i * 16;
        if constexpr (A::kTransposed)
          ptx::ldmatrix_x4_trans(a_frag[i], ptx::shared_address(a_smem + tile_offset<128>(k + lane / 16 * 8 + lane % 8,
                                                                                          m / 8 + lane / 8 % 2)));
        else
          ptx::ldmatrix_x4(a_frag[i],
                           ptx::shared_address(a_smem + tile_offset<kBlockK>(m + lane % 16, k / 8 + lane / 16)));
      }
      // B's are (k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8).
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int n = warp_n + j * 16;
        if constexpr (B::kTransposed)
          ptx::ldmatrix_x4_trans(b_frag[j],
                                 ptx::shared_address(b_smem + tile_offset<128>(k + lane % 16, n / 8 + lane / 16)));
        else
          ptx::ldmatrix_x4(b_frag[j], ptx::shared_address(b_smem + tile_offset<kBlockK>(n + lane / 16 * 8 + lane % 8,
                                                                                        k / 8 + lane / 8 % 2)));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float (&d)[4] = *reinterpret_cast<float (*)[4]>(&acc[i][4 * j]);
          ptx::mma_m16n8k16<T>(d, a_frag[i], b_frag[j / 2][j % 2 * 2], b_frag[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the ring is free for the epilogue
}

template <class T>
__device__ __forceinline__ void store_tile(const Epilogue<T>& to, const float (&acc)[4][16], T* ring, int first_col) {
  const int warp = threadIdx.x / kWarp, warp_m = warp / 4 * kWarpM, warp_n = warp % 4 * kWarpN;
  const uint32_t stage = ptx::shared_address(ring) + warp * kStageBytes;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float sums[1] = {};
    store_piece<kWarpN>(to, acc[i], 0, stage, warp_m + i * 16, first_col + warp_n, FromMemory<T>{}, sums);
    sum += sums[0];
  }
  static_assert(kWarpM == kSumRows && kWarpN == 32, "a warp's pieces are the rows of one column sum");
  const int col = first_col + warp_n + kept_column<kWarpN>();
  if (to.sums && col < to.n) to.sums[static_cast<int64_t>(warp_m / kSumRows) * padded(to.n) + col] = sum;
}

struct SameRow {
  __device__ int operator()(int row) const { return row; }
};

// The row of x behind a row in expert order.
struct TokenRow {
  const int32_t* order;
  int top_k, first;
  int64_t rows;  // of x
  __device__ int operator()(int row) const {
    return order ? existing(order[first + row] / top_k, rows) : first + row;
  }
};

template <class T, bool kBTransposed>
__global__ __launch_bounds__(kThreads, 2) void grouped_gemm_sm80(const SmopGemm p) {
  extern __shared__ __align__(128) unsigned char shared[];
  begin_kernel();
  T* ring = reinterpret_cast<T*>(shared);
  RowTile tile;
  RowTileScheduler scheduler(p.offs, p.experts, p.rows, kBlockM, static_cast<int>(ceil_div(p.n, kBlockN)));
  if (!scheduler.find(blockIdx.x, tile)) return;

  if (p.ahead.from && first_of_expert(p, tile)) {
    const Part part = part_of(p.ahead.bytes, static_cast<int>(ceil_div(p.n, kBlockN)) * kThreads,
                              tile.col_tile * kThreads + threadIdx.x);
    ptx::prefetch_l2(expert_ahead(p.ahead, tile.expert) + part.at, part.bytes);
  }
  const int n0 = tile.col_tile * kBlockN;
  const T* b = static_cast<const T*>(p.b) + tile.expert * p.stride_b;
  float acc[4][16] = {};
  RowsLoader<T> a_loader(static_cast<const T*>(p.a), p.lda, tile.rows, p.k, TokenRow{p.order, p.top_k, tile.row, p.a_rows});
  const int k_tiles = static_cast<int>(ceil_div(p.k, kBlockK));
  if constexpr (kBTransposed) {
    ColsLoader<T, SameRow> b_loader(b, p.ldb, n0, p.n, p.k, SameRow{});
    mainloop<T>(acc, ring, a_loader, b_loader, k_tiles);
  } else {
    RowsLoader<T> b_loader(b + n0 * p.ldb, p.ldb, p.n - n0, p.k, SameRow{});
    mainloop<T>(acc, ring, a_loader, b_loader, k_tiles);
  }
  store_tile(gemm_epilogue<T>(p, tile), acc, ring, n0);
}

template <class T>
__global__ __launch_bounds__(kThreads, 2) void grouped_wgrad_sm80(const SmopWgrad p) {
  extern __shared__ __align__(128) unsigned char shared[];
  begin_kernel();
  T* ring = reinterpret_cast<T*>(shared);
  const WeightTile tile =
      weight_tile(blockIdx.x, static_cast<int>(ceil_div(p.m, kBlockM)), static_cast<int>(ceil_div(p.n, kBlockN)));
  const ExpertRows own = expert_rows(p.offs, tile.expert, p.a_rows);
  const int rows = own.end - own.begin;
  const int m0 = tile.row_tile * kBlockM, n0 = tile.col_tile * kBlockN;

  float acc[4][16] = {};
  ColsLoader<T, TokenRow> a_loader(static_cast<const T*>(p.a), p.lda, m0, p.m, rows, TokenRow{nullptr, 1, own.begin, p.a_rows});
  ColsLoader<T, TokenRow> b_loader(static_cast<const T*>(p.b), p.ldb, n0, p.n, rows,
                                   TokenRow{p.order, p.top_k, own.begin, p.b_rows});
  mainloop<T>(acc, ring, a_loader, b_loader, static_cast<int>(ceil_div(rows, kBlockK)));
  store_tile(wgrad_epilogue<T>(p, tile.expert, m0, kBlockM), acc, ring, n0);
}

template <class Args>
cudaError_t launch_tiles(void (*kernel)(Args), const Args& args, int64_t tiles, uint64_t stream, bool dependent) {
  if (tiles == 0) return cudaSuccess;
  if (tiles > kMostTiles) return cudaErrorInvalidConfiguration;
  return launch({static_cast<unsigned>(tiles), kThreads, kSharedBytes, stream, dependent}, kernel, args);
}

}  // namespace

cudaError_t launch_gemm_sm80(const SmopGemm& args, uint64_t stream, bool dependent) {
  const int64_t tiles = max_row_tiles(args.rows, args.experts, kBlockM) * ceil_div(args.n, kBlockN);
  return by_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    return launch_tiles(args.b_k_major ? grouped_gemm_sm80<T, false> : grouped_gemm_sm80<T, true>, args, tiles, stream,
                        dependent);
  });
}

cudaError_t launch_wgrad_sm80(const SmopWgrad& args, uint64_t stream, bool dependent) {
  const int64_t tiles = args.experts * ceil_div(args.m, kBlockM) * ceil_div(args.n, kBlockN);
  return by_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    return launch_tiles(grouped_wgrad_sm80<T>, args, tiles, stream, dependent);
  });
}

}  // namespace smop
