// The direct call: what a layer or cell does in fastseq/rnn.py and what the operator does, in one go and without the
// dispatcher, for the call in which nobody could tell the difference. A step of a small layer takes less time than
// either of the two.
//
// kernel_obstacle in fastseq/rnn.py decides between kernel and torch. Nothing here decides that again: only a plain
// call (plain_call.h) goes on. Any other is None here, be it wrong, on another device or in another dtype, and goes the
// way through fastseq/rnn.py, which knows all the words for what is wrong.
#include "direct_call.h"

#include <strings.h>

#include <memory>

#include "plain_call.h"
#include "prepacked.h"
#include "probes.h"
#include "rnn.h"
#include "stack.h"

namespace py = pybind11;

namespace fastseq {

namespace {

// ---- A module's attributes ------------------------------------------------------------------------------------------

PyObject* intern(const char* name) {
  PyObject* out = PyUnicode_InternFromString(name);
  if (!out) throw py::error_already_set();
  return out;
}

struct Names {
  PyObject* parameters = intern("_parameters");
  PyObject* weight_names = intern("_flat_weights_names");
  PyObject* mode = intern("mode");
  PyObject* input_size = intern("input_size");
  PyObject* hidden_size = intern("hidden_size");
  PyObject* proj_size = intern("proj_size");
  PyObject* num_layers = intern("num_layers");
  PyObject* bidirectional = intern("bidirectional");
  PyObject* bias = intern("bias");
  PyObject* batch_first = intern("batch_first");
  PyObject* dropout = intern("dropout");
  PyObject* training = intern("training");
  PyObject* prepacked = intern("_prepacked");
  PyObject* weight_ih = intern("weight_ih");
  PyObject* weight_hh = intern("weight_hh");
  PyObject* bias_ih = intern("bias_ih");
  PyObject* bias_hh = intern("bias_hh");
};
const Names* names = nullptr;  // made when the module is imported, and never let go

// A look at a module's __dict__ that finds what is there in the usual form, or sets `odd`: a missing parameter is
// computed from others, a flag that is no bool is left to Python's idea of truth.
struct Attributes {
  PyObject* dict;
  bool odd = false;

  PyObject* get(PyObject* name) {
    PyObject* value = PyDict_GetItemWithError(dict, name);  // borrowed
    if (!value) {
      PyErr_Clear();
      odd = true;
    }
    return value;
  }
  bool flag(PyObject* name) {
    PyObject* value = get(name);
    odd = odd || (value != Py_True && value != Py_False);
    return value == Py_True;
  }
  int64_t integer(PyObject* name) {
    PyObject* value = get(name);
    odd = odd || !PyLong_CheckExact(value);
    if (odd) return 0;
    int overflow = 0;
    const int64_t out = PyLong_AsLongLongAndOverflow(value, &overflow);
    odd = overflow != 0;
    return out;
  }
  Attributes parameters() {
    PyObject* value = get(names->parameters);
    odd = odd || !PyDict_Check(value);
    return {value, odd};
  }
};

// ---- The call -------------------------------------------------------------------------------------------------------

struct Call {
  std::string cell;
  at::Tensor x;
  OptionalTensor hx, cx;
  c10::SmallVector<at::Tensor, 8> weights;
  int64_t layers = 1;
  bool bidirectional = false, bias = true;
  bool recorded = false;
  const Prepacked* prepacked = nullptr;
  py::object holds_prepacked;  // another thread may replace it while this one is in the kernel

