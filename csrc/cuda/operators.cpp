// The CUDA kernels as PyTorch operators, through PyTorch's stable ABI: one build serves every PyTorch from
// TORCH_TARGET_VERSION on and every Python. backends/cuda.py calls them. An operator queues its kernel on the given
// stream, on the device of its tensors, and does not synchronise.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace dk {
namespace {

using torch::stable::Tensor;

// ---- launches

// Receiver of launches in place of the device, for tests, with tensors on any device; see
// dispersion_kernels_watch_launches.
using Watcher = void (*)(const char* kernel, const unsigned* grid, int threads, int shared_bytes, void* const* arguments,
                         int count);
std::atomic<Watcher> watcher{nullptr};
std::atomic<bool> watches_hopper{false};

const Kernel* find_kernel(const std::string& name) {
  for (const Kernels& table :
       {token_kernels(), bfloat16_kernels(), float16_kernels(), tf32_kernels(), tf32x3_kernels()})
    for (int n = 0; n < table.count; ++n)
      if (name == table.kernels[n].name) return &table.kernels[n];
  return nullptr;
}

const Kernel& kernel_named(const std::string& name) {
  const Kernel* kernel = find_kernel(name);
  STD_TORCH_CHECK(kernel != nullptr, "there is no CUDA kernel ", name);
  return *kernel;
}

void check(cudaError_t status, const std::string& kernel) {
  if (status == cudaSuccess) return;
  const char* remedy = "";
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
    remedy = "; the extension was not built for this GPU: build it again with TORCH_CUDA_ARCH_LIST naming it";
  if (status == cudaErrorInsufficientDriver)
    remedy = "; the driver is older than the CUDA that the extension was built with: update the driver";
  STD_TORCH_CHECK(false, "CUDA kernel ", kernel, ": ", cudaGetErrorString(status), remedy);
}

// Makes a device current and restores the previous one, also when an exception is thrown.
class DeviceGuard {
 public:
  DeviceGuard(int device, const std::string& kernel) : device_(device) {
    check(cudaGetDevice(&before_), kernel);
    if (before_ != device_) check(cudaSetDevice(device_), kernel);
  }
  ~DeviceGuard() {
    // The status is ignored: the device was current before, and a destructor cannot throw.
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

// `arguments` are exactly the kernel's parameters, in their order and of their types.
template <class... Arguments>
void launch(const std::string& name, const Tensor& on, int64_t stream, int64_t grid_x, int64_t grid_y, int64_t grid_z,
            const Arguments&... arguments) {
  const Kernel& kernel = kernel_named(name);
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const unsigned grid[] = {unsigned(grid_x), unsigned(grid_y), unsigned(grid_z)};
  if (const Watcher watch = watcher.load()) {
    watch(kernel.name, grid, kernel.threads, kernel.shared_bytes, pointers, int(sizeof...(arguments)));
    return;
  }
  STD_TORCH_CHECK(on.is_cuda(), "CUDA kernel ", name, ": its tensors are not on a CUDA device");
  const DeviceGuard guard(on.get_device_index(), name);
  if (kernel.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes), name);
  check(cudaLaunchKernel(kernel.function, dim3(grid[0], grid[1], grid[2]), dim3(unsigned(kernel.threads)), pointers,
                         size_t(kernel.shared_bytes), reinterpret_cast<cudaStream_t>(stream)),
        name);
}

// ---- arguments

template <class T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}
template <class T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <class T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}
template <class T>
T* output(const std::optional<Tensor>& tensor) {
  return tensor ? output<T>(*tensor) : nullptr;
}

LayerOffsets offsets(const std::vector<Tensor>& layers) {
  STD_TORCH_CHECK(layers.size() <= kMaxLayers, "at most ", kMaxLayers, " layers in a launch, got ", layers.size());
  LayerOffsets result = {};
  for (size_t n = 0; n < layers.size(); ++n)
    result.offset[n] = intptr_t(layers[n].data_ptr()) - intptr_t(layers[0].data_ptr());
  return result;
}

// The layers, each [B, L, F], with the sizes and strides (in elements) that they share.
struct Tokens {
  const char* z;
  LayerOffsets layers;
  int64_t stride_b, stride_l;
  int batch, length, features, rows;

