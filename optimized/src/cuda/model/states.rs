//! What sequences leave behind for their next tokens, on the device.
//!
//! Every sequence has a place of its own in the buffers of each layer; caches have room for so many tokens of
//! each, and grow. Where a cache is not yet filled lies what was there before, and nobody reads it.

use golden::{Config, config::Mixer};

use crate::cuda::{
    device::{Buffer, Device, Error},
    engine::{Element, Stored},
};

/// The states of all sequences.
pub(super) struct States {
    /// Tokens that each holds.
    pub(super) lengths: Vec<usize>,
    /// Entries of the draft head's cache of each.
    pub(super) drafts: Vec<usize>,
    pub(super) layers: Vec<LayerState>,
    pub(super) mtp: Option<Cache>,
    /// Counts the times that buffers took another place.
    pub(super) moved: u64,
}

pub(super) enum LayerState {
    Linear(Linear),
    Full(Cache),
}

/// Of the delta rule.
pub(super) struct Linear {
    /// `[S, C, W - 1]` of E.
    pub(super) conv: Buffer,
    /// `[S, HV, K, V]` f32.
    pub(super) recurrent: Buffer,
}

/// Keys and values.
pub(super) struct Cache {
    /// `[S, capacity, HKV, H]` of what it is kept in.
    pub(super) k: Buffer,
    pub(super) v: Buffer,
    pub(super) kept: Stored,
    /// Tokens that each sequence has room for.
    pub(super) capacity: usize,
}

/// Bytes of states.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) conv: usize,
    pub(super) recurrent: usize,
    /// Keys, or values, of a token.
    pub(super) row: usize,
    /// What those are kept in.
    pub(super) kept: Stored,
}

impl Sizes {
    pub(super) fn of(c: &Config, element: Element, kept: Stored) -> Sizes {
        Sizes {
            conv: c.conv_dim() * (c.linear_conv_kernel_dim - 1) * element.size(),
            recurrent: c.linear_value_dim() * c.linear_key_head_dim * 4,
            row: c.num_key_value_heads * c.head_dim * kept.size(),
            kept,
        }
    }
}

/// A copy of states.
pub(super) struct Saved {
    lengths: Vec<usize>,
    drafts: Vec<usize>,
    /// Of each layer: windows and states, or keys and values.
    layers: Vec<[Buffer; 2]>,
    mtp: Option<[Buffer; 2]>,
}

/// Tokens that a cache has room for where so many are asked for: a quarter more, so that it is not asked
/// for every token.
pub(super) fn capacity(tokens: usize) -> usize {
    /// Caches grow by so many at the least.
    const GRAIN: usize = 256;
    /// And by so many at the most.
    const MOST: usize = 1 << 16;
    let more = tokens.saturating_add((tokens / 4).min(MOST));
    more.checked_next_multiple_of(GRAIN).unwrap_or(usize::MAX)
}

impl States {
    /// Of no sequence.
    pub(super) fn none() -> States {
        States { lengths: vec![], drafts: vec![], layers: vec![], mtp: None, moved: 0 }
    }

    pub(super) fn sequences(&self) -> usize {
        self.lengths.len()
    }

    /// Makes all sequences empty, and so many of them.
    pub(super) fn reset(
        &mut self,
        device: &Device,
        (c, sizes): (&Config, Sizes),
        (sequences, mtp): (usize, bool),
    ) -> Result<(), Error> {
        if sequences == self.sequences() {
            self.lengths.fill(0);
            self.drafts.fill(0);
            for layer in &mut self.layers {
                if let LayerState::Linear(state) = layer {
                    device.clear(&mut state.conv)?;
                    device.clear(&mut state.recurrent)?;
                }
            }
            return Ok(());
        }
        // What there was goes first: both may not fit.
        *self = States { moved: self.moved + 1, ..States::none() };
        if sequences == 0 {
            return Ok(());
        }
        for mixer in &c.layer_types {
            self.layers.push(match mixer {
                Mixer::Linear => LayerState::Linear(Linear {
                    conv: device.room(sequences * sizes.conv)?,
                    recurrent: device.room(sequences * sizes.recurrent)?,
                }),
                Mixer::Full => LayerState::Full(Cache::none(device, sizes.kept)?),
            });
        }
        if mtp {
            self.mtp = Some(Cache::none(device, sizes.kept)?);
        }
        self.lengths = vec![0; sequences];
        self.drafts = vec![0; sequences];
        Ok(())
    }

    /// Makes room for so many tokens of each sequence.
    pub(super) fn grow(&mut self, device: &Device, row: usize, tokens: usize) -> Result<(), Error> {
        for layer in &mut self.layers {
            if let LayerState::Full(cache) = layer
                && cache.grow(device, &self.lengths, row, tokens)?
            {
                self.moved += 1;
            }
        }
        Ok(())
    }

    /// The same of the draft head's cache.
    pub(super) fn grow_drafts(
        &mut self,
        device: &Device,
        row: usize,
        entries: usize,
    ) -> Result<(), Error> {
        if let Some(cache) = &mut self.mtp
            && cache.grow(device, &self.drafts, row, entries)?
        {
            self.moved += 1;
        }
        Ok(())
    }

