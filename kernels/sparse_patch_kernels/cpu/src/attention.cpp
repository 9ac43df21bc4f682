// Block-sparse attention forward on a CPU: what `native.py` calls.
//
// A task is one query block of the query heads that share their lists and their KV head: its rows
// meet the keys that the plan names, a tile of keys at a time, with an online softmax in base 2.
// Keys are packed into slices on the way, so runs of any length cost the same, and nothing of size
// queries x keys is kept; where runs are whole slices, all keys are packed once and for all tasks.
// Products work in units of 32 bits: one float, or two bfloat16 where the CPU multiplies those, with
// matrix units (`tiles.h`) or without; other CPUs widen bfloat16 while packing.

#include "common.h"
#include "tiles.h"

extern "C" {

// Runs of `width` keys: `start [lists, blocks, listed]` and `count [counts, blocks]`.
struct Runs {
  const int32_t *start, *count;
  int64_t lists, counts, listed, width;
};

// Strides are counted in elements; the last dimension of q, k, v and out is contiguous.
struct Call {
  const void *q, *k, *v;
  void* out;
  float* lse;  // [heads, q_len]
  int64_t q_head, q_row, k_head, k_row, v_head, v_row, out_head, out_row;
  int64_t heads, kv_heads, q_len, kv_len, dim, v_dim;
  int64_t block, n_blocks, sink, window, units;
  const int32_t* order;  // [orders, kv_len], or null
  int64_t orders;
  const Runs* runs;
  int64_t n_runs;
  float scale, softcap;  // softcap 0: none
  int32_t threads, bfloat16;
};
}

namespace {

constexpr int TILE = 128;            // keys that share a step of the softmax
constexpr int MOST_ROWS = 512;       // of a task; more heads than fit are other tasks
static_assert(TILE % PANEL == 0, "tiles are whole panels");

// A row as `n` words; what lies beyond its `dim` numbers is 0.
template <class How>
void words(const typename How::Type* row, int64_t dim, uint32_t* to, int64_t n) {
  constexpr int PER = How::PER_WORD;
  const int64_t whole = dim / PER;
  words_of<PER>(row, whole, to);
  if (dim % PER) to[whole] = reinterpret_cast<const uint16_t*>(row)[dim - 1];
  for (int64_t i = (dim + PER - 1) / PER; i < n; ++i) to[i] = 0;
}

// Keys and values in slices of LANES, as `multiply` reads them: of a key slice, a row of LANES
// words for each word of a key; of a value slice, a row for every PER keys.
template <class How>
class Packer {
  using In = typename How::Type;
  static constexpr int PER = How::PER_WORD;

 public:
  explicit Packer(const Call& call)
      : c(call),
        q_words(round_up((call.dim + PER - 1) / PER, How::WORDS)),
        v_words(round_up(call.v_dim, PANEL)) {}

  int64_t key_slice() const { return LANES * q_words; }  // words
  int64_t value_slice() const { return LANES / PER * v_words; }
  const In* k(int64_t kv) const { return static_cast<const In*>(c.k) + kv * c.k_head; }
  const In* v(int64_t kv) const { return static_cast<const In*>(c.v) + kv * c.v_head; }

  // Up to LANES keys, the i-th at row `at(i)`; the rest of the slice is 0.
  template <class At>
  void keys(const In* k, At at, int n, uint32_t* to) const {
    Words block[LANES];
    for (int64_t w = 0; w < q_words; w += LANES) {
      const int64_t here = std::min<int64_t>(LANES, q_words - w);
      for (int i = 0; i < LANES; ++i) {
        block[i] = Words{};
        if (i >= n) continue;
        const In* row = k + at(i) * c.k_row;
        if (here == LANES && (w + LANES) * PER <= c.dim) {
          block[i] = wide(row + w * PER);
        } else {
          uint32_t part[LANES] = {};
          words<How>(row + w * PER, std::min<int64_t>(c.dim - w * PER, LANES * PER), part, LANES);
          block[i] = load<Words>(part);
        }
      }
      transpose(block);
      for (int64_t i = 0; i < here; ++i) store(to + (w + i) * LANES, block[i]);
    }
  }

