#include "clevr_robot/contacts.h"

#include <algorithm>
#include <cmath>

namespace lago::clevr {
namespace {

constexpr int kMostIterations = 100;
constexpr double kRelativeStep = 1e-13;  // where rounding alone changes the active edges
constexpr double kRootTwo = 1.4142135623730951;

// The active edges of a contact as three rows with the same sum of squares: both edges of a tangent are one
// row along it and, like the other tangent's, a part of the row along the normal. Rows of no edge are zero.
struct Rows {
  Block along;
};

constexpr Rows RowsOf(Edges edges) {
  Rows rows{};
  const int pairs[2] = {edges & 3, edges >> 2};
  const int full = (pairs[0] == 3) + (pairs[1] == 3);
  rows.along[0][0] = full == 2 ? 2 : full == 1 ? kRootTwo : 0;
  for (int t = 0; t < 2; ++t) {
    if (pairs[t] == 1 || pairs[t] == 2) {
      rows.along[1 + t][0] = 1;
      rows.along[1 + t][1 + t] = pairs[t] == 1 ? kFriction : -kFriction;
    } else if (pairs[t] == 3) {
      rows.along[1 + t][1 + t] = kRootTwo * kFriction;
    }
  }
  return rows;
}

struct RowTable {
  Rows of[16];
};

constexpr RowTable MakeRowTable() {
  RowTable table{};
  for (int edges = 0; edges < 16; ++edges) table.of[edges] = RowsOf(static_cast<Edges>(edges));
  return table;
}

constexpr RowTable kRows = MakeRowTable();

Edges ActiveEdges(const double* approach) {
  const double normal = approach[0], one = kFriction * approach[1], two = kFriction * approach[2];
  return static_cast<Edges>((normal + one < 0 ? 1 : 0) | (normal - one < 0 ? 2 : 0) |
                            (normal + two < 0 ? 4 : 0) | (normal - two < 0 ? 8 : 0));
}

int Bits(unsigned pair) { return static_cast<int>((pair & 1) + (pair >> 1)); }
int SignOf(unsigned pair) { return static_cast<int>(pair & 1) - static_cast<int>(pair >> 1); }

int BlockOf(int a, int b) { return a * (a + 1) / 2 + b; }

double ScalarProduct(const Three& a, const Three& b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

// a - b c'
void SubtractProduct(Block& a, const Block& b, const Block& c) {
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) a[i][j] -= ScalarProduct(b[i], c[j]);
  }
}

// a b, where b is symmetric
void Multiply(const Block& a, const Block& b, Block& out) {
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) out[i][j] = ScalarProduct(a[i], b[j]);
  }
}

// sum + scale * m v
void AddTimes(Three& sum, double scale, const Block& m, const Three& v) {
  for (int i = 0; i < 3; ++i) sum[i] += scale * ScalarProduct(m[i], v);
}

// sum + scale * m' v
void AddTransposedTimes(Three& sum, double scale, const Block& m, const Three& v) {
  for (int i = 0; i < 3; ++i) sum[i] += scale * (m[0][i] * v[0] + m[1][i] * v[1] + m[2][i] * v[2]);
}

// Of a symmetric positive block by its cofactors, which is one division instead of three that wait for each
// other.
void Invert(const Block& m, Block& out) {
  const double c00 = m[1][1] * m[2][2] - m[2][1] * m[2][1];
  const double c10 = m[2][1] * m[2][0] - m[1][0] * m[2][2];
  const double c20 = m[1][0] * m[2][1] - m[1][1] * m[2][0];
  const double scale = 1 / (m[0][0] * c00 + m[1][0] * c10 + m[2][0] * c20);
  out[0][0] = scale * c00;
  out[0][1] = out[1][0] = scale * c10;
  out[0][2] = out[2][0] = scale * c20;
  out[1][1] = scale * (m[0][0] * m[2][2] - m[2][0] * m[2][0]);
  out[1][2] = out[2][1] = scale * (m[1][0] * m[2][0] - m[0][0] * m[2][1]);
  out[2][2] = scale * (m[0][0] * m[1][1] - m[1][0] * m[1][0]);
}

