#include "clevr_robot/contacts.h"

#include <algorithm>
#include <cmath>

namespace lago::clevr {
namespace {

constexpr int kMostIterations = 100;
constexpr double kRelativeStep = 1e-13;  // where rounding alone changes the active edges
constexpr double kRootTwo = 1.4142135623730951;

Edges ActiveEdges(const double* approach) {
  const double normal = approach[0], one = kFriction * approach[1], two = kFriction * approach[2];
  return static_cast<Edges>((normal + one < 0 ? 1 : 0) | (normal - one < 0 ? 2 : 0) |
                            (normal + two < 0 ? 4 : 0) | (normal - two < 0 ? 8 : 0));
}

int Bits(unsigned pair) { return static_cast<int>((pair & 1) + (pair >> 1)); }
int SignOf(unsigned pair) { return static_cast<int>(pair & 1) - static_cast<int>(pair >> 1); }

double ScalarProduct(const double* a, const double* b, int size) {
  double sum = 0;
  for (int i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

// How a force along each direction of one contact moves a body along each of another's, added to `block`.
void AddCoupling(const Contact& a, int a_side, const Contact& b, int b_side, bool agent, double* block,
                 int stride) {
  const double sign = a_side == b_side ? 1 : -1;
  const Vec rows[3] = {a.normal, a.tangents[0], a.tangents[1]};
  const Vec columns[3] = {b.normal, b.tangents[0], b.tangents[1]};
  if (agent) {
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) {
        const double flat = rows[i].x * columns[j].x + rows[i].y * columns[j].y;
        block[i * stride + j] += sign / kAgentInertia * flat;
      }
    }
    return;
  }
  double products[3][3];
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) products[i][j] = Dot(rows[i], columns[j]);
  }
  // A force along a tangent turns the ball about the other one, whichever side the ball is on.
  const double spin = a.levers[a_side] * b.levers[b_side] / kBallSpinInertia;
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) block[i * stride + j] += sign / kBallInertia * products[i][j];
  }
  block[1 * stride + 1] += spin * products[2][2];
  block[1 * stride + 2] -= spin * products[2][1];
  block[2 * stride + 1] -= spin * products[1][2];
  block[2 * stride + 2] += spin * products[1][1];
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
  const double lever = contact->levers[1];
  const double along = kBallInertia;  // inverse of the coupling, which is diagonal
  const double across = 1 / (1 / kBallInertia + lever * lever / kBallSpinInertia);
  const double stiffness = contact->stiffness;
  const double* free = contact->free;
  Edges edges = contact->edges == kUnknownEdges ? ActiveEdges(free) : contact->edges;
  for (int iteration = 0; iteration < 8; ++iteration) {
    const unsigned one = edges & 3, two = edges >> 2;
    const double square = kFriction * kFriction * stiffness, cross = kFriction * stiffness;
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
  const int size = 3 * count;
  std::fill_n(coupling_.begin(), size * size, 0.0);
  for (int a = 0; a < count; ++a) {
    for (int b = 0; b <= a; ++b) {
      double* block = coupling_.data() + 3 * a * size + 3 * b;
      const int a_bodies[2] = {contacts[a]->first, contacts[a]->second};
      const int b_bodies[2] = {contacts[b]->first, contacts[b]->second};
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
          if (a_bodies[i] < 0 || a_bodies[i] != b_bodies[j]) continue;
          AddCoupling(*contacts[a], i, *contacts[b], j, a_bodies[i] == kAgent, block, size);
        }
      }
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) coupling_[(3 * b + j) * size + 3 * a + i] = block[i * size + j];
      }
    }
  }
}

// Edges of a contact as at most three rows with the same sum of squares: both edges of a tangent are one row
// along it and, like the other's, a part of the row along the normal.
int ContactSolver::ActiveRows(int count, const Edges* edges) {
  int n = 0;
  for (int c = 0; c < count; ++c) {
    const unsigned pairs[2] = {edges[c] & 3u, edges[c] >> 2u};
    const int full = (pairs[0] == 3) + (pairs[1] == 3);
    if (full > 0) rows_[n++] = {c, {full == 2 ? 2 : kRootTwo, 0, 0}};
    for (int t = 0; t < 2; ++t) {
      if (pairs[t] == 0) continue;
      Row row{c, {pairs[t] == 3 ? 0.0 : 1.0, 0, 0}};
      row.along[1 + t] = pairs[t] == 3 ? kRootTwo * kFriction : kFriction * SignOf(pairs[t]);
      rows_[n++] = row;
    }
  }
  return n;
}

