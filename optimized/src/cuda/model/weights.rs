//! The weights of the model on the device, by layer.
//!
//! Matrices stay as the checkpoint has them, experts of a layer one after another; FP8 codes with their
//! scales in f32. What a source makes up is made on the device.

use std::{ops::Range, sync::Arc};

use golden::{
    Dtype, Error, Weights,
    config::{Mixer, Mlp},
    fp8, names,
    weights::RawTensor,
};
use zerocopy::IntoBytes;

use super::{Format, seen};
use crate::cuda::{
    device::{Buffer, Device},
    engine::{Element, Made, Matrix, Ops, Stored},
};

/// The weights of a decoder layer.
pub(super) struct Layer {
    pub(super) input_norm: Buffer,
    pub(super) mixer: MixerWeights,
    pub(super) post_norm: Buffer,
    pub(super) mlp: MlpWeights,
}

#[expect(clippy::large_enum_variant, reason = "there is one per layer")]
pub(super) enum MixerWeights {
    Linear {
        qkvz: Matrix,
        ba: Matrix,
        /// `[C, W]`.
        conv: Buffer,
        a_log: Buffer,
        dt_bias: Buffer,
        norm: Buffer,
        out: Matrix,
    },
    Full {
        q: Matrix,
        k: Matrix,
        v: Matrix,
        o: Matrix,
        q_norm: Buffer,
        k_norm: Buffer,
        /// The first three, one behind another, where they are alike but for their rows: then those are parts
        /// of it.
        together: Option<Matrix>,
    },
}

/// Gate, up and down projections.
pub(super) type Swiglu = [Matrix; 3];

const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

#[expect(clippy::large_enum_variant, reason = "there is one per layer")]
pub(super) enum MlpWeights {
    Dense(Swiglu),
    Sparse {
        router: Matrix,
        experts: Swiglu,
        shared: Swiglu,
        shared_gate: Matrix,
        /// Router and gate, one behind the other, where they are alike: then those are parts of it.
        deciding: Option<Matrix>,
        /// The experts and behind them the shared one, where they are alike: then those are parts of it.
        together: Option<Swiglu>,
    },
}

pub(super) struct Mtp {
    pub(super) norm_embedding: Buffer,
    pub(super) norm_hidden: Buffer,
    pub(super) fc: Matrix,
    pub(super) layer: Layer,
    pub(super) norm: Buffer,
}

impl Layer {
    /// Its projections, those of all experts at once.
    pub(super) fn projections(&self) -> Vec<&Matrix> {
        let mut all = match &self.mixer {
            MixerWeights::Linear { qkvz, out, .. } => vec![qkvz, out],
            MixerWeights::Full { q, k, v, o, .. } => vec![q, k, v, o],
        };
        match &self.mlp {
            MlpWeights::Dense(dense) => all.extend(dense),
            MlpWeights::Sparse { router, experts, shared, .. } => {
                all.push(router);
                all.extend(experts.iter().chain(shared));
            }
        }
        all
    }

    /// Bytes of every matrix that a token reads, with `active` experts of all, and how many weights they
    /// have; of several GPUs one's, in the mean.
    pub(super) fn read(&self, active: usize) -> [u64; 2] {
        let mut all = [0, 0];
        let mut add = |matrix: &Matrix, times: usize, of: usize| {
            all[0] += (matrix.bytes() / of * times) as u64;
            all[1] += (matrix.elements() / of * times) as u64;
        };
        match &self.mixer {
            MixerWeights::Linear { qkvz, ba, out, .. } => {
                [qkvz, ba, out].into_iter().for_each(|matrix| add(matrix, 1, 1));
            }
            MixerWeights::Full { q, k, v, o, .. } => {
                [q, k, v, o].into_iter().for_each(|matrix| add(matrix, 1, 1));
            }
        }
        match &self.mlp {
            MlpWeights::Dense(all) => all.iter().for_each(|matrix| add(matrix, 1, 1)),
            MlpWeights::Sparse { router, experts, shared, shared_gate, .. } => {
                [router, shared_gate].into_iter().for_each(|matrix| add(matrix, 1, 1));
                shared.iter().for_each(|matrix| add(matrix, 1, 1));
                experts.iter().for_each(|matrix| add(matrix, active, router.rows));
            }
        }
        all
    }
}

