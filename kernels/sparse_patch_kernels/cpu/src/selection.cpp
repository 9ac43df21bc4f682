// What costs most when methods choose, on a CPU: products of some queries with many keys, reduced
// on the spot. `cpu/selection.py` loads it; the plain functions that it stands in for
// say what is computed.
//
// Queries lie in panels, one in each lane. Keys are read where they are, a word (a float, or two
// bfloat16 where the CPU multiplies those) at a time for all lanes: nothing is gathered or copied.
// Matrix units read 32 keys at a time, so those that do not lie at equal distances are copied.

#include "common.h"
#include "tiles.h"

#include <cfloat>
#include <functional>

extern "C" {

// Strides are counted in elements; the last dimension of q and k is contiguous, and even in
// bfloat16. q holds floats where `float_queries` says so, whatever k holds.
struct Inputs {
  const void *q, *k;
  int64_t q_head, q_row, k_head, k_row, heads, kv_heads, dim;
  int32_t threads, bfloat16;
};

// The attention of some rows, pooled over `width` keys.
struct Masses {
  Inputs in;
  float* out;                   // [heads, n_rows, blocks]
  const int64_t *rows, *seen;   // [n_rows]: rows of q, and how many keys they see, one at least
  int64_t n_rows, width, blocks;
  float scale;
  int32_t largest;  // the log of a block's largest probability, in place of its sum
};

// HiP's search, see estimators/tree_search.
struct Search {
  Inputs in;
  int32_t *leaves, *count;         // [heads, n_blocks, keep], [heads, n_blocks]
  const int64_t *rows, *limit;     // [n_blocks, n_rows]; no limit: null
  const int64_t *rounds, *n_leaves;  // [n_blocks]; blocks of 0 rounds are left alone
  const int64_t* edges;            // [n_blocks, chunks + 1]
  int64_t n_blocks, n_rows, chunks, keep, sink, leaf, step, last_leaf;
  int32_t center, equal;  // who represents a chunk; are the first chunks equal
};

// InfiniteHiP's scans, see estimators/chunk_scan. q is [heads, n_blocks * n_rows, dim].
struct Scans {
  Inputs in;
  float* best;                          // [heads, n_blocks, n]
  const int64_t *starts, *limit, *end;  // [lists, n_blocks, n], [n_blocks], [n_blocks]
  int64_t lists, n_blocks, n_rows, n, chunk, kv_len;
};
}

namespace {

template <class How>
inline uint32_t word(const typename How::Type* key, int64_t s) {
  if constexpr (How::PER_WORD == 1 && sizeof(*key) == 2) {
    return uint32_t{key[s]} << 16;
  } else {
    return load<uint32_t>(key + s * How::PER_WORD);
  }
}

// ROWS keys, and their products with the queries of panels of W vectors.
template <class How, int W>
class Keys {
  using In = typename How::Type;
  static constexpr int ROWS = How::ROWS;

 public:
  explicit Keys(int64_t words) : words(words) {}
  void take(const In* const (&at)[ROWS]) { std::memcpy(key, at, sizeof key); }

  // to[r][:] = key[r] . panel. Inlined, it would share the registers with what is around it, and
  // they are few.
  __attribute__((noinline)) void times(const uint32_t* panel, float* to) {
    Floats sums[ROWS][W] = {};
    for (int64_t s = 0; s < words; ++s, panel += W * LANES) {
      Words b[W];
      for (int w = 0; w < W; ++w) b[w] = load<Words>(panel + w * LANES);
      for (int r = 0; r < ROWS; ++r) {
        const uint32_t a = word<How>(key[r], s);
        for (int w = 0; w < W; ++w) sums[r][w] = How::mac(sums[r][w], a, b[w]);
      }
    }
    std::memcpy(to, sums, sizeof sums);
  }

 private:
  const int64_t words;
  const In* key[ROWS];
};

#ifdef HAS_TILES
template <>
class Keys<Tiled, WIDE> {
  static constexpr int ROWS = Tiled::ROWS;

 public:
  explicit Keys(int64_t words) : words(words), copies(ROWS * words) {}

