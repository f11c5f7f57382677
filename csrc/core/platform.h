#pragma once

// The formulas of csrc/core are compiled by g++ and by nvcc alike.
// FASTOPT_UNROLL stands before a loop that is to be unrolled, and with it its coefficients folded.
#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#define FASTOPT_UNROLL _Pragma("unroll")
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#define FASTOPT_UNROLL _Pragma("GCC unroll 16")
#endif

// CPU sources are compiled once per instruction set. Each set needs its own copy of every inline
// function: the linker merges equal names, and would run AVX-512 code on a machine without it.
#ifndef FASTOPT_ISA
#define FASTOPT_ISA baseline
#endif
#define FASTOPT_BEGIN_NAMESPACE \
  namespace fastopt {           \
  inline namespace FASTOPT_ISA {
#define FASTOPT_END_NAMESPACE \
  }                           \
  }
