// What the producer warpgroup of pipeline_sm90.cuh does, by where an operand lies:
// - weights: TMA, one 3-D tensor map over (X, N, K) or (X, K, N). The expert is a coordinate, so no map is ever edited.
// - rows as they lie: TMA, 2-D. A tile may run into the next expert's rows; those products are not stored.
// - gathered rows: cp.async by all four producer warps.
// - weight gradients: the same, 64 rows of both operands a stage. A foreign row would be summed, so the consumers clear
//   the rows past the segment (clear_rows).
// - in a cluster the operand that both blocks need: TMA, boxes of half the rows, each block one half for both.
#pragma once
#include <cuda.h>

#include "pipeline_sm90.cuh"
#include "prefetch.cuh"

namespace smop::sm90 {

// The TMA boxes of one stage of the weights, of which a cluster's are half as high.
template <bool kTransB, int kBlockN, int kBlocks>
__device__ __forceinline__ void load_weights(const Ring<kBlockN, kBlocks>& ring, const CUtensorMap& map, int k,
                                             const RowTile& tile) {
  const int n = tile.col_tile * kBlockN;
#pragma unroll
  for (int part = 0; part < kBlocks; ++part) {
    const bool both = kBlocks > 1 && tile.shared;
    if (both && part != cluster_rank<kBlocks>()) continue;
    const auto load = [&](uint32_t dst, int c0, int c1) {
      if (both)
        ptx::tma_load_both(dst, &map, ring.full(), c0, c1, tile.expert);
      else
        ptx::tma_load(dst, &map, ring.full(), c0, c1, tile.expert);
    };
    if constexpr (kTransB) {
      constexpr int kCols = kBCols<kBlockN>, kBytes = kBlockK * kCols * 2;
#pragma unroll
      for (int i = 0; i < kBlockN / kCols; ++i)
        load(ring.b() + i * kBytes + part * (kBytes / kBlocks), n + i * kCols, k + part * (kBlockK / kBlocks));
    } else {
      load(ring.b() + part * (kBBytes<kBlockN> / kBlocks), k, n + part * (kBlockN / kBlocks));
    }
  }
}

template <class T, int kBlockN, bool kTransB, int kBlocks>
__device__ __forceinline__ void produce_by_tma(const SmopGemm& p, const CUtensorMap& a_map, const CUtensorMap& b_map,
                                               const CUtensorMap& aux_map, const Shared& shared,
                                               RowTileScheduler<kBlocks> scheduler) {
  if (threadIdx.x != 0) return;
  Ring<kBlockN, kBlocks> ring{shared};
  RowTile tile;
  for (int number = blockIdx.x / kBlocks; scheduler.find(number, tile, cluster_rank<kBlocks>());
       number += gridDim.x / kBlocks) {
    for (int k = 0; k < p.k; k += kBlockK) {
      ptx::mbarrier_wait(ring.empty(), ring.phase ^ 1);
      ptx::mbarrier_arrive_expect(ring.full(), kABytes + kBBytes<kBlockN>);
      ptx::tma_load(ring.a(), &a_map, ring.full(), k, tile.row);
      load_weights<kTransB>(ring, b_map, k, tile);
      ring.advance();
    }
    if (!p.aux) continue;
    for (int box = 0; box < kAuxBoxes<kBlockN>; box += kAuxBoxesAStage<kBlockN>) {
      const int count = min(kAuxBoxes<kBlockN> - box, kAuxBoxesAStage<kBlockN>);
      ptx::mbarrier_wait(ring.empty(), ring.phase ^ 1);
      ptx::mbarrier_arrive_expect(ring.full(), count * kABytes);
      for (int i = 0; i < count; ++i)
        ptx::tma_load(ring.a() + i * kABytes, &aux_map, ring.full(), tile.col_tile * kBlockN + (box + i) * 64,
                      tile.row);
      ring.advance();
    }
  }
  ring.outlast_cluster();
}

// What a tile of an expert's first rows brings into the L2 of `ahead`: a piece with each stage of its own loads.
struct Ahead {
  const char* from = nullptr;
  int left = 0, piece = 0;

