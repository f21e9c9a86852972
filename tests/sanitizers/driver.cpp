// Drives the CPU kernel without PyTorch, for the sanitizers: all instruction sets, potentials and dtypes at sizes around
// the multiples of the panels, in buffers exactly as large as csrc/cpu/dispersion.h says, compared with exact.h in
// float64 and, bit by bit, with other numbers of threads.
//
// driver STEP THREADS: at every STEP-th size; with THREADS threads as with one.

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispersion.h"
#include "exact.h"

// As GCC says it, and as Clang does.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define DK_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer) || __has_feature(thread_sanitizer)
#define DK_SANITIZED
#endif
#endif
#if !defined(DK_SANITIZED)
#include <sys/mman.h>
#include <unistd.h>
#endif

// ---- memory

// A sanitizer watches malloc's allocations; without one, they end where a page begins that nobody may touch. All bits are
// set, a NaN of every dtype: a number that is read and was never written shows in the result.
#if defined(DK_SANITIZED)
extern "C" void* dk_guarded_allocate(size_t bytes) { return memset(malloc(bytes), 0xff, bytes); }
extern "C" void dk_guarded_release(void* allocation) { free(allocation); }
#else
namespace {
std::mutex mutex;
std::map<void*, std::pair<char*, size_t>> mappings;
}  // namespace

extern "C" void* dk_guarded_allocate(size_t bytes) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), writable = (bytes + page - 1) / page * page;
  void* mapped = mmap(nullptr, writable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED || mprotect((char*)mapped + writable, page, PROT_NONE)) abort();
  char* data = (char*)mapped + writable - bytes;
  const std::lock_guard<std::mutex> lock(mutex);
  mappings[data] = {(char*)mapped, writable + page};
  return memset(data, 0xff, bytes);
}

extern "C" void dk_guarded_release(void* allocation) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto mapping = mappings.find(allocation);
  munmap(mapping->second.first, mapping->second.second);
  mappings.erase(mapping);
}
#endif

namespace {

// `count` numbers, the first of which is `offset` bytes from where alignment wants it.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count, size_t offset = 0)
      : bytes_(count * sizeof(T)), offset_(offset), allocation_((char*)dk_guarded_allocate(bytes_ + offset)) {}
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    if (bytes_) memcpy(allocation_, values.data(), bytes_);
  }
  ~Buffer() { dk_guarded_release(allocation_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* address() const { return allocation_ + offset_; }
  T* data() const { return (T*)address(); }
  std::vector<T> values() const { return std::vector<T>(data(), data() + bytes_ / sizeof(T)); }
  std::string bits() const { return std::string((const char*)address(), bytes_); }

 private:
  size_t bytes_, offset_;
  char* allocation_;
};

// ---- failures

std::string context;
int64_t calls = 0;
double worst_loss = 0.0, worst_grad = 0.0;  // errors, in tolerances

std::string format(const char* text, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(line, sizeof line, text, arguments);
  va_end(arguments);
  return line;
}

[[noreturn]] void fail(const std::string& what) {
  fprintf(stderr, "FAILED: %s\n  %s\n", what.c_str(), context.c_str());
  exit(1);
}

void expect_status(int32_t status, int32_t expected) {
  ++calls;
  if (status != expected) fail(format("status %d, expected %d", status, expected));
}

// ---- tokens

uint64_t state = 1;
double uniform() {  // in [0, 1)
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(state >> 40) / double(1 << 24);
}
double normal() {  // nearly: of six uniform numbers
  double total = -3.0;
  for (int n = 0; n < 6; ++n) total += uniform();
  return total * sqrt(2.0);
}

constexpr const char* kDtypes[] = {"fp32", "bf16", "fp16"};

int64_t size_of(int32_t dtype) { return dtype == DK_FLOAT32 ? 4 : 2; }

double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return NAN;
  const double magnitude = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
  return bits >> 15 ? -magnitude : magnitude;
}

double value_at(const void* data, int64_t n, int32_t dtype) {
  if (dtype == DK_FLOAT32) {
    float value;
    memcpy(&value, (const char*)data + 4 * n, sizeof value);
    return value;
  }
  uint16_t bits;
  memcpy(&bits, (const char*)data + 2 * n, sizeof bits);
  if (dtype == DK_FLOAT16) return half_value(bits);
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

// `value` rounded to the dtype, towards zero; of fp16's normal numbers.
void put_at(void* data, int64_t n, int32_t dtype, float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (dtype == DK_FLOAT32) {
    memcpy((char*)data + 4 * n, &bits, sizeof bits);
    return;
  }
  const uint32_t exponent = bits >> 23 & 255, of_half = exponent < 113 ? 0 : (exponent - 112) << 10 | (bits >> 13 & 1023);
  const uint16_t narrow = uint16_t(dtype == DK_BFLOAT16 ? bits >> 16 : (bits >> 16 & 0x8000) | of_half);
  memcpy((char*)data + 2 * n, &narrow, sizeof narrow);
}

// Rows of a tensor, `stride` numbers apart, what is between them NaN; around a common direction.
struct Tokens {
  int32_t dtype;
  int64_t rows, features, stride;
  Buffer<char> memory;
  std::vector<double> values;  // [rows, features]

  Tokens(int32_t dtype, int64_t rows, int64_t features, int64_t stride, bool odd)
      : dtype(dtype),
        rows(rows),
        features(features),
        stride(stride),
        memory(size_t(((rows - 1) * stride + features) * size_of(dtype)), odd ? 1 : 0),
        values(size_t(rows * features)) {
    std::vector<double> direction(static_cast<size_t>(features));
    for (double& value : direction) value = 0.6 * normal();
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t f = 0; f < features; ++f) {
        put_at(memory.address(), row * stride + f, dtype, float(direction[size_t(f)] + normal()));
        values[size_t(row * features + f)] = value_at(memory.address(), row * stride + f, dtype);
      }
  }
};

std::vector<int64_t> shuffled(int64_t count) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  for (size_t n = order.size(); n > 1; --n) std::swap(order[n - 1], order[size_t(uniform() * double(n))]);
  return order;
}

// ---- threads

int32_t in_threads(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* of_body) {
  std::vector<std::thread> threads;
  for (int64_t n = begin; n < end; ++n) threads.emplace_back(body, n, n + 1, of_body);
  for (std::thread& thread : threads) thread.join();
  return 0;
}
int32_t one_after_another(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* of_body) {
  for (int64_t n = end; n > begin; --n) body(n - 1, n, of_body);
  return 0;
}
int32_t refuses(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*) { return 1; }

struct Pool {
  dk_parallel_for parallel_for;
  int32_t threads;
};

