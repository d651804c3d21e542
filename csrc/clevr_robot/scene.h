// The numbers of the scene, which is defined by lago_fast/envs/assets/clevr_robot.xml, and of MuJoCo 3.3.0's
// contacts. SI units.
#ifndef LAGO_CLEVR_ROBOT_SCENE_H_
#define LAGO_CLEVR_ROBOT_SCENE_H_

namespace lago::clevr {

constexpr int kBalls = 5;
constexpr int kAgent = kBalls;  // its place in lists of bodies
constexpr int kBodies = kBalls + 1;
constexpr int kWalls = 4;

constexpr double kTimestep = 0.01;
constexpr double kGravity = 9.81;
constexpr double kLargest = 1e10;  // MuJoCo gives a simulation up beyond this

constexpr double kPi = 3.14159265358979323846;
constexpr double kArmature = 0.04;  // on every degree of freedom, and most of each one's inertia

constexpr double kBallRadius = 0.13;
constexpr double kBallMass = 4.0 / 3.0 * kPi * kBallRadius * kBallRadius * kBallRadius;
constexpr double kBallDamping = 0.75;
constexpr double kBallInertia = kBallMass + kArmature;
constexpr double kBallSpinInertia = 0.4 * kBallMass * kBallRadius * kBallRadius + kArmature;

constexpr double kAgentRadius = 0.05;
constexpr double kAgentMass = 0.5 * 4.0 / 3.0 * kPi * kAgentRadius * kAgentRadius * kAgentRadius;
constexpr double kAgentDamping = 0.5;
constexpr double kAgentInertia = kAgentMass + kArmature;
constexpr double kAgentHeight = -0.2;
constexpr double kLargestForce = 2.0;

constexpr double kTableHeight = -0.325;
// The walls lean outwards from this far out on the floor of the world: sine and cosine of 1.57.
constexpr double kWallSine = 0.99999968293183461, kWallCosine = 0.00079632671073332627;
constexpr double kWallX = 0.6, kWallBack = 0.7, kWallFront = -0.3;

constexpr double kMargin = 0.002;
constexpr double kFriction = 0.8;
// Impedance: from the least to the most over a width, along two parabolas that meet half-way.
constexpr double kLeastImpedance = 0.9, kMostImpedance = 0.95, kImpedanceWidth = 0.001;
constexpr double kTimeConstant = 0.02;  // of a critically damped contact
constexpr double kContactDamping = 2 / (kMostImpedance * kTimeConstant);
constexpr double kContactStiffness = 1 / (kMostImpedance * kMostImpedance * kTimeConstant * kTimeConstant);
// How a body yields to a unit of force, as MuJoCo takes it for the regularisation of its contacts; the agent
// cannot move along z, and is taken without its armature for that.
constexpr double kBallYield = 1 / kBallInertia, kAgentYield = 1 / kAgentMass;

}  // namespace lago::clevr

#endif  // LAGO_CLEVR_ROBOT_SCENE_H_