  RnnArguments arguments() const {
    static const OptionalTensor none;
    return {cell, x, hx, cx, weights, {}, none, none, layers, bidirectional, bias};
  }
};

// Nothing between a call and the kernels records what happens to its tensors, unless it is to be recorded.
struct Below {
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
  explicit Below(const Call& call) {
    if (!call.recorded) guard.emplace();
  }
};

// `fits` judges the stack against the module's own sizes. False: the call is not plain, as the operator refused it.
template <class Fits>
bool run(const Call& call, const Fits& fits, RnnOutputs& outputs) {
  try {
    const Below below(call);
    const RnnArguments arguments = call.arguments();
    const RnnStack stack(arguments);
    if (!fits(stack)) return false;
    const Unlocked unlocked;
    outputs = call.recorded ? rnn_forward_autograd(call.cell, call.x, call.hx, call.cx, call.weights, {}, {}, {},
                                                   call.layers, call.bidirectional, call.bias, false)
                            : run_forward(arguments, stack, false, call.prepacked);
    return true;
  } catch (const std::exception&) {  // the operator will say it, in the usual way
    return false;
  }
}

constexpr const char* kPrepacked = "fastseq.Prepacked";  // the capsule's name

// The packed weights of a layer that has any. An error if they are no longer the layer's: the one error of a direct
// call, as the way round it would run with the weights as they are.
void take_prepacked(PyObject* dict, PyObject* weight_names, Call& call) {
  PyObject* capsule = PyDict_GetItemWithError(dict, names->prepacked);  // borrowed
  if (!capsule) return PyErr_Clear();
  call.prepacked = static_cast<const Prepacked*>(PyCapsule_GetPointer(capsule, kPrepacked));
  if (!call.prepacked) throw python_error();
  call.holds_prepacked = py::reinterpret_borrow<py::object>(capsule);
  const auto change = call.prepacked->change(call.arguments());
  if (!change) return;
  const std::string which =
      change->weight < 0 ? "" : py::str(PyList_GET_ITEM(weight_names, change->weight)).cast<std::string>() + " ";
  TORCH_CHECK(false, which, change->what, " since prepack(): call prepack() again, or unprepack() to have the weights ",
              "packed at every call");
}

// hx as a module takes it: None, h, or where there are two a tuple of h and c; each with as many dimensions as the
// input.
bool take_state(PyObject* hx, bool two, int64_t dim, PlainTensors& plain, Call& call) {
  if (hx == Py_None) return true;
  if (two && !(PyTuple_CheckExact(hx) && PyTuple_GET_SIZE(hx) == 2)) return false;
  const at::Tensor* h = plain(two ? PyTuple_GET_ITEM(hx, 0) : hx);
  const at::Tensor* c = two ? plain(PyTuple_GET_ITEM(hx, 1)) : h;
  if (!h || !c || h->dim() != dim || c->dim() != dim) return false;
  call.hx = *h;
  if (two) call.cx = *c;
  return true;
}

void add_dimension(Call& call, int64_t of_x, int64_t of_state) {
  call.x = call.x.unsqueeze(of_x);
  if (call.hx) call.hx = call.hx->unsqueeze(of_state);
  if (call.cx) call.cx = call.cx->unsqueeze(of_state);
}

void drop_dimension(const Call& call, at::Tensor& t, int64_t dim) {
  if (call.recorded) {
    t = t.squeeze(dim);
  } else {  // fresh, contiguous and nobody else's: no view of it is needed
    at::DimVector sizes(t.sizes());
    sizes.erase(sizes.begin() + dim);
    t.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  }
}

const CellFacts* find_cell(PyObject* name) {
  static const std::vector<CellFacts> known = cells();
  const char* text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : nullptr;
  if (!text) PyErr_Clear();
  for (const CellFacts& facts : known)
    if (text && strcasecmp(text, facts.name) == 0) return &facts;
  return nullptr;
}

py::object pair(py::object a, py::object b) {
  PyObject* object = PyTuple_New(2);
  if (!object) throw python_error();
  PyTuple_SET_ITEM(object, 0, a.release().ptr());
  PyTuple_SET_ITEM(object, 1, b.release().ptr());
  return py::reinterpret_steal<py::object>(object);
}

// A new reference to None where the call is not plain.
PyObject* call_layer(PyObject* dict, PyObject* input, PyObject* hx) {
  PlainTensors plain;
  const at::Tensor* x = plain(input);
  if (!x || !plain_thread()) Py_RETURN_NONE;
  const int64_t dim = x->dim();
  if (dim != 2 && dim != 3) Py_RETURN_NONE;

  Attributes self{dict};
  PyObject* mode = self.get(names->mode);
  PyObject* weight_names = self.get(names->weight_names);
  Attributes parameters = self.parameters();
  const int64_t input_size = self.integer(names->input_size), hidden_size = self.integer(names->hidden_size);
  const int64_t proj_size = self.integer(names->proj_size);
  Call call;
  call.layers = self.integer(names->num_layers);
  call.bidirectional = self.flag(names->bidirectional);
  call.bias = self.flag(names->bias);
  const bool batch_first = self.flag(names->batch_first);
  if (self.flag(names->training)) {
    PyObject* dropout = self.get(names->dropout);
    self.odd = self.odd || !PyFloat_CheckExact(dropout) || PyFloat_AS_DOUBLE(dropout) != 0;
  }
  if (self.odd || !PyList_CheckExact(weight_names)) Py_RETURN_NONE;
  if (x->size(dim - 1) != input_size || x->size(dim == 3 && batch_first ? 1 : 0) == 0) Py_RETURN_NONE;
  const CellFacts* cell = find_cell(mode);
  if (!cell) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(weight_names); ++i) {
    const at::Tensor* weight = plain(parameters.get(PyList_GET_ITEM(weight_names, i)));
    if (!weight) Py_RETURN_NONE;
    call.weights.push_back(*weight);
  }
  call.x = *x;
  if (!take_state(hx, cell->cell_state, dim, plain, call)) Py_RETURN_NONE;

