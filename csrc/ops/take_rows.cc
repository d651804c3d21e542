#include "ops/take_rows.h"

#include <cstring>

namespace lago {
namespace {

// A row of a size that the compiler knows.
template <std::size_t kBytes>
void TakeFixed(const Column& column, const std::int64_t* picked, std::size_t rows) {
  for (std::size_t r = 0; r < rows; ++r) {
    std::memcpy(column.to + r * kBytes, column.from + static_cast<std::size_t>(picked[r]) * kBytes, kBytes);
  }
}

void TakeAny(const Column& column, const std::int64_t* picked, std::size_t rows) {
  for (std::size_t r = 0; r < rows; ++r) {
    std::memcpy(column.to + r * column.bytes,
                column.from + static_cast<std::size_t>(picked[r]) * column.bytes, column.bytes);
  }
}

}  // namespace

void UnsafeTakeRows(const Column* columns, std::size_t n_columns, const std::int64_t* picked,
                    std::size_t rows) {
  for (std::size_t c = 0; c < n_columns; ++c) {
    switch (columns[c].bytes) {
      case 4:
        TakeFixed<4>(columns[c], picked, rows);
        break;
      case 8:
        TakeFixed<8>(columns[c], picked, rows);
        break;
      case 16:
        TakeFixed<16>(columns[c], picked, rows);
        break;
      default:
        TakeAny(columns[c], picked, rows);
    }
  }
}

}  // namespace lago