// How a force along each direction of one contact moves a body along each of another's, added to `block`.
void AddCoupling(const Contact& a, int a_side, const Contact& b, int b_side, bool agent, Block& block) {
  const Vec rows[3] = {a.normal, a.tangents[0], a.tangents[1]};
  const Vec columns[3] = {b.normal, b.tangents[0], b.tangents[1]};
  const double sign = a_side == b_side ? 1 : -1, yield = sign / (agent ? kAgentInertia : kBallInertia);
  double products[3][3];
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      const double along_z = agent ? 0 : rows[i].z * columns[j].z;  // the agent keeps its height
      products[i][j] = rows[i].x * columns[j].x + rows[i].y * columns[j].y + along_z;
      block[i][j] += yield * products[i][j];
    }
  }
  if (agent) return;
  // A force along a tangent turns the ball about the other one, whichever side the ball is on.
  const double spin = a.levers[a_side] * b.levers[b_side] / kBallSpinInertia;
  block[1][1] += spin * products[2][2];
  block[1][2] -= spin * products[2][1];
  block[2][1] -= spin * products[1][2];
  block[2][2] += spin * products[1][1];
}

// The same of a contact with itself on a ball.
void AddOwnCoupling(double lever, Block& block) {
  constexpr double kYield = 1 / kBallInertia, kSpinYield = 1 / kBallSpinInertia;
  block[0][0] += kYield;
  block[1][1] += kYield + lever * lever * kSpinYield;
  block[2][2] += kYield + lever * lever * kSpinYield;
}

}  // namespace

double EdgeStiffness(double distance, double yield, double* reference) {
  const double beyond = distance - kMargin;
  const double x = std::min(-beyond / kImpedanceWidth, 1.0);
  const double y = x <= 0.5 ? 2 * x * x : 1 - 2 * (1 - x) * (1 - x);
  const double impedance = kLeastImpedance + y * (kMostImpedance - kLeastImpedance);
  *reference = kContactStiffness * impedance * beyond;
  constexpr double kSquared = kFriction * kFriction;
  return impedance / ((1 - impedance) * (2 * kSquared * (1 + kSquared) * yield));
}

bool SolveAlone(Contact* contact) {
  constexpr double kYield = 1 / kBallInertia, kSpinYield = 1 / kBallSpinInertia;
  const double lever = contact->levers[1], stiffness = contact->stiffness;
  const double* free = contact->free;
  // The coupling is diagonal: `along` the normal and `across` it are its inverse.
  const double yield_across = kYield + lever * lever * kSpinYield;
  constexpr double kSquare = kFriction * kFriction;
  Edges edges = contact->edges == kUnknownEdges ? ActiveEdges(free) : contact->edges;
  if (edges == kAllEdges) {  // at rest and rolling
    const double normal = 1 / (1 + 4 * kYield * stiffness);
    const double tangential = 1 / (1 + 2 * kSquare * yield_across * stiffness);
    const double approach[3] = {normal * free[0], tangential * free[1], tangential * free[2]};
    edges = ActiveEdges(approach);
    if (edges == kAllEdges) {
      contact->edges = edges;
      contact->force[0] = -4 * stiffness * approach[0];
      contact->force[1] = -2 * kSquare * stiffness * approach[1];
      contact->force[2] = -2 * kSquare * stiffness * approach[2];
      return true;
    }
  }
  const double along = kBallInertia, across = 1 / yield_across;
  for (int iteration = 0; iteration < 8; ++iteration) {
    const unsigned one = edges & 3, two = edges >> 2;
    const double square = kSquare * stiffness, cross = kFriction * stiffness;
    const double h0 = along + stiffness * (Bits(one) + Bits(two));
    const double h1 = 1 / (across + square * Bits(one)), h2 = 1 / (across + square * Bits(two));
    const double c1 = cross * SignOf(one), c2 = cross * SignOf(two);
    const double right1 = across * free[1], right2 = across * free[2];
    double approach[3];
    approach[0] =
        (along * free[0] - c1 * h1 * right1 - c2 * h2 * right2) / (h0 - c1 * c1 * h1 - c2 * c2 * h2);
    approach[1] = h1 * (right1 - c1 * approach[0]);
    approach[2] = h2 * (right2 - c2 * approach[0]);
    const Edges found = ActiveEdges(approach);
    if (found == edges) {
      contact->edges = edges;
      contact->force[0] = along * (approach[0] - free[0]);
      contact->force[1] = across * (approach[1] - free[1]);
      contact->force[2] = across * (approach[2] - free[2]);
      return true;
    }
    edges = found;
  }
  return false;
}