    /// A copy of everything.
    pub(super) fn save(&self, device: &Device, sizes: Sizes) -> Result<Saved, Error> {
        let layer = |layer: &LayerState| match layer {
            LayerState::Linear(state) => state.save(device),
            LayerState::Full(cache) => cache.save(device, &self.lengths, sizes.row),
        };
        let layers = self.layers.iter().map(layer).collect::<Result<_, _>>()?;
        let mtp = self.mtp.as_ref().map(|cache| cache.save(device, &self.drafts, sizes.row));
        let (lengths, drafts) = (self.lengths.clone(), self.drafts.clone());
        Ok(Saved { lengths, drafts, layers, mtp: mtp.transpose()? })
    }

    /// A copy of what a step overwrites, without the draft head's.
    pub(super) fn save_linear(&self, device: &Device) -> Result<Saved, Error> {
        let layer = |layer: &LayerState| match layer {
            LayerState::Linear(state) => state.save(device),
            LayerState::Full(_) => Ok([device.room(0)?, device.room(0)?]),
        };
        let layers = self.layers.iter().map(layer).collect::<Result<_, _>>()?;
        Ok(Saved { lengths: self.lengths.clone(), drafts: vec![], layers, mtp: None })
    }

    /// Back to what [`save`](Self::save) copied, of as many sequences.
    pub(super) fn load(
        &mut self,
        device: &Device,
        saved: &Saved,
        (c, sizes): (&Config, Sizes),
    ) -> Result<(), Error> {
        let mtp = saved.mtp.is_some();
        if self.sequences() != saved.lengths.len() {
            self.reset(device, (c, sizes), (saved.lengths.len(), mtp))?;
        }
        // Nothing that is held now has to be kept where caches grow.
        self.lengths.fill(0);
        self.drafts.fill(0);
        self.grow(device, sizes.row, saved.lengths.iter().copied().max().unwrap_or(0))?;
        self.grow_drafts(device, sizes.row, saved.drafts.iter().copied().max().unwrap_or(0))?;
        for (layer, saved_layer) in self.layers.iter_mut().zip(&saved.layers) {
            match layer {
                LayerState::Linear(state) => state.load(device, saved_layer)?,
                LayerState::Full(cache) => {
                    cache.load(device, saved_layer, &saved.lengths, sizes.row)?;
                }
            }
        }
        if let (Some(cache), Some(saved_cache)) = (&mut self.mtp, &saved.mtp) {
            cache.load(device, saved_cache, &saved.drafts, sizes.row)?;
        }
        self.lengths.clone_from(&saved.lengths);
        self.drafts.clone_from(&saved.drafts);
        Ok(())
    }

    /// Back to what [`save_linear`](Self::save_linear) copied: caches are cut.
    pub(super) fn load_linear(&mut self, device: &Device, saved: &Saved) -> Result<(), Error> {
        for (layer, saved) in self.layers.iter_mut().zip(&saved.layers) {
            if let LayerState::Linear(state) = layer {
                state.load(device, saved)?;
            }
        }
        self.lengths.clone_from(&saved.lengths);
        Ok(())
    }
}

impl Linear {
    fn save(&self, device: &Device) -> Result<[Buffer; 2], Error> {
        Ok([copied(device, &self.conv)?, copied(device, &self.recurrent)?])
    }

    fn load(&mut self, device: &Device, [conv, recurrent]: &[Buffer; 2]) -> Result<(), Error> {
        device.copy((conv, 0), (&mut self.conv, 0), conv.len())?;
        device.copy((recurrent, 0), (&mut self.recurrent, 0), recurrent.len())
    }
}

fn copied(device: &Device, buffer: &Buffer) -> Result<Buffer, Error> {
    let mut copy = device.room(buffer.len())?;
    device.copy((buffer, 0), (&mut copy, 0), buffer.len())?;
    Ok(copy)
}

impl Cache {
    fn none(device: &Device, kept: Stored) -> Result<Cache, Error> {
        Ok(Cache { k: device.room(0)?, v: device.room(0)?, kept, capacity: 0 })
    }

    /// Makes room for so many tokens of each sequence; whether anything moved.
    fn grow(
        &mut self,
        device: &Device,
        lengths: &[usize],
        row: usize,
        tokens: usize,
    ) -> Result<bool, Error> {
        if tokens <= self.capacity {
            return Ok(false);
        }
        let capacity = capacity(tokens);
        for old in [&mut self.k, &mut self.v] {
            let mut new = device.room(lengths.len() * capacity * row)?;
            for (s, &length) in lengths.iter().enumerate() {
                let from = (&*old, s * self.capacity * row);
                device.copy(from, (&mut new, s * capacity * row), length * row)?;
            }
            *old = new;
        }
        self.capacity = capacity;
        Ok(true)
    }

    fn save(&self, device: &Device, lengths: &[usize], row: usize) -> Result<[Buffer; 2], Error> {
        let all: usize = lengths.iter().sum();
        let save = |from: &Buffer| {
            let mut copy = device.room(all * row)?;
            let mut at = 0;
            for (s, &length) in lengths.iter().enumerate() {
                let from = (from, s * self.capacity * row);
                device.copy(from, (&mut copy, at * row), length * row)?;
                at += length;
            }
            Ok::<_, Error>(copy)
        };
        Ok([save(&self.k)?, save(&self.v)?])
    }

    fn load(
        &mut self,
        device: &Device,
        saved: &[Buffer; 2],
        lengths: &[usize],
        row: usize,
    ) -> Result<(), Error> {
        for (to, saved) in [&mut self.k, &mut self.v].into_iter().zip(saved) {
            let mut at = 0;
            for (s, &length) in lengths.iter().enumerate() {
                let to = (&mut *to, s * self.capacity * row);
                device.copy((saved, at * row), to, length * row)?;
                at += length;
            }
        }
        Ok(())
    }
}
