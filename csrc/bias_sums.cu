// The gradients of biases and LayerNorm parameters: for each expert the sum of its rows' partial sums, in their order.
// One launch for up to four of them.
#include "combine.cuh"
#include "gemm.cuh"
#include "partial_sums.cuh"

namespace smop {
namespace {

// A partial sum of n columns for every `rows` rows of an expert, or `a_tile` of them, `stride` floats apart.
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

template <class T>
__device__ __forceinline__ void store(void* out, int64_t at, float v) {
  static_cast<T*>(out)[at] = from_float<T>(v);
}

// A block owns 32 columns of one expert and one gradient.
__global__ __launch_bounds__(kSumThreads) void bias_sums(const __grid_constant__ Gradients gradients,
                                                         const int32_t* offs) {
  begin_kernel();
  const Gradient& g = gradients.of[blockIdx.z];
  const int e = blockIdx.y, col = blockIdx.x * kWarp + threadIdx.x % kWarp;
  if (static_cast<int>(blockIdx.x) * kWarp >= g.n) return;
  const int first = row_tiles_before(offs, e, g.rows) * g.a_tile;
  const int count = row_tiles_of(e ? offs[e - 1] : 0, offs[e], g.rows) * g.a_tile;
  const float sum = sum_partials(g.partial + first * g.stride + col, g.stride, count, col < g.n);
  if (threadIdx.x >= kWarp || col >= g.n) return;
  const int64_t at = static_cast<int64_t>(e) * g.n + col;
  if (g.dtype == SMOP_BFLOAT16)
    store<bf16>(g.out, at, sum);
  else if (g.dtype == SMOP_FLOAT16)
    store<fp16>(g.out, at, sum);
  else
    store<float>(g.out, at, sum);
}

}  // namespace
}  // namespace smop

extern "C" int64_t smop_column_sum_rows(int64_t rows, int experts) {
  return smop::max_row_tiles(rows, experts, smop::kTileRows) * smop::kSumsATile;
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
      {p->hidden_sums, p->hidden, p->hidden, kTileRows, kSumsATile, p->db1, p->dtype},
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
  const dim3 blocks(static_cast<unsigned>(ceil_div(widest, kWarp)), p->experts, count);
  return launch({blocks, kSumThreads, 0, stream, dependent != 0}, bias_sums, wanted, p->offs);
}