/// What a matrix is kept as.
///
/// # Errors
/// If it is of no float type.
pub(super) fn kept(weights: &dyn Weights, format: Format, name: &str) -> Result<Stored, Error> {
    let meta = weights.meta(name).ok_or_else(|| format!("{name}: missing"))?;
    let narrowed = format == Format::Bf16 && names::is_projection(name);
    Ok(match meta.dtype {
        Dtype::F32 | Dtype::F16 if narrowed => Stored::Bf16,
        Dtype::Bf16 => Stored::Bf16,
        Dtype::F16 => Stored::F16,
        Dtype::Fp8 if block(weights).iter().all(|n| n.is_power_of_two()) => Stored::Fp8,
        // FP8 in blocks of other sizes is rare: what they hold is widened.
        Dtype::F32 | Dtype::Fp8 => Stored::F32,
        other => return Err(format!("{name}: {other} where a float type was expected").into()),
    })
}

pub(super) fn block(weights: &dyn Weights) -> [usize; 2] {
    weights.config().fp8.as_ref().map_or([1, 1], |fp8| fp8.weight_block_size)
}

/// Puts weights on the device.
pub(super) struct Loader<'a> {
    pub(super) weights: &'a dyn Weights,
    /// The routed experts that are kept here.
    pub(super) experts: Range<usize>,
    pub(super) format: Format,
    pub(super) device: Arc<Device>,
    pub(super) ops: Ops<'a>,
    /// Told of matrices that are there; says whether to go on.
    pub(super) tell: &'a mut dyn FnMut(u64) -> bool,
}

