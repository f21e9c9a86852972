// The CPU kernel: dispersion loss and gradient by a symmetric sweep over the pairs of tiles.
//
// Tokens are cut into tiles. A pair of tiles I < J computes its similarities once and adds both to the gradient of I
// and to that of J; the normaliser is applied at the end. The pairs of a segment are ordered as in a round-robin
// tournament, where the pairs of a round share no tile. Workers take the pairs in this order and wait until both tiles
// have finished their earlier pairs, so the order of additions, and every bit of the result, is the same for any
// number of threads.

#include "../scalar.h"  // before potentials.h

#include "dispersion.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <mutex>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dk {
namespace {

// ---- which instructions

int32_t resolve_isa(int32_t requested) {
#if defined(__aarch64__)
  return requested == DK_ISA_BEST || requested == DK_ISA_NEON ? DK_ISA_NEON : 0;
#else
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (requested == DK_ISA_BEST || requested == DK_ISA_AVX512)) return DK_ISA_AVX512;
  if (avx2 && (requested == DK_ISA_BEST || requested == DK_ISA_AVX2)) return DK_ISA_AVX2;
  return 0;
#endif
}

const TileKernels& kernels_of(int32_t isa) {
#if defined(__aarch64__)
  (void)isa;
  return kNeonKernels;
#else
  return isa == DK_ISA_AVX512 ? kAvx512Kernels : kAvx2Kernels;
#endif
}

// ---- the potential with its constants

// kappa: the constant factor of dpsi/ds; loss = log(mean psi + eps) or mean psi.
struct Reduction {
  bool logarithm;
  double eps;
  double kappa;
  bool include_diagonal;
  double norm_weight;
};

// Chebyshev interpolation of f on [low, high], of the lowest degree that stays within `tolerance` of f in exact
// arithmetic. False if there is none.
bool fit(const std::function<double(double)>& f, double low, double high, double tolerance, Polynomial& result) {
  constexpr int kNodes = 64, kChecks = 101;
  const double pi = acos(-1.0), middle = 0.5 * (low + high), half = 0.5 * (high - low);
  double value[kNodes], chebyshev[Polynomial::kMaxDegree + 1];
  for (int i = 0; i < kNodes; ++i) value[i] = f(middle + half * cos(pi * (i + 0.5) / kNodes));
  for (int k = 0; k <= Polynomial::kMaxDegree; ++k) {
    chebyshev[k] = 0.0;
    for (int i = 0; i < kNodes; ++i) chebyshev[k] += value[i] * cos(pi * k * (i + 0.5) / kNodes);
    chebyshev[k] *= (k ? 2.0 : 1.0) / kNodes;
  }
  // Powers of x from Chebyshev polynomials of (x - middle) / half, by Clenshaw's recurrence on coefficient vectors.
  for (int degree = 1; degree <= Polynomial::kMaxDegree; ++degree) {
    std::vector<double> current(degree + 2, 0.0), next(degree + 2, 0.0);
    for (int k = degree; k >= 0; --k) {
      std::vector<double> step(degree + 2, 0.0);
      const double factor = k ? 2.0 : 1.0;
      for (int n = 0; n <= degree; ++n) {
        step[n + 1] += factor * current[n] / half;
        step[n] -= factor * current[n] * middle / half + next[n];
      }
      step[0] += chebyshev[k];
      next = current;
      current = step;
    }
    result.degree = degree;
    for (int n = 0; n <= degree; ++n) result.coefficient[n] = float(current[n]);
    bool good = true;
    for (int i = 0; i < kChecks && good; ++i) {
      const double x = low + (high - low) * i / (kChecks - 1);
      double exact = 0.0;
      for (int n = degree; n >= 0; --n) exact = exact * x + current[n];
      good = fabs(exact - f(x)) <= tolerance;
    }
    if (good) return true;
  }
  return false;
}

// A fit is held to psi over the band: relative to |psi| + floor, its polynomials to kTruncation in exact arithmetic,
// and what fp32 makes of them to kEvaluation.
constexpr double kTruncation = 2e-8, kEvaluation = 3e-7;

