// The headers of others that the CPU step needs. They come before an instruction set is chosen: no
// function of the standard library may be compiled for one that the machine may lack.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
