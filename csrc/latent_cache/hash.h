// 128-bit keys of (prior, instruction, observation): what a row of the latent cache is found by.
// Test: tests/priors/test_cache.py, tests/native/latent_cache_stress.cc
#ifndef LAGO_LATENT_CACHE_HASH_H_
#define LAGO_LATENT_CACHE_HASH_H_

#include <cstddef>
#include <cstdint>

namespace lago {

struct Key {
  std::uint64_t low;
  std::uint64_t high;
};

inline bool operator==(Key a, Key b) { return a.low == b.low && a.high == b.high; }

// MurmurHash3 x64 128 (Appleby, public domain), started from 128 bits instead of 32: hashes chain by `seed`.
Key HashBytes(const void* data, std::size_t size, Key seed);

struct Observations {
  const float* states;      // [rows, width]
  const std::int64_t* ids;  // [rows], indices of `seeds`
  const Key* seeds;         // of each instruction: the hash of the salt and its text
  std::size_t rows;
  std::size_t width;
  double resolution;  // states that round to the same multiples of it have one key; 0: all bits count
};

// Writes keys [rows]; returns the first row that holds a NaN or an infinity, or `rows`.
// Unsafe: pointers and ids are not checked.
std::size_t UnsafeHashRows(const Observations& in, int threads, Key* keys);

// Numbers the distinct keys by first appearance: first[j] is where number j first stands, inverse[i] the
// number of keys[i]. Both hold `n`; returns how many are distinct. Unsafe: pointers are not checked.
std::size_t UnsafeDistinct(const Key* keys, std::size_t n, std::int64_t* first, std::int64_t* inverse);

// Writes for each encoded row [n, row_bytes] a checksum of it and its key. Unsafe: pointers are not checked.
void UnsafeSeal(const Key* keys, const std::uint8_t* rows, std::size_t n, std::size_t row_bytes,
                std::uint64_t* seals);

}  // namespace lago

#endif  // LAGO_LATENT_CACHE_HASH_H_
