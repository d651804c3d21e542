#include "latent_cache/table.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <utility>

#include "core/threads.h"
#include "latent_cache/parallel.h"

namespace lago {
namespace {

// Slots per row: an index that is three quarters full finds a key after about two probes.
constexpr std::size_t SlotsFor(std::size_t rows) { return rows + rows / 3 + 1; }
// A shard of fewer rows than this fills unevenly.
constexpr std::size_t kRowsPerShard = 256;
// How far ahead of the row that is copied its index entry and its record are fetched.
constexpr std::size_t kSlotsAhead = 16;
constexpr std::size_t kRecordsAhead = 12;
// The processor follows a row by itself once it has begun; fetching all of it here costs a third more.
constexpr std::size_t kBytesAhead = 256;
constexpr std::size_t kLine = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
// From this many bytes of output on, rows are written past the caches: there they would only displace what is
// read, and be fetched from memory before they are overwritten. Fewer are there since the last call.
constexpr std::size_t kBytesPastCaches = std::size_t{8} << 20;

// Rows are read in no order: from small pages nearly each of them costs a walk through the page tables.
void AskForHugePages(void* memory, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t kPage = 4096;
  const auto start = (reinterpret_cast<std::uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) / kPage * kPage;
  // A system that gives none is slower, and nothing else.
  if (end > start + kHugePage) {
    static_cast<void>(madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE));
  }
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

// All tables that there are. Never destroyed: a fork may come after main.
struct Tables {
  std::mutex mutex;
  std::vector<LatentTable*> all;
};
Tables& TheTables() {
  static Tables* const tables = new Tables;
  return *tables;
}

// A shard that another thread is within would stay locked and half written in a forked child, where that
// thread is missing. So a fork waits until there is none.
void HoldAll() {
  TheTables().mutex.lock();
  for (LatentTable* table : TheTables().all) table->Hold();
}
void LetAllGo() {
  for (LatentTable* table : TheTables().all) table->LetGo();
  TheTables().mutex.unlock();
}
const int watched = pthread_atfork(HoldAll, LetAllGo, LetAllGo);

}  // namespace

LatentTable::LatentTable(RowCodec codec, std::size_t budget_bytes, std::size_t shards, int threads)
    : codec_(std::move(codec)), threads_(threads), stride_((sizeof(Key) + codec_.row_bytes() + 7) / 8 * 8) {
  // Per row: its record, its mark, its share of the index; per shard: the slot that stays empty.
  const auto rows_of = [&](std::size_t bytes) {
    if (bytes <= sizeof(Slot)) return std::size_t{0};
    std::size_t rows = (bytes - sizeof(Slot)) / (stride_ + 1 + sizeof(Slot));
    while (rows > 0 && rows * (stride_ + 1) + SlotsFor(rows) * sizeof(Slot) > bytes) rows -= (rows + 63) / 64;
    return std::min<std::size_t>(rows, std::numeric_limits<std::uint32_t>::max() / 2);
  };
  while ((std::size_t{2} << shard_bits_) <= shards &&
         rows_of(budget_bytes / (std::size_t{2} << shard_bits_)) >= kRowsPerShard) {
    ++shard_bits_;
  }
  capacity_ = rows_of(budget_bytes >> shard_bits_);
  if (capacity_ == 0) throw std::invalid_argument("budget_bytes: not one row fits");
  slots_ = SlotsFor(capacity_);
  shards_ = std::vector<Shard>(std::size_t{1} << shard_bits_);
  slot_memory_ = Allocate<Slot>(shards_.size() * slots_);
  record_memory_ = Allocate<std::uint8_t>(shards_.size() * capacity_ * stride_);
  found_memory_ = Allocate<std::uint8_t>(shards_.size() * capacity_);
  for (std::size_t s = 0; s < shards_.size(); ++s) {
    shards_[s].slots = slot_memory_.get() + s * slots_;
    shards_[s].records = record_memory_.get() + s * capacity_ * stride_;
    shards_[s].found = found_memory_.get() + s * capacity_;
  }
  const std::lock_guard<std::mutex> held(TheTables().mutex);
  TheTables().all.push_back(this);
}

LatentTable::~LatentTable() {
  const std::lock_guard<std::mutex> held(TheTables().mutex);
  std::vector<LatentTable*>& all = TheTables().all;
  all.erase(std::find(all.begin(), all.end(), this));
}

template <typename T>
LatentTable::Lazy<T> LatentTable::Allocate(std::size_t count) {
  Lazy<T> memory(static_cast<T*>(std::calloc(count, sizeof(T))));
  if (!memory) throw std::bad_alloc();
  AskForHugePages(memory.get(), count * sizeof(T));
  return memory;
}

LatentTable::Groups LatentTable::GroupByShard(const Key* keys, std::size_t n) const {
  Groups groups{std::vector<std::uint32_t>(n), std::vector<std::size_t>(shards_.size() + 1, 0)};
  for (std::size_t i = 0; i < n; ++i) ++groups.start[ShardOf(keys[i]) + 1];
  for (std::size_t s = 0; s < shards_.size(); ++s) groups.start[s + 1] += groups.start[s];
  std::vector<std::size_t> next(groups.start.begin(), groups.start.end() - 1);
  // The order within a shard is the caller's: of two new rows with one key the first is kept.
  for (std::size_t i = 0; i < n; ++i) groups.order[next[ShardOf(keys[i])]++] = static_cast<std::uint32_t>(i);
  return groups;
}

// Calls work(shard, index of a key) for each key, under the shard's lock.
template <typename Work>
void LatentTable::ForEachShard(const Key* keys, std::size_t n, const Work& work) {
  const Groups groups = GroupByShard(keys, n);
  const std::size_t bytes = n * (codec_.row_bytes() + codec_.width() * sizeof(float));
  ParallelFor(shards_.size(), ThreadsFor(bytes, threads_), [&](std::size_t s, int) {
    const std::size_t begin = groups.start[s], end = groups.start[s + 1];
    if (begin == end) return;
    Shard& shard = shards_[s];
    const std::lock_guard<std::mutex> held(shard.mutex);
    const auto fetch_slot = [&](std::size_t i) {
      if (i < end) __builtin_prefetch(&shard.slots[HomeOf(TagOf(keys[groups.order[i]]))]);
    };
    const auto fetch_record = [&](std::size_t i) {
      if (i >= end) return;
      const std::uint32_t number = Candidate(shard, keys[groups.order[i]]);
      if (number == 0) return;
      const std::uint8_t* record = Record(shard, number);
      for (std::size_t b = 0; b < std::min(stride_, kBytesAhead); b += kLine) __builtin_prefetch(record + b);
    };
    for (std::size_t i = begin; i < begin + kSlotsAhead; ++i) fetch_slot(i);
    for (std::size_t i = begin; i < begin + kRecordsAhead; ++i) fetch_record(i);
    for (std::size_t i = begin; i < end; ++i) {
      fetch_slot(i + kSlotsAhead);
      fetch_record(i + kRecordsAhead);
      work(shard, groups.order[i]);
    }
  });
}

// The first record whose tag fits, which is nearly always the one.
std::uint32_t LatentTable::Candidate(const Shard& shard, Key key) const {
  const std::uint32_t tag = TagOf(key);
  std::size_t slot = HomeOf(tag);
  while (shard.slots[slot].number != 0 && shard.slots[slot].tag != tag) slot = Next(slot);
  return shard.slots[slot].number;
}

std::uint32_t LatentTable::Find(const Shard& shard, Key key) const {
  const std::uint32_t tag = TagOf(key);
  for (std::size_t slot = HomeOf(tag); shard.slots[slot].number != 0; slot = Next(slot)) {
    const std::uint32_t number = shard.slots[slot].number;
    if (shard.slots[slot].tag == tag && std::memcmp(Record(shard, number), &key, sizeof key) == 0)
      return number;
  }
  return 0;
}

// The number of a record that is free, or was freed by eviction.
std::uint32_t LatentTable::Place(Shard& shard) {
  if (shard.used < capacity_) return static_cast<std::uint32_t>(++shard.used);
  const auto advance = [&] {
    return std::exchange(shard.hand, shard.hand + 1 == capacity_ ? 0 : shard.hand + 1);
  };
  while (shard.found[shard.hand] != 0) shard.found[advance()] = 0;
  const auto number = static_cast<std::uint32_t>(advance() + 1);
  Evict(shard, number);
  return number;
}

void LatentTable::Evict(Shard& shard, std::uint32_t number) {
  Key key;
  std::memcpy(&key, Record(shard, number), sizeof key);
  std::size_t hole = HomeOf(TagOf(key));
  while (shard.slots[hole].number != number) hole = Next(hole);
  // A slot further on moves into the hole unless it would then stand before its home.
  for (std::size_t slot = Next(hole); shard.slots[slot].number != 0; slot = Next(slot)) {
    const std::size_t home = HomeOf(shard.slots[slot].tag);
    const std::size_t from_home = (slot + slots_ - home) % slots_;
    const std::size_t from_hole = (slot + slots_ - hole) % slots_;
    if (from_home >= from_hole) {
      shard.slots[hole] = shard.slots[slot];
      hole = slot;
    }
  }
  shard.slots[hole] = Slot{0, 0};
  ++shard.stats.evicted;
}

void LatentTable::UnsafeLookup(const Key* keys, std::size_t n, float* rows, std::uint8_t* hit) {
  const std::size_t width = codec_.width();
  const bool past_caches = n * width * sizeof(float) >= kBytesPastCaches;
  ForEachShard(keys, n, [&](Shard& shard, std::size_t i) {
    const std::uint32_t number = Find(shard, keys[i]);
    hit[i] = number != 0;
    if (number == 0) {
      ++shard.stats.misses;
      std::fill_n(rows + i * width, width, 0.0f);
      return;
    }
    ++shard.stats.hits;
    shard.found[number - 1] = 1;
    codec_.Decode(Record(shard, number) + sizeof(Key), rows + i * width, past_caches);
  });
}

void LatentTable::UnsafeInsert(const Key* keys, const std::uint8_t* encoded, std::size_t n, float* stored) {
  const std::size_t width = codec_.width(), row_bytes = codec_.row_bytes();
  ForEachShard(keys, n, [&](Shard& shard, std::size_t i) {
    std::uint32_t number = Find(shard, keys[i]);
    if (number == 0) {
      number = Place(shard);
      std::uint8_t* record = Record(shard, number);
      std::memcpy(record, &keys[i], sizeof(Key));
      std::memcpy(record + sizeof(Key), encoded + i * row_bytes, row_bytes);
      shard.found[number - 1] = 0;
      std::size_t slot = HomeOf(TagOf(keys[i]));
      while (shard.slots[slot].number != 0) slot = Next(slot);
      shard.slots[slot] = Slot{TagOf(keys[i]), number};
      ++shard.stats.inserted;
    }
    codec_.Decode(Record(shard, number) + sizeof(Key), stored + i * width, false);
  });
}

TableStats LatentTable::Stats() {
  TableStats sum;
  for (Shard& shard : shards_) {
    const std::lock_guard<std::mutex> held(shard.mutex);
    sum.hits += shard.stats.hits;
    sum.misses += shard.stats.misses;
    sum.inserted += shard.stats.inserted;
    sum.evicted += shard.stats.evicted;
    sum.rows += shard.used;
    sum.bytes += shard.used * (stride_ + 1 + (sizeof(Slot) * slots_ + capacity_ - 1) / capacity_);
  }
  return sum;
}

void LatentTable::Clear() {
  for (Shard& shard : shards_) {
    const std::lock_guard<std::mutex> held(shard.mutex);
    std::fill_n(shard.slots, slots_, Slot{0, 0});
    shard.used = shard.hand = 0;
  }
}

void LatentTable::Hold() {
  for (Shard& shard : shards_) shard.mutex.lock();
}

void LatentTable::LetGo() {
  for (Shard& shard : shards_) shard.mutex.unlock();
}

}  // namespace lago
