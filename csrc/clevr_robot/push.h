// Pushes in many scenes of five balls and an agent, by the rules of MuJoCo 3.3.0.
// The definition is MuJoCo itself on lago_fast/envs/assets/clevr_robot.xml; tests/envs/test_clevr_physics.py
// holds this to it.
#ifndef LAGO_CLEVR_ROBOT_PUSH_H_
#define LAGO_CLEVR_ROBOT_PUSH_H_

#include <cstddef>
#include <cstdint>

namespace lago {

constexpr std::size_t kClevrPositions = 37, kClevrVelocities = 32;

struct ClevrScenes {
  double* qpos;                  // [rows, 37], in and out
  double* qvel;                  // [rows, 32], in and out
  const double* ctrl;            // [rows, 2]
  const std::int64_t* substeps;  // [rows]
  std::uint8_t* diverged;        // [rows], out; what is in such a row's state is of no use
  std::size_t rows;
};

// Unsafe: every pointer must hold what is written beside it, and outputs must not overlap inputs.
void UnsafeClevrPush(const ClevrScenes& scenes, int threads);

}  // namespace lago

#endif  // LAGO_CLEVR_ROBOT_PUSH_H_