template <class Fit>
bool holds(const Fit& fitted, double floor, const std::function<double(double)>& psi) {
  constexpr int kChecks = 101;
  for (int i = 0; i < kChecks; ++i) {
    const float s = fitted.low + (fitted.high - fitted.low) * float(i) / float(kChecks - 1);
    const double expected = psi(s);
    if (!(fabs(fitted.weigh(s, 0.0f, 0.0f, 0.0f).psi - expected) <= kEvaluation * (fabs(expected) + floor))) return false;
  }
  return true;
}

double angle_of(double cosine) { return acos(std::min(cosine, 1.0)); }

bool make_fit(double tau, AngularSpreadFit& fitted) {
  const double rate = 1.0 / (acos(-1.0) * tau), high = fitted.high, narrowest = sqrt(1.0 - high * high);
  const double tolerance = kTruncation * exp(-rate * asin(high));
  const auto even = [&](double cosine) { return cosh(rate * angle_of(cosine)); };
  const auto odd = [&](double cosine) {
    const double angle = angle_of(cosine);
    return angle > 1e-6 ? sinh(rate * angle) / sin(angle) : rate;
  };
  return fit(even, narrowest, 1.0, tolerance, fitted.even) && fit(odd, narrowest, 1.0, tolerance, fitted.odd) &&
         holds(fitted, 0.0, [&](double s) { return exp(rate * asin(s)); });
}

bool make_fit(double margin, OrthogonalizationFit& fitted) {
  const double pi = acos(-1.0), high = fitted.high;
  const auto turns = [&](double cosine) {
    const double angle = angle_of(cosine);
    return angle > 1e-6 ? angle / (pi * sin(angle)) : 1.0 / pi;
  };
  fitted.margin = float(margin);
  return fit(turns, sqrt(1.0 - high * high), 1.0, 0.1 * kTruncation, fitted.turns) &&
         holds(fitted, 0.1, [&](double s) {
           const double excess = std::max(margin - acos(s) / pi, 0.0);
           return excess * excess;
         });
}

// The fit for the band [low, high], if there is a good one; the last is kept, because training calls with one and the
// same. A cosine of 0, which a band up to 1 has, has no inverse.
template <class Fit>
bool cached_fit(double parameter, float low, float high, Fit& result) {
  struct Entry {
    double parameter;
    bool known = false, good = false;
    Fit fit = {};
  };
  static std::mutex mutex;
  static Entry entry;
  if (!(high < 1.0f)) return false;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!entry.known || entry.parameter != parameter || entry.fit.high != high) {
    entry.parameter = parameter;
    entry.fit.low = low;
    entry.fit.high = high;
    entry.good = make_fit(parameter, entry.fit);
    entry.known = true;
  }
  result = entry.fit;
  return entry.good;
}

// Exponents this far from the shift are safe in fp32: sums of exp(40) stay finite, exp(-40) stays normal.
constexpr double kSafeExponent = 40.0;

