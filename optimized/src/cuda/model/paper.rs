//! A step on paper: on any machine every launch of the engine is bound to its kernel's signature, and the
//! buffers are as large as the shapes there say.

use std::collections::BTreeMap;

use golden::{
    Config,
    config::{Mixer, Mlp, Preset},
    split::{Share, Split},
};
use kernels::{Build, Kind, Parameter, Size};

use super::{
    pass::{Layers, Pass, Pending},
    scratch::{LOGITS, Room, Scratch},
    seen::Looked,
    states::{Cache, LayerState, Linear, Sizes},
    told::Told,
    weights::{Layer, MixerWeights, MlpWeights, Swiglu},
};
use crate::cuda::{
    device::{Buffer, Error},
    engine::{Element, Fast, Matrix, Ops, Stored},
    launch::{Arg, Call, Launches, argument, bind, entry},
};

/// Where the address of a buffer has its number.
const NUMBER: u32 = 40;

/// Takes launches, and looks at them.
#[derive(Default)]
struct Paper {
    /// Bytes of every buffer.
    buffers: Vec<usize>,
    /// Sizes that no argument tells.
    known: BTreeMap<&'static str, usize>,
    seen: BTreeMap<&'static str, usize>,
    /// Who gathers.
    ranks: usize,
}

impl Paper {
    fn room(&mut self, len: usize) -> Buffer {
        self.buffers.push(len.max(1));
        Buffer::on_paper((self.buffers.len() as u64) << NUMBER, len.max(1))
    }

    fn matrices(&mut self, count: usize, [rows, columns]: [usize; 2], stored: Stored) -> Matrix {
        let elements = count * rows * columns;
        let weights = self.room(elements * stored.size());
        let block = if stored == Stored::Fp8 { [128, 128] } else { [1, 1] };
        let blocks = count * rows.div_ceil(block[0]) * columns.div_ceil(block[1]);
        let scales = (stored == Stored::Fp8).then(|| self.room(4 * blocks));
        Matrix { weights, scales, stored, rows, columns, block }
    }

    fn swiglu(&mut self, count: usize, [d, f]: [usize; 2], stored: Stored) -> Swiglu {
        [[f, d], [f, d], [d, f]].map(|shape| self.matrices(count, shape, stored))
    }

    fn layer(&mut self, share: &Share, mixer: Mixer, mlp: Mlp, stored: Stored) -> Layer {
        let c = &share.config;
        let (d, h, value) = (c.hidden_size, c.head_dim, c.linear_value_dim());
        let whole = if stored == Stored::Fp8 { Stored::Bf16 } else { stored };
        let (hv, conv) = (c.linear_num_value_heads, c.conv_dim());
        let mixer = match mixer {
            Mixer::Linear => MixerWeights::Linear {
                qkvz: self.matrices(1, [conv + value, d], stored),
                ba: self.matrices(1, [2 * hv, d], whole),
                conv: self.room(4 * conv * c.linear_conv_kernel_dim),
                a_log: self.room(4 * hv),
                dt_bias: self.room(4 * hv),
                norm: self.room(4 * c.linear_value_head_dim),
                out: self.matrices(1, [d, value], stored),
            },
            Mixer::Full => {
                let (q, kv) = (c.num_attention_heads * h, c.num_key_value_heads * h);
                let all = self.matrices(1, [2 * q + 2 * kv, d], stored);
                let whole = [2 * q, kv].iter().all(|n| n.is_multiple_of(all.block[0]));
                let [own, keys, values] =
                    [(0, 2 * q), (2 * q, kv), (2 * q + kv, kv)].map(|(first, rows)| {
                        if whole {
                            all.rows_of(first, rows)
                        } else {
                            self.matrices(1, [rows, d], stored)
                        }
                    });
                MixerWeights::Full {
                    q: own,
                    k: keys,
                    v: values,
                    together: whole.then_some(all),
                    o: self.matrices(1, [d, q], stored),
                    q_norm: self.room(4 * h),
                    k_norm: self.room(4 * h),
                }
            }
        };
        let mlp = match mlp {
            Mlp::Dense => MlpWeights::Dense(self.swiglu(1, [d, c.intermediate_size], stored)),
            Mlp::Sparse => {
                let (all, f) = (c.num_experts, c.moe_intermediate_size);
                let deciding = self.matrices(1, [all + 1, d], whole);
                let (router, shared_gate) = (deciding.rows_of(0, all), deciding.rows_of(all, 1));
                let count = share.experts.len();
                let mut together = None;
                let (experts, shared);
                if f == c.shared_expert_intermediate_size {
                    let all = self.swiglu(count + 1, [d, f], stored);
                    experts = all.each_ref().map(|all| all.some(0, count, count + 1));
                    shared = all.each_ref().map(|all| all.some(count, 1, count + 1));
                    together = Some(all);
                } else {
                    experts = self.swiglu(count, [d, f], stored);
                    shared = self.swiglu(1, [d, c.shared_expert_intermediate_size], stored);
                }
                let deciding = Some(deciding);
                MlpWeights::Sparse { router, experts, shared, shared_gate, deciding, together }
            }
        };
        Layer { input_norm: self.room(4 * d), mixer, post_norm: self.room(4 * d), mlp }
    }

