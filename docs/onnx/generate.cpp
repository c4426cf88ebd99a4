// Greedy tokens from a folder of `bezel export --target portable`, on OpenVINO:
//   generate FOLDER WINDOW LAYERS END TOKENS ID ID ID …
// with config.json's "sliding_window", or 0, a letter for each of its "layer_types", such as lglg for local and global
// ones in turn, the id that ends a text, and the prompt's ids, <bos> first.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <numeric>
#include <openvino/openvino.hpp>
#include <string>
#include <vector>

const std::int64_t context = 4096, chunk = 128;  // positions that fit, and tokens that are fed at once at most

int main(int argc, char** argv) {
  const std::string folder = argv[1];
  const std::int64_t window = std::atoll(argv[2]), end_id = std::atoll(argv[4]), count = std::atoll(argv[5]);
  const std::string layers = argv[3];
  std::vector<std::int64_t> ids;
  for (int i = 6; i < argc; i++) ids.push_back(std::atoll(argv[i]));
  if (std::int64_t(ids.size()) + count > context) {
    std::cerr << "these tokens do not fit into " << context << '\n';
    return 1;
  }

  ov::Core core;
  auto model = core.read_model(folder + "/model.onnx");
  auto compiled = core.compile_model(model, "CPU");
  auto request = compiled.create_infer_request();

  // A cache is float32 (1, heads, slots, head_dim), all zeros. Position p is kept in slot p mod slots: local layers need
  // slots for a window and a chunk, the others for every position.
  std::vector<std::string> caches;
  for (const auto& input : compiled.inputs()) {
    const std::string name = input.get_any_name();
    if (name.rfind("past.", 0) != 0) continue;
    const bool local = layers.at(std::stoi(name.substr(5))) == 'l';
    auto shape = input.get_partial_shape();
    shape[2] = local ? window + chunk - 1 : context;
    ov::Tensor zeros(ov::element::f32, shape.to_shape());
    std::fill_n(zeros.data<float>(), zeros.get_size(), 0.0f);
    request.set_tensor(name, zeros);
    caches.push_back(name.substr(5));
  }

  // The likeliest token after ids[start …]; the graph is fed with them, and its caches go round.
  const auto feed = [&](std::int64_t start, std::int64_t end) {
    const std::size_t n = end - start;
    ov::Tensor input(ov::element::i64, {n}), positions(ov::element::i64, {n}), wanted(ov::element::i64, {1});
    std::copy(ids.begin() + start, ids.begin() + end, input.data<std::int64_t>());
    std::iota(positions.data<std::int64_t>(), positions.data<std::int64_t>() + n, start);
    *wanted.data<std::int64_t>() = n - 1;
    request.set_tensor("input_ids", input);
    request.set_tensor("positions", positions);
    request.set_tensor("wanted", wanted);
    request.infer();
    for (const auto& name : caches) {
      const auto present = request.get_tensor("present." + name);
      ov::Tensor past(present.get_element_type(), present.get_shape());
      present.copy_to(past);
      request.set_tensor("past." + name, past);
    }
    const auto logits = request.get_tensor("logits");
    const float* first = logits.data<float>();
    return std::max_element(first, first + logits.get_size()) - first;
  };

  std::int64_t next = 0, prompt = ids.size();
  for (std::int64_t start = 0; start < prompt; start += chunk) next = feed(start, std::min(start + chunk, prompt));
  for (std::int64_t i = 0; i < count; i++) {
    ids.push_back(next);
    if (next == end_id) break;
    next = feed(ids.size() - 1, ids.size());
  }
  for (const auto id : ids) std::cout << id << ' ';
  std::cout << '\n';
}