  explicit Tokens(const std::vector<Tensor>& tensors) : layers(offsets(tensors)) {
    STD_TORCH_CHECK(!tensors.empty() && tensors[0].dim() == 3, "layers must be [B, L, F] each");
    const Tensor& first = tensors[0];
    for (const Tensor& tensor : tensors) {
      STD_TORCH_CHECK(tensor.stride(2) == 1 && intptr_t(tensor.data_ptr()) % 16 == 0,
                      "features must be next to each other, and tokens begin at multiples of 16 bytes");
      for (int64_t n = 0; n < 3; ++n)
        STD_TORCH_CHECK(tensor.size(n) == first.size(n) && tensor.stride(n) == first.stride(n),
                        "layers must have the same sizes and strides");
    }
    z = pointer<char>(first);
    stride_b = first.stride(0);
    stride_l = first.stride(1);
    batch = int(first.size(0));
    length = int(first.size(1));
    features = int(first.size(2));
    rows = batch * int(tensors.size());
  }
};

// Checks that every layer has a contiguous gradient [B, L, F], or that there are no gradients.
void check_gradients(const std::vector<Tensor>& gradients, const std::vector<Tensor>& layers) {
  STD_TORCH_CHECK(gradients.empty() || gradients.size() == layers.size(), "there must be a gradient of each layer, got ",
                  gradients.size(), " of ", layers.size(), " layers");
  for (const Tensor& gradient : gradients)
    STD_TORCH_CHECK(gradient.numel() == layers[0].numel() && gradient.is_contiguous(),
                    "gradients must be contiguous and of the layers' sizes");
}

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// ---- the copy engine of Hopper

// The kernel for sm_90a that takes the place of `name`, if there is one and the device of `on` runs it; else NULL. A
// build without sm_90a has a stub of the kernel, known by a bound of fewer threads.
const Kernel* hopper_kernel(const std::string& name, const Tensor& on) {
  const Kernel* kernel = find_kernel(name + "_wgmma");
  if (kernel == nullptr) return nullptr;
  if (watcher.load()) return watches_hopper.load() ? kernel : nullptr;
  if (!on.is_cuda()) return nullptr;
  const DeviceGuard guard(on.get_device_index(), name);
  int major = 0;
  cudaFuncAttributes attributes;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, on.get_device_index()) != cudaSuccess ||
      major != 9 || cudaFuncGetAttributes(&attributes, kernel->function) != cudaSuccess) {
    cudaGetLastError();  // clears the error; one that is not this kernel's alone is reported by launch()
    return nullptr;
  }
  return attributes.maxThreadsPerBlock >= kernel->threads ? kernel : nullptr;
}

// The numbers that a tensor map is made from, the innermost dimension first; strides and swizzle in bytes, sizes and
// box in elements. Watched launches get this in place of the map.
struct TensorMapSource {
  uint64_t address, sizes[3], strides[2];
  uint32_t box[3], swizzle;
};
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap),
              "TensorMap is a CUtensorMap");
static_assert(sizeof(TensorMapSource) <= sizeof(TensorMap), "the tests get it in its place");

// The driver's cuTensorMapEncodeTiled, looked up at run time, so that the extension loads without a driver; null if the
// driver is too old.
auto tensor_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    cudaGetLastError();
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found == cudaDriverEntryPointSuccess ? function : nullptr);
  }();
  return encode;
}

// Tensor maps of the layers, in boxes of one sequence, kHopperTokens tokens and kHopperRowBytes bytes of features;
// nothing if the copy engine cannot read the layers: strides must be multiples of 16 bytes below 2^40, and the maps,
// 8 KB of kernel arguments, need a driver of CUDA 12.1.
std::optional<TensorMaps> tensor_maps(const std::vector<Tensor>& layers, bool bfloat16) {
  constexpr int64_t kBytes = 2, kLargestStride = int64_t(1) << 40;
  const Tensor& first = layers[0];
  // The stride of a dimension of size 1 is arbitrary.
  const int64_t stride_l = first.stride(1) * kBytes;
  const int64_t stride_b = first.size(0) > 1 ? first.stride(0) * kBytes : stride_l;
  for (const int64_t stride : {stride_l, stride_b})
    if (stride <= 0 || stride % 16 != 0 || stride >= kLargestStride) return std::nullopt;
  const bool watched = watcher.load() != nullptr;
  int driver = 0;
  if (!watched && (cudaDriverGetVersion(&driver) != cudaSuccess || driver < 12010 || tensor_map_encoder() == nullptr))
    return std::nullopt;
  TensorMaps maps = {};
  for (size_t n = 0; n < layers.size(); ++n) {
    const TensorMapSource source = {uint64_t(layers[n].data_ptr()),
                                    {uint64_t(first.size(2)), uint64_t(first.size(1)), uint64_t(first.size(0))},
                                    {uint64_t(stride_l), uint64_t(stride_b)},
                                    {kHopperRowBytes / kBytes, kHopperTokens, 1},
                                    kHopperRowBytes};
    TensorMap& map = maps.map[n];
    if (watched) {
      std::memcpy(&map, &source, sizeof source);
      continue;
    }
    const uint32_t steps[] = {1, 1, 1};
    const CUresult result = tensor_map_encoder()(
        reinterpret_cast<CUtensorMap*>(&map),
        bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, layers[n].data_ptr(),
        source.sizes, source.strides, source.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) return std::nullopt;
  }
  return maps;
}

