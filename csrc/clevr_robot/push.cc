#include "clevr_robot/push.h"

#include <algorithm>
#include <cmath>

#include "clevr_robot/contacts.h"
#include "clevr_robot/scene.h"
#include "clevr_robot/vector.h"
#include "core/threads.h"

namespace lago {
namespace {

using namespace clevr;

struct Quaternion {
  double w, x, y, z;
};

Quaternion Product(const Quaternion& a, const Quaternion& b) {
  return {a.w * b.w - a.x * b.x - a.y * b.y - a.z * b.z, a.w * b.x + a.x * b.w + a.y * b.z - a.z * b.y,
          a.w * b.y - a.x * b.z + a.y * b.w + a.z * b.x, a.w * b.z + a.x * b.y - a.y * b.x + a.z * b.w};
}

Quaternion Normalized(const Quaternion& q) {
  const double norm = std::sqrt(q.w * q.w + q.x * q.x + q.y * q.y + q.z * q.z);
  if (norm < 1e-15) return {1, 0, 0, 0};  // as MuJoCo has it
  return {q.w / norm, q.x / norm, q.y / norm, q.z / norm};
}

Vec Rotated(const Quaternion& q, Vec v) {
  const Vec axis = {q.x, q.y, q.z};
  const Vec twice = 2 * Cross(axis, v);
  return v + q.w * twice + Cross(axis, twice);
}

Quaternion Conjugate(const Quaternion& q) { return {q.w, -q.x, -q.y, -q.z}; }

// The rotation by an angular velocity during one step.
Quaternion Turn(Vec spin) {
  constexpr double kHalf = kTimestep / 2;
  const double s = kHalf * kHalf * Dot(spin, spin);
  double cosine, sine;  // the sine over the angle
  if (s < 0.01) {       // to the last bit by their series
    cosine = 1 - s * (1.0 / 2 - s * (1.0 / 24 - s * (1.0 / 720 - s / 40320)));
    sine = 1 - s * (1.0 / 6 - s * (1.0 / 120 - s * (1.0 / 5040 - s / 362880)));
  } else {
    const double angle = std::sqrt(s);
    cosine = std::cos(angle);
    sine = std::sin(angle) / angle;
  }
  return {cosine, kHalf * sine * spin.x, kHalf * sine * spin.y, kHalf * sine * spin.z};
}

// MuJoCo's choice of the tangents.
void SetTangents(Contact* contact) {
  const Vec n = contact->normal;
  const Vec from = std::abs(n.y) < 0.5 ? Vec{0, 1, 0} : Vec{0, 0, 1};
  const Vec across = from - Dot(n, from) * n;
  contact->tangents[0] = 1 / std::sqrt(Dot(across, across)) * across;
  contact->tangents[1] = Cross(n, contact->tangents[0]);
}

struct Plane {
  Vec normal, tangents[2];
  double offset;

  Plane(Vec n, Vec through) : normal(n), offset(Dot(n, through)) {
    Contact contact;
    contact.normal = n;
    SetTangents(&contact);
    tangents[0] = contact.tangents[0];
    tangents[1] = contact.tangents[1];
  }
};

const Plane kTable{{0, 0, 1}, {0, 0, kTableHeight}};
const Plane kWallPlanes[kWalls] = {{{kWallSine, 0, kWallCosine}, {-kWallX, 0, 0}},
                                   {{-kWallSine, 0, kWallCosine}, {kWallX, 0, 0}},
                                   {{0, -kWallSine, kWallCosine}, {0, kWallBack, 0}},
                                   {{0, kWallSine, kWallCosine}, {0, kWallFront, 0}}};

// One scene. A ball is the same in every direction and so is its inertia: angular velocities are kept in the
// world's frame, in which a ball's own turning does not change them, and orientations lead nowhere.
class Scene {
 public:
  void Load(const double* qpos, const double* qvel, const double* ctrl);
  void Store(double* qpos, double* qvel) const;
  bool Step();  // false where it diverged

