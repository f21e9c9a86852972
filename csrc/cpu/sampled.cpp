// The sampled CPU kernel: loss and gradient from the pairs within blocks and a model of the slope over all pairs of a
// population.
//
// Tokens are read twice, in place. The first pass reads them in chunks for the model's sums over each population, sum_j
// phi_jk x_j; a population that has all rows between its first and last is read in the order of the rows. The second
// pass computes the gradient, block by block: one matrix product of the evaluated pairs' residual slopes with the
// block's tokens, and one of the model's features, kept from the first pass, with the sums. Chunks and tiles depend on
// the arguments alone and are summed in their order, so every bit is the same for any number of threads.

#include "dispersion.h"

#include <math.h>

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

// Tokens of one population that a worker takes at a time, in the first pass and in a second pass that evaluates no
// pair. A second pass with evaluated pairs takes whole blocks.
constexpr int64_t kChunkTokens = 256, kExpandedTokens = 64;
static_assert(kChunkTokens <= kLargestTile && kExpandedTokens <= kLargestTile, "tokens taken at once are a tile");

// Largest population, in tokens times features, that stays in a core's cache from the first pass to the second.
constexpr int64_t kOwnNumbers = int64_t(1) << 18;

struct Run {
  int64_t layer, population, first;
  int32_t tokens;
  const int64_t* rows;
};

class SampledCall {
 public:
  SampledCall(const dk_sampled_args& args, const TileKernels& kernels) : args_(args), kernels_(kernels) {
    threads_ = {args.parallel_for, std::max(1, int(args.threads))};
  }

  int32_t run() {
    Job job = {};
    if (!describe(args_.potential, args_.params, args_.features, job, reduction_)) return DK_INVALID;
    if (job.transform == Transform::kCentre || job.potential.online) return DK_INVALID;
    slope_scale_ = reduction_.kappa * exp(double(job.potential.shift));
    psi_scale_ = exp(double(job.potential.shift));
    job.gradient = true;  // rows are packed for products with them
    job.padded_features = int64_t(padded_features());
    if (!plan()) return DK_INVALID;

    const int64_t workers = std::min<int64_t>(threads_.count, int64_t(tiles_.size()));
    std::vector<Worker> worker(size_t(std::max<int64_t>(workers, 1)));
    Arena count(nullptr);
    place(worker, count);
    const Workspace workspace(count.used());
    if (!workspace.data()) return DK_OUT_OF_MEMORY;
    Arena arena(workspace.data());
    place(worker, arena);

    describe_layers(job);
    if (args_.draws && !fit(worker)) return DK_INVALID;
    if (args_.grad)
      advise_huge_pages(args_.grad, size_t(args_.layer_count * args_.rows * args_.features) * sizeof(float));
    sweep(worker, workers);
    reduce();
    return DK_OK;
  }

 private:
  struct Worker {
    Tile tile;
    Scratch scratch;
    FitScratch fit;
  };
  struct Sums {
    double psi = 0.0, c = 0.0;
    bool finite = true;
  };

  bool evaluates_pairs() const { return args_.block_count > 0; }
  bool models() const { return args_.draws; }

  // Computes the row of each token within its layer, and the runs of both passes; false if the bounds do not fit
  // together.
  bool plan() {
    rows_.resize(size_t(args_.tokens));
    partner_end_.resize(size_t(args_.tokens));
    ascending_.resize(size_t(args_.rows));
    std::iota(ascending_.begin(), ascending_.end(), 0);
    first_chunk_.push_back(0);
    first_tile_.push_back(0);
    int64_t block = 0;
    for (int64_t p = 0; p < args_.population_count; ++p) {
      if (args_.populations[p] < args_.populations[p + 1] && !plan_population(p, block)) return false;
      modelled_.resize(size_t(p) + 1);
      first_chunk_.push_back(int64_t(chunks_.size()));
      first_tile_.push_back(int64_t(tiles_.size()));
    }
    while (block < args_.block_count && args_.blocks[block] == args_.blocks[block + 1]) ++block;
    return block == args_.block_count;
  }

