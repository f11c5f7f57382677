#pragma once

// CUDA's built-in vector types, in the global namespace like theirs. They stay trivial, so that
// they can stand in shared memory.

#define FASTOPT_VECTOR2(name, type, alignment) \
  struct alignas(alignment) name {             \
    type x, y;                                 \
  };                                           \
  inline name make_##name(type x, type y) { return {x, y}; }

#define FASTOPT_VECTOR4(name, type, alignment) \
  struct alignas(alignment) name {             \
    type x, y, z, w;                           \
  };                                           \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

FASTOPT_VECTOR2(char2, signed char, 2)
FASTOPT_VECTOR2(uchar2, unsigned char, 2)
FASTOPT_VECTOR2(short2, short, 4)
FASTOPT_VECTOR2(ushort2, unsigned short, 4)
FASTOPT_VECTOR2(int2, int, 8)
FASTOPT_VECTOR2(uint2, unsigned, 8)
FASTOPT_VECTOR2(float2, float, 8)
FASTOPT_VECTOR2(longlong2, long long, 16)
FASTOPT_VECTOR2(ulonglong2, unsigned long long, 16)
FASTOPT_VECTOR2(double2, double, 16)
FASTOPT_VECTOR4(char4, signed char, 4)
FASTOPT_VECTOR4(uchar4, unsigned char, 4)
FASTOPT_VECTOR4(short4, short, 8)
FASTOPT_VECTOR4(ushort4, unsigned short, 8)
FASTOPT_VECTOR4(int4, int, 16)
FASTOPT_VECTOR4(uint4, unsigned, 16)
FASTOPT_VECTOR4(float4, float, 16)

#undef FASTOPT_VECTOR2
#undef FASTOPT_VECTOR4

struct int3 {
  int x, y, z;
};
struct uint3 {
  unsigned x, y, z;
};
struct float3 {
  float x, y, z;
};

inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 size) : x(size.x), y(size.y), z(size.z) {}
};