    fn states(
        &mut self,
        c: &Config,
        (element, kept): (Element, Stored),
        (s, capacity): (usize, usize),
    ) -> Vec<LayerState> {
        let sizes = Sizes::of(c, element, kept);
        let state = |mixer: &Mixer| match mixer {
            Mixer::Linear => LayerState::Linear(Linear {
                conv: self.room(s * sizes.conv),
                recurrent: self.room(s * sizes.recurrent),
            }),
            Mixer::Full => {
                let all = s * capacity * sizes.row;
                LayerState::Full(Cache { k: self.room(all), v: self.room(all), kept, capacity })
            }
        };
        c.layer_types.iter().map(state).collect()
    }

    /// Bytes behind an address, of which a parameter may have so many.
    fn behind(&self, address: u64) -> usize {
        let (number, offset) = (address >> NUMBER, address & ((1 << NUMBER) - 1));
        self.buffers[number as usize - 1] - offset as usize
    }

    /// Bytes that a parameter's shape says, if it does.
    fn needs(&self, parameter: &Parameter, call: &Call<'_>) -> Option<usize> {
        let (Kind::Input(element) | Kind::Output(element)) = &parameter.kind else { return None };
        let number = |letter: &str| {
            let told = call.args.iter().find(|(name, _)| *name == letter);
            match told {
                Some((_, Arg::Int(n))) => Some(*n),
                _ => self.known.get(letter).copied(),
            }
        };
        let size = |size: &Size| match size {
            Size::Plus(letter, more) => number(letter)?.checked_add_signed(*more as isize),
            Size::Over(letter, by) => Some(number(letter)? / *by as usize),
            Size::Is(n) => Some(*n as usize),
            Size::Some => None,
        };
        if parameter.shape.is_empty() {
            return None;
        }
        let elements = parameter.shape.iter().map(size).product::<Option<usize>>()?;
        Some(elements * bytes(element, call.build)?)
    }
}

/// Bytes of an element.
fn bytes(element: &str, build: Build) -> Option<usize> {
    match element {
        "E" => bytes(build.activations, build),
        "W" => bytes(build.weights?, build),
        "f32" | "float" | "int" | "unsigned" => Some(4),
        "bf16" | "f16" => Some(2),
        "long long" => Some(8),
        "unsigned char" | "Fp8" => Some(1),
        _ => None,
    }
}

impl Launches for Paper {
    fn launch(&mut self, call: &Call<'_>) -> Result<(), Error> {
        let entry = entry(call.source, call.entry)?;
        bind(&entry, call.args).map_err(Error::Compile)?;
        // What a GPU of this kind has of threads, blocks and shared memory.
        assert!((1..=1024).contains(&call.threads), "{}: {} threads", call.entry, call.threads);
        assert!(call.shared <= 232_448, "{}: {} bytes", call.entry, call.shared);
        assert!(call.grid[1..].iter().all(|&n| n <= 65_535), "{}: {:?}", call.entry, call.grid);
        for parameter in &entry.parameters {
            let Some(Arg::At(address)) = argument(parameter, call.args) else { continue };
            let (name, needs) = (&parameter.name, self.needs(parameter, call));
            if address == 0 {
                continue;
            }
            assert!(address.is_multiple_of(2), "{}: {name} at an odd address", call.entry);
            let (needs, has) = (needs.unwrap_or(0), self.behind(address));
            assert!(needs <= has, "{}: {name} has {has} bytes, needs {needs}", call.entry);
            *self.seen.entry(call.entry).or_default() += usize::from(0 < needs);
        }
        Ok(())
    }

    fn gather(&mut self, from: &Buffer, to: &Buffer, bytes: usize) -> Result<(), Error> {
        let [has, room] = [from, to].map(|buffer| self.behind(buffer.address()));
        let all = self.ranks * bytes;
        assert!(bytes <= has && all <= room, "{bytes} of {has} gathered in {room}, not {all}");
        *self.seen.entry("gather").or_default() += 1;
        Ok(())
    }
}

/// Every launch of a step of so many tokens of each sequence.
fn walk(
    c: &Config,
    kinds: (Element, Stored, Stored),
    fast: Option<Fast>,
    lengths: &[usize],
) -> Paper {
    walk_share(&Share::whole(c), kinds, fast, lengths)
}