  bool plan_population(int64_t p, int64_t& block) {
    const int64_t first = args_.populations[p], end = args_.populations[p + 1], layer = row_of(first) / args_.rows;
    int64_t least = args_.rows, most = 0;
    for (int64_t i = first; i < end; ++i) {
      const int64_t row = row_of(i) - layer * args_.rows;
      if (row < 0 || row >= args_.rows) return false;
      rows_[size_t(i)] = row;
      least = std::min(least, row);
      most = std::max(most, row);
    }
    const int64_t* rows = rows_.data() + first;
    const int64_t* in_any_order = most - least == end - first - 1 ? ascending_.data() + least : rows;
    bool whole = false;
    if (evaluates_pairs()) {
      const size_t begins = tiles_.size();
      for (; block < args_.block_count && args_.blocks[block + 1] <= end; ++block) {
        const int64_t begin = args_.blocks[block], tokens = args_.blocks[block + 1] - begin;
        if (begin < first || tokens > kLargestTile) return false;
        if (!tokens) continue;
        whole = whole || tokens == end - first;
        // A tile of several small blocks fills at most one panel, because pairs across its blocks are wasted.
        if (tiles_.size() == begins || tiles_.back().tokens + tokens > kernels_.panel)
          tiles_.push_back({layer, p, begin, 0, rows + (begin - first)});
        Run& tile = tiles_.back();
        tile.tokens += int32_t(tokens);
        std::fill_n(partner_end_.begin() + begin, tokens, tile.tokens);
      }
      if (tiles_.size() == begins || tiles_[begins].first != first || tiles_.back().first + tiles_.back().tokens != end)
        return false;
    } else {
      cut({layer, p, first, 0, in_any_order}, end, kExpandedTokens, tiles_);
    }
    // A population that is one block has no pairs left for a model.
    modelled_.push_back(models() && !whole);
    if (modelled_.back()) cut({layer, p, first, 0, in_any_order}, end, kChunkTokens, chunks_);
    return true;
  }

  int64_t row_of(int64_t token) const { return args_.order ? args_.order[token] : token; }

  static void cut(Run rest, int64_t end, int64_t length, std::vector<Run>& runs) {
    for (; rest.first < end; rest.first += length, rest.rows += length) {
      rest.tokens = int32_t(std::min(length, end - rest.first));
      runs.push_back(rest);
    }
  }

  void place(std::vector<Worker>& workers, Arena& arena) {
    int64_t longest = kChunkTokens, packed = models() ? kFitSize : 0;
    for (const Run& tile : tiles_) {
      longest = std::max<int64_t>(longest, tile.tokens);
      if (evaluates_pairs()) packed = std::max<int64_t>(packed, tile.tokens);
    }
    longest = round_up(longest, kernels_.panel);
    packed = round_up(packed, kernels_.panel);
    for (Worker& w : workers) {
      w.scratch = take_scratch(arena, kernels_.panel, int64_t(padded_features()));
      w.scratch.phi = arena.take<float>(size_t(kModelFeatures) * kWeightStride);
      w.scratch.weighted = arena.take<float>(size_t(kLargestPadded) * kModelFeatures);
      w.tile = {};
      for (float** values : {&w.tile.norm, &w.tile.inverse, &w.tile.square, &w.tile.key, &w.tile.row_sum})
        *values = arena.take<float>(size_t(longest));
      w.tile.feature_major = arena.take<float>(size_t(packed * args_.features));
      w.tile.token_major = arena.take<float>(size_t(packed) * padded_features());
      if (!models()) continue;
      for (float** matrix : {&w.fit.products, &w.fit.psi, &w.fit.slope})
        *matrix = arena.take<float>(size_t(kFitSize) * kWeightStride);
      w.fit.span = arena.take<float>(kRank * padded_features());
      w.fit.orthonormal = arena.take<double>(kRank * padded_features());
    }
    sums_ = arena.take<float>(chunks_.size() * kModelFeatures * padded_features());
    if (!models()) return;
    phi_ = arena.take<float>(size_t(args_.layer_count * args_.rows) * kModelFeatures);
    directions_ = arena.take<float>(size_t(args_.layer_count * args_.features) * kRank);
  }