// The first is what the others are compared with.
std::vector<Pool> pools = {{nullptr, 1}};

// ---- cases

struct Isa {
  int32_t number;
  const char* name;
};
std::vector<Isa> isas;

// With the tolerance, in those of the first: how far an exponent magnifies what fp32 makes of a cosine or a distance.
struct Potential {
  const char* name;
  exact::Potential is;
  double sensitivity;
};
const std::vector<Potential> kPotentials = {
    {"angular_spread, fit", {DK_ANGULAR_SPREAD, {1.0, 0.25, 0.01}}, 1},
    {"orthogonalization, fit", {DK_ORTHOGONALIZATION, {0.5, 0.25, 0.01}}, 1},
    {"decorrelation", {DK_DECORRELATION, {}}, 1},
    {"uniformity", {DK_UNIFORMITY, {2.0}}, 1},
    {"angular_spread, arccos", {DK_ANGULAR_SPREAD, {0.1, 0.25, 0.0}}, 10},
    {"orthogonalization, arccos", {DK_ORTHOGONALIZATION, {0.9, 0.0, 0.01}}, 10},
    // Until here, those of which pairs are sampled.
    {"angular_spread, online", {DK_ANGULAR_SPREAD, {1e-3, 0.25, 0.0}}, 300},
    {"uniformity, online", {DK_UNIFORMITY, {100.0}}, 100},
    {"l2_repel", {DK_L2_REPEL, {1.0, 0.01, 0.1, 0.0}}, 10},
    {"l2_repel, diagonal", {DK_L2_REPEL, {50.0, 0.01, 0.0, 1.0}}, 10},
    {"dispersive_l2", {DK_DISPERSIVE_L2, {1.0, 1.0}}, 1},
    {"dispersive_l2, no diagonal", {DK_DISPERSIVE_L2, {0.01, 0.0}}, 100},
};
constexpr size_t kSampledPotentials = 6;

// Below, at and beyond vectors and panels.
constexpr int64_t kFeatures[] = {3, 7, 8, 9, 16, 23, 24, 25, 31, 32, 33, 48, 64, 72, 95, 96, 97};

int64_t features_for(size_t number) { return kFeatures[number % (sizeof kFeatures / sizeof *kFeatures)]; }

std::vector<int64_t> sizes(int step) {
  std::set<int64_t> all = {1, 2, 3};
  for (const int64_t panel : {24, 32})
    for (int64_t near = panel; near <= dk::kLargestTile + 1; near += panel)
      for (int64_t size = near - 1; size <= near + 1; ++size)
        if (size <= dk::kLargestTile) all.insert(size);
  for (int64_t size = 241; size <= dk::kLargestTile; ++size) all.insert(size);
  std::vector<int64_t> some;
  int n = 0;
  for (const int64_t size : all)
    if (n++ % step == 0) some.push_back(size);
  if (some.back() != dk::kLargestTile) some.push_back(dk::kLargestTile);
  return some;
}

// `grad` and `scale` against the exact gradient in the rows of `touched`; the others are as they were allocated.
void compare(const std::vector<double>& loss, const std::vector<float>& grad, const std::vector<float>& scale,
             const exact::Answer& answer, const std::vector<bool>& touched, double loss_tolerance,
             double grad_tolerance) {
  for (size_t s = 0; s < loss.size(); ++s) {
    const double error = fabs(loss[s] - answer.loss[s]) / std::max(1.0, fabs(answer.loss[s])) / loss_tolerance;
    if (!(error <= 1.0)) fail(format("loss %zu is %.9g, exactly %.9g", s, loss[s], answer.loss[s]));
    worst_loss = std::max(worst_loss, error);
  }
  if (grad.empty()) return;
  const size_t features = grad.size() / scale.size();
  double largest = 1e-30;
  for (const double value : answer.grad) largest = std::max(largest, fabs(value));
  for (size_t n = 0; n < grad.size(); ++n) {
    if (!touched[n / features]) {
      uint32_t bits[2];
      memcpy(&bits[0], &grad[n], sizeof bits[0]);
      memcpy(&bits[1], &scale[n / features], sizeof bits[1]);
      if (~bits[0] || ~bits[1]) fail(format("row %zu was written to", n / features));
      continue;
    }
    const double error = fabs(double(grad[n]) * scale[n / features] - answer.grad[n]) / largest / grad_tolerance;
    if (!(error <= 1.0))
      fail(format("gradient of row %zu, feature %zu is %.9g, exactly %.9g, the largest %.9g", n / features, n % features,
                  double(grad[n]) * scale[n / features], answer.grad[n], largest));
    worst_grad = std::max(worst_grad, error);
  }
}

// All pairs of the segments; `order` empty: token i is row i.
void check_dispersion(const Potential& potential, const Tokens& z, const std::vector<int64_t>& order,
                      const std::vector<exact::Segment>& segments, int64_t sequences) {
  const std::string of_case = context;
  const double weight = 0.5;
  std::vector<int64_t> rows = order;
  if (order.empty()) {
    rows.resize(size_t(z.rows));
    std::iota(rows.begin(), rows.end(), 0);
  }
  const exact::Answer answer = exact::dispersion(potential.is, z.values, z.features, rows, segments, sequences, weight);
  std::vector<bool> touched(size_t(z.rows), false);
  for (const int64_t row : rows) touched[size_t(row)] = true;
  std::vector<int64_t> begin, end, sequence;
  for (const exact::Segment& segment : segments) {
    begin.push_back(segment.begin);
    end.push_back(segment.end);
    sequence.push_back(segment.sequence);
  }
  const Buffer<int64_t> index(order), begins(begin), ends(end), of_sequence(sequence);
  const Buffer<double> params(potential.is.params);
  for (const Isa& isa : isas) {
    for (const bool gradient : {true, false}) {
      std::string first;
      for (const Pool& pool : pools) {
        context = of_case + format(", %s, %d threads%s", isa.name, pool.threads, gradient ? "" : ", no gradient");
        const Buffer<double> loss(static_cast<size_t>(sequences));
        const Buffer<float> total(1), grad(gradient ? size_t(z.rows * z.features) : 0),
            scale(gradient ? size_t(z.rows) : 0);
        dk_args args = {};
        args.abi_version = DK_ABI_VERSION;
        args.isa = isa.number;
        args.parallel_for = pool.parallel_for;
        args.threads = pool.threads;
        args.dtype = z.dtype;
        args.z = z.memory.address();
        args.row_stride = z.stride;
        args.rows = z.rows;
        args.index = order.empty() ? nullptr : index.data();
        args.tokens = int64_t(rows.size());
        args.features = z.features;
        args.begins = begins.data();
        args.ends = ends.data();
        args.sequence = of_sequence.data();
        args.segments = int64_t(segments.size());
        args.sequences = sequences;
        args.params = params.data();
        args.weight = weight;
        args.potential = potential.is.kind;
        args.grad = gradient ? grad.data() : nullptr;
        args.scale = gradient ? scale.data() : nullptr;
        args.loss = loss.data();
        args.total = total.data();
        expect_status(dk_dispersion(&args), DK_OK);
        const std::string bits = loss.bits() + total.bits() + grad.bits() + scale.bits();
        if (first.empty()) {
          first = bits;
          compare(loss.values(), grad.values(), scale.values(), answer, touched,
                  1e-6 * std::max(1.0, 0.1 * potential.sensitivity), 5e-6 * potential.sensitivity);
        } else if (bits != first) {
          fail("differs from one thread");
        }
      }
    }
  }
  context = of_case;
}

