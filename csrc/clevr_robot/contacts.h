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

using Three = double[3];
using Block = double[3][3];

// For any contacts that share bodies, by Newton's method on the forces: the cost is quadratic as long as the
// same edges are active, so that a step from the right ones is the last.
class ContactSolver {
 public:
  void Solve(Contact* const* contacts, int count);

 private:
  void Couple(Contact* const* contacts, int count);
  void NewtonForces(const Edges* edges, int count);
  void Approaches(int count);
  double Cost(int count) const;
  double StepLength(int count) const;

  // Symmetric matrices by their blocks below the diagonal, one for each two contacts.
  static constexpr int kBlocks = kMostContacts * (kMostContacts + 1) / 2;
  Block coupling_[kBlocks], factor_[kBlocks], inverse_pivot_[kMostContacts];
  double stiffness_[kMostContacts], softness_[kMostContacts];  // the latter is the former's inverse
  Three free_[kMostContacts], force_[kMostContacts], approach_[kMostContacts];
  Three next_force_[kMostContacts], next_approach_[kMostContacts], right_[kMostContacts];
};

}  // namespace lago::clevr

#endif  // LAGO_CLEVR_ROBOT_CONTACTS_H_
