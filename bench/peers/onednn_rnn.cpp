// Bare oneDNN as a peer of the benchmark: its recurrent primitives with weights packed beforehand, as its fastest user
// would call them. fastseq/bench/peers/onednn.py builds it, drives it over a pipe and compares its results with ours.
//
// Commands, one a line on standard input, each answered by a line:
//   prepare CELL MODE DTYPE T B I H L D FOLDER   ->  ok IMPLEMENTATION
//       CELL rnn|gru|lstm, MODE inference|training, DTYPE float32|bfloat16. Reads FOLDER/numbers: float32, for each
//       layer W_ih (D,G,H,I), W_hh (D,G,H,H) and the bias (D,Gb,H) in oneDNN's order of gates, then x (T,B,I) and, for
//       training, d_output (T,B,D*H). Runs once and writes FOLDER/results: output and, for training, d_x and each
//       layer's dW_ih, dW_hh and d_bias, in the same layouts.
//   burst N              ->  ok SECONDS          N calls of what was prepared
//   gemm DTYPE M N K C   ->  ok SECONDS          C products (M,K) x (K,N), the second matrix packed
// Anything that fails is answered by "error" and what oneDNN said.
#include <chrono>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "dnnl.hpp"

using namespace dnnl;
using Desc = memory::desc;
using Tag = memory::format_tag;
using Type = memory::data_type;
using Dims = memory::dims;
using Arguments = std::unordered_map<int, memory>;

namespace {

const Desc kNone;  // a state that is not given, or not wanted

struct Sizes {
  std::string cell, mode, dtype;
  int64_t T, B, I, H, L, D;
  bool training() const { return mode == "training"; }
  int64_t gates() const { return cell == "rnn" ? 1 : cell == "gru" ? 3 : 4; }
  int64_t biases() const { return cell == "gru" ? 4 : gates(); }  // lbr_gru keeps b_hh of the new gate apart
  Type type() const { return dtype == "bfloat16" ? Type::bf16 : Type::f32; }
};

class Engine {
 public:
  engine cpu{engine::kind::cpu, 0};
  stream queue{cpu};

  memory make(const Desc& desc) {
    memory out(desc, cpu);
    if (desc.get_size()) std::memset(out.get_data_handle(), 0, desc.get_size());
    return out;
  }
  void copy(memory& from, memory& to) {
    reorder(from, to).execute(queue, from, to);
    queue.wait();
  }
  memory converted(memory& from, const Desc& desc) {
    memory out = make(desc);
    copy(from, out);
    return out;
  }
};

// One layer: the primitives of its passes and all of their memory.
class Layer {
 public:
  Layer(Engine& engine, const Sizes& s, int64_t input, memory source) : engine_(engine), s_(s), source_(source) {
    const Dims w_ih{1, s.D, input, s.gates(), s.H}, w_hh{1, s.D, s.H, s.gates(), s.H}, bias{1, s.D, s.biases(), s.H};
    weights_ = engine.make({w_ih, Type::f32, Tag::ldgoi});
    recurrent_ = engine.make({w_hh, Type::f32, Tag::ldgoi});
    bias_ = engine.make({bias, Type::f32, Tag::ldgo});
    output_ = engine.make({{s.T, s.B, s.D * s.H}, s.type(), Tag::tnc});
    any_ih_ = {w_ih, s.type(), Tag::any};
    any_hh_ = {w_hh, s.type(), Tag::any};
  }

  std::vector<memory*> parameters() { return {&weights_, &recurrent_, &bias_}; }
  memory output() { return output_; }

  // To be called when the parameters are in: packs them and makes the forward primitive.
  std::string prepare_forward() {
    const prop_kind kind = s_.training() ? prop_kind::forward_training : prop_kind::forward_inference;
    const Desc x = source_.get_desc(), b = bias_.get_desc(), y = output_.get_desc(), h = state_desc();
    if (s_.cell == "rnn") {
      vanilla_ = {engine_.cpu, kind, algorithm::eltwise_tanh, direction(), x, h, any_ih_, any_hh_, b, y, kNone};
      return finish_forward(vanilla_, vanilla_rnn_forward(vanilla_));
    }
    if (s_.cell == "gru") {
      gru_ = {engine_.cpu, kind, direction(), x, h, any_ih_, any_hh_, b, y, kNone};
      return finish_forward(gru_, lbr_gru_forward(gru_));
    }
    lstm_ = {engine_.cpu, kind, direction(), x, h, h, any_ih_, any_hh_, b, y, kNone, kNone};
    return finish_forward(lstm_, lstm_forward(lstm_));
  }