bool describe(const dk_args& args, Job& job, Reduction& reduction) {
  const double pi = acos(-1.0);
  const double* params = args.params;
  Potential& p = job.potential;
  p.online = p.row_sums = false;
  p.shift = 0.0f;
  job.eps = 0.0;
  job.square_factor = 0.0f;
  reduction = {true, 0.0, 1.0, false, 0.0};
  switch (args.potential) {
    case DK_ANGULAR_SPREAD: {
      const double tau = params[0], clamp = params[1];
      if (!(tau > 0.0 && clamp >= 0.0 && clamp < 1.0 && params[2] >= 0.0)) return false;
      job.transform = Transform::kNormalise;
      job.eps = reduction.eps = params[2];
      reduction.kappa = 1.0 / (pi * tau);
      const float low = float(clamp - 1.0), high = float(1.0 - clamp);
      p.angular_spread = {low, high, float(1.0 / (pi * tau))};
      p.kind = Potential::Kind::kAngularSpread;
      p.online = asin(1.0 - clamp) / (pi * tau) > kSafeExponent;
      if (!p.online) {
        p.shift = float(-0.5 / tau);
        if (cached_fit(tau, low, high, p.angular_spread_fit)) p.kind = Potential::Kind::kAngularSpreadFit;
      }
      return true;
    }
    case DK_ORTHOGONALIZATION: {
      const double margin = params[0], clamp = params[1];
      if (!(clamp >= 0.0 && clamp < 1.0 && params[2] >= 0.0)) return false;
      job.transform = Transform::kNormalise;
      job.eps = params[2];
      reduction.logarithm = false;
      reduction.kappa = 2.0 / pi;
      const float low = float(clamp - 1.0), high = float(1.0 - clamp);
      p.orthogonalization = {low, high, float(margin)};
      p.kind = cached_fit(margin, low, high, p.orthogonalization_fit) ? Potential::Kind::kOrthogonalizationFit
                                                                      : Potential::Kind::kOrthogonalization;
      return true;
    }
    case DK_DECORRELATION:
      job.transform = Transform::kCentredNormalise;
      reduction.logarithm = false;
      reduction.kappa = 2.0;
      p.kind = Potential::Kind::kDecorrelation;
      return true;
    case DK_UNIFORMITY:
    case DK_L2_REPEL:
    case DK_DISPERSIVE_L2: {
      if (!(params[0] > 0.0)) return false;
      double a = params[0];
      if (args.potential == DK_UNIFORMITY) {
        job.transform = Transform::kNormalise;
        // |x_i - x_j|^2 lies in [0, 4].
        p.online = 2.0 * a > kSafeExponent;
        if (!p.online) p.shift = float(-2.0 * a);
      } else {
        job.transform = Transform::kCentre;
        p.online = p.row_sums = true;
        if (args.potential == DK_L2_REPEL) {
          a = 1.0 / params[0];
          if (!(params[1] >= 0.0)) return false;
          reduction.eps = params[1];
          reduction.norm_weight = params[2];
          reduction.include_diagonal = params[3] != 0.0;
        } else {
          a = 1.0 / (params[0] * double(args.features));
          reduction.include_diagonal = params[1] != 0.0;
        }
      }
      job.square_factor = float(a);
      reduction.kappa = 2.0 * a;
      p.gaussian = {float(2.0 * a)};
      p.kind = Potential::Kind::kGaussian;
      return true;
    }
    default: return false;
  }
}

// ---- memory

constexpr size_t kHugePage = size_t(2) << 20;

// Asks for huge pages in [data, data + bytes), which saves page faults and misses of the translation buffer. Only
// advice.
void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t page = 4096, first = (uintptr_t)data;
  const uintptr_t begin = (first + page - 1) / page * page, end = (first + bytes) / page * page;
  if (bytes >= 2 * kHugePage) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// Workspace memory, in huge pages where the system has them. A block up to kRetained is kept for the next call:
