// First and second moments of the features over tokens, by the packs and products of the loss: with the features of a
// chunk of tokens as rows, the products of a panel of features with another are the similarities of two tiles.
//
// Sums over a chunk are fp32, sums over chunks fp64. Each element of the result is summed by one worker, chunk by chunk,
// so every bit is the same for any number of threads.

#include "dispersion.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "call.h"
#include "runtime.h"

namespace dk {
namespace {

// Products of the features of tile a with those of tile b >= a.
struct MomentStep {
  int32_t a, b;
};

class MomentCall {
 public:
  MomentCall(const dk_moments_args& args, const TileKernels& kernels) : args_(args), kernels_(kernels) {
    threads_ = {args.parallel_for, std::max(1, int(args.threads))};
    tokens_ = tokens_of(args);
    job_.args = &tokens_;
    job_.padded_features = round_up(args.features, kernels.panel);
    const int64_t longest = kLargestTile / kernels.panel * kernels.panel;
    const int64_t count = (args.features + longest - 1) / longest;
    tile_features_ = round_up((args.features + count - 1) / count, kernels.panel);
    const int32_t tiles = int32_t((args.features + tile_features_ - 1) / tile_features_);
    for (int32_t a = 0; a < tiles; ++a)
      for (int32_t b = a; b < tiles; ++b) steps_.push_back({a, b});
  }

  int32_t run() {
    const int64_t most = std::max(kGroupBytes / (job_.padded_features * int64_t(sizeof(float))) / kChunk, int64_t(1));
    for (int64_t begin = 0; begin < args_.tokens; begin += most * kChunk)
      if (const int32_t status = sweep(begin, std::min(most * kChunk, args_.tokens - begin))) return status;
    return DK_OK;
  }

 private:
  static constexpr int64_t kChunk = 512;  // most tokens whose products are summed in fp32
  static constexpr int64_t kUnit = 32;    // tokens that one worker packs
  // Limit of the packs of the tokens that are swept together, in bytes; a single chunk may exceed it.
  static constexpr int64_t kGroupBytes = int64_t(8) << 20;

  // Adds the tokens begin <= i < begin + tokens to the result.
  int32_t sweep(int64_t begin, int64_t tokens) {
    chunks_ = (tokens + kChunk - 1) / kChunk;
    chunk_ = (tokens + chunks_ - 1) / chunks_;
    units_ = (chunk_ + kUnit - 1) / kUnit;
    const int64_t workers = std::min<int64_t>(threads_.count, std::max(int64_t(steps_.size()), chunks_ * units_));
    std::vector<Scratch> scratch(workers);
    Arena count(nullptr);
    place(scratch, tokens, count);
    const Workspace workspace(count.used());
    if (!workspace.data()) return DK_OUT_OF_MEMORY;
    Arena arena(workspace.data());
    place(scratch, tokens, arena);
    std::copy_n(args_.shift, args_.features, shift_);
    std::fill(shift_ + args_.features, shift_ + job_.padded_features, 0.0f);

    std::atomic<int64_t> next_unit{0}, next_step{0};
    std::atomic<int32_t> packed{0};
    threads_.run(workers, [&](int64_t worker) {
      for (int64_t u; (u = next_unit.fetch_add(1)) < chunks_ * units_;) {
        pack(begin, tokens, u, scratch[worker]);
        packed.fetch_add(1, std::memory_order_release);
      }
      wait_for(packed, int32_t(chunks_ * units_));
      for (int64_t s; (s = next_step.fetch_add(1)) < int64_t(steps_.size());)
        for (int64_t c = 0; c < chunks_; ++c) multiply(steps_[s], c, tokens, scratch[worker]);
    });
    for (int64_t u = 0; u < chunks_ * units_; ++u)
      for (int64_t k = 0; k < args_.features; ++k) args_.total[k] += sums_[u * job_.padded_features + k];
    for (int64_t t = 0; t < tokens; ++t) *args_.norms += norms_[t];
    return DK_OK;
  }

  // Tokens of chunk c.
  int64_t depth(int64_t c, int64_t tokens) const { return std::min(tokens - c * chunk_, chunk_); }

  void pack(int64_t begin, int64_t tokens, int64_t unit, Scratch& scratch) {
    const int64_t c = unit / units_, first = unit % units_ * kUnit, of_chunk = depth(c, tokens);
    const int64_t count = std::clamp(of_chunk - first, int64_t(0), kUnit), at = c * chunk_ + first;
    kernels_.pack_features(job_, shift_, args_.order + begin + at, count, scratch,
                           panels_ + c * chunk_ * job_.padded_features + first * kernels_.panel, of_chunk,
                           sums_ + unit * job_.padded_features, norms_ + at);
  }

  void multiply(MomentStep step, int64_t c, int64_t tokens, Scratch& scratch) {
    dk_args as_features = {};
    as_features.features = depth(c, tokens);
    Job job = {};
    job.args = &as_features;
    const auto tile_of = [&](int32_t number) {
      Tile tile = {};
      tile.tokens = int32_t(std::min(tile_features_, args_.features - number * tile_features_));
      tile.padded = int32_t(round_up(tile.tokens, kernels_.panel));
      tile.feature_major =
          panels_ + c * chunk_ * job_.padded_features + number * tile_features_ * as_features.features;
      return tile;
    };
    const Tile a = tile_of(step.a), b = tile_of(step.b);
    double* rows[kLargestTile];
    for (int32_t i = 0; i < a.tokens; ++i) {
      const int64_t row = step.a * tile_features_ + i, block = row / args_.block_rows * args_.block_rows;
      rows[i] = args_.blocks[row / args_.block_rows] + (row - block) * (args_.features - block) - block +
                step.b * tile_features_;
    }
    kernels_.add_products(job, a, step.a == step.b ? a : b, scratch, rows);
  }

  void place(std::vector<Scratch>& scratch, int64_t tokens, Arena& arena) {
    for (Scratch& s : scratch) s = take_scratch(arena, kernels_.panel, job_.padded_features);
    shift_ = arena.take<float>(size_t(job_.padded_features));
    sums_ = arena.take<float>(size_t(chunks_ * units_ * job_.padded_features));
    norms_ = arena.take<double>(size_t(tokens));
    panels_ = arena.take<float>(size_t(chunks_ * chunk_ * job_.padded_features));
  }

  const dk_moments_args& args_;
  const TileKernels& kernels_;
  Threads threads_;
  dk_args tokens_ = {};
  Job job_ = {};
  int64_t tile_features_;
  std::vector<MomentStep> steps_;
  int64_t chunks_, chunk_, units_;  // chunk_: tokens of a chunk, but for the last; units_: units of a chunk
  float *shift_, *sums_, *panels_;  // sums_: [chunks][units][padded_features]; panels_: [chunks][panel][tokens][kPanel]
  double* norms_;                   // [tokens]
};

bool valid(const dk_moments_args& args) {
  if (args.rows < 0 || args.tokens < 0 || args.features < 1 || args.block_rows < 1) return false;
  if (args.dtype < DK_FLOAT32 || args.dtype > DK_FLOAT16) return false;
  return std::all_of(args.order, args.order + args.tokens, [&](int64_t row) { return row >= 0 && row < args.rows; });
}

}  // namespace
}  // namespace dk

DK_EXPORT int32_t dk_moments(const dk_moments_args* args) {
  return dk::with_kernels(*args, dk::valid,
                          [&](const dk::TileKernels& kernels) { return dk::MomentCall(*args, kernels).run(); });
}
