//! What the engine needs of the GPU's memory, from names and shapes alone.

use golden::{
    Error, Weights,
    config::Mixer,
    engine::{Demand, Memory},
    names::{self, Role},
    split::{Cut, Share},
    weights::{Meta, Part},
};

use super::{
    Format, Unfit, fast, keeping, piece,
    scratch::Room,
    split,
    states::{Sizes, capacity},
    weights::{block, kept},
};
use crate::{
    Kept,
    cuda::{
        device::{self, Device},
        engine::Stored,
    },
};

/// What an engine of these weights in that format, keys and values kept so, needs of each of so many GPUs to be asked
/// this: nothing is read.
///
/// # Errors
/// If there is no such format, it keeps keys and values in no such thing, the model does not divide, or a weight is
/// missing.
pub fn memory(
    weights: &dyn Weights,
    format: &str,
    kept: Option<Kept>,
    gpus: usize,
    demand: &Demand,
) -> Result<Memory, Error> {
    let (format, kept) = keeping(format, kept)?;
    // All shares need the same.
    let shares = split(weights.config(), gpus)?.shares();
    let share = shares.into_iter().next().ok_or("no share")?;
    let part = Part::new(weights, share.clone());
    let (weights, c): (&dyn Weights, _) = (&part, &share.config);
    let sizes = Sizes::of(c, format.element(), kept);
    let full = c.layer_types.iter().filter(|mixer| **mixer == Mixer::Full).count();
    let linear = c.layer_types.len() - full;
    let state = product(&[linear, sizes.conv + sizes.recurrent, demand.sequences]);
    let cache =
        |tokens, layers| product(&[2, layers, capacity(tokens), sizes.row, demand.sequences]);
    Ok(Memory {
        mapped: 0,
        owned: self::weights(weights, &share, format)?,
        state,
        cache: cache(demand.context, full).saturating_add(cache(demand.drafts, 1)),
        scratch: scratch(&share, format, demand),
    })
}

fn scratch(share: &Share, format: Format, demand: &Demand) -> u64 {
    let fast = fast(share, format).ok();
    let (rows, sequences) = (demand.fed.clamp(1, piece(fast)), demand.sequences.max(1));
    Room::of(&share.config, (format.element(), fast, share.ranks), (rows, sequences)).all()
}

/// Bytes of all weights of a share, which these are.
pub(super) fn weights(weights: &dyn Weights, share: &Share, format: Format) -> Result<u64, Error> {
    let has_mtp = weights.meta(names::MTP_FC).is_some();
    let block = block(weights);
    let mut all = 0;
    for entry in names::entries(weights.config(), has_mtp) {
        if share.cut(&entry.name, &entry.shape) == Cut::Elsewhere {
            continue;
        }
        let missing = || format!("{}: missing", entry.name);
        let Meta { shape, .. } = weights.meta(&entry.name).ok_or_else(missing)?;
        let elements = shape.iter().map(|&n| n as u64).product::<u64>();
        all += match entry.role {
            Role::Embedding | Role::LmHead | Role::In | Role::Out | Role::Router => {
                let stored = kept(weights, format, &entry.name)?;
                let (rows, columns) = (shape[0], shape[1..].iter().product::<usize>());
                let scales = rows.div_ceil(block[0]) * columns.div_ceil(block[1]) * 4;
                let scales = if stored == Stored::Fp8 { scales } else { 0 };
                elements * stored.size() as u64 + scales as u64
            }
            Role::Norm | Role::GatedNorm | Role::ALog | Role::DtBias | Role::Conv => 4 * elements,
        };
    }
    Ok(all)
}

/// Refuses weights that do not fit.
pub(super) fn fits_weights(device: &Device, needs: u64) -> Result<(), Error> {
    let free = device.free()?;
    if needs <= free {
        return Ok(());
    }
    Err(Unfit(format!(
        "memory of the GPU: weights need {:.1} GiB, {:.1} GiB are free; fewer layers or experts, or weights in \
         FP8, would fit",
        gib(needs),
        gib(free)
    ))
    .into())
}