// faulting its pages in would cost as much as packing into them.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    block_ = retained().exchange(nullptr);
    if (block_ && block_->bytes >= bytes) return;
    release(block_);
    block_ = allocate(bytes);
  }
  ~Workspace() {
    if (block_ && block_->bytes <= kRetained) block_ = retained().exchange(block_);
    release(block_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() const { return block_ ? block_->data : nullptr; }

 private:
  static constexpr size_t kRetained = size_t(48) << 20;
  struct Block {
    size_t bytes;
    char* data;
  };

  static std::atomic<Block*>& retained() {
    static std::atomic<Block*> block{nullptr};
    return block;
  }
  static Block* allocate(size_t bytes) {
    const size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
#if defined(_WIN32)
    char* data = (char*)_aligned_malloc(rounded, 4096);
#else
    void* memory = nullptr;
    char* data = posix_memalign(&memory, kHugePage, rounded) ? nullptr : (char*)memory;
#endif
    if (!data) return nullptr;
    advise_huge_pages(data, rounded);
    return new (std::nothrow) Block{rounded, data};
  }
  static void release(Block* block) {
    if (!block) return;
#if defined(_WIN32)
    _aligned_free(block->data);
#else
    free(block->data);
#endif
    delete block;
  }

  Block* block_;
};

// Hands out a workspace in pieces; without memory it only counts.
class Arena {
 public:
  explicit Arena(char* data) : data_(data) {}
  template <class T>
  T* take(size_t count) {
    char* piece = data_ ? data_ + used_ : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return (T*)piece;
  }
  size_t used() const { return used_; }

 private:
  char* data_;
  size_t used_ = 0;
};

// ---- threads

struct Threads {
  dk_parallel_for parallel_for;
  int count;

  // Calls work(worker) for each worker in [0, workers).
  void run(int64_t workers, const std::function<void(int64_t)>& work) const {
    if (workers > 1 && parallel_for) {
      const auto body = [](int64_t begin, int64_t end, void* context) {
        for (int64_t w = begin; w < end; ++w) (*(const std::function<void(int64_t)>*)context)(w);
      };
      if (parallel_for(0, workers, 1, body, (void*)&work) == 0) return;
    }
    for (int64_t w = 0; w < workers; ++w) work(w);
  }
};

inline void relax() {
#if defined(__aarch64__)
  __asm__ volatile("yield");
#else
  __builtin_ia32_pause();
#endif
}

inline void wait_for(const std::atomic<int32_t>& progress, int32_t needed) {
  for (int spins = 0; progress.load(std::memory_order_acquire) < needed; ++spins) {
    if (spins < 2000)
      relax();
    else
      std::this_thread::yield();
  }
}

// ---- from segments to tiles

struct Sequence {
  int64_t id;
  int32_t first_tile, last_tile;
  double pairs = 0.0, tokens = 0.0, diagonal = 0.0;
};

// Sequences that are processed together.
struct Group {
  std::vector<Sequence> sequences;
  std::vector<Tile> tiles;
  std::vector<int64_t> first_token;  // of each tile, an offset into rows and partner_end
  std::vector<int32_t> unit_first_tile;
  std::vector<int64_t> rows;
  std::vector<int32_t> partner_end;
  int64_t padded_tokens = 0;

  void clear() { *this = Group(); }
};

// Cuts segments into tiles. Depends on the segments only, never on the number of threads.
class Planner {
 public:
  Planner(const dk_args& args, int32_t panel) : args_(args), panel_(panel) {
    int64_t tokens = 0;
    for (int64_t k = 0; k < args.segments; ++k) tokens += args.ends[k] - args.begins[k];
    plenty_ = tokens >= kPlenty;
  }

  // Appends the tiles of the segments [begin, end) of one sequence.
  void add_sequence(Group& group, int64_t begin, int64_t end, bool include_diagonal) const {
    Sequence sequence;
    sequence.id = args_.sequence[begin];
    sequence.first_tile = int32_t(group.tiles.size());
    bool bundle_open = false;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t length = args_.ends[k] - args_.begins[k];
      if (length < 2) continue;
      const double l = double(length);
      sequence.pairs += include_diagonal ? l * l : l * (l - 1.0);
      sequence.diagonal += l;
      sequence.tokens += l;
      const int32_t longest = tile_tokens(length);
      if (length <= longest) {
        const int32_t bundled = bundle_open ? group.tiles.back().tokens : 0;
        if (!bundle_open || bundled + length > kBundle / panel_ * panel_) open_tile(group, true);
        const int32_t start = group.tiles.back().tokens;
        append(group, args_.begins[k], length, start + int32_t(length));
        bundle_open = true;
      } else {
        bundle_open = false;
        for (int64_t first = 0; first < length; first += longest) {
          const int64_t tokens = std::min<int64_t>(longest, length - first);
          open_tile(group, first == 0);
          append(group, args_.begins[k] + first, tokens, int32_t(tokens));
        }
      }
    }
    sequence.last_tile = int32_t(group.tiles.size());
    if (sequence.last_tile == sequence.first_tile) return;
    for (int32_t t = sequence.first_tile; t < sequence.last_tile; ++t) {
      Tile& tile = group.tiles[t];
      tile.sequence = int32_t(group.sequences.size());
      tile.padded = (tile.tokens + panel_ - 1) / panel_ * panel_;
      group.padded_tokens += tile.padded;
    }
    group.sequences.push_back(sequence);
  }

 private:
  static constexpr int32_t kBundle = 64;    // tokens of short segments in a tile: pairs across segments are wasted
  static constexpr int64_t kPlenty = 4096;  // tokens

  // Long tiles are read less often from memory. A call with few tokens takes shorter ones, and an even number of them,
  // so that threads find pairs to work on side by side.
  int32_t tile_tokens(int64_t tokens) const {
    const int64_t longest = (plenty_ ? kLargestTile : 128) / panel_ * panel_;
    int64_t tiles = (tokens + longest - 1) / longest;
    if (!plenty_) {
      tiles = std::max(tiles, std::min<int64_t>(4, tokens / (2 * panel_)));
      tiles += tiles > 1 ? tiles % 2 : 0;
    }
    const int64_t length = (tokens + tiles - 1) / std::max<int64_t>(tiles, 1);
    return int32_t((length + panel_ - 1) / panel_ * panel_);
  }

  static void open_tile(Group& group, bool new_unit) {
    if (new_unit) group.unit_first_tile.push_back(int32_t(group.tiles.size()));
    Tile tile = {};
    tile.unit = int32_t(group.unit_first_tile.size()) - 1;
    group.tiles.push_back(tile);
    group.first_token.push_back(int64_t(group.rows.size()));
  }
  void append(Group& group, int64_t first, int64_t tokens, int32_t partner_end) const {
    for (int64_t i = first; i < first + tokens; ++i) {
      group.rows.push_back(args_.index ? args_.index[i] : i);
      group.partner_end.push_back(partner_end);
    }
    group.tiles.back().tokens += int32_t(tokens);
  }

  const dk_args& args_;
  int32_t panel_;
  bool plenty_;
};