  call.cell = cell->name;
  call.recorded = plain.recorded();
  {
    const Below below(call);
    if (dim == 2) {
      add_dimension(call, 1, 1);
    } else if (batch_first) {
      call.x = call.x.transpose(0, 1);
    }
  }
  if (!call.recorded) take_prepacked(dict, weight_names, call);
  RnnOutputs outputs;
  const auto fits = [&](const RnnStack& stack) {
    return stack.input_size == input_size && stack.hidden_size == hidden_size &&
           stack.out_size == (proj_size ? proj_size : hidden_size);
  };
  if (!run(call, fits, outputs)) Py_RETURN_NONE;
  auto& [output, h_n, c_n, reserve] = outputs;
  if (dim == 2) {
    drop_dimension(call, output, 1);
    drop_dimension(call, h_n, 1);
    if (cell->cell_state) drop_dimension(call, c_n, 1);
  } else if (batch_first && call.recorded) {
    output = output.transpose(0, 1);
  } else if (batch_first) {
    const int64_t sizes[] = {output.size(1), output.size(0), output.size(2)};
    const int64_t strides[] = {output.stride(1), output.stride(0), output.stride(2)};
    output.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  }
  ++direct_call_count;
  py::object state = wrap(h_n);
  if (cell->cell_state) state = pair(std::move(state), wrap(c_n));
  return pair(wrap(output), std::move(state)).release().ptr();
}

PyObject* call_cell(PyObject* cell_name, PyObject* dict, PyObject* input, PyObject* hx) {
  PlainTensors plain;
  const at::Tensor* x = plain(input);
  if (!x || !plain_thread()) Py_RETURN_NONE;
  const int64_t dim = x->dim();
  if (dim != 1 && dim != 2) Py_RETURN_NONE;

  Attributes self{dict};
  Attributes parameters = self.parameters();
  const int64_t input_size = self.integer(names->input_size), hidden_size = self.integer(names->hidden_size);
  const CellFacts* cell = find_cell(cell_name);
  if (self.odd || !cell) Py_RETURN_NONE;
  Call call;
  call.bias = parameters.get(names->bias_ih) != Py_None;
  for (PyObject* name : {names->weight_ih, names->weight_hh, names->bias_ih, names->bias_hh}) {
    const at::Tensor* weight = plain(parameters.get(name));
    if (!weight) Py_RETURN_NONE;
    call.weights.push_back(*weight);
    if (call.weights.size() == 2 && !call.bias) break;
  }
  call.x = *x;
  if (parameters.odd || !take_state(hx, cell->cell_state, dim, plain, call)) Py_RETURN_NONE;

  call.cell = cell->name;
  call.recorded = plain.recorded();
  if (dim == 1) {
    const Below below(call);
    add_dimension(call, 0, 0);
  }
  RnnOutputs outputs;
  const auto fits = [&](const RnnStack& stack) {
    return stack.input_size == input_size && stack.hidden_size == hidden_size && !stack.projected;
  };
  if (!run(call, fits, outputs)) Py_RETURN_NONE;
  auto& [h, h_n, c, reserve] = outputs;
  if (dim == 1) {
    drop_dimension(call, h, 0);
    if (cell->cell_state) drop_dimension(call, c, 0);
  }
  ++direct_call_count;
  return (cell->cell_state ? pair(wrap(h), wrap(c)) : wrap(h)).release().ptr();
}

PyObject* direct_layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && PyDict_Check(args[0]), "direct_layer takes a layer's __dict__, input and hx");
  return call_layer(args[0], args[1], args[2]);
  END_HANDLE_TH_ERRORS
}

