// Vectors of this CPU, products of rows in 32 bits, memory and threads: what the kernels share.

#pragma once

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

#if defined(__AVX512F__) || defined(EMULATED_TILES)
constexpr int LANES = 16, ROWS = 8;  // of 32 registers, 16 hold sums
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4;  // of 16 registers, 8 hold sums
#else
constexpr int LANES = 4, ROWS = 8;
#endif
constexpr int WIDE = 2;              // vectors beside one another in a product
constexpr int PANEL = WIDE * LANES;  // keys of a panel
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <class V, class T>
inline V load(const T* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <class V, class T>
inline void store(T* to, V x) {
  std::memcpy(to, &x, sizeof x);
}
template <class V, class From>
inline V bits(From x) {
  static_assert(sizeof(V) == sizeof(From), "same size");
  V y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline Floats all(float x) { return x - Floats{}; }
inline Floats pick(Ints where, Floats yes, Floats no) {
  return bits<Floats>((bits<Ints>(yes) & where) | (bits<Ints>(no) & ~where));
}
// Where one of them is NaN: b.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return bits<Floats>(_mm512_max_ps(bits<__m512>(a), bits<__m512>(b)));
#elif defined(__AVX__) && !defined(EMULATED_TILES)
  return bits<Floats>(_mm256_max_ps(bits<__m256>(a), bits<__m256>(b)));
#else
  return pick(a > b, a, b);
#endif
}
// Halves meet until one number is left.
template <class Meet>
inline float folded(Floats x, Meet meet) {
  float half[LANES];
  store(half, x);
#pragma GCC unroll 4
  for (int n = LANES / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) half[i] = meet(half[i], half[i + n]);
  }
  return half[0];
}
inline float sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(bits<__m512>(x));
#else
  return folded(x, [](float a, float b) { return a + b; });
#endif
}
// Not a NaN's business: where there is one, any number may come out, or NaN.
inline float largest(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(bits<__m512>(x));
#else
  return folded(x, [](float a, float b) { return a > b ? a : b; });
#endif
}

// 2^x for x up to 127; at most 2^-126 below -126; NaN of NaN. The relative error before rounding is
// 1e-7, or 3e-6 for what becomes a bfloat16 (2e-3): minimax polynomials.
template <bool SHORT = false>
inline Floats exp2(Floats x) {
  const Floats magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  x = larger(all(-126.f), x);
  const Floats whole = x + magic;
  const Floats f = x - (whole - magic);
  Floats p;
  if (SHORT) {
    p = f * 9.582852467e-3f + 5.590642551e-2f;
    p = p * f + 2.402409863e-1f;
    p = p * f + 6.931241933e-1f;
  } else {
    p = f * 1.327679577e-3f + 9.675544463e-3f;
    p = p * f + 5.550712277e-2f;
    p = p * f + 2.402211965e-1f;
    p = p * f + 6.931469677e-1f;
  }
  p = p * f + 1.f;
  return bits<Floats>(bits<Ints>(p) + (bits<Ints>(whole) << 23));
}

inline Words widened(Halves x) {  // in the lower half of each word
#if defined(__AVX512F__)
  return bits<Words>(_mm512_cvtepu16_epi32(bits<__m256i>(x)));
#else
  return __builtin_convertvector(x, Words);
#endif
}

inline float widened(uint16_t x) { return bits<float>(uint32_t{x} << 16); }

