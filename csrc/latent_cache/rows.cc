#include "latent_cache/rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define LAGO_HAS_F16C 1
#endif

namespace lago {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// What rounds to infinity in float16 begins half a step above its largest number.
constexpr float kTooLargeForHalf = 65520.0f;
constexpr int kCodeOfMinusInfinity = -128;

std::uint32_t BitsOf(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float FloatOf(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

#ifdef LAGO_HAS_F16C
__attribute__((target("avx,f16c"))) void HalvesToFloatsF16c(const std::uint8_t* halves, std::size_t n,
                                                            float* out) {
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + 2 * i))));
  }
  for (; i < n; ++i) {
    std::uint16_t half;
    std::memcpy(&half, halves + 2 * i, sizeof half);
    out[i] = _cvtsh_ss(half);
  }
}

// `out` is a multiple of 32.
__attribute__((target("avx,f16c"))) void HalvesToMemoryF16c(const std::uint8_t* halves, std::size_t n,
                                                            float* out) {
  const std::size_t whole = n / 8 * 8;
  for (std::size_t i = 0; i < whole; i += 8) {
    _mm256_stream_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + 2 * i))));
  }
  HalvesToFloatsF16c(halves + 2 * whole, n - whole, out + whole);
  // Such writes may be seen late by other threads.
  _mm_sfence();
}

__attribute__((target("avx,f16c"))) void FloatsToHalvesF16c(const float* in, std::size_t n,
                                                            std::uint8_t* halves) {
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + 2 * i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) {
    const auto half = static_cast<std::uint16_t>(_cvtss_sh(in[i], _MM_FROUND_TO_NEAREST_INT));
    std::memcpy(halves + 2 * i, &half, sizeof half);
  }
}
#endif

void HalvesToFloats(const std::uint8_t* halves, std::size_t n, float* out) {
  for (std::size_t i = 0; i < n; ++i) {
    std::uint16_t half;
    std::memcpy(&half, halves + 2 * i, sizeof half);
    out[i] = FloatFromHalf(half);
  }
}

void FloatsToHalves(const float* in, std::size_t n, std::uint8_t* halves) {
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint16_t half = HalfFromFloat(in[i]);
    std::memcpy(halves + 2 * i, &half, sizeof half);
  }
}

RowFault FindFault(const float* row, std::size_t width, RowFormat format) {
  bool bad = false, large = false;
  for (std::size_t i = 0; i < width; ++i) {
    const float magnitude = std::fabs(row[i]);
    bad |= !(row[i] <= std::numeric_limits<float>::max());  // NaN, plus infinity
    large |= magnitude >= kTooLargeForHalf && row[i] != kMinusInfinity;
  }
  if (bad) return RowFault::kNotANumber;
  return large && format == RowFormat::kFloat16 ? RowFault::kTooLarge : RowFault::kNone;
}

// The largest number of the part has code 127 or -127.
void EncodePart(const float* part, std::size_t n, float* scale, std::int8_t* codes) {
  float largest = 0.0f;
  for (std::size_t i = 0; i < n; ++i) {
    if (part[i] != kMinusInfinity) largest = std::max(largest, std::fabs(part[i]));
  }
  *scale = largest / 127.0f;
  const double per_code = *scale > 0.0f ? 1.0 / static_cast<double>(*scale) : 0.0;
  for (std::size_t i = 0; i < n; ++i) {
    if (part[i] == kMinusInfinity) {
      codes[i] = static_cast<std::int8_t>(kCodeOfMinusInfinity);
    } else {
      codes[i] = static_cast<std::int8_t>(std::clamp(std::nearbyint(part[i] * per_code), -127.0, 127.0));
    }
  }
}

}  // namespace