// ---- operators

void row_statistics(std::string kernel, std::vector<Tensor> layers, std::optional<Tensor> partners, Tensor norm,
                    Tensor inverse, Tensor extra, std::vector<Tensor> cleaned, double eps, double q, int64_t transform,
                    int64_t stream) {
  const Tokens tokens(layers);
  STD_TORCH_CHECK(cleaned.empty() || cleaned.size() == layers.size(), "there must be a copy of each layer, got ",
                  cleaned.size(), " of ", layers.size(), " layers");
  launch(kernel, norm, stream, blocks(tokens.length, kTokensOfProgram), tokens.rows, 1, tokens.z, tokens.layers,
         tokens.stride_b, tokens.stride_l, pointer<int>(partners), output<float>(norm), output<float>(inverse),
         output<float>(extra), cleaned.empty() ? nullptr : output<char>(cleaned[0]), offsets(cleaned),
         cleaned.empty() ? int64_t(0) : cleaned[0].stride(1), tokens.batch, tokens.length, tokens.features, float(eps),
         float(q), int(transform));
}

void pair_tiles(std::string kernel, std::vector<Tensor> layers, Tensor inverse, Tensor weight_inverse, Tensor extra,
                std::optional<Tensor> shift, std::optional<Tensor> pair_ids, std::optional<Tensor> weights,
                std::optional<Tensor> mirror, Tensor sums, std::optional<Tensor> maxima,
                int64_t rows, int64_t programs, int64_t tiles_i, int64_t tiles_j, bool triangle, int64_t first_row,
                int64_t first_i, int64_t first_j, int64_t first_sum, double p0, double p1, double p2, double p3,
                int64_t stream) {
  const Tokens tokens(layers);
  const auto launch_pairs = [&](const std::string& name, const auto&... more) {
    launch(name, sums, stream, programs, rows, 1, tokens.z, tokens.layers, tokens.stride_b, tokens.stride_l,
           pointer<float>(inverse), pointer<float>(weight_inverse), pointer<float>(extra), pointer<float>(shift),
           pointer<int>(pair_ids), output<void>(weights), output<void>(mirror),
           weights ? weights->stride(0) : int64_t(0), weights ? weights->stride(1) : int64_t(0), output<float>(sums),
           output<float>(maxima), sums.stride(0), int(first_sum), int(first_row), tokens.batch, tokens.length,
           tokens.features, int(first_i), int(first_j), int(tiles_i), int(tiles_j), int(triangle), float(p0), float(p1),
           float(p2), float(p3), more...);
  };
  if (const Kernel* hopper = hopper_kernel(kernel, sums))
    if (const auto maps = tensor_maps(layers, kernel.find("_bf16_") != std::string::npos))
      return launch_pairs(hopper->name, *maps);
  launch_pairs(kernel);
}

void diagonal(std::vector<Tensor> layers, Tensor inverse, Tensor extra, Tensor weights, int64_t rows, int64_t first_row,
              int64_t transform, int64_t stream) {
  const Tokens tokens(layers);
  STD_TORCH_CHECK(layers[0].element_size() == 2 && weights.element_size() == 2, "diagonal takes bf16 layers and weights");
  launch("dk_diagonal_bf16", inverse, stream, blocks(tokens.length, kDiagonalTokens), rows, 1, tokens.z, tokens.layers,
         tokens.stride_b, tokens.stride_l, pointer<float>(inverse), pointer<float>(extra), output<void>(weights),
         weights.stride(0), weights.stride(1), int(first_row), tokens.batch, tokens.length, tokens.features,
         int(transform));
}