inline uint16_t narrowed(float x) {  // to the nearest bfloat16, ties to even
  uint32_t word = bits<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>((word >> 16) | 64);
  return static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// How numbers of type Type lie in words and are multiplied: PER_WORD in each, ROWS rows at a time,
// their words in steps of WORDS.
template <class In>
struct Single {  // one float in 32 bits
  using Type = In;
  static constexpr int PER_WORD = 1, ROWS = ::ROWS, WORDS = 1;
  static constexpr bool TILED = false;
  struct Unit {};
  static Floats mac(Floats sum, uint32_t a, Words b) {
    return sum + all(bits<float>(a)) * bits<Floats>(b);
  }
};

#ifdef __AVX512BF16__
struct Pair {  // two bfloat16 in 32 bits
  using Type = uint16_t;
  static constexpr int PER_WORD = 2, ROWS = ::ROWS, WORDS = 1;
  static constexpr bool TILED = false;
  struct Unit {};
  static Floats mac(Floats sum, uint32_t a, Words b) {
    return bits<Floats>(_mm512_dpbf16_ps(bits<__m512>(sum), (__m512bh)_mm512_set1_epi32(a),
                                         bits<__m512bh>(b)));
  }
};
#endif

// `n` words of 32 bits of a row: as they are, or widened.
template <int PER_WORD>
inline void words_of(const uint16_t* row, int n, uint32_t* to) {
  if (PER_WORD == 2) {
    std::memcpy(to, row, 4 * n);
  } else {
    for (int i = 0; i < n; ++i) to[i] = uint32_t{row[i]} << 16;
  }
}
template <int PER_WORD>
inline void words_of(const float* row, int n, uint32_t* to) {
  std::memcpy(to, row, 4 * n);
}

// LANES rows of LANES words, transposed in place.
template <int STEP, int... I>
inline void exchange(Words (&x)[LANES], std::integer_sequence<int, I...>) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    if (i & STEP) continue;
    const Words a = x[i], b = x[i + STEP];
    // Lanes of a, then of b, numbered from LANES on.
#ifdef __clang__
    x[i] = __builtin_shufflevector(a, b, (I & STEP ? LANES + I - STEP : I)...);
    x[i + STEP] = __builtin_shufflevector(a, b, (I & STEP ? LANES + I : I + STEP)...);
#else
    x[i] = __builtin_shuffle(a, b, Words{(I & STEP ? LANES + I - STEP : I)...});
    x[i + STEP] = __builtin_shuffle(a, b, Words{(I & STEP ? LANES + I : I + STEP)...});
#endif
  }
}
template <int STEP = 1>
inline void transpose(Words (&x)[LANES]) {
  if constexpr (STEP < LANES) {
    exchange<STEP>(x, std::make_integer_sequence<int, LANES>());
    transpose<2 * STEP>(x);
  }
}

// sums[r][c] += a[r, :] . b[:, c] over `parts * steps` words. Two vectors of a row of `b` are read,
// `apart` words from one another; rows are `b_step` words, and every `steps` of them lie together,
// `offset` words into the next of `parts` places. Inlined, it would share the registers with what is
// around it, and they are few.
template <class How>
__attribute__((noinline)) void multiply(const uint32_t* a, int a_step, const uint32_t* const* places, int64_t offset,
                     int64_t apart, int b_step, int parts, int steps,
                     Floats (&sums)[ROWS][WIDE]) {
  // Some compilers keep what a reference names in memory, step by step; these stay in registers.
  Floats x[ROWS][WIDE];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) x[r][0] = sums[r][0], x[r][1] = sums[r][1];
  for (int part = 0; part < parts; ++part) {
    const uint32_t* b = places[part] + offset;
    for (int s = 0; s < steps; ++s, b += b_step, ++a) {
      const Words b0 = load<Words>(b), b1 = load<Words>(b + apart);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        x[r][0] = How::mac(x[r][0], a[r * a_step], b0);
        x[r][1] = How::mac(x[r][1], a[r * a_step], b1);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) sums[r][0] = x[r][0], sums[r][1] = x[r][1];
}

template <class T>
struct Aligned {
  // Zeros, or whatever was there before where all of it is written anyway.
  explicit Aligned(size_t n, bool zeros = true) {
    const size_t bytes = std::max<size_t>(64, n * sizeof(T)), large = size_t{1} << 21;
    void* memory = nullptr;
    if (posix_memalign(&memory, bytes < 2 * large ? 64 : large, bytes)) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // A page fault for every 4 KiB would cost more than what is written there.
    if (bytes >= 2 * large) madvise(memory, bytes / large * large, MADV_HUGEPAGE);
#endif
    at = static_cast<T*>(memory);
    if (zeros) std::memset(memory, 0, n * sizeof(T));
#ifdef POISON  // of tests: NaN where something is read that nothing wrote
    if (!zeros) std::memset(memory, 0xff, n * sizeof(T));
#endif
  }
  ~Aligned() { std::free(at); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  T* at;
};

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Calls `work` in up to `n` threads at once, this one included, and waits for all.
template <class Work>
void in_threads(int64_t n, Work work) {
  std::vector<std::thread> others;
  others.reserve(std::max<int64_t>(n, 1));
  try {
    while (static_cast<int64_t>(others.size()) < n - 1) others.emplace_back(work);
  } catch (const std::system_error&) {
    // As many as the system gives; those there are do all tasks.
  }
  work();
  for (auto& thread : others) thread.join();
}

// Runs all tasks, a worker in each of up to `threads` threads; false: no memory.
template <class Worker, class Call>
bool share_out(const Call& call, int64_t tasks, int64_t threads) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> complete{true};
  in_threads(std::min(threads, tasks), [&] {
    try {
      Worker worker(call);
      for (int64_t task; complete && (task = next++) < tasks;) worker.run(task);
    } catch (const std::bad_alloc&) {
      complete = false;
    }
  });
  return complete;
}

}  // namespace
