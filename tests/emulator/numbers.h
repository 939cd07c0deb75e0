// __half and __nv_bfloat16: storage and conversions, rounding to the nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulator

namespace emulator {

inline float half_value(uint16_t half) {
  const uint32_t magnitude = half & 0x7fff;
  float x = bit_cast<float>(magnitude << 13) * 0x1p112f;  // the exponents' biases differ by 112; right for subnormals
  if (magnitude >= 0x7c00) x = bit_cast<float>(0x7f800000 | magnitude << 13);
  return half & 0x8000 ? -x : x;
}

inline uint16_t half_bits(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  if (magnitude > 0x7f800000) return 0x7fff;                    // NaN
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // from 65520 on, infinity
  if (magnitude < 0x38800000) {  // subnormal: next to 0.5, float's unit is half's smallest number
    return uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f)));
  }
  return uint16_t(sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

}  // namespace emulator

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float x) : bits(emulator::half_bits(x)) {}
  operator float() const { return emulator::half_value(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 x) { return __floats2half2_rn(x.x, x.y); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }

namespace emulator {

inline float bfloat16_value(uint16_t bfloat16) { return bit_cast<float>(uint32_t(bfloat16) << 16); }

inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // NaN
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : bits(emulator::bfloat16_bits(x)) {}
  operator float() const { return emulator::bfloat16_value(bits); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return __floats2bfloat162_rn(x.x, x.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {__bfloat162float(x.x), __bfloat162float(x.y)}; }