  size_t padded_features() const { return size_t(round_up(args_.features, kernels_.panel)); }

  void describe_layers(const Job& job) {
    layer_args_.resize(size_t(args_.layer_count));
    jobs_.assign(size_t(args_.layer_count), job);
    models_.resize(size_t(args_.layer_count));
    for (size_t l = 0; l < layer_args_.size(); ++l) {
      dk_args& layer = layer_args_[l];
      layer.dtype = args_.dtype;
      layer.z = args_.layers[l];
      layer.row_stride = args_.row_stride;
      layer.rows = args_.rows;
      layer.features = args_.features;
      layer.grad = args_.grad ? args_.grad + int64_t(l) * args_.rows * args_.features : nullptr;
      jobs_[l].args = &layer;
      models_[l].directions = directions_of(int64_t(l));
    }
  }

  // Fits the model of each layer; false if a population is not of its layer.
  bool fit(std::vector<Worker>& workers) {
    const int64_t layers = args_.layer_count;
    fits_.resize(size_t(layers));
    std::vector<int64_t> rows;
    for (int64_t l = 0; l < layers; ++l)
      for (int g = 0; g < kFitGroups; ++g) {
        const float* draws = args_.draws + (l * kFitGroups + g) * (1 + kFitTokens);
        const int64_t population = population_drawn(l, draws[0]);
        const int64_t first = args_.populations[population], tokens = args_.populations[population + 1] - first;
        for (int t = 0; t < kFitTokens; ++t) {
          const int64_t within = std::min(int64_t(draws[1 + t] * float(tokens)), std::max<int64_t>(tokens - 1, 0));
          rows.push_back(row_of(std::min(first + within, args_.tokens - 1)) - l * args_.rows);
          if (rows.back() < 0 || rows.back() >= args_.rows) return false;
        }
      }
    std::atomic<int64_t> next{0};
    threads_.run(std::min<int64_t>(int64_t(workers.size()), layers), [&](int64_t w) {
      Worker& worker = workers[size_t(w)];
      for (int64_t l; (l = next.fetch_add(1)) < layers;) {
        outline(worker.tile, rows.data() + l * kFitSize, kFitSize);
        kernels_.pack(jobs_[size_t(l)], worker.tile, worker.scratch);
        kernels_.fit(jobs_[size_t(l)], worker.tile, worker.scratch, worker.fit, directions_of(l), fits_[size_t(l)]);
        models_[size_t(l)].features = kModelFeatures;
        std::copy_n(fits_[size_t(l)].b, kModelFeatures, models_[size_t(l)].b);
      }
    });
    return true;
  }

  // Population of a random token of a layer; all layers have the same number of tokens.
  int64_t population_drawn(int64_t layer, float draw) const {
    const int64_t* bounds = args_.populations;
    const int64_t layer_tokens = (bounds[args_.population_count] - bounds[0]) / args_.layer_count;
    const int64_t token = bounds[0] + layer * layer_tokens + int64_t(draw * float(layer_tokens));
    return std::max<int64_t>(std::upper_bound(bounds, bounds + args_.population_count, token) - bounds - 1, 0);
  }

