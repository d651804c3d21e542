// Vectors of three doubles.
#ifndef LAGO_CLEVR_ROBOT_VECTOR_H_
#define LAGO_CLEVR_ROBOT_VECTOR_H_

namespace lago::clevr {

struct Vec {
  double x, y, z;
};

inline Vec operator+(Vec a, Vec b) { return {a.x + b.x, a.y + b.y, a.z + b.z}; }
inline Vec operator-(Vec a, Vec b) { return {a.x - b.x, a.y - b.y, a.z - b.z}; }
inline Vec operator*(double s, Vec a) { return {s * a.x, s * a.y, s * a.z}; }
inline double Dot(Vec a, Vec b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
inline Vec Cross(Vec a, Vec b) {
  return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}

}  // namespace lago::clevr

#endif  // LAGO_CLEVR_ROBOT_VECTOR_H_
