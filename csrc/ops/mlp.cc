#include "ops/mlp.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/threads.h"

namespace lago {
namespace {

constexpr std::size_t kPadding = 16;              // the width of every matrix in the workspace is a multiple
constexpr std::size_t kTileRows = 128;            // whose activations stay in a core's cache
constexpr std::size_t kMaxChunks = 16;            // each sums gradients of its own
constexpr std::size_t kThreadProducts = 1 << 19;  // below so many a thread of its own is not worth waking

// c [rows, columns] = a [rows, depth] * b [depth, columns], plus a bias [columns], or added to c.
struct Product {
  std::size_t rows, columns, depth;
  const float* a;
  std::size_t a_row, a_depth;  // strides: a is read as it lies, or transposed
  const float* b;
  std::size_t b_stride;
  const float* bias;  // null: none
  bool adds;
  float* c;
  std::size_t c_stride;
};

// The functions of one instruction set.
struct Kernels {
  void (*multiply)(const Product& product);
  void (*activate)(Activation activation, float* x, std::size_t n);
  void (*differentiate)(Activation activation, const float* said, float* grad, std::size_t n);
  void (*sum_rows)(const float* x, std::size_t rows, std::size_t columns, bool adds, float* sums);
};

#define LAGO_KERNEL "ops/mlp.inc"
#include "core/each_target.inc"

constexpr std::size_t Padded(std::size_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

// How rows are shared out: whole tiles, in at most kMaxChunks chunks. Depends on the number of rows alone.
struct Chunks {
  explicit Chunks(std::size_t rows) : rows(rows) {
    const std::size_t tiles = (rows + kTileRows - 1) / kTileRows;
    chunk_rows = kTileRows * std::max<std::size_t>(1, (tiles + kMaxChunks - 1) / kMaxChunks);
    count = (rows + chunk_rows - 1) / chunk_rows;
  }

  // Calls work(first row, number of rows) for each tile of a chunk.
  template <typename Work>
  void ForEachTile(std::size_t chunk, const Work& work) const {
    const std::size_t end = std::min(rows, (chunk + 1) * chunk_rows);
    for (std::size_t first = chunk * chunk_rows; first < end; first += kTileRows) {
      work(first, std::min(kTileRows, end - first));
    }
  }

  std::size_t rows, chunk_rows, count;
};

// Where a layer's matrices lie in the workspace.
struct LayerPlaces {
  float* transposed;   // [in, Padded(out)], of the weight
  float* weight;       // [out, Padded(in)]
  float* bias;         // [Padded(out)]
  float* said;         // [rows, Padded(out)], after the activation
  float* weight_grad;  // [chunks, out, Padded(in)]
  float* bias_grad;    // [chunks, Padded(out)]
};

struct Places {
  float* x;  // [rows, Padded(in)]
  std::vector<std::vector<LayerPlaces>> layers;
  std::size_t size;
};

Places PlacesIn(float* workspace, const std::vector<Mlp>& networks, std::size_t rows) {
  const std::size_t chunks = Chunks(rows).count;
  std::size_t used = 0;
  const auto take = [&](std::size_t n) {
    float* taken = workspace + used;
    used += Padded(n);
    return taken;
  };
  Places places;
  places.x = take(rows * Padded(networks.front().front().in));
  for (const Mlp& network : networks) {
    auto& layers = places.layers.emplace_back();
    for (const MlpLayer& layer : network) {
      const std::size_t in = Padded(layer.in), out = Padded(layer.out);
      LayerPlaces at;
      at.transposed = take(layer.in * out);
      at.weight = take(layer.out * in);
      at.bias = take(out);
      at.said = take(rows * out);
      at.weight_grad = take(chunks * layer.out * in);
      at.bias_grad = take(chunks * out);
      layers.push_back(at);
    }
  }
  places.size = used;
  return places;
}

std::size_t Products(const std::vector<Mlp>& networks, std::size_t rows) {
  std::size_t sum = 0;
  for (const Mlp& network : networks) {
    for (const MlpLayer& layer : network) sum += layer.in * layer.out;
  }
  return sum * rows;
}

int Threads(const std::vector<Mlp>& networks, std::size_t rows, int most) {
  const std::size_t worth = Products(networks, rows) / kThreadProducts;
  return static_cast<int>(std::clamp<std::size_t>(worth, 1, static_cast<std::size_t>(std::max(1, most))));
}

// Rows [n, width] with zeros behind each.
void Pad(const float* from, std::size_t n, std::size_t width, float* to) {
  const std::size_t padded = Padded(width);
  for (std::size_t r = 0; r < n; ++r) {
    std::copy_n(from + r * width, width, to + r * padded);
    std::fill(to + r * padded + width, to + (r + 1) * padded, 0.0f);
  }
}

void PlaceParameters(const MlpLayer& layer, const LayerPlaces& at) {
  const std::size_t out = Padded(layer.out);
  Pad(layer.weight, layer.out, layer.in, at.weight);
  Pad(layer.bias, 1, layer.out, at.bias);
  for (std::size_t i = 0; i < layer.in; ++i) {
    for (std::size_t o = 0; o < layer.out; ++o) at.transposed[i * out + o] = layer.weight[o * layer.in + i];
    std::fill(at.transposed + i * out + layer.out, at.transposed + (i + 1) * out, 0.0f);
  }
}

// The sum over chunks, without the padding, in an order that depends on nothing else.
void SumChunks(const float* parts, std::size_t chunks, std::size_t n, std::size_t width, float* to) {
  const std::size_t padded = Padded(width), part = n * padded;
  for (std::size_t r = 0; r < n; ++r) {
    float* row = to + r * width;
    std::fill_n(row, width, 0.0f);
    for (std::size_t c = 0; c < chunks; ++c) {
      const float* added = parts + c * part + r * padded;
      for (std::size_t i = 0; i < width; ++i) row[i] += added[i];
    }
  }
}

// One tile through one network.
void ForwardTile(const Kernels& kernels, const Mlp& network, const std::vector<LayerPlaces>& places,
                 Activation activation, const float* x, std::size_t first, std::size_t n, float* output) {
  const float* before = x;
  std::size_t before_stride = Padded(network.front().in);
  for (std::size_t l = 0; l < network.size(); ++l) {
    const MlpLayer& layer = network[l];
    const LayerPlaces& at = places[l];
    const std::size_t out = Padded(layer.out);
    float* said = at.said + first * out;
    kernels.multiply({n, out, layer.in, before + first * before_stride, before_stride, 1, at.transposed, out,
                      at.bias, false, said, out});
    if (l + 1 < network.size()) kernels.activate(activation, said, n * out);
    before = at.said;
    before_stride = out;
  }
  const std::size_t width = network.back().out, padded = Padded(width);
  for (std::size_t r = first; r < first + n; ++r) {
    std::copy_n(places.back().said + r * padded, width, output + r * width);
  }
}

// One tile of one network, from the outputs' gradients back to the first layer; `grad` and `other` have room
// for a tile of the widest layer.
void BackwardTile(const Kernels& kernels, const Mlp& network, const std::vector<LayerPlaces>& places,
                  Activation activation, const float* x, std::size_t chunk, bool adds, std::size_t first,
                  std::size_t n, const float* output_grad, float* grad, float* other) {
  Pad(output_grad + first * network.back().out, n, network.back().out, grad);
  for (std::size_t l = network.size(); l-- > 0;) {
    const MlpLayer& layer = network[l];
    const LayerPlaces& at = places[l];
    const std::size_t in = Padded(layer.in), out = Padded(layer.out);
    const float* before = (l == 0 ? x : places[l - 1].said) + first * in;
    kernels.multiply({layer.out, in, n, grad, 1, out, before, in, nullptr, adds,
                      at.weight_grad + chunk * layer.out * in, in});
    kernels.sum_rows(grad, n, out, adds, at.bias_grad + chunk * out);
    if (l == 0) return;
    kernels.multiply({n, in, layer.out, grad, out, 1, at.weight, in, nullptr, false, other, in});
    kernels.differentiate(activation, before, other, n * in);
    std::swap(grad, other);
  }
}

std::size_t WidestLayer(const std::vector<Mlp>& networks) {
  std::size_t widest = 0;
  for (const Mlp& network : networks) {
    for (const MlpLayer& layer : network) widest = std::max({widest, Padded(layer.in), Padded(layer.out)});
  }
  return widest;
}

}  // namespace

std::size_t MlpWorkspace(const std::vector<Mlp>& networks, std::size_t rows) {
  return PlacesIn(nullptr, networks, rows).size;
}

void UnsafeMlpForward(const std::vector<Mlp>& networks, const float* x, std::size_t rows,
                      const MlpOptions& options, float* workspace, const std::vector<float*>& outputs) {
  const Kernels& kernels = Choose(options.lanes);
  const Places places = PlacesIn(workspace, networks, rows);
  for (std::size_t i = 0; i < networks.size(); ++i) {
    for (std::size_t l = 0; l < networks[i].size(); ++l) PlaceParameters(networks[i][l], places.layers[i][l]);
  }
  const Chunks chunks(rows);
  const std::size_t width = networks.front().front().in;
  ParallelFor(chunks.count, Threads(networks, rows, options.threads), [&](std::size_t chunk, int) {
    chunks.ForEachTile(chunk, [&](std::size_t first, std::size_t n) {
      Pad(x + first * width, n, width, places.x + first * Padded(width));
      for (std::size_t i = 0; i < networks.size(); ++i) {
        ForwardTile(kernels, networks[i], places.layers[i], options.activation, places.x, first, n,
                    outputs[i]);
      }
    });
  });
}

void UnsafeMlpBackward(const std::vector<Mlp>& networks, std::size_t rows, const MlpOptions& options,
                       float* workspace, const std::vector<const float*>& output_grads) {
  const Kernels& kernels = Choose(options.lanes);
  const Places places = PlacesIn(workspace, networks, rows);
  const Chunks chunks(rows);
  const int threads = Threads(networks, 2 * rows, options.threads);
  const std::size_t tile = kTileRows * WidestLayer(networks);
  std::vector<float> scratch(static_cast<std::size_t>(threads) * 2 * tile);
  ParallelFor(chunks.count, threads, [&](std::size_t chunk, int thread) {
    float* grad = scratch.data() + static_cast<std::size_t>(thread) * 2 * tile;
    chunks.ForEachTile(chunk, [&](std::size_t first, std::size_t n) {
      const bool adds = first != chunk * chunks.chunk_rows;
      for (std::size_t i = 0; i < networks.size(); ++i) {
        BackwardTile(kernels, networks[i], places.layers[i], options.activation, places.x, chunk, adds, first,
                     n, output_grads[i], grad, grad + tile);
      }
    });
  });
  for (std::size_t i = 0; i < networks.size(); ++i) {
    for (std::size_t l = 0; l < networks[i].size(); ++l) {
      const MlpLayer& layer = networks[i][l];
      const LayerPlaces& at = places.layers[i][l];
      SumChunks(at.weight_grad, chunks.count, layer.out, layer.in, layer.weight_grad);
      SumChunks(at.bias_grad, chunks.count, 1, layer.out, layer.bias_grad);
    }
  }
}

}  // namespace lago
