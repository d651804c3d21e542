// The forces of contacts by MuJoCo's rules: the exact minimum of its convex problem.
//
// Written for one contact, "approach" is its relative acceleration plus MuJoCo's reference for it: along the
// normal, and along two tangents. The friction cone is a pyramid of four edges, (1, +-friction) with either
// tangent; an edge whose approach is negative is active, and pushes back with `stiffness` times as much. The
// forces change the approaches linearly, and minimise
//   1/2 force' coupling force + 1/2 stiffness * sum over edges of min(0, approach of the edge)^2.
#ifndef LAGO_CLEVR_ROBOT_CONTACTS_H_
#define LAGO_CLEVR_ROBOT_CONTACTS_H_

#include <cstdint>
#include <vector>

#include "clevr_robot/scene.h"
#include "clevr_robot/vector.h"

namespace lago::clevr {

// Table, walls, pairs of balls, and the agent with each ball.
constexpr int kMostContacts = kBalls + kBalls * kWalls + kBalls * (kBalls - 1) / 2 + kBalls;

// Edges that are active, of a contact: bits 1 and 2 the first tangent's plus and minus, 4 and 8 the second's.
using Edges = std::uint8_t;
constexpr Edges kAllEdges = 15;
constexpr Edges kUnknownEdges = 16;

struct Contact {
  int first, second;  // bodies; the first is -1 for the table and the walls
  Vec normal;         // from the first to the second
  Vec tangents[2];
  double levers[2];  // from either body's centre to the point of contact
  double stiffness;  // of an edge
  double free[3];    // the approach where no contact has a force
  Edges edges;       // in: a guess or unknown; out: the active ones
  double force[3];   // out: on the second body, along the normal and the tangents
};

// The inverse of an edge's regularisation, where `yield` is the sum of the two bodies' and `distance`
// negative in penetration; `*reference` is what the depth adds to the approach along the normal.
double EdgeStiffness(double distance, double yield, double* reference);

// For the contact of one ball alone with something fixed; false where it gave up, which leaves `contact` to
// the general solver.
bool SolveAlone(Contact* contact);

// For any contacts that share bodies.
class ContactSolver {
 public:
  void Solve(Contact* const* contacts, int count);

 private:
  void Couple(Contact* const* contacts, int count);
  int ActiveRows(int count, const Edges* edges);
  void NewtonForces(Contact* const* contacts, int count, const Edges* edges);
  void Approaches(int size);
  double Cost(Contact* const* contacts, int count) const;
  double StepLength(Contact* const* contacts, int count) const;

  struct Row {  // an edge, or what stands for several of them
    int contact;
    double along[3];
  };
  static constexpr int kSize = 3 * kMostContacts;

  std::vector<double> coupling_ = std::vector<double>(kSize * kSize);
  std::vector<double> system_ = std::vector<double>(kSize * kSize);
  double free_[kSize], force_[kSize], approach_[kSize], next_force_[kSize], next_approach_[kSize];
  double right_[kSize], inverse_pivot_[kSize];
  Row rows_[kSize];
};

}  // namespace lago::clevr

#endif  // LAGO_CLEVR_ROBOT_CONTACTS_H_