// One segment, by which a call takes few tokens.
void check_sizes(int step) {
  size_t number = 0;
  for (const int64_t size : sizes(step))
    for (const Potential& potential : kPotentials) {
      const int64_t features = features_for(number), extra = number % 3 == 0 ? 3 : 0;
      const int32_t dtype = int32_t(number / 2 % 3);
      const Tokens z(dtype, size + extra, features, features + (number % 2 ? 5 : 0), number % 5 == 0);
      context = format("%s, %s, one segment of %d, %d features", potential.name, kDtypes[dtype], int(size), int(features));
      std::vector<int64_t> order;
      if (extra) {
        order = shuffled(z.rows);
        order.resize(size_t(size));
      }
      check_dispersion(potential, z, order, {{0, size, 0}}, 1);
      ++number;
    }
}

// From 4,096 tokens on, by which tiles are longer: a sequence of every size, and some of several tiles.
void check_long_tiles(int step) {
  size_t number = 0;
  for (const Potential& potential : kPotentials) {
    std::vector<exact::Segment> segments;
    int64_t begin = 0;
    std::vector<int64_t> lengths = sizes(step);
    for (const int64_t length : {257, 513}) lengths.push_back(length);
    while (std::accumulate(lengths.begin(), lengths.end(), int64_t(0)) < 4096) lengths.push_back(9);
    for (const int64_t length : lengths) {
      segments.push_back({begin, begin + length, int64_t(segments.size())});
      begin += length;
    }
    const int64_t features = features_for(number);
    const Tokens z(int32_t(number % 3), begin, features, features, number % 2);
    context = format("%s, %d tokens, %d features", potential.name, int(begin), int(features));
    check_dispersion(potential, z, {}, segments, int64_t(segments.size()));
    ++number;
  }
}

// Short segments that share a tile, empty ones, ones without a pair, and gaps.
void check_bundles() {
  size_t number = 0;
  for (const Potential& potential : kPotentials)
    for (const bool gathered : {false, true}) {
      std::vector<exact::Segment> segments;
      int64_t begin = 2;
      for (const int64_t length : {1, 0, 5, 40, 1, 2, 23, 24, 25, 7, 1, 33, 64, 3, 0, 2, 48, 47, 31, 32, 16, 300, 1, 2}) {
        segments.push_back({begin, begin + length, int64_t(segments.size() / 4)});
        begin += length + (length == 5 ? 2 : 0);
      }
      const int64_t features = features_for(5 * number + 1), tokens = begin + 3;
      const Tokens z(int32_t(number % 3), gathered ? 2 * tokens : tokens, features, features + 1, number % 4 == 0);
      std::vector<int64_t> order;
      if (gathered) {
        order = shuffled(z.rows);
        order.resize(size_t(tokens));
      }
      context = format("%s, bundles, %d features%s", potential.name, int(features), gathered ? ", gathered" : "");
      check_dispersion(potential, z, order, segments, 7);
      ++number;
    }
}

// Populations of each layer, of rows in random order.
struct Sample {
  std::vector<std::vector<int64_t>> blocks;  // of each population: their sizes
  bool visited;
};

