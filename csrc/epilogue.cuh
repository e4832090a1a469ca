// From accumulators to rows in memory: bias, activation or its derivative, predicated 16-byte stores. Both GEMM
// families use it, because mma.sync and wgmma leave a warp the same fragment: of an 8-column block, lane l holds
// columns 2(l%4), +1 of rows l/4 and l/4 + 8. Everything is computed on that fragment. A lane has 4 bytes of a row in
// it, too few to store at once: results go through shared memory as matrices of 8 × 8 elements (stmatrix), and saved
// activations come the same way (ldmatrix).
#pragma once
#include "ptx.cuh"

namespace smop {

constexpr int kPieceRows = 16;
constexpr int kStageBytes = kPieceRows * ptx::kSwizzleRow;  // a warp's share of shared memory: rows of up to 64 columns

template <class T>
struct Epilogue {
  T* out;         // the tile's first row
  T* pre;         // likewise, or null
  const T* aux;   // likewise, or null
  const T* bias;  // of the expert, or null
  int64_t ld;     // of out, pre and aux
  int n;          // columns that exist
  int rows;       // rows of the tile that exist
  int kind;       // SmopEpilogue
  float* sums;    // or null: column sums of the tile's first kSumRows rows; those of the next follow padded(n) on
};
constexpr int kSumRows = 64;  // rows of a column sum: what a warpgroup, or a warp of the sm_80 family, has of a tile

// A piece is 16 rows × kCols columns of a warp's accumulators: v[4j + i] is element i of its column block j.
template <int kCols>
using Piece = float[kCols / 2];

// Of two lanes so far apart, the one keeps the first kHalf of their 2·kHalf values, the other the second, of both added.
template <int kHalf, int N>
__device__ __forceinline__ void add_halves(float (&held)[N], int distance) {
  const bool second = threadIdx.x & distance;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float other = __shfl_xor_sync(kFullWarp, second ? held[i] : held[i + kHalf], distance);
    held[i] = (second ? held[i + kHalf] : held[i]) + other;
  }
}

// Column sums of a piece, of the `rows` that exist. Each lane returns kCols / 32 columns, from kept_column<kCols>() on:
// every exchange between lanes halves what one still holds.
template <int kCols>
__device__ __forceinline__ void sum_over_rows(Piece<kCols>& v, int rows, float (&sums)[kCols / 32]) {
  if (rows < kPieceRows) {
    const int first = threadIdx.x % kWarp / 4;  // of the lane's two rows
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i)
      if (first + i / 2 % 2 * 8 >= rows) v[i] = 0.f;
  }
  float held[kCols / 4];
#pragma unroll
  for (int i = 0; i < kCols / 4; ++i) held[i] = v[i / 2 * 4 + i % 2] + v[i / 2 * 4 + i % 2 + 2];
  add_halves<kCols / 8>(held, 16);
  add_halves<kCols / 16>(held, 8);
  add_halves<kCols / 32>(held, 4);
#pragma unroll
  for (int i = 0; i < kCols / 32; ++i) sums[i] = held[i];
}

// The first column of a piece whose sums a lane holds.
template <int kCols>
__device__ __forceinline__ int kept_column() {
  const int lane = threadIdx.x % kWarp;
  const int index = (lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2) * (kCols / 32);
  return index / 2 * 8 + lane % 4 * 2 + index % 2;
}

// The activation, or the derivative, at x.
__device__ __forceinline__ float transcendental(int kind, float x) {
  if (kind == SMOP_GELU || kind == SMOP_GELU_GRAD) {
    const float cdf = 0.5f * (1.f + erff(x * 0.707106781f));
    return kind == SMOP_GELU ? x * cdf : cdf + x * 0.398942280f * expf(-0.5f * x * x);
  }
  const float s = 1.f / (1.f + expf(-x));
  return kind == SMOP_SILU ? x * s : s * (1.f + x * (1.f - s));
}

// The same of each of a piece's values. erf and exp, inlined once for each, would be most of a kernel's code: they work
// in place on a lane's floats in the stage, in a loop that stays a loop, 32 columns at a time.
template <int kCols>
__device__ __forceinline__ void transcendental(int kind, Piece<kCols>& v, uint32_t stage) {
  float* mine = static_cast<float*>(__cvta_shared_to_generic(stage)) + threadIdx.x % kWarp;
  __syncwarp();  // what was staged before has been read
#pragma unroll
  for (int first = 0; first < kCols / 2; first += 16) {
#pragma unroll
    for (int i = 0; i < 16; ++i) mine[i * kWarp] = v[first + i];
#pragma unroll 1
    for (int i = 0; i < 16; ++i) mine[i * kWarp] = transcendental(kind, mine[i * kWarp]);
#pragma unroll
    for (int i = 0; i < 16; ++i) v[first + i] = mine[i * kWarp];
  }
}

// How a warp moves a piece between the stage and memory: 16 bytes a lane, kRows rows at once.
template <int kCols>
struct Chunks {
  static constexpr int kRows = kWarp * 8 / kCols;
  int row, chunk;     // the lane's first
  uint32_t stage;
  int64_t at;         // in the tile, in elements
  int rows, columns;  // that exist, from there on
  bool whole;         // 16 bytes at once: all columns exist, and addresses are aligned