  // The same of values.
  template <class At>
  void values(const In* v, At at, int n, uint32_t* to) const {
    const int64_t whole = c.v_dim / LANES * LANES;
    for (int t = 0; t < LANES; t += PER, to += v_words) {
      if (t >= n) {
        std::memset(to, 0, v_words * 4);
        continue;
      }
      // No sum of these columns is read, but denormal rubbish there would slow the products.
      std::memset(to + c.v_dim, 0, (v_words - c.v_dim) * 4);
      const In* row = v + at(t) * c.v_row;
      if (PER == 1) {
        for (int64_t i = 0; i < whole; i += LANES) store(to + i, wide(row + i));
        if (whole < c.v_dim) {
          words<How>(row + whole, c.v_dim - whole, to + whole, c.v_dim - whole);
        }
      } else {
        const In* next = t + 1 < n ? v + at(t + 1) * c.v_row : nullptr;
        for (int64_t i = 0; i < whole; i += LANES) {
          Words x = widened(load<Halves>(row + i));
          if (next) x |= widened(load<Halves>(next + i)) << 16;
          store(to + i, x);
        }
        for (int64_t i = whole; i < c.v_dim; ++i) {
          to[i] = static_cast<uint32_t>(row[i]) | (next ? static_cast<uint32_t>(next[i]) << 16 : 0);
        }
      }
    }
  }

 private:
  static Words wide(const float* from) { return load<Words>(from); }
  static Words wide(const uint16_t* from) {
    if (PER == 2) return load<Words>(from);
    return widened(load<Halves>(from)) << 16;
  }

  const Call& c;

 public:
  const int64_t q_words, v_words;
};

// All keys and values, packed.
template <class How>
class Sequence {
 public:
  explicit Sequence(const Call& call)
      : c(call),
        packer(call),
        slices((call.kv_len + LANES - 1) / LANES),
        keys(call.kv_heads * slices * packer.key_slice(), false),
        values(call.kv_heads * slices * packer.value_slice(), false) {
    std::atomic<int64_t> next{0};
    in_threads(call.threads, [&] {
      constexpr int64_t STEP = 16;  // slices
      for (int64_t i; (i = STEP * next++) < c.kv_heads * slices;) {
        for (int64_t j = i; j < std::min(i + STEP, c.kv_heads * slices); ++j) pack(j);
      }
    });
  }

  const uint32_t* key_slice(int64_t kv, int64_t key) const {
    return keys.at + (kv * slices + key / LANES) * packer.key_slice();
  }
  const uint32_t* value_slice(int64_t kv, int64_t key) const {
    return values.at + (kv * slices + key / LANES) * packer.value_slice();
  }

  // Is a call's plan one of whole slices, and do its tasks read keys so often that it pays?
  static bool pays(const Call& c) {
    const Runs& r = c.runs[0];
    if (c.n_runs != 1 || c.order || c.sink || c.window || r.width % LANES || c.block % LANES ||
        (c.kv_len - c.q_len) % LANES) {
      return false;
    }
    int64_t read = 0;
    for (int64_t unit = 0; unit < c.units; ++unit) {
      const int64_t head = unit * c.heads / c.units;
      for (int64_t block = 0; block < c.n_blocks; ++block) {
        const int32_t* start = r.start + (head * r.lists / c.heads * c.n_blocks + block) * r.listed;
        const int64_t n = std::min<int64_t>(
            r.count[head * r.counts / c.heads * c.n_blocks + block], r.listed);
        for (int64_t i = 0; i < n; ++i) {
          if (start[i] % LANES) return false;
        }
        read += std::max<int64_t>(n, 0) * r.width;
      }
    }
    return read >= 2 * c.kv_heads * c.kv_len;
  }

 private:
  void pack(int64_t slice) {
    const int64_t kv = slice / slices, first = slice % slices * LANES;
    const int n = static_cast<int>(std::min<int64_t>(LANES, c.kv_len - first));
    const auto at = [first](int i) { return first + i; };
    packer.keys(packer.k(kv), at, n, keys.at + slice * packer.key_slice());
    packer.values(packer.v(kv), at, n, values.at + slice * packer.value_slice());
  }

  const Call& c;
  const Packer<How> packer;
  const int64_t slices;
  Aligned<uint32_t> keys, values;
};

// A thread's memory and what it does with a task.
template <class How>
class Worker {
  using In = typename How::Type;
  static constexpr int PER = How::PER_WORD, ROWS = How::ROWS;

