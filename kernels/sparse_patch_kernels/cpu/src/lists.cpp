// Rankings of blocks and lists of runs, row by row, on a CPU. `cpu/selection.py` loads it; the plain
// functions that it stands in for say what is computed.

#include "common.h"

#include <cfloat>

extern "C" {

// See estimators/ranking.
struct Rank {
  const float* scores;  // [lists, rows, n]
  const uint8_t *allowed, *forced;  // [rows, n], and so many entries from list to list
  int32_t* order;  // [lists, rows, n]
  int64_t allowed_list, forced_list, lists, rows, n;
  int32_t threads;
};

struct RankAndTest {
  const float* mass;                // [heads, rows, m]
  const int64_t* block;             // [rows], ascending
  const uint8_t* sample;            // [3, rows]: all, to rank by, to test on
  const uint8_t *allowed, *forced;  // [blocks, n]
  float *scores, *squares;          // [heads, blocks, n], [heads, n]
  int64_t heads, rows, m, blocks, n;
  int32_t squared, threads;
};

// See estimators/compaction.
struct Compact {
  const uint8_t* mask;  // [rows, n]
  int32_t* index;       // [rows, longest]
  int64_t rows, n, longest;
  int32_t threads;
};
}

namespace {

// A thread's memory for rankings.
class Ranker {
 public:
  // Indices of a row: the forced ones, the others from the highest score to the lowest, and those
  // that are not allowed; ascending where scores are equal. Returns how many are allowed.
  int64_t rank(const float* scores, const uint8_t* allowed, const uint8_t* forced, int64_t n,
               int32_t* order) {
    keys.clear();
    int32_t* to = order;
    for (int64_t i = 0; i < n; ++i) {
      if (!allowed[i]) continue;
      const float score = scores[i];
      if (forced[i] || score == -NOTHING) {
        *to++ = static_cast<int32_t>(i);
      } else {
        // NaN counts as the lowest number.
        keys.push_back(uint64_t{descending(score > -FLT_MAX ? score : -FLT_MAX)} << 32 | i);
      }
    }
    sort();
    for (uint64_t key : keys) *to++ = static_cast<int32_t>(key);
    const int64_t n_allowed = to - order;
    for (int64_t i = 0; i < n; ++i) {
      if (!allowed[i]) *to++ = static_cast<int32_t>(i);
    }
    return n_allowed;
  }

 private:
  // A word that is smaller for a larger number, and the same for both zeros.
  static uint32_t descending(float x) {
    const uint32_t word = bits<uint32_t>(x + 0.f);
    return word & 0x80000000u ? word : ~(word | 0x80000000u);
  }

  // By score. Keys come in the order of their indices, and equal ones stay so: a radix sort from
  // the lowest byte up.
  void sort() {
    constexpr int BYTES = 4, FIRST = 32;
    if (keys.size() < 64) {
      std::sort(keys.begin(), keys.end());
      return;
    }
    sorted.resize(keys.size());
    uint32_t counts[BYTES][256] = {};
    for (uint64_t key : keys) {
      for (int b = 0; b < BYTES; ++b) ++counts[b][key >> (FIRST + 8 * b) & 255];
    }
    for (int b = 0; b < BYTES; ++b) {
      const int shift = FIRST + 8 * b;
      if (counts[b][keys[0] >> shift & 255] == keys.size()) continue;
      uint32_t before = 0;
      for (uint32_t& count : counts[b]) {
        const uint32_t here = count;
        count = before;
        before += here;
      }
      for (uint64_t key : keys) sorted[counts[b][key >> shift & 255]++] = key;
      keys.swap(sorted);
    }
  }

  std::vector<uint64_t> keys, sorted;
};

// A row of a list.
class RankWorker {
 public:
  explicit RankWorker(const Rank& call) : c(call) {}

  void run(int64_t task) {
    const int64_t list = task / c.rows, row = task % c.rows;
    ranker.rank(c.scores + task * c.n, c.allowed + list * c.allowed_list + row * c.n,
                c.forced + list * c.forced_list + row * c.n, c.n, c.order + task * c.n);
  }

 private:
  const Rank& c;
  Ranker ranker;
};

// A head: what its blocks are worth by all rows of the sample, and what rankings by some of the
// rows lose on others.
class TestWorker {
 public:
  explicit TestWorker(const RankAndTest& call)
      : c(call), all(call.m), some(call.n), order(call.n), squares(call.n) {}

  void run(int64_t head) {
    std::fill(squares.begin(), squares.end(), 0.);
    const float* mass = c.mass + head * c.rows * c.m;
    for (int64_t block = 0, first = 0, end; block < c.blocks; ++block, first = end) {
      for (end = first; end < c.rows && c.block[end] == block;) ++end;
      add_up(mass, first, end);
      write_scores(c.scores + (head * c.blocks + block) * c.n);
      const int64_t n = ranker.rank(some.data(), c.allowed + block * c.n, c.forced + block * c.n,
                                    c.n, order.data());
      for (int64_t row = first; row < end; ++row) {
        if (c.sample[2 * c.rows + row]) test(mass + row * c.m, n);
      }
    }
    std::copy(squares.begin(), squares.end(), c.squares + head * c.n);
  }

 private:
  // What rows of a block give each key block: those that count, and those to rank by.
  void add_up(const float* mass, int64_t first, int64_t end) {
    std::fill(all.begin(), all.end(), 0.f);
    std::fill(some.begin(), some.end(), 0.f);
    for (int64_t row = first; row < end; ++row) {
      const float* from = mass + row * c.m;
      const bool counts = c.sample[row], ranks = c.sample[c.rows + row];
      for (int64_t i = 0; i < c.m; ++i) {
        const float worth = c.squared ? from[i] * from[i] : from[i];
        if (counts) all[i] += worth;
        if (ranks) some[i] += worth;
      }
    }
    // Logs would rank them the same. Of no worth at all: like what no row sees.
    for (float& worth : some) worth = worth > 0.f ? worth : NOTHING;
  }

  void write_scores(float* to) const {
    for (int64_t i = 0; i < c.m; ++i) to[i] = std::log(all[i]) * (c.squared ? 0.5f : 1.f);
    std::fill(to + c.m, to + c.n, NOTHING);
  }

  // What a row loses by the first of its ranked blocks, by the first two, ...
  void test(const float* mass, int64_t n) {
    double kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (order[i] < c.m) kept += mass[order[i]];
      const double lost = 1 - kept;
      squares[i] += lost < 0 ? 0 : lost * lost;
    }
  }

  const RankAndTest& c;
  std::vector<float> all, some;
  std::vector<int32_t> order;
  std::vector<double> squares;
  Ranker ranker;
};

class CompactWorker {
 public:
  explicit CompactWorker(const Compact& call) : c(call) {}

  void run(int64_t row) const {
    const uint8_t* mask = c.mask + row * c.n;
    int32_t *to = c.index + row * c.longest, *const end = to + c.longest;
    for (int64_t i = 0; i < c.n && to < end; ++i) {
      if (mask[i]) *to++ = static_cast<int32_t>(i);
    }
    std::fill(to, end, 0);
  }

 private:
  const Compact& c;
};

}  // namespace

// All return 0, or 1: no memory.
extern "C" int sparse_patch_rank(const Rank* call) {
  return !share_out<RankWorker>(*call, call->lists * call->rows, call->threads);
}

extern "C" int sparse_patch_rank_and_test(const RankAndTest* call) {
  return !share_out<TestWorker>(*call, call->heads, call->threads);
}

extern "C" int sparse_patch_compact(const Compact* call) {
  return !share_out<CompactWorker>(*call, call->rows, call->threads);
}