// `more`: without a gradient, too.
void check_sampled(const Potential& potential, const Sample& sample, int32_t dtype, int64_t features, int64_t layers,
                   bool odd, bool more) {
  const std::string of_case = context;
  const int64_t of_layer = std::accumulate(
      sample.blocks.begin(), sample.blocks.end(), int64_t(0),
      [](int64_t total, const std::vector<int64_t>& population) { return std::accumulate(population.begin(), population.end(), total); });
  const bool all_rows = features % 2 == 0;
  const int64_t rows = of_layer + (all_rows ? 0 : 3), stride = features + (odd ? 2 : 0);
  std::vector<Tokens*> tokens;
  std::vector<double> values;
  std::vector<const void*> addresses;
  for (int64_t l = 0; l < layers; ++l) {
    tokens.push_back(new Tokens(dtype, rows, features, stride, odd));
    values.insert(values.end(), tokens.back()->values.begin(), tokens.back()->values.end());
    addresses.push_back(tokens.back()->memory.address());
  }

  // A sequence a population. Where no pair is visited and all rows take part, they are in their order.
  std::vector<int64_t> order, populations = {0}, blocks = {0}, sequence, pairs;
  std::vector<double> shares;
  std::vector<exact::Population> of_exact;
  for (int64_t l = 0; l < layers; ++l) {
    std::vector<int64_t> of_rows = shuffled(rows);
    if (!sample.visited && all_rows) std::iota(of_rows.begin(), of_rows.end(), 0);
    for (int64_t i = 0; i < of_layer; ++i) order.push_back(l * rows + of_rows[size_t(i)]);
    for (const std::vector<int64_t>& population : sample.blocks) {
      exact::Population of_population = {populations.back(), populations.back(), int64_t(sequence.size()), {}, 0.0};
      double visited = 0.0;
      if (sample.visited) of_population.blocks.push_back(of_population.begin);
      for (const int64_t size : population) {
        of_population.end += size;
        visited += double(size) * double(size - 1);
        blocks.push_back(of_population.end);
        if (sample.visited) of_population.blocks.push_back(of_population.end);
      }
      const int64_t length = of_population.end - of_population.begin;
      sequence.push_back(of_population.sequence);
      pairs.push_back(length * (length - 1));
      of_population.inverse_probability = sample.visited && visited > 0.0 ? double(pairs.back()) / visited : 0.0;
      shares.push_back(of_population.inverse_probability);
      populations.push_back(of_population.end);
      of_exact.push_back(of_population);
    }
  }
  const bool in_order = !sample.visited && all_rows;

  // Draws, and the rows that they are.
  std::vector<float> draw;
  std::vector<std::vector<int64_t>> fit(static_cast<size_t>(layers));
  for (int64_t l = 0; l < layers; ++l)
    for (int g = 0; g < dk::kFitGroups; ++g) {
      draw.push_back(g == 0 ? 0.0f : g == 1 ? 0.99999994f : float(uniform()));
      const int64_t token = l * of_layer + int64_t(draw.back() * float(of_layer));
      const int64_t population = std::upper_bound(populations.begin(), populations.end() - 1, token) - populations.begin() - 1;
      const int64_t length = populations[size_t(population) + 1] - populations[size_t(population)];
      for (int t = 0; t < dk::kFitTokens; ++t) {
        draw.push_back(t == 0 ? 0.0f : t == 1 ? 0.99999994f : float(uniform()));
        const int64_t within = std::min(int64_t(draw.back() * float(length)), length - 1);
        fit[size_t(l)].push_back(order[size_t(populations[size_t(population)] + within)]);
      }
    }

  const size_t all = size_t(layers * rows);
  std::vector<bool> touched(all, false);
  for (const int64_t row : order) touched[size_t(row)] = true;
  const Buffer<const void*> of_layers(addresses);
  const Buffer<int64_t> ordered(order), bounds(populations), of_blocks(blocks), of_sequence(sequence), of_pairs(pairs);
  const Buffer<double> share(shares), params(potential.is.params);
  const Buffer<float> draws(draw);
  for (const bool model : {false, true}) {
    if (!sample.visited && !model) continue;
    const exact::Answer answer =
        exact::sampled(potential.is, values, features, layers, order, of_exact, pairs, model, fit);
    for (const Isa& isa : isas)
      for (const bool gradient : {true, false}) {
        if (!gradient && !more) continue;
        std::string first;
        for (const Pool& pool : pools) {
          context = of_case + format(", %s, %s, %d threads%s", model ? "low rank" : "no model", isa.name,
                                     pool.threads, gradient ? "" : ", no gradient");
          const Buffer<double> loss(pairs.size()), per_pair(pairs.size());
          const Buffer<float> grad(gradient ? all * size_t(features) : 0), scale(gradient ? all : 0);
          dk_sampled_args args = {};
          args.abi_version = DK_ABI_VERSION;
          args.isa = isa.number;
          args.parallel_for = pool.parallel_for;
          args.threads = pool.threads;
          args.dtype = dtype;
          args.layers = of_layers.data();
          args.layer_count = layers;
          args.rows = rows;
          args.row_stride = stride;
          args.features = features;
          args.order = in_order ? nullptr : ordered.data();
          args.tokens = int64_t(order.size());
          args.populations = bounds.data();
          args.population_count = int64_t(populations.size()) - 1;
          args.blocks = sample.visited ? of_blocks.data() : nullptr;
          args.block_count = sample.visited ? int64_t(blocks.size()) - 1 : 0;
          args.inverse_probability = share.data();
          args.sequence = of_sequence.data();
          args.pairs = of_pairs.data();
          args.sequence_count = int64_t(pairs.size());
          args.params = params.data();
          args.potential = potential.is.kind;
          args.draws = model ? draws.data() : nullptr;
          args.fit_groups = dk::kFitGroups;
          args.fit_tokens = dk::kFitTokens;
          args.loss = loss.data();
          args.per_pair = per_pair.data();
          args.grad = gradient ? grad.data() : nullptr;
          args.scale = gradient ? scale.data() : nullptr;
          expect_status(dk_sampled(&args), DK_OK);
          const std::string bits = loss.bits() + per_pair.bits() + grad.bits() + scale.bits();
          if (first.empty()) {
            first = bits;
            // What fp32 makes of the fit of low rank is another model, as good.
            compare(loss.values(), grad.values(), scale.values(), answer, touched, 2e-5 * potential.sensitivity,
                    (model ? 2e-4 : 2e-5) * potential.sensitivity);
          } else if (bits != first) {
            fail("differs from one thread");
          }
        }
      }
  }
  for (Tokens* of_one : tokens) delete of_one;
  context = of_case;
}

// A population of blocks of a size, and one of a block that is all of it, and an empty one.
void check_blocks(int step) {
  size_t number = 0;
  for (const int64_t size : sizes(step)) {
    if (size < 2) continue;
    const Potential& potential = kPotentials[number % kSampledPotentials];
    const int64_t features = features_for(5 * number + 3), layers = 1 + int64_t(number / 2 % 2);
    context = format("%s, blocks of %d, %d features, %d layers", potential.name, int(size), int(features), int(layers));
    check_sampled(potential, {{{size, size - 1}, {}, {size}}, true}, int32_t(number % 3), features, layers,
                  number % 4 == 1, number % 4 == 2);
    ++number;
  }
  // Blocks of all sizes, several of which fill a panel, and those of a population of several chunks.
  for (const Potential& potential : kPotentials) {
    if (&potential - kPotentials.data() >= ptrdiff_t(kSampledPotentials)) break;
    const int64_t features = features_for(7 * number + 2);
    context = format("%s, ragged blocks, %d features", potential.name, int(features));
    check_sampled(potential, {{{1, 2, 3, 9, 8, 15, 16, 17, 24, 7, 32, 33, 1}, {2}, {1}, {16, 256, 20, 23, 31}}, true},
                  int32_t(number % 3), features, 1 + int64_t(number % 2), number % 3 == 1, false);
    ++number;
  }
}

// No pair is visited.
void check_expanded() {
  size_t number = 0;
  for (const int64_t size : {2, 31, 63, 64, 65, 255, 256, 257, 530})
    for (const int64_t layers : {1, 2}) {
      const Potential& potential = kPotentials[number % kSampledPotentials];
      const int64_t features = features_for(3 * number + 1);
      context = format("%s, no blocks, %d tokens, %d features", potential.name, int(size), int(features));
      check_sampled(potential, {{{size}, {40}, {}}, false}, int32_t(number % 3), features, layers, number % 4 == 1,
                    number % 4 == 2);
      ++number;
    }
}

// ---- the last pass

