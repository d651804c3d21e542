// Drives csrc/latent_cache without Python: conversions against each other, one thread against a std::map,
// many threads against values that follow from the key. Run under sanitizers by `make asan` and `make tsan`.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "latent_cache/hash.h"
#include "latent_cache/rows.h"
#include "latent_cache/table.h"

namespace {

using lago::Key;
using lago::LatentTable;
using lago::RowCodec;
using lago::RowFault;
using lago::RowFormat;

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float FloatOf(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

bool SameBits(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; }

Key KeyOf(std::uint64_t number) { return lago::HashBytes(&number, sizeof number, Key{1, 2}); }

// The row of a key in tests, exact in every format: multiples of 2^-6 between -1 and 1, one of them 127 / 64.
std::vector<float> RowOf(Key key, std::size_t width) {
  std::vector<float> row(width);
  for (std::size_t i = 0; i < width; ++i) {
    row[i] = static_cast<float>(static_cast<int>((key.low >> (i % 57)) & 127) - 63) / 64.0f;
  }
  row[key.high % width] = 127.0f / 64.0f;
  return row;
}

void TestHalfPrecision() {
  const RowCodec fast(RowFormat::kFloat16, {13}, false), portable(RowFormat::kFloat16, {13}, true);
  std::vector<std::uint8_t> a(26), b(26);
  std::vector<float> x(13), y(13);
  alignas(32) float aligned[14];
  // Every float16 that is a number, 13 at a time: vector lanes and the remainder.
  for (std::uint32_t half = 0; half < 0x10000; ++half) {
    if ((half & 0x7c00u) == 0x7c00u) continue;
    const float value = lago::FloatFromHalf(static_cast<std::uint16_t>(half));
    CHECK(lago::HalfFromFloat(value) == half);
    std::fill(x.begin(), x.end(), value);
    CHECK(fast.Encode(x.data(), a.data()) == RowFault::kNone);
    CHECK(portable.Encode(x.data(), b.data()) == RowFault::kNone);
    CHECK(a == b);
    fast.Decode(a.data(), y.data(), false);
    for (float decoded : y) CHECK(SameBits(decoded, value));
    portable.Decode(a.data(), y.data(), false);
    for (float decoded : y) CHECK(SameBits(decoded, value));
    // Past the caches: to an address that allows it, and to one that does not.
    for (std::size_t at = 0; at < 2; ++at) {
      fast.Decode(a.data(), aligned + at, true);
      for (std::size_t i = 0; i < 13; ++i) CHECK(SameBits(aligned[at + i], value));
    }
  }
  // Floats of every exponent, with the bits around each rounding decision.
  for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32); bits += 0x1003) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = FloatOf(static_cast<std::uint32_t>(bits + i));
    const RowFault fault = fast.Encode(x.data(), a.data());
    CHECK(fault == portable.Encode(x.data(), b.data()));
    if (fault == RowFault::kNone) CHECK(a == b);
  }
  CHECK(lago::HalfFromFloat(65519.996f) == 0x7bff);
  CHECK(lago::HalfFromFloat(65520.0f) == 0x7c00);
  CHECK(lago::HalfFromFloat(std::ldexp(1.0f, -25)) == 0);  // a tie, to even
  CHECK(lago::HalfFromFloat(std::ldexp(1.5f, -25)) == 1);
}

void TestFaults() {
  for (const RowFormat format : {RowFormat::kFloat32, RowFormat::kFloat16, RowFormat::kInt8}) {
    const RowCodec codec(format, {2, 1}, false);
    std::vector<std::uint8_t> encoded(codec.row_bytes());
    const auto encode = [&](float x) {
      const float row[3] = {1.0f, x, 2.0f};
      return codec.Encode(row, encoded.data());
    };
    CHECK(encode(std::numeric_limits<float>::quiet_NaN()) == RowFault::kNotANumber);
    CHECK(encode(kInfinity) == RowFault::kNotANumber);
    CHECK(encode(65520.0f) == (format == RowFormat::kFloat16 ? RowFault::kTooLarge : RowFault::kNone));
    CHECK(encode(-kInfinity) == RowFault::kNone);
    float row[3];
    codec.Decode(encoded.data(), row, false);
    CHECK(row[1] == -kInfinity && row[0] == 1.0f && row[2] == 2.0f);
  }
}

void TestInt8() {
  const RowCodec codec(RowFormat::kInt8, {64, 3}, false);
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<float> row(67), back(67);
  std::vector<std::uint8_t> encoded(codec.row_bytes());
  for (int trial = 0; trial < 2000; ++trial) {
    const float size = std::ldexp(1.0f, trial % 200 - 100);
    for (std::size_t i = 0; i < row.size(); ++i) row[i] = normal(random) * (i < 64 ? size : 1.0f);
    CHECK(codec.Encode(row.data(), encoded.data()) == RowFault::kNone);
    codec.Decode(encoded.data(), back.data(), false);
    for (const auto& [begin, end] : {std::pair{0, 64}, std::pair{64, 67}}) {
      float largest = 0.0f;
      for (int i = begin; i < end; ++i) largest = std::max(largest, std::fabs(row[i]));
      for (int i = begin; i < end; ++i) CHECK(std::fabs(back[i] - row[i]) <= largest / 127.0f * 0.50001f);
    }
  }
}