  void take(const uint16_t* const (&at)[ROWS]) {
    const int64_t apart = at[1] - at[0];
    bool regular = apart % 2 == 0;
    for (int r = 1; r < ROWS; ++r) regular &= at[r] - at[r - 1] == apart;
    if (regular) {
      first = reinterpret_cast<const uint32_t*>(at[0]);
      step = apart / 2;
      return;
    }
    for (int r = 0; r < ROWS; ++r) std::memcpy(copies.at + r * words, at[r], words * 4);
    first = copies.at;
    step = words;
  }

  void times(const uint32_t* panel, float* to) {
    unit.clear();
    for (int64_t s = 0; s < words; s += Tiled::WORDS) {
      unit.add(first + s, step, panel + s * PANEL, panel + s * PANEL + LANES, PANEL);
    }
    unit.store(to, PANEL);
  }

 private:
  const int64_t words;
  Aligned<uint32_t> copies;
  const uint32_t* first = nullptr;
  int64_t step = 0;
  Tiles unit;
};
#endif

// A query into a lane of a panel of `width` lanes.
template <class How>
inline void pack(const typename How::Type* row, int64_t words, uint32_t* lane, int64_t width) {
  for (int64_t s = 0; s < words; ++s) {
    words_of<How::PER_WORD>(row + s * How::PER_WORD, 1, lane + s * width);
  }
}

template <class How>
class MassWorker {
  using In = typename How::Type;
  static constexpr int ROWS = How::ROWS, PANELS = 4, TILE = PANELS * PANEL;

 public:
  explicit MassWorker(const Masses& call)
      : c(call),
        group(call.in.heads / call.in.kv_heads),
        words(call.in.dim / How::PER_WORD),
        keys(words),
        panels(TILE * words),
        logits(round_up(call.width, ROWS) * PANEL),
        best(call.blocks * TILE),
        total(call.blocks * TILE) {}

  static int64_t tiles(const Masses& c) {
    return (c.n_rows * (c.in.heads / c.in.kv_heads) + TILE - 1) / TILE;
  }

