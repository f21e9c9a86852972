// Histogram of the cosines of all pairs of tokens within each text, by the packs and products of the loss.
//
// Workers take the pairs of tiles in a fixed order; counts are integers, and each pair of tiles has a place for its sums,
// so every bit of the result is the same for any number of threads.

#include "dispersion.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <mutex>
#include <numeric>
#include <vector>

#include "call.h"
#include "runtime.h"

namespace dk {
namespace {

// Tile a with itself (a == b; the tile is packed first), or the pair of tiles (a, b).
struct CosineStep {
  int32_t a, b;
};

class CosineCall {
 public:
  CosineCall(const dk_cosines_args& args, const TileKernels& kernels) : args_(args), kernels_(kernels) {
    threads_ = {args.parallel_for, std::max(1, int(args.threads))};
    tokens_ = tokens_of(args);
    job_.args = &tokens_;
    job_.transform = Transform::kNormalize;
    job_.padded_features = round_up(args.features, kernels.panel);
    partner_end_.assign(kLargestTile, 0);  // not read: the tiles of a text are whole
  }

  int32_t run() {
    std::fill_n(args_.counts, args_.texts * 2 * DK_COSINE_BINS, int64_t(0));
    std::fill_n(args_.sums, args_.texts * 4, 0.0);
    int64_t packed = 0;
    for (int64_t text = 0; text < args_.texts; ++text) {
      const int64_t length = args_.ends[text] - args_.begins[text];
      if (length < 2) continue;
      const int64_t bytes = round_up(length, kernels_.panel) * args_.features * int64_t(sizeof(float));
      if (!tiles_.empty() && packed + bytes > kGroupBytes) {
        if (const int32_t status = sweep()) return status;
        packed = 0;
      }
      add_text(text);
      packed += bytes;
    }
    return tiles_.empty() ? int32_t(DK_OK) : sweep();
  }

 private:
  // Limit of the packs of the texts that are swept together, in bytes; a single text may exceed it.
  static constexpr int64_t kGroupBytes = int64_t(32) << 20;
  // Length of a text, in tokens, from which on its tiles may be the longest.
  static constexpr int64_t kLong = 4096;

  void add_text(int64_t text) {
    const int64_t begin = args_.begins[text], length = args_.ends[text] - begin;
    const int64_t longest = (length >= kLong ? kLargestTile : kLargestTile / 2) / kernels_.panel * kernels_.panel;
    const int64_t count = (length + longest - 1) / longest;
    const int64_t tokens = round_up((length + count - 1) / count, kernels_.panel);
    const int32_t first = int32_t(tiles_.size());
    for (int64_t start = 0; start < length; start += tokens) {
      Tile tile = {};
      tile.tokens = int32_t(std::min(tokens, length - start));
      tile.padded = int32_t(round_up(tile.tokens, kernels_.panel));
      tile.rows = args_.order + begin + start;
      tile.partner_end = partner_end_.data();
      tiles_.push_back(tile);
      texts_.push_back(text);
      splits_.push_back(int32_t(std::clamp<int64_t>(args_.splits[text] - begin - start, 0, tile.tokens)));
    }
    for (int32_t a = first; a < int32_t(tiles_.size()); ++a)
      for (int32_t b = a + 1; b < int32_t(tiles_.size()); ++b) pairs_.push_back({a, b});
  }

