// Python's view of launch.h. The only file that includes pybind11, and it includes no CUDA header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"  // written by the build
#include "launch.h"

namespace py = pybind11;
using Extent = std::array<unsigned, 3>;

static std::vector<std::string> names() {
  std::vector<std::string> found;
  for (int kernel = 0; kernel < lgcnet_kernel_count(); ++kernel) {
    found.emplace_back(lgcnet_kernel_name(kernel));
  }
  return found;
}

static void launch(int kernel, const Extent& grid, const Extent& block, const py::bytes& arguments,
                   unsigned long long stream, int shared, bool early) {
  if (kernel < 0 || kernel >= lgcnet_kernel_count()) throw py::index_error("no such kernel");
  const std::string packed = arguments;
  const std::string name = lgcnet_kernel_name(kernel);
  if (packed.size() != lgcnet_argument_bytes(kernel)) {
    throw py::value_error(name + " takes " + std::to_string(lgcnet_argument_bytes(kernel)) +
                          " bytes of arguments, got " + std::to_string(packed.size()));
  }
  const int error =
      lgcnet_launch(kernel, grid.data(), block.data(), packed.data(), stream, shared, early);
  if (error != 0) {
    throw std::runtime_error(name + ": CUDA error " + std::to_string(error) + ", " +
                             lgcnet_error_text(error));
  }
}

PYBIND11_MODULE(_kernels, module) {
  module.doc() = "CUDA kernels, compiled ahead of time.";
  module.attr("architectures") = LGCNET_ARCHITECTURES;
  module.attr("sources") = LGCNET_SOURCES;
  module.def("names", &names, "C++ names of the kernels; a kernel's number is its place here.");
  module.def("launch", &launch, py::arg("kernel"), py::arg("grid"), py::arg("block"),
             py::arg("arguments"), py::arg("stream"), py::arg("shared"), py::arg("early"),
             "Launch a kernel on a stream of the current device. Raises RuntimeError with CUDA's "
             "error code and text.");
}