// The forces that would be right if these edges were the active ones.
void ContactSolver::NewtonForces(Contact* const* contacts, int count, const Edges* edges) {
  const int size = 3 * count, n = ActiveRows(count, edges);
  for (int i = 0; i < n; ++i) {
    const Row& row = rows_[i];
    const double* c0 = coupling_.data() + 3 * row.contact * size;
    double moved[kSize];  // what a unit of the row's force does to every approach up to its own contact's
    for (int k = 0; k < 3 * row.contact + 3; ++k) {
      moved[k] = row.along[0] * c0[k] + row.along[1] * c0[size + k] + row.along[2] * c0[2 * size + k];
    }
    double* line = system_.data() + i * n;
    for (int j = 0; j <= i; ++j) {
      line[j] = ScalarProduct(rows_[j].along, moved + 3 * rows_[j].contact, 3);
    }
    line[i] += 1 / contacts[row.contact]->stiffness;
    right_[i] = -ScalarProduct(row.along, free_ + 3 * row.contact, 3);
  }
  // L D L': the factor stands below the diagonal.
  for (int i = 0; i < n; ++i) {
    double* line = system_.data() + i * n;
    double pivot = line[i];
    for (int j = 0; j < i; ++j) {
      const double* above = system_.data() + j * n;
      line[j] -= ScalarProduct(line, above, j);
    }
    for (int j = 0; j < i; ++j) {
      const double scaled = line[j] * inverse_pivot_[j];
      pivot -= line[j] * scaled;
      right_[i] -= scaled * right_[j];
      line[j] = scaled;
    }
    inverse_pivot_[i] = 1 / pivot;
  }
  for (int i = n - 1; i >= 0; --i) {
    double x = right_[i] * inverse_pivot_[i];
    for (int k = i + 1; k < n; ++k) x -= system_[k * n + i] * right_[k];
    right_[i] = x;
  }
  std::fill_n(next_force_, size, 0.0);
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < 3; ++k) next_force_[3 * rows_[i].contact + k] += rows_[i].along[k] * right_[i];
  }
}

void ContactSolver::Approaches(int size) {
  for (int i = 0; i < size; ++i) {
    next_approach_[i] = free_[i] + ScalarProduct(coupling_.data() + i * size, next_force_, size);
  }
}

double ContactSolver::Cost(Contact* const* contacts, int count) const {
  double cost = 0;
  for (int i = 0; i < 3 * count; ++i) cost += next_force_[i] * (next_approach_[i] - free_[i]);
  for (int c = 0; c < count; ++c) {
    const double* p = next_approach_ + 3 * c;
    for (int t = 1; t <= 2; ++t) {
      const double plus = std::min(p[0] + kFriction * p[t], 0.0);
      const double minus = std::min(p[0] - kFriction * p[t], 0.0);
      cost += contacts[c]->stiffness * (plus * plus + minus * minus);
    }
  }
  return cost / 2;
}

// Where the cost is least between the forces and the next ones, which is not at the latter.
double ContactSolver::StepLength(Contact* const* contacts, int count) const {
  double low = 0, high = 1;
  for (int halving = 0; halving < 60; ++halving) {
    const double at = (low + high) / 2;
    double slope = 0;
    for (int i = 0; i < 3 * count; ++i) {
      const double change = next_approach_[i] - approach_[i];
      slope += (next_force_[i] - force_[i]) * (approach_[i] + at * change - free_[i]);
    }
    for (int c = 0; c < count; ++c) {
      const double *from = approach_ + 3 * c, *to = next_approach_ + 3 * c;
      for (int edge = 0; edge < 4; ++edge) {
        const double friction = edge % 2 == 0 ? kFriction : -kFriction;
        const double a = from[0] + friction * from[1 + edge / 2], b = to[0] + friction * to[1 + edge / 2];
        slope += contacts[c]->stiffness * std::min(a + at * (b - a), 0.0) * (b - a);
      }
    }
    (slope < 0 ? low : high) = at;
  }
  return (low + high) / 2;
}

void ContactSolver::Solve(Contact* const* contacts, int count) {
  const int size = 3 * count;
  Couple(contacts, count);
  Edges edges[kMostContacts];
  for (int c = 0; c < count; ++c) {
    std::copy_n(contacts[c]->free, 3, free_ + 3 * c);
    edges[c] = contacts[c]->edges == kUnknownEdges ? ActiveEdges(contacts[c]->free) : contacts[c]->edges;
  }
  double cost = 0;
  for (int iteration = 0; iteration < kMostIterations; ++iteration) {
    NewtonForces(contacts, count, edges);
    Approaches(size);
    bool same = true;
    for (int c = 0; c < count; ++c) same = same && ActiveEdges(next_approach_ + 3 * c) == edges[c];
    double next_cost = same ? 0 : Cost(contacts, count);
    if (!same && iteration > 0) {
      if (next_cost >= cost) {
        const double length = StepLength(contacts, count);
        for (int i = 0; i < size; ++i) {
          next_force_[i] = force_[i] + length * (next_force_[i] - force_[i]);
          next_approach_[i] = approach_[i] + length * (next_approach_[i] - approach_[i]);
        }
        next_cost = Cost(contacts, count);
      }
      double step = 0, largest = 0;
      for (int i = 0; i < size; ++i) {
        step = std::max(step, std::abs(next_approach_[i] - approach_[i]));
        largest = std::max(largest, std::abs(next_approach_[i]));
      }
      same = step <= kRelativeStep * largest;
    }
    std::copy_n(next_force_, size, force_);
    std::copy_n(next_approach_, size, approach_);
    cost = next_cost;
    for (int c = 0; c < count; ++c) edges[c] = ActiveEdges(approach_ + 3 * c);
    if (same) break;
  }
  for (int c = 0; c < count; ++c) {
    contacts[c]->edges = edges[c];
    std::copy_n(force_ + 3 * c, 3, contacts[c]->force);
  }
}

}  // namespace lago::clevr