  void sweep(std::vector<Worker>& workers, int64_t count) {
    chunk_sums_.assign(chunks_.size(), {});
    tile_sums_.assign(tiles_.size(), {});
    const int64_t populations = args_.population_count;
    // A small population is processed by one worker, which finds the tokens in its cache when it comes to the gradient.
    // Chunks and tiles of the last populations, and of large ones, are shared by all workers.
    std::vector<bool> alone(static_cast<size_t>(populations));
    for (int64_t p = 0; p < populations - count; ++p)
      alone[size_t(p)] = (args_.populations[p + 1] - args_.populations[p]) * args_.features <= kOwnNumbers;
    std::vector<std::atomic<int32_t>> left(static_cast<size_t>(populations)), ready(static_cast<size_t>(populations));
    for (size_t p = 0; p < left.size(); ++p) {
      left[p].store(int32_t(first_chunk_[p + 1] - first_chunk_[p]), std::memory_order_relaxed);
      ready[p].store(modelled_[p] ? 0 : 1, std::memory_order_relaxed);
    }
    std::atomic<int64_t> next_population{0}, next_chunk{0}, next_tile{0};
    threads_.run(count, [&](int64_t w) {
      Worker& worker = workers[size_t(w)];
      for (int64_t p; (p = next_population.fetch_add(1)) < populations;) {
        if (!alone[size_t(p)]) continue;
        for (int64_t n = first_chunk_[size_t(p)]; n < first_chunk_[size_t(p) + 1]; ++n) add_chunk(worker, n);
        add_chunks_of(p);
        for (int64_t n = first_tile_[size_t(p)]; n < first_tile_[size_t(p) + 1]; ++n) finish_tile(worker, n);
      }
      for (int64_t n; (n = next_chunk.fetch_add(1)) < int64_t(chunks_.size());) {
        const int64_t population = chunks_[size_t(n)].population;
        if (alone[size_t(population)]) continue;
        add_chunk(worker, n);
        if (left[size_t(population)].fetch_sub(1) == 1) {
          add_chunks_of(population);
          ready[size_t(population)].store(1, std::memory_order_release);
        }
      }
      for (int64_t n; (n = next_tile.fetch_add(1)) < int64_t(tiles_.size());) {
        const int64_t population = tiles_[size_t(n)].population;
        if (alone[size_t(population)]) continue;
        wait_for(ready[size_t(population)], 1);
        finish_tile(worker, n);
      }
    });
  }

  void outline(Tile& tile, const int64_t* rows, int32_t tokens) const {
    tile.tokens = tokens;
    tile.padded = int32_t(round_up(tokens, kernels_.panel));
    tile.rows = rows;
    tile.own = nullptr;
  }

  void add_chunk(Worker& worker, int64_t n) {
    const Run& chunk = chunks_[size_t(n)];
    Tile& tile = worker.tile;
    outline(tile, chunk.rows, chunk.tokens);
    kernels_.model_sums(jobs_[size_t(chunk.layer)], models_[size_t(chunk.layer)], tile, worker.scratch,
                        features_of(chunk.layer), sums_of(n));
    Sums& sums = chunk_sums_[size_t(n)];
    sums.finite = tile.finite;
    for (int32_t t = 0; t < tile.tokens; ++t) {
      const double length = double(tile.norm[t]) * tile.inverse[t];
      sums.c += length * length;
    }
  }

  // The layer's part of phi_ and directions_; NULL without a model.
  float* features_of(int64_t layer) const { return phi_ ? phi_ + layer * args_.rows * kModelFeatures : nullptr; }
  float* directions_of(int64_t layer) const {
    return directions_ ? directions_ + layer * args_.features * kRank : nullptr;
  }

  size_t sums_stride() const { return size_t(kModelFeatures) * padded_features(); }
  float* sums_of(int64_t chunk) const { return sums_ + size_t(chunk) * sums_stride(); }

  // Adds the sums of all chunks of a population to those of its first chunk.
  void add_chunks_of(int64_t population) {
    const int64_t first = first_chunk_[size_t(population)];
    float* total = sums_of(first);
    for (int64_t n = first + 1; n < first_chunk_[size_t(population) + 1]; ++n) {
      const float* sums = sums_of(n);
      for (size_t k = 0; k < sums_stride(); ++k) total[k] += sums[k];
    }
  }