impl Loader<'_> {
    /// Numbers in f32.
    pub(super) fn numbers(&mut self, numbers: &[f32]) -> Result<Buffer, Error> {
        let device = &self.device;
        let mut buffer = device.room(4 * numbers.len())?;
        device.put_at(numbers.as_bytes(), &mut buffer, 0)?;
        Ok(buffer)
    }

    /// A small tensor, widened.
    pub(super) fn vector(&mut self, name: &str) -> Result<Buffer, Error> {
        let raw = self.weights.fetch(name)?;
        let wide = raw.widen();
        let wide =
            wide.ok_or_else(|| format!("{name}: {} where a float type was expected", raw.dtype))?;
        self.numbers(&wide)
    }

    pub(super) fn matrix(&mut self, name: &str) -> Result<Matrix, Error> {
        self.matrices(&[name.to_owned()])
    }

    /// Matrices of one shape, one after another.
    fn matrices(&mut self, names: &[String]) -> Result<Matrix, Error> {
        let weights = self.weights;
        let first = names.first().ok_or("no matrices")?;
        let mut stored = kept(weights, self.format, first)?;
        let shape = weights.meta(first).ok_or_else(|| format!("{first}: missing"))?.shape;
        let (rows, columns) = (shape[0], shape[1..].iter().product::<usize>());
        for name in names {
            if kept(weights, self.format, name)? != stored {
                stored = Stored::F32;
            }
        }
        let block = if stored == Stored::Fp8 { block(weights) } else { [1, 1] };
        let mut matrix = self.room(names.len(), [rows, columns], stored, block)?;
        for (i, name) in names.iter().enumerate() {
            self.fill(&mut matrix, (name, rows), [i * rows, i * rows.div_ceil(block[0])])?;
        }
        Ok(matrix)
    }

    /// Room for matrices of one shape.
    fn room(
        &self,
        count: usize,
        [rows, columns]: [usize; 2],
        stored: Stored,
        block: [usize; 2],
    ) -> Result<Matrix, Error> {
        let weights = self.device.room(count * rows * columns * stored.size())?;
        let scales = count * rows.div_ceil(block[0]) * columns.div_ceil(block[1]) * 4;
        let scales = (stored == Stored::Fp8).then(|| self.device.room(scales)).transpose()?;
        Ok(Matrix { weights, scales, stored, rows, columns, block })
    }

    /// Matrices that read the same, and one of all their rows where they are alike but for these.
    fn stacked<const N: usize>(
        &mut self,
        names: &[String; N],
    ) -> Result<([Matrix; N], Option<Matrix>), Error> {
        let weights = self.weights;
        let mut kinds = Vec::new();
        for name in names {
            let stored = kept(weights, self.format, name)?;
            let shape = weights.meta(name).ok_or_else(|| format!("{name}: missing"))?.shape;
            kinds.push((stored, shape[0], shape[1..].iter().product::<usize>()));
        }
        let (stored, _, columns) = kinds[0];
        let block = if stored == Stored::Fp8 { block(weights) } else { [1, 1] };
        let alike = |&(own, rows, across): &(Stored, usize, usize)| {
            (own, across) == (stored, columns) && rows.is_multiple_of(block[0])
        };
        let several = |all: Vec<Matrix>| {
            let all: Result<[Matrix; N], _> = all.try_into();
            all.map_err(|_| Error::from("as many matrices as names"))
        };
        if !kinds.iter().all(alike) {
            let all: Vec<_> =
                names.iter().map(|name| self.matrix(name)).collect::<Result<_, _>>()?;
            return Ok((several(all)?, None));
        }
        let rows = kinds.iter().map(|&(_, rows, _)| rows).sum();
        let mut all = self.room(1, [rows, columns], stored, block)?;
        let (mut before, mut parts) = (0, Vec::new());
        for (name, &(_, rows, _)) in names.iter().zip(&kinds) {
            self.fill(&mut all, (name, rows), [before, before / block[0]])?;
            parts.push(all.rows_of(before, rows));
            before += rows;
        }
        Ok((several(parts)?, Some(all)))
    }

    /// The rows of a tensor, behind so many others, and their blocks behind as many.
    fn fill(
        &mut self,
        matrix: &mut Matrix,
        (name, rows): (&str, usize),
        [before, blocks]: [usize; 2],
    ) -> Result<(), Error> {
        let (columns, [down, across]) = (matrix.columns, matrix.block);
        let row = columns.div_ceil(across) * 4;
        let (at, count) = (before * columns * matrix.stored.size(), rows * columns);
        let (scales_at, scales) = (blocks * row, rows.div_ceil(down) * row);
        self.put(matrix, (name, count, at), (scales, scales_at))?;
        if !(self.tell)((count * matrix.stored.size()) as u64) {
            return Err(golden::engine::INTERRUPTED.into());
        }
        Ok(())
    }

    /// So many numbers of a tensor to a byte of a matrix, and bytes of its scales to one of the matrix's.
    fn put(
        &mut self,
        matrix: &mut Matrix,
        (name, count, at): (&str, usize, usize),
        (scales, scales_at): (usize, usize),
    ) -> Result<(), Error> {
        let scales_name = names::scale_of(name);
        let stored = matrix.stored;
        let coded = self.weights.meta(name).is_some_and(|meta| meta.dtype == Dtype::Fp8);
        if let (Some(recipe), true) = (self.weights.recipe(name), coded == (stored == Stored::Fp8))
        {
            for (recipe, first, count) in recipe.runs(count) {
                let o = (&matrix.weights, at + first * stored.size());
                self.ops.synthesise(o, Made::Weights(stored), &recipe, count)?;
            }
            if let Some(buffer) = &matrix.scales {
                let missing = || format!("{scales_name}: missing");
                let recipe = self.weights.recipe(&scales_name).ok_or_else(missing)?;
                for (recipe, first, count) in recipe.runs(scales / 4) {
                    let o = (buffer, scales_at + 4 * first);
                    self.ops.synthesise(o, Made::Scales, &recipe, count)?;
                }
            }
            return Ok(());
        }
        let raw = self.weights.fetch(name)?;
        let as_it_is = match stored {
            Stored::F32 => raw.dtype == Dtype::F32,
            Stored::Bf16 => raw.dtype == Dtype::Bf16,
            Stored::F16 => raw.dtype == Dtype::F16,
            Stored::Fp8 => true,
        };
        let device = self.device.clone();
        if as_it_is {
            device.put_at(&raw.data, &mut matrix.weights, at)?;
        } else {
            let wide = self.widened(name, &raw)?;
            let as_kept = if stored == Stored::Bf16 { Element::Bf16 } else { Element::F32 };
            device.put_at(&seen::stored(&wide, as_kept), &mut matrix.weights, at)?;
        }
        if let Some(buffer) = &mut matrix.scales {
            let raw = self.weights.fetch(&scales_name)?;
            let wide = raw.widen().ok_or_else(|| format!("{scales_name}: {}", raw.dtype))?;
            device.put_at(wide.as_bytes(), buffer, scales_at)?;
        }
        // What was read is let go before the next one.
        device.wait()?;
        Ok(())
    }

    /// The numbers of a matrix.
    fn widened(&self, name: &str, raw: &RawTensor<'_>) -> Result<Vec<f32>, Error> {
        if let Some(wide) = raw.widen() {
            return Ok(wide);
        }
        if raw.dtype != Dtype::Fp8 {
            return Err(format!("{name}: {} where a float type was expected", raw.dtype).into());
        }
        let scales_name = names::scale_of(name);
        let scales = self.weights.fetch(&scales_name)?.widen();
        let scales = scales.ok_or_else(|| format!("{scales_name}: no numbers"))?;
        let [down, across] = block(self.weights);
        let columns = raw.shape[1..].iter().product::<usize>();
        let wide = |(i, &code): (usize, &u8)| {
            let at = i / columns / down * columns.div_ceil(across) + i % columns / across;
            fp8::to_f32(code) * scales[at]
        };
        Ok(raw.data.iter().enumerate().map(wide).collect())
    }

    pub(super) fn layer(&mut self, prefix: &str, mixer: Mixer, mlp: Mlp) -> Result<Layer, Error> {
        let weight = |name: &str| format!("{prefix}.{name}.weight");
        let mixer = match mixer {
            Mixer::Linear => MixerWeights::Linear {
                qkvz: self.matrix(&weight("linear_attn.in_proj_qkvz"))?,
                ba: self.matrix(&weight("linear_attn.in_proj_ba"))?,
                conv: self.vector(&weight("linear_attn.conv1d"))?,
                a_log: self.vector(&format!("{prefix}.linear_attn.A_log"))?,
                dt_bias: self.vector(&format!("{prefix}.linear_attn.dt_bias"))?,
                norm: self.vector(&weight("linear_attn.norm"))?,
                out: self.matrix(&weight("linear_attn.out_proj"))?,
            },
            Mixer::Full => {
                let names = ["q_proj", "k_proj", "v_proj"];
                let ([q, k, v], together) =
                    self.stacked(&names.map(|name| weight(&format!("self_attn.{name}"))))?;
                MixerWeights::Full {
                    q,
                    k,
                    v,
                    together,
                    o: self.matrix(&weight("self_attn.o_proj"))?,
                    q_norm: self.vector(&weight("self_attn.q_norm"))?,
                    k_norm: self.vector(&weight("self_attn.k_norm"))?,
                }
            }
        };
        let mlp = match mlp {
            Mlp::Dense => MlpWeights::Dense(self.swiglu(prefix, &[String::new()])?),
            Mlp::Sparse => self.sparse(prefix)?,
        };
        Ok(Layer {
            input_norm: self.vector(&weight("input_layernorm"))?,
            mixer,
            post_norm: self.vector(&weight("post_attention_layernorm"))?,
            mlp,
        })
    }

    fn sparse(&mut self, prefix: &str) -> Result<MlpWeights, Error> {
        let weight = |name: &str| format!("{prefix}.mlp.{name}.weight");
        let count = self.experts.len();
        let one = format!("experts.{}", self.experts.start);
        let named = |experts: Range<usize>| experts.map(|e| format!("experts.{e}")).collect();
        let of = |of: &str| PROJECTIONS.map(|projection| weight(&format!("{of}.{projection}")));
        let kinds = |names: [String; 3]| {
            let kind = |name: &String| {
                let shape = self.weights.meta(name).map(|meta| meta.shape);
                Ok::<_, Error>((kept(self.weights, self.format, name)?, shape))
            };
            names.iter().map(kind).collect::<Result<Vec<_>, _>>()
        };
        let mut together = None;
        let (experts, shared);
        if kinds(of(&one))? == kinds(of("shared_expert"))? {
            let mut names: Vec<String> = named(self.experts.clone());
            names.push("shared_expert".to_owned());
            let all = self.swiglu(prefix, &names)?;
            experts = all.each_ref().map(|all| all.some(0, count, count + 1));
            shared = all.each_ref().map(|all| all.some(count, 1, count + 1));
            together = Some(all);
        } else {
            let names: Vec<String> = named(self.experts.clone());
            experts = self.swiglu(prefix, &names)?;
            shared = self.swiglu(prefix, &["shared_expert".to_owned()])?;
        }
        let ([router, shared_gate], deciding) =
            self.stacked(&[weight("gate"), weight("shared_expert_gate")])?;
        Ok(MlpWeights::Sparse { router, experts, shared, shared_gate, deciding, together })
    }

    /// The projections of experts of these names.
    fn swiglu(&mut self, prefix: &str, of: &[String]) -> Result<Swiglu, Error> {
        let mut one = |projection: &str| {
            let name = |of: &String| match &**of {
                "" => format!("{prefix}.mlp.{projection}.weight"),
                of => format!("{prefix}.mlp.{of}.{projection}.weight"),
            };
            self.matrices(&of.iter().map(name).collect::<Vec<_>>())
        };
        let [gate, up, down] = PROJECTIONS;
        Ok([one(gate)?, one(up)?, one(down)?])
    }
}