void TestHash() {
  std::vector<Key> keys;
  const std::string text(300, 'x');
  for (std::size_t size = 0; size < text.size(); ++size)
    keys.push_back(lago::HashBytes(text.data(), size, Key{}));
  const std::string zeros(300, '\0');
  for (std::size_t size = 1; size < zeros.size(); ++size) {
    keys.push_back(lago::HashBytes(zeros.data(), size, Key{}));
  }
  for (std::uint64_t i = 0; i < 100000; ++i) keys.push_back(KeyOf(i));
  std::vector<std::int64_t> first(keys.size()), inverse(keys.size());
  CHECK(lago::UnsafeDistinct(keys.data(), keys.size(), first.data(), inverse.data()) == keys.size());

  keys.insert(keys.begin() + 10, keys[500]);
  first.resize(keys.size());
  inverse.resize(keys.size());
  CHECK(lago::UnsafeDistinct(keys.data(), keys.size(), first.data(), inverse.data()) == keys.size() - 1);
  for (std::size_t i = 0; i < keys.size(); ++i) CHECK(keys[first[inverse[i]]] == keys[i]);
}

void TestObservations() {
  constexpr std::size_t kRows = 20000, kWidth = 39;
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<float> states(kRows * kWidth);
  for (float& x : states) x = 100 * normal(random);
  std::vector<std::int64_t> ids(kRows);
  for (std::size_t i = 0; i < kRows; ++i) ids[i] = static_cast<std::int64_t>(i % 3);
  const Key seeds[3] = {KeyOf(0), KeyOf(1), KeyOf(2)};
  for (const double resolution : {0.0, 0.5}) {
    lago::Observations in{states.data(), ids.data(), seeds, kRows, kWidth, resolution};
    std::vector<Key> one(kRows), four(kRows), moved(kRows);
    CHECK(lago::UnsafeHashRows(in, 1, one.data()) == kRows);
    CHECK(lago::UnsafeHashRows(in, 4, four.data()) == kRows);
    CHECK(one == four);
    std::vector<float> near(states);
    for (float& x : near) x = static_cast<float>(0.5 * std::nearbyint(x / 0.5));
    in.states = near.data();
    CHECK(lago::UnsafeHashRows(in, 4, moved.data()) == kRows);
    CHECK((one == moved) == (resolution > 0));
  }
  const float zeros[2] = {0.0f, -0.0f};
  const std::int64_t id[2] = {0, 0};
  Key keys[2];
  lago::UnsafeHashRows({zeros, id, seeds, 2, 1, 0.0}, 1, keys);
  CHECK(!(keys[0] == keys[1]));
  lago::UnsafeHashRows({zeros, id, seeds, 2, 1, 0.1}, 1, keys);
  CHECK(keys[0] == keys[1]);
  std::vector<Key> out(kRows);
  states[15000 * kWidth + 38] = -kInfinity;
  states[17000 * kWidth] = std::numeric_limits<float>::quiet_NaN();
  CHECK(lago::UnsafeHashRows({states.data(), ids.data(), seeds, kRows, kWidth, 0.0}, 4, out.data()) == 15000);
}

// Random batches on one thread: what was found is right, and nothing is lost before the first eviction.
void TestAgainstAMap(RowFormat format, std::size_t budget_bytes, std::size_t shards) {
  constexpr std::size_t kWidth = 19;
  LatentTable table(RowCodec(format, {kWidth}, false), budget_bytes, shards, 2);
  const std::size_t row_bytes = table.codec().row_bytes();
  std::map<std::pair<std::uint64_t, std::uint64_t>, bool> inserted;
  std::mt19937 random(0);
  for (int round = 0; round < 300; ++round) {
    const std::size_t n = random() % 40;
    std::vector<Key> keys(n);
    for (Key& key : keys) key = KeyOf(random() % (2 * table.capacity() + 1));
    std::vector<float> rows(n * kWidth, NAN);
    std::vector<std::uint8_t> hit(n, 9), encoded(n * row_bytes);
    if (random() % 2 == 0) {
      for (std::size_t i = 0; i < n; ++i) {
        CHECK(table.codec().Encode(RowOf(keys[i], kWidth).data(), encoded.data() + i * row_bytes) ==
              RowFault::kNone);
        inserted[{keys[i].low, keys[i].high}] = true;
      }
      table.UnsafeInsert(keys.data(), encoded.data(), n, rows.data());
      std::fill(hit.begin(), hit.end(), 1);
    } else {
      table.UnsafeLookup(keys.data(), n, rows.data(), hit.data());
    }
    const bool lossless = table.Stats().evicted == 0;
    for (std::size_t i = 0; i < n; ++i) {
      const bool known = inserted.count({keys[i].low, keys[i].high}) != 0;
      CHECK(hit[i] <= 1);
      CHECK(known || hit[i] == 0);
      CHECK(!lossless || known == (hit[i] == 1));
      const std::vector<float> expected = hit[i] ? RowOf(keys[i], kWidth) : std::vector<float>(kWidth, 0.0f);
      CHECK(std::equal(expected.begin(), expected.end(), rows.begin() + i * kWidth));
    }
    const lago::TableStats stats = table.Stats();
    CHECK(stats.rows <= table.capacity() && stats.bytes <= budget_bytes);
    CHECK(stats.inserted - stats.evicted == stats.rows);
  }
  CHECK(table.Stats().inserted > 0);
  table.Clear();
  CHECK(table.Stats().rows == 0);
}