/// What was asked for and did not fit.
pub(super) fn unfit(device: &Device, (what, needs): (&str, Option<u64>), error: Error) -> Error {
    let full = error
        .downcast_ref::<device::Error>()
        .is_some_and(|error| error.to_string().contains("OUT_OF_MEMORY"));
    match device.free() {
        Ok(free) if full => {
            let needs = needs.map_or("do not fit".to_owned(), |needs| {
                format!("need {:.1} GiB more", gib(needs))
            });
            Unfit(format!("memory of the GPU: {what} {needs}, {:.1} GiB are free", gib(free)))
                .into()
        }
        _ => error,
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

fn product(sizes: &[usize]) -> u64 {
    sizes.iter().fold(1, |all, &n| all.saturating_mul(n as u64))
}

#[cfg(test)]
mod tests {
    use golden::{
        config::Preset,
        engine::{Demand, Narrowed},
        synthetic::Synthetic,
    };

    use super::memory;
    use crate::Kept;

    const DEMAND: Demand = Demand {
        sequences: 2,
        context: 300,
        fed: 9,
        logits: 1,
        hidden: 0,
        drafts: 0,
        narrowed: Narrowed::Owned,
    };

    #[test]
    fn memory_is_that_of_the_checkpoint_and_of_states() {
        let official: Synthetic = "synthetic:official,dtype=fp8".parse().unwrap();
        let stated = memory(&official, "bf16", None, 1, &DEMAND).unwrap();
        // 80 GB of FP8 and what stays in bf16.
        assert!((79..84).contains(&(stated.owned / 1_000_000_000)), "{}", stated.owned);
        assert_eq!(stated.state, 2 * 36 * (2 * 8192 * 3 + 4 * 32 * 128 * 128));
        assert_eq!(stated.cache, 2 * 2 * 12 * 512 * 2 * 256 * 2);
        let codes = memory(&official, "bf16", Some(Kept::Fp8), 1, &DEMAND).unwrap();
        assert_eq!((2 * codes.cache, codes.scratch), (stated.cache, stated.scratch));
        let wide = memory(&official, "f32", None, 1, &DEMAND).unwrap();
        assert_eq!(wide.owned, stated.owned);
        let tiny = Synthetic::new(Preset::Tiny.config(None, None).unwrap(), 0);
        assert!(memory(&tiny, "int8", None, 1, &DEMAND).is_err());
        for (format, kept) in [("bf16", Kept::Int8), ("bf16", Kept::F32), ("f32", Kept::Bf16)] {
            let why = memory(&tiny, format, Some(kept), 1, &DEMAND).unwrap_err().to_string();
            assert!(why.contains("fp8") && why.contains(kept.name()), "{why}");
        }
        let most = Demand { context: usize::MAX, ..DEMAND };
        assert_eq!(memory(&tiny, "f32", None, 1, &most).unwrap().must_fit(), u64::MAX);
    }

    /// Of eight GPUs each has an eighth of what is dealt, and all of what is not.
    #[test]
    fn a_share_is_stated_of_each_gpu() {
        let official: Synthetic = "synthetic:official,dtype=fp8".parse().unwrap();
        let [one, two, eight] =
            [1, 2, 8].map(|gpus| memory(&official, "bf16", None, gpus, &DEMAND).unwrap());
        // Embedding, routers, shared experts and what joins the draft head's inputs are everywhere, and projections of
        // keys and values are as often kept as their heads. Norms and scales are within a few megabytes.
        let layers = 48 + 1;
        let whole = 2 * 2048 * (151_936 + layers * 513 + 2 * 2048) + layers * 3 * 512 * 2048;
        let keys = (12 + 1) * 2 * 512 * 2048;
        for (gpus, stated) in [(2, two), (8, eight)] {
            let want = whole + (one.owned - whole - keys) / gpus + keys / 2;
            let got = stated.owned;
            assert!(got.abs_diff(want) < 2_000_000, "{gpus}: {got}, not {want}");
            assert_eq!(stated.state, one.state / gpus);
        }
        // Two heads of keys: two GPUs have one each, and eight do too.
        assert_eq!((two.cache, eight.cache), (one.cache / 2, one.cache / 2));
        assert!(
            memory(&official, "bf16", None, 3, &DEMAND)
                .is_err_and(|e| e.to_string().contains("16 fit"))
        );
    }
}
