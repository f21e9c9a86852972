// The exact CPU kernel: dispersion loss and gradient by a symmetric sweep over the pairs of tiles.
//
// Tokens are cut into tiles. A pair of tiles I < J computes its similarities once and adds both to the gradient of I
// and to that of J; the normalizer is applied at the end. The tile pairs of a segment are ordered as in a round-robin
// tournament, in which the pairs of one round share no tile. Workers take the pairs in this order and wait until both
// tiles have finished their earlier pairs, so the order of additions, and with it every bit of the result, is the same
// for any number of threads.

#include "dispersion.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#include "call.h"
#include "runtime.h"

namespace dk {
namespace {

// ---- from segments to tiles

struct Sequence {
  int64_t id;
  int32_t first_tile, last_tile;
  double pairs = 0.0, tokens = 0.0, diagonal = 0.0;
};

// Sequences that are processed together, with their tiles.
struct Group {
  std::vector<Sequence> sequences;
  std::vector<Tile> tiles;
  std::vector<int64_t> first_token;  // [tiles]: each tile's offset into rows and partner_end
  std::vector<int32_t> population_first_tile;
  std::vector<int64_t> rows;
  std::vector<int32_t> partner_end;
  int64_t padded_tokens = 0;

  void clear() { *this = Group(); }
};

// The cut of segments into tiles. It depends on the segments alone, never on the number of threads.
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
  static constexpr int32_t kBundle = 64;    // most tokens of short segments per tile: pairs across segments are wasted
  static_assert(kBundle <= kLargestTile);
  static constexpr int64_t kPlenty = 4096;  // tokens of a call from which on all tiles may be long

  // Tile length in tokens for a segment of `tokens` tokens. Long tiles are read from memory less often. A call with few
  // tokens gets shorter tiles, and an even number of them, so that threads find disjoint pairs to work on.
  int32_t tile_tokens(int64_t tokens) const {
    const int64_t longest = (plenty_ ? kLargestTile : 128) / panel_ * panel_;
    int64_t tiles = (tokens + longest - 1) / longest;
    if (!plenty_) {
      tiles = std::max(tiles, std::min<int64_t>(4, tokens / (2 * panel_)));
      tiles += tiles > 1 ? tiles % 2 : 0;
    }
    const int64_t length = (tokens + tiles - 1) / std::max<int64_t>(tiles, 1);
    return int32_t(round_up(length, panel_));
  }

  static void open_tile(Group& group, bool new_population) {
    if (new_population) group.population_first_tile.push_back(int32_t(group.tiles.size()));
    Tile tile = {};
    tile.population = int32_t(group.population_first_tile.size()) - 1;
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

// One step of the sweep: tile a with itself (a == b; the tile is packed first) or the pair (a, b). It may start once
// tile a has made a_needed steps and tile b b_needed steps.
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
  for (size_t u = 0; u < group.population_first_tile.size(); ++u) {
    const int32_t first = group.population_first_tile[u];
    const int32_t last = u + 1 < group.population_first_tile.size() ? group.population_first_tile[u + 1] : tiles;
    if (last - first > 1) active.push_back({first, last - first, (last - first + 1) / 2 * 2});
  }
  // Circle method: from round to round one seat stays and the others turn. An odd number of tiles leaves a seat empty.
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
    if (!describe(args_.potential, args_.params, args_.features, job_, reduction_)) return DK_INVALID;
    job_.args = &args_;
    job_.gradient = args_.grad != nullptr;
    job_.padded_features = round_up(args_.features, kernels_.panel);
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
  // Limit of the packs of a group, in bytes; a single sequence may exceed it.
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

    if (job_.transform == Transform::kCentre) average_populations(group, scratch);

    // One parallel region for sweep and finish: if other programs keep a thread of the pool waiting, each region costs
    // a time slice.
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
    for (Scratch& s : scratch) s = take_scratch(arena, kernels_.panel, job_.padded_features);
    if (job_.transform == Transform::kCentre) {
      const size_t features = size_t(job_.padded_features);
      tile_sums_ = arena.take<float>(group.tiles.size() * features);
      population_means_ = arena.take<float>(group.population_first_tile.size() * features);
      job_.population_means = population_means_;
    }
    for (size_t t = 0; t < group.tiles.size(); ++t) {
      Tile& tile = group.tiles[t];
      const size_t padded = size_t(tile.padded);
      tile.rows = group.rows.data() + group.first_token[t];
      tile.partner_end = group.partner_end.data() + group.first_token[t];
      tile.norm = arena.take<float>(padded);
      tile.inverse = arena.take<float>(padded);
      tile.square = arena.take<float>(padded);
      tile.key = arena.take<float>(padded);
      tile.row_sum = arena.take<float>(padded);
      tile.feature_major = arena.take<float>(padded * size_t(args_.features));
      tile.token_major = job_.gradient ? arena.take<float>(padded * size_t(job_.padded_features)) : nullptr;
    }
  }