  // d_output: the gradient of output(). Returns that of the source.
  memory prepare_backward(memory d_output) {
    const prop_kind kind = prop_kind::backward;
    const Desc x = source_.get_desc(), b = bias_.get_desc(), y = output_.get_desc(), h = state_desc();
    const Desc dy = d_output.get_desc();
    if (s_.cell == "rnn") {
      const vanilla_rnn_backward::primitive_desc pd(
          engine_.cpu, kind, algorithm::eltwise_tanh, direction(), x, h, any_ih_, any_hh_, b, y, kNone, x, h, any_ih_,
          any_hh_, b, dy, kNone, vanilla_);
      return finish_backward(pd, vanilla_rnn_backward(pd), d_output);
    }
    if (s_.cell == "gru") {
      const lbr_gru_backward::primitive_desc pd(engine_.cpu, kind, direction(), x, h, any_ih_, any_hh_, b, y, kNone, x,
                                                h, any_ih_, any_hh_, b, dy, kNone, gru_);
      return finish_backward(pd, lbr_gru_backward(pd), d_output);
    }
    const lstm_backward::primitive_desc pd(engine_.cpu, kind, direction(), x, h, h, any_ih_, any_hh_, b, y, kNone,
                                           kNone, x, h, h, any_ih_, any_hh_, b, dy, kNone, kNone, lstm_);
    return finish_backward(pd, lstm_backward(pd), d_output);
  }

  void forward() { forward_.execute(engine_.queue, forward_arguments_); }
  void backward() { backward_.execute(engine_.queue, backward_arguments_); }

  // Of the parameters, in their layouts.
  std::vector<memory> gradients() {
    return {engine_.converted(d_weights_, weights_.get_desc()), engine_.converted(d_recurrent_, recurrent_.get_desc()),
            d_bias_};
  }

 private:
  rnn_direction direction() const {
    return s_.D == 2 ? rnn_direction::bidirectional_concat : rnn_direction::unidirectional_left2right;
  }

  // In training the initial state is given, zeros: without one, oneDNN 3.2 takes something else for it in the dW_hh of
  // RNN and LSTM with one direction.
  Desc state_desc() const { return s_.training() ? Desc({1, s_.D, s_.B, s_.H}, Type::f32, Tag::ldnc) : kNone; }

  // The argument of that name, of LSTM's c too.
  void set_state(Arguments& arguments, int h, int c) {
    arguments[h] = engine_.make(state_desc());
    if (s_.cell == "lstm") arguments[c] = engine_.make(state_desc());
  }

  template <class PrimitiveDesc>
  std::string finish_forward(const PrimitiveDesc& pd, const primitive& forward) {
    forward_ = forward;
    forward_arguments_ = {
        {DNNL_ARG_SRC_LAYER, source_},
        {DNNL_ARG_WEIGHTS_LAYER, engine_.converted(weights_, pd.weights_layer_desc())},
        {DNNL_ARG_WEIGHTS_ITER, engine_.converted(recurrent_, pd.weights_iter_desc())},
        {DNNL_ARG_BIAS, bias_},
        {DNNL_ARG_DST_LAYER, output_},
    };
    if (s_.training()) {
      workspace_ = engine_.make(pd.workspace_desc());
      forward_arguments_[DNNL_ARG_WORKSPACE] = workspace_;
      set_state(forward_arguments_, DNNL_ARG_SRC_ITER, DNNL_ARG_SRC_ITER_C);
    }
    return pd.impl_info_str();
  }

  template <class PrimitiveDesc>
  memory finish_backward(const PrimitiveDesc& pd, const primitive& backward, memory d_output) {
    backward_ = backward;
    memory d_source = engine_.make(source_.get_desc());
    d_weights_ = engine_.make(pd.diff_weights_layer_desc());
    d_recurrent_ = engine_.make(pd.diff_weights_iter_desc());
    d_bias_ = engine_.make(bias_.get_desc());
    backward_arguments_ = {
        {DNNL_ARG_SRC_LAYER, source_},
        {DNNL_ARG_WEIGHTS_LAYER, engine_.converted(weights_, pd.weights_layer_desc())},
        {DNNL_ARG_WEIGHTS_ITER, engine_.converted(recurrent_, pd.weights_iter_desc())},
        {DNNL_ARG_BIAS, bias_},
        {DNNL_ARG_DST_LAYER, output_},
        {DNNL_ARG_WORKSPACE, workspace_},
        {DNNL_ARG_DIFF_DST_LAYER, d_output},
        {DNNL_ARG_DIFF_SRC_LAYER, d_source},
        {DNNL_ARG_DIFF_WEIGHTS_LAYER, d_weights_},
        {DNNL_ARG_DIFF_WEIGHTS_ITER, d_recurrent_},
        {DNNL_ARG_DIFF_BIAS, d_bias_},
    };
    set_state(backward_arguments_, DNNL_ARG_SRC_ITER, DNNL_ARG_SRC_ITER_C);
    set_state(backward_arguments_, DNNL_ARG_DIFF_SRC_ITER, DNNL_ARG_DIFF_SRC_ITER_C);
    return d_source;
  }