// Round-off is left to the hardware's addition, after Giesen ("float->half variants", public domain).
std::uint16_t HalfFromFloat(float x) {
  std::uint32_t bits = BitsOf(x);
  const std::uint32_t sign = bits & 0x80000000u;
  bits ^= sign;
  std::uint32_t half;
  if (bits >= 0x47800000u) {
    half = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN; 65536 and above
  } else if (bits < 0x38800000u) {
    // Subnormal: 0.5 has its last bit where float16 has its smallest step.
    half = BitsOf(FloatOf(bits) + 0.5f) - 0x3f000000u;
  } else {
    const std::uint32_t odd = (bits >> 13) & 1u;
    half = (bits + 0xc8000fffu + odd) >> 13;  // exponent from bias 127 to 15, then half a step less one
  }
  return static_cast<std::uint16_t>(half | (sign >> 16));
}

float FloatFromHalf(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t magnitude = (half & 0x7fffu) << 13;
  const std::uint32_t exponent = magnitude & 0x0f800000u;
  if (exponent == 0x0f800000u) return FloatOf(sign | (magnitude + 0x70000000u));  // infinity, NaN
  if (exponent == 0) return FloatOf(sign | BitsOf(FloatOf(magnitude + 0x38800000u) - FloatOf(0x38800000u)));
  return FloatOf(sign | (magnitude + 0x38000000u));
}

RowCodec::RowCodec(RowFormat format, std::vector<std::size_t> parts, bool portable)
    : format_(format), parts_(std::move(parts)) {
  for (const std::size_t part : parts_) width_ += part;
  if (format_ == RowFormat::kFloat32) row_bytes_ = width_ * sizeof(float);
  if (format_ == RowFormat::kFloat16) row_bytes_ = width_ * sizeof(std::uint16_t);
  if (format_ == RowFormat::kInt8) row_bytes_ = width_ + parts_.size() * sizeof(float);
#ifdef LAGO_HAS_F16C
  f16c_ = !portable && __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
#else
  (void)portable;
#endif
}

RowFault RowCodec::Encode(const float* row, std::uint8_t* encoded) const {
  const RowFault fault = FindFault(row, width_, format_);
  if (fault != RowFault::kNone) return fault;
  if (format_ == RowFormat::kFloat32) {
    std::memcpy(encoded, row, row_bytes_);
  } else if (format_ == RowFormat::kFloat16) {
#ifdef LAGO_HAS_F16C
    if (f16c_) {
      FloatsToHalvesF16c(row, width_, encoded);
      return fault;
    }
#endif
    FloatsToHalves(row, width_, encoded);
  } else {
    auto* codes = reinterpret_cast<std::int8_t*>(encoded + parts_.size() * sizeof(float));
    for (std::size_t p = 0; p < parts_.size(); ++p) {
      float scale;
      EncodePart(row, parts_[p], &scale, codes);
      std::memcpy(encoded + p * sizeof scale, &scale, sizeof scale);
      row += parts_[p];
      codes += parts_[p];
    }
  }
  return fault;
}

void RowCodec::Decode(const std::uint8_t* encoded, float* row, bool past_caches) const {
  if (format_ == RowFormat::kFloat32) {
    std::memcpy(row, encoded, row_bytes_);
  } else if (format_ == RowFormat::kFloat16) {
#ifdef LAGO_HAS_F16C
    if (f16c_) {
      const bool streams = past_caches && reinterpret_cast<std::uintptr_t>(row) % 32 == 0;
      (streams ? HalvesToMemoryF16c : HalvesToFloatsF16c)(encoded, width_, row);
      return;
    }
#endif
    HalvesToFloats(encoded, width_, row);
  } else {
    const auto* codes = reinterpret_cast<const std::int8_t*>(encoded + parts_.size() * sizeof(float));
    for (std::size_t p = 0; p < parts_.size(); ++p) {
      float scale;
      std::memcpy(&scale, encoded + p * sizeof scale, sizeof scale);
      for (std::size_t i = 0; i < parts_[p]; ++i) {
        row[i] = codes[i] == kCodeOfMinusInfinity ? kMinusInfinity : scale * static_cast<float>(codes[i]);
      }
      row += parts_[p];
      codes += parts_[p];
    }
  }
}

}  // namespace lago