 public:
  // `whole` may be null: then tiles are packed as they come.
  Worker(const Call& call, const Sequence<How>* whole, int most_rows)
      : c(call),
        whole(whole),
        packer(call),
        q_words(packer.q_words),
        v_words(packer.v_words),
        rows_room(round_up(most_rows, ROWS)),
        queries(rows_room * q_words),
        tile_keys(whole ? 0 : TILE / LANES * packer.key_slice()),
        tile_values(TILE / LANES * packer.value_slice()),
        scores(ROWS * TILE),
        weights(PER == 1 ? 0 : ROWS * TILE / PER),
        sums(rows_room * v_words),
        best(rows_room),
        total(rows_room),
        decay(rows_room),
        seen(call.kv_len) {}

  // Heads [head, end) of one list and KV head, query block `block`.
  void run(int64_t head, int64_t end, int64_t block) {
    first_row = c.kv_len - c.q_len + block * c.block;
    in_block = std::min(c.block, c.q_len - block * c.block);
    n_rows = (end - head) * in_block;
    padded = round_up(n_rows, ROWS);
    load_queries(head, end, block);
    std::fill_n(best.at, padded, NOTHING);
    std::fill_n(total.at, padded, 0.f);
    std::memset(sums.at, 0, padded * v_words * sizeof(float));
    name_keys(head, block);
    kv = head * c.kv_heads / c.heads;
    for (size_t from = 0; from < keys.size(); from += TILE) {
      attend(from, std::min<size_t>(TILE, keys.size() - from));
    }
    write(head, end, block);
  }

 private:
  void load_queries(int64_t head, int64_t end, int64_t block) {
    uint32_t* to = queries.at;
    for (int64_t h = head; h < end; ++h) {
      const In* from = static_cast<const In*>(c.q) + h * c.q_head + block * c.block * c.q_row;
      for (int64_t i = 0; i < in_block; ++i, from += c.q_row, to += q_words) {
        words<How>(from, c.dim, to, q_words);
      }
    }
    std::memset(to, 0, (padded - n_rows) * q_words * 4);
  }

  // Keys of the task: those that all rows see (but for causality), then those in some row's window.
  void name_keys(int64_t head, int64_t block) {
    keys.clear();
    // Packed slices stay whole: what a last one has beyond the sequence is masked, wherever it is.
    const int64_t unit = whole ? LANES : 1, end = round_up(first_row + in_block, unit);
    const int64_t near = c.window ? std::max(c.sink, first_row - c.window + 1) : end;
    const bool again = c.n_runs > 1 || c.window > 0;  // may a key be named twice?
    for (int64_t key = 0; key < std::min(c.sink, end); ++key) keys.push_back(key);
    const int32_t* order =
        c.order ? c.order + head * c.orders / c.heads * c.kv_len : nullptr;
    for (int64_t i = 0; i < c.n_runs; ++i) {
      const Runs& r = c.runs[i];
      const int32_t* start = r.start + (head * r.lists / c.heads * c.n_blocks + block) * r.listed;
      // Whatever a plan says, nothing outside of its tensors is read.
      const int64_t n = std::min<int64_t>(
          r.count[head * r.counts / c.heads * c.n_blocks + block], r.listed);
      for (int64_t j = 0; j < n; ++j) {
        const int64_t stop = std::min<int64_t>(start[j] + r.width, round_up(c.kv_len, unit));
        for (int64_t slot = std::max(start[j], 0); slot < stop; ++slot) {
          const int64_t key = order ? order[slot] : slot;
          if (key < c.sink || key >= end) continue;
          if (again) {
            if (seen[key]) continue;
            seen[key] = 1;
          }
          if (key < near) keys.push_back(key);
        }
      }
    }
    if (c.window) {
      // Listed ones are open to all rows; the others, marked by ~, only to rows near enough.
      for (int64_t key = std::max<int64_t>(near, 0); key < end; ++key) {
        keys.push_back(seen[key] ? key : ~key);
      }
    }
    if (again) {
      for (int32_t key : keys) seen[key < 0 ? ~key : key] = 0;
    }
  }

  static int64_t place(int32_t key) { return key < 0 ? ~key : key; }

