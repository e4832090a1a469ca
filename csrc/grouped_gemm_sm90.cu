#include "gemm.cuh"
namespace smop {
bool gemm_sm90_serves(const SmopGemm&) { return false; }
bool wgrad_sm90_serves(const SmopWgrad&) { return false; }
cudaError_t launch_gemm_sm90(const SmopGemm&, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t launch_wgrad_sm90(const SmopWgrad&, cudaStream_t) { return cudaErrorNotSupported; }
}
