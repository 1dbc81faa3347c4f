//! Faults of the delta rule, each of which a public implementation has had.

use golden::Plant;

/// In the kernel that goes token by token.
pub(crate) const RECURRENT: &[Plant] = &[
    DECAY_DROPPED_AT_ONE_CHUNK,
    DECAY_DROPPED_AT_EACH_CHUNK,
    STATE_RESET_AT_ONE_CHUNK,
    GATE_OFF_BY_ONE,
    NO_DELTA_RULE,
    BETA_ON_VALUE_ONLY,
    BETA_ON_PREDICTION_ONLY,
    STALE_LAST_TOKEN,
    HEADS_SWAPPED_AT_ONE_TOKEN,
    HEADS_INTERLEAVED,
    EPS_ONE,
    EPS_TEN_TIMES,
    EPS_ON_MEAN,
    EPS_OUTSIDE_ROOT,
    MAX_OF_NORM_AND_EPS,
    NOT_NORMED,
    QUERY_NOT_SCALED,
    SCALED,
    STATE_IN_BF16,
    STATE_IN_STORAGE_TYPE,
    G_IN_BF16,
    BETA_IN_BF16,
    INITIAL_STATE_IGNORED,
    FINAL_STATE_OFF_BY_ONE,
    STATE_TRANSPOSED,
    BOUNDARIES_IGNORED,
    DECAY_AFTER_WRITE,
    PREDICTION_BEFORE_DECAY,
    ANSWER_BEFORE_WRITE,
];

/// In the chunked kernel.
pub(super) const CHUNKED: &[Plant] = &[
    DECAY_DROPPED_AT_ONE_CHUNK,
    DECAY_DROPPED_AT_EACH_CHUNK,
    STATE_RESET_AT_ONE_CHUNK,
    GATE_OFF_BY_ONE,
    NO_DELTA_RULE,
    BETA_ON_VALUE_ONLY,
    STALE_LAST_TOKEN,
    HEADS_SWAPPED_AT_ONE_TOKEN,
    HEADS_INTERLEAVED,
    EPS_ONE,
    EPS_TEN_TIMES,
    EPS_ON_MEAN,
    EPS_OUTSIDE_ROOT,
    MAX_OF_NORM_AND_EPS,
    NOT_NORMED,
    QUERY_NOT_SCALED,
    SCALED,
    STATE_IN_BF16,
    STATE_IN_STORAGE_TYPE,
    G_IN_BF16,
    BETA_IN_BF16,
    INITIAL_STATE_IGNORED,
    STATE_TRANSPOSED,
    BOUNDARIES_IGNORED,
    LAST_GATE_OF_PADDING,
    LAST_GATE_OF_ANOTHER_ROW,
    KEYS_UNDECAYED,
    KEYS_DECAYED_ONCE_MORE,
    MASKED_AFTER_EXPONENTIAL,
    SCORES_WITHOUT_DIAGONAL,
    W_WITHOUT_DECAY,
    INVERSE_OF_FIRST_ORDER,
    INVERSE_BLOCKS_NOT_MERGED,
    INVERSE_IN_F16,
    W_U_IN_BF16,
    PARTIAL_CHUNK_NOT_WRITTEN,
];

/// In the chunked kernel that rounds to bf16: undeclared roundings to bf16 are lost among the declared
/// ones.
pub(super) const CHUNKED_BF16: &[Plant] = &[
    DECAY_DROPPED_AT_ONE_CHUNK,
    DECAY_DROPPED_AT_EACH_CHUNK,
    STATE_RESET_AT_ONE_CHUNK,
    GATE_OFF_BY_ONE,
    NO_DELTA_RULE,
    BETA_ON_VALUE_ONLY,
    STALE_LAST_TOKEN,
    HEADS_SWAPPED_AT_ONE_TOKEN,
    HEADS_INTERLEAVED,
    EPS_ONE,
    EPS_TEN_TIMES,
    EPS_ON_MEAN,
    EPS_OUTSIDE_ROOT,
    MAX_OF_NORM_AND_EPS,
    NOT_NORMED,
    QUERY_NOT_SCALED,
    SCALED,
    INITIAL_STATE_IGNORED,
    STATE_TRANSPOSED,
    BOUNDARIES_IGNORED,
    LAST_GATE_OF_PADDING,
    LAST_GATE_OF_ANOTHER_ROW,
    KEYS_UNDECAYED,
    KEYS_DECAYED_ONCE_MORE,
    MASKED_AFTER_EXPONENTIAL,
    SCORES_WITHOUT_DIAGONAL,
    W_WITHOUT_DECAY,
    INVERSE_OF_FIRST_ORDER,
    INVERSE_BLOCKS_NOT_MERGED,
    PARTIAL_CHUNK_NOT_WRITTEN,
];

/// Those that the fast kernels can be told to have.
#[cfg(target_arch = "x86_64")]
pub(super) const VECTOR: &[Plant] = &[INITIAL_STATE_IGNORED, STATE_RESET_AT_ONE_CHUNK];