/// Those of one rank.
fn walk_share(
    share: &Share,
    (element, stored, kept): (Element, Stored, Stored),
    fast: Option<Fast>,
    lengths: &[usize],
) -> Paper {
    let c = &share.config;
    let mut paper = Paper { ranks: share.ranks, ..Paper::default() };
    let (n, s) = (lengths.iter().sum::<usize>(), lengths.len());
    let kinds = c.layer_types.iter().zip(&c.mlp_types);
    let all: Vec<Layer> =
        kinds.map(|(&mixer, &mlp)| paper.layer(share, mixer, mlp, stored)).collect();
    let whole = if stored == Stored::Fp8 { Stored::Bf16 } else { stored };
    let shape = [c.vocab_size, c.hidden_size];
    let of_head = [share.vocabulary.len(), c.hidden_size];
    let (embedding, head) = (paper.matrices(1, shape, whole), paper.matrices(1, of_head, whole));
    let (final_norm, inv_freq) =
        (paper.room(4 * shape[1]), paper.room(4 * c.rope.inv_freq().len()));
    let capacity = lengths.iter().max().unwrap_or(&0) + 3;
    let states = paper.states(c, (element, kept), (s, capacity));
    let room = Room { c, element, fast, ranks: share.ranks, n, sequences: s };
    let mut scratch = Scratch::make(&mut |name| Ok(paper.room(room.bytes(name)))).unwrap();
    paper.known = [("N", n), ("S", s)].into_iter().collect();
    let one_each = lengths.iter().all(|&length| length == 1);
    let told = Told { address: scratch.told.address(), n, s, one_each };
    let mut ops = Ops { stream: &mut paper, element, fast };
    let rows = n.min(LOGITS);
    ops.gather(&scratch.last, &scratch.normed, told.asked(), (rows, shape[1] * element.size()))
        .unwrap();
    ops.wide(&scratch.logits, &scratch.last, &head, rows).unwrap();
    ops.greedy(&scratch.chosen, &scratch.logits, (rows, head.rows)).unwrap();
    let mut pass = Pass {
        ops,
        device: None,
        config: c,
        share,
        scratch: &mut scratch,
        inv_freq: &inv_freq,
        told,
        pending: Pending::Wide,
    };
    let layers = Layers { embedding: &embedding, all: &all, final_norm: &final_norm };
    pass.walk(&layers, &states, None, &mut Looked::nothing()).unwrap();
    paper
}

#[test]
fn every_launch_is_as_its_kernel_says() {
    let official = Preset::Official.config(Some(4), None).unwrap();
    let [tiny, ragged] =
        [Preset::Tiny, Preset::Ragged].map(|preset| preset.config(None, None).unwrap());
    let wide = (Element::F32, Stored::F32, Stored::F32);
    let halves = (Element::Bf16, Stored::Bf16, Stored::Bf16);
    let codes = (Element::Bf16, Stored::Fp8, Stored::Fp8);
    for (config, all) in [
        (&tiny, &[wide, halves, (Element::F32, Stored::F16, Stored::Fp8)][..]),
        (&ragged, &[wide, halves, (Element::F32, Stored::Fp8, Stored::F32)]),
        (&official, &[halves, codes, (Element::F32, Stored::Fp8, Stored::Fp8)]),
    ] {
        for &kinds in all {
            for lengths in [&[1][..], &[1, 1, 1], &[2], &[5, 0, 1], &[9], &[40], &[2048], &[700, 3]]
            {
                let paper = walk(config, kinds, None, lengths);
                let seen = |entry| paper.seen.get(entry).copied().unwrap_or(0);
                for entry in ["engine_embedding", "engine_norm", "engine_delta_in", "engine_route"]
                {
                    assert!(0 < seen(entry), "{entry}: {:?}", paper.seen);
                }
                assert_eq!(0 < seen("engine_conv_state"), lengths.iter().any(|&n| n != 1));
                let codes = kinds.2 == Stored::Fp8;
                for (entry, of_codes) in [("attention_naive", false), ("attention_naive_fp8", true)]
                {
                    assert_eq!(0 < seen(entry), codes == of_codes, "{entry}");
                }
            }
        }
    }
}