  Engine& engine_;
  Sizes s_;
  memory source_, weights_, recurrent_, bias_, output_, workspace_, d_weights_, d_recurrent_, d_bias_;
  Desc any_ih_, any_hh_;
  vanilla_rnn_forward::primitive_desc vanilla_;
  lbr_gru_forward::primitive_desc gru_;
  lstm_forward::primitive_desc lstm_;
  primitive forward_, backward_;
  Arguments forward_arguments_, backward_arguments_;
};

void read(std::istream& file, memory& to) {
  file.read(static_cast<char*>(to.get_data_handle()), static_cast<std::streamsize>(to.get_desc().get_size()));
  if (!file) throw std::runtime_error("the file of numbers is too short");
}

void write(std::ostream& file, const memory& from) {
  file.write(
      static_cast<const char*>(from.get_data_handle()), static_cast<std::streamsize>(from.get_desc().get_size()));
}

class Stack {
 public:
  Stack(Engine& engine, const Sizes& s, const std::string& folder) : engine_(engine) {
    const Desc plain_x({s.T, s.B, s.I}, Type::f32, Tag::tnc), plain_y({s.T, s.B, s.D * s.H}, Type::f32, Tag::tnc);
    memory source = engine.make({{s.T, s.B, s.I}, s.type(), Tag::tnc});
    std::ifstream numbers(folder + "/numbers", std::ios::binary);
    memory below = source;
    for (int64_t layer = 0; layer < s.L; ++layer) {
      layers_.push_back(std::make_unique<Layer>(engine, s, layer ? s.D * s.H : s.I, below));
      for (memory* parameter : layers_.back()->parameters()) read(numbers, *parameter);
      implementation = layers_.back()->prepare_forward();
      below = layers_.back()->output();
    }
    memory x = engine.make(plain_x);
    read(numbers, x);
    engine.copy(x, source);
    memory d_source;
    if (s.training()) {
      d_source = engine.make(plain_y);
      read(numbers, d_source);
      for (int64_t layer = s.L; layer-- > 0;) d_source = layers_[layer]->prepare_backward(d_source);
      training_ = true;
    }
    call();

    std::ofstream results(folder + "/results", std::ios::binary);
    write(results, engine.converted(below, plain_y));
    if (!training_) return;
    write(results, d_source);
    for (const auto& layer : layers_)
      for (const memory& gradient : layer->gradients()) write(results, gradient);
  }

  void call() {
    for (const auto& layer : layers_) layer->forward();
    if (training_)
      for (size_t i = layers_.size(); i-- > 0;) layers_[i]->backward();
    engine_.queue.wait();
  }

  std::string implementation;

 private:
  Engine& engine_;
  std::vector<std::unique_ptr<Layer>> layers_;
  bool training_ = false;
};

double seconds(int64_t calls, const std::function<void()>& call) {
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < calls; ++i) call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double gemm_seconds(Engine& engine, Type type, int64_t M, int64_t N, int64_t K, int64_t calls) {
  const matmul::primitive_desc pd(
      engine.cpu, Desc({M, K}, type, Tag::ab), Desc({K, N}, type, Tag::any), Desc({M, N}, Type::f32, Tag::ab));
  const matmul product(pd);
  const Arguments arguments = {{DNNL_ARG_SRC, engine.make(pd.src_desc())},
                               {DNNL_ARG_WEIGHTS, engine.make(pd.weights_desc())},
                               {DNNL_ARG_DST, engine.make(pd.dst_desc())}};
  const auto call = [&] {
    product.execute(engine.queue, arguments);
    engine.queue.wait();
  };
  call();
  return seconds(calls, call);
}

}  // namespace

int main() {
  Engine engine;
  std::unique_ptr<Stack> stack;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string command;
    words >> command;
    try {
      if (command == "prepare") {
        Sizes s;
        std::string folder;
        words >> s.cell >> s.mode >> s.dtype >> s.T >> s.B >> s.I >> s.H >> s.L >> s.D >> std::ws;
        std::getline(words, folder);
        stack.reset();
        stack = std::make_unique<Stack>(engine, s, folder);
        std::cout << "ok " << stack->implementation << std::endl;
      } else if (command == "burst") {
        int64_t calls = 0;
        words >> calls;
        if (!stack) throw std::runtime_error("nothing was prepared");
        std::cout << "ok " << seconds(calls, [&] { stack->call(); }) << std::endl;
      } else if (command == "gemm") {
        std::string dtype;
        int64_t M, N, K, calls;
        words >> dtype >> M >> N >> K >> calls;
        const Type type = dtype == "bfloat16" ? Type::bf16 : Type::f32;
        std::cout << "ok " << gemm_seconds(engine, type, M, N, K, calls) << std::endl;
      } else {
        throw std::runtime_error("unknown command " + command);
      }
    } catch (const std::exception& e) {
      std::cout << "error " << e.what() << std::endl;
    }
  }
}