void TestClock() {
  const RowCodec codec(RowFormat::kFloat32, {1}, false);
  LatentTable table(codec, 4 * 45, 1, 1);
  const std::size_t n = table.capacity();
  CHECK(n >= 3);
  const auto insert = [&](std::uint64_t number) {
    const Key key = KeyOf(number);
    const auto value = static_cast<float>(number);
    std::uint8_t encoded[sizeof value];
    std::memcpy(encoded, &value, sizeof value);
    float stored;
    table.UnsafeInsert(&key, encoded, 1, &stored);
    CHECK(stored == value);
  };
  const auto find = [&](std::uint64_t number) {
    const Key key = KeyOf(number);
    float row;
    std::uint8_t hit;
    table.UnsafeLookup(&key, 1, &row, &hit);
    CHECK(row == (hit ? static_cast<float>(number) : 0.0f));
    return hit == 1;
  };
  for (std::uint64_t i = 0; i < n; ++i) insert(i);
  CHECK(find(0));
  insert(n);  // the hand spares 0, and takes 1
  CHECK(find(0) && !find(1) && find(n));
  for (std::uint64_t i = n + 1; i < 100 * n; ++i) insert(i);
  CHECK(!find(n));
}

// Threads that insert, look up, count and clear at once; a row that is found is the row of its key.
void TestThreads(RowFormat format, std::size_t budget_bytes, std::size_t width, std::size_t batch,
                 int rounds) {
  LatentTable table(RowCodec(format, {width}, false), budget_bytes, 16, 2);
  const std::size_t row_bytes = table.codec().row_bytes();
  std::atomic<std::uint64_t> hits{0};
  const auto work = [&](unsigned seed) {
    std::mt19937 random(seed);
    std::vector<Key> keys(batch);
    std::vector<float> rows(batch * width);
    std::vector<std::uint8_t> hit(batch), encoded(batch * row_bytes);
    for (int round = 0; round < rounds; ++round) {
      const std::size_t n = 1 + random() % batch;
      for (std::size_t i = 0; i < n; ++i)
        keys[i] = KeyOf(random() % (table.capacity() + table.capacity() / 2));
      const bool inserts = random() % 3 == 0;
      if (inserts) {
        for (std::size_t i = 0; i < n; ++i) {
          table.codec().Encode(RowOf(keys[i], width).data(), encoded.data() + i * row_bytes);
        }
        table.UnsafeInsert(keys.data(), encoded.data(), n, rows.data());
      } else {
        table.UnsafeLookup(keys.data(), n, rows.data(), hit.data());
      }
      for (std::size_t i = 0; i < n; ++i) {
        if (!inserts && !hit[i]) continue;
        const std::vector<float> expected = RowOf(keys[i], width);
        CHECK(std::equal(expected.begin(), expected.end(), rows.begin() + i * width));
        ++hits;
      }
      if (random() % 16 == 0) CHECK(table.Stats().rows <= table.capacity());
      if (random() % 64 == 0) table.Clear();
    }
  };
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) threads.emplace_back(work, seed);
  for (std::thread& thread : threads) thread.join();
  CHECK(hits > 0);
}

}  // namespace

int main() {
  TestHalfPrecision();
  TestFaults();
  TestInt8();
  TestHash();
  TestObservations();
  TestClock();
  for (const RowFormat format : {RowFormat::kFloat32, RowFormat::kFloat16, RowFormat::kInt8}) {
    for (const std::size_t budget_bytes : {160u, 1000u, 10000u, 1000000u}) {
      TestAgainstAMap(format, budget_bytes, 1);
      TestAgainstAMap(format, budget_bytes, 64);
    }
    TestThreads(format, 100000, 16, 64, 500);
    TestThreads(format, 80000000, 512, 4096, 12);  // batches that are split over threads
  }
  std::puts("latent_cache_stress: all hold");
}
