// Layers of a stack. One after another, each by all threads; or, where its steps give the threads too little to share,
// several at a time, each by a thread of its own, some steps behind the layer it reads: a wave through layers and
// steps.
#pragma once

constexpr int kLayersAtOnce = 8;
constexpr int64_t kWaveRows = 12;         // of some steps: how far a layer is behind
constexpr int64_t kWavePieces = 16;       // at least, of all steps: until the last layer begins, threads are idle
constexpr int64_t kWorkToWave = 1 << 18;  // multiplications of a layer

// Of so many layers of a stack, of which this is the first to be computed, how many go at a time: where neither rows
// nor units are shared by more threads than a wave has layers, and both weights of a layer stay in a core's own cache.
template <class Cell, class T>
int rnn_layers_at_once(const RnnLayer<T>& p, int layers, bool backward) {
  if (layers < 2 || p.threads < 2 || p.directions > 1 || !ForwardDirection<Cell, T>::packs(p)) return 1;
  const int64_t B = p.schedule.batch, weights = Cell::gates * p.hidden_size * p.out_size();
  const Work work = backward ? BackwardDirection<Cell, T>::work(p) : ForwardDirection<Cell, T>::work(p);
  const Plan plan = make_plan(p.threads, 1, B, work);
  const bool alike = p.input_size <= 2 * p.out_size();  // the layers take about the same time
  if (plan.row_groups > 1 || plan.members > layers || !alike || 2 * weights > kWeightsToStream) return 1;
  if (p.schedule.total_rows() * weights < kWorkToWave) return 1;
  return layers < kLayersAtOnce ? layers : kLayersAtOnce;
}

inline int64_t wave_steps(const Schedule& schedule) {
  const int64_t most = (schedule.steps + kWavePieces - 1) / kWavePieces, steps = kWaveRows / schedule.batch;
  return steps < 1 ? 1 : steps < most ? steps : most;
}

// How far the layers of a wave are.
class Wave {
 public:
  void done(int layer, int64_t steps) { __atomic_store_n(&places_[layer].steps, steps, __ATOMIC_RELEASE); }
  void wait(int layer, int64_t steps) const {
    wait_until([&] { return __atomic_load_n(&places_[layer].steps, __ATOMIC_ACQUIRE) >= steps; });
  }

 private:
  struct alignas(64) Place {
    int64_t steps = 0;
  };
  Place places_[kLayersAtOnce];
};

// Calls run(i, begin, end) for pieces of [0, steps) of each layer, for layer i after layer i - 1. Of fewer threads than
// layers each has several, one after another.
template <class Run>
void run_wave(int threads, int layers, int64_t steps, int64_t piece, const Run& run) {
  Wave wave;
  const auto member = [&](int first, int team) {
    for (int i = first; i < layers; i += team)
      for (int64_t begin = 0; begin < steps; begin += piece) {
        const int64_t end = steps - begin < piece ? steps : begin + piece;
        if (i > 0) wave.wait(i - 1, end);
        run(i, begin, end);
        wave.done(i, end);
      }
  };
  const int team = threads < layers ? threads : layers;
  parallel(team, member, layers % team != 0);
}

template <class Cell, class T>
void rnn_forward(const RnnForward<T>* layers, int count) {
  if (count == 1) return layer_forward<Cell>(*layers);
  const Schedule& schedule = layers->schedule;
  const int64_t piece = wave_steps(schedule);
  ForwardDirection<Cell, T> all[kLayersAtOnce];
  for (int i = 0; i < count; ++i) {
    all[i].prepare(layers[i], 0);
    all[i].plan_wave(piece);
  }
  run_wave(layers->threads, count, schedule.steps, piece, [&](int i, int64_t begin, int64_t end) {
    if (begin == 0)
      for (int64_t j = 0; j < all[i].panels(); ++j) all[i].pack(j);
    all[i].run_apart(begin, end, {0, schedule.batch});
  });
  for (int i = 0; i < count; ++i) all[i].finish();
}

template <class Cell, class T>
void rnn_backward(const RnnBackward<T>* layers, int count) {
  if (count == 1) return layer_backward<Cell>(*layers);
  const Schedule& schedule = layers->schedule;
  const int64_t piece = wave_steps(schedule), chunk = backward_chunk<Cell>(*layers), T_ = schedule.steps;
  const int last = count - 1;
  BackwardDirection<Cell, T> all[kLayersAtOnce];
  for (int i = 0; i < count; ++i) {
    all[i].prepare(layers[i], 0, chunk);
    if (i < last) all[i].plan_wave(piece);
  }
  Result<T> dx;
  dx.open(layers[last].dx, schedule.total_rows() * layers[last].input_size);
  for (int64_t s1 = T_; s1 > 0; s1 -= chunk) {
    const int64_t s0 = s1 > chunk ? s1 - chunk : 0;
    for (int i = 0; i < count; ++i) all[i].begin_chunk(s0, s1);
    run_wave(layers->threads, count, s1 - s0, piece, [&](int i, int64_t begin, int64_t end) {
      if (begin == 0 && s1 == T_)
        for (int64_t j = 0; j < all[i].panels(); ++j) all[i].pack(j);
      Barrier alone;
      all[i].run(s1 - end, s1 - begin, {0, schedule.batch}, {0, 1}, alone);
      if (i < last) all[i].input_gradient(s1 - end, s1 - begin);
    });
    for (int i = 0; i < count; ++i) all[i].gradients(s1 == T_, i == last ? dx.get() : nullptr, false, true);
  }
  dx.close(layers->threads);
  for (int i = 0; i < count; ++i) {
    all[i].finish_weights();
    all[i].finish_states();
  }
}