  // Rows of all heads of a group lie beside one another, so that a tile sees about as many keys.
  void run(int64_t task) {
    const int64_t n_tiles = tiles(c), kv = task / n_tiles;
    // Later rows see more keys: first, so that no long tile is left at the end.
    const int64_t first = (n_tiles - 1 - task % n_tiles) * TILE;
    const int64_t n = std::min<int64_t>(TILE, c.n_rows * group - first);
    k = static_cast<const In*>(c.in.k) + kv * c.in.k_head;
    std::fill_n(most, PANELS, 0);
    std::fill_n(least, PANELS, INT64_MAX);
    for (int64_t lane = 0; lane < round_up(n, PANEL); ++lane) {
      const int64_t i = first + std::min(lane, n - 1), row = i / group;
      const In* q = static_cast<const In*>(c.in.q) + (kv * group + i % group) * c.in.q_head;
      const int64_t p = lane / PANEL;
      pack<How>(q + c.rows[row] * c.in.q_row, words, panels.at + p * PANEL * words + lane % PANEL,
                PANEL);
      seen[lane] = c.seen[row];
      most[p] = std::max<int64_t>(most[p], seen[lane]);
      least[p] = std::min<int64_t>(least[p], seen[lane]);
    }
    const int64_t n_panels = (n + PANEL - 1) / PANEL;
    n_keys = *std::max_element(most, most + n_panels);
    const int64_t blocks = (n_keys + c.width - 1) / c.width;
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t p = 0; p < n_panels; ++p) pool(block, p);
    }
    for (int64_t p = 0; p < n_panels; ++p) normalize(blocks, p);
    for (int64_t lane = 0; lane < n; ++lane) {
      const int64_t i = first + lane, head = kv * group + i % group;
      float* to = c.out + (head * c.n_rows + i / group) * c.blocks;
      for (int64_t b = 0; b < blocks; ++b) to[b] = total.at[b * TILE + lane];
      std::fill(to + blocks, to + c.blocks, c.largest ? NOTHING : 0.f);
    }
  }

 private:
  // Largest logit of a block, in base 2, and the sum of the powers beside it.
  void pool(int64_t block, int64_t p) {
    const int64_t first = block * c.width, end = std::min(first + c.width, most[p]);
    const uint32_t* panel = panels.at + p * PANEL * words;
    const float unit = c.scale * LOG2E;
    Floats top[WIDE];
    for (int w = 0; w < WIDE; ++w) top[w] = all(NOTHING);
    for (int64_t key = first; key < end; key += ROWS) {
      const In* at[ROWS];
      // Rows past the block are not used, but keys at equal distances need not be copied.
      for (int r = 0; r < ROWS; ++r) at[r] = k + std::min(key + r, n_keys - 1) * c.in.k_row;
      keys.take(at);
      float* to = logits.at + (key - first) * PANEL;
      keys.times(panel, to);
      for (int r = 0; r < ROWS && key + r < end; ++r, to += PANEL) {
        for (int w = 0; w < WIDE; ++w) {
          Floats x = load<Floats>(to + w * LANES);
          if (key + r >= least[p]) {
            const Ints sees = load<Ints>(seen + p * PANEL + w * LANES);
            x = pick(sees <= static_cast<int32_t>(key + r), all(NOTHING), x);
            store(to + w * LANES, x);
          }
          top[w] = larger(top[w], x);
        }
      }
    }
    for (int w = 0; w < WIDE; ++w) {
      const Ints blind = top[w] == all(NOTHING);
      const Floats base = pick(blind, Floats{}, top[w] * unit);
      Floats added = Floats{};
      for (int64_t t = 0; t < end - first; ++t) {
        const Floats x = load<Floats>(logits.at + t * PANEL + w * LANES);
        added += exp2<sizeof(In) == 2>(x * unit - base);
      }
      const int64_t at = block * TILE + p * PANEL + w * LANES;
      store(best.at + at, pick(blind, all(NOTHING), base));
      store(total.at + at, pick(blind, Floats{}, added));
    }
  }

  // From these to shares of a row, in `total`.
  void normalize(int64_t blocks, int64_t p) {
    for (int w = 0; w < WIDE; ++w) {
      float *m = best.at + p * PANEL + w * LANES, *t = total.at + p * PANEL + w * LANES;
      Floats top = all(NOTHING), sums = Floats{};
      for (int64_t b = 0; b < blocks; ++b) top = larger(top, load<Floats>(m + b * TILE));
      for (int64_t b = 0; b < blocks; ++b) {
        sums += load<Floats>(t + b * TILE) * exp2(load<Floats>(m + b * TILE) - top);
      }
      Floats logs;
      for (int i = 0; i < LANES; ++i) logs[i] = std::log2(sums[i]);
      const Floats inverse = 1.f / sums;
      for (int64_t b = 0; b < blocks; ++b) {
        const Floats below = load<Floats>(m + b * TILE) - top;
        const Floats share = load<Floats>(t + b * TILE) * exp2(below) * inverse;
        store(t + b * TILE, c.largest ? (below - logs) * LN2
                                      : pick(below < all(-126.f), Floats{} * share, share));
      }
    }
  }

  const Masses& c;
  const int64_t group, words;
  Keys<How, WIDE> keys;
  Aligned<uint32_t> panels;
  Aligned<float> logits, best, total;
  int32_t seen[TILE];
  int64_t most[PANELS], least[PANELS], n_keys = 0;
  const In* k = nullptr;
};

// A key to score, and for whom.
struct Wanted {
  int64_t key;
  int32_t whose;
};

// Largest products of keys with the queries of some panels.
template <class How, int W>
class Scorer {
  using In = typename How::Type;
  static constexpr int ROWS = How::ROWS, WIDTH = W * LANES;

 public:
  Scorer(const Inputs& in, int64_t n_rows)
      : in(in),
        words(in.dim / How::PER_WORD),
        n_panels((n_rows + WIDTH - 1) / WIDTH),
        panels(n_panels * WIDTH * words),
        limit(n_panels * WIDTH),
        rows(words) {}

  // Row i of `n` is the row `row(i)` of this head; the last one fills up the panel.
  template <class Row>
  void take(int64_t head, int64_t n, Row row) {
    const In* q = static_cast<const In*>(in.q) + head * in.q_head;
    k = static_cast<const In*>(in.k) + head * in.kv_heads / in.heads * in.k_head;
    for (int64_t lane = 0; lane < n_panels * WIDTH; ++lane) {
      pack<How>(q + row(std::min(lane, n - 1)) * in.q_row, words,
                panels.at + lane / WIDTH * WIDTH * words + lane % WIDTH, WIDTH);
    }
    least = INT64_MAX;
  }