  // Adds the pairs of the waiting tiles to the result.
  int32_t sweep() {
    std::vector<CosineStep> steps(tiles_.size());
    for (size_t t = 0; t < tiles_.size(); ++t) steps[t] = {int32_t(t), int32_t(t)};
    steps.insert(steps.end(), pairs_.begin(), pairs_.end());
    const int64_t workers = std::min<int64_t>(threads_.count, int64_t(steps.size()));
    std::vector<Scratch> scratch(workers);
    std::vector<CosineSums*> found(workers);
    Arena count(nullptr);
    place(scratch, found, count);
    const Workspace workspace(count.used());
    if (!workspace.data()) return DK_OUT_OF_MEMORY;
    Arena arena(workspace.data());
    place(scratch, found, arena);

    std::vector<std::atomic<int32_t>> packed(tiles_.size());
    for (auto& flag : packed) flag.store(0, std::memory_order_relaxed);
    std::vector<double> sums(steps.size() * 4);
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    threads_.run(workers, [&](int64_t worker) {
      CosineSums& result = *found[worker];
      for (int64_t s; (s = next.fetch_add(1)) < int64_t(steps.size());) {
        const int32_t a = steps[s].a, b = steps[s].b;
        if (a == b) {
          kernels_.pack(job_, tiles_[a], scratch[worker]);
          packed[a].store(1, std::memory_order_release);
        } else {
          wait_for(packed[a], 1);
          wait_for(packed[b], 1);
        }
        memset(&result, 0, sizeof result);
        kernels_.cosines(job_, tiles_[a], tiles_[b], splits_[a], scratch[worker], result);
        memcpy(&sums[size_t(s) * 4], result.sums, sizeof result.sums);
        const std::lock_guard<std::mutex> lock(mutex);
        add_counts(result, args_.counts + texts_[a] * 2 * DK_COSINE_BINS);
      }
    });
    for (size_t s = 0; s < steps.size(); ++s)
      for (int n = 0; n < 4; ++n) args_.sums[texts_[steps[s].a] * 4 + n] += sums[s * 4 + n];
    for (size_t t = 0; t < tiles_.size(); ++t)
      if (!tiles_[t].finite) std::fill_n(args_.sums + texts_[t] * 4, 4, std::numeric_limits<double>::quiet_NaN());
    tiles_.clear();
    texts_.clear();
    splits_.clear();
    pairs_.clear();
    return DK_OK;
  }

  static void add_counts(const CosineSums& from, int64_t* to) {
    for (int part = 0; part < 2; ++part)
      for (const auto& copy : from.counts[part])
        for (int bin = 0; bin < DK_COSINE_BINS; ++bin) to[part * DK_COSINE_BINS + bin] += copy[bin];
  }

  void place(std::vector<Scratch>& scratch, std::vector<CosineSums*>& found, Arena& arena) {
    for (Scratch& s : scratch) s = take_scratch(arena, kernels_.panel, job_.padded_features);
    for (CosineSums*& sums : found) sums = arena.take<CosineSums>(1);
    for (Tile& tile : tiles_) {
      const size_t padded = size_t(tile.padded);
      tile.norm = arena.take<float>(padded);
      tile.inverse = arena.take<float>(padded);
      tile.square = arena.take<float>(padded);
      tile.key = arena.take<float>(padded);
      tile.row_sum = arena.take<float>(padded);
      tile.feature_major = arena.take<float>(padded * size_t(args_.features));
    }
  }

  const dk_cosines_args& args_;
  const TileKernels& kernels_;
  Threads threads_;
  dk_args tokens_ = {};
  Job job_ = {};
  std::vector<Tile> tiles_;
  std::vector<int64_t> texts_;   // [tiles]
  std::vector<int32_t> splits_;  // [tiles]: tokens of part 0
  std::vector<CosineStep> pairs_;
  std::vector<int32_t> partner_end_;
};

bool valid(const dk_cosines_args& args) {
  if (args.rows < 0 || args.tokens < 0 || args.features < 1 || args.texts < 0) return false;
  if (args.dtype < DK_FLOAT32 || args.dtype > DK_FLOAT16) return false;
  for (int64_t i = 0; i < args.tokens; ++i)
    if (args.order[i] < 0 || args.order[i] >= args.rows) return false;
  for (int64_t k = 0; k < args.texts; ++k) {
    if (args.begins[k] < (k ? args.ends[k - 1] : 0) || args.ends[k] > args.tokens) return false;
    if (args.splits[k] < args.begins[k] || args.splits[k] > args.ends[k]) return false;
  }
  return true;
}

}  // namespace
}  // namespace dk

DK_EXPORT int32_t dk_cosines(const dk_cosines_args* args) {
  return dk::with_kernels(*args, dk::valid,
                          [&](const dk::TileKernels& kernels) { return dk::CosineCall(*args, kernels).run(); });
}