void check_scale() {
  for (const Isa& isa : isas)
    for (const int32_t dtype : {DK_FLOAT32, DK_BFLOAT16, DK_FLOAT16})
      for (const int64_t features : {1, 3, 7, 8, 15, 16, 17, 33, 4096})
        for (const int64_t rows_per_factor : {1, 4, 12})
          for (const bool in_place : {false, true}) {
            if (in_place && dtype != DK_FLOAT32) continue;
            const int64_t layers = 3, rows = 12;
            std::vector<float> values(size_t(rows * features)), scales(size_t(layers * rows)),
                factors(size_t(rows / rows_per_factor));
            for (std::vector<float>* numbers : {&values, &scales, &factors})
              for (float& value : *numbers) value = float(normal());
            const Buffer<float> scale(scales), factor(factors);
            for (const Pool& pool : pools) {
              context = format("scale, %s, %s, %d features, %d rows a factor, %d threads", isa.name, kDtypes[dtype],
                               int(features), int(rows_per_factor), pool.threads);
              const Buffer<float> first(values), last(values);
              const Buffer<char> first_out(size_t(rows * features * size_of(dtype))),
                  last_out(size_t(rows * features * size_of(dtype)));
              const Buffer<const float*> grads(std::vector<const float*>{first.data(), nullptr, last.data()});
              const Buffer<void*> out(in_place ? std::vector<void*>{first.data(), nullptr, last.data()}
                                               : std::vector<void*>{first_out.data(), nullptr, last_out.data()});
              dk_scale_args args = {};
              args.abi_version = DK_ABI_VERSION;
              args.isa = isa.number;
              args.parallel_for = pool.parallel_for;
              args.threads = pool.threads;
              args.dtype = dtype;
              args.grads = grads.data();
              args.scale = scale.data();
              args.factor = factor.data();
              args.layer_count = layers;
              args.rows = rows;
              args.features = features;
              args.rows_per_factor = rows_per_factor;
              args.out = out.data();
              expect_status(dk_scale(&args), DK_OK);
              // Half a population in the last place, and fp32's rounding of the factor; half one of fp16's subnormal numbers.
              const double relative = ldexp(1.0, dtype == DK_FLOAT32 ? -24 : dtype == DK_BFLOAT16 ? -8 : -11) + 2e-7;
              const double absolute = dtype == DK_FLOAT16 ? ldexp(1.0, -25) : 1e-38;
              for (const int64_t l : {0, 2})
                for (int64_t n = 0; n < rows * features; ++n) {
                  const double expected = double(values[size_t(n)]) * scales[size_t(l * rows + n / features)] *
                                          factors[size_t(n / features / rows_per_factor)];
                  const double got = value_at(out.data()[l], n, dtype);
                  if (!(fabs(got - expected) <= relative * fabs(expected) + absolute))
                    fail(format("element %d of layer %d is %.9g, exactly %.9g", int(n), int(l), got, expected));
                }
            }
          }
}

// ---- the histogram of cosines

// Cosines of each text's pairs, in float64: for each text and part, in ascending order.
std::vector<std::vector<double>> exact_cosines(const Tokens& z, const std::vector<int64_t>& order,
                                               const std::vector<int64_t>& begins, const std::vector<int64_t>& splits,
                                               const std::vector<int64_t>& ends) {
  std::vector<std::vector<double>> parts(2 * begins.size());
  const auto dot = [&](int64_t a, int64_t b) {
    double total = 0.0;
    for (int64_t f = 0; f < z.features; ++f) total += z.values[size_t(a * z.features + f)] * z.values[size_t(b * z.features + f)];
    return total;
  };
  for (size_t text = 0; text < begins.size(); ++text)
    for (int64_t i = begins[text]; i < ends[text]; ++i)
      for (int64_t j = i + 1; j < ends[text]; ++j) {
        const int64_t a = order[size_t(i)], b = order[size_t(j)];
        const double norms = sqrt(dot(a, a) * dot(b, b));
        parts[2 * text + size_t(i >= splits[text])].push_back(norms > 0.0 ? dot(a, b) / norms : 0.0);
      }
  for (std::vector<double>& part : parts) std::sort(part.begin(), part.end());
  return parts;
}

void check_cosines_of(const std::vector<int64_t>& lengths, int32_t dtype, int64_t features, bool strided, bool odd) {
  std::vector<int64_t> begins, splits, ends;
  int64_t tokens = 1;  // the first token is of no text
  for (const int64_t length : lengths) {
    begins.push_back(tokens);
    splits.push_back(tokens + int64_t(uniform() * double(length + 1)));
    tokens += length;
    ends.push_back(tokens);
  }
  const int64_t rows = tokens + 3;
  const Tokens z(dtype, rows, features, strided ? features + 5 : features, odd);
  std::vector<int64_t> order = shuffled(rows);
  order.resize(size_t(tokens));
  const auto expected = exact_cosines(z, order, begins, splits, ends);
  const Buffer<int64_t> of_order(order), of_begins(begins), of_splits(splits), of_ends(ends);
  const std::string of_case = context;
  for (const Isa& isa : isas) {
    std::string first;
    for (const Pool& pool : pools) {
      context = of_case + format(", %s, %s, %d threads", isa.name, kDtypes[dtype], pool.threads);
      const Buffer<int64_t> counts(lengths.size() * 2 * DK_COSINE_BINS);
      const Buffer<double> sums(lengths.size() * 4);
      dk_cosines_args args = {};
      args.abi_version = DK_ABI_VERSION;
      args.isa = isa.number;
      args.parallel_for = pool.parallel_for;
      args.threads = pool.threads;
      args.dtype = dtype;
      args.z = z.memory.address();
      args.row_stride = z.stride;
      args.rows = rows;
      args.order = of_order.data();
      args.tokens = tokens;
      args.features = features;
      args.begins = of_begins.data();
      args.splits = of_splits.data();
      args.ends = of_ends.data();
      args.texts = int64_t(lengths.size());
      args.counts = counts.data();
      args.sums = sums.data();
      expect_status(dk_cosines(&args), DK_OK);
      const std::string bits = counts.bits() + sums.bits();
      if (first.empty()) {
        first = bits;
        for (size_t part = 0; part < expected.size(); ++part) {
          // A cosine may be in error by this much, and in the bin beside its own.
          constexpr double kError = 2e-6;
          const std::vector<double>& exact = expected[part];
          const auto below = [&](double bound) {
            return int64_t(std::lower_bound(exact.begin(), exact.end(), bound) - exact.begin());
          };
          int64_t total = 0;
          for (int bin = 0; bin < DK_COSINE_BINS; ++bin) {
            total += counts.data()[part * DK_COSINE_BINS + size_t(bin)];
            const double edge = -1.0 + 2.0 * (bin + 1) / DK_COSINE_BINS;
            const bool last = bin + 1 == DK_COSINE_BINS;
            const int64_t least = last ? int64_t(exact.size()) : below(edge - kError);
            const int64_t most = last ? int64_t(exact.size()) : below(edge + kError);
            if (total < least || total > most)
              fail(format("part %zu has %lld pairs up to bin %d, exactly %lld to %lld", part, (long long)total, bin,
                          (long long)least, (long long)most));
          }
          double sum = 0.0, squares = 0.0;
          for (const double c : exact) {
            sum += c;
            squares += c * c;
          }
          const double* found = sums.data() + 2 * part;
          if (!(fabs(found[0] - sum) <= kError * double(exact.size()) && fabs(found[1] - squares) <= 2 * kError * double(exact.size())))
            fail(format("part %zu has sums %.9g and %.9g, exactly %.9g and %.9g", part, found[0], found[1], sum, squares));
        }
      } else if (bits != first) {
        fail("differs from one thread");
      }
    }
  }
  context = of_case;
}

