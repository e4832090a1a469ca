// Launches that are made again: an operator whose shapes came before is one call from Python
// (llama_smop/ops/backends/cuda_replay.py).
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "api.h"

// What differs when a launch is made again, in types that tell it from sizes.
struct Address {
  uintptr_t value;  // of the device; 0 for none
};
struct Stream {
  uint64_t value;
  operator uint64_t() const { return value; }
};

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address.value);
}

inline void check(int error, const char* what) {
  if (error) throw std::runtime_error(std::string("llama_smop._C.") + what + ": " + smop_error_string(error));
}

// Launches noted as they are made, to be made again on other memory and another stream. In a noted launch an address is
// a number, 0 for none.
class Plan {
 public:
  template <class... P>
  void note(const char* name, int (*launch)(P...), P... arguments) {
    note_numbered(name, launch, numbered(arguments)...);
  }

  // Each once.
  const std::vector<uintptr_t>& addresses() const { return addresses_; }

  // Each of them lies in one of the arrays that `run` is given: (which array, bytes from its start).
  void place(std::vector<std::pair<size_t, uintptr_t>> places) { places_ = std::move(places); }

  void run(const std::vector<uintptr_t>& arrays, Stream stream) const {
    if (places_.size() != addresses_.size()) throw std::invalid_argument("each address of a plan needs a place");
    Now now{{0}, stream};
    for (const auto& [array, offset] : places_) now.addresses.push_back(arrays.at(array) + offset);
    for (const auto& launch : launches_) launch(now);
  }

 private:
  struct Now {
    std::vector<uintptr_t> addresses;  // by number
    Stream stream;

    Address of(Address number) const { return {addresses[number.value]}; }
    Stream of(Stream) const { return stream; }
    template <class T>
    T of(T size) const {
      return size;
    }
  };

  template <class... P>
  void note_numbered(const char* name, int (*launch)(P...), P... arguments) {
    launches_.push_back([=](const Now& now) { check(launch(now.of(arguments)...), name); });
  }

  Address numbered(Address address) {
    if (address.value == 0) return address;
    const auto found = std::find(addresses_.begin(), addresses_.end(), address.value);
    const uintptr_t index = found - addresses_.begin();
    if (found == addresses_.end()) addresses_.push_back(address.value);
    return {index + 1};
  }
  template <class T>
  T numbered(T size) {
    return size;
  }

  std::vector<uintptr_t> addresses_;
  std::vector<std::pair<size_t, uintptr_t>> places_;
  std::vector<std::function<void(const Now&)>> launches_;
};
