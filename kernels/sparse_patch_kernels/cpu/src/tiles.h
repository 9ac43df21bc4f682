// Matrix units: sums of products of bfloat16 in tiles (AMX), and a twin in plain C++ that tests use
// on any machine (-DEMULATED_TILES).
//
// A unit works on a square of SIDE x SIDE sums. A step adds the products of SIDE rows of 16 words
// (two bfloat16 each) with 16 rows of SIDE words; words that meet are multiplied half by half.

#pragma once

#include "common.h"

#if defined(EMULATED_TILES) || (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__))
#define HAS_TILES
#endif

#ifdef HAS_TILES

#ifndef EMULATED_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// The square of the thread that makes it. One at a time, and no other user of tiles meanwhile.
class Tiles {
 public:
  static constexpr int SIDE = 32, WORDS = 16;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

#ifdef EMULATED_TILES
  static constexpr char NAME[] = "emulated tiles";
  Tiles() = default;
  static bool available() { return true; }

  void clear() { std::memset(sums, 0, sizeof sums); }
  void load(const float* from, int64_t step) {
    for (int i = 0; i < SIDE; ++i) std::memcpy(sums[i], from + i * step, sizeof sums[i]);
  }
  void store(float* to, int64_t step) const {
    for (int i = 0; i < SIDE; ++i) std::memcpy(to + i * step, sums[i], sizeof sums[i]);
  }
  // Steps are counted in words; `left` and `right` hold the halves of a row of SIDE words.
  void add(const uint32_t* a, int64_t a_step, const uint32_t* left, const uint32_t* right,
           int64_t b_step) {
    for (int i = 0; i < SIDE; ++i) {
      for (int word = 0; word < WORDS; ++word) {
        const uint32_t x = load_word(a + i * a_step + word);
        for (int j = 0; j < SIDE; ++j) {
          const uint32_t y = load_word((j < 16 ? left + j : right + j - 16) + word * b_step);
          sums[i][j] += widened(static_cast<uint16_t>(x)) * widened(static_cast<uint16_t>(y));
          sums[i][j] += bits<float>(x & 0xffff0000u) * bits<float>(y & 0xffff0000u);
        }
      }
    }
  }

 private:
  static uint32_t load_word(const uint32_t* from) { return ::load<uint32_t>(from); }
  float sums[SIDE][SIDE];
#else
  static constexpr char NAME[] = "AMX tiles";
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; ++tile) shape.row_bytes[tile] = 64, shape.rows[tile] = 16;
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }

  // Linux gives a process the registers of tiles when it asks for them; it may refuse.
  static bool available() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
  }

  // Tiles 0 to 3 are the square, two beside two; 4 and 5 are rows of a, 6 and 7 columns of b.
  void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  void load(const float* from, int64_t step) {
    written();
    _tile_loadd(0, from, step * 4);
    _tile_loadd(1, from + 16, step * 4);
    _tile_loadd(2, from + 16 * step, step * 4);
    _tile_loadd(3, from + 16 * step + 16, step * 4);
  }
  void store(float* to, int64_t step) const {
    _tile_stored(0, to, step * 4);
    _tile_stored(1, to + 16, step * 4);
    _tile_stored(2, to + 16 * step, step * 4);
    _tile_stored(3, to + 16 * step + 16, step * 4);
    written();
  }
  // Steps are counted in words; `left` and `right` hold the halves of a row of SIDE words.
  void add(const uint32_t* a, int64_t a_step, const uint32_t* left, const uint32_t* right,
           int64_t b_step) {
    written();
    _tile_loadd(4, a, a_step * 4);
    _tile_loadd(6, left, b_step * 4);
    _tile_loadd(7, right, b_step * 4);
    _tile_loadd(5, a + 16 * a_step, a_step * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

 private:
  // Compilers do not know what memory these instructions read and write.
  static void written() { asm volatile("" ::: "memory"); }
#endif
};

// How products of bfloat16 are made with it.
struct Tiled {
  using Type = uint16_t;
  using Unit = Tiles;
  static constexpr int PER_WORD = 2, ROWS = Tiles::SIDE, WORDS = Tiles::WORDS;
  static constexpr bool TILED = true;
};

}  // namespace

#endif