  // From here on, keys after `to(i)` count as the lowest number for row i.
  template <class To>
  void bound(int64_t n, To to) {
    for (int64_t lane = 0; lane < n_panels * WIDTH; ++lane) {
      const int64_t last = to(std::min(lane, n - 1));
      limit.at[lane] = static_cast<int32_t>(std::max<int64_t>(last, -1));
      least = std::min(least, last);
    }
  }

  // Scores all keys, and calls use(keys, n, tops) for every n of them, ROWS at most: the largest
  // product of each, by vectors of lanes.
  template <class Use>
  void score_all(const std::vector<Wanted>& keys, Use use) {
    const int64_t n = keys.size();
    const In *at[ROWS], *next[ROWS];
    Floats top[ROWS];
    fetch(keys, 0, next);
    for (int64_t first = 0; first < n; first += ROWS) {
      std::memcpy(at, next, sizeof at);
      fetch(keys, first + ROWS, next);
      score(at, &keys[first], std::min<int64_t>(ROWS, n - first), top);
      use(&keys[first], static_cast<int>(std::min<int64_t>(ROWS, n - first)), top);
    }
  }

 private:
  // Names the keys from `first` on, and has them brought closer: they lie anywhere, so no CPU does
  // that by itself. The last one fills up what is not there.
  void fetch(const std::vector<Wanted>& keys, int64_t first, const In* (&at)[ROWS]) const {
    const int64_t n = keys.size();
    for (int r = 0; r < ROWS && first < n; ++r) {
      at[r] = k + keys[std::min(first + r, n - 1)].key * in.k_row;
      const char* bytes = reinterpret_cast<const char*>(at[r]);
      for (int64_t i = 0; i < in.dim * int64_t{sizeof(In)}; i += 64) __builtin_prefetch(bytes + i);
    }
  }

  void score(const In* const (&at)[ROWS], const Wanted* keys, int n, Floats (&top)[ROWS]) {
    for (int r = 0; r < n; ++r) top[r] = all(NOTHING);
    rows.take(at);
    for (int64_t p = 0; p < n_panels; ++p) {
      alignas(64) float products[ROWS * WIDTH];
      rows.times(panels.at + p * WIDTH * words, products);
      for (int r = 0; r < n; ++r) {
        for (int w = 0; w < W; ++w) {
          Floats x = load<Floats>(products + r * WIDTH + w * LANES);
          if (keys[r].key > least) {
            const Ints last = load<Ints>(limit.at + p * WIDTH + w * LANES);
            x = pick(last < static_cast<int32_t>(keys[r].key), all(-FLT_MAX), x);
          }
          top[r] = larger(top[r], x);
        }
      }
    }
  }

  const Inputs& in;
  const int64_t words, n_panels;
  Aligned<uint32_t> panels;
  Aligned<int32_t> limit;
  Keys<How, W> rows;
  const In* k = nullptr;
  int64_t least = INT64_MAX;
};

template <class How, int W>
class SearchWorker {
  struct Chunk {
    int32_t start, size;
  };

 public:
  explicit SearchWorker(const Search& call)
      : c(call), scorer(call.in, call.n_rows), scores(call.last_leaf + 1) {}

  void run(int64_t task) {
    const int64_t head = task / c.n_blocks, block = c.n_blocks - 1 - task % c.n_blocks;
    const int64_t rounds = c.rounds[block], n = c.n_leaves[block];
    if (rounds == 0) return;
    const int64_t* rows = c.rows + block * c.n_rows;
    scorer.take(head, c.n_rows, [&](int64_t i) { return rows[i]; });
    if (c.limit) {
      scorer.bound(c.n_rows, [&](int64_t i) { return c.limit[block * c.n_rows + i]; });
    }
    known.assign(c.last_leaf + 1, 0);
    chunks.clear();
    if (rounds == 1 && c.equal) {  // each half is a leaf
      for (int32_t i = 0; i < n; ++i) chunks.push_back({i, 1});
      choose(c.keep);
    } else {
      const int64_t* edges = c.edges + block * (c.chunks + 1);
      for (int64_t i = 0; i < c.chunks; ++i) {
        chunks.push_back(
            {static_cast<int32_t>(edges[i]), static_cast<int32_t>(edges[i + 1] - edges[i])});
      }
      for (int64_t round = 1; round <= rounds; ++round) {
        halve();
        choose(round == rounds ? c.keep : c.chunks);
      }
    }
    int32_t* to = c.leaves + (head * c.n_blocks + block) * c.keep;
    int32_t total = 0;
    for (int empty = 0; empty < 2; ++empty) {  // empty chunks go to the end
      for (const Chunk& chunk : chunks) {
        if ((chunk.size == 0) == (empty == 1)) *to++ = chunk.start;
        if (empty == 0) total += chunk.size;
      }
    }
    c.count[head * c.n_blocks + block] = total;
  }

