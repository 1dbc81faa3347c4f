//! CPU variants of `causal_conv1d`.

use golden::{
    Plan, Plant, Spec, Tensor1, Variant,
    ops::causal_conv1d::{Case, CausalConv1d, Inputs, Outputs},
};
use ndarray::{Ix2, Ix3};
use rayon::prelude::*;

use super::vector::variants;
use super::{
    activation::silu,
    portable::{Kernel, Planted, Portable, pack, packed, unpacked},
    stored::Stored,
};

pub(crate) mod fast;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<CausalConv1d>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<CausalConv1d>] =
    variants!([&Portable::new("cpu/portable", pack!(Loaded), plan, PLANTS)], plan, VECTOR_PLANTS);

/// The window holds raw inputs, as they came.
pub(crate) fn plan(spec: &Spec<Case>) -> Plan {
    Plan { state: Plan::stored(spec.dtype).output, ..Plan::stored(spec.dtype) }
}

/// Those that the fast kernels can be told to have: `taps-flipped`, `state-ignored`, `short-step-state-unwritten`.
#[cfg(target_arch = "x86_64")]
const VECTOR_PLANTS: &[Plant] = &[PLANTS[0], PLANTS[3], PLANTS[6]];

pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "taps-flipped",
        what: "a convolution in place of a cross-correlation: the first tap multiplies the current token",
        cite: "https://github.com/ggml-org/llama.cpp/pull/16095",
    },
    Plant {
        name: "silu-missing",
        what: "the sum is returned without its SiLU",
        cite: "https://github.com/ggml-org/llama.cpp/pull/16095",
    },
    Plant {
        name: "boundaries-ignored",
        what: "the window of a sequence reaches into the tokens of the one packed before it",
        cite: "https://github.com/huggingface/transformers/issues/46093",
    },
    Plant {
        name: "state-ignored",
        what: "every call starts from an empty window",
        cite: "https://github.com/huggingface/transformers/issues/45513",
    },
    Plant {
        name: "state-off-by-one",
        what: "the new window ends one token early",
        cite: "https://github.com/vllm-project/vllm/issues/39273",
    },
    Plant {
        name: "short-step-state-lost",
        what: "after fewer tokens than the window holds the older part of it is zero",
        cite: "https://github.com/syv-ai/qwen38-27b-rtx3090/issues/43",
    },
    Plant {
        name: "short-step-state-unwritten",
        what: "two or three tokens are taken for a draft to verify, and the window stays as it was",
        cite: "https://github.com/vllm-project/vllm/issues/53051",
    },
    Plant {
        name: "state-after-silu",
        what: "the window holds outputs in place of raw inputs",
        cite: "https://github.com/vllm-project/vllm/issues/55766",
    },
    Plant {
        name: "oldest-column-dropped",
        what: "the oldest column of the window reads zero, as if there were one tap less before it",
        cite: "https://github.com/AI-Hypercomputer/maxtext/issues/5295",
    },
    Plant {
        name: "sum-in-storage-type",
        what: "the sum is rounded to the storage type before SiLU, and the plan does not say so",
        cite: "https://github.com/huggingface/transformers/issues/46190",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    x: Vec<E>,
    /// `[W, C]`, so that the inner loop runs over channels.
    taps: Vec<f32>,
    state: Vec<E>,
    cu_seqlens: Vec<i64>,
    o: Vec<E>,
    after: Vec<E>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        Loaded {
            case: spec.case.clone(),
            x: packed(&x.x),
            taps: x.weight.t().iter().copied().collect(),
            state: packed(&x.state),
            cu_seqlens: x.cu_seqlens.to_vec(),
            o: vec![E::NAN; x.x.len()],
            after: vec![E::NAN; x.state.len()],
        }
    }

    /// Of `x`, and of the window.
    fn shapes(&self) -> (Ix2, Ix3) {
        let Case { b, t, c, w } = self.case;
        (Ix2(b * t, c), Ix3(b, c, w - 1))
    }
}

impl<E: Stored> Kernel<CausalConv1d> for Loaded<E> {
    fn poison(&mut self) {
        self.o.fill(E::NAN);
        self.after.fill(E::NAN);
    }

    fn run(&mut self, plant: Planted) {
        let problem = Problem {
            x: &self.x,
            taps: &self.taps,
            state: &self.state,
            cu_seqlens: &self.cu_seqlens,
            c: self.case.c,
            w: self.case.w,
        };
        problem.run(&mut self.o, &mut self.after, plant);
    }

    fn inputs(&self) -> Inputs {
        let Case { c, w, .. } = self.case;
        let (x, state) = self.shapes();
        Inputs {
            x: unpacked(&self.x, x),
            weight: unpacked(&self.taps, Ix2(w, c)).reversed_axes(),
            state: unpacked(&self.state, state),
            cu_seqlens: Tensor1::from_vec(self.cu_seqlens.clone()),
        }
    }