 private:
  void FindContacts();
  void AddPlane(int ball, const Plane& plane, double distance, int slot);
  void AddPair(int first, int second, double reach, int slot);
  void FinishContact(Contact* contact, double distance, double yield);
  void JoinTables();
  void SolveTogether();
  void Apply(const Contact& contact);
  bool Integrate();

  Vec place_[kBodies], velocity_[kBodies], spin_[kBalls];
  Quaternion turned_[kBalls];
  Vec ctrl_;

  // of the step: the velocity's own part of the contacts' approach, and the contacts' forces
  Vec approach_[kBodies], turning_[kBodies];
  Vec force_[kBodies], torque_[kBodies];

  Contact contacts_[kMostContacts];  // those that are not of one ball alone with the table
  int slots_[kMostContacts];
  int count_;
  int island_[kBodies];
  bool joined_[kBodies];  // to anything but the table
  Edges edges_[kMostContacts], next_edges_[kMostContacts];
  ContactSolver solver_;
};

void Scene::Load(const double* qpos, const double* qvel, const double* ctrl) {
  for (int b = 0; b < kBalls; ++b) {
    const double *q = qpos + 7 * b, *v = qvel + 6 * b;
    place_[b] = {q[0], q[1], q[2]};
    turned_[b] = Normalized({q[3], q[4], q[5], q[6]});
    velocity_[b] = {v[0], v[1], v[2]};
    spin_[b] = Rotated(turned_[b], {v[3], v[4], v[5]});
  }
  place_[kAgent] = {qpos[7 * kBalls], qpos[7 * kBalls + 1], kAgentHeight};
  velocity_[kAgent] = {qvel[6 * kBalls], qvel[6 * kBalls + 1], 0};
  turning_[kAgent] = {0, 0, 0};
  ctrl_ = {std::clamp(ctrl[0], -kLargestForce, kLargestForce),
           std::clamp(ctrl[1], -kLargestForce, kLargestForce), 0};
  std::fill_n(edges_, kMostContacts, kUnknownEdges);
}

void Scene::Store(double* qpos, double* qvel) const {
  for (int b = 0; b < kBalls; ++b) {
    const Quaternion turned = Normalized(turned_[b]);
    const Vec spin = Rotated(Conjugate(turned), spin_[b]);
    const double q[7] = {place_[b].x, place_[b].y, place_[b].z, turned.w, turned.x, turned.y, turned.z};
    const double v[6] = {velocity_[b].x, velocity_[b].y, velocity_[b].z, spin.x, spin.y, spin.z};
    std::copy_n(q, 7, qpos + 7 * b);
    std::copy_n(v, 6, qvel + 6 * b);
  }
  qpos[7 * kBalls] = place_[kAgent].x;
  qpos[7 * kBalls + 1] = place_[kAgent].y;
  qvel[6 * kBalls] = velocity_[kAgent].x;
  qvel[6 * kBalls + 1] = velocity_[kAgent].y;
}

// The normal, the tangents, the bodies and the levers are set.
void Scene::FinishContact(Contact* contact, double distance, double yield) {
  const int a = contact->first, b = contact->second;
  Vec relative = approach_[b];
  Vec turning = contact->levers[1] * turning_[b];
  if (a >= 0) {
    relative = relative - approach_[a];
    turning = turning + contact->levers[0] * turning_[a];
  }
  relative = relative - Cross(turning, contact->normal);
  double reference;
  contact->stiffness = EdgeStiffness(distance, yield, &reference);
  contact->free[0] = Dot(contact->normal, relative) + reference;
  contact->free[1] = Dot(contact->tangents[0], relative);
  contact->free[2] = Dot(contact->tangents[1], relative);
}

void Scene::AddPlane(int ball, const Plane& plane, double distance, int slot) {
  Contact& contact = contacts_[count_];
  contact.first = -1;
  contact.second = ball;
  contact.normal = plane.normal;
  contact.tangents[0] = plane.tangents[0];
  contact.tangents[1] = plane.tangents[1];
  contact.levers[0] = 0;
  contact.levers[1] = kBallRadius + distance / 2;
  contact.edges = edges_[slot];
  FinishContact(&contact, distance, kBallYield);
  slots_[count_++] = slot;
}

void Scene::AddPair(int first, int second, double reach, int slot) {
  const Vec apart = place_[second] - place_[first];
  const double square = Dot(apart, apart);
  if (square > (reach + kMargin) * (reach + kMargin)) return;
  const double length = std::sqrt(square), distance = length - reach;
  if (distance >= kMargin) return;
  Contact& contact = contacts_[count_];
  contact.first = first;
  contact.second = second;
  // MuJoCo's answer for balls in one place, if they are turned alike
  contact.normal = length < 1e-15 ? Vec{1, 0, 0} : 1 / length * apart;
  SetTangents(&contact);
  contact.levers[0] = kBallRadius + distance / 2;
  contact.levers[1] = second == kAgent ? kAgentRadius + distance / 2 : contact.levers[0];
  contact.edges = edges_[slot];
  FinishContact(&contact, distance, kBallYield + (second == kAgent ? kAgentYield : kBallYield));
  slots_[count_++] = slot;
  joined_[first] = joined_[second] = true;
  const int from = island_[second], to = island_[first];
  for (int& island : island_) {
    if (island == from) island = to;
  }
}

void Scene::FindContacts() {
  count_ = 0;
  for (int b = 0; b < kBodies; ++b) {
    island_[b] = b;
    joined_[b] = false;
  }
  int slot = kBalls;
  for (int b = 0; b < kBalls; ++b) {
    for (const Plane& plane : kWallPlanes) {
      const double distance = Dot(plane.normal, place_[b]) - plane.offset - kBallRadius;
      if (distance < kMargin) {
        AddPlane(b, plane, distance, slot);
        joined_[b] = true;
      }
      ++slot;
    }
  }
  for (int a = 0; a < kBalls; ++a) {
    for (int b = a + 1; b < kBalls; ++b) AddPair(a, b, 2 * kBallRadius, slot++);
  }
  for (int b = 0; b < kBalls; ++b) AddPair(b, kAgent, kBallRadius + kAgentRadius, slot++);
}

void Scene::Apply(const Contact& contact) {
  const Vec f = contact.force[0] * contact.normal + contact.force[1] * contact.tangents[0] +
                contact.force[2] * contact.tangents[1];
  const Vec torque = Cross(contact.normal, f);
  force_[contact.second] = force_[contact.second] + f;
  torque_[contact.second] = torque_[contact.second] - contact.levers[1] * torque;
  if (contact.first < 0) return;
  force_[contact.first] = force_[contact.first] - f;
  torque_[contact.first] = torque_[contact.first] - contact.levers[0] * torque;
}

// Each ball's contact with the table: solved where the ball touches nothing else.
void Scene::JoinTables() {
  for (int b = 0; b < kBalls; ++b) {
    const double distance = Dot(kTable.normal, place_[b]) - kTable.offset - kBallRadius;
    if (!(distance < kMargin)) continue;
    AddPlane(b, kTable, distance, b);
    if (joined_[b]) continue;
    Contact& alone = contacts_[count_ - 1];
    if (!SolveAlone(&alone)) {
      Contact* one = &alone;
      solver_.Solve(&one, 1);
    }
    Apply(alone);
    next_edges_[b] = alone.edges;
    --count_;
  }
}

void Scene::SolveTogether() {
  for (int island = 0; island < kBodies; ++island) {
    Contact* members[kMostContacts];
    int count = 0;
    for (int i = 0; i < count_; ++i) {
      if (island_[contacts_[i].second] == island) members[count++] = &contacts_[i];
    }
    if (count == 0) continue;
    solver_.Solve(members, count);
    for (int i = 0; i < count; ++i) {
      Apply(*members[i]);
      next_edges_[slots_[members[i] - contacts_]] = members[i]->edges;
    }
  }
}

// Of one degree of freedom. Euler's step takes the damping implicitly, as MuJoCo's does: hence the damped
// inverse.
struct Inertia {
  double inverse, inverse_damped, damping;