const DECAY_DROPPED_AT_ONE_CHUNK: Plant = Plant {
    name: "decay-dropped-at-one-chunk",
    what: "the decay is left out where the second chunk begins",
    cite: "https://github.com/ggml-org/llama.cpp/issues/19324",
};
const DECAY_DROPPED_AT_EACH_CHUNK: Plant = Plant {
    name: "decay-dropped-at-each-chunk",
    what: "the decay is left out where a chunk begins",
    cite: "https://github.com/ggml-org/llama.cpp/issues/17578",
};
pub(super) const STATE_RESET_AT_ONE_CHUNK: Plant = Plant {
    name: "state-reset-at-one-chunk",
    what: "the state is lost where the second chunk begins",
    cite: "https://github.com/syv-ai/qwen38-27b-rtx3090/issues/43",
};
const GATE_OFF_BY_ONE: Plant = Plant {
    name: "gate-off-by-one",
    what: "each token decays by the gate of the one before it",
    cite: "https://github.com/ggml-org/llama.cpp/issues/19324",
};
const NO_DELTA_RULE: Plant = Plant {
    name: "no-delta-rule",
    what: "the whole value is written, whatever the state says of the key already",
    cite: "https://github.com/flashinfer-ai/flashinfer-bench/pull/178",
};
const BETA_ON_VALUE_ONLY: Plant = Plant {
    name: "beta-on-value-only",
    what: "the write strength multiplies the value, but not what is taken off it",
    cite: "https://github.com/sgl-project/sglang/issues/40362",
};
const BETA_ON_PREDICTION_ONLY: Plant = Plant {
    name: "beta-on-prediction-only",
    what: "the value is used before the write strength multiplies it",
    cite: "https://github.com/sgl-project/sglang/issues/36014",
};
const STALE_LAST_TOKEN: Plant = Plant {
    name: "stale-last-token",
    what: "the last token gets the output of the one before it",
    cite: "https://github.com/ml-explore/mlx-lm/issues/846",
};
const HEADS_SWAPPED_AT_ONE_TOKEN: Plant = Plant {
    name: "heads-swapped-at-one-token",
    what: "the first two heads change places at one token",
    cite: "https://github.com/huggingface/transformers/issues/40963",
};
const HEADS_INTERLEAVED: Plant = Plant {
    name: "heads-interleaved",
    what: "value head h reads key head h mod HK in place of h / (HV / HK)",
    cite: "https://github.com/huggingface/transformers/issues/41036",
};
const EPS_ONE: Plant = Plant {
    name: "eps-one",
    what: "the norm of queries and keys adds 1 to the sum of squares",
    cite: "https://github.com/1bit-MONSTER/1bit-MONSTER/issues/2134",
};
const EPS_TEN_TIMES: Plant = Plant {
    name: "eps-ten-times",
    what: "the norm of queries and keys adds 1e-5 in place of 1e-6: only short keys see it",
    cite: "https://github.com/ggml-org/llama.cpp/issues/28068",
};
const EPS_ON_MEAN: Plant = Plant {
    name: "eps-on-mean",
    what: "the norm of queries and keys is an RMS norm: eps counts as often as there are channels",
    cite: "https://github.com/ml-explore/mlx-lm/issues/1624",
};
const EPS_OUTSIDE_ROOT: Plant = Plant {
    name: "eps-outside-root",
    what: "eps is added after the square root",
    cite: "https://github.com/vllm-project/vllm/issues/25365",
};
const MAX_OF_NORM_AND_EPS: Plant = Plant {
    name: "max-of-norm-and-eps",
    what: "norms are kept from falling below eps, as torch's F.normalize does",
    cite: "https://github.com/huggingface/transformers/issues/40842",
};
const NOT_NORMED: Plant = Plant {
    name: "not-normed",
    what: "queries and keys are taken as they come",
    cite: "https://github.com/flashinfer-ai/flashinfer/issues/5255",
};
const QUERY_NOT_SCALED: Plant = Plant {
    name: "query-not-scaled",
    what: "queries lack their 1 / sqrt(K)",
    cite: "https://github.com/ggml-org/llama.cpp/pull/16095",
};
const SCALED: Plant = Plant {
    name: "scaled",
    what: "outputs are 1.004 times what they should be: no single element shows it in bf16",
    cite: "https://github.com/fla-org/flash-linear-attention/issues/640",
};
const STATE_IN_BF16: Plant = Plant {
    name: "state-in-bf16",
    what: "the state is rounded to bf16 whenever it is kept",
    cite: "https://github.com/sgl-project/sglang/issues/10258",
};
const STATE_IN_STORAGE_TYPE: Plant = Plant {
    name: "state-in-storage-type",
    what: "the last state is returned in the storage type of the activations",
    cite: "https://github.com/ml-explore/mlx-swift-lm/issues/224",
};
const G_IN_BF16: Plant = Plant {
    name: "g-in-bf16",
    what: "log decays are rounded to bf16",
    cite: "https://github.com/ml-explore/mlx-lm/issues/997",
};
const BETA_IN_BF16: Plant = Plant {
    name: "beta-in-bf16",
    what: "write strengths are rounded to bf16",
    cite: "https://github.com/sgl-project/sglang/issues/38975",
};
pub(super) const INITIAL_STATE_IGNORED: Plant = Plant {
    name: "initial-state-ignored",
    what: "every call starts from a zero state",
    cite: "https://github.com/huggingface/transformers/issues/45513",
};
const FINAL_STATE_OFF_BY_ONE: Plant = Plant {
    name: "final-state-off-by-one",
    what: "the state that is returned lacks the last token",
    cite: "https://github.com/vllm-project/vllm/issues/40738",
};
const STATE_TRANSPOSED: Plant = Plant {
    name: "state-transposed",
    what: "the state before the first token is read as [V, K]",
    cite: "https://github.com/huggingface/transformers/issues/40963",
};
const BOUNDARIES_IGNORED: Plant = Plant {
    name: "boundaries-ignored",
    what: "packed sequences are taken for one",
    cite: "https://github.com/huggingface/transformers/issues/46859",
};
const DECAY_AFTER_WRITE: Plant = Plant {
    name: "decay-after-write",
    what: "the state decays after a token is written, not before",
    cite: "https://github.com/ggml-org/llama.cpp/pull/16095",
};
const PREDICTION_BEFORE_DECAY: Plant = Plant {
    name: "prediction-before-decay",
    what: "the key asks the state before it decays",
    cite: "https://github.com/ggml-org/llama.cpp/pull/16095",
};
const ANSWER_BEFORE_WRITE: Plant = Plant {
    name: "answer-before-write",
    what: "the query asks the state before the token is written",
    cite: "https://github.com/ggml-org/llama.cpp/pull/16095",
};
const LAST_GATE_OF_PADDING: Plant = Plant {
    name: "last-gate-of-padding",
    what: "a last chunk that is not full decays by the gate of a padded row, which was never summed",
    cite: "https://github.com/gittensor-ai-lab/sparkinfer/issues/604",
};
const LAST_GATE_OF_ANOTHER_ROW: Plant = Plant {
    name: "last-gate-of-another-row",
    what: "the gates of a chunk end at its middle for the state",
    cite: "https://github.com/flashinfer-ai/flashinfer/issues/4311",
};
const KEYS_UNDECAYED: Plant = Plant {
    name: "keys-undecayed",
    what: "keys are written to the state without the decay that follows them",
    cite: "https://github.com/ggml-org/llama.cpp/issues/19324",
};
const KEYS_DECAYED_ONCE_MORE: Plant = Plant {
    name: "keys-decayed-once-more",
    what: "keys are written to the state with their own decay too",
    cite: "https://github.com/ollama/ollama/issues/14075",
};
const MASKED_AFTER_EXPONENTIAL: Plant = Plant {
    name: "masked-after-exponential",
    what: "exp(G_i - G_j) is taken above the diagonal too and masked afterwards",
    cite: "https://github.com/ggml-org/llama.cpp/issues/17578",
};
const SCORES_WITHOUT_DIAGONAL: Plant = Plant {
    name: "scores-without-diagonal",
    what: "a token does not see itself",
    cite: "https://github.com/ggml-org/llama.cpp/issues/19324",
};
const W_WITHOUT_DECAY: Plant = Plant {
    name: "w-without-decay",
    what: "W lacks exp(G)",
    cite: "https://github.com/ggml-org/llama.cpp/issues/23606",
};
const INVERSE_OF_FIRST_ORDER: Plant = Plant {
    name: "inverse-of-first-order",
    what: "I - A is taken for (I + A)^-1",
    cite: "https://github.com/sgl-project/sglang/issues/33515",
};
const INVERSE_BLOCKS_NOT_MERGED: Plant = Plant {
    name: "inverse-blocks-not-merged",
    what: "the inverse is right in its diagonal blocks of 16, and their merge is left out",
    cite: "https://github.com/sgl-project/sglang/issues/33515",
};
const INVERSE_IN_F16: Plant = Plant {
    name: "inverse-in-f16",
    what: "the inverse is rounded to f16, and the plan does not say so",
    cite: "https://github.com/vllm-project/vllm/issues/52568",
};
const W_U_IN_BF16: Plant = Plant {
    name: "w-u-in-bf16",
    what: "W and U are rounded to bf16, and the plan does not say so",
    cite: "https://github.com/fla-org/flash-linear-attention/issues/640",
};
const PARTIAL_CHUNK_NOT_WRITTEN: Plant = Plant {
    name: "partial-chunk-not-written",
    what: "tokens after the last full chunk do not reach the state",
    cite: "https://github.com/vllm-project/vllm/issues/53051",
};