#[test]
fn kernels_for_hopper_are_as_they_say() {
    let official = Preset::Official.config(Some(4), None).unwrap();
    assert_eq!(Fast::unfit(&official, Element::Bf16, "sm_90a"), None);
    let tiny = Preset::Tiny.config(None, None).unwrap();
    assert!(Fast::unfit(&tiny, Element::Bf16, "sm_90a").is_some_and(|why| why.contains("heads")));
    assert!(Fast::unfit(&official, Element::F32, "sm_90a").is_some_and(|why| why.contains("bf16")));
    assert!(
        Fast::unfit(&official, Element::Bf16, "sm_80").is_some_and(|why| why.contains("sm_80"))
    );
    let fast = Some(Fast { multiprocessors: 132 });
    let kinds = [Stored::Bf16, Stored::Fp8];
    for (stored, kept) in kinds.into_iter().flat_map(|stored| kinds.map(|kept| (stored, kept))) {
        for lengths in [
            &[1][..],
            &[1, 1, 1],
            &[2],
            &[5, 0, 1],
            &[9],
            &[40],
            &[60, 4],
            &[65],
            &[1; 64],
            &[1; 65],
            &[2048],
            &[700, 3],
            &[70, 0, 3, 1],
        ] {
            let paper = walk(&official, (Element::Bf16, stored, kept), fast, lengths);
            let seen = |entry| paper.seen.get(entry).copied().unwrap_or(0);
            let (n, one_each) =
                (lengths.iter().sum::<usize>(), lengths.iter().all(|&length| length == 1));
            let codes = kept == Stored::Fp8;
            assert_eq!(0 < seen("attention_decode_1"), one_each && !codes);
            assert_eq!(0 < seen("attention_decode_fp8_1"), one_each && codes);
            assert_eq!(0 < seen("attention_prefill"), !one_each && !codes);
            assert_eq!(0 < seen("attention_prefill_fp8"), !one_each && codes);
            let one = seen("gated_delta_rule_few") + seen("engine_delta_step");
            assert_eq!(0 < one, one_each);
            let crowded = 2 < lengths.len();
            assert_eq!(0 < seen("gated_delta_rule_chunk_walk"), !one_each && !crowded);
            assert_eq!(0 < seen("gated_delta_rule_fused"), !one_each && crowded);
            assert_eq!(0 < seen("linear_gemm"), 32 < n);
            assert_eq!(0 < seen("moe_experts_gemm_down"), 64 < n);
            assert_eq!(0 < seen("moe_experts_gemv_down"), n <= 64);
            assert_eq!(seen("engine_experts_up"), 0);
        }
    }
}

/// A sum for every mixer and every MLP, at official sizes on as many GPUs as divide them, and at small ones.
#[test]
fn every_rank_launches_as_kernels_say() {
    let official = Preset::Official.config(Some(4), None).unwrap();
    let ragged = Preset::Ragged.config(None, None).unwrap();
    let fast = Some(Fast { multiprocessors: 132 });
    for (config, kinds, fast) in [
        (&official, (Element::Bf16, Stored::Fp8, Stored::Bf16), fast),
        (&official, (Element::Bf16, Stored::Bf16, Stored::Bf16), fast),
        (&official, (Element::F32, Stored::Fp8, Stored::F32), None),
        (&ragged, (Element::Bf16, Stored::Bf16, Stored::Bf16), None),
    ] {
        for gpus in [1, 2, 4, 8].into_iter().filter(|gpus| Split::new(config, *gpus).is_ok()) {
            let shares = Split::new(config, gpus).unwrap().shares();
            for share in [&shares[0], &shares[gpus - 1]] {
                for lengths in [&[1][..], &[1, 1, 1], &[5, 0, 1], &[40], &[700, 3]] {
                    let paper = walk_share(share, kinds, fast, lengths);
                    let seen = |entry| paper.seen.get(entry).copied().unwrap_or(0);
                    let layers = config.num_hidden_layers();
                    let sums = if gpus == 1 { 0 } else { 2 * layers };
                    assert_eq!(seen("gather"), sums, "{gpus}: {:?}", paper.seen);
                    assert_eq!(0 < seen("engine_sum"), 1 < gpus);
                    assert_eq!(0 < seen("engine_share"), 1 < gpus);
                    if fast.is_none() {
                        continue;
                    }
                    // Four queries to a head of keys are by plain kernels.
                    let one_each = lengths.iter().all(|&length| length == 1);
                    let hopper = seen("attention_decode_1") + seen("attention_prefill");
                    assert_eq!((0 < hopper, 0 < seen("attention_naive")), (gpus <= 2, 2 < gpus));
                    assert_eq!(0 < seen("engine_delta_step"), one_each);
                    assert_eq!(seen("engine_experts_up"), 0);
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "needs")]
fn a_buffer_that_is_too_small_is_seen() {
    let mut paper = Paper::default();
    let (o, x) = (paper.room(8 * 64 * 4), paper.room(8 * 64 * 2));
    let weight = paper.matrices(1, [64, 64], Stored::F32);
    let mut ops = Ops { stream: &mut paper, element: Element::F32, fast: None };
    ops.linear(&o, &x, &weight, 8).unwrap();
}