// A text of a size beside one of two tokens and an empty one; and short texts of all sizes around a panel.
void check_cosines(int step) {
  size_t number = 0;
  std::vector<int64_t> all = sizes(step);
  for (const int64_t size : {257, 300, 511}) all.push_back(size);
  for (const int64_t size : all) {
    const int64_t features = features_for(3 * number + 2);
    context = format("cosines of %d tokens, %d features", int(size), int(features));
    check_cosines_of({size, 0, 2, 1}, int32_t(number % 3), features, number % 4 == 1, number % 4 == 2);
    ++number;
  }
  context = "cosines of short texts";
  check_cosines_of({1, 2, 3, 31, 32, 33, 23, 24, 25, 5, 5, 5}, DK_FLOAT32, 33, false, false);
}

// ---- moments of the features

void check_moments_of(int64_t tokens, int32_t dtype, int64_t features, int64_t block_rows, bool strided, bool odd) {
  const int64_t rows = tokens + 3;
  const Tokens z(dtype, rows, features, strided ? features + 5 : features, odd);
  std::vector<int64_t> order = shuffled(rows);
  order.resize(size_t(tokens));
  std::vector<float> shifts;
  for (int64_t k = 0; k < features; ++k) shifts.push_back(float(normal()));
  const Buffer<int64_t> of_order(order);
  const Buffer<float> shift(shifts);
  const auto x = [&](int64_t t, int64_t k) {
    return double(float(z.values[size_t(order[size_t(t)] * features + k)]) - shifts[size_t(k)]);
  };
  const std::string of_case = context;
  for (const Isa& isa : isas) {
    std::string first;
    for (const Pool& pool : pools) {
      context = of_case + format(", %s, %s, %d threads", isa.name, kDtypes[dtype], pool.threads);
      const Buffer<double> total(std::vector<double>(size_t(features), 1.0)), norms(std::vector<double>{2.0});
      std::vector<Buffer<double>*> blocks;
      std::vector<double*> addresses;
      for (int64_t k = 0; k < features; k += block_rows) {
        const int64_t height = std::min(block_rows, features - k);
        blocks.push_back(new Buffer<double>(std::vector<double>(size_t(height * (features - k)), 3.0)));
        addresses.push_back(blocks.back()->data());
      }
      const Buffer<double*> of_blocks(addresses);
      dk_moments_args args = {};
      args.abi_version = DK_ABI_VERSION;
      args.isa = isa.number;
      args.parallel_for = pool.parallel_for;
      args.threads = pool.threads;
      args.dtype = dtype;
      args.z = z.memory.address();
      args.row_stride = z.stride;
      args.rows = rows;
      args.order = of_order.data();
      args.tokens = tokens;
      args.features = features;
      args.shift = shift.data();
      args.block_rows = block_rows;
      args.total = total.data();
      args.blocks = of_blocks.data();
      args.norms = norms.data();
      expect_status(dk_moments(&args), DK_OK);
      std::string bits = total.bits() + norms.bits();
      for (const Buffer<double>* block : blocks) bits += block->bits();
      if (first.empty()) {
        first = bits;
        const auto expect = [&](const char* what, int64_t i, int64_t j, double found, double exact, double size) {
          if (!(fabs(found - exact) <= 1e-6 * size + 1e-9))
            fail(format("%s %d, %d is %.9g, exactly %.9g", what, int(i), int(j), found, exact));
        };
        double all_norms = 2.0;
        for (int64_t t = 0; t < tokens; ++t) {
          double square = 0.0;
          for (int64_t k = 0; k < features; ++k) {
            const double value = z.values[size_t(order[size_t(t)] * features + k)];
            square += value * value;
          }
          all_norms += sqrt(square);
        }
        expect("norms", 0, 0, norms.data()[0], all_norms, all_norms);
        for (int64_t i = 0; i < features; ++i) {
          double sum = 1.0, size = 1.0;
          for (int64_t t = 0; t < tokens; ++t) sum += x(t, i), size += fabs(x(t, i));
          expect("total", i, i, total.data()[i], sum, size);
          for (int64_t j = i / block_rows * block_rows; j < features; ++j) {
            double product = 3.0, sizes = 3.0;
            for (int64_t t = 0; t < tokens && j >= i; ++t) product += x(t, i) * x(t, j), sizes += fabs(x(t, i) * x(t, j));
            const int64_t block = i / block_rows, begin = block * block_rows;
            const double found = addresses[size_t(block)][(i - begin) * (features - begin) + j - begin];
            expect("product", i, j, found, product, sizes);
          }
        }
      } else if (bits != first) {
        fail("differs from one thread");
      }
      for (const Buffer<double>* block : blocks) delete block;
    }
  }
  context = of_case;
}

// Features around the panels and tiles; tokens of one and of several chunks.
void check_moments() {
  size_t number = 0;
  for (const int64_t features : {1, 23, 24, 25, 32, 33, 97, 257, 265})
    for (const int64_t tokens : {0, 1, 31, 33, 513}) {
      if (features * tokens > 100000) continue;
      context = format("moments of %d tokens, %d features", int(tokens), int(features));
      check_moments_of(tokens, int32_t(number % 3), features, number % 2 ? 10 : 300, number % 4 == 1, number % 4 == 2);
      ++number;
    }
  context = "moments of many chunks";
  check_moments_of(1600, DK_FLOAT32, 40, 16, false, false);
}

// ---- what a call refuses

