// Which output tile a block computes. Host and device: the tests drive these very functions from Python.
//
// Segments are not padded, so the number of row tiles depends on the routing, which only the device knows. Launches are
// sized by the worst case (max_row_tiles) and every block walks the cumulative ends `offs` to its tile; a block finds
// none beyond the last and leaves. That walk is at most X steps, and a persistent block continues it where it stopped.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define SMOP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SMOP_HOST_DEVICE inline
#endif

namespace smop {

SMOP_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles are numbered by ints, which leave room for a step of a whole grid beyond the last.
constexpr int64_t kMostTiles = INT32_MAX - (1 << 20);

// The end of an expert's rows, which start at `begin`: what `offs` says, as far as it rises and such rows exist. A
// caller's `offs` can be anything, and the host does not read it.
SMOP_HOST_DEVICE int rows_end(int begin, int said, int rows) {
  const int existing = said < rows ? said : rows;
  return existing > begin ? existing : begin;
}

// What a caller's `order` names, or an expert's id, of `count` that exist: like `offs` they can be anything.
SMOP_HOST_DEVICE int existing(int index, int64_t count) {
  const auto last = static_cast<unsigned>(count - 1);
  return static_cast<int>(static_cast<unsigned>(index) < last ? static_cast<unsigned>(index) : last);
}

struct ExpertRows {
  int begin, end;
};

SMOP_HOST_DEVICE ExpertRows expert_rows(const int32_t* offs, int expert, int64_t rows) {
  const int begin = expert > 0 ? rows_end(0, offs[expert - 1], static_cast<int>(rows)) : 0;
  return {begin, rows_end(begin, offs[expert], static_cast<int>(rows))};
}

// Row tiles of an expert's rows begin … end.
SMOP_HOST_DEVICE int row_tiles_of(int begin, int end, int block) {
  return static_cast<int>((static_cast<unsigned>(end - begin) + block - 1) / static_cast<unsigned>(block));
}

// Σ_e ceil(n_e / block) never exceeds this, whatever the routing.
SMOP_HOST_DEVICE int64_t max_row_tiles(int64_t rows, int experts, int block) {
  return rows / block + (rows < experts ? rows : experts);
}

struct RowTile {
  int expert;
  int row;       // the first row
  int rows;      // how many of the tile's rows belong to the expert: 1 … block; 0: there is nothing to compute
  int col_tile;  // index of the column tile
  int index;     // number of row tiles before this one (its place in per-tile scratch)
  bool shared;   // the cluster's other blocks have the same expert and columns
};

// Tiles of (rows of one expert) × (columns), in groups of kGroupRows row tiles and all columns, row tiles fastest:
// blocks that run together share the weights' tiles, and what they read of both operands fits the L2.
//
// A cluster of two blocks takes two tiles at a time, one each by `rank`: two row tiles of the same columns, so that
// both need the same weights. The last of an odd number of row tiles goes by two column tiles instead; where their
// number is odd too, the second block of the last pair has columns that do not exist, and no rows.
template <int kBlocks = 1>
class RowTileScheduler {
  static_assert(kBlocks == 1 || kBlocks == 2);

 public:
  SMOP_HOST_DEVICE RowTileScheduler(const int32_t* offs, int experts, int64_t rows, int block, int col_tiles)
      : offs_(offs),
        experts_(experts),
        rows_(static_cast<int>(rows)),
        block_(block),
        col_tiles_(col_tiles),
        end_(experts > 0 ? rows_end(0, offs[0], rows_) : 0) {}

  // The tile (of a cluster: the pair of tiles) with this number, or false when there are fewer. Numbers must not fall
  // from call to call.
  SMOP_HOST_DEVICE bool find(int number, RowTile& tile, int rank = 0) {
    while (expert_ < experts_) {
      const int left = row_tiles_of(row_, end_, block_);
      const int height = left < kGroupRows ? left : kGroupRows;  // row tiles of the group
      const int runs = height / kBlocks, shared = runs * col_tiles_;
      const int all = shared + height % kBlocks * (col_tiles_ + 1) / 2;
      const int inside = number - tiles_before_;
      if (inside < all) {
        int row_tile = height - 1;
        tile.shared = kBlocks > 1 && inside < shared;
        if (inside < shared) {
          tile.col_tile = height == kGroupRows ? inside / (kGroupRows / kBlocks) : inside / runs;
          row_tile = (inside - tile.col_tile * runs) * kBlocks + rank;
        } else {
          tile.col_tile = (inside - shared) * kBlocks + rank;
        }
        tile.expert = expert_;
        tile.row = row_ + row_tile * block_;
        tile.rows = end_ - tile.row < block_ ? end_ - tile.row : block_;
        if (kBlocks > 1 && tile.col_tile >= col_tiles_) tile.rows = 0;
        tile.index = row_tiles_before_ + row_tile;
        return true;
      }
      tiles_before_ += all;
      row_tiles_before_ += height;
      if (left > kGroupRows) {
        row_ += kGroupRows * block_;
      } else {
        row_ = end_;
        if (++expert_ < experts_) end_ = rows_end(row_, offs_[expert_], rows_);
      }
    }
    return false;
  }

 private:
  static constexpr int kGroupRows = 16;
  const int32_t* offs_;
  int experts_, rows_, block_, col_tiles_;
  int expert_ = 0, row_ = 0, end_;               // of the group: its expert, first row, the expert's last
  int tiles_before_ = 0, row_tiles_before_ = 0;  // before the group
};

// An expert's part of per-tile scratch: the row tiles before its own, and its own.
struct RowTiles {
  int before, own;
};

SMOP_HOST_DEVICE RowTiles expert_row_tiles(const int32_t* offs, int expert, int rows, int block) {
  RowTiles tiles = {0, 0};
  for (int e = 0, begin = 0; e <= expert; ++e) {
    const int end = rows_end(begin, offs[e], rows);
    tiles = {tiles.before + tiles.own, row_tiles_of(begin, end, block)};
    begin = end;
  }
  return tiles;
}

// Tiles of the stacked weight gradients (X, m, n): their number does not depend on the routing.
struct WeightTile {
  int expert, row_tile, col_tile;
};

SMOP_HOST_DEVICE WeightTile weight_tile(int number, int row_tiles, int col_tiles) {
  const int per_expert = row_tiles * col_tiles, inside = number % per_expert;
  return {number / per_expert, inside % row_tiles, inside / row_tiles};
}

}  // namespace smop
