// Rows of the latent cache as they are stored: float32, float16, or int8 with a scale for each part of a row.
// Test: tests/priors/test_cache.py, tests/native/latent_cache_stress.cc
#ifndef LAGO_LATENT_CACHE_ROWS_H_
#define LAGO_LATENT_CACHE_ROWS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lago {

enum class RowFormat { kFloat32, kFloat16, kInt8 };

// The same bits on every machine: to nearest, ties to even; too large becomes infinite.
std::uint16_t HalfFromFloat(float x);
float FloatFromHalf(std::uint16_t half);

enum class RowFault { kNone, kNotANumber, kTooLarge };

class RowCodec {
 public:
  // `parts`: the widths that a row is made of. `portable`: do not use the processor's own conversion.
  RowCodec(RowFormat format, std::vector<std::size_t> parts, bool portable);

  std::size_t width() const { return width_; }
  std::size_t row_bytes() const { return row_bytes_; }

  // Minus infinity is kept in every format (the log-probability of an impossible action); a NaN, plus
  // infinity and what float16 cannot hold are faults, and leave `encoded` undefined.
  RowFault Encode(const float* row, std::uint8_t* encoded) const;
  // `past_caches`: write to memory directly where that can be done; the writes are done on return.
  void Decode(const std::uint8_t* encoded, float* row, bool past_caches) const;

 private:
  RowFormat format_;
  std::vector<std::size_t> parts_;
  std::size_t width_ = 0;
  std::size_t row_bytes_ = 0;
  bool f16c_ = false;
};

}  // namespace lago

#endif  // LAGO_LATENT_CACHE_ROWS_H_