void check_refusals() {
  const Tokens z(DK_FLOAT32, 96, 8, 8, false);
  const Buffer<double> params(std::vector<double>{1.0, 0.25, 0.01}), wrong_params(std::vector<double>{0.0, 0.25, 0.01});
  const Buffer<double> loss(1), per_pair(1), share(std::vector<double>{3.0});
  const Buffer<float> grad(96 * 8), scale(96), short_rows(size_t(2) * dk::kFitGroups * (1 + dk::kFitTokens));
  const Buffer<int64_t> zero(std::vector<int64_t>{0}), one(std::vector<int64_t>{1}), count(std::vector<int64_t>{96}),
      too_many(std::vector<int64_t>{97}), below(std::vector<int64_t>{-1}), pairs(std::vector<int64_t>{96 * 95});
  std::vector<int64_t> identity(96);
  std::iota(identity.begin(), identity.end(), 0);
  const Buffer<int64_t> order(identity);
  identity[95] = 96;
  const Buffer<int64_t> beyond(identity);
  identity[95] = -1;
  const Buffer<int64_t> before(identity);

  const auto all_pairs = [&](const char* what, int32_t status, const auto& change) {
    context = std::string("dispersion refuses ") + what;
    dk_args args = {};
    args.abi_version = DK_ABI_VERSION;
    args.threads = 1;
    args.z = z.memory.address();
    args.row_stride = args.features = 8;
    args.rows = args.tokens = 96;
    args.begins = args.sequence = zero.data();
    args.ends = count.data();
    args.segments = args.sequences = 1;
    args.params = params.data();
    args.weight = 1.0;
    args.grad = grad.data();
    args.scale = scale.data();
    args.loss = loss.data();
    change(args);
    expect_status(dk_dispersion(&args), status);
  };
  all_pairs("nothing", DK_OK, [](dk_args&) {});
  all_pairs("another version", DK_INVALID, [](dk_args& args) { ++args.abi_version; });
  all_pairs("an unknown instruction set", DK_UNSUPPORTED, [](dk_args& args) { args.isa = 9; });
  all_pairs("an unknown dtype", DK_INVALID, [](dk_args& args) { args.dtype = 3; });
  all_pairs("an unknown potential", DK_INVALID, [](dk_args& args) { args.potential = 9; });
  all_pairs("a temperature of 0", DK_INVALID, [&](dk_args& args) { args.params = wrong_params.data(); });
  all_pairs("no features", DK_INVALID, [](dk_args& args) { args.features = 0; });
  all_pairs("more tokens than rows", DK_INVALID, [](dk_args& args) { args.rows = 95; });
  all_pairs("an index beyond the rows", DK_INVALID, [&](dk_args& args) { args.index = beyond.data(); });
  all_pairs("a negative index", DK_INVALID, [&](dk_args& args) { args.index = before.data(); });
  all_pairs("a segment beyond the tokens", DK_INVALID, [&](dk_args& args) { args.ends = too_many.data(); });
  all_pairs("a segment before them", DK_INVALID, [&](dk_args& args) { args.begins = below.data(); });
  all_pairs("a sequence beyond the losses", DK_INVALID, [&](dk_args& args) { args.sequence = one.data(); });
  all_pairs("a negative sequence", DK_INVALID, [&](dk_args& args) { args.sequence = below.data(); });

  std::vector<float> drawn(size_t(dk::kFitGroups) * (1 + dk::kFitTokens), 0.5f);
  const Buffer<float> draws(drawn);
  const auto drawn_with = [&](float value) {
    drawn[40] = value;
    return drawn;
  };
  const Buffer<float> of_one(drawn_with(1.0f)), negative(drawn_with(-0.1f)), nan(drawn_with(NAN));
  const Buffer<const void*> layers(std::vector<const void*>{z.memory.address()});
  const auto list = [](std::vector<int64_t> values) { return values; };
  const Buffer<int64_t> populations(list({0, 96})), populations_beyond(list({0, 97})), populations_reversed(list({96, 0})),
      blocks(list({0, 32, 64, 96})), short_blocks(list({0, 32, 64, 80})), late(list({8, 32, 64, 96})),
      reversed(list({0, 64, 32, 96})), blocks_beyond(list({0, 32, 64, 97})), none(list({0, 0}));
  const auto some = [&](const char* what, int32_t status, const auto& change) {
    context = std::string("sampled refuses ") + what;
    dk_sampled_args args = {};
    args.abi_version = DK_ABI_VERSION;
    args.threads = 1;
    args.layers = layers.data();
    args.layer_count = 1;
    args.rows = args.tokens = 96;
    args.row_stride = args.features = 8;
    args.order = order.data();
    args.populations = populations.data();
    args.population_count = 1;
    args.blocks = blocks.data();
    args.block_count = 3;
    args.inverse_probability = share.data();
    args.sequence = zero.data();
    args.pairs = pairs.data();
    args.sequence_count = 1;
    args.params = params.data();
    args.draws = draws.data();
    args.fit_groups = dk::kFitGroups;
    args.fit_tokens = dk::kFitTokens;
    args.loss = loss.data();
    args.per_pair = per_pair.data();
    args.grad = grad.data();
    args.scale = scale.data();
    change(args);
    expect_status(dk_sampled(&args), status);
  };
  some("nothing", DK_OK, [](dk_sampled_args&) {});
  some("another version", DK_INVALID, [](dk_sampled_args& args) { ++args.abi_version; });
  some("an unknown dtype", DK_INVALID, [](dk_sampled_args& args) { args.dtype = -1; });
  some("no layer", DK_INVALID, [](dk_sampled_args& args) { args.layer_count = 0; });
  some("an order beyond the rows", DK_INVALID, [&](dk_sampled_args& args) { args.order = beyond.data(); });
  some("a negative order", DK_INVALID, [&](dk_sampled_args& args) { args.order = before.data(); });
  some("populations beyond the tokens", DK_INVALID, [&](dk_sampled_args& args) { args.populations = populations_beyond.data(); });
  some("populations in reverse", DK_INVALID, [&](dk_sampled_args& args) { args.populations = populations_reversed.data(); });
  some("a sequence beyond the losses", DK_INVALID, [&](dk_sampled_args& args) { args.sequence = one.data(); });
  some("blocks that end early", DK_INVALID, [&](dk_sampled_args& args) { args.blocks = short_blocks.data(); });
  some("blocks that begin late", DK_INVALID, [&](dk_sampled_args& args) { args.blocks = late.data(); });
  some("blocks in reverse", DK_INVALID, [&](dk_sampled_args& args) { args.blocks = reversed.data(); });
  some("blocks beyond the tokens", DK_INVALID, [&](dk_sampled_args& args) { args.blocks = blocks_beyond.data(); });
  some("no pairs and no model", DK_INVALID, [](dk_sampled_args& args) {
    args.draws = nullptr;
    args.block_count = 0;
  });
  some("other groups than its own", DK_INVALID, [](dk_sampled_args& args) { args.fit_groups = 2; });
  some("a draw of 1", DK_INVALID, [&](dk_sampled_args& args) { args.draws = of_one.data(); });
  some("a negative draw", DK_INVALID, [&](dk_sampled_args& args) { args.draws = negative.data(); });
  some("a draw that is NaN", DK_INVALID, [&](dk_sampled_args& args) { args.draws = nan.data(); });
  some("draws without tokens", DK_INVALID, [&](dk_sampled_args& args) {
    args.tokens = args.block_count = 0;
    args.populations = none.data();
  });
  const Buffer<int64_t> histogram(2 * DK_COSINE_BINS);
  const Buffer<double> sums(4);
  const auto cosines = [&](const char* what, int32_t status, const auto& change) {
    context = std::string("cosines refuses ") + what;
    dk_cosines_args args = {};
    args.abi_version = DK_ABI_VERSION;
    args.threads = 1;
    args.z = z.memory.address();
    args.row_stride = args.features = 8;
    args.rows = args.tokens = 96;
    args.order = order.data();
    args.begins = args.splits = zero.data();
    args.ends = count.data();
    args.texts = 1;
    args.counts = histogram.data();
    args.sums = sums.data();
    change(args);
    expect_status(dk_cosines(&args), status);
  };
  cosines("nothing", DK_OK, [](dk_cosines_args&) {});
  cosines("another version", DK_INVALID, [](dk_cosines_args& args) { ++args.abi_version; });
  cosines("an unknown instruction set", DK_UNSUPPORTED, [](dk_cosines_args& args) { args.isa = 9; });
  cosines("an unknown dtype", DK_INVALID, [](dk_cosines_args& args) { args.dtype = 3; });
  cosines("no features", DK_INVALID, [](dk_cosines_args& args) { args.features = 0; });
  cosines("an order beyond the rows", DK_INVALID, [&](dk_cosines_args& args) { args.order = beyond.data(); });
  cosines("a negative order", DK_INVALID, [&](dk_cosines_args& args) { args.order = before.data(); });
  cosines("a text beyond the tokens", DK_INVALID, [&](dk_cosines_args& args) { args.ends = too_many.data(); });
  cosines("a text before them", DK_INVALID, [&](dk_cosines_args& args) { args.begins = below.data(); });
  cosines("a split before its text", DK_INVALID, [&](dk_cosines_args& args) { args.splits = below.data(); });
  cosines("a split beyond its text", DK_INVALID, [&](dk_cosines_args& args) { args.splits = too_many.data(); });

  const Buffer<double> wide(8 * 8);
  const Buffer<double*> blocks_of(std::vector<double*>{wide.data()});
  const auto moments = [&](const char* what, int32_t status, const auto& change) {
    context = std::string("moments refuses ") + what;
    dk_moments_args args = {};
    args.abi_version = DK_ABI_VERSION;
    args.threads = 1;
    args.z = z.memory.address();
    args.row_stride = args.features = args.block_rows = 8;
    args.rows = args.tokens = 96;
    args.order = order.data();
    args.shift = scale.data();
    args.total = wide.data();
    args.blocks = blocks_of.data();
    args.norms = sums.data();
    change(args);
    expect_status(dk_moments(&args), status);
  };
  moments("nothing", DK_OK, [](dk_moments_args&) {});
  moments("another version", DK_INVALID, [](dk_moments_args& args) { ++args.abi_version; });
  moments("an unknown dtype", DK_INVALID, [](dk_moments_args& args) { args.dtype = 3; });
  moments("no features", DK_INVALID, [](dk_moments_args& args) { args.features = 0; });
  moments("blocks without rows", DK_INVALID, [](dk_moments_args& args) { args.block_rows = 0; });
  moments("an order beyond the rows", DK_INVALID, [&](dk_moments_args& args) { args.order = beyond.data(); });
  moments("a negative order", DK_INVALID, [&](dk_moments_args& args) { args.order = before.data(); });

  some("a potential of the distance", DK_INVALID, [](dk_sampled_args& args) { args.potential = DK_DISPERSIVE_L2; });
}