void row_sweep(std::string kernel, std::vector<Tensor> layers, Tensor inverse, Tensor weight_inverse, Tensor extra,
               std::optional<Tensor> shift, std::optional<Tensor> pair_ids, std::optional<Tensor> tile_ranges,
               std::optional<Tensor> largest, std::optional<Tensor> total, std::optional<Tensor> expected,
               std::optional<Tensor> average, std::optional<Tensor> sums, std::optional<Tensor> maxima,
               std::optional<Tensor> weight_sums, std::vector<Tensor> gradients, int64_t tile_rows, double p0, double p1,
               double p2, double p3, int64_t stream) {
  const Tokens tokens(layers);
  check_gradients(gradients, layers);
  const Kernel& chosen = kernel_named(kernel);
  STD_TORCH_CHECK(tile_rows == chosen.threads / 32 * 16, "a block of ", kernel, " has ", chosen.threads / 32 * 16,
                  " tokens, got ", tile_rows);
  const int64_t slices = chosen.slice == 0 ? 1 : blocks(tokens.features, chosen.slice);
  launch(kernel, inverse, stream, blocks(tokens.length, tile_rows), tokens.rows, slices, tokens.z, tokens.layers,
         tokens.stride_b, tokens.stride_l, pointer<float>(inverse), pointer<float>(weight_inverse),
         pointer<float>(extra), pointer<float>(shift), pointer<int>(pair_ids), pointer<int>(tile_ranges),
         pointer<float>(largest), pointer<float>(total), pointer<float>(expected), pointer<float>(average),
         output<float>(sums), output<float>(maxima), output<float>(weight_sums),
         gradients.empty() ? nullptr : output<float>(gradients[0]), offsets(gradients), tokens.batch, tokens.length,
         tokens.features, float(p0), float(p1), float(p2), float(p3));
}

void sequence_losses(Tensor norm, Tensor inverse, std::optional<Tensor> partners, Tensor sums,
                     std::optional<Tensor> maxima, std::optional<Tensor> bounds, std::optional<Tensor> counts,
                     std::optional<Tensor> tokens, Tensor loss, std::optional<Tensor> token_scale,
                     std::optional<Tensor> shift, int64_t length, int64_t batch, int64_t first_sequence,
                     int64_t divisor, bool of_tokens, bool diagonal, bool logarithm, bool divide_by_sequences,
                     double constant, double factor, int64_t stream) {
  launch("dk_sequence_losses", loss, stream, loss.size(1), loss.size(0), 1, pointer<float>(norm),
         pointer<float>(inverse), pointer<int>(partners), pointer<float>(sums), pointer<float>(maxima),
         pointer<int>(bounds), pointer<int64_t>(counts), pointer<int64_t>(tokens), output<double>(loss),
         output<float>(token_scale), output<float>(shift), int(length), sums.size(1), int(batch), int(first_sequence),
         counts ? int(counts->size(0)) : 0, int(divisor), int(of_tokens), int(diagonal), int(logarithm),
         int(divide_by_sequences), constant, factor);
}

void differences(std::string kernel, std::vector<Tensor> layers, Tensor weight_sums, std::vector<Tensor> gradients,
                 int64_t stream) {
  const Tokens tokens(layers);
  STD_TORCH_CHECK(!gradients.empty(), "differences needs a gradient of each layer");
  check_gradients(gradients, layers);
  launch(kernel, weight_sums, stream, blocks(tokens.length, kTokensOfProgram), tokens.rows, 1, tokens.z, tokens.layers,
         tokens.stride_b, tokens.stride_l, pointer<float>(weight_sums), output<float>(gradients[0]),
         offsets(gradients), tokens.batch, tokens.length, tokens.features);
}