  void finish_tile(Worker& worker, int64_t n) {
    if (!args_.grad && !evaluates_pairs()) return;
    const Run& run = tiles_[size_t(n)];
    const Job& job = jobs_[size_t(run.layer)];
    const bool modelled = args_.grad && modelled_[size_t(run.population)];
    const Model model = modelled ? models_[size_t(run.layer)] : Model{};
    const float* sums = modelled ? sums_of(first_chunk_[size_t(run.population)]) : nullptr;
    const float* phi = features_of(run.layer);
    Tile& tile = worker.tile;
    outline(tile, run.rows, run.tokens);
    if (evaluates_pairs()) {
      tile.partner_end = partner_end_.data() + run.first;
      kernels_.pack(job, tile, worker.scratch);
      kernels_.sample(job, model, tile, worker.scratch, phi, sums, float(args_.inverse_probability[run.population]));
      tile_sums_[size_t(n)] = {tile.psi_sum * psi_scale_, tile.c_sum, tile.finite};
    } else {
      kernels_.expand(job, model, tile, worker.scratch, phi, sums);
    }
    if (!args_.grad) return;
    float* scale = args_.scale + run.layer * args_.rows;
    for (int32_t t = 0; t < tile.tokens; ++t) scale[tile.rows[t]] = tile.inverse[t];
  }

  // Computes the loss of each sequence from estimates of the sums over all pairs, and the factors of its gradient.
  void reduce() {
    struct Estimate {
      double psi = 0.0;
      double missed_c = 0.0;  // sum of c over all pairs minus its estimate from the evaluated pairs
    };
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    std::vector<Estimate> population_sums(size_t(args_.population_count)), sequence_sums(size_t(args_.sequence_count));
    for (size_t n = 0; n < tiles_.size(); ++n) {
      Estimate& sums = population_sums[size_t(tiles_[n].population)];
      const double stands_for = evaluates_pairs() ? args_.inverse_probability[tiles_[n].population] : 0.0;
      sums.psi += tile_sums_[n].finite ? stands_for * tile_sums_[n].psi : nan;
      sums.missed_c -= stands_for * tile_sums_[n].c;
    }
    for (size_t n = 0; n < chunks_.size(); ++n)
      population_sums[size_t(chunks_[n].population)].missed_c -= chunk_sums_[n].finite ? chunk_sums_[n].c : nan;
    for (size_t u = 0; u < population_sums.size(); ++u) {
      Estimate& sequence = sequence_sums[size_t(args_.sequence[u])];
      sequence.psi += population_sums[u].psi;
      if (!modelled_[u]) continue;
      // |sum_j x_j|^2, the sum of c over all pairs and the diagonal; sum_j x_j is among the sums, because the first
      // feature is 1.
      const float* total = sums_of(first_chunk_[u]);
      for (int64_t f = 0; f < args_.features; ++f) {
        const double x = total[f / kernels_.panel * kernels_.panel * kModelFeatures + f % kernels_.panel];
        population_sums[u].missed_c += x * x;
      }
      sequence.missed_c += population_sums[u].missed_c;
    }
    const size_t layer_sequences = sequence_sums.size() / size_t(args_.layer_count);
    for (size_t s = 0; s < sequence_sums.size(); ++s) {
      const double pairs = double(args_.pairs[s]);
      args_.loss[s] = args_.per_pair[s] = 0.0;
      if (pairs == 0.0) continue;
      double mean = sequence_sums[s].psi / pairs;
      if (models()) {
        const Fit& fit = fits_[s / layer_sequences];
        double missed = sequence_sums[s].missed_c / pairs;
        if (!evaluates_pairs()) {
          mean += fit.mean_psi * psi_scale_;
          missed -= fit.mean_c;
        }
        const double corrected = mean + fit.psi_slope * psi_scale_ * missed;
        // No correction where the logarithm would be of a negative mean: a correction larger than psi itself shows that
        // psi is not linear in c.
        if (!(reduction_.logarithm && corrected <= 0.0)) mean = corrected;
      }
      args_.loss[s] = reduction_.logarithm ? log(mean) + reduction_.offset : mean;
      args_.per_pair[s] = 2.0 / pairs / (reduction_.logarithm ? mean : 1.0);
    }
    if (!args_.grad) return;
    for (const Run& tile : tiles_) {
      const double factor = args_.per_pair[args_.sequence[tile.population]] * slope_scale_;
      float* scale = args_.scale + tile.layer * args_.rows;
      for (int32_t t = 0; t < tile.tokens; ++t) {
        float& row_scale = scale[tile.rows[t]];
        row_scale = float(row_scale * factor);
      }
    }
  }