// One step of the sweep: a tile with itself (a == b: packed first), or a pair, once a and b have made that many steps.
struct Step {
  int32_t a, b, a_needed, b_needed;
};

std::vector<Step> sweep_order(const Group& group) {
  const int32_t tiles = int32_t(group.tiles.size());
  std::vector<Step> steps;
  std::vector<int32_t> made(tiles, 1);
  for (int32_t t = 0; t < tiles; ++t) steps.push_back({t, t, 0, 0});

  struct Tournament {
    int32_t first, tiles, seats;
  };
  std::vector<Tournament> active;
  for (size_t u = 0; u < group.unit_first_tile.size(); ++u) {
    const int32_t first = group.unit_first_tile[u];
    const int32_t last = u + 1 < group.unit_first_tile.size() ? group.unit_first_tile[u + 1] : tiles;
    if (last - first > 1) active.push_back({first, last - first, (last - first + 1) / 2 * 2});
  }
  // Round r of the circle method: one seat stays, the others turn; the seat beyond an odd number of tiles is empty.
  for (int32_t round = 0; !active.empty(); ++round) {
    active.erase(
        std::remove_if(active.begin(), active.end(), [&](const Tournament& t) { return round >= t.seats - 1; }),
        active.end());
    for (const Tournament& t : active) {
      const int32_t turning = t.seats - 1;
      for (int32_t k = 0; k < t.seats / 2; ++k) {
        int32_t a = (round + k) % turning, b = k ? (round - k + turning) % turning : turning;
        if (a > b) std::swap(a, b);
        if (b >= t.tiles) continue;
        a += t.first;
        b += t.first;
        steps.push_back({a, b, made[a]++, made[b]++});
      }
    }
  }
  return steps;
}

// ---- the call

class Call {
 public:
  Call(const dk_args& args, const TileKernels& kernels)
      : args_(args), kernels_(kernels), planner_(args, kernels.panel) {
    threads_ = {args.parallel_for, std::max(1, int(args.threads))};
  }

  int32_t run() {
    if (!describe(args_, job_, reduction_)) return DK_INVALID;
    job_.args = &args_;
    job_.gradient = args_.grad != nullptr;
    job_.padded_features = (args_.features + kernels_.panel - 1) / kernels_.panel * kernels_.panel;
    losses_.assign(size_t(args_.sequences), 0.0);
    if (job_.gradient) {
      advise_huge_pages(args_.grad, size_t(args_.rows) * size_t(args_.features) * sizeof(float));
      zero_unpaired();
    }

    if (const int32_t status = sweep_groups()) return status;
    if (args_.loss) std::copy(losses_.begin(), losses_.end(), args_.loss);
    if (args_.total) *args_.total = float(std::accumulate(losses_.begin(), losses_.end(), 0.0));
    return DK_OK;
  }