  // Ask for keys from `from` to `end`: they lie all over the memory, and packing would wait.
  void fetch(size_t from, size_t end) const {
    for (size_t t = from; t < std::min(keys.size(), end); ++t) {
      fetch(packer.k(kv) + place(keys[t]) * c.k_row, c.dim);
      fetch(packer.v(kv) + place(keys[t]) * c.v_row, c.v_dim);
    }
  }
  static void fetch(const In* row, int64_t n) {
    constexpr int64_t LINE = 64 / sizeof(In);
    for (int64_t i = 0; i < n; i += LINE) __builtin_prefetch(row + i, 0, 2);
  }

  // Attend `n` keys, up to TILE, from the task's `from`-th on.
  void attend(size_t from, int n) {
    const int32_t* key = &keys[from];
    bool masked = n % PANEL != 0;
    for (int t = 0; t < n; ++t) {
      masked |= key[t] < 0 || key[t] > first_row;
      position[t] = place(key[t]);
      reach[t] = key[t] < 0 ? c.window : INT_MAX;
    }
    const int width = round_up(n, PANEL);
    for (int t = n; t < width; ++t) position[t] = INT_MAX, reach[t] = INT_MAX;
    const int slices = (n + LANES - 1) / LANES;
    for (int i = 0; i < slices; ++i) slice(key + i * LANES, std::min(LANES, n - i * LANES), i);
    // Scores are made of two slices at a time; a second one where there is none is masked.
    key_places[slices] = key_places[slices - 1];
    if constexpr (How::TILED) pair_values(slices);
    // The next tile comes while this one is computed, some keys with every ROWS rows.
    const size_t share = (TILE * ROWS + padded - 1) / padded;
    size_t next = from + TILE;
    for (int64_t row = 0; row < padded; row += ROWS, next += share) {
      if (!whole) fetch(next, std::min(next + share, from + 2 * TILE));
      const int used = masked ? reached(row, n) : n;
      if (used == 0) continue;
      products(row, round_up(used, PANEL));
      score(row, round_up(used, PANEL), masked);
      gather(row, used);
    }
  }

  // The tile's slice number `i` has these keys.
  void slice(const int32_t* key, int n, int i) {
    if (whole) {
      key_places[i] = whole->key_slice(kv, *key);
      value_places[i] = whole->value_slice(kv, *key);
      return;
    }
    const auto at = [key](int t) { return place(key[t]); };
    uint32_t* k = tile_keys.at + i * packer.key_slice();
    uint32_t* v = value_room(i);
    packer.keys(packer.k(kv), at, n, k);
    packer.values(packer.v(kv), at, n, v);
    key_places[i] = k;
    value_places[i] = v;
  }
  uint32_t* value_room(int i) const { return tile_values.at + i * packer.value_slice(); }

  // Matrix units read the values of two slices as one block of memory. Neighbours in the sequence
  // are one; others are copied, and the second one of a last slice that has none is zeros.
  void pair_values(int slices) {
    const int64_t size = packer.value_slice();
    for (int i = 0; i < slices; i += 2) {
      const bool alone = i + 1 == slices;
      if (!alone && value_places[i + 1] == value_places[i] + size) continue;
      if (value_places[i] != value_room(i)) {
        std::memcpy(value_room(i), value_places[i], size * 4);
        value_places[i] = value_room(i);
      }
      if (alone) {
        std::memset(value_room(i + 1), 0, size * 4);
      } else {
        std::memcpy(value_room(i + 1), value_places[i + 1], size * 4);
      }
    }
  }

  // So many keys of the tile, from its first on, contain all that rows from `row` on may see.
  int reached(int64_t row, int n) const {
    int64_t last = 0;
    for (int64_t r = row; r < std::min(n_rows, row + ROWS); ++r) {
      last = std::max(last, first_row + r % in_block);
    }
    while (n > 0 && position[n - 1] > last) --n;
    return n;
  }

  // Products of ROWS rows with the first `width` keys, to `scores`.
  void products(int64_t row, int width) {
    const uint32_t* a = queries.at + row * q_words;
    for (int t = 0; t < width; t += PANEL) {
      const uint32_t* const* two = key_places + t / LANES;
      float* to = scores.at + t;
      if constexpr (!How::TILED) {
        Floats x[ROWS][WIDE] = {};
        multiply<How>(a, q_words, two, 0, two[1] - two[0], LANES, 1, q_words, x);
        for (int r = 0; r < ROWS; ++r) {
          for (int w = 0; w < WIDE; ++w) store(to + r * TILE + w * LANES, x[r][w]);
        }
      } else {
        unit.clear();
        for (int64_t w = 0; w < q_words; w += How::WORDS) {
          unit.add(a + w, q_words, two[0] + w * LANES, two[1] + w * LANES, LANES);
        }
        unit.store(to, TILE);
      }
    }
  }