 private:
  // The leaf that represents a chunk.
  int64_t leaf_of(const Chunk& chunk) const {
    const int64_t leaf = c.center ? chunk.start + chunk.size / 2 : chunk.start;
    return std::min(leaf, c.last_leaf);
  }

  // The left half of a single leaf is empty, and the right one is the leaf.
  void halve() {
    halves.clear();
    for (const Chunk& chunk : chunks) {
      const int32_t half = chunk.size / 2;
      halves.push_back({chunk.start, half});
      halves.push_back({chunk.start + half, chunk.size - half});
    }
    chunks.swap(halves);
  }

  // Keeps the `keep` best chunks in their order; of equal ones the first.
  void choose(int64_t keep) {
    if (static_cast<int64_t>(chunks.size()) <= keep) return;
    score();
    ranks.clear();
    for (size_t i = 0; i < chunks.size(); ++i) {
      const float x = chunks[i].size == 0 ? NOTHING : scores.at[leaf_of(chunks[i])];
      ranks.push_back(uint64_t{ordered(x)} << 32 | (UINT32_MAX - static_cast<uint32_t>(i)));
    }
    sorted = ranks;
    std::nth_element(sorted.begin(), sorted.begin() + keep - 1, sorted.end(),
                     std::greater<uint64_t>());
    const uint64_t last = sorted[keep - 1];
    size_t n = 0;
    for (size_t i = 0; i < chunks.size(); ++i) {
      if (ranks[i] >= last) chunks[n++] = chunks[i];
    }
    chunks.resize(n);
  }

  // Larger for larger numbers, equal for zeros, largest for NaN.
  static uint32_t ordered(float x) {
    if (x != x) return UINT32_MAX;
    const uint32_t word = bits<uint32_t>(x + 0.f);
    return word & 0x80000000u ? ~word : word | 0x80000000u;
  }

  // A leaf may stand for one chunk after another: it is scored once.
  void score() {
    wanted.clear();
    for (const Chunk& chunk : chunks) {
      const int64_t leaf = leaf_of(chunk);
      if (chunk.size == 0 || known[leaf]) continue;
      for (int64_t at = 0; at < c.leaf; at += c.step) {
        wanted.push_back({c.sink + leaf * c.leaf + at, static_cast<int32_t>(leaf)});
      }
      scores.at[leaf] = NOTHING;
      known[leaf] = 1;
    }
    scorer.score_all(wanted, [&](const Wanted* one, int n, const Floats* top) {
      Floats most = all(NOTHING);
      for (int r = 0; r < n; ++r) {
        most = larger(most, top[r]);  // keys of one leaf first lane by lane
        if (r + 1 < n && one[r + 1].whose == one[r].whose) continue;
        float& score = scores.at[one[r].whose];
        const float x = largest(most);
        score = x > score || x != x ? x : score;
        most = all(NOTHING);
      }
    });
  }

  const Search& c;
  Scorer<How, W> scorer;
  Aligned<float> scores;  // by leaf, where it is known
  std::vector<uint8_t> known;
  std::vector<Chunk> chunks, halves;
  std::vector<uint64_t> ranks, sorted;
  std::vector<Wanted> wanted;
};

template <class How, int W>
class ScanWorker {
  static constexpr int AT_ONCE = 32, MOST = 2 * 64;

  struct Scored {
    int64_t key;
    float score;
  };
  // The interval that is left of a chunk, and what has been scored on the way.
  struct Path {
    int64_t left, right;
    float best;
    bool active;
    int32_t n;
    Scored scored[MOST];
  };

 public:
  explicit ScanWorker(const Scans& call)
      : c(call), scorer(call.in, call.n_rows), paths(AT_ONCE) {}