void token_gradients(std::string kernel, std::vector<Tensor> layers, std::vector<Tensor> gradients, Tensor scale,
                     Tensor factor, std::vector<Tensor> outputs, double eps, int64_t transform, int64_t stream) {
  const Tokens tokens(layers);
  STD_TORCH_CHECK(!gradients.empty() && !outputs.empty(), "token_gradients needs a gradient and an output of each layer");
  check_gradients(gradients, layers);
  check_gradients(outputs, layers);
  launch(kernel, scale, stream, blocks(int64_t(tokens.batch) * tokens.length, kTokensOfProgram),
         int64_t(layers.size()), 1, tokens.z, tokens.layers, tokens.stride_b, tokens.stride_l,
         pointer<char>(gradients[0]), offsets(gradients), pointer<float>(scale), pointer<float>(factor),
         factor.stride(0), factor.stride(1), output<char>(outputs[0]), offsets(outputs), tokens.batch, tokens.length,
         tokens.features, float(eps), int(transform));
}

}  // namespace
}  // namespace dk

// Redirects launches from the device to `watch`, which gets the kernel's name, its grid and the addresses of its
// arguments; null ends the redirection. The tests run the kernels with it on a machine without a GPU. `hopper`: whether
// to launch as on a device with the kernels for sm_90a.
extern "C" __attribute__((visibility("default"))) void dispersion_kernels_watch_launches(dk::Watcher watch, int hopper) {
  dk::watches_hopper.store(hopper != 0);
  dk::watcher.store(watch);
}

STABLE_TORCH_LIBRARY_FRAGMENT(dispersion_kernels, m) {
  m.def(
      "cuda_row_statistics(str kernel, Tensor[] layers, Tensor? partners, Tensor(a!) norm, Tensor(b!) inverse, "
      "Tensor(c!) extra, Tensor(d!)[] cleaned, float eps, float q, int transform, int stream) -> ()");
  m.def(
      "cuda_pair_tiles(str kernel, Tensor[] layers, Tensor inverse, Tensor weight_inverse, Tensor extra, "
      "Tensor? shift, Tensor? pair_ids, Tensor(a!)? weights, Tensor(b!)? mirror, "
      "Tensor(c!) sums, Tensor(d!)? maxima, int rows, int programs, int tiles_i, int tiles_j, bool triangle, "
      "int first_row, int first_i, int first_j, int first_sum, float p0, float p1, float p2, float p3, "
      "int stream) -> ()");
  m.def(
      "cuda_diagonal(Tensor[] layers, Tensor inverse, Tensor extra, Tensor(a!) weights, int rows, int first_row, "
      "int transform, int stream) -> ()");
  m.def(
      "cuda_row_sweep(str kernel, Tensor[] layers, Tensor inverse, Tensor weight_inverse, Tensor extra, "
      "Tensor? shift, Tensor? pair_ids, Tensor? tile_ranges, Tensor? largest, Tensor? total, Tensor? expected, "
      "Tensor? average, Tensor(a!)? sums, Tensor(b!)? maxima, Tensor(c!)? weight_sums, Tensor(d!)[] gradients, "
      "int tile_rows, float p0, float p1, float p2, float p3, int stream) -> ()");
  m.def(
      "cuda_sequence_losses(Tensor norm, Tensor inverse, Tensor? partners, Tensor sums, Tensor? maxima, Tensor? bounds, "
      "Tensor? counts, Tensor? tokens, Tensor(a!) loss, Tensor(b!)? token_scale, Tensor(c!)? shift, int length, "
      "int batch, int first_sequence, int divisor, bool of_tokens, bool diagonal, bool logarithm, "
      "bool divide_by_sequences, float constant, float factor, int stream) -> ()");
  m.def(
      "cuda_differences(str kernel, Tensor[] layers, Tensor weight_sums, Tensor(a!)[] gradients, int stream) -> ()");
  m.def(
      "cuda_token_gradients(str kernel, Tensor[] layers, Tensor[] gradients, Tensor scale, Tensor factor, "
      "Tensor(a!)[] outputs, float eps, int transform, int stream) -> ()");
}

// Registered for every device, because of the tests; launch() raises for tensors that are not on a CUDA device.
STABLE_TORCH_LIBRARY_IMPL(dispersion_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_row_statistics", TORCH_BOX(&dk::row_statistics));
  m.impl("cuda_pair_tiles", TORCH_BOX(&dk::pair_tiles));
  m.impl("cuda_diagonal", TORCH_BOX(&dk::diagonal));
  m.impl("cuda_row_sweep", TORCH_BOX(&dk::row_sweep));
  m.impl("cuda_sequence_losses", TORCH_BOX(&dk::sequence_losses));
  m.impl("cuda_differences", TORCH_BOX(&dk::differences));
  m.impl("cuda_token_gradients", TORCH_BOX(&dk::token_gradients));
}