  template <class T>
  __device__ __forceinline__ Chunks(const Epilogue<T>& to, const T* tile, uint32_t stage, int first_row, int first_col)
      : row(threadIdx.x % kWarp / (kCols / 8)), chunk(threadIdx.x % (kCols / 8)), stage(stage) {
    const int col = first_col + chunk * 8;
    at = static_cast<int64_t>(first_row + row) * to.ld + col;
    rows = to.rows - first_row - row, columns = to.n - col;
    whole = columns >= 8 && to.ld % 8 == 0 && aligned16(tile + at);
  }
  // Of the row r rows on: its place in the stage.
  __device__ __forceinline__ uint32_t staged(int r) const { return stage + ptx::swizzled(row + r, chunk); }
};

// Rounds a piece and stores it. `out` is the tile's; `row` the piece's first row within the tile, `col` its first
// column in the matrix.
template <int kCols, class T>
__device__ __forceinline__ void write_piece(const Epilogue<T>& to, T* out, const Piece<kCols>& v, uint32_t stage,
                                            int row, int col) {
  __syncwarp();  // what was staged before has been read
#pragma unroll
  for (int j = 0; j < kCols / 16; ++j) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) packed[i] = pack<T>(v[8 * j + 2 * i], v[8 * j + 2 * i + 1]);
    ptx::store_matrices(stage, 2 * j, packed);
  }
  __syncwarp();
  const Chunks<kCols> mine(to, out, stage, row, col);
  T* at = out + mine.at;
  if (mine.whole) {
#pragma unroll
    for (int r = 0; r < kPieceRows; r += mine.kRows, at += mine.kRows * to.ld) {
      const uint4 bits = ptx::load_shared16(mine.staged(r));
      if (r < mine.rows) *reinterpret_cast<uint4*>(at) = bits;
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < min(mine.rows, kPieceRows); r += mine.kRows, at += mine.kRows * to.ld)
#pragma unroll 1
      for (int i = 0; i < min(mine.columns, 8); ++i) at[i] = ptx::load_shared2<T>(mine.staged(r) + 2 * i);
  }
}

// What an epilogue adds or multiplies with, straight from memory.
template <class T>
struct FromMemory {
  __device__ __forceinline__ float2 bias(const Epilogue<T>& to, int col) const {
    return {col < to.n ? to_float(to.bias[col]) : 0.f, col + 1 < to.n ? to_float(to.bias[col + 1]) : 0.f};
  }
  // Where in shared memory a piece of the saved activations lies, in rows of 128 bytes.
  template <int kCols>
  __device__ __forceinline__ uint32_t aux(const Epilogue<T>& to, uint32_t stage, int row, int col) const {
    const Chunks<kCols> mine(to, to.aux, stage, row, col);
    const T* at = to.aux + mine.at;
    __syncwarp();  // what was staged before has been read
    if (mine.whole) {
#pragma unroll
      for (int r = 0; r < kPieceRows; r += mine.kRows, at += mine.kRows * to.ld)
        if (r < mine.rows) ptx::store_shared16(mine.staged(r), *reinterpret_cast<const uint4*>(at));
    } else {
#pragma unroll 1
      for (int r = 0; r < min(mine.rows, kPieceRows); r += mine.kRows, at += mine.kRows * to.ld)
#pragma unroll 1
        for (int i = 0; i < min(mine.columns, 8); ++i) ptx::store_shared2(mine.staged(r) + 2 * i, at[i]);
    }
    __syncwarp();
    return stage;
  }
};

// A piece of a tile's result: acc[base …] plus bias, through the activation or times its derivative, stored. The stage
// is the warp's own, of kStageBytes. `base` must be a constant once inlined. `sums` are set where column sums are wanted.
template <int kCols, class T, int N, class From>
__device__ __forceinline__ void store_piece(const Epilogue<T>& to, const float (&acc)[N], int base, uint32_t stage,
                                            int row, int col, const From& from, float (&sums)[kCols / 32]) {
  Piece<kCols> v;
#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) v[i] = acc[base + i];
  if (to.bias) {
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      const float2 bias = from.bias(to, col + j * 8 + threadIdx.x % 4 * 2);
      v[4 * j] += bias.x, v[4 * j + 1] += bias.y, v[4 * j + 2] += bias.x, v[4 * j + 3] += bias.y;
    }
  }
  if (to.pre) write_piece<kCols>(to, to.pre, v, stage, row, col);
  if (to.kind == SMOP_RELU) {
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) v[i] = ptx::max_or_nan(v[i], 0.f);
  } else if (to.kind >= SMOP_RELU_GRAD) {
    const uint32_t box = from.template aux<kCols>(to, stage, row, col);
    Piece<kCols> saved;
#pragma unroll
    for (int j = 0; j < kCols / 16; ++j) {
      uint32_t packed[4];
      ptx::load_matrices(packed, box, 2 * j);
#pragma unroll
      for (int i = 0; i < 4; ++i) unpack<T>(packed[i], saved[8 * j + 2 * i], saved[8 * j + 2 * i + 1]);
    }
    if (to.kind == SMOP_RELU_GRAD) {
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) v[i] = saved[i] <= 0.f ? 0.f : v[i];
    } else {
      transcendental<kCols>(to.kind, saved, stage);
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) v[i] *= saved[i];
    }
  } else if (to.kind != SMOP_IDENTITY) {
    transcendental<kCols>(to.kind, v, stage);
  }
  write_piece<kCols>(to, to.out, v, stage, row, col);
  if (to.sums) sum_over_rows<kCols>(v, to.rows - row, sums);
}

}  // namespace smop
