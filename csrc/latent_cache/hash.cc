#include "latent_cache/hash.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/threads.h"
#include "latent_cache/parallel.h"

namespace lago {
namespace {

constexpr std::uint64_t kC1 = 0x87c37b91114253d5u;
constexpr std::uint64_t kC2 = 0x4cf5ad432745937fu;
constexpr std::size_t kRowsPerJob = 256;
// To hash a byte takes as long as to copy so many.
constexpr std::size_t kCopiesPerHash = 8;

inline std::uint64_t Rotate(std::uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }
inline std::uint64_t Mix1(std::uint64_t k) { return Rotate(k * kC1, 31) * kC2; }
inline std::uint64_t Mix2(std::uint64_t k) { return Rotate(k * kC2, 33) * kC1; }

inline std::uint64_t Finish(std::uint64_t k) {
  k ^= k >> 33;
  k *= 0xff51afd7ed558ccdu;
  k ^= k >> 33;
  k *= 0xc4ceb9fe1a85ec53u;
  return k ^ (k >> 33);
}

// x to the nearest integer, ties to even: a double of 2^52 or more is an integer, and in the sum with 2^52
// the last bit counts ones.
inline double Nearest(double x) {
  constexpr double kAllIntegers = 4503599627370496.0;  // 2^52
  const double magnitude = std::fabs(x);
  return magnitude < kAllIntegers ? std::copysign((magnitude + kAllIntegers) - kAllIntegers, x) : x;
}

inline bool AllFinite(const float* row, std::size_t width) {
  std::uint32_t bad = 0;
  for (std::size_t i = 0; i < width; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, row + i, sizeof bits);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return bad == 0;
}

// Rows [begin, end); returns the first that is not finite, or `end`.
std::size_t HashRange(const Observations& in, std::size_t begin, std::size_t end, Key* keys) {
  std::vector<double> rounded(in.resolution > 0 ? in.width : 0);
  for (std::size_t r = begin; r < end; ++r) {
    const float* row = in.states + r * in.width;
    if (!AllFinite(row, in.width)) return r;
    const Key seed = in.seeds[in.ids[r]];
    if (in.resolution > 0) {
      // Adding 0 turns -0 into 0, so that a cell around 0 has one key.
      for (std::size_t i = 0; i < in.width; ++i) rounded[i] = Nearest(row[i] / in.resolution) + 0.0;
      keys[r] = HashBytes(rounded.data(), in.width * sizeof(double), seed);
    } else {
      keys[r] = HashBytes(row, in.width * sizeof(float), seed);
    }
  }
  return end;
}

}  // namespace

Key HashBytes(const void* data, std::size_t size, Key seed) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::uint64_t h1 = seed.low, h2 = seed.high;
  const std::size_t blocks = size / 16;
  for (std::size_t i = 0; i < blocks; ++i) {
    std::uint64_t k[2];
    std::memcpy(k, bytes + 16 * i, sizeof k);
    h1 = (Rotate(h1 ^ Mix1(k[0]), 27) + h2) * 5 + 0x52dce729;
    h2 = (Rotate(h2 ^ Mix2(k[1]), 31) + h1) * 5 + 0x38495ab5;
  }
  // Zeros after the last bytes are told apart from bytes that are zero by the size, which is mixed in below.
  std::uint64_t tail[2] = {0, 0};
  if (size % 16 != 0) std::memcpy(tail, bytes + 16 * blocks, size % 16);
  h2 ^= Mix2(tail[1]);
  h1 ^= Mix1(tail[0]);
  h1 ^= size;
  h2 ^= size;
  h1 += h2;
  h2 += h1;
  h1 = Finish(h1);
  h2 = Finish(h2);
  h1 += h2;
  h2 += h1;
  return {h1, h2};
}

std::size_t UnsafeHashRows(const Observations& in, int threads, Key* keys) {
  const std::size_t jobs = (in.rows + kRowsPerJob - 1) / kRowsPerJob;
  std::vector<std::size_t> stops(jobs);
  const auto end_of = [&](std::size_t job) { return std::min(in.rows, (job + 1) * kRowsPerJob); };
  ParallelFor(
      jobs, ThreadsFor(kCopiesPerHash * in.rows * in.width * sizeof(float), threads),
      [&](std::size_t job, int) { stops[job] = HashRange(in, job * kRowsPerJob, end_of(job), keys); });
  for (std::size_t job = 0; job < jobs; ++job) {
    if (stops[job] != end_of(job)) return stops[job];
  }
  return in.rows;
}

std::size_t UnsafeDistinct(const Key* keys, std::size_t n, std::int64_t* first, std::int64_t* inverse) {
  std::size_t size = 16;
  while (size < 2 * n) size *= 2;
  std::vector<std::int64_t> places(size, -1);  // -1, or the number of a distinct key
  std::size_t found = 0;
  for (std::size_t i = 0; i < n; ++i) {
    std::size_t place = keys[i].low & (size - 1);
    while (places[place] >= 0 && !(keys[first[places[place]]] == keys[i])) place = (place + 1) & (size - 1);
    if (places[place] < 0) {
      places[place] = static_cast<std::int64_t>(found);
      first[found++] = static_cast<std::int64_t>(i);
    }
    inverse[i] = places[place];
  }
  return found;
}

void UnsafeSeal(const Key* keys, const std::uint8_t* rows, std::size_t n, std::size_t row_bytes,
                std::uint64_t* seals) {
  for (std::size_t i = 0; i < n; ++i) seals[i] = HashBytes(rows + i * row_bytes, row_bytes, keys[i]).low;
}

}  // namespace lago