PyObject* prepack(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5 && PyList_Check(args[1]), "prepack takes a cell's name, weights, num_layers, ",
                   "bidirectional and bias");
  Call call;
  call.cell = py::handle(args[0]).cast<std::string>();
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[1]); ++i) {
    TORCH_CHECK_TYPE(THPVariable_Check(PyList_GET_ITEM(args[1], i)), "prepack takes a list of tensors");
    call.weights.push_back(THPVariable_Unpack(PyList_GET_ITEM(args[1], i)));
  }
  call.layers = py::handle(args[2]).cast<int64_t>();
  call.bidirectional = py::handle(args[3]).cast<bool>();
  call.bias = py::handle(args[4]).cast<bool>();
  TORCH_CHECK_TYPE(!call.weights.empty() && call.weights[0].dim() == 2, "prepack takes the weights of a layer");
  const at::NoGradGuard no_grad;
  call.x = at::empty({0, 0, call.weights[0].size(1)}, call.weights[0].options());
  auto packed = std::make_unique<Prepacked>(call.arguments());
  PyObject* capsule = PyCapsule_New(packed.get(), kPrepacked, [](PyObject* self) {
    delete static_cast<Prepacked*>(PyCapsule_GetPointer(self, kPrepacked));
  });
  if (capsule) packed.release();
  return capsule;
  END_HANDLE_TH_ERRORS
}

PyObject* direct_cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4 && PyDict_Check(args[1]), "direct_cell takes a name, a cell's __dict__, input and hx");
  return call_cell(args[0], args[1], args[2], args[3]);
  END_HANDLE_TH_ERRORS
}

// Functions of the interpreter's own kind: pybind11's way to one of its functions takes as long as all checks here.
PyMethodDef functions[] = {
    {"direct_layer", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(direct_layer)), METH_FASTCALL,
     "The result of a layer's call, from its __dict__, input and hx; None if the call is not plain."},
    {"direct_cell", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(direct_cell)), METH_FASTCALL,
     "The result of a cell's call, from its name, __dict__, input and hx; None if the call is not plain."},
    {"direct_attention", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(direct_attention)), METH_FASTCALL,
     "out of query, key, value, attn_mask, scale, is_causal and enable_gqa; None if the call is not plain."},
    {"prepack", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(prepack)), METH_FASTCALL,
     "The packed weights of a layer, for its __dict__ to hold as _prepacked."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_calls(PyObject* module) {
  if (!names) names = new Names;
  if (PyModule_AddFunctions(module, functions) != 0) throw py::error_already_set();
}

int64_t direct_calls() { return direct_call_count; }
void reset_direct_calls() { direct_call_count = 0; }

}  // namespace fastseq