#[cfg(test)]
mod tests {
    use golden::{Weights, names, synthetic::Synthetic};

    use super::{Format, Loader};
    use crate::cuda::{
        device::Buffer,
        engine::Ops,
        gpu,
        launch::{Kernels, Stream},
        model::on,
    };

    /// On a machine without a GPU there is nothing to compare.
    #[test]
    fn what_the_gpu_makes_is_what_the_processor_makes() {
        if gpu().is_err() {
            return;
        }
        for dtype in ["f32", "f16", "bf16", "fp8"] {
            let weights: Synthetic = format!("synthetic:ragged,dtype={dtype}").parse().unwrap();
            let config = weights.config().clone();
            for entry in names::entries(&config, true) {
                if entry.shape.len() != 2 {
                    continue;
                }
                let same = |name: &str, made: &Buffer| {
                    let here = weights.fetch(name).unwrap().data.into_owned();
                    let mut there = vec![0; here.len()];
                    on(|context| Ok(context.device.get(made, &mut there)?)).unwrap();
                    assert_eq!(here, there, "{name} in {dtype}");
                };
                let mut kernels = Kernels::default();
                let matrix = on(|context| {
                    let format = Format::F32;
                    let device = context.device.clone();
                    let stream = &mut Stream { context, kernels: &mut kernels };
                    let ops = Ops { stream, element: format.element(), fast: None };
                    let (weights, tell) = (&weights, &mut |_| true);
                    let experts = 0..config.num_experts;
                    Loader { weights, experts, format, device, ops, tell }.matrix(&entry.name)
                });
                let matrix = matrix.unwrap();
                same(&entry.name, &matrix.weights);
                if let Some(scales) = &matrix.scales {
                    same(&names::scale_of(&entry.name), scales);
                }
            }
        }
    }
}