  void run(int64_t task) {
    const int64_t head = task / c.n_blocks, block = c.n_blocks - 1 - task % c.n_blocks;
    const int64_t list = head * c.lists / c.in.heads;
    const int64_t* starts = c.starts + (list * c.n_blocks + block) * c.n;
    float* best = c.best + (head * c.n_blocks + block) * c.n;
    scorer.take(head, c.n_rows, [&](int64_t i) { return block * c.n_rows + i; });
    for (int64_t first = 0; first < c.n; first += AT_ONCE) {
      const int64_t n = std::min<int64_t>(AT_ONCE, c.n - first);
      for (int64_t i = 0; i < n; ++i) {
        Path& path = paths[i];
        path.left = starts[first + i];
        path.right = std::min(path.left + c.chunk, c.end[block]);
        path.best = NOTHING;
        path.n = 0;
      }
      for (int64_t size = 1; size < std::max<int64_t>(c.chunk, 2); size *= 2) {
        step(n, c.limit[block]);
      }
      for (int64_t i = 0; i < n; ++i) best[first + i] = paths[i].best;
    }
  }

 private:
  // One halving of the first `n` paths.
  void step(int64_t n, int64_t limit) {
    wanted.clear();
    places.clear();
    for (int64_t i = 0; i < n; ++i) {
      Path& path = paths[i];
      path.active = path.left < path.right && path.left <= limit;
      if (!path.active) continue;
      const int64_t middle = (path.left + path.right) / 2;
      want(path, (path.left + middle) / 2);
      want(path, (middle + path.right) / 2);
    }
    scorer.score_all(wanted, [&](const Wanted* one, int n, const Floats* top) {
      for (int r = 0; r < n; ++r) *places[one[r].whose] = largest(top[r]);
    });
    for (int64_t i = 0; i < n; ++i) {
      Path& path = paths[i];
      if (!path.active) continue;
      const int64_t middle = (path.left + path.right) / 2;
      const float a = known(path, (path.left + middle) / 2);
      const float b = known(path, (middle + path.right) / 2);
      for (float x : {a, b}) path.best = x > path.best || x != x ? x : path.best;
      (a > b ? path.right : path.left) = middle;
    }
  }

  void want(Path& path, int64_t key) {
    for (int32_t j = 0; j < path.n; ++j) {
      if (path.scored[j].key == key) return;
    }
    Scored& scored = path.scored[path.n++];
    scored.key = key;
    wanted.push_back({std::min(key, c.kv_len - 1), static_cast<int32_t>(places.size())});
    places.push_back(&scored.score);
  }

  static float known(const Path& path, int64_t key) {
    int32_t j = path.n - 1;
    while (path.scored[j].key != key) --j;
    return path.scored[j].score;
  }

  const Scans& c;
  Scorer<How, W> scorer;
  std::vector<Path> paths;
  std::vector<Wanted> wanted;
  std::vector<float*> places;
};

template <template <class, int> class Worker, class How, class Call>
bool by_width(const Call& call) {
  const int64_t tasks = call.in.heads * call.n_blocks, threads = call.in.threads;
  if constexpr (!How::TILED) {
    if (call.n_rows <= LANES) return share_out<Worker<How, 1>>(call, tasks, threads);
  }
  return share_out<Worker<How, WIDE>>(call, tasks, threads);
}

template <class How>
bool masses(const Masses& call) {
  const int64_t tasks = call.in.kv_heads * MassWorker<How>::tiles(call);
  return share_out<MassWorker<How>>(call, tasks, call.in.threads);
}

// Calls run(how) for the numbers that q and k hold. 0, or 1: no memory.
template <class Run>
int by_type(const Inputs& in, Run run) {
  try {
    if (!in.bfloat16) return !run(Single<float>());
#ifdef HAS_TILES
    if (in.dim % (2 * Tiled::WORDS) == 0 && Tiles::available()) return !run(Tiled());
#endif
#ifdef __AVX512BF16__
    return !run(Pair());
#else
    return !run(Single<uint16_t>());
#endif
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

extern "C" int sparse_patch_masses(const Masses* call) {
  return by_type(call->in, [&](auto how) { return masses<decltype(how)>(*call); });
}

extern "C" int sparse_patch_search(const Search* call) {
  return by_type(call->in, [&](auto how) { return by_width<SearchWorker, decltype(how)>(*call); });
}

extern "C" int sparse_patch_scan(const Scans* call) {
  return by_type(call->in, [&](auto how) { return by_width<ScanWorker, decltype(how)>(*call); });
}