void ContactSolver::Couple(Contact* const* contacts, int count) {
  for (int a = 0; a < count; ++a) {
    const Contact& own = *contacts[a];
    for (int b = 0; b < a; ++b) {
      const Contact& other = *contacts[b];
      Block& block = coupling_[BlockOf(a, b)];
      std::fill_n(block[0], 9, 0.0);
      if (own.second == other.second) AddCoupling(own, 1, other, 1, own.second == kAgent, block);
      if (own.second == other.first) AddCoupling(own, 1, other, 0, false, block);
      if (own.first < 0) continue;
      if (own.first == other.second) AddCoupling(own, 0, other, 1, false, block);
      if (own.first == other.first) AddCoupling(own, 0, other, 0, false, block);
    }
    Block& block = coupling_[BlockOf(a, a)];
    std::fill_n(block[0], 9, 0.0);
    if (own.first >= 0) AddOwnCoupling(own.levers[0], block);
    if (own.second == kAgent) {
      AddCoupling(own, 1, own, 1, true, block);
    } else {
      AddOwnCoupling(own.levers[1], block);
    }
  }
}

// The forces that would be right if these edges were the active ones: by L D L' in blocks, one for two
// contacts.
void ContactSolver::NewtonForces(const Edges* edges, int count) {
  for (int a = 0; a < count; ++a) {
    const Block& rows = kRows.of[edges[a]].along;
    Three& right = right_[a];
    for (int i = 0; i < 3; ++i) right[i] = -ScalarProduct(rows[i], free_[a]);
    Block* const line = factor_ + BlockOf(a, 0);
    for (int b = 0; b <= a; ++b) {
      const Block& columns = kRows.of[edges[b]].along;
      const Block& coupling = coupling_[BlockOf(a, b)];
      for (int i = 0; i < 3; ++i) {
        Three moved = {0, 0, 0};
        AddTransposedTimes(moved, 1, coupling, rows[i]);
        for (int j = 0; j < 3; ++j) line[b][i][j] = ScalarProduct(columns[j], moved);
      }
    }
    Block& pivot = line[a];
    for (int i = 0; i < 3; ++i) pivot[i][i] += softness_[a];
    for (int b = 1; b < a; ++b) {
      for (int k = 0; k < b; ++k) SubtractProduct(line[b], line[k], factor_[BlockOf(b, k)]);
    }
    for (int b = 0; b < a; ++b) {
      Block scaled;
      Multiply(line[b], inverse_pivot_[b], scaled);
      SubtractProduct(pivot, scaled, line[b]);
      AddTimes(right, -1, scaled, right_[b]);
      std::copy_n(scaled[0], 9, line[b][0]);
    }
    Invert(pivot, inverse_pivot_[a]);
  }
  for (int a = count - 1; a >= 0; --a) {
    Three x = {0, 0, 0};
    AddTimes(x, 1, inverse_pivot_[a], right_[a]);
    for (int k = a + 1; k < count; ++k) AddTransposedTimes(x, -1, factor_[BlockOf(k, a)], right_[k]);
    std::copy_n(x, 3, right_[a]);
    Three& force = next_force_[a];
    std::fill_n(force, 3, 0.0);
    AddTransposedTimes(force, 1, kRows.of[edges[a]].along, x);
  }
}

