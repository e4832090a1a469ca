// Chooses the GEMM family, and answers what the binding asks about the device and the build.
#include <cstdio>

#include "gemm.cuh"
#include "prefetch.cuh"

namespace smop {
namespace {

// wgmma and TMA exist on compute capability 9.0 alone (sm_90a code runs nowhere else).
constexpr int kHopper = 90;

cudaError_t device_arch(int& arch) {
  int device = 0, major = 0, minor = 0;
  if (auto e = cudaGetDevice(&device)) return e;
  if (auto e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return e;
  if (auto e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) return e;
  arch = 10 * major + minor;
  return cudaSuccess;
}

// Whether the sm_90 family is to run. A product that asks for a cut, which it alone has, gets no other.
template <class Product>
cudaError_t choose_hopper(const Product& p, bool serves, bool& hopper) {
  int arch = 0;
  if (auto e = device_arch(arch)) return e;
  hopper = arch == kHopper && serves;
  return (p.columns || p.cluster) && !hopper ? cudaErrorNotSupported : cudaSuccess;
}

}  // namespace

#if !SMOP_HAS_SM90A
bool gemm_sm90_serves(const SmopGemm&) { return false; }
bool wgrad_sm90_serves(const SmopWgrad&) { return false; }
cudaError_t launch_gemm_sm90(const SmopGemm&, uint64_t, bool) { return cudaErrorNotSupported; }
cudaError_t launch_wgrad_sm90(const SmopWgrad&, uint64_t, bool) { return cudaErrorNotSupported; }
#endif

}  // namespace smop

extern "C" int smop_grouped_gemm(const SmopGemm* args, uint64_t stream, int dependent) {
  using namespace smop;
  if (args->rows == 0 || args->n == 0) return cudaSuccess;
  SmopGemm p = *args;
  p.ahead = prefetchable(p.ahead);
  bool hopper;
  if (auto e = choose_hopper(p, gemm_sm90_serves(p), hopper)) return e;
  return hopper ? launch_gemm_sm90(p, stream, dependent) : launch_gemm_sm80(p, stream, dependent);
}

extern "C" int smop_grouped_wgrad(const SmopWgrad* args, uint64_t stream, int dependent) {
  using namespace smop;
  if (args->experts == 0 || args->m == 0 || args->n == 0) return cudaSuccess;
  bool hopper;
  if (auto e = choose_hopper(*args, wgrad_sm90_serves(*args), hopper)) return e;
  return hopper ? launch_wgrad_sm90(*args, stream, dependent) : launch_wgrad_sm80(*args, stream, dependent);
}

extern "C" int smop_device_arch(int* arch) { return smop::device_arch(*arch); }

extern "C" const char* smop_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

extern "C" const char* smop_nvcc_version(void) {
  static char text[32];
  std::snprintf(text, sizeof text, "%d.%d.%d", __CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__, __CUDACC_VER_BUILD__);
  return text;
}

extern "C" int smop_cudart_version(void) { return CUDART_VERSION; }
