// The latent cache: keys [n] are two 64-bit integers each.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/parts.h"
#include "bindings/pointers.h"
#include "latent_cache/hash.h"
#include "latent_cache/rows.h"
#include "latent_cache/table.h"

namespace py = pybind11;

namespace lago::bindings {
namespace {

std::array<std::uint64_t, 2> HashBytes(const std::string& bytes, std::array<std::uint64_t, 2> seed) {
  const lago::Key key = lago::HashBytes(bytes.data(), bytes.size(), {seed[0], seed[1]});
  return {key.low, key.high};
}

// Returns the first row that is not finite, or `rows`.
std::size_t HashObservations(std::uintptr_t states_ptr, std::uintptr_t ids_ptr, std::uintptr_t seeds_ptr,
                             std::uintptr_t keys_ptr, std::int64_t rows, std::int64_t width,
                             std::int64_t instructions, double resolution, int threads) {
  const std::size_t n = Count(rows, "rows"), s = Count(width, "width"),
                    m = Count(instructions, "instructions");
  const lago::Observations in{Pointer<const float>(states_ptr, n * s, "states"),
                              Pointer<const std::int64_t>(ids_ptr, n, "ids"),
                              Pointer<const lago::Key>(seeds_ptr, m, "seeds"),
                              n,
                              s,
                              resolution};
  auto* keys = Pointer<lago::Key>(keys_ptr, n, "keys");
  py::gil_scoped_release released;
  for (std::size_t i = 0; i < n; ++i) {
    if (in.ids[i] < 0 || in.ids[i] >= instructions) throw std::invalid_argument("ids: of no instruction");
  }
  return lago::UnsafeHashRows(in, threads, keys);
}

std::size_t DistinctKeys(std::uintptr_t keys_ptr, std::uintptr_t first_ptr, std::uintptr_t inverse_ptr,
                         std::int64_t rows) {
  const std::size_t n = Count(rows, "rows");
  const auto* keys = Pointer<const lago::Key>(keys_ptr, n, "keys");
  auto* first = Pointer<std::int64_t>(first_ptr, n, "first");
  auto* inverse = Pointer<std::int64_t>(inverse_ptr, n, "inverse");
  py::gil_scoped_release released;
  return lago::UnsafeDistinct(keys, n, first, inverse);
}

void SealRows(std::uintptr_t keys_ptr, std::uintptr_t encoded_ptr, std::uintptr_t seals_ptr,
              std::int64_t rows, std::int64_t row_bytes) {
  const std::size_t n = Count(rows, "rows"), width = Count(row_bytes, "row_bytes");
  const auto* keys = Pointer<const lago::Key>(keys_ptr, n, "keys");
  const auto* encoded = Pointer<const std::uint8_t>(encoded_ptr, n * width, "encoded");
  auto* seals = Pointer<std::uint64_t>(seals_ptr, n, "seals");
  py::gil_scoped_release released;
  lago::UnsafeSeal(keys, encoded, n, width, seals);
}

// Returns the first row that cannot be stored, or `rows`, and whether it is too large (else it is no number).
std::tuple<std::size_t, bool> EncodeRows(const lago::LatentTable& table, std::uintptr_t rows_ptr,
                                         std::uintptr_t encoded_ptr, std::int64_t rows) {
  const lago::RowCodec& codec = table.codec();
  const std::size_t n = Count(rows, "rows");
  const auto* in = Pointer<const float>(rows_ptr, n * codec.width(), "rows");
  auto* encoded = Pointer<std::uint8_t>(encoded_ptr, n * codec.row_bytes(), "encoded");
  py::gil_scoped_release released;
  for (std::size_t i = 0; i < n; ++i) {
    const lago::RowFault fault = codec.Encode(in + i * codec.width(), encoded + i * codec.row_bytes());
    if (fault != lago::RowFault::kNone) return {i, fault == lago::RowFault::kTooLarge};
  }
  return {n, false};
}

void LookupRows(lago::LatentTable& table, std::uintptr_t keys_ptr, std::uintptr_t rows_ptr,
                std::uintptr_t hit_ptr, std::int64_t rows) {
  const std::size_t n = Count(rows, "rows");
  const auto* keys = Pointer<const lago::Key>(keys_ptr, n, "keys");
  auto* out = Pointer<float>(rows_ptr, n * table.codec().width(), "rows");
  auto* hit = Pointer<std::uint8_t>(hit_ptr, n, "hit");
  py::gil_scoped_release released;
  table.UnsafeLookup(keys, n, out, hit);
}

void InsertRows(lago::LatentTable& table, std::uintptr_t keys_ptr, std::uintptr_t encoded_ptr,
                std::uintptr_t stored_ptr, std::int64_t rows) {
  const std::size_t n = Count(rows, "rows");
  const auto* keys = Pointer<const lago::Key>(keys_ptr, n, "keys");
  const auto* encoded = Pointer<const std::uint8_t>(encoded_ptr, n * table.codec().row_bytes(), "encoded");
  auto* stored = Pointer<float>(stored_ptr, n * table.codec().width(), "stored");
  py::gil_scoped_release released;
  table.UnsafeInsert(keys, encoded, n, stored);
}

}  // namespace

void BindLatentCache(py::module_& m) {
  m.def("hash_bytes", &HashBytes, py::arg("bytes"), py::arg("seed"));
  m.def("hash_observations", &HashObservations, py::arg("states_ptr"), py::arg("ids_ptr"),
        py::arg("seeds_ptr"), py::arg("keys_ptr"), py::arg("rows"), py::arg("width"), py::arg("instructions"),
        py::arg("resolution"), py::arg("threads"));
  m.def("distinct_keys", &DistinctKeys, py::arg("keys_ptr"), py::arg("first_ptr"), py::arg("inverse_ptr"),
        py::arg("rows"));
  m.def("seal_rows", &SealRows, py::arg("keys_ptr"), py::arg("encoded_ptr"), py::arg("seals_ptr"),
        py::arg("rows"), py::arg("row_bytes"));
  py::enum_<lago::RowFormat>(m, "RowFormat")
      .value("float32", lago::RowFormat::kFloat32)
      .value("float16", lago::RowFormat::kFloat16)
      .value("int8", lago::RowFormat::kInt8);
  py::class_<lago::LatentTable>(m, "LatentTable")
      .def(py::init([](lago::RowFormat format, const std::vector<std::size_t>& parts,
                       std::int64_t budget_bytes, std::int64_t shards, int threads, bool portable) {
             return new lago::LatentTable(lago::RowCodec(format, parts, portable),
                                          Count(budget_bytes, "budget_bytes"), Count(shards, "shards"),
                                          threads);
           }),
           py::arg("format"), py::arg("parts"), py::arg("budget_bytes"), py::arg("shards"),
           py::arg("threads"), py::arg("portable"))
      .def_property_readonly("capacity", &lago::LatentTable::capacity)
      .def_property_readonly("width", [](const lago::LatentTable& table) { return table.codec().width(); })
      .def_property_readonly("row_bytes",
                             [](const lago::LatentTable& table) { return table.codec().row_bytes(); })
      .def("encode", &EncodeRows, py::arg("rows_ptr"), py::arg("encoded_ptr"), py::arg("rows"))
      .def("lookup", &LookupRows, py::arg("keys_ptr"), py::arg("rows_ptr"), py::arg("hit_ptr"),
           py::arg("rows"))
      .def("insert", &InsertRows, py::arg("keys_ptr"), py::arg("encoded_ptr"), py::arg("stored_ptr"),
           py::arg("rows"))
      .def("clear", &lago::LatentTable::Clear, py::call_guard<py::gil_scoped_release>())
      .def("stats", [](lago::LatentTable& table) {
        lago::TableStats stats;
        {
          py::gil_scoped_release released;
          stats = table.Stats();
        }
        py::dict found;
        found["hits"] = stats.hits;
        found["misses"] = stats.misses;
        found["inserted"] = stats.inserted;
        found["evicted"] = stats.evicted;
        found["rows"] = stats.rows;
        found["bytes"] = stats.bytes;
        return found;
      });
}

}  // namespace lago::bindings