void ContactSolver::Approaches(int count) {
  for (int a = 0; a < count; ++a) {
    std::copy_n(free_[a], 3, next_approach_[a]);
    for (int b = 0; b <= a; ++b) AddTimes(next_approach_[a], 1, coupling_[BlockOf(a, b)], next_force_[b]);
    for (int b = 0; b < a; ++b) {
      AddTransposedTimes(next_approach_[b], 1, coupling_[BlockOf(a, b)], next_force_[a]);
    }
  }
}

double ContactSolver::Cost(int count) const {
  double cost = 0;
  for (int c = 0; c < count; ++c) {
    const Three& p = next_approach_[c];
    for (int i = 0; i < 3; ++i) cost += next_force_[c][i] * (p[i] - free_[c][i]);
    for (int t = 1; t <= 2; ++t) {
      const double plus = std::min(p[0] + kFriction * p[t], 0.0);
      const double minus = std::min(p[0] - kFriction * p[t], 0.0);
      cost += stiffness_[c] * (plus * plus + minus * minus);
    }
  }
  return cost / 2;
}

// Where the cost is least between the forces and the next ones, which is not at the latter.
double ContactSolver::StepLength(int count) const {
  double low = 0, high = 1;
  for (int halving = 0; halving < 60; ++halving) {
    const double at = (low + high) / 2;
    double slope = 0;
    for (int c = 0; c < count; ++c) {
      const Three &from = approach_[c], &to = next_approach_[c];
      for (int i = 0; i < 3; ++i) {
        const double here = from[i] + at * (to[i] - from[i]);
        slope += (next_force_[c][i] - force_[c][i]) * (here - free_[c][i]);
      }
      for (int edge = 0; edge < 4; ++edge) {
        const double friction = edge % 2 == 0 ? kFriction : -kFriction;
        const double a = from[0] + friction * from[1 + edge / 2], b = to[0] + friction * to[1 + edge / 2];
        slope += stiffness_[c] * std::min(a + at * (b - a), 0.0) * (b - a);
      }
    }
    (slope < 0 ? low : high) = at;
  }
  return (low + high) / 2;
}

void ContactSolver::Solve(Contact* const* contacts, int count) {
  Couple(contacts, count);
  Edges edges[kMostContacts];
  for (int c = 0; c < count; ++c) {
    std::copy_n(contacts[c]->free, 3, free_[c]);
    stiffness_[c] = contacts[c]->stiffness;
    softness_[c] = 1 / stiffness_[c];
    edges[c] = contacts[c]->edges == kUnknownEdges ? ActiveEdges(free_[c]) : contacts[c]->edges;
  }
  double cost = 0;
  for (int iteration = 0; iteration < kMostIterations; ++iteration) {
    NewtonForces(edges, count);
    Approaches(count);
    bool last = true;
    for (int c = 0; c < count; ++c) last = last && ActiveEdges(next_approach_[c]) == edges[c];
    if (last) break;
    double next_cost = Cost(count);
    if (iteration > 0) {
      if (next_cost >= cost) {
        const double length = StepLength(count);
        for (int c = 0; c < count; ++c) {
          for (int i = 0; i < 3; ++i) {
            next_force_[c][i] = force_[c][i] + length * (next_force_[c][i] - force_[c][i]);
            next_approach_[c][i] = approach_[c][i] + length * (next_approach_[c][i] - approach_[c][i]);
          }
        }
        next_cost = Cost(count);
      }
      double step = 0, largest = 0;
      for (int c = 0; c < count; ++c) {
        for (int i = 0; i < 3; ++i) {
          step = std::max(step, std::abs(next_approach_[c][i] - approach_[c][i]));
          largest = std::max(largest, std::abs(next_approach_[c][i]));
        }
      }
      if (step <= kRelativeStep * largest) break;
    }
    cost = next_cost;
    for (int c = 0; c < count; ++c) {
      std::copy_n(next_force_[c], 3, force_[c]);
      std::copy_n(next_approach_[c], 3, approach_[c]);
      edges[c] = ActiveEdges(approach_[c]);
    }
  }
  for (int c = 0; c < count; ++c) {
    contacts[c]->edges = edges[c];
    std::copy_n(next_force_[c], 3, contacts[c]->force);
  }
}

}  // namespace lago::clevr