  const dk_sampled_args& args_;
  const TileKernels& kernels_;
  Threads threads_;
  Reduction reduction_ = {};
  double slope_scale_ = 1.0, psi_scale_ = 1.0;  // factors from the kernel's units to slopes with kappa, and to psi
  std::vector<int64_t> rows_, ascending_;
  std::vector<int32_t> partner_end_;
  std::vector<Run> chunks_, tiles_;
  std::vector<int64_t> first_chunk_, first_tile_;  // [populations + 1]
  std::vector<bool> modelled_;                     // [populations]: whether a model adds pairs that are not evaluated
  std::vector<dk_args> layer_args_;
  std::vector<Job> jobs_;
  std::vector<Model> models_;
  std::vector<Sums> chunk_sums_, tile_sums_;
  std::vector<Fit> fits_;
  float* sums_ = nullptr;  // [chunks][kModelFeatures * padded features]
  // NULL without a model:
  float* phi_ = nullptr;         // [layers * rows][kModelFeatures]
  float* directions_ = nullptr;  // [layers][features][kRank]
};

bool valid(const dk_sampled_args& args) {
  if (args.tokens < 0 || args.features < 1 || args.rows < 1 || args.layer_count < 1) return false;
  if (args.dtype < DK_FLOAT32 || args.dtype > DK_FLOAT16) return false;
  if (args.draws && (args.fit_groups != kFitGroups || args.fit_tokens != kFitTokens)) return false;
  if (args.draws && args.tokens < 1) return false;
  for (int64_t i = 0; args.draws && i < args.layer_count * kFitGroups * (1 + kFitTokens); ++i)
    if (!(args.draws[i] >= 0.0f && args.draws[i] < 1.0f)) return false;
  if (args.population_count < 1 || args.block_count < 0 || args.sequence_count % args.layer_count) return false;
  if (!args.block_count && !args.draws) return false;
  const int64_t rows = args.layer_count * args.rows;
  if (!args.order && args.tokens > rows) return false;
  for (int64_t i = 0; args.order && i < args.tokens; ++i)
    if (args.order[i] < 0 || args.order[i] >= rows) return false;
  for (int64_t u = 0; u < args.population_count; ++u)
    if (args.populations[u] < 0 || args.populations[u + 1] < args.populations[u] || args.populations[u + 1] > args.tokens ||
        args.sequence[u] < 0 || args.sequence[u] >= args.sequence_count)
      return false;
  for (int64_t k = 0; k < args.block_count; ++k)
    if (args.blocks[k] < 0 || args.blocks[k + 1] < args.blocks[k] || args.blocks[k + 1] > args.tokens) return false;
  return true;
}

}  // namespace
}  // namespace dk

DK_EXPORT int32_t dk_sampled(const dk_sampled_args* args) {
  return dk::with_kernels(*args, dk::valid,
                          [&](const dk::TileKernels& kernels) { return dk::SampledCall(*args, kernels).run(); });
}
