// Some rows of several columns, in a given order: a minibatch.
#ifndef LAGO_OPS_TAKE_ROWS_H_
#define LAGO_OPS_TAKE_ROWS_H_

#include <cstddef>
#include <cstdint>

namespace lago {

struct Column {
  const std::uint8_t* from;  // [.., bytes]
  std::uint8_t* to;          // [rows, bytes]
  std::size_t bytes;         // of a row
};

// Unsafe: every picked row exists in every column, and outputs overlap nothing.
void UnsafeTakeRows(const Column* columns, std::size_t n_columns, const std::int64_t* picked,
                    std::size_t rows);

}  // namespace lago

#endif  // LAGO_OPS_TAKE_ROWS_H_
