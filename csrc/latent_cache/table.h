// The resident tier of the latent cache: key -> row, within a byte budget, shared by threads.
// Shards by hash, each with a lock, an open-addressing index, its rows side by side, and CLOCK eviction
// (Corbato 1968): a row that was found since the hand last passed it is spared once.
// Test: tests/priors/test_cache.py, tests/native/latent_cache_stress.cc
#ifndef LAGO_LATENT_CACHE_TABLE_H_
#define LAGO_LATENT_CACHE_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "latent_cache/hash.h"
#include "latent_cache/rows.h"

namespace lago {

struct TableStats {
  std::uint64_t hits = 0;
  std::uint64_t misses = 0;
  std::uint64_t inserted = 0;
  std::uint64_t evicted = 0;
  std::uint64_t rows = 0;   // resident
  std::uint64_t bytes = 0;  // of them, with keys, index and CLOCK marks
};

class LatentTable {
 public:
  // `budget_bytes` counts rows, keys, index and marks; `threads`: at most, for one call.
  // Throws std::invalid_argument where not one row fits, std::bad_alloc.
  LatentTable(RowCodec codec, std::size_t budget_bytes, std::size_t shards, int threads);
  ~LatentTable();
  LatentTable(const LatentTable&) = delete;
  LatentTable& operator=(const LatentTable&) = delete;

  const RowCodec& codec() const { return codec_; }
  int threads() const { return threads_; }
  std::size_t capacity() const { return shards_.size() * capacity_; }  // rows

  // rows [n, width]: as stored, zeros where hit [n] is 0.
  void UnsafeLookup(const Key* keys, std::size_t n, float* rows, std::uint8_t* hit);

  // encoded [n, row_bytes] is kept under keys that are new; stored [n, width]: what each key now answers.
  void UnsafeInsert(const Key* keys, const std::uint8_t* encoded, std::size_t n, float* stored);

  TableStats Stats();
  // Forgets every row; the memory is kept for the next ones, and the counts go on.
  void Clear();

  // Between the two no other thread is within a shard.
  void Hold();
  void LetGo();

 private:
  // Where a row is; number 0: nowhere.
  struct Slot {
    std::uint32_t tag;
    std::uint32_t number;  // of the record, from 1
  };
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  // Memory that the system only provides once it is touched.
  template <typename T>
  using Lazy = std::unique_ptr<T[], Free>;

  struct alignas(64) Shard {
    std::mutex mutex;
    Slot* slots = nullptr;
    std::uint8_t* records = nullptr;  // key, then row, of `stride_` bytes
    std::uint8_t* found = nullptr;    // since the hand last passed
    std::size_t used = 0;
    std::size_t hand = 0;
    TableStats stats;
  };

  struct Groups {
    std::vector<std::uint32_t> order;  // of the keys, shard by shard
    std::vector<std::size_t> start;    // of each shard in `order`, and the end
  };

  template <typename T>
  static Lazy<T> Allocate(std::size_t count);
  Groups GroupByShard(const Key* keys, std::size_t n) const;
  template <typename Work>
  void ForEachShard(const Key* keys, std::size_t n, const Work& work);

  std::size_t ShardOf(Key key) const { return shard_bits_ == 0 ? 0 : key.high >> (64 - shard_bits_); }
  static std::uint32_t TagOf(Key key) { return static_cast<std::uint32_t>(key.low); }
  std::size_t HomeOf(std::uint32_t tag) const { return (std::uint64_t{tag} * slots_) >> 32; }
  std::size_t Next(std::size_t slot) const { return slot + 1 == slots_ ? 0 : slot + 1; }
  std::uint8_t* Record(const Shard& shard, std::uint32_t number) const {
    return shard.records + (number - 1) * stride_;
  }

  std::uint32_t Candidate(const Shard& shard, Key key) const;
  std::uint32_t Find(const Shard& shard, Key key) const;
  std::uint32_t Place(Shard& shard);
  void Evict(Shard& shard, std::uint32_t number);

  RowCodec codec_;
  int threads_;
  std::size_t stride_;
  int shard_bits_ = 0;
  std::size_t capacity_ = 0;  // rows of a shard
  std::size_t slots_ = 0;     // of a shard
  // Of all shards, side by side.
  Lazy<Slot> slot_memory_;
  Lazy<std::uint8_t> record_memory_;
  Lazy<std::uint8_t> found_memory_;
  std::vector<Shard> shards_;
};

}  // namespace lago

#endif  // LAGO_LATENT_CACHE_TABLE_H_