// Calls at the same time share what is kept for the next call, and the last fit of a potential.
void check_concurrent_calls(int threads) {
  context = "concurrent calls";
  const Tokens z(DK_FLOAT32, 300, 24, 24, false);
  const Buffer<int64_t> begins(std::vector<int64_t>{0}), ends(std::vector<int64_t>{300});
  struct Caller {
    std::vector<double> params;
    std::vector<std::string> bits;
  };
  std::vector<Caller> callers(static_cast<size_t>(threads));
  for (size_t n = 0; n < callers.size(); ++n) callers[n].params = {1.0 + double(n % 2), 0.25, 0.01};
  const auto work = [&](Caller& caller) {
    for (int turn = 0; turn < 4; ++turn) {
      std::vector<float> grad(300 * 24), scale(300);
      double loss = 0.0;
      dk_args args = {};
      args.abi_version = DK_ABI_VERSION;
      args.threads = 1;
      args.z = z.memory.address();
      args.row_stride = args.features = 24;
      args.rows = args.tokens = 300;
      args.begins = args.sequence = begins.data();
      args.ends = ends.data();
      args.segments = args.sequences = 1;
      args.params = caller.params.data();
      args.weight = 1.0;
      args.grad = grad.data();
      args.scale = scale.data();
      args.loss = &loss;
      if (dk_dispersion(&args) != DK_OK) loss = NAN;
      caller.bits.push_back(std::string((const char*)grad.data(), grad.size() * sizeof(float)) +
                            std::string((const char*)&loss, sizeof loss));
    }
  };
  std::vector<std::thread> running;
  for (Caller& caller : callers) running.emplace_back(work, std::ref(caller));
  for (std::thread& thread : running) thread.join();
  for (size_t n = 0; n < callers.size(); ++n) {
    calls += 4;
    for (const std::string& bits : callers[n].bits)
      if (bits != callers[n % 2].bits[0]) fail("they differ");
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int step = count > 1 ? atoi(arguments[1]) : 1, threads = count > 2 ? atoi(arguments[2]) : 1;
  if (step < 1 || threads < 1) {
    fprintf(stderr, "usage: driver STEP THREADS\n");
    return 2;
  }
  for (const Isa& isa : {Isa{DK_ISA_AVX2, "avx2"}, Isa{DK_ISA_AVX512, "avx512"}, Isa{DK_ISA_NEON, "neon"}})
    if (dk_resolve_isa(isa.number)) isas.push_back(isa);
  if (isas.empty()) {
    fprintf(stderr, "this processor has no instruction set of the kernel\n");
    return 3;
  }
  if (threads > 1) pools.push_back({in_threads, threads});
  check_refusals();
  check_scale();
  check_sizes(step);
  check_long_tiles(step);
  check_blocks(step);
  check_expanded();
  check_cosines(step);
  check_moments();
  if (threads > 1) {
    check_concurrent_calls(2 * threads);
    pools.push_back({one_after_another, threads});
    pools.push_back({refuses, threads});
  }
  check_bundles();
  for (const Isa& isa : isas) printf("%s ", isa.name);
  printf("%lld calls, worst loss %.2f and gradient %.2f of the tolerance\n", (long long)calls, worst_loss, worst_grad);
  return 0;
}
