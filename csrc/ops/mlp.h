// Several multilayer perceptrons on the same rows, and the gradients of their parameters.
// The definition is kernels/mlp/reference.py.
#ifndef LAGO_OPS_MLP_H_
#define LAGO_OPS_MLP_H_

#include <cstddef>
#include <vector>

namespace lago {

enum class Activation { kTanh, kRelu };  // between two layers

struct MlpLayer {
  std::size_t in, out;
  const float* weight;  // [out, in]
  const float* bias;    // [out]
  float* weight_grad;   // [out, in]; may be null where only the forward pass is wanted
  float* bias_grad;     // [out]
};

using Mlp = std::vector<MlpLayer>;

struct MlpOptions {
  Activation activation;
  int lanes;    // floats at once, at most: 4 (portable), 8 (AVX2) or 16 (AVX-512)
  int threads;  // at most; results do not depend on it
};

// The number of floats that both passes need.
std::size_t MlpWorkspace(const std::vector<Mlp>& networks, std::size_t rows);

// Unsafe: every network has layers that fit one another, and all read x [rows, in]; the pointers hold what
// their comments say. Writes outputs[n] [rows, out] of each network, and keeps what the backward pass needs
// in `workspace`.
void UnsafeMlpForward(const std::vector<Mlp>& networks, const float* x, std::size_t rows,
                      const MlpOptions& options, float* workspace, const std::vector<float*>& outputs);

// Writes the gradients of all parameters, given those of the outputs [rows, out]; after UnsafeMlpForward with
// the same networks, rows, options and workspace, whose parameters have not changed since.
void UnsafeMlpBackward(const std::vector<Mlp>& networks, std::size_t rows, const MlpOptions& options,
                       float* workspace, const std::vector<const float*>& output_grads);

}  // namespace lago

#endif  // LAGO_OPS_MLP_H_