 private:
  // Packs of all the sequences in flight, unless one alone is larger.
  static constexpr int64_t kGroupBytes = int64_t(32) << 20;

  int32_t sweep_groups() {
    Group group;
    for (int64_t k = 0; k < args_.segments;) {
      int64_t next = k + 1;
      while (next < args_.segments && args_.sequence[next] == args_.sequence[k]) ++next;
      int64_t tokens = 0;
      for (int64_t s = k; s < next; ++s) tokens += args_.ends[s] - args_.begins[s];
      if (!group.tiles.empty() && pack_bytes(group.padded_tokens + tokens) > kGroupBytes) {
        if (const int32_t status = sweep(group)) return status;
        group.clear();
      }
      planner_.add_sequence(group, k, next, reduction_.include_diagonal);
      k = next;
    }
    return group.tiles.empty() ? DK_OK : sweep(group);
  }

  int64_t pack_bytes(int64_t tokens) const {
    return tokens * (args_.features + (job_.gradient ? job_.padded_features : 0)) * int64_t(sizeof(float));
  }

  void zero_unpaired() const {
    int64_t covered = 0;
    const auto zero = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = args_.index ? args_.index[i] : i;
        memset(args_.grad + row * args_.features, 0, size_t(args_.features) * sizeof(float));
        args_.scale[row] = 0.0f;
      }
    };
    for (int64_t k = 0; k < args_.segments; ++k) {
      if (args_.ends[k] - args_.begins[k] < 2) continue;
      zero(covered, args_.begins[k]);
      covered = args_.ends[k];
    }
    zero(covered, args_.tokens);
  }

  int32_t sweep(Group& group) {
    const std::vector<Step> steps = sweep_order(group);
    const int64_t workers = std::min<int64_t>(threads_.count, int64_t(group.tiles.size()));
    std::vector<Scratch> scratch(workers);
    Arena count(nullptr);
    place(group, scratch, count);
    const Workspace workspace(count.used());
    if (!workspace.data()) return DK_OUT_OF_MEMORY;
    Arena arena(workspace.data());
    place(group, scratch, arena);

    if (job_.transform == Transform::kCentre) average_units(group, scratch);

    // One parallel region: while other programs keep a thread of the pool waiting, each region costs its time slice.
    const size_t sequences = group.sequences.size();
    std::vector<std::atomic<int32_t>> made(group.tiles.size()), left(sequences), reduced(sequences);
    for (auto* counters : {&made, &left, &reduced})
      for (auto& counter : *counters) counter.store(0, std::memory_order_relaxed);
    for (const Step& step : steps) left[group.tiles[step.a].sequence].fetch_add(1, std::memory_order_relaxed);
    for (const Step& step : steps) {
      ++group.tiles[step.a].steps;
      if (step.a != step.b) ++group.tiles[step.b].steps;
    }
    std::vector<Finish> finishes(group.tiles.size());
    std::atomic<int64_t> next_step{0}, next_tile{0};
    threads_.run(workers, [&](int64_t worker) {
      for (int64_t s; (s = next_step.fetch_add(1)) < int64_t(steps.size());) {
        const Step& step = steps[s];
        Tile &a = group.tiles[step.a], &b = group.tiles[step.b];
        if (step.a == step.b) {
          kernels_.pack(job_, a, scratch[worker]);
          kernels_.within(job_, a, scratch[worker]);
        } else {
          wait_for(made[step.a], step.a_needed);
          wait_for(made[step.b], step.b_needed);
          kernels_.between(job_, a, b, scratch[worker]);
          if (job_.gradient && step.b_needed + 1 == b.steps) kernels_.project(job_, b, scratch[worker]);
          made[step.b].store(step.b_needed + 1, std::memory_order_release);
        }
        if (job_.gradient && step.a_needed + 1 == a.steps) kernels_.project(job_, a, scratch[worker]);
        made[step.a].store(step.a_needed + 1, std::memory_order_release);
        if (left[a.sequence].fetch_sub(1) == 1) {
          reduce(group, group.sequences[a.sequence], finishes.data());
          reduced[a.sequence].store(1, std::memory_order_release);
        }
      }
      if (!job_.gradient) return;
      for (int64_t t; (t = next_tile.fetch_add(1)) < int64_t(group.tiles.size());) {
        wait_for(reduced[group.tiles[t].sequence], 1);
        kernels_.finish(job_, group.tiles[t], finishes[t], scratch[worker]);
      }
    });
    return DK_OK;
  }

  void place(Group& group, std::vector<Scratch>& scratch, Arena& arena) {
    for (Scratch& s : scratch) {
      s.weights = arena.take<float>(size_t(kLargestTile + 8) * kWeightStride);
      s.column_sum = arena.take<float>(kLargestTile);
      s.rows = arena.take<float>(size_t(kernels_.panel) * (job_.padded_features + 16));
    }
    if (job_.transform == Transform::kCentre) {
      const size_t features = size_t(job_.padded_features);
      tile_sums_ = arena.take<float>(group.tiles.size() * features);
      unit_means_ = arena.take<float>(group.unit_first_tile.size() * features);
      job_.unit_means = unit_means_;
    }
    for (size_t t = 0; t < group.tiles.size(); ++t) {
      Tile& tile = group.tiles[t];
      const size_t padded = size_t(tile.padded);
      tile.rows = group.rows.data() + group.first_token[t];
      tile.partner_end = group.partner_end.data() + group.first_token[t];
      tile.norm = arena.take<float>(padded);
      tile.inverse = arena.take<float>(padded);
      tile.square = arena.take<float>(padded);
      tile.row_sum = arena.take<float>(padded);
      tile.feature_major = arena.take<float>(padded * size_t(args_.features));
      tile.token_major = job_.gradient ? arena.take<float>(padded * size_t(job_.padded_features)) : nullptr;
    }
  }

  // Distances do not change when a unit's mean is subtracted, and fp32 keeps more of them.
  void average_units(Group& group, std::vector<Scratch>& scratch) {
    const int64_t features = job_.padded_features, tiles = int64_t(group.tiles.size());
    std::atomic<int64_t> next_tile{0};
    threads_.run(int64_t(scratch.size()), [&](int64_t worker) {
      for (int64_t t; (t = next_tile.fetch_add(1)) < tiles;)
        kernels_.add_rows(job_, group.tiles[t], scratch[worker], tile_sums_ + t * features);
    });
    std::vector<double> total(features);
    for (size_t u = 0; u < group.unit_first_tile.size(); ++u) {
      const int64_t first = group.unit_first_tile[u];
      const int64_t last = u + 1 < group.unit_first_tile.size() ? group.unit_first_tile[u + 1] : tiles;
      std::fill(total.begin(), total.end(), 0.0);
      double tokens = 0.0;
      for (int64_t t = first; t < last; ++t) {
        tokens += group.tiles[t].tokens;
        for (int64_t k = 0; k < features; ++k) total[k] += tile_sums_[t * features + k];
      }
      for (int64_t k = 0; k < features; ++k) unit_means_[u * features + k] = float(total[k] / tokens);
    }
  }

  // The loss of a sequence from its tiles, and the factors of its gradient: with P = sum of psi over n pairs,
  // dloss/dx_i = f'(P) 2 kappa sum_j slope_ij x_j.
  void reduce(const Group& group, const Sequence& sequence, Finish* finishes) {
    double shift = reduction_.include_diagonal ? 0.0 : -std::numeric_limits<double>::infinity();
    double squares = 0.0;
    bool finite = true;
    for (int32_t t = sequence.first_tile; t < sequence.last_tile; ++t) {
      const Tile& tile = group.tiles[t];
      shift = std::max(shift, tile.psi_shift);
      squares += tile.square_sum;
      finite = finite && tile.finite;
    }
    double psi = reduction_.include_diagonal ? sequence.diagonal * exp(-shift) : 0.0;
    for (int32_t t = sequence.first_tile; t < sequence.last_tile; ++t)
      if (group.tiles[t].psi_sum > 0.0) psi += group.tiles[t].psi_sum * exp(group.tiles[t].psi_shift - shift);

    double loss = psi / sequence.pairs, log_slope = -log(sequence.pairs);
    if (reduction_.logarithm) {
      const double log_mean = shift + log(psi) - log(sequence.pairs);
      loss = reduction_.eps > 0.0 ? log(exp(log_mean) + reduction_.eps) : log_mean;
      log_slope -= loss;
    }
    float square_scale = 0.0f;
    if (reduction_.norm_weight != 0.0) {
      const double elements = sequence.tokens * double(args_.features);
      loss += reduction_.norm_weight * squares / elements;
      square_scale = float(2.0 * reduction_.norm_weight / elements * args_.weight);
    }
    losses_[size_t(sequence.id)] = finite ? loss * args_.weight : std::numeric_limits<double>::quiet_NaN();
    for (int32_t t = sequence.first_tile; t < sequence.last_tile; ++t) {
      const double scale = 2.0 * reduction_.kappa * args_.weight * exp(group.tiles[t].shift + log_slope);
      finishes[t] = {finite ? float(scale) : std::numeric_limits<float>::quiet_NaN(), square_scale};
    }
  }

  const dk_args& args_;
  const TileKernels& kernels_;
  Planner planner_;
  Threads threads_;
  Job job_ = {};
  Reduction reduction_ = {};
  std::vector<double> losses_;
  float* tile_sums_ = nullptr;
  float* unit_means_ = nullptr;
};