  // Weights of ROWS rows for `width` keys, from the running maximum on; what came before decays.
  void score(int64_t row, int width, bool masked) {
    // Of a product as it is, in base 2. The largest product is the largest score: scale is positive.
    const float unit = c.softcap == 0.f ? c.scale * LOG2E : 1.f;
    for (int r = 0; r < ROWS; ++r) {
      float* s = scores.at + r * TILE;
      if (c.softcap != 0.f) {
        for (int t = 0; t < width; t += LANES) store(s + t, capped(load<Floats>(s + t)));
      }
      if (masked) mask(s, first_row + (row + r) % in_block, width);
      Floats most = all(NOTHING);
      for (int t = 0; t < width; t += LANES) most = larger(most, load<Floats>(s + t));
      const float top = largest(most) * unit, before = best.at[row + r];
      const float higher = top > before || top != top ? top : before;
      // A row that has seen nothing yet: the difference of infinities would be NaN. A real NaN stays.
      const bool blind = higher == NOTHING;
      Floats added = Floats{};
      for (int t = 0; t < width; t += PANEL) {
        Floats p[WIDE];
        for (int w = 0; w < WIDE; ++w) {
          const Floats x = load<Floats>(s + t + w * LANES);
          p[w] = blind ? pick(x != x, x, Floats{}) : exp2<sizeof(In) == 2>(x * unit - higher);
          added += p[w];
        }
        if constexpr (PER == 1) {
          for (int w = 0; w < WIDE; ++w) store(s + t + w * LANES, p[w]);
        } else {
          narrow(p, reinterpret_cast<uint16_t*>(weights.at + r * TILE / PER) + t);
        }
      }
      decay.at[row + r] = higher == before ? 1.f : std::exp2(before - higher);
      total.at[row + r] = total.at[row + r] * decay.at[row + r] + sum(added);
      best.at[row + r] = higher;
    }
  }

  // To bfloat16.
  static void narrow(const Floats (&from)[WIDE], uint16_t* to) {
#ifdef __AVX512BF16__
    const auto both = _mm512_cvtne2ps_pbh(bits<__m512>(from[1]), bits<__m512>(from[0]));
    std::memcpy(to, &both, sizeof both);
#else
    for (int w = 0; w < WIDE; ++w) {
      for (int i = 0; i < LANES; ++i) to[w * LANES + i] = narrowed(from[w][i]);
    }
#endif
  }

  // With the soft cap, in base 2.
  Floats capped(Floats x) const {
    // cap * tanh(x / cap), with tanh(y) = 1 - 2 / (e^2y + 1); beyond 40 it is 1.
    const Floats y = larger(all(-40.f), -larger(all(-40.f), -(x * (c.scale / c.softcap))));
    return (1.f - 2.f / (exp2(y * (2 * LOG2E)) + 1.f)) * (c.softcap * LOG2E);
  }

  void mask(float* s, int64_t at, int width) const {
    const Ints row = static_cast<int32_t>(at) - Ints{};
    for (int t = 0; t < width; t += LANES) {
      const Ints key = load<Ints>(position + t);
      const Ints hidden = (key > row) | (row - key >= load<Ints>(reach + t));
      store(s + t, pick(hidden, all(NOTHING), load<Floats>(s + t)));
    }
  }

