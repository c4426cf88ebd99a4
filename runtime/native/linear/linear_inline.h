// Kernels are written as many small functions; these make one of them again, whatever the compiler's own
// measure.
#pragma once

#if defined(_MSC_VER) && !defined(__clang__)
#define BEZEL_INLINE __forceinline
#define BEZEL_LAMBDA [[msvc::forceinline]]
#else
#define BEZEL_INLINE inline __attribute__((always_inline))
#define BEZEL_LAMBDA __attribute__((always_inline))
#endif