  // Computes the mean of each population, which is subtracted: distances stay the same, and fp32 keeps more of their
  // digits.
  void average_populations(Group& group, std::vector<Scratch>& scratch) {
    const int64_t features = job_.padded_features, tiles = int64_t(group.tiles.size());
    std::atomic<int64_t> next_tile{0};
    threads_.run(int64_t(scratch.size()), [&](int64_t worker) {
      for (int64_t t; (t = next_tile.fetch_add(1)) < tiles;)
        kernels_.add_rows(job_, group.tiles[t], scratch[worker], tile_sums_ + t * features);
    });
    std::vector<double> total(features);
    for (size_t u = 0; u < group.population_first_tile.size(); ++u) {
      const int64_t first = group.population_first_tile[u];
      const int64_t last = u + 1 < group.population_first_tile.size() ? group.population_first_tile[u + 1] : tiles;
      std::fill(total.begin(), total.end(), 0.0);
      double tokens = 0.0;
      for (int64_t t = first; t < last; ++t) {
        tokens += group.tiles[t].tokens;
        for (int64_t k = 0; k < features; ++k) total[k] += tile_sums_[t * features + k];
      }
      for (int64_t k = 0; k < features; ++k) population_means_[u * features + k] = float(total[k] / tokens);
    }
  }

  // Computes the loss of a sequence from its tiles, and the factors of its gradient: with P the sum of psi over all
  // pairs and loss = f(P), dloss/dx_i = f'(P) 2 kappa sum_j slope_ij x_j.
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
      loss = log_mean + reduction_.offset;
      log_slope -= log_mean;
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
  float* population_means_ = nullptr;
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
  return dk::with_kernels(*args, dk::valid,
                          [&](const dk::TileKernels& kernels) { return dk::Call(*args, kernels).run(); });
}

DK_EXPORT int32_t dk_scale(const dk_scale_args* args) {
  const auto valid = [](const dk_scale_args& scale_args) {
    return scale_args.layer_count >= 0 && scale_args.rows >= 0 && scale_args.features >= 0 &&
           scale_args.rows_per_factor >= 1 && scale_args.dtype >= DK_FLOAT32 && scale_args.dtype <= DK_FLOAT16;
  };
  return dk::with_kernels(*args, valid, [&](const dk::TileKernels& kernels) {
    constexpr int64_t kWorth = 16384;  // least elements per thread: fewer do not pay for waking it
    const dk::Threads threads = {args->parallel_for, std::max(1, int(args->threads))};
    const int64_t rows = args->rows, layers = args->layer_count;
    const int64_t workers = std::clamp<int64_t>(layers * rows * args->features / kWorth, 1, threads.count);
    threads.run(workers, [&](int64_t worker) {
      const int64_t begin = layers * rows * worker / workers, end = layers * rows * (worker + 1) / workers;
      for (int64_t l = 0; l < layers; ++l) {
        const int64_t first = std::max<int64_t>(begin - l * rows, 0), last = std::min(end - l * rows, rows);
        if (args->grads[l] && first < last) kernels.scale(*args, l, first, last);
      }
    });
    return int32_t(DK_OK);
  });
}