    fn outputs(&self) -> Outputs {
        let (x, state) = self.shapes();
        Outputs { o: unpacked(&self.o, x), state: unpacked(&self.after, state) }
    }
}

/// What the kernel reads.
pub(crate) struct Problem<'a, E> {
    /// `[N, C]`.
    pub(crate) x: &'a [E],
    /// `[W, C]`, oldest first.
    pub(crate) taps: &'a [f32],
    /// `[S, C, W - 1]`.
    pub(crate) state: &'a [E],
    /// `[S + 1]`.
    pub(crate) cu_seqlens: &'a [i64],
    pub(crate) c: usize,
    pub(crate) w: usize,
}

/// Channels whose sums are kept at once.
const BLOCK: usize = 64;

impl<E: Stored> Problem<'_, E> {
    /// One token per task, then one window per task.
    ///
    /// `o`: `[N, C]`; `after`: `[S, C, W - 1]`.
    pub(crate) fn run(&self, o: &mut [E], after: &mut [E], plant: Planted) {
        let c = self.c;
        o.par_chunks_mut(c).enumerate().for_each(|(n, o)| {
            for (block, o) in o.chunks_mut(BLOCK).enumerate() {
                self.token(o, n, block * BLOCK, plant);
            }
        });
        if self.w == 1 {
            return;
        }
        let raw = if plant.is("state-after-silu") { &*o } else { self.x };
        after
            .par_chunks_mut(c * (self.w - 1))
            .enumerate()
            .for_each(|(sequence, after)| self.window(after, raw, sequence, plant));
    }

    /// Channels `start ..` of token `n`.
    fn token(&self, o: &mut [E], n: usize, start: usize, plant: Planted) {
        let Problem { x, taps, state, cu_seqlens, c, w } = *self;
        // The last sequence that begins at or before n: empty ones begin where the next does.
        let sequence = cu_seqlens.partition_point(|&begin| begin as usize <= n) - 1;
        let mut begin = cu_seqlens[sequence] as usize;
        if plant.is("boundaries-ignored") {
            begin = 0;
        }
        let mut sums = [0.0; BLOCK];
        let sums = &mut sums[..o.len()];
        for j in 0..w {
            let tap = if plant.is("taps-flipped") { w - 1 - j } else { j };
            let taps = &taps[tap * c + start..][..o.len()];
            if begin + w - 1 <= n + j {
                let row = &x[(n + j + 1 - w) * c + start..][..o.len()];
                for ((sum, x), tap) in sums.iter_mut().zip(row).zip(taps) {
                    *sum += tap * x.load();
                }
            } else if !plant.is("state-ignored") {
                let column = n - begin + j;
                if column == 0 && plant.is("oldest-column-dropped") {
                    continue;
                }
                let columns = state[(sequence * c + start) * (w - 1)..].chunks_exact(w - 1);
                for ((sum, columns), tap) in sums.iter_mut().zip(columns).zip(taps) {
                    *sum += tap * columns[column].load();
                }
            }
        }
        let act = if plant.is("silu-missing") { |x| x } else { silu };
        let rounded = plant.is("sum-in-storage-type");
        for (o, &mut sum) in o.iter_mut().zip(sums) {
            *o = E::store(act(if rounded { E::store(sum).load() } else { sum }));
        }
    }

    /// The last `W - 1` of old window and tokens.
    fn window(&self, after: &mut [E], raw: &[E], sequence: usize, plant: Planted) {
        let Problem { state, cu_seqlens, c, w, .. } = *self;
        let (begin, end) = (cu_seqlens[sequence] as usize, cu_seqlens[sequence + 1] as usize);
        let tokens = end - begin;
        let before = &state[sequence * c * (w - 1)..][..c * (w - 1)];
        if plant.is("short-step-state-unwritten") && (2..=3).contains(&tokens) {
            after.copy_from_slice(before);
            return;
        }
        let lost = plant.is("short-step-state-lost") && 0 < tokens;
        let early = usize::from(plant.is("state-off-by-one") && 0 < tokens);
        let windows = after.chunks_exact_mut(w - 1).zip(before.chunks_exact(w - 1));
        for (channel, (after, before)) in windows.enumerate() {
            for (column, after) in after.iter_mut().enumerate() {
                // Counted from the oldest column of the old window.
                let at = tokens + column - early;
                *after = match at.checked_sub(w - 1) {
                    Some(token) => raw[(begin + token) * c + channel],
                    None if lost => E::store(0.0),
                    None => before[at],
                };
            }
        }
    }
}