  // Add the values of the first `used` keys, weighted.
  void gather(int64_t row, int used) {
    const uint32_t* a =
        PER == 1 ? reinterpret_cast<const uint32_t*>(scores.at) : weights.at;
    float* to = sums.at + row * v_words;
    if constexpr (!How::TILED) {
      const int slices = (used + LANES - 1) / LANES;
      for (int64_t column = 0; column < v_words; column += PANEL, to += PANEL) {
        Floats x[ROWS][WIDE];
        for (int r = 0; r < ROWS; ++r) {
          for (int w = 0; w < WIDE; ++w) {
            x[r][w] = load<Floats>(to + r * v_words + w * LANES) * decay.at[row + r];
          }
        }
        multiply<How>(a, TILE / PER, value_places, column, LANES, v_words, slices, LANES / PER, x);
        for (int r = 0; r < ROWS; ++r) {
          for (int w = 0; w < WIDE; ++w) store(to + r * v_words + w * LANES, x[r][w]);
        }
      }
    } else {
      for (int r = 0; r < ROWS; ++r) {
        const float factor = decay.at[row + r];
        if (factor == 1.f) continue;
        float* sum = to + r * v_words;
        for (int64_t i = 0; i < v_words; i += LANES) {
          store(sum + i, load<Floats>(sum + i) * factor);
        }
      }
      for (int64_t column = 0; column < v_words; column += PANEL, to += PANEL) {
        unit.load(to, v_words);
        for (int t = 0; t < used; t += PANEL) {
          const uint32_t* v = value_places[t / LANES] + column;
          unit.add(a + t / PER, TILE / PER, v, v + LANES, v_words);
        }
        unit.store(to, v_words);
      }
    }
  }

  void write(int64_t head, int64_t end, int64_t block) const {
    for (int64_t h = head, row = 0; h < end; ++h) {
      for (int64_t i = 0; i < in_block; ++i, ++row) {
        const int64_t at = block * c.block + i;
        In* to = static_cast<In*>(c.out) + h * c.out_head + at * c.out_row;
        const float inverse = total.at[row] == 0.f ? 0.f : 1.f / total.at[row];
        const float* from = sums.at + row * v_words;
        for (int64_t j = 0; j < c.v_dim; ++j) put(to + j, from[j] * inverse);
        c.lse[h * c.q_len + at] = (best.at[row] + std::log2(total.at[row])) * LN2;
      }
    }
  }
  static void put(float* to, float x) { *to = x; }
  static void put(uint16_t* to, float x) { *to = narrowed(x); }

  const Call& c;
  const Sequence<How>* whole;
  const Packer<How> packer;
  const int64_t q_words, v_words, rows_room;
  Aligned<uint32_t> queries, tile_keys, tile_values;
  Aligned<float> scores;
  Aligned<uint32_t> weights;
  Aligned<float> sums, best, total, decay;
  std::vector<uint8_t> seen;
  std::vector<int32_t> keys;
  int32_t position[TILE], reach[TILE];
  const uint32_t *key_places[TILE / LANES + 1], *value_places[TILE / LANES];
  int64_t kv = 0, first_row = 0, in_block = 0, n_rows = 0, padded = 0;
  typename How::Unit unit;
};

// False: no memory.
template <class How>
bool run(const Call& call) {
  const auto whole =
      Sequence<How>::pays(call) ? std::make_unique<Sequence<How>>(call) : nullptr;
  const int64_t group = call.heads / call.units;
  const int64_t at_once = std::max<int64_t>(1, std::min(group, MOST_ROWS / call.block));
  const int64_t parts = (group + at_once - 1) / at_once;
  const int64_t tasks = call.units * parts * call.n_blocks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> complete{true};
  auto work = [&] {
    try {
      Worker<How> worker(call, whole.get(), at_once * call.block);
      for (int64_t task; complete && (task = next++) < tasks;) {
        // Later blocks see more keys: first, so that no long one is left at the end.
        const int64_t block = call.n_blocks - 1 - task / (call.units * parts);
        const int64_t unit = task / parts % call.units, part = task % parts;
        const int64_t head = unit * group + part * at_once;
        worker.run(head, std::min((unit + 1) * group, head + at_once), block);
      }
    } catch (const std::bad_alloc&) {
      complete = false;
    }
  };
  in_threads(std::min<int64_t>(call.threads, tasks), work);
  return complete;
}

}  // namespace

extern "C" int sparse_patch_attention(const Call* call) {
  try {
    if (!call->bfloat16) return !run<Single<float>>(*call);
#ifdef HAS_TILES
    if (Tiles::available()) return !run<Tiled>(*call);
#endif
#ifdef __AVX512BF16__
    return !run<Pair>(*call);
#else
    return !run<Single<uint16_t>>(*call);
#endif
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// How bfloat16 is multiplied.
extern "C" const char* sparse_patch_products() {
#ifdef HAS_TILES
  if (Tiles::available()) return Tiles::NAME;
#endif
#ifdef __AVX512BF16__
  return "AVX512-BF16";
#else
  return "float32 vectors";
#endif
}
