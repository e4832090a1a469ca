// The gradients of biases and LayerNorm parameters: for each expert the sum of its rows' partial sums, in their order.
// One launch for up to four of them.
#include "combine.cuh"
#include "gemm.cuh"
#include "partial_sums.cuh"

namespace smop {
namespace {

// A partial sum of n columns for every `rows` rows of an expert, or `a_tile` of them, `stride` floats apart; all
// 16-byte aligned.
struct Gradient {
  const float* partial;
  int64_t stride;
  int n, rows, a_tile;
  void* out;  // (X, n)
  int dtype;
};

struct Gradients {
  Gradient of[4];
};

constexpr int kLaneCols = 4, kBlockCols = kWarp * kLaneCols;

// A block owns kBlockCols columns of one expert and one gradient.
__global__ __launch_bounds__(kSumThreads) void bias_sums(const __grid_constant__ Gradients gradients,
                                                         const int32_t* offs, int rows) {
  begin_kernel();
  const Gradient& g = gradients.of[blockIdx.z];
  const int e = blockIdx.y, col = blockIdx.x * kBlockCols + threadIdx.x % kWarp * kLaneCols;
  const RowTiles tiles = expert_row_tiles(offs, e, rows, g.rows);
  const float* first = g.partial + tiles.before * g.a_tile * g.stride + col;
  float sum[kLaneCols];
  sum_partials(sum, first, g.stride, tiles.own * g.a_tile, col < g.n);
  if (threadIdx.x >= kWarp) return;
  const int64_t at = static_cast<int64_t>(e) * g.n + col;
  const auto store = [&](auto* out) {
#pragma unroll
    for (int c = 0; c < kLaneCols; ++c)
      if (col + c < g.n) out[at + c] = from_float<std::remove_pointer_t<decltype(out)>>(sum[c]);
  };
  if (g.dtype == SMOP_BFLOAT16)
    store(static_cast<bf16*>(g.out));
  else if (g.dtype == SMOP_FLOAT16)
    store(static_cast<fp16*>(g.out));
  else
    store(static_cast<float*>(g.out));
}

}  // namespace
}  // namespace smop

extern "C" int64_t smop_column_sums_size(int64_t rows, int experts, int n) {
  using namespace smop;
  return max_row_tiles(rows, experts, kTileRows) * kSumsATile * padded(n);
}

extern "C" int64_t smop_combine_sums_size(int64_t rows, int experts, int dim, int layer_norm) {
  using namespace smop;
  return max_row_tiles(rows, experts, rows_per_run(rows)) * sums_per_run(layer_norm) * padded(dim);
}

extern "C" int smop_bias_sums(const SmopBiasSums* p, uint64_t stream, int dependent) {
  using namespace smop;
  const int run = rows_per_run(p->rows);
  const int64_t width = padded(p->dim), stride = sums_per_run(p->dln_weight != nullptr) * width;
  const Gradient all[4] = {
      {p->hidden_sums, padded(p->hidden), p->hidden, kTileRows, kSumsATile, p->db1, p->dtype},
      {p->combine_sums, stride, p->dim, run, 1, p->db2, p->dtype},
      {p->combine_sums + width, stride, p->dim, run, 1, p->dln_weight, p->ln_dtype},
      {p->combine_sums + 2 * width, stride, p->dim, run, 1, p->dln_bias, p->ln_dtype},
  };
  Gradients wanted{};
  unsigned count = 0;
  int widest = 0;
  for (const Gradient& g : all)
    if (g.out) {
      wanted.of[count++] = g;
      widest = g.n > widest ? g.n : widest;
    }
  if (count == 0) return cudaSuccess;
  const dim3 blocks(static_cast<unsigned>(ceil_div(widest, kBlockCols)), p->experts, count);
  return launch({blocks, kSumThreads, 0, stream, dependent != 0}, bias_sums, wanted, p->offs,
                static_cast<int>(p->rows));
}