  constexpr Inertia(double inertia, double damping)
      : inverse(1 / inertia), inverse_damped(1 / (inertia + kTimestep * damping)), damping(damping) {}
};

constexpr Inertia kBallAlong{kBallInertia, kBallDamping}, kBallAbout{kBallSpinInertia, kBallDamping},
    kAgentAlong{kAgentInertia, kAgentDamping};

// Adds one step to a speed; returns the greater of it and the acceleration.
double Accelerate(double* speed, double force, const Inertia& inertia) {
  const double total = force - inertia.damping * *speed;
  *speed += kTimestep * total * inertia.inverse_damped;
  return std::max(std::abs(total) * inertia.inverse, std::abs(*speed));
}

bool Scene::Integrate() {
  bool sound = true;
  // a comparison with NaN is false
  const auto check = [&sound](double size) { sound &= size <= kLargest; };
  for (int b = 0; b < kBodies; ++b) {
    const bool agent = b == kAgent;
    const Inertia& inertia = agent ? kAgentAlong : kBallAlong;
    Vec& v = velocity_[b];
    check(Accelerate(&v.x, force_[b].x, inertia));
    check(Accelerate(&v.y, force_[b].y, inertia));
    if (!agent) {
      check(Accelerate(&v.z, force_[b].z - kBallMass * kGravity, inertia));
      check(Accelerate(&spin_[b].x, torque_[b].x, kBallAbout));
      check(Accelerate(&spin_[b].y, torque_[b].y, kBallAbout));
      check(Accelerate(&spin_[b].z, torque_[b].z, kBallAbout));
      turned_[b] = Product(Turn(spin_[b]), turned_[b]);
    }
    place_[b] = place_[b] + kTimestep * v;
    check(std::max({std::abs(place_[b].x), std::abs(place_[b].y), std::abs(place_[b].z)}));
  }
  return sound;
}

bool Scene::Step() {
  constexpr double kFall = -kBallMass * kGravity / kBallInertia;
  for (int b = 0; b < kBalls; ++b) {
    approach_[b] = (kContactDamping - kBallDamping / kBallInertia) * velocity_[b];
    approach_[b].z += kFall;
    turning_[b] = (kContactDamping - kBallDamping / kBallSpinInertia) * spin_[b];
  }
  approach_[kAgent] =
      (kContactDamping - kAgentDamping / kAgentInertia) * velocity_[kAgent] + kAgentAlong.inverse * ctrl_;
  std::fill_n(force_, kBodies, Vec{0, 0, 0});
  force_[kAgent] = ctrl_;
  std::fill_n(torque_, kBodies, Vec{0, 0, 0});
  std::fill_n(next_edges_, kMostContacts, kUnknownEdges);
  FindContacts();
  JoinTables();
  if (count_ > 0) SolveTogether();
  std::copy_n(next_edges_, kMostContacts, edges_);
  return Integrate();
}

}  // namespace

void UnsafeClevrPush(const ClevrScenes& scenes, int threads) {
  ParallelFor(scenes.rows, threads, [&](std::size_t row, int) {
    thread_local Scene scene;  // large, and nothing of it outlives a row
    double *qpos = scenes.qpos + kClevrPositions * row, *qvel = scenes.qvel + kClevrVelocities * row;
    scene.Load(qpos, qvel, scenes.ctrl + 2 * row);
    bool sound = true;
    for (std::int64_t step = 0; sound && step < scenes.substeps[row]; ++step) sound = scene.Step();
    scene.Store(qpos, qvel);
    scenes.diverged[row] = sound ? 0 : 1;
  });
}

}  // namespace lago