bool valid(const dk_args& args) {
  if (args.tokens < 0 || args.features < 1 || args.segments < 0 || args.sequences < 0) return false;
  if (args.dtype < DK_FLOAT32 || args.dtype > DK_FLOAT16) return false;
  if (!args.index && args.tokens > args.rows) return false;
  for (int64_t i = 0; args.index && i < args.tokens; ++i)
    if (args.index[i] < 0 || args.index[i] >= args.rows) return false;
  for (int64_t k = 0; k < args.segments; ++k) {
    const int64_t previous_end = k ? args.ends[k - 1] : 0, previous_sequence = k ? args.sequence[k - 1] : 0;
    if (args.begins[k] < previous_end || args.ends[k] < args.begins[k] || args.ends[k] > args.tokens) return false;
    if (args.sequence[k] < previous_sequence || args.sequence[k] >= args.sequences) return false;
  }
  return true;
}

}  // namespace
}  // namespace dk

DK_EXPORT int32_t dk_abi_version(void) { return DK_ABI_VERSION; }

DK_EXPORT int32_t dk_resolve_isa(int32_t requested) { return dk::resolve_isa(requested); }

DK_EXPORT int32_t dk_dispersion(const dk_args* args) {
  if (args->abi_version != DK_ABI_VERSION || !dk::valid(*args)) return DK_INVALID;
  const int32_t isa = dk::resolve_isa(args->isa);
  if (!isa) return DK_UNSUPPORTED;
  try {
    return dk::Call(*args, dk::kernels_of(isa)).run();
  } catch (const std::bad_alloc&) {
    return DK_OUT_OF_MEMORY;
  }
}

DK_EXPORT int32_t dk_scale(const dk_scale_args* args) {
  if (args->abi_version != DK_ABI_VERSION || args->rows_per_factor < 1) return DK_INVALID;
  const int32_t isa = dk::resolve_isa(args->isa);
  if (!isa) return DK_UNSUPPORTED;
  constexpr int64_t kWorth = 16384;  // elements that are worth waking a thread for
  const dk::Threads threads = {args->parallel_for, std::max(1, int(args->threads))};
  const int64_t rows = args->rows;
  const int64_t workers = std::clamp<int64_t>(rows * args->features / kWorth, 1, threads.count);
  threads.run(workers, [&](int64_t worker) {
    dk::kernels_of(isa).scale(*args, rows * worker / workers, rows * (worker + 1) / workers);
  });
  return DK_OK;
}
