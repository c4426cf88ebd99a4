#include "kernels.h"

#include "cpu.h"

namespace bezel {
namespace {

Kernels best() {
  Kernels table{};
  const Isa last = selected_isa();
  for (const Isa isa : usable_isas()) {
    switch (isa) {
      case Isa::scalar: use_scalar(table); break;
      default: break;
    }
    if (isa == last) break;
  }
  return table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = best();
  return table;
}

}  // namespace bezel
