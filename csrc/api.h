// The C face between the binding (g++) and the kernels (nvcc): one argument struct and one function a launch sequence.
// Pointers are device pointers; every function returns a cudaError_t as int and only queues work on `stream`.
// `dependent`: the first launch may start before the launch ahead in the stream has ended (common.cuh); false for the
// first launch of an operator, for what ran before it is not ours.
// Rows: T tokens have K choices each; slot = t*K + k. `order` lists the slots sorted by expert, `offs` holds the
// cumulative ends of the experts' segments in it, `inverse` is its inverse (-1: the slot is skipped). Row r of h, z,
// ... is slot order[r].
#pragma once
#include <cstdint>

#ifdef __cplusplus
extern "C" {
#endif

enum SmopDtype { SMOP_BFLOAT16 = 0, SMOP_FLOAT16 = 1, SMOP_FLOAT32 = 2 };  // float32: LayerNorm parameters only

// What the GEMM's epilogue does to the float32 accumulator: out = f(acc + bias), or out = acc * f'(aux).
enum SmopEpilogue {
  SMOP_IDENTITY = 0,
  SMOP_RELU = 1,
  SMOP_GELU = 2,  // exact (erf)
  SMOP_SILU = 3,
  SMOP_RELU_GRAD = 4,  // aux: the activation's output
  SMOP_GELU_GRAD = 5,  // aux: the pre-activation
  SMOP_SILU_GRAD = 6,  // aux: the pre-activation
};

enum SmopLimits { SMOP_MAX_EXPERTS = 128, SMOP_MAX_ROUTE_BLOCKS = 256, SMOP_MAX_GATE_SPLITS = 64 };

// What is brought into the L2 while a launch runs, for one after it: of stacked weights (X, …) the first `bytes` of
// each expert, `stride` bytes from expert to expert. Nothing where `from` is null.
typedef struct {
  const void* from;
  int bytes;
  int64_t stride;
} SmopAhead;

// out[r, :] = epilogue(A[row(r), :] · B[e] + bias[e]) for the rows r of every expert e; row(r) = order ? order[r] /
// top_k : r.
typedef struct {
  int dtype;
  const void* a;      // (.., K), unit stride along K
  int64_t lda;
  const void* b;  // (X, K, N), unit stride along K (b_k_major) or along N
  int64_t ldb, stride_b;
  int b_k_major;
  const int32_t* offs;   // (X,)
  const int32_t* order;  // (M,) or null
  int top_k;
  int64_t a_rows;  // rows of A that exist
  int64_t rows;    // M, the bound of offs
  int experts, n, k;
  const void* bias;  // (X, N) or null
  const void* aux;   // (M, N) or null
  void* pre;         // (M, N) or null: acc + bias, before the activation
  void* out;         // (M, N)
  int epilogue;
  float* sums;  // smop_column_sums_size() floats, or null: column sums of out over each 64 rows of a row tile
  SmopAhead ahead;  // of experts that have rows; with order only
  // Columns of a tile and blocks of a cluster, which the sm_90a kernels alone have; 0 leaves it to the launcher, and
  // anything else is an error where those cannot run.
  int columns, cluster;
} SmopGemm;
int smop_grouped_gemm(const SmopGemm* args, uint64_t stream, int dependent);

// out[e] = Σ over the rows r of e of A[r, :]ᵀ · B[row(r), :]. An empty expert gets zeros.
typedef struct {
  int dtype;
  const void* a;  // (M, m), unit stride along m
  int64_t lda;
  int64_t a_rows;  // rows of A that exist
  const void* b;  // (.., n), unit stride along n
  int64_t ldb;
  int64_t b_rows;  // rows of B that exist
  const int32_t* offs;
  const int32_t* order;  // gathers the rows of B; or null
  int top_k;
  int experts, m, n;
  void* out;  // (X, m, n)
  int columns, cluster;  // as SmopGemm's
} SmopWgrad;
int smop_grouped_wgrad(const SmopWgrad* args, uint64_t stream, int dependent);

// Rows from offs[X-1] on are set to zero.
typedef struct {
  int dtype;
  void* out;  // (rows, n)
  int64_t rows;
  int n, experts;
  const int32_t* offs;
} SmopZeroTail;
int smop_zero_tail(const SmopZeroTail* args, uint64_t stream, int dependent);

// Router and schedule. Expert id = e + (X == R*E ? m*E : 0); a masked token's experts are X.
// With S shared experts a token has K + S choices: the routed ones, then experts X, X + 1, ... with weight 1; those of a
// masked token are X + S with weight 0. order, inverse and offs are of all of them.
typedef struct {
  int dtype, tokens, dim, routers, gates, experts, top_k;  // gates = E (logits a token), experts = X
  int shared;                                              // S
  const void* x;                                           // (T, D)
  const void* gate_weight;                                 // (R, E, D)
  const int32_t* modality;                                 // (T,) or null
  const uint8_t* mask;                                     // (T,) or null
  float* logits;                                           // (T, E)
  float* weights;                                          // (T, K)
  int32_t* chosen;                                         // (T, K)
  int32_t* counts;                                         // (R, E)
  float* balance_loss;                                     // ()
  float* z_loss;                                           // ()
  float* all_weights;                                      // (T, K + S), or null without shared experts
  int32_t* all_chosen;                                     // (T, K + S), or null
  int32_t *order, *inverse, *offs;
  int32_t* block_counts;  // scratch (blocks, R, E)
  float* block_probs;     // scratch (blocks, R, E)
  float* block_z;         // scratch (blocks, R)
  SmopAhead ahead;        // of all X + S experts
} SmopRoute;
int smop_route_fwd(const SmopRoute* args, uint64_t stream);

typedef struct {
  int tokens, experts, top_k;  // X and K with the shared ones
  const int32_t* chosen;       // (T, K − shared); ids outside [0, X) are skipped
  int32_t *order, *inverse, *offs;
  int32_t* block_counts;  // scratch (blocks, X − shared): choices that are not of shared experts
  int shared;             // the last of the experts, and of the choices of a token that is not skipped
} SmopSchedule;
int smop_schedule(const SmopSchedule* args, uint64_t stream);

typedef struct {
  int dtype, tokens, dim, routers, gates, top_k;
  const void *x, *gate_weight;
  const int32_t* modality;
  const uint8_t* mask;
  const float *logits, *weights;
  const int32_t *chosen, *counts;
  const float *dlogits, *dweights, *dbalance, *dz;  // each may be null
  int dweights_columns;                             // K or more, of which the first K are read
  float* dlogits_total;                             // scratch (T, E); used with dx alone
  float* dgate_partial;                             // scratch (splits, R, E, D)
  void* dgate;                                      // (R, E, D)
  void* dx;                                         // (T, D) or null
} SmopRouteBwd;
int smop_route_bwd(const SmopRouteBwd* args, uint64_t stream);

// y[t] = Σ_k weights[t,k] · (LayerNorm(z[r]) · ln_weight[e] + ln_bias[e]); LayerNorm absent when ln_weight is null.
typedef struct {
  int dtype, ln_dtype, tokens, top_k, experts, dim;
  const void* z;           // (M, O)
  const float* weights;    // (T, K)
  const int32_t* chosen;   // (T, K)
  const int32_t* inverse;  // (T, K)
  const void *ln_weight, *ln_bias;
  float eps;
  void* y;             // (T, O)
  float *mean, *rstd;  // (M,), with LayerNorm only
} SmopCombine;
int smop_combine_fwd(const SmopCombine* args, uint64_t stream, int dependent);

typedef struct {
  int dtype, ln_dtype, tokens, top_k, experts, dim;
  const void *dy, *z;  // (T, O), (M, O)
  const float* weights;
  const int32_t *order, *inverse, *offs;
  const void *ln_weight, *ln_bias;
  const float *mean, *rstd;
  void* dz;         // (M, O)
  float* dweights;  // (T, K) or null; 0 for a slot that is skipped
  float* sums;      // smop_combine_sums_size() floats, or null: over each run of rows the sums of dz, and with
                    // LayerNorm those that become dln_weight and dln_bias
  SmopAhead ahead;    // of experts that have rows
} SmopCombineBwd;
int smop_combine_bwd(const SmopCombineBwd* args, uint64_t stream, int dependent);

// The gradients of biases and LayerNorm parameters from the partial sums of combine_bwd and of dh's GEMM, in a fixed
// order. An idle expert gets zeros; a gradient that is null is not computed.
typedef struct {
  int dtype, ln_dtype, experts, hidden, dim;
  int64_t rows;
  const int32_t* offs;
  const float *hidden_sums, *combine_sums;  // SmopGemm.sums of dh; SmopCombineBwd.sums
  void *db1, *db2;                          // (X, H), (X, O)
  void *dln_weight, *dln_bias;              // (X, O)
} SmopBiasSums;
int smop_bias_sums(const SmopBiasSums* args, uint64_t stream, int dependent);

// dx[t] = Σ_k rows[inverse[t,k]] over the slots that are not skipped.
typedef struct {
  int dtype, tokens, top_k, dim;
  const void* rows;
  const int32_t* inverse;
  void* dx;
} SmopGatherSum;
int smop_gather_sum(const SmopGatherSum* args, uint64_t stream, int dependent);

// Sizes of the scratch arrays above, and the tiles a launch walks (tile_scheduler.cuh).
int smop_route_blocks(int tokens);
int smop_gate_splits(int tokens);
int64_t smop_column_sums_size(int64_t rows, int experts, int n);
int64_t smop_combine_sums_size(int64_t rows, int experts, int dim, int layer_norm);

int smop_device_arch(int* arch);  // 10 * major + minor of the current device
const char* smop_error_string(int error);
const char* smop_nvcc_version(void);
int smop_cudart_version(void);

#ifdef __cplusplus
}
#endif
