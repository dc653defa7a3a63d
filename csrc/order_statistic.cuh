// The loss of the last of the hardest pixels, without sorting and without waiting for the device.
//
// Losses of at least 0 order like their bits, so that the wanted one is found digit by digit, from
// the top: each of four rounds counts, among the losses that share the digits found so far, how many
// have which next digit of 8 bits. Every thread counts for itself, so there are no atomics.
#pragma once

#include "numeric.cuh"

namespace lgcnet {

constexpr int kDigits = 256;
constexpr int kDigitBits = 8;

struct OrderState {
  long long found;  // digits
  long long rank;   // of the wanted loss among those that share them, the largest being 1
};

struct CountDigitsArguments {
  const float* losses;      // (pixels,), negative where a pixel does not count; NaN ranks as infinite
  const OrderState* state;
  int* counts;              // (blocks, kDigits)
  long long pixels;
  int shift;  // of the digit
};

struct SelectDigitArguments {
  const int* counts;
  OrderState* state;
  float* hardest;  // written in the last round: infinite if no loss is wanted
  double keep;     // the rank is ceil(keep * number of losses)
  int blocks;
  int shift;
};

// A thread meets fewer than 2^16 losses: the launcher sees to it.
template <int Threads>
__global__ void __launch_bounds__(Threads) count_digits(const CountDigitsArguments a) {
  __shared__ unsigned short counts[kDigits][Threads];
  const int thread = threadIdx.x;
  for (int digit = 0; digit < kDigits; ++digit) counts[digit][thread] = 0;
  const int found = static_cast<int>(a.state->found);
  const long long step = static_cast<long long>(gridDim.x) * Threads;
#pragma unroll 4
  for (long long i = static_cast<long long>(blockIdx.x) * Threads + thread; i < a.pixels;
       i += step) {
    FloatBits loss;
    loss.value = __ldg(a.losses + i);
    if (loss.value != loss.value) loss.bits = 0x7f800000u;
    const int bits = static_cast<int>(loss.bits);
    const int leading = bits >> a.shift;
    if (bits >= 0 && leading >> kDigitBits == found) ++counts[leading % kDigits][thread];
  }
  __syncthreads();
  for (int digit = thread; digit < kDigits; digit += Threads) {
    int total = 0;
    // Each thread from a place of its own on, for they would all meet in one bank of the memory.
    for (int j = 0; j < Threads; ++j) total += counts[digit][(j + thread) % Threads];
    a.counts[static_cast<long long>(blockIdx.x) * kDigits + digit] = total;
  }
}

// Picks the digit in which the wanted rank lies; one block of Digits threads.
template <int Digits>
__global__ void __launch_bounds__(Digits) select_digit(const SelectDigitArguments a) {
  __shared__ long long totals[Digits];
  const int digit = threadIdx.x;
  OrderState state = *a.state;
  long long own = 0;
#pragma unroll 4
  for (int block = 0; block < a.blocks; ++block) {
    own += a.counts[static_cast<long long>(block) * Digits + digit];
  }
  totals[digit] = own;
  __syncthreads();  // every thread has read the state
  long long from_here = 0;
  long long everything = 0;
  for (int other = 0; other < Digits; ++other) {
    everything += totals[other];
    from_here += other >= digit ? totals[other] : 0;
  }
  const bool first = a.shift + kDigitBits == 32;
  if (first) state.rank = static_cast<long long>(ceil(a.keep * static_cast<double>(everything)));
  // The digit with which, from the top, there are enough losses.
  const bool enough_before = digit + 1 < Digits && from_here - own >= state.rank;
  if (from_here < state.rank || enough_before) return;
  state.found = state.found * Digits + digit;
  state.rank -= from_here - own;
  *a.state = state;
  if (a.shift == 0) {
    const bool wanted = state.rank > 0;
    *a.hardest = wanted ? bits_to_float(static_cast<unsigned>(state.found)) : -minus_infinity();
  }
}

}  // namespace lgcnet
