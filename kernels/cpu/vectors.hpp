// Vectors of the instruction set that a file is compiled for, with FALCON_LEVEL and FALCON_LANES (CMakeLists.txt).
// Everything is in an anonymous namespace: no function compiled for one instruction set may be linked into another's code.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define FALCON_JOIN_(a, b) a##b
#define FALCON_JOIN(a, b) FALCON_JOIN_(a, b)
#define FALCON_STRING_(a) #a
#define FALCON_STRING(a) FALCON_STRING_(a)
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace falcon {
namespace {

constexpr int kLanes = FALCON_LANES;

typedef float Floats __attribute__((vector_size(4 * kLanes), may_alias));
typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes), may_alias));
typedef float LooseFloats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef std::uint32_t LooseWords __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

ALWAYS_INLINE Floats load(const float *p) { return *reinterpret_cast<const LooseFloats *>(p); }
ALWAYS_INLINE Words load(const std::uint32_t *p) { return *reinterpret_cast<const LooseWords *>(p); }
ALWAYS_INLINE void store(float *p, Floats v) { *reinterpret_cast<LooseFloats *>(p) = v; }
ALWAYS_INLINE Floats splat(float x) { return x - Floats{}; }
ALWAYS_INLINE Words splat(std::uint32_t x) { return x - Words{}; }

} // namespace
} // namespace falcon