  __device__ __forceinline__ void start(const SmopGemm& p, const RowTile& tile, int64_t col_tiles) {
    if (tile.rows <= 0 || !first_of_expert(p, tile)) return;
    const Part part = part_of(p.ahead.bytes, static_cast<int>(col_tiles), tile.col_tile);
    from = expert_ahead(p.ahead, tile.expert) + part.at;
    left = part.bytes;
    piece = part_of(left, static_cast<int>(ceil_div(p.k, kBlockK)), 0).bytes;
  }
  __device__ __forceinline__ void step() {
    if (left <= 0) return;
    const int bytes = min(piece, left);
    ptx::prefetch_l2(from, bytes);
    from += bytes, left -= bytes;
  }
};

template <class T, int kBlockN, bool kTransB, int kBlocks>
__device__ __forceinline__ void produce_gathered(const SmopGemm& p, const CUtensorMap& b_map, const Shared& shared,
                                                 RowTileScheduler<kBlocks> scheduler) {
  constexpr int kRows = kBlockM / (kGroup / 8);  // 8 threads copy the 128 bytes of a row
  const int chunk = threadIdx.x % 8, first = threadIdx.x / 8;
  const int64_t lda = p.lda;
  Ring<kBlockN, kBlocks> ring{shared};
  Announcer<kBlockN, kBlocks> announcer{{shared}};
  RowTile tile;
  for (int number = blockIdx.x / kBlocks; scheduler.find(number, tile, cluster_rank<kBlocks>());
       number += gridDim.x / kBlocks) {
    // A row that does not exist has an address too, of which nothing is read.
    const T* from[kRows];
    uint32_t exists = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first + i * (kGroup / 8);
      const bool inside = row < tile.rows;
      const int token = inside ? existing(p.order[tile.row + row] / p.top_k, p.a_rows) : 0;
      from[i] = static_cast<const T*>(p.a) + chunk * 8 + token * lda;
      exists |= inside << i;
    }
    Ahead ahead;
    if (p.ahead.from && threadIdx.x == 0) ahead.start(p, tile, ceil_div(p.n, kBlockN));
    for (int k = 0; k < p.k; k += kBlockK) {
      ptx::mbarrier_wait(ring.empty(), ring.phase ^ 1);
      if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(ring.full(), kBBytes<kBlockN>);
        load_weights<kTransB>(ring, b_map, k, tile);
        ahead.step();
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
  ring.outlast_cluster();
}

// The tiles of a weight gradient, counted on the host: as kernel arguments they cost the roles no registers.
struct WgradGrid {
  int row_tiles, col_tiles, tiles;

  // Blocks of a cluster share what comes by TMA: one column tile of B, or, where B is gathered, one row tile of A.
  __device__ __forceinline__ WeightTile tile(int number, bool gathered) const {
    if (!gathered) return weight_tile(number, row_tiles, col_tiles);
    const WeightTile across = weight_tile(number, col_tiles, row_tiles);
    return {across.expert, across.col_tile, across.row_tile};
  }
};

// The TMA boxes of 64 rows × 64·kBoxes columns; where kBlocks share them, this block's rows for both.
template <int kBoxes, int kBlocks>
__device__ __forceinline__ void load_rows(uint32_t dst, const CUtensorMap& map, uint32_t barrier, int col, int row) {
  const int part = cluster_rank<kBlocks>();
#pragma unroll
  for (int i = 0; i < kBoxes; ++i) {
    if constexpr (kBlocks == 1)
      ptx::tma_load(dst + i * kBlockBytes, &map, barrier, col + i * 64, row);
    else
      ptx::tma_load_both(dst + i * kBlockBytes + part * (kBlockBytes / kBlocks), &map, barrier, col + i * 64,
                         row + part * (kBlockK / kBlocks));
  }
}

template <class T, int kBlockN, int kBlocks>
__device__ __forceinline__ void produce_wgrad_by_tma(const SmopWgrad& p, const WgradGrid& grid,
                                                     const CUtensorMap& a_map, const CUtensorMap& b_map,
                                                     const Shared& shared) {
  if (threadIdx.x != 0) return;
  Ring<kBlockN, kBlocks> ring{shared};
  for (int number = blockIdx.x; number < grid.tiles; number += gridDim.x) {
    const WeightTile tile = grid.tile(number, false);
    const ExpertRows own = expert_rows(p.offs, tile.expert, p.a_rows);
    for (int k = own.begin; k < own.end; k += kBlockK) {
      ptx::mbarrier_wait(ring.empty(), ring.phase ^ 1);
      ptx::mbarrier_arrive_expect(ring.full(), kABytes + kBBytes<kBlockN>);
      load_rows<kBlockM / 64, 1>(ring.a(), a_map, ring.full(), tile.row_tile * kBlockM, k);
      load_rows<kBlockN / 64, kBlocks>(ring.b(), b_map, ring.full(), tile.col_tile * kBlockN, k);
      ring.advance();
    }
  }
  ring.outlast_cluster();
}

template <class T, int kBlockN, int kBlocks>
__device__ __forceinline__ void produce_wgrad_gathered(const SmopWgrad& p, const WgradGrid& grid,
                                                       const CUtensorMap& a_map, const Shared& shared) {
  constexpr int kRowChunks = kBlockN / 8, kStep = kGroup / kRowChunks;  // kRowChunks threads copy a row of the stage
  constexpr int kPeriod = 8 / kStep;                                    // copies until the swizzle is the same again
  const int lane = threadIdx.x % kWarp, chunk = threadIdx.x % kRowChunks, first = threadIdx.x / kRowChunks;
  const uint32_t row_bytes = static_cast<uint32_t>(p.ldb) * 2;
  uint32_t offset[kPeriod];
#pragma unroll
  for (int i = 0; i < kPeriod; ++i)
    offset[i] = chunk / 8 * kBlockBytes + ptx::swizzled(first + i * kStep, chunk % 8);
  Ring<kBlockN, kBlocks> ring{shared};
  Announcer<kBlockN, kBlocks> announcer{{shared}};
  for (int number = blockIdx.x; number < grid.tiles; number += gridDim.x) {
    const WeightTile tile = grid.tile(number, true);
    const ExpertRows own = expert_rows(p.offs, tile.expert, p.a_rows);
    // Columns that do not exist are filled with the last ones: what becomes of them is not stored.
    const int col = min(tile.col_tile * kBlockN + chunk * 8, p.n - 8);
    const char* columns = reinterpret_cast<const char*>(static_cast<const T*>(p.b) + col);
    // Lane l knows the gathered rows l and l + 32 of the stage; they are fetched one stage ahead. Past the segment row
    // 0 stands in, whose values are cleared with the rest.
    const auto gathered = [&](int row) -> uint32_t {
      const uint32_t choice = row < own.end ? p.order[row] : 0;
      return existing(choice / static_cast<uint32_t>(p.top_k), p.b_rows);
    };
    uint32_t low = gathered(own.begin + lane), high = gathered(own.begin + lane + kWarp);
    for (int k = own.begin; k < own.end; k += kBlockK) {
      ptx::mbarrier_wait(ring.empty(), ring.phase ^ 1);
      if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(ring.full(), kABytes);
        load_rows<kBlockM / 64, kBlocks>(ring.a(), a_map, ring.full(), tile.row_tile * kBlockM, k);
      }
#pragma unroll
      for (int i = 0; i < kBlockK / kStep; ++i) {
        const uint32_t row = __shfl_sync(kFullWarp, i * kStep < kWarp ? low : high, first + i * kStep % kWarp);
        ptx::cp_async16(ring.b() + offset[i % kPeriod] + i / kPeriod * ptx::kSwizzleGroup,
                        columns + static_cast<uint64_t>(row) * row_bytes);
      }
      announcer.issued();
      ring.advance();
      low = gathered(k + kBlockK + lane), high = gathered(k + kBlockK + lane + kWarp);
    }
  }
  announcer.drain();
  ring.outlast_cluster();
}

}  // namespace smop::sm90
